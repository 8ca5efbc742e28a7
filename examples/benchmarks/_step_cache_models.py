"""The models that the step cache is measured on: trained once, then read again."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit_training import data as images_data
from dit_training import optimizers, options, training
from dit_training.data import Dataset

from fusionopt_jax import dit
from fusionopt_jax.dit.files import replacing

OBJECTIVES: dict[str, Callable[..., jax.Array]] = {
    "flow": dit.rectified_flow_loss,
    "diffusion": dit.diffusion_loss,
}
"""What a model predicts: a velocity, for Euler; or the noise, for DDIM."""

PREDICTED = {"euler": "flow", "ddim": "diffusion"}
"""The objective that each sampler needs."""

OPTIMIZER = "fusion"


class Model(NamedTuple):
    """What is trained, and what is measured of it.

    Attributes:
        load: reads the images.
        settings: of the training, and the sizes of the network.
        starts: the samplers that are to be made faster, "ddim" or "euler".
        detailed: those whose latency is measured and that are drawn, with their steps.
        variants: those of them of which other orders, even steps and branches apart are
            measured too.
        images: how many are sampled of each seed; the labels go round.
        calibration: labels of the images that step caches are calibrated on.
        shown: which images of the first seed are drawn.
        suffix: of the names of its files.
    """

    load: Callable[[], Dataset]
    settings: options.Settings
    starts: tuple[str, ...]
    detailed: tuple[tuple[str, int], ...]
    variants: tuple[tuple[str, int], ...]
    images: int
    calibration: tuple[int, ...]
    shown: tuple[int, ...]
    suffix: str


def _glyphs() -> Dataset:
    """Characters of 32x32 pixels, from the fonts that come with matplotlib."""
    from study import glyphs

    return glyphs.load(32)


MODELS = {
    "digits": Model(
        load=partial(images_data.load, "digits"),
        settings=options.Settings(
            learning_rate=optimizers.LEARNING_RATES[OPTIMIZER], steps=1250
        ),
        starts=("euler", "ddim"),
        detailed=(("ddim", 50), ("euler", 25)),
        variants=(("ddim", 50), ("euler", 25)),
        images=500,
        calibration=tuple(range(10)) * 2,
        shown=tuple(range(10)),
        suffix="",
    ),
    "glyphs": Model(
        load=_glyphs,
        settings=options.Settings(
            learning_rate=4e-3,
            steps=2500,
            batch_size=32,
            hidden_size=384,
            num_heads=6,
            patch_size=4,
        ),
        starts=("ddim",),
        detailed=(("ddim", 50), ("ddim", 25)),
        variants=(),
        # Each character once.
        images=62,
        calibration=tuple(range(0, 60, 3)),
        shown=(2, 5, 10, 16, 26, 30, 36, 42, 50, 60),
        suffix="_glyphs",
    ),
}
"""By what they draw."""


def trained(
    settings: options.Settings,
    objective: str,
    config: dit.DiTConfig,
    data: Dataset,
    folder: Path,
) -> Any:
    """The weights of a model of one objective, from the folder if it has them.

    The name of the file says what was trained, so that other images, sizes and numbers
    of steps train anew.
    """
    sizes = f"{config.hidden_size}x{config.depth}-{config.patch_size}"
    path = folder / f"{objective}-{data.digest}-{sizes}-{settings.steps}.npz"
    shapes = jax.eval_shape(lambda: dit.init_params(config))
    if path.exists():
        with np.load(path) as arrays:
            leaves = [arrays[str(number)] for number in range(len(arrays.files))]
        return jax.tree.unflatten(
            jax.tree.structure(shapes), [jnp.asarray(leaf) for leaf in leaves]
        )
    params = train(settings, objective, config, data)
    folder.mkdir(parents=True, exist_ok=True)
    named = {str(number): leaf for number, leaf in enumerate(jax.tree.leaves(params))}
    with replacing(path) as stream:
        np.savez(stream, **jax.device_get(named))
    return params


def train(
    settings: options.Settings, objective: str, config: dit.DiTConfig, data: Dataset
) -> Any:
    """Train as `train_dit.py` does, on the loss of the objective; the average."""

    @partial(jax.jit, donate_argnums=0)
    def step(
        state: training.TrainState, images: jax.Array, labels: jax.Array
    ) -> tuple[training.TrainState, jax.Array]:
        order_key, noise_key = jax.random.split(jax.random.key(0))
        rows = training.batch_rows(
            order_key, state.step, len(images), settings.batch_size
        )
        loss, gradients = jax.value_and_grad(OBJECTIVES[objective])(
            state.params,
            config,
            images[rows],
            labels[rows],
            jax.random.fold_in(noise_key, state.step),
        )
        tx = optimizers.build(
            OPTIMIZER, settings.learning_rate, settings.steps, state.params
        )
        updates, opt_state = tx.update(
            gradients, state.opt_state, state.params, value=loss
        )
        params = jax.tree.map(jnp.add, state.params, updates)
        return training.TrainState(state.step + 1, params, opt_state), loss

    state = training.init_state(config, OPTIMIZER, 0)
    images, labels = jnp.asarray(data.train_images), jnp.asarray(data.train_labels)
    bar = tqdm(range(1, settings.steps + 1), f"training {objective}", unit="step")
    for number in bar:
        state, loss = step(state, images, labels)
        if number % 50 == 0:
            bar.set_postfix_str(f"loss {float(loss):.3f}")
    return optimizers.deployed(OPTIMIZER, state.opt_state, state.params)
