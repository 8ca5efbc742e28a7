"""What every transformation promises, whatever it computes.

One line in `_cases.ALL` puts a transformation through all of this.
"""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fusionopt_jax as fo
from tests import _cases, _compare

# One product of 24 terms and a few steps in float32, compiled differently.
ROUNDING = 2e-5

optimizers = pytest.mark.parametrize(
    "case", [case for case in _cases.ALL if case.kind == "optimizer"], ids=str
)


def avals(tree):
    """Structure, shapes, dtypes and weak types; no numbers."""
    described = jax.tree.map(
        lambda leaf: (leaf.shape, str(leaf.dtype), bool(leaf.weak_type)), tree
    )
    return jax.tree.structure(tree), described


def traced_step(case, tx, params):
    """First and second state of a transformation, without computing anything."""
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(
        lambda *args: tx.update(*args, **_cases.arguments(case)), params, state, params
    )
    return state, updates, after


def traced_update(case, tx, grads, state, params):
    """Shapes of what an update from a state of shapes gives; gradients may be odd."""
    return jax.eval_shape(
        lambda state: tx.update(grads, state, params, **_cases.arguments(case)), state
    )


def grouped(case, routing):
    """A case in a `multi_transform` where it can't take vectors, else by itself."""
    tx = case.build(routing)
    if not case.matrices:
        return tx
    return optax.multi_transform(
        {"spectral": tx, "scalar": optax.identity()}, routing.labels
    )


def one_step(case, tx, params, grads):
    """Updates and state after one compiled step from the first state."""
    return jax.jit(lambda p, g: tx.update(g, tx.init(p), p, **_cases.arguments(case)))(
        params, grads
    )


def test_every_public_transformation_is_a_case(monkeypatch):
    factories = _cases.factories()
    made = {}

    def recording(name):
        def build(*args, **kwargs):
            # Kept, so that no other object takes its id.
            made[name].append(factories[name](*args, **kwargs))
            return made[name][-1]

        return build

    for name in factories:
        made[name] = []
        monkeypatch.setattr(fo, name, recording(name))
    cases = [case.build(_cases.ROUTING) for case in _cases.ALL]
    # Made by a case itself, and not only inside of another one.
    forgotten = {
        name
        for name, results in made.items()
        if not any(result is tx for result in results for tx in cases)
    }
    assert not forgotten, "add them to `_cases.ALL`"


@_cases.every_case
def test_takes_extra_arguments(case):
    tx = _cases.transformation(case)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)


@_cases.every_case
def test_points_downhill(case):
    params, grads, _ = _cases.start(case)
    updates, state = _cases.first_update(case)
    if case.starts_still:
        assert not any(leaf.any() for leaf in jax.tree.leaves(updates))
        extra = _cases.arguments(case)
        updates, _ = _cases.update(case)(grads, state, params, **extra)
    along = _cases.inner_product(updates, grads)
    assert along > 0 if case.kind == "direction" else along < 0


@_cases.every_case
def test_ignores_arguments_that_it_does_not_know(case):
    params, grads, state = _cases.start(case)
    tx = _cases.transformation(case)

    def program(**extra):
        known = _cases.arguments(case)
        return str(
            jax.make_jaxpr(lambda g, s, p: tx.update(g, s, p, **known, **extra))(
                grads, state, params
            )
        )

    assert program(unknown=jnp.ones(3), text="any") == program()


@_cases.every_case
def test_missing_arguments_are_named(case):
    params, grads, state = _cases.start(case)
    tx = _cases.transformation(case)
    if case.value:
        with pytest.raises(ValueError, match="value=loss"):
            tx.update(grads, state, params)
    if case.params:
        with pytest.raises(ValueError, match="params"):
            tx.update(grads, state, **_cases.arguments(case))


