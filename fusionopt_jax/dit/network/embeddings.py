"""What enters the network: patches with their positions, times, and labels."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from fusionopt_jax._types import Params
from fusionopt_jax.dit.config import TIME_FEATURES, DiTConfig
from fusionopt_jax.dit.network.layers import CONDITIONING_PRECISION, linear

MAX_PERIOD = 10000.0
"""Longest period of the sinusoidal features; the published constant."""


class PatchEmbedder(nnx.Module):
    """Parameters of the linear map from a patch to a token."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs) -> None:
        patch_values = config.patch_size**2 * config.in_channels
        self.proj = nnx.Linear(
            patch_values,
            config.hidden_size,
            kernel_init=nnx.initializers.xavier_uniform(),
            rngs=rngs,
        )


class TimeEmbedder(nnx.Module):
    """Parameters of the two-layer map from time features to the conditioning width."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs) -> None:
        normal = nnx.initializers.normal(0.02)
        width = config.hidden_size
        self.fc1 = nnx.Linear(TIME_FEATURES, width, kernel_init=normal, rngs=rngs)
        self.fc2 = nnx.Linear(width, width, kernel_init=normal, rngs=rngs)


class LabelEmbedder(nnx.Module):
    """One vector per class, and one for the null label."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs) -> None:
        shape = (config.num_labels, config.hidden_size)
        table = nnx.initializers.normal(0.02)(rngs.params(), shape, jnp.float32)
        self.embedding_table = nnx.Param(table)


@functools.lru_cache(maxsize=32)
def position_embedding(
    grid_size: int, hidden_size: int
) -> Float[np.ndarray, "tokens d"]:
    """Sines and cosines of a patch's column (first half of the width) and row."""
    quarter = hidden_size // 4
    frequencies = MAX_PERIOD ** -(np.arange(quarter, dtype=np.float64) / quarter)
    angles = np.arange(grid_size, dtype=np.float64)[:, None] * frequencies[None, :]
    axis_features = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    shape = (grid_size, grid_size, hidden_size // 2)
    column = np.broadcast_to(axis_features[None, :, :], shape)
    row = np.broadcast_to(axis_features[:, None, :], shape)
    table = np.concatenate([column, row], axis=-1).reshape(grid_size**2, hidden_size)
    # Computed in float64 and rounded once: a single fp32 pass is off by the last bits.
    return table.astype(np.float32)


def patchify(
    images: Float[Array, "b h w c"], patch_size: int
) -> Float[Array, "b tokens values"]:
    """Cut images into patches: tokens row by row, values in (row, column, channel)."""
    batch, height, width, channels = images.shape
    rows, columns = height // patch_size, width // patch_size
    patches = images.reshape(batch, rows, patch_size, columns, patch_size, channels)
    patches = patches.transpose(0, 1, 3, 2, 4, 5)
    return patches.reshape(batch, rows * columns, patch_size**2 * channels)


def unpatchify(
    patches: Float[Array, "b tokens values"], patch_size: int
) -> Float[Array, "b h w c"]:
    """Lay patches back into square images; the inverse of `patchify`."""
    batch, tokens, values = patches.shape
    side = math.isqrt(tokens)
    channels = values // patch_size**2
    images = patches.reshape(batch, side, side, patch_size, patch_size, channels)
    images = images.transpose(0, 1, 3, 2, 4, 5)
    return images.reshape(batch, side * patch_size, side * patch_size, channels)


def embed_patches(
    params: Params,
    config: DiTConfig,
    images: Float[Array, "b h w c"],
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "b tokens d"]:
    """Tokens of the images, with their positions added."""
    tokens = linear(params["proj"], patchify(images, config.patch_size), dtype)
    positions = position_embedding(config.grid_size, config.hidden_size)
    return tokens + jnp.asarray(positions)[None]


def time_features(
    times: Float[Array, "n"], frequency_shift: int = 0
) -> Float[Array, "n features"]:
    """Cosines, then sines, of the times at geometrically spaced frequencies."""
    half = TIME_FEATURES // 2
    exponents = np.arange(half, dtype=np.float64) / (half - frequency_shift)
    frequencies = np.exp(-math.log(MAX_PERIOD) * exponents).astype(np.float32)
    angles = times.astype(jnp.float32)[:, None] * jnp.asarray(frequencies)[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def embed_times(
    params: Params, config: DiTConfig, times: Float[Array, "n"]
) -> Float[Array, "n d"]:
    """The conditioning vector of each time, in fp32."""
    scaled = times.astype(jnp.float32) * config.time_scale
    features = time_features(scaled, config.frequency_shift)
    hidden = linear(params["fc1"], features, precision=CONDITIONING_PRECISION)
    return linear(params["fc2"], jax.nn.silu(hidden), precision=CONDITIONING_PRECISION)


def embed_labels(params: Params, labels: Int[Array, "n"]) -> Float[Array, "n d"]:
    """The conditioning vector of each label, in fp32; NaN for an unknown one."""
    table = params["embedding_table"].astype(jnp.float32)
    # Negative labels would wrap around to real classes, so send them out of range too.
    labels = jnp.where(labels < 0, table.shape[0], labels)
    return jnp.take(table, labels, axis=0, mode="fill")


def check_labels(config: DiTConfig, labels: Array | np.ndarray) -> None:
    """Require integer labels that the model knows; traced values pass unseen."""
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"`labels` must be integers, got {labels.dtype}.")
    if isinstance(labels, Tracer):
        return
    values = np.asarray(labels)
    wrong = np.unique(values[(values < 0) | (values >= config.num_labels)])
    if wrong.size:
        shown = ", ".join(str(value) for value in wrong[:5])
        null = (
            f"; {config.null_label} is the null label" if config.has_null_label else ""
        )
        raise ValueError(
            f"`labels` must lie in [0, {config.num_labels - 1}] for "
            f"num_classes={config.num_classes}{null}; got {shown}."
        )
