"""The training step, the validation loss and the sampler, each one jitted function.

Everything random is a function of the seed and the step: the order of the images, the
times, the noise and the dropped labels. A resumed run therefore repeats, bit for bit,
what an uninterrupted one would have done.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_training import optimizers
from fusionopt_jax import dit

VALIDATION_DRAWS = 8
"""How often each held-out image meets a fixed time and a fixed noise."""


class TrainState(NamedTuple):
    """All that a checkpoint holds.

    Attributes:
        step: how many updates were made, int32.
        params: the model's weights, where gradients are taken.
        opt_state: the optimizer's state.
    """

    step: jax.Array
    params: Any
    opt_state: Any


@partial(jax.jit, static_argnums=(0, 1, 2))
def init_state(config: dit.DiTConfig, optimizer: str, seed: int) -> TrainState:
    """Fresh weights; no optimizer's first state depends on its learning rate."""
    params = dit.init_params(config, seed)
    opt_state = optimizers.build(optimizer, 1.0, 1, params).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state)


@lru_cache
def make_train_step(
    config: dit.DiTConfig, optimizer: str, steps: int, batch_size: int
) -> Callable[..., tuple[TrainState, jax.Array, jax.Array]]:
    """`(state, images, labels, seed, learning_rate) -> (state, loss, step size)`.

    `images` and `labels` are all there are. Seed and learning rate are arguments of the
    compiled function, so that a study of several seeds and rates compiles once, as does
    a run that is resumed in the same process. The old state is donated.
    """

    @partial(jax.jit, donate_argnums=0)
    def train_step(
        state: TrainState,
        images: jax.Array,
        labels: jax.Array,
        seed: jax.Array,
        learning_rate: jax.Array,
    ) -> tuple[TrainState, jax.Array, jax.Array]:
        order_key, noise_key = jax.random.split(jax.random.key(seed))
        rows = batch_rows(order_key, state.step, len(images), batch_size)
        return update(
            config,
            optimizer,
            steps,
            state,
            images[rows],
            labels[rows],
            noise_key,
            learning_rate,
        )

    return train_step


def make_fed_step(
    config: dit.DiTConfig, optimizer: str, steps: int, shardings: TrainState
) -> Callable[..., tuple[TrainState, jax.Array, jax.Array]]:
    """The same step for a state on a mesh, handed the `images` of its batch alone.

    `shardings` says where the state lies, before and after.
    """
    whole = shardings.step

    @partial(jax.jit, donate_argnums=0, out_shardings=(shardings, whole, whole))
    def train_step(
        state: TrainState,
        images: jax.Array,
        labels: jax.Array,
        seed: jax.Array,
        learning_rate: jax.Array,
    ) -> tuple[TrainState, jax.Array, jax.Array]:
        _, noise_key = jax.random.split(jax.random.key(seed))
        return update(
            config, optimizer, steps, state, images, labels, noise_key, learning_rate
        )

    return train_step


def update(
    config: dit.DiTConfig,
    optimizer: str,
    steps: int,
    state: TrainState,
    images: jax.Array,
    labels: jax.Array,
    noise_key: jax.Array,
    learning_rate: jax.Array,
) -> tuple[TrainState, jax.Array, jax.Array]:
    """One update from one batch: the state after it, the loss and the step size."""
    loss, gradients = jax.value_and_grad(dit.rectified_flow_loss)(
        state.params,
        config,
        images,
        labels,
        jax.random.fold_in(noise_key, state.step),
    )
    tx = optimizers.build(optimizer, learning_rate, steps, state.params)
    updates, opt_state = tx.update(gradients, state.opt_state, state.params, value=loss)
    factor = optimizers.step_size(optimizer, steps, opt_state, state.step)
    params = jax.tree.map(jnp.add, state.params, updates)
    return TrainState(state.step + 1, params, opt_state), loss, factor


def batch_rows(
    key: jax.Array, step: jax.Array, count: int, batch_size: int
) -> jax.Array:
    """Which images the step takes: each epoch is a fresh permutation of them all."""
    epoch, rows = places(step, count, batch_size)
    return epoch_order(key, epoch, count)[rows]


def places(step: Any, count: int, batch_size: int) -> tuple[Any, Any]:
    """The epoch of a step, and where in that epoch's order its images stand."""
    per_epoch = max(count // batch_size, 1)
    epoch, place = step // per_epoch, step % per_epoch
    # A set smaller than one batch goes round again.
    return epoch, (place * batch_size + np.arange(batch_size, dtype=np.int32)) % count


def epoch_order(key: jax.Array, epoch: Any, count: int) -> jax.Array:
    """The order of all images in one epoch."""
    return jax.random.permutation(jax.random.fold_in(key, epoch), count)


def rows_on_host(seed: int, step: int, count: int, batch_size: int) -> np.ndarray:
    """:func:`batch_rows` of a run's seed, for processes that look images up there."""
    epoch, rows = places(step, count, batch_size)
    return _host_order(seed, epoch, count)[rows]


@lru_cache(maxsize=1)
def _host_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of one epoch, computed once and beside the devices that train."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        order_key, _ = jax.random.split(jax.random.key(np.int32(seed)))
        return np.asarray(epoch_order(order_key, epoch, count))


@lru_cache
def make_validation_loss(config: dit.DiTConfig) -> Callable[..., jax.Array]:
    """`(params, images, labels) -> loss`, the same draws at every call of every run."""

    @jax.jit
    def validation_loss(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        def one_draw(total: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
            loss = dit.rectified_flow_loss(
                params, config, images, labels, key, class_dropout_prob=0.0
            )
            return total + loss, None

        keys = jax.random.split(jax.random.key(0), VALIDATION_DRAWS)
        total, _ = jax.lax.scan(one_draw, jnp.zeros(()), keys)
        return total / VALIDATION_DRAWS

    return validation_loss


def all_finite(tree: Any) -> bool:
    """Whether no number in a tree is NaN or infinite, wherever the arrays lie."""
    return bool(_all_finite(jax.tree.leaves(tree)))


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> jax.Array:
    """One number from each device, instead of all numbers from all of them."""
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]))
