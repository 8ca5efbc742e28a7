"""What a cache is asked for: the times of a sampler and the labels of a request."""

from typing import Any

import numpy as np
from jax.core import Tracer
from jaxtyping import Float, Int

from fusionopt_jax.dit.config import DiTConfig
from fusionopt_jax.dit.network.embeddings import check_labels


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


def distinct_integers(labels: Any) -> Int[np.ndarray, "u"]:
    """The distinct labels of a request on the host, in rising order."""
    if isinstance(labels, Tracer):
        raise TypeError(
            "`labels` of a cache must be known outside `jax.jit`, since their number "
            "shapes the cache; build it before and pass it in."
        )
    values = np.asarray(labels)
    if values.size == 0:
        raise ValueError("`labels` is empty; a cache needs at least one label.")
    if not np.issubdtype(values.dtype, np.integer):
        raise TypeError(f"`labels` must be integers, got {values.dtype}.")
    distinct = np.unique(values)
    if not np.array_equal(distinct, distinct.astype(np.int32)):
        raise ValueError("`labels` must fit in 32 bits.")
    return distinct.astype(np.int32)


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
    distinct = distinct_integers(labels)
    check_labels(config, distinct)
    if config.has_null_label:
        distinct = np.append(distinct[distinct != config.null_label], config.null_label)
    padded = 1 << (distinct.size - 1).bit_length()
    padding = np.full(padded - distinct.size, distinct[-1])
    return np.concatenate([distinct, padding]).astype(np.int32)
