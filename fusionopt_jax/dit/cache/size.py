"""What a cache of modulators costs, and the rule of when that is too much."""

import warnings

import jax.numpy as jnp
from jax.typing import DTypeLike

from fusionopt_jax.dit.config import DiTConfig
from fusionopt_jax.dit.network.modulation import BLOCK_PARTS, FINAL_PARTS

SIZE_LIMIT = 256 * 2**20
"""Bytes up to which a cache may be larger than the modulators, with a warning."""


def cache_bytes(
    config: DiTConfig, steps: int, labels: int, dtype: DTypeLike = jnp.float32
) -> int:
    """Bytes of a cache, before building it.

    A row, one (time, label) pair, has depth * 6 D + 2 D values with D = hidden_size.
    A cache is smaller than the modulators it replaces if and only if
    `steps` * `labels` < D + 1, when both have the same dtype.

    Args:
        config: The sizes of the model.
        steps: Times in the schedule.
        labels: Distinct labels with padding, as `distinct_labels` returns.
        dtype: Type of the table.

    Returns:
        The number of bytes.

    Example:
        >>> from fusionopt_jax.dit import CONFIGS
        >>> cache_bytes(CONFIGS["DiT-XL/2"], steps=50, labels=2) / 2**20
        74.7...
    """
    row = (config.depth * BLOCK_PARTS + FINAL_PARTS) * config.hidden_size
    return steps * labels * row * jnp.dtype(dtype).itemsize


def modulator_bytes(config: DiTConfig, dtype: DTypeLike = jnp.float32) -> int:
    """Bytes of the weights that a cache replaces, a third of a DiT.

    Args:
        config: The sizes of the model.
        dtype: Type of the weights.

    Returns:
        The number of bytes.

    Example:
        >>> from fusionopt_jax.dit import CONFIGS
        >>> modulator_bytes(CONFIGS["DiT-XL/2"]) / 2**20
        861.37...
    """
    return cache_bytes(config, 1, config.hidden_size + 1, dtype)


def check_size(
    config: DiTConfig,
    steps: int,
    labels: int,
    dtype: DTypeLike,
    weight_dtype: DTypeLike,
) -> None:
    """Refuse or warn of a cache that takes more memory than what it replaces.

    Args:
        config: The sizes of the model.
        steps: Times in the schedule.
        labels: Distinct labels with padding.
        dtype: Type of the table.
        weight_dtype: Type of the modulators.

    Raises:
        ValueError: If it takes more than both the modulators and `SIZE_LIMIT`.

    Warns:
        UserWarning: If it takes more than the modulators, up to `SIZE_LIMIT`.

    Example:
        >>> from fusionopt_jax.dit import CONFIGS
        >>> check_size(CONFIGS["DiT-XL/2"], 50, 2, jnp.float32, jnp.float32)
    """
    size = cache_bytes(config, steps, labels, dtype)
    weights = modulator_bytes(config, weight_dtype)
    if size <= weights:
        return
    fact = (
        f"a cache of {steps} steps x {labels} labels takes {size_text(size)}, more "
        f"than the {size_text(weights)} of modulators that it replaces (they break "
        f"even at steps x labels = {weights / cache_bytes(config, 1, 1, dtype):g})"
    )
    # A small model's cache is often larger than its modulators, and nobody runs out of
    # memory below the limit.
    if size > SIZE_LIMIT:
        raise ValueError(
            f"{fact}. Sample without a cache (cache=None), with fewer distinct labels "
            "or steps at a time, or pass force=True."
        )
    # Past this function, `build_rows`, and the public function that was called.
    warnings.warn(
        f"{fact}: it can save time, but no memory. Pass force=True to build it without "
        "this warning, or sample without a cache (cache=None).",
        UserWarning,
        stacklevel=4,
    )


def size_text(size: int) -> str:
    """A number of bytes for people.

    Args:
        size: Bytes.

    Returns:
        It in MiB, to two digits at least.

    Example:
        >>> size_text(861 * 2**20), size_text(3 * 2**10)
        ('861.0 MiB', '0.0029 MiB')
    """
    mebibytes = size / 2**20
    return f"{mebibytes:,.1f} MiB" if mebibytes >= 1 else f"{mebibytes:.2g} MiB"
