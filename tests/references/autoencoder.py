"""The autoencoder of latent diffusion in float64 NumPy, one image at a time.

Written from section 3.1 and appendix G of Rombach et al. (arXiv 2112.10752); what the
paper leaves open (where norms and attention stand, padding, the clamp) is as in the
published model. Weights are a state dict under the names of the diffusers library and
in PyTorch's layout, images are [channels, height, width]. Nothing is shared with the
package: neither its names, nor its layout, nor its code.
"""

import math

import numpy as np

Weights = dict[str, np.ndarray]


def _get(weights: Weights, name: str) -> tuple[np.ndarray, np.ndarray]:
    return np.float64(weights[f"{name}.weight"]), np.float64(weights[f"{name}.bias"])


def conv(
    weights: Weights, name: str, x: np.ndarray, stride: int = 1, pad: tuple = (1, 1)
) -> np.ndarray:
    """Each output pixel is the sum of products over its window; `pad` is both axes'."""
    kernel, bias = _get(weights, name)
    size = kernel.shape[-1]
    if size == 1:
        pad = (0, 0)
    x = np.pad(x, ((0, 0), pad, pad))
    height, width = ((side - size) // stride + 1 for side in x.shape[1:])
    out = np.zeros((len(kernel), height, width))
    for row in range(height):
        for column in range(width):
            top, left = stride * row, stride * column
            window = x[:, top : top + size, left : left + size]
            out[:, row, column] = np.tensordot(kernel, window, axes=3) + bias
    return out


def group_norm(weights: Weights, name: str, x: np.ndarray, groups: int) -> np.ndarray:
    """Each group of channels gets mean 0 and variance 1 over all its pixels."""
    scale, shift = _get(weights, name)
    out = np.zeros_like(x)
    each = len(x) // groups
    for group in range(groups):
        channels = slice(group * each, (group + 1) * each)
        part = x[channels]
        out[channels] = (part - part.mean()) / np.sqrt(part.var() + 1e-6)
    return out * scale[:, None, None] + shift[:, None, None]


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def resnet(weights: Weights, name: str, x: np.ndarray, groups: int) -> np.ndarray:
    h = x
    for step in (1, 2):
        h = _silu(group_norm(weights, f"{name}.norm{step}", h, groups))
        h = conv(weights, f"{name}.conv{step}", h)
    if f"{name}.conv_shortcut.weight" in weights:
        x = conv(weights, f"{name}.conv_shortcut", x)
    return x + h


def attention(weights: Weights, name: str, x: np.ndarray, groups: int) -> np.ndarray:
    """One head; every pixel asks every pixel."""
    pixels = group_norm(weights, f"{name}.group_norm", x, groups).reshape(len(x), -1).T
    query, key, value = (
        pixels @ kernel.T + bias
        for kernel, bias in (_get(weights, f"{name}.to_{part}") for part in "qkv")
    )
    scores = query @ key.T / math.sqrt(len(x))
    chances = np.exp(scores - scores.max(-1, keepdims=True))
    chances /= chances.sum(-1, keepdims=True)
    kernel, bias = _get(weights, f"{name}.to_out.0")
    return x + ((chances @ value) @ kernel.T + bias).T.reshape(x.shape)


def _middle(weights: Weights, name: str, x: np.ndarray, groups: int) -> dict:
    stages = {"mid_resnet0": resnet(weights, f"{name}.resnets.0", x, groups)}
    x = stages["mid_resnet0"]
    if f"{name}.attentions.0.to_q.weight" in weights:
        x = stages["mid_attn"] = attention(weights, f"{name}.attentions.0", x, groups)
    stages["mid_block"] = resnet(weights, f"{name}.resnets.1", x, groups)
    return stages


def _resnets(weights: Weights, name: str, x: np.ndarray, groups: int) -> np.ndarray:
    index = 0
    while f"{name}.resnets.{index}.norm1.weight" in weights:
        x = resnet(weights, f"{name}.resnets.{index}", x, groups)
        index += 1
    return x


def decode_stages(weights: Weights, z: np.ndarray, groups: int) -> dict:
    """The image ("image") of an unscaled latent, and what leads to it, by name."""
    stages: dict[str, np.ndarray] = {}
    x = np.float64(z)
    if "post_quant_conv.weight" in weights:
        x = stages["post_quant_conv"] = conv(weights, "post_quant_conv", x)
    x = stages["conv_in"] = conv(weights, "decoder.conv_in", x)
    stages |= _middle(weights, "decoder.mid_block", x, groups)
    x, level = stages["mid_block"], 0
    while f"decoder.up_blocks.{level}.resnets.0.norm1.weight" in weights:
        name = f"decoder.up_blocks.{level}"
        x = _resnets(weights, name, x, groups)
        if f"{name}.upsamplers.0.conv.weight" in weights:
            x = conv(weights, f"{name}.upsamplers.0.conv", np.kron(x, np.ones((2, 2))))
        stages[f"up_block{level}"] = x
        level += 1
    x = _silu(group_norm(weights, "decoder.conv_norm_out", x, groups))
    stages["image"] = conv(weights, "decoder.conv_out", x)
    return stages


def decode(
    weights: Weights,
    latents: np.ndarray,
    groups: int,
    scale: float = 0.18215,
    shift: float = 0.0,
) -> np.ndarray:
    """Images `[batch, channels, height, width]` of latents at a model's scale."""
    return np.stack(
        [
            decode_stages(weights, np.float64(z) / scale + shift, groups)["image"]
            for z in latents
        ]
    )


def moments(
    weights: Weights, image: np.ndarray, groups: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and logarithm of the variance of an image's latent, neither one scaled."""
    x = conv(weights, "encoder.conv_in", np.float64(image))
    level = 0
    while f"encoder.down_blocks.{level}.resnets.0.norm1.weight" in weights:
        name = f"encoder.down_blocks.{level}"
        x = _resnets(weights, name, x, groups)
        if f"{name}.downsamplers.0.conv.weight" in weights:
            # Zeros below and on the right alone.
            x = conv(weights, f"{name}.downsamplers.0.conv", x, stride=2, pad=(0, 1))
        level += 1
    x = _middle(weights, "encoder.mid_block", x, groups)["mid_block"]
    x = _silu(group_norm(weights, "encoder.conv_norm_out", x, groups))
    x = conv(weights, "encoder.conv_out", x)
    if "quant_conv.weight" in weights:
        x = conv(weights, "quant_conv", x)
    mean, log_variance = np.split(x, 2)
    return mean, np.clip(log_variance, -30, 20)