@_cases.every_case
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_state_keeps_its_types(case, dtype):
    params = _cases.parameters(dtype, matrices=case.matrices)
    state, updates, after = traced_step(case, _cases.transformation(case), params)
    assert avals(after) == avals(state)
    assert avals(updates)[0] == jax.tree.structure(params)
    jax.tree.map(
        lambda u, p: (u.shape, u.dtype) == (p.shape, p.dtype) or pytest.fail(str(u)),
        updates,
        params,
    )


@_cases.every_case
def test_accumulates_in_float32(case):
    params = _cases.parameters(jnp.bfloat16, matrices=case.matrices)
    state, _, _ = traced_step(case, _cases.transformation(case), params)
    is_short = lambda node: type(node).__name__ == "QuantizedState"  # noqa: E731
    for path, leaf in jax.tree_util.tree_leaves_with_path(state, is_leaf=is_short):
        # What is asked to be kept in few bits is accumulated in fp32 all the same.
        if not is_short(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating):
            assert leaf.dtype == jnp.float32, jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", ["ns5", "mona", "schedule_free", "fusion_opt"])
def test_half_precision_stays_close_to_float32(name):
    case = _cases.named(name)
    # The parameters and gradients of `start` are bf16 numbers in float32.
    params, grads, _ = _cases.start(case)
    narrow = optax.tree.cast((params, grads), jnp.bfloat16)
    updates, _ = one_step(case, _cases.transformation(case), *narrow)
    for update, exact in zip(
        jax.tree.leaves(updates),
        jax.tree.leaves(_cases.first_update(case)[0]),
        strict=True,
    ):
        size = float(jnp.max(jnp.abs(exact)))
        # Two roundings to eight bits, of a sum that may be larger than its terms.
        _compare.assert_within(update, exact, 0.02 * size, case.name)


@_cases.every_case
def test_state_is_a_tree_of_arrays(case):
    _, _, state = _cases.start(case)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    # A plain map over the leaves is what checkpoints and shardings do.
    _compare.assert_trees_identical(jax.tree.map(lambda leaf: leaf, state), state)


@_cases.every_case
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_param_shaped_state_is_found(case, dtype):
    params = _cases.parameters(dtype, matrices=case.matrices)
    tx = _cases.transformation(case)
    state = tx.init(params)
    marked = optax.tree.map_params(
        tx, lambda leaf: "of a parameter", state, transform_non_params=lambda _: "other"
    )
    assert jax.tree.structure(marked) == jax.tree.structure(state)
    shapes = {leaf.shape for leaf in jax.tree.leaves(params)}
    for (path, mark), leaf in zip(
        jax.tree_util.tree_leaves_with_path(marked), jax.tree.leaves(state), strict=True
    ):
        if leaf.shape in shapes:
            assert mark == "of a parameter", jax.tree_util.keystr(path)


@_cases.every_case
def test_compiles_once(case):
    params, grads, state = _cases.start(case)
    for _ in range(3):
        _, state = _cases.update(case)(grads, state, params, **_cases.arguments(case))
    assert _cases.update(case)._cache_size() == 1


@_cases.every_case
def test_a_scan_over_donated_buffers_is_a_loop(case):
    params, grads, state = _cases.start(case)
    tx = _cases.transformation(case)
    steps = jax.tree.map(lambda g: jnp.stack([g, 0.5 * g, -g]), grads)

    def step(carry, gradient):
        params, state = carry
        updates, state = tx.update(gradient, state, params, **_cases.arguments(case))
        return (optax.apply_updates(params, updates), state), updates

    donated = jax.tree.map(jnp.copy, params)
    donated = donated, tx.init(donated)
    # A buffer that is in both trees, or that fits no output, raises or warns here.
    (_, end), scanned = jax.jit(
        lambda params, state, steps: jax.lax.scan(step, (params, state), steps),
        donate_argnums=(0, 1),
    )(*donated, steps)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated))
    for t in range(3):
        gradient = jax.tree.map(lambda leaf, t=t: leaf[t], steps)
        updates, state = _cases.update(case)(
            gradient, state, params, **_cases.arguments(case)
        )
        params = optax.apply_updates(params, updates)
        _compare.assert_trees_within(
            jax.tree.map(lambda leaf, t=t: leaf[t], scanned), updates, 3 * ROUNDING
        )
    assert avals(jax.eval_shape(lambda: end)) == avals(jax.eval_shape(lambda: state))


