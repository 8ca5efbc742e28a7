"""Reading the three sequences out of states nested in every way."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fusionopt_jax as fo
from fusionopt_jax import iterates
from tests import _cases, _compare

PARAMS = {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)}
GRADS = {"kernel": jnp.ones((2, 3)), "bias": -jnp.ones(3)}
LABELS = {"kernel": "matrix", "bias": "vector"}


def plain(**settings):
    return fo.schedule_free(optax.identity(), 0.25, b1=0.5, **settings)


def after_two_steps(tx, params=PARAMS):
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(GRADS, state, params, value=1.0)
        params = optax.apply_updates(params, updates)
    return state, params


# Constant gradient g and rate 0.25: z = p - 0.5 g, and x averages the two steps.
FAST = jax.tree.map(lambda p, g: p - 0.5 * g, PARAMS, GRADS)
AVERAGE = jax.tree.map(lambda p, g: p - 0.375 * g, PARAMS, GRADS)

NESTINGS = {
    "alone": plain,
    "kept": lambda: plain(keep_average=True),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1e9), plain()),
    "named chain": lambda: optax.named_chain(("a", optax.identity()), ("b", plain())),
    "polyak": lambda: fo.polyak(plain(), min_ratio=1.0, max_ratio=1.0),
    "guard": lambda: optax.apply_if_finite(plain(), 3),
    "MultiSteps": lambda: optax.MultiSteps(plain(), 1),
    "accumulate": lambda: fo.accumulate(plain(), 1),
    "masked": lambda: optax.masked(plain(), True),
    "injected": lambda: optax.inject_hyperparams(
        lambda learning_rate: fo.schedule_free(optax.identity(), learning_rate, b1=0.5)
    )(learning_rate=0.25),
    "in each group": lambda: optax.multi_transform(
        {"matrix": plain(), "vector": optax.chain(plain())}, LABELS
    ),
    "deep": lambda: optax.chain(
        optax.apply_if_finite(
            optax.MultiSteps(
                optax.multi_transform({"all": plain()}, "all"), 1
            ).gradient_transformation(),
            3,
        )
    ),
}


@pytest.mark.parametrize("nesting", NESTINGS)
def test_found_in_every_nesting(nesting):
    state, params = after_two_steps(NESTINGS[nesting]())
    # Sums of a few numbers below 6 in float32.
    _compare.assert_trees_within(fo.fast_params(state, params), FAST, 2e-6)
    _compare.assert_trees_within(fo.eval_params(state, params), AVERAGE, 2e-6)


def test_y_lies_between_z_and_x():
    _, params = after_two_steps(plain())
    between = jax.tree.map(lambda z, x: 0.5 * z + 0.5 * x, FAST, AVERAGE)
    _compare.assert_trees_within(params, between, 2e-6)


def test_a_fresh_state_gives_the_parameters():
    state = plain().init(PARAMS)
    for read in (fo.eval_params, fo.fast_params):
        _compare.assert_trees_identical(read(state, PARAMS), PARAMS)


def test_leaves_of_other_groups_are_returned_as_they_are():
    tx = optax.multi_transform({"matrix": plain(), "vector": optax.sgd(0.1)}, LABELS)
    state, params = after_two_steps(tx)
    average = fo.eval_params(state, params)
    _compare.assert_within(average["kernel"], AVERAGE["kernel"], 2e-6)
    assert average["bias"] is params["bias"]


def test_the_dtypes_are_those_of_the_parameters():
    params = optax.tree.cast(PARAMS, jnp.bfloat16)
    state = plain().init(params)
    for read in (fo.eval_params, fo.fast_params):
        assert all(
            leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(read(state, params))
        )


def test_works_under_jit_and_on_traced_states():
    state, params = after_two_steps(plain())
    average = jax.jit(fo.eval_params)(state, params)
    _compare.assert_trees_within(average, AVERAGE, 2e-6)


def test_a_state_without_schedule_free_is_an_error():
    for state in (optax.adam(0.1).init(PARAMS), (), None, {"a": jnp.ones(3)}):
        with pytest.raises(ValueError, match=r"no Schedule-Free state.*schedule_free"):
            fo.eval_params(state, PARAMS)
    with pytest.raises(ValueError, match="`fast_params`"):
        fo.fast_params(optax.sgd(0.1).init(PARAMS), PARAMS)


def test_the_state_of_optax_is_not_ours():
    tx = optax.contrib.schedule_free(optax.sgd(0.1), 0.1)
    with pytest.raises(ValueError, match="no Schedule-Free state"):
        fo.eval_params(tx.init(PARAMS), PARAMS)


def test_two_states_of_one_leaf_are_an_error():
    state = optax.chain(plain(), plain()).init(PARAMS)
    with pytest.raises(ValueError, match=r"'bias'.*another Schedule-Free state"):
        fo.eval_params(state, PARAMS)


def test_other_parameters_are_an_error():
    state = plain().init(PARAMS)
    with pytest.raises(ValueError, match=r"'bias'.*lack"):
        fo.eval_params(state, {"kernel": PARAMS["kernel"]})


def test_states_are_listed_in_the_order_of_the_tree():
    tx = NESTINGS["in each group"]()
    found = iterates.schedule_free_states(tx.init(PARAMS))
    assert [len(jax.tree.leaves(one.z)) for one in found] == [1, 1]
    assert iterates.schedule_free_states(optax.sgd(0.1).init(PARAMS)) == []


def test_recovering_and_keeping_the_average_agree():
    case = {case.name: case for case in _cases.ALL}["schedule_free"]
    params, grads, _ = _cases.start(case)
    results = []
    for keep in (False, True):
        tx = fo.schedule_free(fo.mona(), 1e-2, keep_average=keep)
        state, y = tx.init(params), params
        step = jax.jit(tx.update)
        for scale in (1.0, -0.5, 2.0):
            updates, state = step(
                jax.tree.map(lambda g, s=scale: s * g, grads), state, y
            )
            y = optax.apply_updates(y, updates)
        assert (state.x is None) != keep
        results.append(fo.eval_params(state, y))
    # Numbers of about 3, one rounding of y divided by b1 at each step.
    _compare.assert_trees_within(*results, 5e-6)
    assert not np.array_equal(results[0]["head"]["kernel"], params["head"]["kernel"])


def stepped(tx, params=PARAMS, steps=2):
    state, step = tx.init(params), jax.jit(tx.update)
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), GRADS, params)
    for _ in range(steps):
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
    return state, params


AROUND = {
    "scaled": lambda tx: optax.chain(tx, optax.scale(0.1)),
    "plateau": lambda tx: optax.chain(
        tx, optax.contrib.reduce_on_plateau(patience=1, rtol=0.5, factor=0.1)
    ),
    "frozen": lambda tx: optax.chain(
        tx, optax.masked(optax.set_to_zero(), {"kernel": False, "bias": True})
    ),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_parameters_that_left_the_sequences_are_refused(around, keep, dtype):
    params = optax.tree.cast(PARAMS, dtype)
    tx = AROUND[around](plain(keep_average=keep))
    state, step = tx.init(params), jax.jit(tx.update)
    assert fo.eval_params(state, params) is not None
    for _ in range(4):
        grads = optax.tree.cast(GRADS, dtype)
        updates, state = step(grads, state, params, value=1.0)
        params = optax.apply_updates(params, updates)
    with pytest.raises(ValueError, match=r"bias.*inside\s+`schedule_free`"):
        fo.eval_params(state, params)
    # There is nothing to compare where the numbers are not known.
    jax.eval_shape(fo.eval_params, state, params)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("compiled", ["step", "update", "nothing"])
def test_rounding_of_the_own_parameters_is_not_refused(dtype, compiled):
    case = _cases.named("schedule_free")
    params = optax.tree.cast(_cases.start(case)[0], dtype)
    tx = fo.schedule_free(optax.identity(), 1e-2)
    update = tx.update if compiled == "nothing" else jax.jit(tx.update)

    def step(grads, state, params):
        updates, state = update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step) if compiled == "step" else step
    state = tx.init(params)
    for seed in range(5):
        grads = optax.tree.cast(_cases.gradients(params, seed), dtype)
        params, state = step(grads, state, params)
        fo.eval_params(state, params)


def test_only_some_leaves_of_a_large_tree_are_looked_at():
    params = {f"leaf {number:03}": jnp.ones(2) for number in range(200)}
    state = plain().init(params)
    assert state.y_sample.shape == (3, 64)
    fo.eval_params(state, params)


def test_of_a_large_tree_the_small_leaves_are_looked_at():
    params = {name: jnp.ones((1100, 1000)) for name in ("a", "b")} | {"c": jnp.ones(3)}
    state = plain().init(params)
    assert state.y_sample.shape == (3, 1)
    fo.eval_params(state, params)
    with pytest.raises(ValueError, match="leaf 'c' has an entry 2"):
        fo.eval_params(state, params | {"c": 2 * params["c"]})


def test_an_average_belongs_to_no_state():
    state, params = stepped(plain())
    average = fo.eval_params(state, params)
    with pytest.raises(ValueError, match="not those that the state belongs to"):
        fo.eval_params(state, average)
