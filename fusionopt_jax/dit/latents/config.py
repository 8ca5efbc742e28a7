"""The sizes of an autoencoder and the scale of its latents, checked once."""

import dataclasses

from fusionopt_jax._checks import check_integer, check_number, check_positive


@dataclasses.dataclass(frozen=True)
class Config:
    r"""Sizes of an autoencoder of the SD-VAE family, under their published names.

    The defaults are the Stable Diffusion autoencoder, which the published DiT and SiT
    were trained behind. A config is hashable, so it can be a static argument of
    `jax.jit`.

    A latent as a diffusion model sees it is :math:`(z - \text{shift}) \cdot
    \text{scale}` of the autoencoder's own :math:`z`.

    Args:
        block_out_channels: Channels of each level, the finest first; each divisible by
            `norm_num_groups`. Every level but the last halves the sides.
        layers_per_block: Residual blocks of a level of the encoder; the decoder has one
            more.
        norm_num_groups: Groups of every GroupNorm.
        latent_channels: Channels of a latent.
        in_channels: Channels of the images that the encoder takes.
        out_channels: Channels of the images that the decoder gives.
        scaling_factor: The scale above; it brings latents to about unit variance.
        shift_factor: The shift above.
        use_quant_conv: Whether a 1x1 convolution follows the encoder.
        use_post_quant_conv: Whether a 1x1 convolution precedes the decoder.
        mid_block_add_attention: Whether the coarsest level has self-attention between
            its two residual blocks.
        sample_size: Side in pixels of the images that it was trained on. The network
            takes any size; a tile of `sample_size // downsampling` is what it knows.

    Raises:
        ValueError: If a size is out of range or does not divide another.
        TypeError: If a size is not of the right kind.

    Example:
        >>> config = Config(block_out_channels=(32, 64), norm_num_groups=8)
        >>> config.downsampling
        2
        >>> Config().downsampling
        8

    Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion
    Models" (arXiv 2112.10752), section 3.1 and appendix G; the names are those of
    `config.json` of the diffusers library.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    latent_channels: int = 4
    in_channels: int = 3
    out_channels: int = 3
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    sample_size: int = 256

    def __post_init__(self) -> None:
        """Check every size and how they divide each other."""
        for name in (
            "layers_per_block",
            "norm_num_groups",
            "latent_channels",
            "in_channels",
            "out_channels",
            "sample_size",
        ):
            check_integer(name, getattr(self, name), low=1)
        check_positive("scaling_factor", self.scaling_factor)
        check_number("shift_factor", self.shift_factor)
        for name in (
            "use_quant_conv",
            "use_post_quant_conv",
            "mid_block_add_attention",
        ):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(
                    f"`{name}` must be True or False, got {getattr(self, name)!r}."
                )
        channels = self.block_out_channels
        if not isinstance(channels, tuple) or not channels:
            raise TypeError(
                "`block_out_channels` must be a tuple of at least one integer, got "
                f"{channels!r}."
            )
        for count in channels:
            check_integer("block_out_channels", count, low=1)
            if count % self.norm_num_groups:
                raise ValueError(
                    f"`norm_num_groups` must divide each of `block_out_channels`, got "
                    f"norm_num_groups={self.norm_num_groups} for {count} channels."
                )

    @property
    def downsampling(self) -> int:
        """How many pixels a side one latent stands for."""
        return 2 ** (len(self.block_out_channels) - 1)
