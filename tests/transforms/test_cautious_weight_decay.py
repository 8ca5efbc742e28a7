"""`add_cautious_decayed_weights` against its equation; decays the fast iterate."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fusionopt_jax as fo
from tests import _compare
from tests.references import stabilisers


def test_follows_the_equation_with_a_schedule(rng):
    schedule = lambda count: 0.1 * (1 + count)  # noqa: E731
    tx = fo.add_cautious_decayed_weights(schedule)
    params = {"w": jnp.asarray(rng.normal(size=(5, 7)), jnp.float32)}
    state = tx.init(params)
    for t in range(3):
        update = rng.normal(size=(5, 7)).astype(np.float32)
        # A zero update decays, a zero weight has nothing to decay.
        update[0, 0] = 0.0
        ours, state = tx.update({"w": jnp.asarray(update)}, state, params)
        expected = stabilisers.cautious_decay(
            update, np.asarray(params["w"], np.float64), schedule(t)
        )
        _compare.assert_within(ours["w"], expected, 1e-6, f"step {t}")


def test_decays_the_fast_iterate_inside_schedule_free():
    tx = fo.schedule_free(fo.add_cautious_decayed_weights(0.5), 1.0, b1=0.5)
    params = {"w": jnp.array([1.0, 1.0])}
    state = tx.init(params)
    for gradient in ([0.5, -0.5], [-0.5, -0.5]):
        updates, state = tx.update({"w": jnp.array(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
    # First entry: z = 1 - (0.5 + 0.5) = 0, then an update of -0.5 on z = 0 (y is not
    # 0), to 0.5. Second: it grows, never decayed: 1.5, then 2.
    np.testing.assert_allclose(fo.fast_params(state, params)["w"], [0.5, 2.0])


def test_masked_leaves_are_not_decayed():
    params = {"w": jnp.ones(2), "b": jnp.ones(2)}
    tx = fo.add_cautious_decayed_weights(0.5, mask={"w": True, "b": False})
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_array_equal(updates["w"], 1.5)
    np.testing.assert_array_equal(updates["b"], 1.0)


def test_updates_keep_their_dtype():
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    tx = fo.add_cautious_decayed_weights(0.5)
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["w"].dtype == jnp.bfloat16


def test_parameters_are_needed_and_decay_is_not_negative():
    tx = fo.add_cautious_decayed_weights(0.5)
    with pytest.raises(ValueError, match="needs the current parameters"):
        tx.update({"w": jnp.ones(2)}, tx.init({"w": jnp.ones(2)}))
    with pytest.raises(ValueError, match="weight_decay"):
        fo.add_cautious_decayed_weights(-0.1)
