"""The models that the step cache is measured on: trained once, then read again."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit_training import optimizers, options, training
from dit_training.data import Dataset

from fusionopt_jax import dit
from fusionopt_jax.dit.files import replacing

OBJECTIVES: dict[str, Callable[..., jax.Array]] = {
    "flow": dit.rectified_flow_loss,
    "diffusion": dit.diffusion_loss,
}
"""What a model predicts: a velocity, for Euler; or the noise, for DDIM."""

OPTIMIZER = "fusion"


def trained(
    objective: str, config: dit.DiTConfig, data: Dataset, steps: int, folder: Path
) -> Any:
    """The weights of a model of one objective, from the folder if it has them.

    The name of the file says what was trained, so that other settings train anew.
    """
    sizes = f"{config.hidden_size}x{config.depth}-{config.patch_size}"
    path = folder / f"{objective}-{data.digest}-{sizes}-{steps}.npz"
    shapes = jax.eval_shape(lambda: dit.init_params(config))
    if path.exists():
        with np.load(path) as arrays:
            leaves = [arrays[str(number)] for number in range(len(arrays.files))]
        return jax.tree.unflatten(
            jax.tree.structure(shapes), [jnp.asarray(leaf) for leaf in leaves]
        )
    params = train(objective, config, data, steps)
    folder.mkdir(parents=True, exist_ok=True)
    named = {str(number): leaf for number, leaf in enumerate(jax.tree.leaves(params))}
    with replacing(path) as stream:
        np.savez(stream, **jax.device_get(named))
    return params


def train(objective: str, config: dit.DiTConfig, data: Dataset, steps: int) -> Any:
    """Train as `train_dit.py` does, on the loss of the objective; the average."""
    batch = options.Settings.batch_size

    @partial(jax.jit, donate_argnums=0)
    def step(
        state: training.TrainState, images: jax.Array, labels: jax.Array
    ) -> tuple[training.TrainState, jax.Array]:
        order_key, noise_key = jax.random.split(jax.random.key(0))
        rows = training.batch_rows(order_key, state.step, len(images), batch)
        loss, gradients = jax.value_and_grad(OBJECTIVES[objective])(
            state.params,
            config,
            images[rows],
            labels[rows],
            jax.random.fold_in(noise_key, state.step),
        )
        tx = optimizers.build(
            OPTIMIZER, optimizers.LEARNING_RATES[OPTIMIZER], steps, state.params
        )
        updates, opt_state = tx.update(
            gradients, state.opt_state, state.params, value=loss
        )
        params = jax.tree.map(jnp.add, state.params, updates)
        return training.TrainState(state.step + 1, params, opt_state), loss

    state = training.init_state(config, OPTIMIZER, 0)
    images, labels = jnp.asarray(data.train_images), jnp.asarray(data.train_labels)
    bar = tqdm(range(1, steps + 1), f"training {objective}", unit="step")
    for number in bar:
        state, loss = step(state, images, labels)
        if number % 50 == 0:
            bar.set_postfix_str(f"loss {float(loss):.3f}")
    return optimizers.deployed(OPTIMIZER, state.opt_state, state.params)
