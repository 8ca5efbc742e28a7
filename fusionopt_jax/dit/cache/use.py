"""Reading a cache: the row of a label, one step of it, and whether it fits at all."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt32

from fusionopt_jax._types import Params
from fusionopt_jax.dit.cache.dit import (
    StaleCacheError,
    TimeConditioningCache,
    schedule_times,
)
from fusionopt_jax.dit.cache.fingerprint import differing_parts, fingerprint
from fusionopt_jax.dit.config import DiTConfig
from fusionopt_jax.dit.network.model import as_dict
from fusionopt_jax.dit.network.modulation import CachedModulation


def cache_rows(cache: TimeConditioningCache, labels: Any) -> Int[Array, "b"]:
    """The row of the cache that each label uses.

    Args:
        cache: The cache.
        labels: `[batch]` integers.

    Returns:
        `[batch]` int32. While `jax.jit` traces, labels that the cache lacks can't be an
        error: they get a row beyond the table, for which `apply` returns NaN.

    Raises:
        StaleCacheError: If the cache lacks a label.

    Example:
        >>> from fusionopt_jax.dit import build_cache, init_params
        >>> config = DiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=4)
        >>> cache = build_cache(init_params(config), config, [999.0], [207, 360])
        >>> cache_rows(cache, jnp.array([360, 1000, 207])).tolist()
        [1, 2, 0]
    """
    if not isinstance(labels, Tracer) and not isinstance(cache.labels, Tracer):
        _check_cached_labels(cache, np.asarray(labels))
    return label_rows(cache.labels, jnp.asarray(labels))


def label_rows(known: Int[Array, "known"], labels: Int[Array, "b"]) -> Int[Array, "b"]:
    """The first place of each label among those of a table; one past it for others.

    Args:
        known: `[known]` labels that the table has.
        labels: `[batch]` labels that are looked for.

    Returns:
        `[batch]` int32.

    Example:
        >>> label_rows(jnp.array([3, 7, 10, 10]), jnp.array([10, 3, 5])).tolist()
        [2, 0, 4]
    """
    matches = labels[:, None] == known[None, :]
    first = jnp.argmax(matches, axis=1).astype(jnp.int32)
    return jnp.where(jnp.any(matches, axis=1), first, jnp.int32(known.shape[0]))


def step_modulation(
    cache: TimeConditioningCache, step: int, labels: Any
) -> CachedModulation:
    """What `apply` takes as `modulation` at one step, for sampling by hand.

    Args:
        cache: The cache.
        step: Index into `cache.times`; negative ones count from the end.
        labels: `[batch]` integers.

    Returns:
        The tables of that step with the row of each label.

    Raises:
        IndexError: If there is no such step.
        StaleCacheError: If the cache lacks a label.

    Example:
        >>> from fusionopt_jax.dit import apply, build_cache, init_params
        >>> config = DiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=4)
        >>> params, labels = init_params(config), jnp.array([360])
        >>> cache = build_cache(params, config, [999.0], labels)
        >>> modulation = step_modulation(cache, 0, labels)
        >>> images = jnp.ones((1, 8, 8, 4))
        >>> apply(params, config, images, None, None, modulation=modulation).shape
        (1, 8, 8, 8)
    """
    steps = cache.times.shape[0]
    if not -steps <= step < steps:
        raise IndexError(f"`step` must lie in [{-steps}, {steps - 1}], got {step}.")
    return CachedModulation(
        cache.block[step], cache.final[step], cache_rows(cache, labels)
    )


def check_cache(
    cache: TimeConditioningCache,
    params: Params,
    config: DiTConfig,
    *,
    times: Any = None,
    labels: Any = None,
    dtype: DTypeLike | None = None,
) -> None:
    """Refuse a cache that was made from something else than what is in use.

    The weights are compared by digests of their bits: the time and label embedders and
    all modulators. After `strip_modulators` the digests that it left are compared.
    Digests of device arrays are remembered, so checking again costs nothing.

    Args:
        cache: The cache.
        params: The parameters in use, full or stripped.
        config: The config in use.
        times: The times that will be asked for; None does not compare them. A trailing
            entry for time 0 in the cache (`include_zero_time`) is allowed.
        labels: The labels that will be asked for; None does not compare them.
        dtype: The type that the table should have; None accepts any.

    Raises:
        StaleCacheError: If anything differs. The message names what, and the remedy.
        ValueError: If modulators are missing and no digest of them was left.

    Example:
        >>> from fusionopt_jax.dit import build_cache, init_params, strip_modulators
        >>> config = DiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=4)
        >>> params = init_params(config, seed=0)
        >>> cache = build_cache(params, config, [999.0], [207])
        >>> check_cache(cache, strip_modulators(params), config, times=[999.0])
        >>> try:
        ...     check_cache(cache, init_params(config, seed=1), config)
        ... except StaleCacheError as error:
        ...     print(error)
        the cache was built from other weights: t_embedder/fc1/kernel, ...
    """
    _check_sizes(cache, config, dtype)
    if times is not None:
        _check_cached_times(cache, schedule_times(times))
    if labels is not None:
        _check_cached_labels(cache, np.asarray(labels))
    _check_digests(np.asarray(cache.fingerprint), fingerprint(as_dict(params)))


def checked_cache(
    cache: TimeConditioningCache,
    params: Params,
    config: DiTConfig,
    *,
    times: Any,
    labels: Any,
) -> TimeConditioningCache:
    """A cache that gives no image unless it fits, also inside your own `jax.jit`.

    Whatever is known is compared at once, as :func:`check_cache` does. Where the
    weights or the cache are arguments of a function that is being traced, the
    comparison becomes part of the program: the digests are computed on the device, and
    a table that does not fit becomes NaN, as it does for a label that it lacks. That
    reads the embedders, and the modulators if there are any, once per call of the
    program, not per step.

    Args:
        cache: The cache.
        params: The parameters in use, full or stripped.
        config: The config in use.
        times: The times that will be asked for.
        labels: The labels that will be asked for. Traced ones are not compared.

    Returns:
        The cache itself, or one whose table is NaN where it does not fit.

    Raises:
        StaleCacheError: If anything that is known differs.
        ValueError: If modulators are missing and no digest of them was left.

    Example:
        >>> from fusionopt_jax.dit import build_cache, init_params
        >>> config = DiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=4)
        >>> params = init_params(config, seed=0)
        >>> cache = build_cache(params, config, [999.0], [207])
        >>> @jax.jit
        ... def last_table(params):
        ...     return checked_cache(
        ...         cache, params, config, times=[999.0], labels=[207]
        ...     ).final
        >>> bool(jnp.isfinite(last_table(params)).all())
        True
        >>> bool(jnp.isnan(last_table(init_params(config, seed=1))).all())
        True
    """
    _check_sizes(cache, config, None)
    if not isinstance(labels, Tracer) and not isinstance(cache.labels, Tracer):
        _check_cached_labels(cache, np.asarray(labels))
    conditions = [_check_cached_times(cache, schedule_times(times))]
    digests = fingerprint(as_dict(params))
    if isinstance(digests, Tracer) or isinstance(cache.fingerprint, Tracer):
        conditions.append(jnp.all(cache.fingerprint == digests))
    else:
        _check_digests(np.asarray(cache.fingerprint), digests)
    fits = [condition for condition in conditions if condition is not None]
    if not fits:
        return cache
    # Every image goes through the final layer, and its table is the smaller one.
    final = jnp.where(jnp.all(jnp.stack(fits)), cache.final, jnp.nan)
    return dataclasses.replace(cache, final=final.astype(cache.final.dtype))


def _check_sizes(
    cache: TimeConditioningCache, config: DiTConfig, dtype: DTypeLike | None
) -> None:
    """Require the same config, and the dtype if one is asked for."""
    if cache.config != config:
        names = [
            f"{field.name} ({getattr(cache.config, field.name)} in the cache, "
            f"{getattr(config, field.name)} in use)"
            for field in dataclasses.fields(config)
            if getattr(cache.config, field.name) != getattr(config, field.name)
        ]
        raise StaleCacheError(
            f"the cache was built for another config: {', '.join(names)}; build it "
            "again with `build_cache`."
        )
    if dtype is not None and cache.block.dtype != jnp.dtype(dtype):
        raise StaleCacheError(
            f"the cache holds {cache.block.dtype}, but {jnp.dtype(dtype)} was asked "
            f"for; build it again with dtype={jnp.dtype(dtype).name!r}."
        )


def _check_digests(
    held: UInt32[np.ndarray, "parts 2"], wanted: UInt32[np.ndarray, "parts 2"]
) -> None:
    """Require the same weights."""
    changed = differing_parts(held, wanted)
    if changed:
        raise StaleCacheError(
            f"the cache was built from other weights: {', '.join(changed)} changed "
            "since (training, an average of weights, a merged adapter and a cast all "
            "do that); build it again with `build_cache` from the parameters in use."
        )


def _check_cached_times(
    cache: TimeConditioningCache, wanted: Float[np.ndarray, "n"]
) -> Bool[Array, ""] | None:
    """Require the same times bit by bit, but for a trailing zero.

    Traced times are compared by the program; the result is None for known ones.
    """
    count = cache.times.shape[0]
    expected = np.append(wanted, np.float32(0)) if count == wanted.size + 1 else wanted
    traced = isinstance(cache.times, Tracer)
    held = expected if traced else np.asarray(cache.times)
    if count != expected.size or (count > wanted.size and held[-1] != 0):
        detail = f"{count} steps in the cache, {wanted.size} in use"
    elif traced:
        return jnp.all(cache.times == expected)
    elif not np.array_equal(held, expected):
        step = int(np.argmax(held != expected))
        detail = f"step {step} is {held[step]} in the cache, {expected[step]} in use"
    else:
        return None
    raise StaleCacheError(
        f"the cache was built for other times ({detail}); build it again with "
        "`sampler.eval_times()` of the sampler in use."
    )


def _check_cached_labels(
    cache: TimeConditioningCache, wanted: Int[np.ndarray, "..."]
) -> None:
    """Require every label to have a row."""
    missing = np.setdiff1d(wanted, np.asarray(cache.labels))
    if missing.size:
        shown = ", ".join(str(label) for label in missing[:5])
        raise StaleCacheError(
            f"the cache has no row for label {shown}; build it again with the labels "
            "of this request."
        )
