"""`kl_shampoo` against float64 references and its invariants."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fusionopt_jax as fo
from tests import _compare
from tests.references import kl_shampoo as reference
from tests.references import shampoo

STEPS = 7

# Coupled factors amplify the rounding of float32 (6e-8) by the conditions of both; the
# directions compared here have entries near 1. Measured up to 4e-6.
TOLERANCE = 3e-5


def gradients(rng, shapes, steps=STEPS, scale=1.0):
    """Gradients with a spectrum and a mean, as a stack of all steps for each leaf."""
    history = {}
    for name, shape in shapes.items():
        rows = np.linspace(0.3, 2.0, shape[-2])[:, None]
        mean = rng.normal(size=shape)
        noise = rng.normal(size=(steps, *shape))
        history[name] = (scale * rows * (mean + noise)).astype(np.float32)
    return history


def run(tx, history):
    """Updates of every step, and the last state; compiled once."""
    leaves = {name: jnp.asarray(stack) for name, stack in history.items()}

    @jax.jit
    def whole(leaves):
        def step(state, gradient):
            updates, state = tx.update(gradient, state)
            return state, updates

        start = tx.init(jax.tree.map(lambda stack: stack[0], leaves))
        return jax.lax.scan(step, start, leaves)

    state, updates = whole(leaves)
    return jax.tree.map(lambda u: np.asarray(u, np.float64), updates), state


def mean_of_all(count, b2):
    """The decay rate of a step with bias correction."""
    return min(b2, count / (count + 1))


def two_sided(grads, *, b2, momentum, every, limit=4000.0, phase=0):
    """The coupled recursion on one history of matrices, from axes as bases."""
    grads = np.asarray(grads, np.float64)
    shape = grads[0].shape
    factors = reference.Factors(
        grads[0], decay=0.0, init_factor=1.0, bases=[np.eye(d) for d in shape]
    )
    factors.factors = [np.zeros((d, d)) for d in shape]
    root_mean_square = np.sqrt(np.mean(grads[0] ** 2))
    factors.values = [np.full(d, root_mean_square) for d in shape]
    trace, directions = 0.0, []
    for count, gradient in enumerate(grads):
        trace = momentum * trace + gradient
        directions.append(factors.precondition(trace, 0.0))
        factors.decay = mean_of_all(count, b2)
        factors.learn(gradient)
        factors.values = [
            np.maximum(v, np.mean(v) / max(10.0, min(len(v), limit)) ** 2)
            for v in factors.values
        ]
        if (count + phase) % every == 0:
            for i in factors.axes:
                order = np.argsort(-factors.values[i])
                factors.values[i] = factors.values[i][order]
                factors.bases[i] = factors.bases[i][:, order]
            factors.refresh()
    return np.stack(directions)


def one_sided(grads, *, b2, momentum, every):
    """The same with a factor of the rows alone, written out."""
    grads = np.asarray(grads, np.float64)
    m, n = grads[0].shape
    S, Q = np.zeros((m, m)), np.eye(m)
    values = np.full(m, np.mean(grads[0] ** 2))
    trace, directions = 0.0, []
    for count, G in enumerate(grads):
        trace = momentum * trace + G
        directions.append((Q * values**-0.5) @ Q.T @ trace)
        b = mean_of_all(count, b2)
        S = b * S + (1 - b) * G @ G.T / n
        values = b * values + (1 - b) * np.mean((Q.T @ G) ** 2, axis=1)
        if count % every == 0:
            order = np.argsort(-values)
            values, Q = values[order], np.linalg.qr(S @ Q[:, order])[0]
    return np.stack(directions)


def test_two_sides_follow_the_coupled_recursion(rng):
    # The longer side of a matrix that isn't square starts with a null space.
    shapes = {"square": (6, 6), "stack": (3, 6, 6), "wide": (4, 9), "tall": (7, 5)}
    history = gradients(rng, shapes)
    tx = fo.kl_shampoo(
        optax.trace(0.9),
        b2=0.7,
        sides="both",
        update_every=2,
        stagger=False,
        eps=0.0,
    )
    updates, _ = run(tx, history)
    follow = functools.partial(two_sided, b2=0.7, momentum=0.9, every=2)
    # What is orthogonal to the few directions that a factor knows at first inherits
    # their rounding times their condition: measured 3e-5 where it isn't square.
    for name, tolerance in (("square", TOLERANCE), ("wide", 1e-4), ("tall", 1e-4)):
        expected = follow(history[name])
        _compare.assert_within(updates[name], expected, tolerance, name)
    for i in range(3):
        expected = follow(history["stack"][:, i])
        _compare.assert_within(updates["stack"][:, i], expected, TOLERANCE, f"{i}")


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("bucketing", ["loop", "leaf"])
def test_phase_of_a_matrix_is_that_of_its_path_and_index(rng, bucketing, traced):
    history = gradients(rng, {"wide": (5, 4, 5)})
    every = jnp.asarray(3) if traced else 3
    tx = fo.kl_shampoo(b2=0.7, update_every=every, eps=0.0, bucketing=bucketing)
    updates, _ = run(tx, history)
    for i in range(5):
        phase = (zlib.crc32(b"wide") + i) % 2**31
        expected = two_sided(
            history["wide"][:, i], b2=0.7, momentum=0.0, every=3, phase=phase
        )
        # As above, for matrices that aren't square.
        _compare.assert_within(updates["wide"][:, i], expected, 1e-4, f"{i}")


@pytest.mark.parametrize("bucketing", ["loop", "batch"])
def test_renewal_at_every_step(rng, bucketing):
    history = gradients(rng, {"square": (6, 6), "stack": (3, 6, 6)})
    tx = fo.kl_shampoo(b2=0.9, update_every=1, eps=0.0, bucketing=bucketing)
    updates, _ = run(tx, history)
    follow = functools.partial(two_sided, b2=0.9, momentum=0.0, every=1)
    _compare.assert_within(updates["square"], follow(history["square"]), TOLERANCE)
    for i in range(3):
        expected = follow(history["stack"][:, i])
        _compare.assert_within(updates["stack"][:, i], expected, TOLERANCE, f"{i}")


def test_renewal_at_every_step_needs_no_condition():
    # Gram-Schmidt's own completion is a condition inside, and so are the versions for
    # several platforms; a given bucketing is the same on all of them.
    def conditions(every):
        tx = fo.kl_shampoo(update_every=every, bucketing="batch")
        return primitives(tx, {"w": jnp.ones((6, 6))}).count(" cond[")

    # One for each of the two sides.
    assert conditions(2) == conditions(1) + 2


@pytest.mark.parametrize(
    "bucketing",
    [
        "loop",
        pytest.param("batch", marks=pytest.mark.exhaustive),
        pytest.param("leaf", marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.parametrize(
    "sides", ["both", pytest.param("small", marks=pytest.mark.exhaustive)]
)
def test_neighbours_change_nothing(rng, sides, bucketing):
    shapes = {"m": (3, 6, 7), "s": (6, 7)}
    more = {"a": (6, 7), "n": (2, 7, 6), "z": (6, 7)}
    history = gradients(rng, shapes | more, steps=20)
    tx = fo.kl_shampoo(
        optax.trace(0.9), sides=sides, update_every=4, bucketing=bucketing
    )
    alone, _ = run(tx, {name: history[name] for name in shapes})
    among, _ = run(tx, history)
    for name in shapes:
        # At most the order of sums in another program; entries are near 1, and
        # momentum adds up ten of them.
        _compare.assert_within(among[name], alone[name], 1e-5, name)


def placed(leaves, devices, kind):
    mesh = jax.make_mesh(
        (devices,), ("x",), axis_types=(kind,), devices=jax.devices()[:devices]
    )
    return {
        name: jax.device_put(leaf, NamedSharding(mesh, P()))
        for name, leaf in leaves.items()
    }


@pytest.mark.parametrize(
    "kind",
    [AxisType.Explicit, pytest.param(AxisType.Auto, marks=pytest.mark.exhaustive)],
    ids=str,
)
@pytest.mark.parametrize(
    ("component", "settings"),
    # `test_devices.py` has the first in every run. Eigenvalues of plain Shampoo are
    # known to 1e-7 of the largest, by LAPACK as by Jacobi's method; the damping keeps
    # that small beside all of them.
    [
        pytest.param("kl_shampoo", {}, marks=pytest.mark.exhaustive),
        ("shampoo", {"damping": 0.3}),
    ],
)
def test_devices_change_nothing(rng, component, settings, kind):
    history = gradients(rng, {"w": (3, 6, 7), "v": (6, 7), "u": (6, 6)}, steps=20)
    tx = getattr(fo, component)(update_every=4, **settings)
    expected, _ = run(tx, history)
    leaves = {name: jnp.asarray(stack[0]) for name, stack in history.items()}
    update = jax.jit(tx.update)
    state = tx.init(placed(leaves, 8, kind))
    for step in range(20):
        leaves = {name: jnp.asarray(stack[step]) for name, stack in history.items()}
        updates, state = update(placed(leaves, 8, kind), state)
        for name in leaves:
            # What is wanted of the whole library: rounding, carried on by averages.
            scale = np.abs(expected[name][step]).max()
            _compare.assert_within(
                np.asarray(updates[name], np.float64) / scale,
                expected[name][step] / scale,
                1e-5,
                f"{name} at {step}",
            )


def test_small_side_follows_the_recursion(rng):
    history = gradients(rng, {"square": (6, 6), "tall": (7, 5), "wide": (5, 7)})
    tx = fo.kl_shampoo(
        optax.trace(0.9), b2=0.7, sides="small", update_every=2, stagger=False, eps=0.0
    )
    updates, state = run(tx, history)
    follow = functools.partial(one_sided, b2=0.7, momentum=0.9, every=2)
    _compare.assert_within(updates["wide"], follow(history["wide"]), TOLERANCE)
    _compare.assert_within(updates["square"], follow(history["square"]), TOLERANCE)
    tall = np.swapaxes(follow(np.swapaxes(history["tall"], 1, 2)), 1, 2)
    _compare.assert_within(updates["tall"], tall, TOLERANCE)
    assert isinstance(state.output_bases["wide"], optax.MaskedNode)
    assert isinstance(state.input_bases["tall"], optax.MaskedNode)


@pytest.mark.parametrize(
    "settings",
    [
        {"component": fo.shampoo, "update_every": 2},
        {"component": fo.kl_shampoo, "eps": 1e-2, "damping": 1e-2},
    ],
)
def test_direction_ignores_the_scale_of_the_gradients(rng, settings):
    history = gradients(rng, {"square": (6, 6), "wide": (5, 11)})
    component = settings["component"]
    tx = component(**{k: v for k, v in settings.items() if k != "component"})
    updates, _ = run(tx, history)
    scaled, _ = run(tx, {name: 1e-6 * grads for name, grads in history.items()})
    for name in history:
        # Whitened statistics leave no scale; plain Shampoo leaves a factor, which is
        # not the direction.
        unit = lambda u: u / np.linalg.norm(u, axis=(1, 2), keepdims=True)  # noqa: E731
        difference = unit(scaled[name]) - unit(updates[name])
        # 1e-6 is no power of two, so every gradient is rounded anew; conditions of up
        # to 1e4 amplify that. Measured up to 5e-5.
        assert np.abs(difference).max() < 3e-4
        if component is fo.kl_shampoo:
            ratio = np.linalg.norm(scaled[name]) / np.linalg.norm(updates[name])
            assert ratio == pytest.approx(1.0, abs=3e-4)


def test_whitens_gradients_of_a_kronecker_covariance(rng):
    rows, columns = (rng.normal(size=(5, 5)) + 2 * np.eye(5) for _ in range(2))
    left, right = (shampoo.power(A @ A.T, -0.5) for A in (rows, columns))
    noise = rng.normal(size=(600, 5, 5))
    tx = fo.kl_shampoo(b2=0.99, sides="both", update_every=2)
    updates, _ = run(tx, {"w": (rows @ noise @ columns.T).astype(np.float32)})
    expected = left @ rows @ noise @ columns.T @ right
    for step in range(580, 600):
        cosine = np.sum(updates["w"][step] * expected[step]) / (
            np.linalg.norm(updates["w"][step]) * np.linalg.norm(expected[step])
        )
        # Factors averaged over 100 gradients of five columns are known to
        # 1/sqrt(500), 4 %, and the basis follows them.
        assert cosine > 0.97
    assert np.sqrt(np.mean(updates["w"][300:] ** 2)) == pytest.approx(1.0, abs=0.1)


def test_order_of_neurons_does_not_matter(rng):
    history = gradients(rng, {"w": (6, 6)})
    rows, columns = rng.permutation(6), rng.permutation(6)
    tx = fo.kl_shampoo(update_every=2)
    updates, _ = run(tx, history)
    shuffled, _ = run(tx, {"w": history["w"][:, rows][:, :, columns]})
    _compare.assert_within(
        shuffled["w"], updates["w"][:, rows][:, :, columns], TOLERANCE
    )


def primitives(tx, params):
    """The program of one update as text."""
    return str(jax.make_jaxpr(tx.update)(params, tx.init(params)))


def test_program_holds_no_eigendecomposition():
    params = {"w": jnp.ones((6, 6)), "stack": jnp.ones((12, 4, 8))}
    assert "eigh" not in primitives(fo.kl_shampoo(), params)
    # The same search finds it where there is one.
    assert "eigh" in primitives(fo.shampoo(), params)


def test_state_of_a_transformer_takes_12_bytes_a_parameter():
    width, depth = 384, 12
    kernels = {"qkv": 3, "proj": 1, "adaLN": 6, "fc1": 4}
    params = {
        name: jax.ShapeDtypeStruct((depth, width, count * width), jnp.float32)
        for name, count in kernels.items()
    }
    params["fc2"] = jax.ShapeDtypeStruct((depth, 4 * width, width), jnp.float32)
    total = sum(leaf.size for leaf in params.values())

    def bytes_of(tx):
        state = jax.eval_shape(tx.init, params)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))

    fused = fo.Routing(stacked=["qkv", "proj", "adaLN", "fc1", "fc2"])
    chunked = fo.Routing(
        [fo.Rule("qkv", chunks=3), fo.Rule("adaLN", chunks=6)], stacked=fused.stacked
    )
    for routing in (fused, chunked):
        # With the momentum's four bytes.
        tx = fo.kl_shampoo(optax.trace(0.95), routing=routing)
        assert bytes_of(tx) <= 12 * total
    # Half a factor and a basis of either side: 6 + 6, and 4 for an eigenvalue a row.
    square = {"proj": params["proj"]}
    state = jax.eval_shape(fo.kl_shampoo().init, square)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert size / square["proj"].size == pytest.approx(12, abs=0.05)


def test_bfloat16_gradients(rng):
    history = gradients(rng, {"w": (6, 8)})
    rounded = {"w": jnp.asarray(history["w"], jnp.bfloat16)}
    tx = fo.kl_shampoo(optax.trace(0.9, accumulator_dtype=jnp.float32))
    gradient = {"w": rounded["w"][0]}
    update, state = jax.eval_shape(tx.update, gradient, tx.init(gradient))
    assert update["w"].dtype == jnp.bfloat16
    assert state.input_factors["w"].dtype == jnp.float32
    low, _ = run(tx, rounded)
    full, _ = run(tx, {"w": np.asarray(rounded["w"], np.float32)})
    # The update is rounded to eight bits: 2^-8 of entries up to 8, 0.03.
    _compare.assert_within(low["w"], full["w"], 0.1)


def test_zero_gradients_stay_zero_and_leave_the_start_to_the_first_other(rng):
    history = gradients(rng, {"w": (6, 6)}, steps=3)
    late = {"w": np.concatenate([np.zeros_like(history["w"][:2]), history["w"]])}
    tx = fo.kl_shampoo(stagger=False)
    updates, _ = run(tx, late)
    direct, _ = run(tx, history)
    assert not updates["w"][:2].any()
    # The first update with a gradient has its direction and the size 1.
    _compare.assert_within(updates["w"][2], direct["w"][0], 1e-5)
    assert np.isfinite(updates["w"]).all()


@pytest.mark.parametrize("component", ["kl_shampoo", "shampoo"])
@pytest.mark.parametrize("sides", ["both", "small"])
def test_vectors_and_scalars_as_matrices(rng, component, sides):
    history = gradients(rng, {"row": (1, 5), "column": (5, 1), "one": (1, 1)}, steps=4)
    updates, _ = run(getattr(fo, component)(sides=sides), history)
    for name, stack in updates.items():
        assert np.isfinite(stack).all(), name
        assert np.abs(stack).max() > 0, name


def changed(before, after):
    """Which matrices of a stack have another basis."""
    return np.any(np.asarray(before) != np.asarray(after), axis=(1, 2))


@pytest.mark.parametrize("traced", [False, True])
def test_renewals_are_spread_over_the_steps(rng, traced):
    history = gradients(rng, {"a": (10, 4, 4), "b": (4, 4), "c": (4, 4)}, steps=10)
    every = jnp.asarray(5) if traced else 5
    tx = fo.kl_shampoo(update_every=every, sides="small")
    update = jax.jit(tx.update)
    state = tx.init(jax.tree.map(lambda stack: jnp.asarray(stack[0]), history))
    seen = {name: [] for name in history}
    for step in range(10):
        gradient = {name: jnp.asarray(stack[step]) for name, stack in history.items()}
        _, new = update(gradient, state)
        for name, steps in seen.items():
            steps.append(changed(state.input_bases[name], new.input_bases[name]))
        state = new
    total = np.zeros(10)
    for name, steps in seen.items():
        # Each matrix once in five steps.
        np.testing.assert_array_equal(np.sum(steps[:5], axis=0), 1, err_msg=name)
        np.testing.assert_array_equal(np.sum(steps[5:], axis=0), 1, err_msg=name)
        total += np.sum(steps, axis=1)
    # Twelve matrices in five steps: never more than three at once.
    assert total.max() == 3


def test_restored_norm_is_that_of_the_momentum(rng):
    history = gradients(rng, {"w": (3, 4, 6)}, scale=1e-3)
    updates, _ = run(fo.kl_shampoo(optax.trace(0.9), restore_norm=True), history)
    momenta, _ = run(optax.trace(0.9), history)
    for step in range(STEPS):
        for i in range(3):
            norm = np.linalg.norm(updates["w"][step, i])
            # A few units in the last place of float32.
            assert norm == pytest.approx(
                np.linalg.norm(momenta["w"][step, i]), rel=1e-6
            )


def test_leaves_joined_or_not_are_the_same(rng):
    shapes = {"wide": (2, 4, 6), "tall": (6, 4), "square": (4, 4), "stack": (2, 4, 4)}
    history = gradients(rng, shapes)
    results = {
        bucketing: run(fo.kl_shampoo(bucketing=bucketing, update_every=3), history)
        for bucketing in ("loop", "batch", "leaf")
    }
    alone, state = results["leaf"]
    for bucketing in ("loop", "batch"):
        updates, joined = results[bucketing]
        assert jax.tree.structure(joined) == jax.tree.structure(state)
        for name in history:
            # The same operations, in another order of summation.
            _compare.assert_within(updates[name], alone[name], TOLERANCE, name)


def program_lines(depth, bucketing):
    """How long the program for a model of separate layers is."""
    params = {str(i): jnp.ones((4, 4)) for i in range(depth)}
    tx = fo.kl_shampoo(bucketing=bucketing)
    text = jax.jit(tx.update).lower(params, tx.init(params)).as_text()
    return len(text.splitlines())


def test_program_hardly_grows_with_separate_layers():
    # A few lines for each leaf to lay it into the stack and take it out again.
    assert program_lines(12, "loop") < 1.6 * program_lines(3, "loop")
    assert program_lines(12, "leaf") > 3 * program_lines(3, "leaf")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"b2": 1.0}, r"`b2` must lie in \[0.0, 1.0\), got 1.0"),
        ({"bucketing": "heap"}, "bucketing"),
        ({"update_every": 0}, "`update_every` must be at least 1"),
        ({"sides": "left"}, "sides"),
        ({"damping": -1.0}, "`damping` must lie in"),
    ],
)
def test_settings_out_of_range_are_errors(settings, message):
    # Under the tests' type checker a wrong name fails as a TypeError already.
    with pytest.raises((ValueError, TypeError), match=message):
        fo.kl_shampoo(**settings)


def test_leaf_without_matrices_is_an_error():
    with pytest.raises(ValueError, match=r"'bias' of shape float32\[3\]"):
        fo.kl_shampoo().init({"bias": jnp.ones(3)})
