"""What `polyak` makes of losses and gradients that say little or nothing."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fusionopt_jax as fo

RULES = ("ratio", "schedule_free_plus")
# Norm 5 and sum of absolute entries 7.
GRADIENT = {"a": jnp.array([3.0]), "b": jnp.array([[0.0, -4.0]])}
# One division and one square root in float32.
ROUNDING = 1e-6


def start(rule, **settings):
    tx = fo.polyak(
        fo.schedule_free(optax.identity(), 0.1, b1=0.5), rule=rule, **settings
    )
    params = jax.tree.map(jnp.ones_like, GRADIENT)
    return tx, params, tx.init(params)


def first_factor(rule, loss, gradient=GRADIENT, **settings):
    tx, params, state = start(rule, **settings)
    updates, state = tx.update(gradient, state, params, value=loss)
    return float(state.step_size), updates, state


def test_a_loss_over_a_norm():
    assert first_factor("ratio", 20.0)[0] == pytest.approx(20 / 5, rel=ROUNDING)
    expected = (20 - 2) / (math.sqrt(math.pi / 2) * 7)
    found = first_factor("schedule_free_plus", 20.0, f_min=2.0)[0]
    assert found == pytest.approx(expected, rel=ROUNDING)


@pytest.mark.parametrize("loss", [0.0, -3.0, -1e30])
def test_a_loss_without_anything_to_gain(loss):
    factor, updates, _ = first_factor("ratio", loss)
    assert factor == np.float32(0.1)
    assert np.any(updates["a"])
    factor, updates, _ = first_factor("schedule_free_plus", loss)
    assert factor == 0
    assert not any(np.any(leaf) for leaf in updates.values())


def test_one_negative_loss_among_others_is_averaged():
    tx, params, state = start("ratio", b1=0.75)
    for loss in (20.0, -20.0):
        _, state = tx.update(GRADIENT, state, params, value=loss)
    expected = (0.75 * 20 - 0.25 * 20) / 5
    assert float(state.step_size) == pytest.approx(expected, rel=ROUNDING)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("loss", [jnp.inf, -jnp.inf, jnp.nan])
def test_a_loss_that_is_no_number_moves_nothing_and_leaves_no_trace(rule, loss):
    tx, params, state = start(rule)
    _, before = tx.update(GRADIENT, state, params, value=2.0)
    updates, after = tx.update(GRADIENT, before, params, value=loss)
    assert float(after.step_size) == 0
    kept = set(before._fields) - {"step_size", "inner_state"}
    assert len(kept) == 3
    for field in kept:
        np.testing.assert_array_equal(getattr(after, field), getattr(before, field))
    fast = fo.fast_params(before, params), fo.fast_params(after, params)
    jax.tree.map(np.testing.assert_array_equal, *fast)
    assert all(np.isfinite(leaf).all() for leaf in updates.values())
    _, healed = tx.update(GRADIENT, after, params, value=2.0)
    assert 0 < float(healed.step_size) < math.inf


@pytest.mark.parametrize("rule", RULES)
def test_the_first_loss_may_be_no_number(rule):
    tx, params, state = start(rule)
    _, state = tx.update(GRADIENT, state, params, value=jnp.nan)
    assert float(state.step_size) == 0
    _, state = tx.update(GRADIENT, state, params, value=20.0)
    expected = {"ratio": 4.0, "schedule_free_plus": 20 / (math.sqrt(math.pi / 2) * 7)}
    assert float(state.step_size) == pytest.approx(expected[rule], rel=ROUNDING)


@pytest.mark.parametrize("rule", RULES)
def test_an_infinite_gradient_gives_no_step_size(rule):
    gradient = GRADIENT | {"a": jnp.array([jnp.inf])}
    assert first_factor(rule, 1.0, gradient)[0] == 0


def test_no_gradient_at_all():
    nothing = jax.tree.map(jnp.zeros_like, GRADIENT)
    factor, updates, _ = first_factor("ratio", 1.0, nothing)
    assert factor == 10
    assert not any(np.any(leaf) for leaf in updates.values())
    assert first_factor("schedule_free_plus", 1.0, nothing)[0] == 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_gradients_are_measured_in_float32(dtype):
    # In fp16 the sum of 10,000 squares of 100 is infinite.
    gradient = {"w": jnp.full((100, 100), 100.0, dtype)}
    tx = fo.polyak(optax.identity())
    state = tx.init(gradient)
    updates, state = tx.update(gradient, state, gradient, value=jnp.asarray(3e4, dtype))
    assert float(state.norm_average) == pytest.approx(1e4, rel=ROUNDING)
    # The nearest numbers of eight bits and of eleven are 1/256 away at most.
    assert float(state.step_size) == pytest.approx(3.0, rel=2**-8)
    assert updates["w"].dtype == dtype


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("entry", [jnp.nan, jnp.inf])
def test_a_gradient_that_is_no_number_moves_no_parameter(rule, entry):
    gradient = GRADIENT | {"a": jnp.array([entry])}
    _, updates, state = first_factor(rule, 1.0, gradient)
    assert float(state.step_size) == 0
    assert not any(np.any(leaf) for leaf in updates.values())
    # Around an optimiser whose updates it multiplies itself.
    if rule == "ratio":
        tx = fo.polyak(optax.sgd(0.1))
        updates, _ = tx.update(gradient, tx.init(gradient), gradient, value=1.0)
        assert not any(np.any(leaf) for leaf in updates.values())


@pytest.mark.parametrize("rule", RULES)
def test_the_loss_is_one_number(rule):
    tx, params, state = start(rule)
    for value in (jnp.ones(1), jnp.ones((1, 1))):
        with pytest.raises(ValueError, match="one number"):
            tx.update(GRADIENT, state, params, value=value)


@pytest.mark.parametrize("size", [1e30, 1e20, 1e-20, 1e-30])
def test_the_norm_of_any_gradient_is_in_range(size):
    gradient = jax.tree.map(lambda g: size * g, GRADIENT)
    _, _, state = first_factor("ratio", 1.0, gradient)
    assert float(state.norm_average) == pytest.approx(5 * size, rel=ROUNDING)


@pytest.mark.parametrize("rule", RULES)
def test_one_huge_gradient_leaves_a_finite_state(rule):
    tx, params, state = start(rule)
    for size in (1.0, 1e30, 1.0):
        gradient = jax.tree.map(lambda g, s=size: s * g, GRADIENT)
        updates, state = tx.update(gradient, state, params, value=1.0)
        params = optax.apply_updates(params, updates)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((params, state)))


@pytest.mark.parametrize("rule", RULES)
def test_the_count_stops_at_its_largest(rule):
    tx, params, state = start(rule)
    _, state = tx.update(GRADIENT, state, params, value=1.0)
    state = state._replace(count=jnp.asarray(2**31 - 1, jnp.int32))
    _, state = tx.update(GRADIENT, state, params, value=1.0)
    assert int(state.count) == 2**31 - 1
    assert float(state.step_size) > 0


@pytest.mark.parametrize(
    ("rule", "setting"),
    [
        ("ratio", {"f_min": 0.0}),
        ("schedule_free_plus", {"norm": "l2"}),
        ("schedule_free_plus", {"min_ratio": 0.1}),
        ("schedule_free_plus", {"max_ratio": 10.0}),
    ],
)
def test_a_setting_of_the_other_rule_is_an_error(rule, setting):
    (name,) = setting
    with pytest.raises(ValueError, match=f"`{name}` has no effect"):
        start(rule, **setting)
