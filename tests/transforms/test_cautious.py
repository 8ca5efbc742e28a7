"""`cautious` against its equation, and its norm, sign and identity properties."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fusionopt_jax as fo
from tests import _compare
from tests.references import stabilisers


def test_follows_the_equation_around_momentum(rng):
    tx = fo.cautious(optax.trace(0.9))
    update = jax.jit(tx.update)
    params = {"w": jnp.zeros((6, 8)), "b": jnp.zeros(8)}
    state = tx.init(params)
    momentum = {name: np.zeros(leaf.shape) for name, leaf in params.items()}
    for _ in range(6):
        gradient = {name: rng.normal(size=m.shape) for name, m in momentum.items()}
        gradient = jax.tree.map(lambda g: g.astype(np.float32), gradient)
        momentum = {name: 0.9 * momentum[name] + g for name, g in gradient.items()}
        ours, state = update(jax.tree.map(jnp.asarray, gradient), state, params)
        kept = 0.0
        for name, m in momentum.items():
            expected, share = stabilisers.cautious(m, gradient[name])
            # float32 momentum of entries near 3 and one rescaling.
            _compare.assert_within(ours[name], expected, 1e-5, name)
            kept += share * m.size / (48 + 8)
        np.testing.assert_allclose(state.kept, kept, rtol=1e-6)


def test_a_small_rest_is_as_long_as_the_whole():
    update, gradient = jnp.array([3.0, -4.0, 2e-30]), jnp.array([-1.0, 1.0, 1.0])
    tx = fo.cautious(optax.stateless(lambda *_: {"w": update}))
    ours, _ = tx.update({"w": gradient}, tx.init({"w": jnp.zeros(3)}))
    np.testing.assert_allclose(ours["w"], [0, 0, 5], rtol=1e-6)


FINITE = st.floats(-1e3, 1e3, width=32)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(hnp.arrays(np.float32, (2, 5), elements=FINITE))
def test_keeps_the_norm_and_never_opposes_the_gradient(pair):
    update, gradient = pair
    tx = fo.cautious(optax.stateless(lambda g, _: {"w": jnp.asarray(update)}))
    ours, _ = tx.update({"w": jnp.asarray(gradient)}, tx.init({"w": jnp.zeros(5)}))
    ours = np.asarray(ours["w"], np.float64)
    assert (ours * gradient >= 0).all()
    agrees = np.sign(update) * np.sign(gradient) > 0
    if agrees.any():
        # float32 norms; entries as small as the smallest normal number may vanish.
        np.testing.assert_allclose(
            np.linalg.norm(ours),
            np.linalg.norm(update.astype(np.float64)),
            rtol=1e-5,
            atol=1e-36,
        )
    else:
        assert not ours.any()


def test_an_update_that_agrees_everywhere_is_left_alone():
    gradient = {"w": jnp.array([1.0, -2.0, 3e-20])}
    tx = fo.cautious(optax.scale(0.5))
    update, state = tx.update(gradient, tx.init(gradient))
    np.testing.assert_allclose(update["w"], 0.5 * gradient["w"], rtol=1e-6)
    assert float(state.kept) == 1.0


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_sizes_near_the_limits_of_float32(size):
    gradient = {"w": jnp.array([1.0, 1.0, -1.0, 1.0])}
    tx = fo.cautious(optax.stateless(lambda g, _: {"w": jnp.full(4, size)}))
    update, _ = tx.update(gradient, tx.init(gradient))
    # Three of four entries are kept and carry the norm of all.
    np.testing.assert_allclose(
        update["w"] / size, np.sqrt(4 / 3) * np.array([1, 1, 0, 1]), rtol=1e-6
    )


def test_half_precision_products_do_not_underflow():
    gradient = {"w": jnp.full(2, 1e-5, jnp.float16)}
    tx = fo.cautious(optax.identity())
    update, state = tx.update(gradient, tx.init(gradient))
    assert update["w"].dtype == jnp.float16
    np.testing.assert_array_equal(update["w"], gradient["w"])
    assert float(state.kept) == 1.0
