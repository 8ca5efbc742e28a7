"""Modulators computed once: every (time, label) row that a sampling run will ask for.

The modulation of a block depends on a time and a label, never on the image. A sampler
visits a few dozen times, the same for every request, and a request has a few distinct
labels, so all of it can be computed before the first step: one matrix product per block
over all (time, label) rows. What remains is a table, and a third of the model's weights
(the modulators) need not be in memory any more.

The table is exact, not an approximation, and it belongs to exactly one set of weights,
one list of times and one set of labels. Each of them is kept with it, and
:func:`~fusionopt_jax.dit.check_cache` refuses any other.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt32

from fusionopt_jax._types import Params
from fusionopt_jax.dit.cache.fingerprint import DIGEST, PARTS, fingerprint
from fusionopt_jax.dit.cache.size import check_size
from fusionopt_jax.dit.config import DiTConfig
from fusionopt_jax.dit.network.model import as_dict, check_labels
from fusionopt_jax.dit.network.modulation import block_parts, conditioning, final_parts


class StaleCacheError(ValueError):
    """A cache does not fit the weights, times, labels, dtype or config in use."""


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class TimeConditioningCache:
    """All modulators that a sampling run needs, as a pytree.

    It is immutable and goes through `jax.jit`, `jax.device_put` and `lax.scan` like any
    other tree. Scan it, do not close over it: a closure bakes the table into
    the program.

    Attributes:
        block: `[steps, depth, labels, 6, hidden]`.
        final: `[steps, labels, 2, hidden]`.
        times: `[steps]` float32, in the order of the sampler.
        labels: `[labels]` int32: distinct labels, then null labels up to a power of 2.
        fingerprint: `[weights, 2]` uint32, digests of the weights it was made from.
        config: The sizes of the model; static.
    """

    block: Float[Array, "s depth u 6 d"]
    final: Float[Array, "s u 2 d"]
    times: Float[Array, "s"]
    labels: Int[Array, "u"]
    fingerprint: UInt32[Array, "parts 2"]
    config: DiTConfig

    def tree_flatten_with_keys(self) -> tuple[Any, DiTConfig]:
        """Split into arrays with their names, and the config."""
        names = ("block", "final", "times", "labels", "fingerprint")
        keys = [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in names]
        return keys, self.config

    @classmethod
    def tree_unflatten(
        cls, config: DiTConfig, children: Sequence[Any]
    ) -> "TimeConditioningCache":
        """Join leaves of any kind: JAX also puts shardings and holes in their place."""
        cache = object.__new__(cls)
        names = ("block", "final", "times", "labels", "fingerprint")
        for name, child in zip(names, children, strict=True):
            object.__setattr__(cache, name, child)
        object.__setattr__(cache, "config", config)
        return cache

    @property
    def nbytes(self) -> int:
        """Bytes of the table on the device."""
        return self.block.nbytes + self.final.nbytes


def distinct_labels(config: DiTConfig, labels: Any) -> Int[np.ndarray, "u"]:
    """The labels that a cache holds, padded so that requests share programs.

    Args:
        config: The sizes of the model.
        labels: The request's labels, any shape and order, with or without repeats.

    Returns:
        int32: the distinct labels in ascending order, then the null label until the
        length is a power of two. A model without a null label repeats its last label.

    Raises:
        ValueError: If a label is out of range, or there is none.
        TypeError: If labels are not integers, or traced by `jax.jit`.

    Example:
        >>> config = DiTConfig(num_classes=10)
        >>> distinct_labels(config, [7, 3, 3]).tolist()
        [3, 7, 10, 10]
    """
    if isinstance(labels, Tracer):
        raise TypeError(
            "`labels` of a cache must be known outside `jax.jit`, since their number "
            "shapes the cache; build it before and pass it in."
        )
    labels = np.asarray(labels)
    check_labels(config, labels)
    distinct = np.unique(labels)
    if distinct.size == 0:
        raise ValueError("`labels` is empty; a cache needs at least one label.")
    if config.has_null_label:
        distinct = np.append(distinct[distinct != config.null_label], config.null_label)
    padded = 1 << (distinct.size - 1).bit_length()
    padding = np.full(padded - distinct.size, distinct[-1])
    return np.concatenate([distinct, padding]).astype(np.int32)


def build_cache(
    params: Params,
    config: DiTConfig,
    times: Any,
    labels: Any,
    *,
    dtype: DTypeLike = jnp.float32,
    include_zero_time: bool = False,
    force: bool = False,
) -> TimeConditioningCache:
    r"""Compute every modulator that a sampling run needs.

    .. math:: m_{s,l,i} = W_i\,\mathrm{SiLU}(\mathrm{emb}(t_s)+\mathrm{emb}(y_l)) + b_i

    for each time :math:`t_s` of `times`, label :math:`y_l` of `labels` and block i, as
    one matrix product per block. SiLU comes after the sum, so this does not split into
    a table of times and one of labels.

    Args:
        params: Full parameters.
        config: The sizes of the model.
        times: `[steps]` model times in the order of the sampler, such as
            `sampler.eval_times()`.
        labels: The request's labels, in any order and with repeats; the null label is
            added if the model has one. Never pass all classes of a large model.
        dtype: Type of the table. It is computed in fp32 and rounded once. bfloat16
            halves it, and moves samples by about 1e-2.
        include_zero_time: Add an entry for time 0 at the end, unless it is there.
        force: Build it without a word even if it is larger than the modulators that it
            replaces: where steps * labels is above hidden_size + 1, at equal dtype.
            Such a cache can still save time, but no memory.

    Returns:
        The cache.

    Raises:
        ValueError: If labels are out of range, times are not finite, the parameters
            were stripped, or the cache would be larger than both the modulators and
            256 MiB (`cache_size.SIZE_LIMIT`).
        TypeError: If `times` or `labels` are traced by `jax.jit`.

    Warns:
        UserWarning: If the cache is larger than the modulators, up to 256 MiB.

    Example:
        >>> from fusionopt_jax.dit import init_params
        >>> config = DiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=4)
        >>> cache = build_cache(init_params(config), config, [999.0, 500.0], [207, 360])
        >>> cache.block.shape, cache.labels.tolist()
        ((2, 2, 4, 6, 32), [207, 360, 1000, 1000])

    Source: the layout is ours. Others precompute the same table for PyTorch and MLX
    models; `docs/dit.md` names them.
    """
    times = schedule_times(times, include_zero_time=include_zero_time)
    distinct = distinct_labels(config, labels)
    return build_rows(as_dict(params), config, times, distinct, dtype, force=force)


def build_rows(
    params: Params,
    config: DiTConfig,
    times: Float[np.ndarray, "s"],
    labels: Int[np.ndarray, "u"],
    dtype: DTypeLike,
    *,
    force: bool,
) -> TimeConditioningCache:
    """`build_cache` for times and labels that were already checked and padded.

    Args:
        params: Full parameters, as a dict.
        config: The sizes of the model.
        times: What :func:`schedule_times` returns.
        labels: What :func:`distinct_labels` returns.
        dtype: Type of the table.
        force: As `build_cache` has it. A warning names the line that called this
            function's caller.

    Returns:
        The cache.

    Raises:
        ValueError: If the parameters were stripped, or the cache would be too large.

    Example:
        >>> from fusionopt_jax.dit import init_params
        >>> config = DiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=4)
        >>> params, times = init_params(config), np.array([999.0], np.float32)
        >>> labels = distinct_labels(config, [207])
        >>> build_rows(params, config, times, labels, jnp.float32, force=False).nbytes
        3584
    """
    for part in ("blocks", "final_layer"):
        if "kernel" not in params[part].get("adaLN_modulation", {}):
            raise ValueError(
                f"`params` have no {part}/adaLN_modulation/kernel: a cache is built "
                "from the full parameters, before `strip_modulators`."
            )
    if not force:
        weight_dtype = params["blocks"]["adaLN_modulation"]["kernel"].dtype
        check_size(config, len(times), len(labels), dtype, weight_dtype)
    used = {
        "t_embedder": params["t_embedder"],
        "y_embedder": params["y_embedder"],
        "blocks": {"adaLN_modulation": params["blocks"]["adaLN_modulation"]},
        "final_layer": {"adaLN_modulation": params["final_layer"]["adaLN_modulation"]},
    }
    digests = fingerprint(used)
    block, final = _table(
        used, jnp.asarray(times), jnp.asarray(labels), config, jnp.dtype(dtype)
    )
    return TimeConditioningCache(
        block=block,
        final=final,
        times=jnp.asarray(times),
        labels=jnp.asarray(labels),
        fingerprint=jnp.asarray(digests),
        config=config,
    )


@functools.partial(jax.jit, static_argnums=(3, 4))
def _table(
    params: Params,
    times: Float[Array, "s"],
    labels: Int[Array, "u"],
    config: DiTConfig,
    dtype: Any,
) -> tuple[Float[Array, "s depth u 6 d"], Float[Array, "s u 2 d"]]:
    """Both tables, from one product per block over all steps * labels rows."""
    steps, count = times.shape[0], labels.shape[0]
    cond = conditioning(
        params, config, jnp.repeat(times, count), jnp.tile(labels, steps)
    )

    def one_block(block: Params) -> Float[Array, "s u 6 d"]:
        """All rows of one block."""
        parts = block_parts(block, cond).astype(dtype)
        return parts.reshape(steps, count, *parts.shape[1:])

    block = jax.lax.map(one_block, params["blocks"]["adaLN_modulation"])
    final = final_parts(params["final_layer"]["adaLN_modulation"], cond).astype(dtype)
    return jnp.moveaxis(block, 0, 1), final.reshape(steps, count, *final.shape[1:])


def schedule_times(
    times: Any, *, include_zero_time: bool = False
) -> Float[np.ndarray, "s"]:
    """Times of a schedule as a float32 array on the host, in their order."""
    if isinstance(times, Tracer):
        raise TypeError(
            "`times` of a cache must be known outside `jax.jit`; build the cache "
            "before and pass it in."
        )
    values = np.asarray(times, dtype=np.float32)
    if values.ndim != 1 or values.size == 0 or not np.all(np.isfinite(values)):
        raise ValueError(
            "`times` must be a list of finite numbers, one per step, got an array of "
            f"shape {values.shape}; take `sampler.eval_times()`."
        )
    if include_zero_time and not np.any(values == 0.0):
        values = np.append(values, np.float32(0.0))
    return values


def strip_modulators(params: Params) -> Params:
    """Take out the weights that a cache replaces: a third of a DiT.

    The digests of what is taken out stay in its place, so that a stripped model still
    refuses a cache from other weights. The arrays themselves are not copied or deleted;
    their memory is free once nothing else refers to them.

    Args:
        params: Full parameters, as a nested dict or an `nnx.State`.

    Returns:
        A new nested dict in which `blocks/adaLN_modulation` and
        `final_layer/adaLN_modulation` hold one uint32 `fingerprint` each.

    Raises:
        ValueError: If the modulators are not there.

    Example:
        >>> from fusionopt_jax.dit import init_params
        >>> config = DiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=4)
        >>> stripped = strip_modulators(init_params(config))
        >>> list(stripped["blocks"]["adaLN_modulation"])
        ['fingerprint']
    """
    params = dict(as_dict(params))
    digests = fingerprint(params)
    for part in ("blocks", "final_layer"):
        names = [PARTS.index((part, "adaLN_modulation", n)) for n in ("kernel", "bias")]
        inner = dict(params[part])
        inner["adaLN_modulation"] = {DIGEST: jnp.asarray(digests[np.array(names)])}
        params[part] = inner
    return params
