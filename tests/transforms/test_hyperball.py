"""`hyperball` against its equation; spheres are kept, zero matrices are trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fusionopt_jax as fo
from tests import _compare
from tests.references import stabilisers


def rate(count):
    return 0.1 / (1 + count)


def test_follows_the_equation(rng):
    weight = rng.normal(size=(2, 6, 8)).astype(np.float32)
    # One of the stacked matrices starts at zero.
    weight[1] = 0.0
    tx = fo.hyperball(optax.trace(0.9), rate)
    update = jax.jit(tx.update)
    params = {"w": jnp.asarray(weight)}
    state = tx.init(params)
    expected, momentum = weight.astype(np.float64), np.zeros(weight.shape)
    radii = np.linalg.norm(expected, axis=(1, 2))
    for t in range(6):
        gradient = rng.normal(size=weight.shape).astype(np.float32)
        momentum = 0.9 * momentum + gradient
        expected = np.stack(
            [
                stabilisers.hyperball(W, u, radius, rate(t))
                for W, u, radius in zip(expected, momentum, radii, strict=True)
            ]
        )
        updates, state = update({"w": jnp.asarray(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        # Six float32 steps on entries near 1.
        _compare.assert_within(params["w"], expected, 5e-6, f"step {t}")


def test_each_chunk_has_its_own_sphere(rng):
    weight = rng.normal(size=(8, 24)).astype(np.float32)
    weight[:, 8:16] *= 10
    routing = fo.Routing([fo.Rule("qkv", chunks=3)], min_dim=8)
    tx = fo.hyperball(fo.ns5(routing=routing), 0.2, routing=routing)
    params = {"qkv": jnp.asarray(weight)}
    gradient = {"qkv": jnp.asarray(rng.normal(size=(8, 24)), jnp.float32)}
    updates, state = tx.update(gradient, tx.init(params), params)
    moved = np.asarray(optax.apply_updates(params, updates)["qkv"])
    norms = lambda w: np.linalg.norm(w.reshape(8, 3, 8), axis=(0, 2))  # noqa: E731
    # float32 norms of 64 entries.
    np.testing.assert_allclose(norms(moved), norms(weight), rtol=1e-6)
    np.testing.assert_allclose(state.radius["qkv"], norms(weight), rtol=1e-6)
    # An angle of atan(0.2) for every chunk, whatever its size.
    turned = norms(moved - weight) / norms(weight)
    np.testing.assert_allclose(turned, turned[0], rtol=0.1)


def test_rounding_does_not_move_half_precision_weights_off_the_sphere(rng):
    params = {"w": jnp.asarray(rng.normal(size=(16, 16)), jnp.bfloat16)}
    tx = fo.hyperball(optax.identity(), 0.05)
    state = tx.init(params)
    radius = float(state.radius["w"][0])
    draws = jnp.asarray(rng.normal(size=(200, 16, 16)), jnp.bfloat16)

    def step(carry, gradient):
        params, state = carry
        updates, state = tx.update({"w": gradient}, state, params)
        return (optax.apply_updates(params, updates), state), updates["w"].dtype.num

    (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, draws))((params, state))
    assert params["w"].dtype == jnp.bfloat16
    norm = np.linalg.norm(np.asarray(params["w"], np.float64))
    # One rounding of 2^-9 each, not the sum of 200: the radius is kept, not measured.
    np.testing.assert_allclose(norm, radius, rtol=2**-8)


def test_a_gradient_of_zero_leaves_the_weights():
    params = {"w": jnp.eye(3)}
    tx = fo.hyperball(optax.identity(), 0.1)
    updates, _ = tx.update({"w": jnp.zeros((3, 3))}, tx.init(params), params)
    # Back on its own sphere: one rounding.
    np.testing.assert_allclose(updates["w"], 0.0, atol=1e-7)


def test_other_iterates_and_step_sizes_are_refused():
    params = {"w": jnp.eye(3)}
    averaged = fo.hyperball(fo.schedule_free(optax.identity(), 0.1), 0.1)
    with pytest.raises(ValueError, match="schedule_free"):
        averaged.init(params)
    scaled = fo.polyak(fo.hyperball(optax.identity(), 0.1))
    with pytest.raises(ValueError, match="polyak"):
        scaled.update(params, scaled.init(params), params, value=1.0)


def test_parameters_are_needed():
    tx = fo.hyperball(optax.identity(), 0.1)
    params = {"w": jnp.eye(3)}
    with pytest.raises(ValueError, match=r"update\(grads, state, params\)"):
        tx.update(params, tx.init(params))


def test_vectors_and_negative_rates_are_refused():
    with pytest.raises(ValueError, match="hyperball"):
        fo.hyperball(optax.identity(), 0.1).init({"bias": jnp.ones(3)})
    with pytest.raises(ValueError, match="learning_rate"):
        fo.hyperball(optax.identity(), -0.1)
