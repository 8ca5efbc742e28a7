"""From images to latents."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from fusionopt_jax import _checks
from fusionopt_jax._types import Params
from fusionopt_jax.dit.latents.blocks import conv, down_block, head, mid_block
from fusionopt_jax.dit.latents.config import Config
from fusionopt_jax.dit.latents.entries import check_params
from fusionopt_jax.dit.latents.inputs import check_dtype, check_images

_LOG_VARIANCES = (-30.0, 20.0)
"""The published range of the logarithm of a latent's variance."""


def encode(
    params: Params,
    config: Config,
    images: Float[Array | np.ndarray, "batch height width channels"],
    *,
    key: PRNGKeyArray | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "batch height_latents width_latents channels_latents"]:
    r"""Turn images into latents for a diffusion model, as one compiled program.

    The network gives a mean :math:`\mu` and a logarithm of a variance :math:`\log
    \sigma^2`, clamped to [-30, 20], for each latent; the latent is :math:`z = \mu`, or
    :math:`z = \mu + \sigma \varepsilon` with standard normal :math:`\varepsilon`. What
    is returned is :math:`(z - \text{shift}) \cdot \text{scale}` with the config's
    factors.

    Args:
        params: What `from_diffusers` returned; the encoder's part is enough.
        config: Its config.
        images: [batch, height, width, in_channels] in [-1, 1]; height and width
            divisible by `downsampling`.
        key: Draws a sample; None gives the mean.
        dtype: float32, or bfloat16 for the operands of the convolutions and of
            attention's products; sums, normalisation and the residual stream stay
            float32.

    Returns:
        Latents, [batch, height / downsampling, width / downsampling, latent_channels],
        in float32; `decode` takes them back.

    Raises:
        ValueError: If the images have other channels or axes or sides that are not
            divisible, or the parameters do not fit the config or lack an encoder.
        TypeError: If the images are no floating-point numbers.

    Example:
        >>> from fusionopt_jax.dit.latents.entries import entry_shapes
        >>> from fusionopt_jax.dit.latents.published import from_diffusers
        >>> config = Config(block_out_channels=(4, 8), norm_num_groups=4)
        >>> shapes = entry_shapes(config, "encoder")
        >>> weights = {name: np.ones(shape) for name, shape in shapes.items()}
        >>> params, config = from_diffusers(weights, config)
        >>> encode(params, config, jnp.ones((1, 8, 8, 3))).shape
        (1, 4, 4, 4)

    Source: Rombach et al. (arXiv 2112.10752), appendix G; the clamp and the padding of
    the strided convolutions, below and on the right alone, are those of the published
    code.
    """
    dtype = check_dtype(dtype)
    images = check_images("images", images, config.in_channels)
    if any(side % config.downsampling for side in images.shape[1:3]):
        raise ValueError(
            f"`images` are {_checks.shape_text(images)}: their height and width must "
            f"be divisible by {config.downsampling}, the pixels a side of one latent; "
            "crop or resize them."
        )
    check_params(params, config, "encoder")
    used = {name: params[name] for name in ("encoder", "quant_conv") if name in params}
    return _encode(used, images, key, config=config, dtype=dtype)


@partial(jax.jit, static_argnames=("config", "dtype"))
def _encode(
    params: Params,
    images: Float[Array, "b h w c"],
    key: PRNGKeyArray | None,
    *,
    config: Config,
    dtype: DTypeLike,
) -> Float[Array, "b _h _w d"]:
    """What `encode` compiles."""
    mean, log_variance = encoder(params, config, images.astype(jnp.float32), dtype)
    if key is not None:
        deviation = jnp.exp(0.5 * jnp.clip(log_variance, *_LOG_VARIANCES))
        mean = mean + deviation * jax.random.normal(key, mean.shape)
    return (mean - config.shift_factor) * config.scaling_factor


def encoder(
    params: Params,
    config: Config,
    images: Float[Array, "b h w c"],
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, "b _h _w d"], Float[Array, "b _h _w d"]]:
    """The network, from the finest level down: means and logarithms of variances."""
    groups = config.norm_num_groups
    layers = params["encoder"]
    hidden = conv(layers["conv_in"], images, dtype)
    for level in range(len(config.block_out_channels)):
        hidden = down_block(layers["down_blocks"][str(level)], hidden, groups, dtype)
    hidden = mid_block(layers["mid_block"], hidden, groups, dtype)
    moments = head(layers, hidden, groups, dtype)
    if config.use_quant_conv:
        moments = conv(params["quant_conv"], moments, dtype)
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean, log_variance
