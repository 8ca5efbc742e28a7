"""Conditioning: from (time, label) to the shift, scale and gate of every block.

Each block owns a linear map from the conditioning vector `c = time + label` to six
vectors. This module alone knows how six vectors lie in one; a block is handed two
`Modulation`s and cannot tell whether they were computed now or read from a cache.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fusionopt_jax._types import Params
from fusionopt_jax.dit.config import DiTConfig
from fusionopt_jax.dit.network.embeddings import embed_labels, embed_times
from fusionopt_jax.dit.network.layers import CONDITIONING_PRECISION, linear

BLOCK_PARTS = 6
"""Shift, scale, gate of the attention branch, then of the MLP branch."""

FINAL_PARTS = 2
"""Shift and scale of the final layer, which has no gate."""


class Modulation(NamedTuple):
    """What conditioning does to one residual branch.

    A branch f turns tokens x into x + gate * f(norm(x) * (1 + scale) + shift).

    Attributes:
        shift: Added to the normalised tokens, `[batch, hidden]`.
        scale: Multiplies them as 1 + scale, `[batch, hidden]`.
        gate: Multiplies what the branch returns, `[batch, hidden]`.
    """

    shift: Float[Array, "b d"]
    scale: Float[Array, "b d"]
    gate: Float[Array, "b d"]


class CachedModulation(NamedTuple):
    """One step of a cache, and the row of it that each image uses.

    Attributes:
        block: `[depth, labels, 6, hidden]`, one entry per block and distinct label.
        final: `[labels, 2, hidden]`.
        rows: `[batch]` int32 into the label axis. A row beyond it gives NaN images.
    """

    block: Float[Array, "depth u 6 d"]
    final: Float[Array, "u 2 d"]
    rows: Int[Array, "b"]


def conditioning(
    params: Params,
    config: DiTConfig,
    times: Float[Array, "n"],
    labels: Int[Array, "n"],
) -> Float[Array, "n d"]:
    """SiLU of time plus label embedding: what every modulator reads, in fp32."""
    time_part = embed_times(params["t_embedder"], config, times)
    label_part = embed_labels(params["y_embedder"], labels)
    return jax.nn.silu(time_part + label_part)


def block_parts(params: Params, cond: Float[Array, "n d"]) -> Float[Array, "n 6 d"]:
    """The six vectors of one block for each conditioning vector, in fp32."""
    flat = linear(params, cond, precision=CONDITIONING_PRECISION)
    return flat.reshape(cond.shape[0], BLOCK_PARTS, cond.shape[1])


def final_parts(params: Params, cond: Float[Array, "n d"]) -> Float[Array, "n 2 d"]:
    """The two vectors of the final layer for each conditioning vector, in fp32."""
    flat = linear(params, cond, precision=CONDITIONING_PRECISION)
    return flat.reshape(cond.shape[0], FINAL_PARTS, cond.shape[1])


def take_rows(
    parts: Float[Array, "u k d"], rows: Int[Array, "b"]
) -> Float[Array, "b k d"]:
    """Each image's vectors out of a cached table; NaN where a row does not exist."""
    return jnp.take(parts, rows, axis=0, mode="fill").astype(jnp.float32)


def split_block(parts: Float[Array, "b 6 d"]) -> tuple[Modulation, Modulation]:
    """The modulations of the attention branch and of the MLP branch."""
    return (
        Modulation(parts[:, 0], parts[:, 1], parts[:, 2]),
        Modulation(parts[:, 3], parts[:, 4], parts[:, 5]),
    )


def split_final(
    parts: Float[Array, "b 2 d"],
) -> tuple[Float[Array, "b d"], Float[Array, "b d"]]:
    """Shift and scale of the final layer."""
    return parts[:, 0], parts[:, 1]


def modulate(
    tokens: Float[Array, "b tokens d"],
    shift: Float[Array, "b d"],
    scale: Float[Array, "b d"],
) -> Float[Array, "b tokens d"]:
    """Scale by 1 + scale and shift, the same for every token of an image."""
    return tokens * (1.0 + scale[:, None, :]) + shift[:, None, :]
