r"""Self-attention: every token takes a weighted mean over the tokens of its image.

.. math:: o_i = \frac{\sum_j e_{ij}\, v_j}{\sum_j e_{ij}}, \qquad
    e_{ij} = \exp\bigl(q_i \cdot k_j / \sqrt{h} - m_i\bigr), \qquad
    m_i = \max_j q_i \cdot k_j / \sqrt{h}

for heads of width h. The division comes last, as in Dao et al. (arXiv 2205.14135): it
is of `tokens · h` numbers in place of `tokens²`, and so is the sum in the gradient of
the denominator.
"""

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

AttentionKernel: TypeAlias = Literal["xla", "cudnn"] | None
"""Which implementation; None is :func:`attention_in_fp32` where operands are fp32."""

NUMERATOR, DENOMINATOR, MAXIMUM, RESULT = KEPT = (
    "attention numerator",
    "attention denominator",
    "attention maximum",
    "attention result",
)
"""Names, for `jax.checkpoint`, of what is worth keeping: all but `tokens²` numbers."""


def self_attention(
    fused: Float[Array, "b tokens qkv"], num_heads: int, kernel: AttentionKernel = None
) -> Float[Array, "b tokens d"]:
    """Multi-head attention of a fused q, k and v, laid out as (3, heads, head width).

    Args:
        fused: What the map to q, k and v returned.
        num_heads: Heads; they divide the width.
        kernel: "xla" and "cudnn" are those of `jax.nn.dot_product_attention`; None is
            :func:`attention_in_fp32` for fp32 and "xla" for fewer bits.

    Returns:
        The heads side by side, in the type of `fused`.

    Example:
        >>> fused = jnp.ones((2, 3, 3 * 8))
        >>> self_attention(fused, num_heads=2).shape  # equal values: their mean is one
        (2, 3, 8)
    """
    batch, count, width = fused.shape[0], fused.shape[1], fused.shape[2] // 3
    split = fused.reshape(batch, count, 3, num_heads, width // num_heads)
    if kernel is None and fused.dtype == jnp.float32:
        q, k, v = split.transpose(2, 0, 3, 1, 4)
        mixed = attention_in_fp32(q, k, v).transpose(0, 2, 1, 3)
    else:
        # For half precision, which is for accelerators: XLA makes one kernel of this
        # softmax there.
        mixed = jax.nn.dot_product_attention(
            split[:, :, 0], split[:, :, 1], split[:, :, 2], implementation=kernel
        )
        mixed = checkpoint_name(mixed, RESULT)
    return mixed.reshape(batch, count, width)


def attention_in_fp32(
    q: Float[Array, "b heads tokens h"],
    k: Float[Array, "b heads tokens h"],
    v: Float[Array, "b heads tokens h"],
) -> Float[Array, "b heads tokens h"]:
    """The equation above."""
    logits = jnp.matmul(q * q.shape[-1] ** -0.5, k.swapaxes(-1, -2))
    # Its gradient is zero: it cancels in the fraction.
    maximum = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    maximum = checkpoint_name(maximum, MAXIMUM)
    weights = jnp.exp(logits - maximum)
    numerator = checkpoint_name(jnp.matmul(weights, v), NUMERATOR)
    denominator = jnp.sum(weights, axis=-1, keepdims=True)
    return numerator / checkpoint_name(denominator, DENOMINATOR)
