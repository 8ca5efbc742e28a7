"""Small models for the tests of the DiT, and the recording of the published one."""

import functools
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fusionopt_jax import dit

DATA = pathlib.Path(__file__).parents[1] / "data"

CONFIG = dit.DiTConfig(
    input_size=4,
    patch_size=2,
    in_channels=3,
    hidden_size=16,
    depth=3,
    num_heads=2,
    num_classes=10,
    learn_sigma=False,
)

# What the caches of the tests are asked for.
TIMES = np.array([999.0, 640.5, 17.25], np.float32)
LABELS = [7, 3, 7]


def random_params(config: dit.DiTConfig, seed: int = 0) -> Any:
    """Parameters without zeros, so that every weight moves the output."""
    generator = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: dit.init_params(config))
    return jax.tree.map(
        lambda leaf: jnp.asarray(
            generator.normal(0, 0.25, leaf.shape).astype(np.float32)
        ),
        shapes,
    )


class Batch(NamedTuple):
    """What `apply` takes beside parameters and config."""

    images: jax.Array
    times: jax.Array
    labels: jax.Array


def random_batch(config: dit.DiTConfig, size: int = 3, seed: int = 1) -> Batch:
    """Images, times and labels; the first label is the null label if there is one."""
    generator = np.random.default_rng(seed)
    shape = (size, config.input_size, config.input_size, config.in_channels)
    labels = generator.integers(0, config.num_classes, size)
    labels[0] = config.num_labels - 1
    return Batch(
        jnp.asarray(generator.normal(size=shape).astype(np.float32)),
        jnp.asarray(generator.uniform(0, 999, size).astype(np.float32)),
        jnp.asarray(labels, jnp.int32),
    )


run = jax.jit(
    dit.apply,
    static_argnums=1,
    static_argnames=("dtype", "unroll", "remat", "attention"),
)


class Golden(NamedTuple):
    """The recorded network: its weights, and every other array by its recorded name."""

    params: Any
    config: dit.DiTConfig
    arrays: dict[str, np.ndarray]

    def nhwc(self, name: str) -> np.ndarray:
        """An image array with channels last."""
        return self.arrays[name].transpose(0, 2, 3, 1)


@functools.cache
def golden() -> Golden:
    """Outputs of the published PyTorch model with random weights.

    To keep the file small, weights of 4000 values and more are stored as multiples of
    2^-21, some 100 000th of their deviation: three planes of bytes, lowest first, of
    integers whose fourth byte only repeats the sign. That moves guided output by
    1.4e-5. Smaller weights (embeddings of patches and labels, the final kernel, biases)
    move it most, value by value, and are exact. `shapes` lists both kinds in order.

    Gradients are stored as 200 evenly spaced entries and a norm, intermediates for two
    of eight images (of the second and third block only the output), and the cache table
    for two steps and two labels.
    """
    with np.load(DATA / "dit_small.npz") as file:
        arrays = {name: file[name] for name in file.files}
    small, planes = arrays.pop("small_weights"), arrays.pop("large_weights")
    integers = np.zeros((planes.shape[1], 4), np.uint8)
    integers[:, 1:] = planes.T
    # The shift copies the sign into the byte that was left out.
    large = (integers.view("<i4")[:, 0] >> 8).astype(np.float32) * np.float32(2**-21)
    weights = {"pos_embed": arrays.pop("pos_embed")}
    for name, shape in json.loads(str(arrays.pop("shapes"))).items():
        size = int(np.prod(shape))
        if size < 4000:
            flat, small = np.split(small, [size])
        else:
            flat, large = np.split(large, [size])
        weights[name] = flat.reshape(shape)
    params, config = dit.from_pytorch(weights, num_heads=4)
    return Golden(params, config, arrays)
