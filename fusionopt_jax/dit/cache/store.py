"""Keeping caches: in this process, and in a file that later processes read."""

import collections
import dataclasses
import hashlib
import io
import json
import os
import pathlib
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from fusionopt_jax._types import Params
from fusionopt_jax.dit.cache.dit import (
    StaleCacheError,
    TimeConditioningCache,
    build_rows,
    distinct_labels,
    schedule_times,
)
from fusionopt_jax.dit.cache.fingerprint import PARTS, fingerprint
from fusionopt_jax.dit.cache.use import check_cache
from fusionopt_jax.dit.config import DiTConfig
from fusionopt_jax.dit.files import check_archive, replacing
from fusionopt_jax.dit.network.model import as_dict
from fusionopt_jax.dit.network.modulation import BLOCK_PARTS, FINAL_PARTS

REGISTRY_SIZE = 8
"""Caches that a process keeps; the one unused for longest leaves first."""

_FORMAT = "fusionopt_jax modulator cache 2"


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
        cache = load_cache(file)
        try:
            check_cache(
                cache, params, config, times=host_times, labels=distinct, dtype=dtype
            )
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
        save_cache(file, cache)
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


def save_cache(path: str | os.PathLike[str], cache: TimeConditioningCache) -> None:
    """Write a cache to a file, whole or not at all.

    Args:
        path: The file; one that exists is replaced.
        cache: The cache.

    Raises:
        OSError: If the file can't be written.

    Example:
        >>> import pathlib, tempfile
        >>> from fusionopt_jax.dit import build_cache, init_params
        >>> config = DiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=4)
        >>> cache = build_cache(init_params(config), config, [999.0], [207])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_cache(pathlib.Path(folder) / "cache.npz", cache)
        ...     loaded = load_cache(pathlib.Path(folder) / "cache.npz")
        >>> bool((loaded.block == cache.block).all())
        True
    """
    arrays = {
        "format": np.array(_FORMAT),
        "dtype": np.array(cache.block.dtype.name),
        "config": np.array(json.dumps(dataclasses.asdict(cache.config))),
        "times": np.asarray(cache.times),
        "labels": np.asarray(cache.labels),
        "fingerprint": np.asarray(cache.fingerprint),
        # As bytes: the npz format has no name for bfloat16.
        "block": np.asarray(cache.block).reshape(-1).view(np.uint8),
        "final": np.asarray(cache.final).reshape(-1).view(np.uint8),
    }
    arrays["digest"] = np.array(_digest(arrays))
    with replacing(path) as stream:
        np.savez(stream, **arrays)


def load_cache(path: str | os.PathLike[str]) -> TimeConditioningCache:
    """Read a cache from a file, without checking what it fits.

    Args:
        path: A file that :func:`save_cache` wrote.

    Returns:
        The cache; :func:`~fusionopt_jax.dit.check_cache` says whether it fits.

    Raises:
        OSError: If the file is not there, is a folder, or can't be read.
        StaleCacheError: If it is damaged, or no cache. The file holds a SHA-256 of all
            that is in it, so that a table with other numbers is never returned.

    Example:
        >>> load_cache("nowhere.npz")
        Traceback (most recent call last):
        ...
        FileNotFoundError: [Errno 2] No such file or directory: 'nowhere.npz'
    """
    # Read here, so that an error of the file system is not mistaken for damage.
    stream = io.BytesIO(pathlib.Path(path).read_bytes())
    try:
        check_archive(stream)
        with np.load(stream, allow_pickle=False) as file:
            if str(file["format"]) != _FORMAT:
                raise ValueError(f"its format is {str(file['format'])!r}")
            arrays = {name: file[name] for name in file.files}
        if str(arrays["digest"]) != _digest(arrays):
            raise ValueError("its content does not have the digest that it names")
        return _from_arrays(arrays)
    except Exception as error:
        # A damaged archive fails in too many ways to list: zlib, struct, Unicode, JSON.
        raise StaleCacheError(
            f"{os.fspath(path)} is not a readable modulator cache ({error}); delete it "
            "to have a new one written."
        ) from error


def _digest(arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 of every array but the digest itself: names, types, shapes and bytes."""
    total = hashlib.sha256()
    for name in sorted(arrays.keys() - {"digest"}):
        array = np.ascontiguousarray(arrays[name])
        total.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        total.update(array.reshape(-1).view(np.uint8))
    return total.hexdigest()


def _from_arrays(arrays: dict[str, np.ndarray]) -> TimeConditioningCache:
    """A cache from the arrays of a file, with every shape checked."""
    config = DiTConfig(**json.loads(str(arrays["config"])))
    dtype = jnp.dtype(str(arrays["dtype"]))
    times, labels = arrays["times"], arrays["labels"]
    expected = {
        "times": (np.float32, times.shape[:1]),
        "labels": (np.int32, labels.shape[:1]),
        "fingerprint": (np.uint32, (len(PARTS), 2)),
    }
    for name, (kind, shape) in expected.items():
        if arrays[name].dtype != kind or arrays[name].shape != shape or not shape:
            raise ValueError(f"its {name} are {arrays[name].dtype}{arrays[name].shape}")
    steps, count, width = len(times), len(labels), config.hidden_size
    block_shape = (steps, config.depth, count, BLOCK_PARTS, width)
    final_shape = (steps, count, FINAL_PARTS, width)
    return TimeConditioningCache(
        block=jnp.asarray(arrays["block"].view(dtype).reshape(block_shape)),
        final=jnp.asarray(arrays["final"].view(dtype).reshape(final_shape)),
        times=jnp.asarray(times),
        labels=jnp.asarray(labels),
        fingerprint=jnp.asarray(arrays["fingerprint"]),
        config=config,
    )
