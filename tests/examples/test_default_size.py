"""The main job at its default size: a model of the tests' size has no matrices."""

import jax
import jax.numpy as jnp
import pytest
from dit_training import data, optimizers, options, training


@pytest.mark.parametrize("optimizer", optimizers.NAMES)
def test_every_optimizer_can_take_a_step_at_the_default_size(optimizer):
    settings = options.Settings()
    digits = data.load(settings.data)
    model = options.model_config(settings, digits)
    step = training.make_train_step(model, optimizer, 2, settings.batch_size)
    # Traced, not compiled: what fails at this size fails while it is traced.
    state = jax.eval_shape(lambda: training.init_state(model, optimizer, 0))
    new, loss, _ = jax.eval_shape(
        step,
        state,
        jnp.asarray(digits.train_images),
        jnp.asarray(digits.train_labels),
        jnp.int32(0),
        jnp.float32(1e-3),
    )
    assert loss.shape == ()
    assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)
