"""`accumulate`: the inner optimiser runs once, on the means, and only then costs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import fusionopt_jax as fo
from tests import _compare

PARAMS = {"kernel": np.eye(8, 12, dtype=np.float32), "bias": np.ones(12, np.float32)}


def draws(rng, steps):
    """Gradients and losses of several calls."""
    grads = {
        name: jnp.asarray(rng.normal(size=(steps, *leaf.shape)), jnp.float32)
        for name, leaf in PARAMS.items()
    }
    return grads, jnp.asarray(rng.uniform(1, 3, size=steps), jnp.float32)


def fusion():
    return fo.fusion_opt(1e-2, routing=fo.Routing(min_dim=8), polyak_rule="ratio")


def scanned(tx, grads, losses):
    """The parameters after every call, as one compiled scan."""

    def step(carry, inputs):
        params, state = carry
        gradient, loss = inputs
        updates, state = tx.update(gradient, state, params, value=loss)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    params = jax.tree.map(jnp.asarray, PARAMS)
    run = jax.jit(lambda start: jax.lax.scan(step, start, (grads, losses)))
    return run((params, tx.init(params)))


def test_equals_the_inner_optimiser_on_the_means(rng):
    grads, losses = draws(rng, 6)
    (_, state), paths = scanned(fo.accumulate(fusion(), every=3), grads, losses)
    mean = lambda stack: stack.reshape(2, 3, *stack.shape[1:]).mean(axis=1)  # noqa: E731
    (_, expected), means = scanned(fusion(), jax.tree.map(mean, grads), mean(losses))
    for update in range(2):
        ours = jax.tree.map(lambda path, t=3 * update + 2: path[t], paths)
        # float32 means of three, summed in another order.
        _compare.assert_trees_within(
            ours, jax.tree.map(lambda path, t=update: path[t], means), 1e-6
        )
    # The mean loss, not the last one, entered the Polyak factor.
    np.testing.assert_allclose(
        state.inner_state.loss_average, expected.loss_average, rtol=1e-6
    )
    assert int(state.micro_step) == 0


def test_nothing_moves_between_updates(rng):
    grads, losses = draws(rng, 5)
    (_, state), paths = scanned(fo.accumulate(fusion(), every=3), grads, losses)
    for t, reference in ((0, PARAMS), (1, PARAMS), (3, None), (4, None)):
        before = reference or jax.tree.map(lambda path: path[2], paths)
        _compare.assert_trees_identical(
            jax.tree.map(lambda path, t=t: path[t], paths),
            jax.tree.map(jnp.asarray, before),
        )
    assert int(state.micro_step) == 2
    assert int(state.value_count) == 2


def test_sums_of_half_precision_gradients_are_float32():
    params = {"w": jnp.zeros(2, jnp.bfloat16)}
    tx = fo.accumulate(optax.sgd(1.0), every=512)
    ones = {"w": jnp.ones(2, jnp.bfloat16)}

    def step(state, _):
        updates, state = tx.update(ones, state, params)
        return state, updates["w"]

    state, updates = jax.jit(lambda state: jax.lax.scan(step, state, None, length=512))(
        tx.init(params)
    )
    # A bfloat16 sum of ones stops at 256, since 256 + 1 rounds to 256.
    np.testing.assert_array_equal(np.asarray(updates[-1], np.float32), -1.0)
    np.testing.assert_array_equal(np.asarray(updates[:-1], np.float32), 0.0)
    assert updates.dtype == jnp.bfloat16
    assert state.gradient_sum["w"].dtype == jnp.float32


def test_every_one_is_the_inner_optimiser(rng):
    grads, losses = draws(rng, 3)
    _, paths = scanned(fo.accumulate(fusion(), every=1), grads, losses)
    _, plain = scanned(fusion(), grads, losses)
    # The same arithmetic; only fusion across the branch may round differently.
    _compare.assert_trees_within(paths, plain, 1e-6)


def test_every_may_be_a_hyperparameter_on_the_device():
    tx = optax.inject_hyperparams(
        lambda every: fo.accumulate(optax.sgd(1.0), every=every)
    )(every=2)
    params = {"w": jnp.zeros(2)}
    state = tx.init(params)
    update = jax.jit(tx.update)
    moved = []
    for number in (2, 2, 3, 3, 3):
        state.hyperparams["every"] = jnp.asarray(number)
        updates, state = update({"w": jnp.ones(2)}, state, params)
        moved.append(float(updates["w"][0]))
    assert moved == [0.0, -1.0, 0.0, 0.0, -1.0]


def test_other_extra_arguments_are_those_of_the_running_call():
    seen = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(),
        lambda updates, state, params=None, *, rate, **_: (
            jax.tree.map(lambda g: rate * g, updates),
            state,
        ),
    )
    tx = fo.accumulate(seen, every=2)
    params = {"w": jnp.ones(2)}
    state = tx.init(params)
    _, state = tx.update(params, state, params, rate=jnp.float32(5.0))
    updates, _ = tx.update(params, state, params, rate=jnp.float32(7.0))
    np.testing.assert_array_equal(updates["w"], 7.0)


@pytest.mark.parametrize("compiled", [False, True])
def test_rows_may_be_divided_over_an_explicit_mesh(compiled):
    tx = fo.accumulate(optax.sgd(1.0), every=2)
    with jax.set_mesh(jax.make_mesh((4,), ("x",))):
        params = jax.device_put({"w": jnp.ones((8, 4))}, P("x", None))
        state = tx.init(params)
        update = jax.jit(tx.update) if compiled else tx.update
        for expected in (0.0, -1.0):
            updates, state = update(params, state, params)
            assert jax.typeof(updates["w"]) == jax.typeof(params["w"])
            np.testing.assert_array_equal(updates["w"], expected)


def test_updates_keep_the_precision_of_the_parameters():
    params = {"w": jnp.ones(2)}
    narrow = optax.tree.cast(params, jnp.bfloat16)
    tx = fo.accumulate(fo.schedule_free(optax.identity(), 1e-3), every=2)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(narrow, state, params)
        params = optax.apply_updates(params, updates)
    # A thousandth is no number of bfloat16; the state led to float32 parameters.
    assert updates["w"].dtype == jnp.float32
    fo.eval_params(state, params)


def test_the_loss_is_one_number():
    tx = fo.accumulate(optax.sgd(1.0), every=2)
    params = {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match="one number"):
        tx.update(params, tx.init(params), params, value=jnp.ones(1))


def test_missing_loss_is_the_inner_optimisers_error():
    tx = fo.accumulate(fusion(), every=2)
    params = jax.tree.map(jnp.asarray, PARAMS)
    with pytest.raises(ValueError, match="value=loss"):
        tx.update(params, tx.init(params), params)


@pytest.mark.parametrize(("every", "error"), [(0, ValueError), (2.0, TypeError)])
def test_every_is_checked(every, error):
    with pytest.raises(error, match="every"):
        fo.accumulate(optax.sgd(1.0), every=every)


def products_outside_branches(tx):
    """Matrix products that every call of a compiled update runs, and all there are."""
    params = {"kernel": jnp.eye(8, 12)}
    update = jax.jit(tx.update)
    text = update.lower(params, tx.init(params), params).compile().as_text()
    bodies: dict[str, list[str]] = {}
    entry, body = "", []
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if header:
            body = bodies[header[2]] = []
            entry = header[2] if header[1] else entry
        elif not line.startswith("}"):
            body.append(line)
    reached, waiting, outside = set(), [entry], 0
    while waiting:
        name = waiting.pop()
        if name in reached:
            continue
        reached.add(name)
        for line in bodies[name]:
            outside += " dot(" in line
            if " conditional(" not in line:
                waiting += [n for n in re.findall(r"%([\w.\-]+)", line) if n in bodies]
    return outside, text.count(" dot(")


def test_newton_schulz_runs_only_inside_the_branch():
    tx = optax.chain(fo.ns5(hot_dtype="fp32", bucketing="leaf"), optax.scale(-0.1))
    outside, total = products_outside_branches(fo.accumulate(tx, every=4))
    assert total > 0
    assert outside == 0
    # That the reading of the program sees products where there are some: this wrapper
    # runs the inner update at every call.
    outside, total = products_outside_branches(optax.MultiSteps(tx, 4))
    assert outside == total > 0
