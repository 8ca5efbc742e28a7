"""`diagnostics` and `measure_gain`: the right numbers, under names that hold."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fusionopt_jax as fo
from tests import _compare

SHAPES = {"kernel": (8, 12), "bias": (12,)}


def draw(rng):
    return {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32)
        for name, shape in SHAPES.items()
    }


@pytest.fixture
def stepped(rng):
    """The first gradient of the full set and the state after it."""
    tx = fo.fusion_opt(
        1e-2,
        components=("ns5", "normuon", "mona", "shampoo", "sf"),
        routing=fo.Routing(min_dim=8),
        settings={"ns5": {"audit_every": 1}},
        polyak_rule="ratio",
        gains=True,
    )
    params, gradient = draw(rng), draw(rng)
    update = jax.jit(tx.update)
    _, state = update(gradient, tx.init(params), params, value=jnp.float32(2.0))
    return gradient, state


def test_names_of_the_full_set(stepped):
    _, state = stepped
    stages = ["momentum", "preconditioner", "ns5", "normuon"]
    sizes = ["input_rms", "output_rms", "gain"]
    assert set(fo.diagnostics(state)) == {
        *(
            f"polyak/{field}"
            for field in ("count", "step_size", "loss_average", "norm_average")
        ),
        *(
            f"schedule_free/{field}"
            for field in ("count", "b1", "weight_sum", "max_learning_rate")
        ),
        *(f"spectral/{stage}/{size}" for stage in stages for size in sizes),
        *(f"scalar/adam/{size}" for size in sizes),
        "spectral/kl_shampoo/count",
        "spectral/ns5/audit_error",
        "spectral/ns5/count",
        "scalar/adam/count",
    }


def test_values_are_those_of_the_state(stepped):
    gradient, state = stepped
    numbers = fo.diagnostics(state)
    assert numbers["polyak/step_size"] == state.step_size
    assert numbers["schedule_free/weight_sum"] == state.inner_state.weight_sum
    # The losses' average of one step is its loss.
    assert float(numbers["polyak/loss_average"]) == 2.0
    rms = lambda name: np.sqrt(np.mean(np.square(gradient[name])))  # noqa: E731
    # float32 sums of a hundred squares.
    close = {"rtol": 1e-5}
    np.testing.assert_allclose(
        numbers["spectral/momentum/input_rms"], rms("kernel"), **close
    )
    np.testing.assert_allclose(numbers["scalar/adam/input_rms"], rms("bias"), **close)
    # The first momentum is 1.2 times the gradient (MONA), of which the look-ahead adds
    # 0.8; `ns5` is asked for a root mean square of 0.2, `normuon` restores it.
    np.testing.assert_allclose(numbers["spectral/momentum/gain"], 1.2 * 1.8, **close)
    np.testing.assert_allclose(numbers["spectral/ns5/output_rms"], 0.2, **close)
    np.testing.assert_allclose(numbers["spectral/normuon/gain"], 1.0, **close)
    # On a CPU the iterations are float32, so that the audit compares equals.
    assert float(numbers["spectral/ns5/audit_error"]) == 0.0


def test_works_under_jit(stepped):
    _, state = stepped
    _compare.assert_trees_identical(
        jax.jit(fo.diagnostics)(state), fo.diagnostics(state)
    )


def test_reads_a_restored_state_of_numpy_arrays(stepped):
    _, state = stepped
    restored = jax.tree.map(np.asarray, state)
    _compare.assert_trees_identical(fo.diagnostics(restored), fo.diagnostics(state))


def test_gain_of_a_stage(rng):
    tx = fo.measure_gain("tripling", optax.scale(-3.0))
    gradient = draw(rng)
    updates, state = tx.update(gradient, tx.init(gradient))
    plain, _ = optax.scale(-3.0).update(gradient, optax.EmptyState())
    _compare.assert_trees_identical(updates, plain)
    numbers = fo.diagnostics(state)
    entries = np.concatenate([np.ravel(g) for g in gradient.values()])
    # Roots of float32 sums of a hundred squares.
    np.testing.assert_allclose(
        numbers["tripling/input_rms"], np.sqrt(np.mean(entries**2)), rtol=1e-6
    )
    np.testing.assert_allclose(numbers["tripling/gain"], 3.0, rtol=1e-6)


def test_sizes_of_huge_updates_are_in_range():
    tx = fo.measure_gain("stage", optax.scale(0.5))
    huge = {"w": jnp.full(4, 1e30)}
    _, state = tx.update(huge, tx.init(huge))
    numbers = fo.diagnostics(state)
    np.testing.assert_allclose(numbers["stage/input_rms"], 1e30, rtol=1e-6)
    np.testing.assert_allclose(numbers["stage/gain"], 0.5, rtol=1e-6)


def test_gain_of_nothing_is_zero():
    tx = fo.measure_gain("stage", optax.identity())
    zeros = {"w": jnp.zeros(3)}
    _, state = tx.update(zeros, tx.init(zeros))
    assert float(fo.diagnostics(state)["stage/gain"]) == 0.0


@pytest.mark.parametrize("name", ["", 3])
def test_a_stage_needs_a_name(name):
    with pytest.raises((ValueError, TypeError), match="name"):
        fo.measure_gain(name, optax.identity())


def test_stabilisers_tell_what_they_do(rng):
    tx = optax.chain(
        fo.cautious(optax.trace(0.9)),
        fo.snr_gate(optax.identity(), unit="entry"),
    )
    gradient = draw(rng)
    _, state = tx.update(gradient, tx.init(gradient))
    numbers = fo.diagnostics(state)
    # The first momentum is the gradient; the first gate is open.
    assert float(numbers["cautious/kept"]) == 1.0
    np.testing.assert_allclose(numbers["snr_gate/gate"], 1.0, rtol=1e-6)


def test_equal_components_are_numbered_within_their_group():
    tx = optax.multi_transform(
        {
            "a": optax.chain(optax.scale_by_adam(), optax.scale_by_adam()),
            "b": optax.scale_by_adam(),
        },
        {"kernel": "a", "bias": "b"},
    )
    state = tx.init({"kernel": jnp.ones(2), "bias": jnp.ones(2)})
    assert set(fo.diagnostics(state)) == {
        "a/adam/count",
        "a/adam_2/count",
        "b/adam/count",
    }


def test_names_inside_optax_wrappers():
    tx = optax.MultiSteps(
        optax.chain(
            optax.add_noise(1.0, 0.5, key=0),
            optax.inject_hyperparams(optax.adam)(1e-3),
        ),
        every_k_schedule=2,
    )
    numbers = fo.diagnostics(tx.init({"w": jnp.ones(2)}))
    np.testing.assert_allclose(numbers["hyperparams/learning_rate"], 1e-3, rtol=1e-6)
    assert {"multi_steps/mini_step", "hyperparams/count", "adam/count"} <= set(numbers)
    # A random key is no number.
    assert "add_noise/rng_key" not in numbers


def test_no_state_has_no_numbers():
    assert fo.diagnostics(optax.identity().init({"w": jnp.ones(2)})) == {}
