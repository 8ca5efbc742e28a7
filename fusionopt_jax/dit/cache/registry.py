"""Keeping caches: in this process, and in a file that later processes read."""

import collections
import os
import pathlib
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from fusionopt_jax._types import Params
from fusionopt_jax.dit.cache.build import build_rows
from fusionopt_jax.dit.cache.dit import TimeConditioningCache
from fusionopt_jax.dit.cache.fingerprint import fingerprint
from fusionopt_jax.dit.cache.request import distinct_labels, schedule_times
from fusionopt_jax.dit.cache.table import StaleCacheError
from fusionopt_jax.dit.config import DiTConfig
from fusionopt_jax.dit.network.model import as_dict

REGISTRY_SIZE = 8
"""Caches that a process keeps; the one unused for longest leaves first."""


class CacheCounts(NamedTuple):
    """What `get_or_build_cache` did since the process started or was cleared.

    Attributes:
        hits: Requests answered from the process registry.
        loads: Requests answered from a file.
        builds: Requests for which a cache was computed.
    """

    hits: int
    loads: int
    builds: int


_registry: collections.OrderedDict[tuple[Any, ...], TimeConditioningCache] = (
    collections.OrderedDict()
)
_counts = CacheCounts(0, 0, 0)


def get_or_build_cache(
    params: Params,
    config: DiTConfig,
    times: Any,
    labels: Any,
    *,
    path: str | os.PathLike[str] | None = None,
    dtype: DTypeLike = jnp.float32,
    include_zero_time: bool = False,
    force: bool = False,
) -> TimeConditioningCache:
    """Return the cache for a request, computed only if it is not at hand yet.

    Looked for in this order: the registry of this process, then the file, then it is
    built. The registry is keyed by the digests of the weights, the config, the times,
    the distinct labels and the dtype, so that it can't return a stale one.

    Args:
        params: The parameters. Stripped ones will do where nothing has to be built.
        config: The sizes of the model.
        times: `[steps]` model times, such as `sampler.eval_times()`.
        labels: The request's labels, in any order and with repeats.
        path: A file (`.npz`) to read, or to write if it does not exist. It is written
            whole or not at all. None keeps the cache in the process only.
        dtype: Type of the table.
        include_zero_time: Add an entry for time 0 at the end, unless it is there.
        force: Build it without a word where `build_cache` would refuse its size or
            warn of it.

    Returns:
        The cache.

    Raises:
        StaleCacheError: If the file belongs to other weights, times, labels, dtype or
            config, is damaged, or is no cache. It is never overwritten.
        OSError: If the file can't be read or written.
        ValueError: As :func:`~fusionopt_jax.dit.build_cache` does.

    Warns:
        UserWarning: As `build_cache` does, and only where it is built.

    Example:
        >>> from fusionopt_jax.dit import init_params
        >>> config = DiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=4)
        >>> params = init_params(config)
        >>> first = get_or_build_cache(params, config, [999.0, 500.0], [207])
        >>> get_or_build_cache(params, config, [999.0, 500.0], [207, 207]) is first
        True
    """
    params = as_dict(params)
    host_times = schedule_times(times, include_zero_time=include_zero_time)
    distinct = distinct_labels(config, labels)
    key = (
        config,
        host_times.tobytes(),
        distinct.tobytes(),
        jnp.dtype(dtype).name,
        fingerprint(params).tobytes(),
    )
    file = None if path is None else pathlib.Path(path)
    cache = _registry.get(key)
    if cache is not None:
        _registry.move_to_end(key)
        _count("hits")
    elif file is not None and file.exists():
        cache = TimeConditioningCache.load(file)
        try:
            cache.check(params, config, times=host_times, labels=distinct, dtype=dtype)
        except StaleCacheError as error:
            raise StaleCacheError(
                f"{file} does not fit this request: {error} Delete the file or give "
                "another `path` to have a new one written."
            ) from error
        _count("loads")
    else:
        cache = build_rows(params, config, host_times, distinct, dtype, force=force)
        _count("builds")
    if file is not None and not file.exists():
        cache.save(file)
    _registry[key] = cache
    while len(_registry) > REGISTRY_SIZE:
        _registry.popitem(last=False)
    return cache


def clear_cache_registry() -> None:
    """Forget every cache that this process keeps, and set the counts to 0.

    Example:
        >>> clear_cache_registry()
        >>> cache_counts()
        CacheCounts(hits=0, loads=0, builds=0)
    """
    global _counts
    _registry.clear()
    _counts = CacheCounts(0, 0, 0)


def cache_counts() -> CacheCounts:
    """How often caches were found and built, for a log.

    Returns:
        The counts since the process started or `clear_cache_registry` was called.

    Example:
        >>> cache_counts()._fields
        ('hits', 'loads', 'builds')
    """
    return _counts


def _count(name: str) -> None:
    """Add one to a count."""
    global _counts
    _counts = _counts._replace(**{name: getattr(_counts, name) + 1})
