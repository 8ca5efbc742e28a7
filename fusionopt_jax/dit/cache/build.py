"""Building the table of this library's DiT, and taking out what it replaces."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from fusionopt_jax._types import Params
from fusionopt_jax.dit.cache.dit import TimeConditioningCache
from fusionopt_jax.dit.cache.fingerprint import DIGEST, PARTS, fingerprint
from fusionopt_jax.dit.cache.request import distinct_labels, schedule_times
from fusionopt_jax.dit.cache.size import check_size
from fusionopt_jax.dit.cache.table import every_pair
from fusionopt_jax.dit.config import DiTConfig
from fusionopt_jax.dit.network.model import as_dict
from fusionopt_jax.dit.network.modulation import (
    MODULATED,
    MODULATOR,
    all_parts,
    modulators,
    replace_modulators,
    require_modulators,
)


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
    require_modulators(
        params,
        ": a cache is built from the full parameters, before `strip_modulators`.",
    )
    if not force:
        weight_dtype = params["blocks"][MODULATOR]["kernel"].dtype
        check_size(config, len(times), len(labels), dtype, weight_dtype)
    used = {
        "t_embedder": params["t_embedder"],
        "y_embedder": params["y_embedder"],
        **modulators(params),
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
    modulate = functools.partial(all_parts, config=config, dtype=dtype)
    block, final = every_pair(modulate, params, times, labels)
    # The network scans over its blocks, and reads the rows of one at a time.
    return jnp.moveaxis(block, 2, 1), final


def strip_modulators(params: Params) -> dict[str, Any]:
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
    params = as_dict(params)
    digests = fingerprint(params)
    kept = {}
    for part in MODULATED:
        names = [PARTS.index((part, MODULATOR, name)) for name in ("kernel", "bias")]
        kept[part] = {DIGEST: jnp.asarray(digests[np.array(names)])}
    return replace_modulators(params, kept)