@_cases.every_case
def test_can_be_skipped_by_a_cond(case):
    params, grads, state = _cases.start(case)
    tx = _cases.transformation(case)

    def step(flag):
        return jax.lax.cond(
            flag,
            lambda: tx.update(grads, state, params, **_cases.arguments(case)),
            lambda: (jax.tree.map(jnp.zeros_like, grads), state),
        )

    # Branches of other structures or types are an error at tracing.
    _, after = jax.eval_shape(step, jnp.asarray(True))
    assert avals(after) == avals(jax.eval_shape(lambda: state))


@_cases.every_case
def test_sees_through_masked_holes_in_a_chain_behind_a_guard(case):
    params, grads, _ = _cases.start(case)
    vector = {"other": jnp.ones(3)}
    params, grads = params | vector, grads | vector
    tx = optax.multi_transform(
        {
            "in": optax.chain(case.build(_cases.ROUTING), optax.scale(2.0)),
            "out": optax.identity(),
        },
        {"blocks": "in", "head": "in", "other": "out"},
    )
    tx = optax.apply_if_finite(tx, max_consecutive_errors=3)

    @jax.jit
    def step(grads, state):
        return tx.update(grads, state, params, **_cases.arguments(case))

    state = tx.init(params)
    broken, state = step(jax.tree.map(lambda g: g * jnp.nan, grads), state)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(broken))
    updates, _ = step(grads, state)
    np.testing.assert_array_equal(updates.pop("other"), vector["other"])
    alone = jax.tree.map(lambda u: 2 * u, _cases.first_update(case)[0])
    _compare.assert_trees_within(updates, alone, 2 * ROUNDING)


@_cases.every_case
def test_works_in_multi_steps(case):
    params, grads, _ = _cases.start(case)
    tx = optax.MultiSteps(_cases.transformation(case), every_k_schedule=2)

    @jax.jit
    def step(grads, state):
        return tx.update(grads, state, params, **_cases.arguments(case))

    first, state = step(grads, tx.init(params))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(first))
    second, _ = step(grads, state)
    _compare.assert_trees_within(second, _cases.first_update(case)[0], ROUNDING)


@_cases.every_case
def test_an_empty_tree_is_no_error(case):
    tx = _cases.transformation(case)
    for empty in ({}, {"a": {}}, ()):
        updates, state = tx.update(
            empty, tx.init(empty), empty, **_cases.arguments(case)
        )
        assert jax.tree.structure(updates) == jax.tree.structure(empty)
        assert _cases.is_finite(state)


@_cases.every_case
def test_zero_gradients_stay_finite(case):
    params, grads, state = _cases.start(case)
    zeros = jax.tree.map(jnp.zeros_like, grads)
    for _ in range(2):
        updates, state = _cases.update(case)(
            zeros, state, params, **_cases.arguments(case, 0.0)
        )
        assert _cases.is_finite((updates, state))
        # What sees the parameters may decay them.
        if case.kind == "direction" and not case.params:
            assert all(not np.any(leaf) for leaf in jax.tree.leaves(updates))


HOT_DTYPES = ["auto", "fp32", "bf16", "fp16", "fp16_safe"]


