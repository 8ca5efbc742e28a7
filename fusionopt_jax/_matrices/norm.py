"""Norms of matrices, safe in every range."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from fusionopt_jax._types import Number


def frobenius_norm(
    X: Float[Array, "*batch m n"],
    unit: Number | None = None,
    *,
    axis: int | tuple[int, ...] = (-2, -1),
) -> Float[Array, "*batch _ _"]:
    """Each matrix's Frobenius norm, or that of a part along `axis`, in fp32.

    The squares of entries below 1e-19 or above 1e19 would leave the range of fp32. So
    entries are divided by `unit`, by the largest of the part if none is given. The sum
    has to fit: entries of an m × n matrix may be as large as 3e38/√(mn).
    """
    X = X.astype(jnp.float32)
    if unit is None:
        largest = jnp.max(jnp.abs(X), axis=axis, keepdims=True)
        unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    scaled = X / unit
    return unit * jnp.sqrt(jnp.sum(scaled * scaled, axis=axis, keepdims=True))
