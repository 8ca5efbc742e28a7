"""Conditioning: from (time, label) to the shift, scale and gate of every block.

Each block owns a linear map from the conditioning vector `c = time + label` to six
vectors, its modulator; the final layer has one to two. This module alone knows how the
vectors lie in one, and where the modulators lie among the parameters; a block is handed
two `Modulation`s and cannot tell whether they were computed now or read from a cache.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from fusionopt_jax._checks import shape_text
from fusionopt_jax._types import Params, PyTree
from fusionopt_jax.dit.config import DiTConfig
from fusionopt_jax.dit.network.embeddings import embed_labels, embed_times
from fusionopt_jax.dit.network.layers import CONDITIONING_PRECISION, linear

BLOCK_PARTS = 6
"""Shift, scale, gate of the attention branch, then of the MLP branch."""

FINAL_PARTS = 2
"""Shift and scale of the final layer, which has no gate."""

MODULATOR = "adaLN_modulation"
"""Name of a modulator among the parameters of its block; the published one."""

MODULATED = {"blocks": BLOCK_PARTS, "final_layer": FINAL_PARTS}
"""The parameters that hold a modulator, and how many vectors it returns."""


class Modulated(nnx.Module):
    """What a block and the final layer share: a modulator that starts at zero."""

    def __init__(self, config: DiTConfig, parts: int, *, rngs: nnx.Rngs) -> None:
        width = config.hidden_size
        zeros = nnx.initializers.zeros
        linear = nnx.Linear(width, parts * width, kernel_init=zeros, rngs=rngs)
        setattr(self, MODULATOR, linear)


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
    flat = linear(params[MODULATOR], cond, precision=CONDITIONING_PRECISION)
    return flat.reshape(cond.shape[0], BLOCK_PARTS, cond.shape[1])


def final_parts(params: Params, cond: Float[Array, "n d"]) -> Float[Array, "n 2 d"]:
    """The two vectors of the final layer for each conditioning vector, in fp32."""
    flat = linear(params[MODULATOR], cond, precision=CONDITIONING_PRECISION)
    return flat.reshape(cond.shape[0], FINAL_PARTS, cond.shape[1])


def all_parts(
    params: Params,
    times: Float[Array, "n"],
    labels: Int[Array, "n"],
    *,
    config: DiTConfig,
    dtype: DTypeLike,
) -> tuple[Float[Array, "n depth 6 d"], Float[Array, "n 2 d"]]:
    """The vectors of every block and of the final layer, one product per block."""
    cond = conditioning(params, config, times, labels)
    blocks = {MODULATOR: params["blocks"][MODULATOR]}
    block = jax.lax.map(lambda one: block_parts(one, cond).astype(dtype), blocks)
    final = final_parts(params["final_layer"], cond).astype(dtype)
    return jnp.moveaxis(block, 0, 1), final


def require_modulators(params: Params, remedy: str) -> None:
    """Require the weights that compute the modulation."""
    for part in MODULATED:
        if "kernel" not in params[part].get(MODULATOR, {}):
            raise ValueError(f"`params` have no {part}/{MODULATOR}/kernel{remedy}")


def modulators(params: Params) -> Params:
    """The modulators alone, at their places in the tree."""
    return {part: {MODULATOR: params[part][MODULATOR]} for part in MODULATED}


def replace_modulators(params: Params, replacement: Params | None) -> dict[str, Any]:
    """A new tree with something else in the place of each modulator, or nothing.

    Args:
        params: Parameters with or without modulators.
        replacement: What takes their places, by the part that holds them.

    Returns:
        A new dict; the arrays are the same.

    Example:
        >>> params = {"blocks": {"adaLN_modulation": 1, "mlp": 2}, "final_layer": {}}
        >>> replace_modulators(params, None)
        {'blocks': {'mlp': 2}, 'final_layer': {}}
    """
    params = dict(params)
    for part in MODULATED:
        rest = {name: leaf for name, leaf in params[part].items() if name != MODULATOR}
        new = {} if replacement is None else {MODULATOR: replacement[part]}
        params[part] = rest | new
    return params


def take_rows(mods: PyTree[Any], rows: Int[Array, "b"]) -> PyTree[Any]:
    """Each image's modulators out of one step of a table.

    Args:
        mods: Leaves `[labels, ...]`, floating point.
        rows: `[batch]`, the row of each image.

    Returns:
        The tree with leaves `[batch, ...]`; NaN where a row does not exist.

    Example:
        >>> take_rows(jnp.array([[1.0], [2.0]]), jnp.array([1, 0, 2])).tolist()
        [[2.0], [1.0], [nan]]
    """
    return jax.tree.map(
        lambda leaf: jnp.take(leaf, rows, axis=0, mode="fill", fill_value=jnp.nan), mods
    )


def check_modulation(
    config: DiTConfig, batch: Any, modulation: CachedModulation
) -> None:
    """Require a cache step for these sizes and this batch, which may be symbolic."""
    width, block_shape = config.hidden_size, modulation.block.shape
    rows = block_shape[1] if len(block_shape) == 4 else -1
    expected = {
        "block": (config.depth, rows, BLOCK_PARTS, width),
        "final": (rows, FINAL_PARTS, width),
        "rows": (batch,),
    }
    for name, shape in expected.items():
        got = getattr(modulation, name)
        if got.shape != shape:
            raise ValueError(
                f"`modulation.{name}` is {shape_text(got)}, which does not fit this "
                "config and batch; take one step of a cache that was built with this "
                "config, and one row per image."
            )


def split_block(parts: Float[Array, "b 6 d"]) -> tuple[Modulation, Modulation]:
    """The modulations of the attention branch and of the MLP branch, in fp32."""
    parts = parts.astype(jnp.float32)
    return (
        Modulation(parts[:, 0], parts[:, 1], parts[:, 2]),
        Modulation(parts[:, 3], parts[:, 4], parts[:, 5]),
    )


def split_final(
    parts: Float[Array, "b 2 d"],
) -> tuple[Float[Array, "b d"], Float[Array, "b d"]]:
    """Shift and scale of the final layer, in fp32."""
    parts = parts.astype(jnp.float32)
    return parts[:, 0], parts[:, 1]


def modulate(
    tokens: Float[Array, "b tokens d"],
    shift: Float[Array, "b d"],
    scale: Float[Array, "b d"],
) -> Float[Array, "b tokens d"]:
    """Scale by 1 + scale and shift, the same for every token of an image."""
    return tokens * (1.0 + scale[:, None, :]) + shift[:, None, :]
