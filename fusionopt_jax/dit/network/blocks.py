"""The transformer block and the final layer, as parameters and as functions of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from fusionopt_jax._types import Params
from fusionopt_jax.dit.config import DiTConfig
from fusionopt_jax.dit.network.attention import KEPT, AttentionKernel, self_attention
from fusionopt_jax.dit.network.layers import LAYER_NORM_EPS, layer_norm, linear
from fusionopt_jax.dit.network.modulation import (
    BLOCK_PARTS,
    FINAL_PARTS,
    Modulated,
    Modulation,
    modulate,
)
from fusionopt_jax.dit.network.residuals import EXACT, Plan

_PRODUCTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(*KEPT),
)
"""Keeps what linear maps and attention return; the rest is cheaper to compute again."""


def _xavier(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear map with the published start: Xavier-uniform kernel, zero bias."""
    xavier = nnx.initializers.xavier_uniform()
    return nnx.Linear(inputs, outputs, kernel_init=xavier, rngs=rngs)


class Attention(nnx.Module):
    """Parameters of self-attention: one fused map to q, k, v, and one back."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs) -> None:
        width = config.hidden_size
        # One kernel of width 3D: three separate ones would start with a larger spread.
        self.qkv = _xavier(width, 3 * width, rngs)
        self.proj = _xavier(width, width, rngs)


class Mlp(nnx.Module):
    """Parameters of the two-layer MLP of a block."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs) -> None:
        self.fc1 = _xavier(config.hidden_size, config.mlp_size, rngs)
        self.fc2 = _xavier(config.mlp_size, config.hidden_size, rngs)


class Block(Modulated):
    """Parameters of one block."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs) -> None:
        self.attn = Attention(config, rngs=rngs)
        self.mlp = Mlp(config, rngs=rngs)
        super().__init__(config, BLOCK_PARTS, rngs=rngs)


class FinalLayer(Modulated):
    """Parameters of the map from tokens to patches."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs) -> None:
        width = config.hidden_size
        patch_values = config.patch_size**2 * config.out_channels
        zeros = nnx.initializers.zeros
        self.linear = nnx.Linear(width, patch_values, kernel_init=zeros, rngs=rngs)
        super().__init__(config, FINAL_PARTS, rngs=rngs)


def attend(
    params: Params,
    tokens: Float[Array, "b tokens d"],
    num_heads: int,
    dtype: DTypeLike = jnp.float32,
    attention: AttentionKernel = None,
) -> Float[Array, "b tokens d"]:
    """Multi-head self-attention over the tokens of each image."""
    fused = linear(params["qkv"], tokens, dtype).astype(dtype)
    return linear(params["proj"], self_attention(fused, num_heads, attention), dtype)


def mlp(
    params: Params, tokens: Float[Array, "b tokens d"], dtype: DTypeLike = jnp.float32
) -> Float[Array, "b tokens d"]:
    """Two linear maps with the tanh form of GELU between them."""
    hidden = linear(params["fc1"], tokens, dtype)
    return linear(params["fc2"], jax.nn.gelu(hidden, approximate=True), dtype)


def block(
    params: Params,
    tokens: Float[Array, "b tokens d"],
    attention_modulation: Modulation,
    mlp_modulation: Modulation,
    *,
    num_heads: int,
    norm_eps: float = LAYER_NORM_EPS,
    dtype: DTypeLike = jnp.float32,
    attention: AttentionKernel = None,
    plan: Plan = EXACT,
    kept: tuple[Any, Any] = (None, None),
) -> tuple[Float[Array, "b tokens d"], tuple[Any, Any]]:
    """One adaLN-Zero block: two gated branches on an fp32 residual stream.

    A branch that is recalled keeps what comes before its gate, so that the gate is that
    of the present time and label. Returns the tokens, and what is kept of the branches.
    """
    shift, scale, gate = attention_modulation

    def attended(tokens: Array, shift: Array, scale: Array) -> Array:
        """The attention branch, before its gate."""
        branch = modulate(layer_norm(tokens), shift, scale)
        return attend(params["attn"], branch, num_heads, dtype, attention)

    branch, kept_attention = plan.attention(attended, kept[0], tokens, shift, scale)
    tokens = tokens + gate[:, None, :] * branch
    shift, scale, gate = mlp_modulation

    def widened(tokens: Array, shift: Array, scale: Array) -> Array:
        """The MLP branch, before its gate."""
        branch = modulate(layer_norm(tokens, norm_eps), shift, scale)
        return mlp(params["mlp"], branch, dtype)

    branch, kept_mlp = plan.mlp(widened, kept[1], tokens, shift, scale)
    return tokens + gate[:, None, :] * branch, (kept_attention, kept_mlp)


def checkpointed(
    run_block: Callable[..., Any], remat: bool, unroll: bool, attention: AttentionKernel
) -> Callable[..., Any]:
    """A block that keeps for the backward pass what `apply` says that it keeps."""
    if remat:
        return jax.checkpoint(run_block, prevent_cse=unroll)
    # Written out, XLA for CPUs recomputes at once and saves nothing. And cuDNN keeps
    # what it needs itself, under no name, or its forward pass would run again.
    if unroll or attention == "cudnn":
        return run_block
    return jax.checkpoint(run_block, prevent_cse=False, policy=_PRODUCTS)


def final_layer(
    params: Params,
    tokens: Float[Array, "b tokens d"],
    shift: Float[Array, "b d"],
    scale: Float[Array, "b d"],
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "b tokens values"]:
    """Tokens to patches."""
    return linear(params["linear"], modulate(layer_norm(tokens), shift, scale), dtype)
