"""`warm_start`: carries what both states have, starts the rest, refuses to guess."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fusionopt_jax as fo
from tests import _compare

SHAPES = {"kernel": (8, 12), "qkv": (8, 24), "bias": (12,)}
ROUTING = fo.Routing([fo.Rule("qkv", chunks=3)], min_dim=8)
SF_NORMUON = ("ns5", "normuon", "sf")
FULL = ("ns5", "normuon", "mona", "shampoo", "sf")


def draw(rng):
    return {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32)
        for name, shape in SHAPES.items()
    }


def fusion(components, routing=ROUTING, **settings):
    settings = {"polyak_rule": "ratio"} | settings
    return fo.fusion_opt(1e-2, components=components, routing=routing, **settings)


def after_steps(tx, params, grads):
    """Parameters and state after a few updates."""
    update = jax.jit(optax.with_extra_args_support(tx).update)
    state = tx.init(params)
    for gradient in grads:
        updates, state = update(gradient, state, params, value=jnp.float32(2.0))
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.fixture
def trained(rng):
    """A run of SF-NorMuon so far."""
    params, grads = draw(rng), [draw(rng) for _ in range(3)]
    return after_steps(fusion(SF_NORMUON), params, grads)


def test_same_components_carry_everything(trained):
    params, state = trained
    _compare.assert_trees_identical(
        fo.warm_start(fusion(SF_NORMUON), params, state), state
    )


def test_sf_normuon_goes_on_as_the_full_set(trained):
    params, old = trained
    tx = fusion(FULL)
    state = fo.warm_start(tx, params, old)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
    for kind in ("TraceState", "ScaleByAdamState", "NorMuonState"):
        _compare.assert_trees_identical(
            optax.tree.get(state, kind), optax.tree.get(old, kind)
        )
    for field in ("step_size", "loss_average", "norm_average", "count"):
        assert getattr(state, field) == getattr(old, field)
    for field in ("z", "count", "weight_sum", "max_learning_rate", "b1"):
        ours = getattr(state.inner_state, field)
        _compare.assert_trees_identical(ours, getattr(old.inner_state, field))
    fresh = tx.init(params)
    for kind in ("MONAState", "KLShampooState"):
        # What wraps the momentum is new, the momentum in it is not.
        ours, new = optax.tree.get(state, kind), optax.tree.get(fresh, kind)
        if kind == "KLShampooState":
            ours, new = ours._replace(inner_state=()), new._replace(inner_state=())
        _compare.assert_trees_identical(ours, new)


def test_report_names_what_is_new_and_what_is_dropped(trained):
    params, state = trained
    report = fo.warm_start_report(fusion(FULL), params, state)
    assert report.started == ("spectral/KLShampooState", "spectral/MONAState")
    assert report.dropped == ()
    assert set(report.carried) == {
        "PolyakState",
        "ScheduleFreeState",
        "scalar/ScaleByAdamState",
        "spectral/TraceState",
        "spectral/NS5State",
        "spectral/NorMuonState",
    }
    full = fo.warm_start(fusion(FULL), params, state)
    back = fo.warm_start_report(fusion(SF_NORMUON), params, full)
    assert back.dropped == report.started
    assert back.started == ()


def test_a_part_that_does_nothing_leaves_the_run_as_it_was(trained, rng):
    params, state = trained
    gradient = draw(rng)
    going_on, _ = fusion(SF_NORMUON).update(gradient, state, params, value=1.5)
    tx = fusion((*SF_NORMUON, "mona"), settings={"mona": {"alpha": 0.0}})
    warm, _ = tx.update(gradient, fo.warm_start(tx, params, state), params, value=1.5)
    # Without strength the acceleration is the identity, to the last digit.
    _compare.assert_trees_identical(warm, going_on)


def test_wrappers_do_not_hide_components(trained):
    params, state = trained
    tx = optax.apply_if_finite(fo.accumulate(fusion(FULL), every=2), 5)
    warm = fo.warm_start(tx, params, state)
    _compare.assert_trees_identical(
        optax.tree.get(warm, "TraceState"), optax.tree.get(state, "TraceState")
    )
    assert int(warm.inner_state.micro_step) == 0


def test_leaves_that_changed_group_are_listed(trained):
    params, state = trained
    routing = fo.Routing([fo.Rule("qkv", chunks=3)], min_dim=8, force_scalar=["kernel"])
    with pytest.raises(ValueError, match="kernel: was in 'spectral', now in 'scalar'"):
        fo.warm_start(fusion(FULL, routing), params, state)


def test_other_chunks_are_an_error(trained):
    params, state = trained
    with pytest.raises(ValueError, match=r"second_moment/qkv.*\[3, 8\].*\[1, 24\]"):
        fo.warm_start(fusion(FULL, fo.Routing(min_dim=8)), params, state)


def test_other_parameters_are_an_error(trained):
    params, state = trained
    more = params | {"more": jnp.ones((8, 8))}
    with pytest.raises(ValueError, match=r"no ScheduleFreeState\.z/more"):
        fo.warm_start(fusion(FULL), more, state)


def test_ambiguous_components_are_an_error():
    params = {"w": jnp.ones(2)}
    old = optax.chain(optax.trace(0.9), optax.trace(0.5)).init(params)
    with pytest.raises(ValueError, match="TraceState occurs 2 times"):
        fo.warm_start(optax.trace(0.9), params, old)


def test_components_of_one_kind_keep_their_order():
    params = {"w": jnp.ones(2)}
    tx = optax.chain(optax.trace(0.9), optax.trace(0.5))
    _, old = tx.update(params, tx.init(params))
    new = optax.chain(optax.trace(0.9), fo.mona(), optax.scale(2.0), optax.trace(0.5))
    state = fo.warm_start(new, params, old)
    _compare.assert_trees_identical((state[0], state[3]), old)


@pytest.mark.parametrize("old_state", [(), optax.EmptyState()])
def test_nothing_in_common_is_an_error(old_state):
    with pytest.raises(ValueError, match="nothing to carry"):
        fo.warm_start(optax.trace(0.9), {"w": jnp.ones(2)}, old_state)


def averaging(**settings):
    return fo.schedule_free(optax.identity(), 0.1, **settings)


def test_the_average_is_written_out_where_the_new_state_keeps_it(rng):
    params, grads = draw(rng), [draw(rng) for _ in range(4)]
    params, old = after_steps(averaging(), params, grads)
    state = fo.warm_start(averaging(keep_average=True), params, old)
    assert old.x is None
    _compare.assert_trees_identical(state.x, fo.eval_params(old, params))


def test_the_average_is_recovered_where_the_new_state_does_not_keep_it(rng):
    params, grads = draw(rng), [draw(rng) for _ in range(4)]
    params, old = after_steps(averaging(keep_average=True), params, grads)
    state = fo.warm_start(averaging(b1=0.5), params, old)
    assert state.x is None
    # Recovered from y with the old interpolation, to a few float32 roundings over 0.9.
    _compare.assert_trees_within(
        fo.eval_params(state, params), fo.eval_params(old, params), 2e-6
    )


def test_an_average_that_only_the_old_state_holds_is_not_lost(rng):
    params, grads = draw(rng), [draw(rng) for _ in range(2)]
    params, old = after_steps(averaging(b1=0.0), params, grads)
    with pytest.raises(ValueError, match="keep_average=True"):
        fo.warm_start(averaging(b1=0.9), params, old)
    state = fo.warm_start(averaging(b1=0.9, keep_average=True), params, old)
    _compare.assert_trees_identical(state.x, old.x)


def test_injected_settings_are_the_new_ones():
    params = {"w": jnp.ones(2)}
    adam = optax.inject_hyperparams(optax.adam)
    _, old = after_steps(adam(0.1), params, [params])
    state = fo.warm_start(adam(0.3), params, old)
    np.testing.assert_allclose(state.hyperparams["learning_rate"], 0.3, rtol=1e-6)
    _compare.assert_trees_identical(state.inner_state, old.inner_state)


def test_values_take_the_new_dtype():
    params = {"w": jnp.ones(2)}
    _, old = after_steps(optax.trace(0.9), params, [params])
    tx = optax.trace(0.9, accumulator_dtype=jnp.bfloat16)
    state = fo.warm_start(tx, params, old)
    assert state.trace["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(state.trace["w"], 1.0)


class Layer(NamedTuple):
    """Parameters kept in a NamedTuple, as some libraries do."""

    kernel: Any
    bias: Any


def test_parameters_may_be_named_tuples():
    params = {
        "a": Layer(jnp.ones((2, 2)), jnp.ones(2)),
        "b": Layer(jnp.eye(2), jnp.zeros(2)),
    }
    _, old = after_steps(optax.trace(0.9), params, [params])
    state = fo.warm_start(optax.chain(fo.mona(), optax.trace(0.9)), params, old)
    _compare.assert_trees_identical(state[1], old)
