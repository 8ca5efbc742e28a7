"""From latents to images."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from fusionopt_jax._types import Params
from fusionopt_jax.dit.latents.blocks import conv, head, mid_block, up_block
from fusionopt_jax.dit.latents.config import Config
from fusionopt_jax.dit.latents.entries import check_params
from fusionopt_jax.dit.latents.inputs import check_dtype, check_images
from fusionopt_jax.dit.latents.tiles import check_tiles, in_tiles


def decode(
    params: Params,
    config: Config,
    latents: Float[Array | np.ndarray, "batch height width channels"],
    *,
    dtype: DTypeLike = jnp.float32,
    tile: int | None = None,
    overlap: int | None = None,
) -> Float[Array, "batch height_pixels width_pixels channels_out"]:
    r"""Turn latents into images, as one compiled program.

    With the config's factors, the network decodes :math:`x / \text{scale} +
    \text{shift}` of latents :math:`x` as a diffusion model samples them.

    A second call with latents of the same shape compiles nothing. The memory it takes
    grows with the pixels, and that of attention with their square; with `tile`, latents
    of any size are decoded in the memory of one tile (and of the image). That is not
    the same function: normalisation and attention then see a tile instead of the image.
    `docs/latents.md` says how far it is off.

    Args:
        params: What `from_diffusers` returned; the decoder's part is enough.
        config: Its config.
        latents: [batch, height, width, latent_channels], at the scale at which a
            diffusion model samples them. Sharded on the batch axis, the images are too.
        dtype: float32, or bfloat16 for the operands of the convolutions and of
            attention's products; sums, normalisation and the residual stream stay
            float32.
        tile: Side of a tile in latents; None decodes the image whole. Tiles of what the
            autoencoder was trained on (`sample_size // downsampling`) and larger look
            best. All images of the batch go through a tile together.
        overlap: Latents that neighbouring tiles share at least; None is a quarter of a
            tile. Blended linearly.

    Returns:
        Images, [batch, height * downsampling, width * downsampling, out_channels], in
        float32. Pixels lie about [-1, 1] and are not clamped.

    Raises:
        ValueError: If the latents have other channels or axes, the parameters do not
            fit the config or lack a decoder, the latents are smaller than a tile, or
            `overlap` is given without `tile`.
        TypeError: If the latents are no floating-point numbers.

    Example:
        >>> from fusionopt_jax.dit.latents.entries import entry_shapes
        >>> from fusionopt_jax.dit.latents.published import from_diffusers
        >>> config = Config(block_out_channels=(4, 8), norm_num_groups=4)
        >>> shapes = entry_shapes(config, "decoder")
        >>> weights = {name: np.ones(shape) for name, shape in shapes.items()}
        >>> params, config = from_diffusers(weights, config)
        >>> decode(params, config, jnp.ones((1, 4, 4, 4))).shape
        (1, 8, 8, 3)

    Source: Rombach et al. (arXiv 2112.10752), appendix G. Tiling is not in it.
    """
    dtype = check_dtype(dtype)
    latents = check_images("latents", latents, config.latent_channels)
    check_params(params, config, "decoder")
    if tile is not None:
        overlap = check_tiles(latents, tile, overlap)
    elif overlap is not None:
        raise ValueError(
            f"`overlap` is {overlap}, but without `tile` there is none; give both."
        )
    used = {
        name: params[name] for name in ("decoder", "post_quant_conv") if name in params
    }
    return _decode(
        used, latents, config=config, dtype=dtype, tile=tile, overlap=overlap
    )


@partial(jax.jit, static_argnames=("config", "dtype", "tile", "overlap"))
def _decode(
    params: Params,
    latents: Float[Array, "b h w c"],
    *,
    config: Config,
    dtype: DTypeLike,
    tile: int | None,
    overlap: int | None,
) -> Float[Array, "b _h _w d"]:
    """What `decode` compiles."""
    network = partial(decoder, params, config, dtype=dtype)
    latents = latents.astype(jnp.float32) / config.scaling_factor + config.shift_factor
    if tile is None or overlap is None:
        return network(latents)
    return in_tiles(network, latents, config.downsampling, tile, overlap)


def decoder(
    params: Params,
    config: Config,
    latents: Float[Array, "b h w c"],
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "b _h _w d"]:
    """The network: latents as the autoencoder has them, from the coarsest level up."""
    groups = config.norm_num_groups
    if config.use_post_quant_conv:
        latents = conv(params["post_quant_conv"], latents, dtype)
    params = params["decoder"]
    hidden = conv(params["conv_in"], latents, dtype)
    hidden = mid_block(params["mid_block"], hidden, groups, dtype)
    for level in range(len(config.block_out_channels)):
        hidden = up_block(params["up_blocks"][str(level)], hidden, groups, dtype)
    return head(params, hidden, groups, dtype)
