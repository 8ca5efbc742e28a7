"""A DiT in PyTorch, from the equations of Peebles and Xie (arXiv 2212.09748).

Functions of a state dict under the published names, as `dit.to_pytorch` writes it.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

MAX_PERIOD = 10000.0


def forward(
    weights: Mapping[str, Tensor],
    images: Tensor,
    times: Tensor,
    labels: Tensor,
    *,
    depth: int,
    heads: int,
    patch: int,
) -> Tensor:
    """The prediction for images `[batch, channels, side, side]`, in their layout."""

    def linear(name: str, inputs: Tensor) -> Tensor:
        return functional.linear(
            inputs, weights[f"{name}.weight"], weights[f"{name}.bias"]
        )

    def modulation(name: str, parts: int) -> list[Tensor]:
        flat = linear(f"{name}.adaLN_modulation.1", condition)
        return [part[:, None] for part in flat.chunk(parts, dim=1)]

    def normalised(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        normed = functional.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
        return normed * (1 + scale) + shift

    def attend(name: str, tokens: Tensor) -> Tensor:
        batch, count, width = tokens.shape
        fused = linear(f"{name}.qkv", tokens)
        fused = fused.reshape(batch, count, 3, heads, width // heads)
        q, k, v = fused.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return linear(f"{name}.proj", mixed.transpose(1, 2).reshape(tokens.shape))

    frequencies = torch.exp(-math.log(MAX_PERIOD) * torch.arange(128) / 128)
    angles = times[:, None] * frequencies[None]
    features = torch.cat([angles.cos(), angles.sin()], dim=1)
    hidden = functional.silu(linear("t_embedder.mlp.0", features))
    condition = functional.silu(
        linear("t_embedder.mlp.2", hidden)
        + functional.embedding(labels, weights["y_embedder.embedding_table.weight"])
    )

    tokens = functional.conv2d(
        images,
        weights["x_embedder.proj.weight"],
        weights["x_embedder.proj.bias"],
        stride=patch,
    )
    tokens = tokens.flatten(2).transpose(1, 2) + weights["pos_embed"]
    for index in range(depth):
        name = f"blocks.{index}"
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation(name, 6)
        branch = attend(f"{name}.attn", normalised(tokens, shift, scale))
        tokens = tokens + gate * branch
        hidden = linear(f"{name}.mlp.fc1", normalised(tokens, mlp_shift, mlp_scale))
        branch = linear(f"{name}.mlp.fc2", functional.gelu(hidden, approximate="tanh"))
        tokens = tokens + mlp_gate * branch
    shift, scale = modulation("final_layer", 2)
    patches = linear("final_layer.linear", normalised(tokens, shift, scale))

    rows = math.isqrt(patches.shape[1])
    patches = patches.reshape(len(images), rows, rows, patch, patch, -1)
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(
        len(images), -1, rows * patch, rows * patch
    )