@pytest.mark.parametrize("hot_dtype", HOT_DTYPES)
def test_every_size_of_gradient_stays_finite(hot_dtype):
    shapes = {"square": (8, 8), "row": (1, 8), "column": (8, 1)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    routing = fo.Routing(min_dim=1)
    transformations = {
        "ns5": fo.ns5(hot_dtype=hot_dtype),
        "gram": fo.ns5(
            hot_dtype=hot_dtype,
            method="gram",
            preconditioner="aol",
            scale="aspect",
        ),
        "recipe": fo.fusion_opt(
            1e-2, routing=routing, settings={"ns5": {"hot_dtype": hot_dtype}}
        ),
    }

    @jax.jit
    def step(grads):
        results = {}
        for name, tx in transformations.items():
            state = tx.init(params)
            results[name] = tx.update(grads, state, params, value=1.0)
        return results

    unit = _cases.gradients(params)
    for factor in (0.0, 1e-8, 1.0, 1e6):
        results = step(jax.tree.map(lambda g, f=factor: f * g, unit))
        for name, result in results.items():
            assert _cases.is_finite(result), f"{name} at {factor}"


# What is no floating-point array, or none to train; a tree may hold any of it.
FOREIGN = {
    "integers": jnp.ones((8, 8), int),
    "booleans": jnp.ones((8, 8), bool),
    "random key": jax.random.split(jax.random.key(0), (8, 8)),
    "no gradient": np.zeros((8, 8), jax.dtypes.float0),
    "fp8": jnp.ones((8, 8), jnp.float8_e4m3fn),
    "number": 1.5,
    "function": jax.nn.relu,
    "text": "gelu",
}


@_cases.every_case
@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_floating_array_is_refused_by_its_path(case, kind):
    params, grads, _ = _cases.start(case)
    tx = _cases.transformation(case)
    odd = {"layer": {"odd": FOREIGN[kind]}}
    with pytest.raises(ValueError, match=r"'layer/odd'.*(tree|array|bf16)"):
        tx.init(params | odd)
    # A gradient of that kind beside a state that was made without it.
    like = params | {"layer": {"odd": jnp.ones((8, 8))}}
    state = jax.eval_shape(tx.init, like)
    with pytest.raises(ValueError, match="'layer/odd'"):
        traced_update(case, tx, grads | odd, state, like)


@_cases.every_case
def test_none_is_no_leaf(case):
    params, _, _ = _cases.start(case)
    tx = _cases.transformation(case)
    with_hole = params | {"hole": None}
    _, updates, _ = traced_step(case, tx, with_hole)
    assert jax.tree.structure(updates) == jax.tree.structure(with_hole)


def as_complex(tree, seed=5):
    """A tree with an imaginary part beside its real one."""
    imaginary = _cases.gradients(tree, seed)
    return jax.tree.map(lambda x, y: x + 1j * y, tree, imaginary)


def as_pairs(tree):
    """Complex leaves as their real and imaginary parts, in a last axis."""
    return jax.tree.map(lambda x: jnp.stack([x.real, x.imag], -1), tree)


@_cases.every_case
def test_complex_leaves_are_served_or_refused_by_their_path(case):
    real, grads, _ = _cases.start(case)
    params, grads = as_complex(real), as_complex(grads, seed=6)
    tx = _cases.transformation(case)
    if not case.complex_too:
        with pytest.raises(ValueError, match=r"blocks/.*complex64.*real and imag"):
            tx.init(params)
        state = jax.eval_shape(tx.init, real)
        with pytest.raises(ValueError, match=r"blocks/.*complex64.*real and imag"):
            traced_update(case, tx, grads, state, real)
        return
    results = []
    for make in (lambda tree: tree, as_pairs):
        state = tx.init(make(params))
        y = make(params)
        # Plain steps of a norm that both forms share; twice, to reach the state.
        for _ in range(2):
            updates, state = tx.update(make(grads), state, y, **_cases.arguments(case))
            y = optax.apply_updates(y, updates)
        results.append(y)
    complex_result, pairs = results
    assert all(leaf.dtype == jnp.complex64 for leaf in jax.tree.leaves(complex_result))
    if case.name != "polyak_schedule_free_plus":
        # Its sum of absolute values is of complex numbers, not of their parts.
        _compare.assert_trees_within(as_pairs(complex_result), pairs, ROUNDING)
    state, _, after = traced_step(case, tx, params)
    assert avals(after) == avals(state)


@_cases.every_case
@pytest.mark.parametrize("traced", [False, True], ids=["directly", "eval_shape"])
def test_init_takes_shapes_without_numbers(case, traced):
    params, _, state = _cases.start(case)
    tx = _cases.transformation(case)
    shapes = jax.eval_shape(lambda: params)
    made = jax.eval_shape(tx.init, shapes) if traced else tx.init(shapes)
    described = lambda tree: jax.tree.map(  # noqa: E731
        lambda leaf: (leaf.shape, leaf.dtype), tree
    )
    assert jax.tree.structure(made) == jax.tree.structure(state)
    assert described(made) == described(state)


@pytest.mark.parametrize("case", [case for case in _cases.ALL if case.value], ids=str)
def test_a_loss_is_one_number(case):
    params, grads, state = _cases.start(case)
    with pytest.raises(ValueError, match=r"one number.*shape \(1,\)"):
        _cases.transformation(case).update(grads, state, params, value=jnp.ones(1))


class LinenModel(nn.Module):
    """Two dense layers."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(16)(nn.Dense(24)(x))


class NNXModel(nnx.Module):
    """A dense layer in an attribute and one in a list."""

    def __init__(self, rngs):
        self.first = nnx.Linear(16, 24, rngs=rngs)
        self.rest = nnx.List([nnx.Linear(24, 16, rngs=rngs)])

    def __call__(self, x):
        return self.rest[0](self.first(x))


def foreign_trees():
    """Parameters as the libraries hand them out, and the layout of their matrices."""
    linen = LinenModel().init(jax.random.key(0), jnp.ones((1, 16)))
    model = eqx.nn.MLP(16, 16, 24, 1, key=jax.random.key(0))
    return {
        "linen": (linen, "in_out"),
        "nnx": (nnx.state(NNXModel(nnx.Rngs(0)), nnx.Param), "in_out"),
        "nnx pure": (
            nnx.to_pure_dict(nnx.state(NNXModel(nnx.Rngs(0)), nnx.Param)),
            "in_out",
        ),
        "equinox": (eqx.filter(model, eqx.is_inexact_array), "out_in"),
    }


@_cases.every_case
@pytest.mark.parametrize("library", ["linen", "nnx", "nnx pure", "equinox"])
def test_serves_the_trees_of_other_libraries(case, library):
    params, layout = foreign_trees()[library]
    routing = fo.Routing(min_dim=8, layout=layout)
    # Two weights and two biases, whatever holds them.
    labels = jax.tree.leaves(routing.labels(params))
    assert sorted(labels) == ["scalar", "scalar", "spectral", "spectral"]
    state, updates, after = traced_step(case, grouped(case, routing), params)
    assert avals(after) == avals(state)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_serves_nnx_optimizer_and_its_averages():
    model = NNXModel(nnx.Rngs(0))
    # No decay, and the whole weight of the average on the fast iterate of one step.
    tx = fo.fusion_opt(1e-2, routing=fo.Routing(min_dim=8), weight_decay=0.0)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def loss_fn(model):
        return jnp.mean(model(jnp.ones((2, 16))) ** 2)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads, value=loss)
        return loss

    first = step(model, optimizer)
    params = nnx.state(model, nnx.Param)
    # After one step the three sequences are one point.
    average = fo.eval_params(optimizer.opt_state, params)
    _compare.assert_trees_within(
        nnx.to_pure_dict(average), nnx.to_pure_dict(params), ROUNDING
    )
    second = step(model, optimizer)
    assert second < first
    params = nnx.state(model, nnx.Param)
    assert not np.array_equal(params["first"]["kernel"][...], before["first"]["kernel"])
    pure = fo.eval_params(nnx.as_pure(optimizer.opt_state), nnx.as_pure(params))
    for state, tree in (
        (optimizer.opt_state, params),
        (optimizer, params),
        (optimizer.opt_state, nnx.to_pure_dict(params)),
    ):
        average = fo.eval_params(state, tree)
        assert jax.tree.structure(average) == jax.tree.structure(tree)
        _compare.assert_trees_within(
            jax.tree.leaves(average), jax.tree.leaves(pure), ROUNDING
        )
    # What a user types to deploy.
    deployed = fo.eval_params(optimizer.opt_state, model)
    nnx.update(model, fo.eval_params(optimizer.opt_state, params))
    assert loss_fn(model) < first
    np.testing.assert_array_equal(loss_fn(deployed), loss_fn(model))


class NNXModelWithState(NNXModel):
    """The same with statistics, a random key and a counter among its leaves."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(super().__call__(x)))


def test_the_average_of_a_whole_nnx_module_is_a_module():
    model = NNXModelWithState(nnx.Rngs(0))
    tx = fo.schedule_free(optax.identity(), 0.5, b1=0.5)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    for _ in range(2):
        optimizer.update(model, grads)
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    deployed = fo.eval_params(optimizer.opt_state, model)
    assert type(deployed) is NNXModelWithState
    average = fo.eval_params(optimizer.opt_state, nnx.state(model, nnx.Param))
    _compare.assert_trees_identical(
        nnx.to_pure_dict(nnx.state(deployed, nnx.Param)), nnx.to_pure_dict(average)
    )
    # What is not trained is as it was, and so is the module that goes on training.
    for other in (nnx.BatchStat, nnx.RngState):
        kept, old = nnx.state(deployed, other), nnx.state(model, other)
        assert jax.tree.leaves(kept) == jax.tree.leaves(old) or jax.tree.all(
            jax.tree.map(lambda a, b: bool(jnp.all(a == b)), kept, old)
        )
    _compare.assert_trees_identical(
        nnx.to_pure_dict(nnx.state(model, nnx.Param)), before
    )
    assert not np.array_equal(
        average["first"]["kernel"][...], before["first"]["kernel"]
    )
    # Its other leaves are no parameters, which only `wrt` tells the optimiser.
    with pytest.raises(ValueError, match=r"'dropout/rngs/.*nnx\.state\(model"):
        tx.init(nnx.state(model))


def test_numbers_of_an_nnx_state_have_the_names_of_any_other():
    model = NNXModel(nnx.Rngs(0))
    tx = fo.fusion_opt(1e-2, routing=fo.Routing(min_dim=8))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    plain = fo.diagnostics(tx.init(nnx.to_pure_dict(nnx.state(model, nnx.Param))))
    numbers = fo.diagnostics(optimizer.opt_state)
    assert set(numbers) == set(plain)
    assert "schedule_free/weight_sum" in numbers


def test_an_equinox_model_is_refused_where_it_must_be_filtered():
    model = eqx.nn.MLP(16, 16, 24, 1, activation=jax.nn.gelu, key=jax.random.key(0))
    params = eqx.filter(model, eqx.is_inexact_array)
    routing = fo.Routing(min_dim=8, layout="out_in")
    tx = fo.fusion_opt(1e-2, routing=routing)
    state = tx.init(params)
    refused = r"'activation' is no array.*eqx\.filter\(model, eqx\.is_inexact_array\)"
    with pytest.raises(ValueError, match=refused):
        routing.table(model)
    with pytest.raises(ValueError, match=refused):
        tx.init(model)
    # The average alone is put into a whole model.
    deployed = fo.eval_params(state, model)
    assert deployed.activation is model.activation
    _compare.assert_trees_identical(
        eqx.filter(deployed, eqx.is_inexact_array), fo.eval_params(state, params)
    )


@_cases.every_case
def test_parameters_that_are_no_arrays_are_refused_in_an_update(case):
    params, grads, state = _cases.start(case)
    if not case.params:
        return
    tx = _cases.transformation(case)
    for tree in (grads, {**grads, "odd": None}):
        with pytest.raises(ValueError, match="'odd' is no array"):
            tx.update(
                tree, state, params | {"odd": jax.nn.gelu}, **_cases.arguments(case)
            )
