"""Training in the latents of a published autoencoder instead of in pixels.

The images are encoded once, before the first step, to the mean of their latents. The
run's folder keeps the latents, so that a resumed run does not encode again.
"""

import dataclasses
import hashlib
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from dit_training.data import Dataset, bytes_to_unit_range, size_text
from dit_training.errors import RunError
from dit_training.folders import write_whole
from fusionopt_jax.dit import latents

ENCODED = 16
"""Images that are encoded in one call."""

DECODED = 4
"""Latents that are decoded in one call; divides the grid of samples.png."""


class Autoencoder(NamedTuple):
    """A published autoencoder.

    Attributes:
        params: its weights.
        config: its sizes.
        digest: a hash of both, to recognise it on resume.
    """

    params: Any
    config: latents.Config
    digest: str

    def about(self) -> dict[str, Any]:
        """What config.json says of it."""
        sizes = dataclasses.asdict(self.config)
        # As JSON gives it back, which a resumed run is compared with.
        sizes["block_out_channels"] = list(sizes["block_out_channels"])
        return {"digest": self.digest} | sizes

    def latent_shape(self, images: np.ndarray, source: str) -> tuple[int, int, int]:
        """Height, width and channels of a latent; refuses images that have none."""
        factor, channels = self.config.downsampling, self.config.in_channels
        height, width, found = images.shape[1:]
        if height % factor or width % factor:
            raise RunError(
                f"--data {source}: images of {size_text(images[0])} pixels can't be "
                f"encoded; their sides must be divisible by {factor}"
            )
        if found not in (1, channels):
            raise RunError(
                f"--data {source}: images of {found} channels can't be encoded; this "
                f"autoencoder takes {channels}, or grey ones"
            )
        return height // factor, width // factor, self.config.latent_channels

    def encoded(self, data: Dataset, kept: Path) -> Dataset:
        """The same data with latents in place of images, from the file if it fits."""
        key = f"{data.digest} {self.digest}"
        found = read_latents(kept, key)
        if found is None:
            with tqdm(
                total=len(data.train_images) + len(data.held_out_images),
                desc="encoding",
                unit="image",
            ) as bar:
                found = tuple(
                    self.encode(images, bar)
                    for images in (data.train_images, data.held_out_images)
                )
            write_latents(kept, key, *found)
        return data._replace(train_images=found[0], held_out_images=found[1])

    def encode(self, images: np.ndarray, bar: tqdm) -> np.ndarray:
        """Latents `[N, h, w, c]` of images `[N, H, W, C]`, in calls of one shape."""
        parts = []
        for first in range(0, len(images), ENCODED):
            batch = bytes_to_unit_range(images[first : first + ENCODED])
            count = len(batch)
            if batch.shape[-1] != self.config.in_channels:
                batch = batch.repeat(self.config.in_channels, axis=-1)
            batch = batch[np.arange(ENCODED) % count]
            found = latents.encode(self.params, self.config, batch)
            parts.append(np.asarray(found)[:count])
            bar.update(count)
        whole = np.concatenate(parts)
        if not np.isfinite(whole).all():
            raise RunError(
                "--latents: the autoencoder gives NaN or infinite latents; check its "
                "weights"
            )
        return whole

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Images `[N, H, W, C]` of latents; N is a multiple of `DECODED`."""
        parts = [
            np.asarray(
                latents.decode(self.params, self.config, codes[first : first + DECODED])
            )
            for first in range(0, len(codes), DECODED)
        ]
        return np.concatenate(parts)


def load(folder: str) -> Autoencoder:
    """Read the folder of an autoencoder, or of a pipeline that has one."""
    if not Path(folder).is_dir():
        raise RunError(
            f"--latents {folder}: no such folder; give that of an autoencoder, or of "
            "a pipeline with a folder `vae`"
        )
    try:
        params, config = latents.from_diffusers(folder)
    except (OSError, ValueError, ImportError) as error:
        said = " ".join(str(error).split())
        raise RunError(f"--latents {folder}: {said}") from error
    for part, purpose in (("encoder", "encode images"), ("decoder", "show samples")):
        if part not in params:
            raise RunError(
                f"--latents {folder}: it has no {part} to {purpose} with; give the "
                "whole autoencoder"
            )
    digest = hashlib.sha256(repr(config).encode())
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    return Autoencoder(params, config, digest.hexdigest()[:16])


def read_latents(path: Path, key: str) -> tuple[np.ndarray, np.ndarray] | None:
    """The latents of a run's folder, if they are there and of this data."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["key"]) == key:
                return file["train"], file["held_out"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        print(
            f"train_dit.py: {path} cannot be read ({error}); encoding the images again",
            file=sys.stderr,
        )
    return None


def write_latents(
    path: Path, key: str, train: np.ndarray, held_out: np.ndarray
) -> None:
    """Keep latents beside the key that they belong to."""
    write_whole(
        path, lambda file: np.savez(file, key=key, train=train, held_out=held_out)
    )
