"""Folders of random autoencoders, and images for them."""

import pathlib

import numpy as np

from tests.dit import _folders

# Latents of one channel: those of 8x8 pixels have the size of the images that the other
# tests train on, so that the same programs serve both.
CONFIG = _folders.VAE | {"latent_channels": 1}


def write_autoencoder(
    folder: pathlib.Path, seed: int = 1, without: tuple[str, ...] = ()
) -> pathlib.Path:
    """An autoencoder that halves the sides; `without` begins the names left out."""
    weights = _folders.vae_arrays(CONFIG, seed)
    _folders.write_json(folder / "config.json", CONFIG)
    kept = {name: v for name, v in weights.items() if not name.startswith(without)}
    _folders.write_weights(folder, kept)
    return folder


def write_pictures(
    path: pathlib.Path, shape: tuple[int, int, int] = (8, 8, 3)
) -> pathlib.Path:
    """Sixty images of bytes in three classes, each with its own brightness."""
    labels = np.arange(60) % 3
    noise = np.random.default_rng(0).integers(0, 80, size=(60, *shape))
    images = (80 * labels[:, None, None, None] + noise).astype(np.uint8)
    np.savez(path, images=images, labels=labels)
    return path
