"""What encoder and decoder are made of, as functions of a dict of parameters.

Images are `[batch, height, width, channels]`, kernels `(row, column, in, out)`. The
operands of convolutions and of attention's products are in `dtype`; their sums, every
normalisation and the residual stream are fp32.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from fusionopt_jax._types import Params
from fusionopt_jax.dit.network.layers import linear

GROUP_NORM_EPS = 1e-6
"""Added to the variance; the published constant."""

_EVEN = ((1, 1), (1, 1))
_AFTER = ((0, 1), (0, 1))


def conv(
    params: Params,
    inputs: Float[Array, "b h w m"],
    dtype: DTypeLike = jnp.float32,
    *,
    stride: int = 1,
    padding: tuple[tuple[int, int], tuple[int, int]] | None = None,
) -> Float[Array, "b _h _w n"]:
    """Convolve with `kernel` and add `bias`; None pads so that the size is kept."""
    kernel = params["kernel"]
    if padding is None:
        padding = _EVEN if kernel.shape[0] == 3 else ((0, 0), (0, 0))
    sums = jax.lax.conv_general_dilated(
        inputs.astype(dtype),
        kernel.astype(dtype),
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=jnp.float32,
    )
    return sums + _per_channel(params["bias"])


def group_norm(
    params: Params, inputs: Float[Array, "b h w c"], groups: int
) -> Float[Array, "b h w c"]:
    """Zero mean and unit variance of each image's groups of channels, then affine."""
    grouped = inputs.astype(jnp.float32)
    grouped = grouped.reshape(*inputs.shape[:3], groups, inputs.shape[3] // groups)
    # E[x^2] - E[x]^2 is one pass less, but cancels in fp32 where the mean is large.
    centred = grouped - jnp.mean(grouped, axis=(1, 2, 4), keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=(1, 2, 4), keepdims=True)
    normed = (centred / jnp.sqrt(variance + GROUP_NORM_EPS)).reshape(inputs.shape)
    return normed * _per_channel(params["scale"]) + _per_channel(params["bias"])


def _per_channel(values: Float[Array, " c"]) -> Float[Array, "1 1 1 c"]:
    """One fp32 number per channel, shaped to meet a batch of images."""
    return values.astype(jnp.float32).reshape(1, 1, 1, -1)


def resnet(
    params: Params,
    inputs: Float[Array, "b h w m"],
    groups: int,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "b h w n"]:
    """Two of (norm, SiLU, 3x3 convolution) on a residual, 1x1 where channels change."""
    hidden = jax.nn.silu(group_norm(params["norm1"], inputs, groups))
    hidden = conv(params["conv1"], hidden, dtype)
    hidden = jax.nn.silu(group_norm(params["norm2"], hidden, groups))
    hidden = conv(params["conv2"], hidden, dtype)
    if "conv_shortcut" in params:
        inputs = conv(params["conv_shortcut"], inputs, dtype)
    return inputs + hidden


def attend(
    params: Params,
    inputs: Float[Array, "b h w c"],
    groups: int,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "b h w c"]:
    """Self-attention of all pixels in one head, on a residual."""
    batch, height, width, channels = inputs.shape
    tokens = group_norm(params["group_norm"], inputs, groups)
    tokens = tokens.reshape(batch, height * width, channels)
    query, key, value = (
        linear(params[name], tokens, dtype).astype(dtype)[:, :, None, :]
        for name in ("to_q", "to_k", "to_v")
    )
    mixed = jax.nn.dot_product_attention(query, key, value)[:, :, 0, :]
    return inputs + linear(params["to_out"]["0"], mixed, dtype).reshape(inputs.shape)


def mid_block(
    params: Params,
    inputs: Float[Array, "b h w c"],
    groups: int,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "b h w c"]:
    """The coarsest level: two residual blocks, and attention between them if any."""
    hidden = resnet(params["resnets"]["0"], inputs, groups, dtype)
    if "attentions" in params:
        hidden = attend(params["attentions"]["0"], hidden, groups, dtype)
    return resnet(params["resnets"]["1"], hidden, groups, dtype)


def resnets(
    params: Params,
    inputs: Float[Array, "b h w m"],
    groups: int,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "b h w n"]:
    """The residual blocks of one level, one after the other."""
    for index in range(len(params)):
        inputs = resnet(params[str(index)], inputs, groups, dtype)
    return inputs


def up_block(
    params: Params,
    inputs: Float[Array, "b h w m"],
    groups: int,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "b _h _w n"]:
    """A level of the decoder; all but the finest repeat each pixel and convolve."""
    hidden = resnets(params["resnets"], inputs, groups, dtype)
    if "upsamplers" in params:
        doubled = hidden.repeat(2, axis=1).repeat(2, axis=2)
        hidden = conv(params["upsamplers"]["0"]["conv"], doubled, dtype)
    return hidden


def down_block(
    params: Params,
    inputs: Float[Array, "b h w m"],
    groups: int,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "b _h _w n"]:
    """A level of the encoder; all but the coarsest end in a convolution of stride 2.

    It pads below and on the right alone, as the published autoencoder does.
    """
    hidden = resnets(params["resnets"], inputs, groups, dtype)
    if "downsamplers" in params:
        layer = params["downsamplers"]["0"]["conv"]
        hidden = conv(layer, hidden, dtype, stride=2, padding=_AFTER)
    return hidden


def head(
    params: Params,
    inputs: Float[Array, "b h w m"],
    groups: int,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "b h w n"]:
    """What ends encoder and decoder: norm, SiLU, 3x3 convolution."""
    hidden = jax.nn.silu(group_norm(params["conv_norm_out"], inputs, groups))
    return conv(params["conv_out"], hidden, dtype)
