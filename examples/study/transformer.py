"""A small transformer without biases, for bytes and for image patches.

The blocks are stacked along a leading axis and scanned, so that the compiled program
does not grow with depth.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fusionopt_jax import MatrixAxes, Routing, Rule

HEADS = 4


def routing(chunks: bool = True) -> Routing:
    """Which weights are matrices; `chunks` splits the fused qkv kernel in three."""
    return Routing(
        rules=(
            *([Rule(r"^blocks/qkv$", axes=MatrixAxes(chunks=3))] if chunks else []),
            # What reads bytes or pixels, and what writes logits, goes to Adam.
            Rule(r"^(reader|positions|writer)$", label="scalar"),
        ),
        stacked=("blocks",),
    )


def init(
    key: jax.Array, inputs: int, outputs: int, length: int, width: int, depth: int
) -> dict[str, Any]:
    """Fresh weights of fp32, kernels `(in, out)`.

    Args:
        key: Of the random values.
        inputs: How many byte values, or numbers of a patch, there are.
        outputs: How many classes or byte values are predicted.
        length: Tokens of a sequence.
        width: Size of a token.
        depth: Number of blocks.
    """
    keys = iter(jax.random.split(key, 7))

    def kernel(*shape: int, scale: float) -> jax.Array:
        return scale * jax.random.normal(next(keys), shape)

    hidden, small = 4 * width, (2 * depth * width) ** -0.5
    return {
        "reader": kernel(inputs, width, scale=min(1.0, inputs**-0.5)),
        "positions": kernel(length, width, scale=0.02),
        "blocks": {
            "norm1": jnp.ones((depth, width)),
            "qkv": kernel(depth, width, 3 * width, scale=width**-0.5),
            "proj": kernel(depth, width, width, scale=small),
            "norm2": jnp.ones((depth, width)),
            "up": kernel(depth, width, hidden, scale=width**-0.5),
            "down": kernel(depth, hidden, width, scale=small / 2),
        },
        "norm": jnp.ones(width),
        "writer": kernel(width, outputs, scale=0.1 * width**-0.5),
    }


def apply(params: Any, tokens: jax.Array, *, causal: bool) -> jax.Array:
    """Logits `[batch, length, outputs]`.

    Args:
        params: What `init` made.
        tokens: `[batch, length]` integers, or `[batch, length, inputs]` numbers.
        causal: A token sees itself and those before it only.
    """
    reader = params["reader"]
    integers = jnp.issubdtype(tokens.dtype, jnp.integer)
    x = reader[tokens] if integers else tokens @ reader
    x = x + params["positions"][None]

    def block(x: jax.Array, weights: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        batch, length, width = x.shape
        qkv = _norm(x, weights["norm1"]) @ weights["qkv"]
        heads = qkv.reshape(batch, length, 3, HEADS, width // HEADS)
        q, k, v = heads[:, :, 0], heads[:, :, 1], heads[:, :, 2]
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=causal)
        x = x + mixed.reshape(x.shape) @ weights["proj"]
        hidden = jax.nn.gelu(_norm(x, weights["norm2"]) @ weights["up"])
        return x + hidden @ weights["down"], None

    x, _ = jax.lax.scan(block, x, params["blocks"])
    return _norm(x, params["norm"]) @ params["writer"]


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Root-mean-square normalisation of each token."""
    size = jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    return x * size * scale[None, None]
