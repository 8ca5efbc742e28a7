"""The two operations that every part of the network shares."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from fusionopt_jax._types import Params

CONDITIONING_PRECISION = jax.lax.Precision.HIGHEST
"""Products of the conditioning path are full fp32 on every backend.

A cache multiplies other shapes than a single step does. With the shortened products
that GPUs and TPUs use for fp32 by default (10 bits on a GPU), the two could differ by
1e-3.
"""

LAYER_NORM_EPS = 1e-6
"""Added to the variance; the published constant, of every norm but the MLP's."""


def linear(
    params: Params,
    inputs: Float[Array, "*batch m"],
    dtype: DTypeLike = jnp.float32,
    precision: jax.lax.Precision | None = None,
) -> Float[Array, "*batch n"]:
    """Inputs times `kernel` plus `bias`: operands in `dtype`, result in fp32."""
    # One axis of rows: to sum over two of them, in the kernel's gradient, XLA would
    # first write the transpose of the rows' gradient.
    rows = inputs.reshape(-1, inputs.shape[-1])
    product = jnp.matmul(
        rows.astype(dtype),
        params["kernel"].astype(dtype),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    product = product.reshape(*inputs.shape[:-1], product.shape[-1])
    bias = params["bias"].astype(jnp.float32)
    return product + bias.reshape((1,) * (product.ndim - 1) + bias.shape)


def layer_norm(
    tokens: Float[Array, "*batch d"], eps: float = LAYER_NORM_EPS
) -> Float[Array, "*batch d"]:
    """Zero mean and unit variance over the width, in fp32 and without a scale."""
    tokens = tokens.astype(jnp.float32)
    # E[x^2] - E[x]^2 is one pass less, but cancels in fp32 where the mean is large.
    centred = tokens - jnp.mean(tokens, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return centred / jnp.sqrt(variance + eps)
