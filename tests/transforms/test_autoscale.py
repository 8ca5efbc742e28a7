"""`autoscale`: Prodigy's estimate, what bounds it, what broken numbers do to it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fusionopt_jax as fo
from tests import _compare
from tests.references import autoscale

START = np.array([0.5, -0.25, 0.125, 0.4])
CURVATURE = np.array([1.0, 10.0, 0.1, 3.0])


def gradient(x):
    """Of half the sum of the curvatures times the squares: its minimum is zero."""
    return CURVATURE.astype(x.dtype) * x


def run(tx, steps):
    """Estimates and parameters after every step."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (optax.tree.get(state, "step_size"), params)

    params = jnp.asarray(START, jnp.float32)
    return jax.jit(
        lambda: jax.lax.scan(step, (params, tx.init(params)), None, length=steps)[1]
    )()


def signed(**settings):
    """Steps of one size in every entry."""
    return fo.autoscale(
        optax.chain(optax.scale_by_sign(), optax.scale(-1.0)), **settings
    )


@pytest.mark.parametrize(("rule", "power"), [("prodigy", 2), ("d_adaptation", 1)])
def test_follows_the_equations(rule, power):
    estimates, path = run(signed(rule=rule, b1=0.9, first=1e-3), 30)
    expected, expected_path = autoscale.trajectory(
        gradient, START, np.sign, first=1e-3, decay=0.9, power=power, steps=30
    )
    # Differences of parameters below one, in float32 against float64.
    np.testing.assert_allclose(estimates, expected, rtol=1e-4)
    _compare.assert_within(path, expected_path, 1e-5, "path")
    assert estimates[-1] > 10 * estimates[0]


def test_the_estimate_is_that_of_prodigy_in_optax():
    # Without averages of its own, Adam takes the sign of the gradient.
    theirs = optax.contrib.prodigy(
        1.0, betas=(0.0, 0.0), beta3=0.9, estim_lr0=1e-3, eps=1e-12
    )

    def step(carry, _):
        params, state = carry
        updates, state = theirs.update(gradient(params), state, params)
        return (optax.apply_updates(params, updates), state), state.estim_lr

    params = jnp.asarray(START, jnp.float32)
    _, expected = jax.lax.scan(step, (params, theirs.init(params)), None, length=30)
    estimates, _ = run(signed(b1=0.9, first=1e-3), 30)
    # The same sums in another order.
    np.testing.assert_allclose(estimates, expected, rtol=1e-4)


@pytest.mark.parametrize("first", [1e-6, 1e-4, 1e-2])
def test_the_first_estimate_may_be_decades_too_small(first):
    estimates, path = run(signed(first=first, b1=0.9), 300)
    assert np.all(np.diff(estimates) >= 0)
    # On a convex loss it stays below the largest distance to the solution in any entry.
    assert 0.01 < estimates[-1] <= np.abs(START).max()
    assert np.abs(path[-1]).max() < np.abs(START).max()


def test_it_hands_its_estimate_to_schedule_free():
    inner = fo.schedule_free(optax.scale_by_sign(), 1.0, b1=0.5)
    tx = fo.autoscale(inner, first=1e-2)
    params = jnp.asarray(START, jnp.float32)
    updates, state = tx.update(gradient(params), tx.init(params), params)
    np.testing.assert_allclose(updates, -1e-2 * np.sign(START), rtol=1e-5)
    # A factor from outside multiplies it.
    doubled, _ = tx.update(gradient(params), tx.init(params), params, step_size=2.0)
    np.testing.assert_allclose(doubled, -2e-2 * np.sign(START), rtol=1e-5)
    assert "autoscale/step_size" in fo.diagnostics(state)


@pytest.mark.parametrize("entry", [jnp.nan, jnp.inf])
def test_a_gradient_that_is_no_number_changes_nothing(entry):
    for inner in (optax.sgd(1.0), fo.schedule_free(optax.identity(), 1.0)):
        params = jnp.asarray(START, jnp.float32)
        tx = fo.autoscale(inner, first=2**-10)
        updates, before = tx.update(gradient(params), tx.init(params), params)
        params = optax.apply_updates(params, updates)
        broken = gradient(params).at[1].set(entry)
        updates, after = tx.update(broken, before, params)
        # Zero, but for the rounding with which the average is recovered.
        np.testing.assert_allclose(updates, 0, atol=1e-7)
        for field in ("step_size", "numerator", "gradient_average"):
            np.testing.assert_array_equal(getattr(after, field), getattr(before, field))
