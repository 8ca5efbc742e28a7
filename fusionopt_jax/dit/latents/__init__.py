"""The autoencoder between images and the latents that a diffusion model works on."""

from fusionopt_jax.dit.latents.config import Config
from fusionopt_jax.dit.latents.decoder import decode
from fusionopt_jax.dit.latents.encoder import encode
from fusionopt_jax.dit.latents.published import from_diffusers

__all__ = ["Config", "decode", "encode", "from_diffusers"]
