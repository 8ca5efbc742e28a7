"""The decoder that turns what a model samples into pictures."""

import argparse
import pathlib
import sys
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from fusionopt_jax._types import Params
from fusionopt_jax.dit import latents
from fusionopt_jax.dit.commands.pipeline import naming
from fusionopt_jax.dit.commands.progress import progress_bar
from fusionopt_jax.dit.config import DiTConfig
from fusionopt_jax.dit.latents.entries import check_params

DTYPES: dict[str, DTypeLike] = {"fp32": jnp.float32, "bf16": jnp.bfloat16}
"""Types of the large products by the names that options have for them."""


class Decoder(NamedTuple):
    """An autoencoder, where it comes from, and how it decodes.

    Attributes:
        params: Its parameters.
        config: Its sizes.
        folder: Where it lies.
        tile: Side of a tile in latents; None decodes an image whole.
        dtype: Type of the large products.
    """

    params: Params
    config: latents.Config
    folder: pathlib.Path
    tile: int | None
    dtype: DTypeLike

    def check(self, model: DiTConfig) -> None:
        """Require the latents of a model.

        Args:
            model: Its sizes.

        Raises:
            ValueError: If it samples other channels, or less than a tile.
        """
        if self.config.latent_channels != model.in_channels:
            raise ValueError(
                f"the decoder {self.folder} takes latents of "
                f"{self.config.latent_channels} channels, and the model samples "
                f"{model.in_channels}; give the autoencoder that it was trained with."
            )
        if self.tile is not None and not 1 <= self.tile <= model.input_size:
            raise ValueError(
                f"`--tile` must lie between 1 and {model.input_size}, the side of the "
                f"latents, got {self.tile}."
            )

    def decode(
        self, sampled: Float[Array, "images height width channels"]
    ) -> Float[np.ndarray, "images height_pixels width_pixels channels_out"]:
        """Pictures, about [-1, 1], made one after the other to bound the memory."""
        pictures = []
        with progress_bar("decoding", "image", len(sampled)) as progress:
            for index in range(len(sampled)):
                picture = latents.decode(
                    self.params,
                    self.config,
                    sampled[index : index + 1],
                    dtype=self.dtype,
                    tile=self.tile,
                )
                pictures.append(np.asarray(picture))
                if progress is not None:
                    progress(index + 1, len(sampled))
        return np.concatenate(pictures)


def add_decoder(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose a decoder.

    Args:
        parser: Of the command.
    """
    group = parser.add_argument_group("decoder")
    group.add_argument(
        "--tile",
        type=int,
        help="decode in tiles of so many latents a side, in their memory: for large "
        "images, and not exact (default: whole)",
        metavar="N",
    )
    group.add_argument(
        "--decoder-dtype",
        choices=tuple(DTYPES),
        help="type of the decoder's products (default: fp32)",
    )
    group = group.add_mutually_exclusive_group()
    group.add_argument(
        "--decoder",
        type=pathlib.Path,
        help="folder of the autoencoder that makes pictures of latents (default: that "
        "of the pipeline, if --weights is one)",
        metavar="FOLDER",
    )
    group.add_argument(
        "--no-decoder",
        action="store_true",
        help="keep the latents, of which a .png shows three channels",
    )


def read_decoder(options: argparse.Namespace) -> Decoder | None:
    """The decoder that the options choose, and a line that says which.

    Args:
        options: With what `add_decoder` and `add_weights` added.

    Returns:
        The decoder; None if there is none, or none is wanted.

    Raises:
        ValueError: If it can't be used.
        OSError: If it is not there, or can't be read.
    """
    folder, why = options.decoder, "asked for"
    inner = options.weights / "vae"
    if folder is None and not options.no_decoder and inner.is_dir():
        folder, why = inner, "of the pipeline"
    if folder is None:
        for name in ("tile", "decoder_dtype"):
            if getattr(options, name) is not None:
                raise ValueError(
                    f"`--{name.replace('_', '-')}` has no effect without a decoder; "
                    "leave it out, or give `--decoder`."
                )
        return None
    if folder.is_file():
        raise ValueError(
            f"the decoder {folder} is a file; give the folder that holds it and its "
            "config.json."
        )
    with progress_bar("reading the decoder", "B") as progress, naming(folder):
        params, config = latents.from_diffusers(folder, progress=progress)
        check_params(params, config, "decoder")
    sys.stdout.write(f"decoder: {folder}, {why}\n")
    dtype = DTYPES[options.decoder_dtype or "fp32"]
    return Decoder(params, config, folder, options.tile, dtype)
