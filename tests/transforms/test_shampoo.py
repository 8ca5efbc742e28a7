"""`shampoo` against a float64 reference."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fusionopt_jax as fo
from tests import _compare
from tests.references import shampoo


def directions(tx, history):
    """What a transformation returns for each of a history of gradients."""

    @jax.jit
    def whole(history):
        def step(state, gradient):
            update, state = tx.update(gradient, state)
            return state, update

        start = tx.init(jax.tree.map(lambda stack: stack[0], history))
        return jax.lax.scan(step, start, history)[1]

    return {name: np.asarray(u) for name, u in whole(history).items()}


def gradients(rng):
    return {
        "square": jnp.asarray(rng.normal(size=(7, 5, 5)), jnp.float32),
        "tall": jnp.asarray(rng.normal(size=(7, 6, 4)), jnp.float32),
        "stack": jnp.asarray(rng.normal(size=(7, 2, 5, 5)), jnp.float32),
    }


@pytest.mark.parametrize("exponent", [-0.25, -0.5])
def test_two_sides_around_a_momentum(rng, exponent):
    history = gradients(rng)
    tx = fo.shampoo(
        optax.trace(0.9),
        exponent=exponent,
        b2=0.9,
        sides="both",
        update_every=3,
        stagger=False,
        damping=0.1,
        relative=False,
    )
    ours = directions(tx, history)
    matrices = {name: ours[name] for name in ("square", "tall")}
    grads = {name: np.asarray(history[name], np.float64) for name in matrices}
    for i in range(2):
        matrices[f"stack {i}"] = ours["stack"][:, i]
        grads[f"stack {i}"] = np.asarray(history["stack"][:, i], np.float64)
    for name, path in matrices.items():
        follow = shampoo.Shampoo(
            path[0].shape, decay=0.9, exponent=exponent, ridge=0.1, period=3
        )
        momentum = 0.0
        for step, gradient in enumerate(grads[name]):
            momentum = 0.9 * momentum + gradient
            follow.learn(gradient)
            # Eigenvalues down to the ridge of 0.1 carry an error of 1e-7 of the
            # largest, near 10, so their powers one of 1e-5, on entries up to 20.
            _compare.assert_within(
                path[step], follow.precondition(momentum), 1e-3, f"{name}, {step}"
            )


def test_one_side_takes_the_exponent_of_both(rng):
    history = gradients(rng)
    tx = fo.shampoo(
        b2=0.9,
        sides="small",
        update_every=1,
        damping=0.1,
        relative=False,
    )
    ours = directions(tx, history)
    factor = np.zeros((4, 4))
    for step, gradient in enumerate(np.asarray(history["tall"], np.float64)):
        factor = 0.9 * factor + 0.1 * gradient.T @ gradient
        expected = gradient @ shampoo.power(factor, -0.5, 0.1)
        # As above, on entries up to 3.
        _compare.assert_within(ours["tall"][step], expected, 1e-4)


def test_staggered_powers_are_all_there_at_first(rng):
    history = gradients(rng)
    settings = {"damping": 0.1, "update_every": 4}
    at_once = directions(fo.shampoo(stagger=False, **settings), history)
    staggered = directions(fo.shampoo(**settings), history)
    for name in history:
        # The same operations in another program.
        _compare.assert_within(staggered[name][0], at_once[name][0], 1e-5, name)
    assert any(np.any(staggered[n][3] != at_once[n][3]) for n in history)


def test_relative_damping_is_a_share_of_the_mean_eigenvalue(rng):
    history = gradients(rng)
    settings = {"b2": 0.0, "sides": "both", "update_every": 1}
    ours = directions(fo.shampoo(damping=0.1, **settings), history)["square"]
    for step, gradient in enumerate(np.asarray(history["square"], np.float64)):
        # With `b2`=0 the factors are those of one gradient, and both have its mean.
        ridge = 0.1 * np.sum(gradient**2) / 5
        left = shampoo.power(gradient @ gradient.T, -0.25, ridge)
        right = shampoo.power(gradient.T @ gradient, -0.25, ridge)
        # As above, on entries up to 1.
        _compare.assert_within(ours[step], left @ gradient @ right, 1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"b2": 1.0}, r"`b2` must lie in"),
        ({"update_every": 0}, "`update_every` must be at least 1"),
        ({"damping": -1.0}, "`damping` must lie in"),
        ({"bucketing": "heap"}, "bucketing"),
    ],
)
def test_settings_out_of_range_are_errors(settings, message):
    # Under the tests' type checker a wrong name fails as a TypeError already.
    with pytest.raises((ValueError, TypeError), match=message):
        fo.shampoo(**settings)
