"""The whole composition on eight devices, in every layout, against one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fusionopt_jax as fo
from tests import _compare, _hlo

STEPS = 20
ROUTING = fo.Routing(stacked=("layers", "odd"), min_dim=8)
# Stacks that eight devices share evenly and unevenly, single matrices, a vector.
SHAPES = {"layers": (8, 8, 16), "odd": (3, 16, 16), "single": (16, 8), "bias": (16,)}

COMPOSITIONS = {
    "sf_normuon": {"components": ("ns5", "normuon", "sf")},
    # Some matrices are renewed at a step and some aren't.
    "full": {
        "components": ("ns5", "normuon", "sf", "mona", "shampoo"),
        "settings": {"shampoo": {"b2": 0.9, "update_every": 3}},
    },
}

# The names of a mesh's axes with their sizes, and what divides the last axes of a leaf.
LAYOUTS = {
    "replicated": ({"x": 8}, ()),
    "rows": ({"x": 8}, ("x", None)),
    "columns": ({"x": 8}, (None, "x")),
    "layers": ({"x": 8}, ("x", None, None)),
    "two_axes": ({"x": 4, "y": 2}, ("x", "y")),
}

ALL = [
    (composition, layout, kind)
    for composition in COMPOSITIONS
    for layout in LAYOUTS
    for kind in (AxisType.Auto, AxisType.Explicit)
]
# What differs most from one device, and from the layouts of other tests.
EVERY_RUN = [("full", "two_axes", AxisType.Auto)]


def spec(layout, leaf):
    """How a leaf is divided: from its last axis back, where the axis can be."""
    sizes, wanted = LAYOUTS[layout]
    if leaf.ndim < max(2, len(wanted)):
        wanted = ()
    axes = (None,) * (leaf.ndim - len(wanted)) + wanted
    divides = lambda size, axis: axis is None or size % sizes[axis] == 0  # noqa: E731
    return P(
        *(
            axis if divides(size, axis) else None
            for size, axis in zip(leaf.shape, axes, strict=True)
        )
    )


def placing(layout, kind):
    """Puts a leaf on eight devices."""
    sizes, _ = LAYOUTS[layout]
    mesh = jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes)
    )
    return lambda leaf: jax.device_put(leaf, NamedSharding(mesh, spec(layout, leaf)))


def start():
    """Parameters, and a stack of gradients of all steps for each of them."""
    rng = np.random.default_rng(7)
    params, noise = {}, {}
    for name, shape in SHAPES.items():
        params[name] = rng.normal(size=shape).astype(np.float32)
        mean = rng.normal(size=shape)
        drawn = mean + rng.normal(size=(STEPS, *shape))
        noise[name] = drawn.astype(np.float32)
    return params, noise


def compiled(tx, params):
    """A training step, compiled for the state that a compiled `init` returns."""

    def step(params, state, noise):
        grads = jax.tree.map(lambda p, n: p + n, params, noise)
        updates, state = tx.update(grads, state, params, value=jnp.float32(1.0))
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    return jax.jit(step).lower(params, state, params).compile(), state


def moved(tree, before):
    """Whether any array is something else, or elsewhere, than the one before it."""
    return any(
        (leaf.shape, leaf.dtype, leaf.weak_type)
        != (old.shape, old.dtype, old.weak_type)
        # The same place, perhaps in other words: `P("x")` and `P("x", None)`.
        or not leaf.sharding.is_equivalent_to(old.sharding, leaf.ndim)
        for leaf, old in zip(
            jax.tree.leaves(tree), jax.tree.leaves(before), strict=True
        )
    )


# In and out; over one axis of a mesh after the other.
TURNS = {layout: 2 * len(sizes) for layout, (sizes, _) in LAYOUTS.items()}


def run(composition, place, turns=0):
    """Parameters, and their average, after all steps of gradients that follow them."""
    tx = fo.fusion_opt(1e-2, routing=ROUTING, **COMPOSITIONS[composition])
    params, noise = start()
    params = jax.tree.map(place, params)
    step, state = compiled(tx, params)
    assert _hlo.in_loops(step.as_text()) == []
    # Of stacks that devices share evenly or not, factors and all.
    assert _hlo.exchanges_in_turn(step.as_text()) <= turns
    before = params, state
    for i in range(STEPS):
        drawn = jax.tree.map(lambda stack, i=i: place(stack[i]), noise)
        # Programs of several forced host devices share few threads: one at a time.
        params, state = jax.block_until_ready(step(params, state, drawn))
        # So that `jax.jit` would not compile the step again.
        assert not moved((params, state), before)
    return jax.tree.map(np.asarray, (params, fo.eval_params(state, params)))


@functools.cache
def on_one_device(composition):
    return run(composition, jnp.asarray)


def check(composition, layout, kind):
    expected = on_one_device(composition)
    # What a user may expect of twenty steps in float32: entries are near 1, each step
    # moves them by 0.01, and sums are taken in another order.
    after = run(composition, placing(layout, kind), TURNS[layout])
    _compare.assert_trees_within(after, expected, 1e-5, layout)


@pytest.mark.parametrize(("composition", "layout", "kind"), EVERY_RUN, ids=str)
def test_devices_change_nothing(composition, layout, kind):
    check(composition, layout, kind)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("composition", "layout", "kind"),
    [case for case in ALL if case not in EVERY_RUN],
    ids=str,
)
def test_devices_change_nothing_in_any_layout(composition, layout, kind):
    check(composition, layout, kind)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_leaves_of_one_shape_may_lie_in_different_ways(kind):
    layouts = ("replicated", "rows", "columns")
    params = {name: placing(name, kind)(jnp.ones((8, 16, 16))) for name in layouts}
    routing = fo.Routing(stacked=layouts, min_dim=8)
    state = jax.jit(fo.fusion_opt(1e-2, routing=routing).init)(params)
    (z,) = optax.tree.get_all_with_path(state, "z")
    (trace,) = optax.tree.get_all_with_path(state, "trace")
    for tree in (z[1], trace[1]):
        for name, leaf in tree.items():
            assert leaf.sharding.is_equivalent_to(params[name].sharding, 3), name


# What crosses between devices in one step, for a stack that they share evenly: its
# momentum (and, where factors learn from it, its gradient, both at once) on the way in,
# its direction on the way out. The factors never move. Replicated operands are at hand;
# layers divided among devices stay where they are.
EXCHANGES = {
    "replicated": {"all-gather": 1},
    "rows": {"all-to-all": 2},
    "columns": {"all-to-all": 2},
    "layers": {},
    # Over one axis after the other.
    "two_axes": {"all-to-all": 4},
}


@pytest.mark.parametrize(
    ("composition", "layout", "kind"),
    [
        pytest.param(
            *(composition, layout, kind),
            marks=[]
            if (composition, layout, kind) == ("full", "rows", AxisType.Auto)
            else pytest.mark.exhaustive,
        )
        for composition in COMPOSITIONS
        for layout in EXCHANGES
        for kind in (AxisType.Auto, AxisType.Explicit)
    ],
    ids=str,
)
def test_a_stack_crosses_once_each_way(composition, layout, kind):
    tx = fo.fusion_opt(
        1e-2,
        routing=fo.Routing(stacked=("layers",), min_dim=8),
        **COMPOSITIONS[composition],
    )
    params = {"layers": placing(layout, kind)(start()[0]["layers"])}
    step, _ = compiled(tx, params)
    assert _hlo.exchanges(step.as_text()) == EXCHANGES[layout]


FEW_BITS = [
    pytest.param(
        *(layout, kind),
        marks=[]
        if (layout, kind) == ("columns", AxisType.Auto)
        else pytest.mark.exhaustive,
    )
    for layout in EXCHANGES
    for kind in (AxisType.Auto, AxisType.Explicit)
]


@pytest.mark.parametrize(("layout", "kind"), FEW_BITS, ids=str)
def test_a_momentum_in_few_bits_crosses_nothing(layout, kind):
    """Nor does it move: blocks and their scales lie as the parameters do."""
    tx = fo.fusion_opt(
        1e-2, routing=fo.Routing(stacked=("layers",), min_dim=8), state_dtype="int8"
    )
    params = {"layers": placing(layout, kind)(jnp.ones((8, 8, 1024)))}
    step, state = compiled(tx, params)
    assert _hlo.exchanges(step.as_text()) == EXCHANGES[layout]
    codes = optax.tree.get(state, "trace")["layers"]
    scales = optax.tree.get(state, "trace_scales")["layers"]
    assert (codes.dtype, scales.shape) == (jnp.int8, (8, 8, 8))
    share = 1 if layout == "replicated" else 8
    for array in (codes, scales):
        assert array.sharding.is_equivalent_to(params["layers"].sharding, 3)
        assert array.addressable_shards[0].data.size * share == array.size
    after = jax.block_until_ready(step(params, state, params))
    assert not moved(after, (params, state))
    # Without a compiled `init` too.
    for array, own in zip(
        jax.tree.leaves(tx.init(params)), jax.tree.leaves(state), strict=True
    ):
        assert array.sharding.is_equivalent_to(own.sharding, array.ndim)


@pytest.mark.parametrize(("layout", "kind"), FEW_BITS, ids=str)
def test_devices_round_alike(layout, kind):
    """Bit for bit, since chance and scale depend on the entries and places alone."""
    rng = np.random.default_rng(5)
    history = rng.normal(size=(3, 8, 16, 1024)).astype(np.float32)

    def run(place):
        tx = fo.quantize_state(optax.scale_by_adam(), {"mu": "int8", "nu": "bf16"})
        state = tx.init({"w": place(jnp.zeros(history.shape[1:]))})
        update = jax.jit(tx.update)
        for gradients in history:
            _, state = jax.block_until_ready(update({"w": place(gradients)}, state))
        return state

    alone, spread = run(jnp.asarray), run(placing(layout, kind))
    for ours, theirs in zip(
        jax.tree.leaves(spread), jax.tree.leaves(alone), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_collectives_in_loops_are_found():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    rows = jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh, P("x", None)))

    def squared(_, matrix):
        return jax.lax.cond(matrix[0, 0] > 0, lambda: matrix @ matrix, lambda: matrix)

    looped = jax.jit(lambda rows: jax.lax.fori_loop(0, 3, squared, rows))
    assert _hlo.in_loops(looped.lower(rows).compile().as_text())
    once = jax.jit(lambda rows: squared(0, rows)).lower(rows).compile().as_text()
    assert _hlo.in_loops(once) == []
    assert _hlo.computations(once)["ENTRY"]


def test_exchanges_that_wait_for_each_other_are_counted():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    specs = P("x"), P(None, "x"), P(None, None, "x"), P("x")
    first, *rest = (NamedSharding(mesh, spec) for spec in specs)

    def turned(stack):
        for sharding in rest:
            stack = jax.lax.with_sharding_constraint(jnp.sin(stack), sharding)
        return stack

    stacks = [jax.device_put(jnp.ones((8, 8, 8)), first)] * 2
    both = jax.jit(lambda stacks: jax.tree.map(turned, stacks)).lower(stacks)
    assert _hlo.exchanges_in_turn(both.compile().as_text()) == 3


EIGHTHS = [
    (factory, layout, kind, jitted)
    for factory in (fo.kl_shampoo, fo.shampoo)
    for layout in ("replicated", "two_axes")
    for kind in (AxisType.Auto, AxisType.Explicit)
    for jitted in (True, False)
]
EIGHTHS_EVERY_RUN = [
    (fo.kl_shampoo, "two_axes", AxisType.Explicit, True),
    (fo.shampoo, "two_axes", AxisType.Auto, True),
]


@pytest.mark.parametrize(
    ("factory", "layout", "kind", "jitted"),
    [
        pytest.param(
            *case,
            id=f"{case[0].__name__}-{case[1]}-{case[2].name}-{case[3]}",
            marks=[] if case in EIGHTHS_EVERY_RUN else pytest.mark.exhaustive,
        )
        for case in EIGHTHS
    ],
)
def test_each_device_holds_an_eighth_of_the_factors(factory, layout, kind, jitted):
    shapes = {"layers": (8, 8, 16), "odd": (3, 16, 16), "single": (16, 16)}
    place = placing(layout, kind)
    params = {name: place(jnp.ones(shape)) for name, shape in shapes.items()}
    tx = factory(routing=ROUTING, sides="both")
    state = (jax.jit(tx.init) if jitted else tx.init)(params)
    alone = tx.init({name: jnp.ones(shape) for name, shape in shapes.items()})
    factors, whole = jax.tree.leaves(state[1:-1]), jax.tree.leaves(alone[1:-1])
    assert len(factors) == len(whole) == 3 * 2 * (len(state[1:-1]) // 2)
    for part, all_of_it in zip(factors, whole, strict=True):
        # A checkpoint knows nothing of the devices.
        np.testing.assert_array_equal(part, all_of_it)
        for shard in part.addressable_shards:
            assert shard.data.nbytes * 8 == all_of_it.nbytes


@pytest.mark.parametrize(
    "layout", ["rows", pytest.param("layers", marks=pytest.mark.exhaustive)]
)
def test_a_step_needs_an_eighth_of_the_memory_and_a_bucket(layout):
    shapes = {"narrow": (16, 64, 64), "wide": (16, 64, 128)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    routing = fo.Routing(stacked=tuple(shapes), min_dim=8)

    def temporary(tx, params):
        step, _ = compiled(optax.with_extra_args_support(tx), params)
        return step.memory_analysis().temp_size_in_bytes

    optimizer = fo.fusion_opt(1e-2, routing=routing)
    alone = temporary(optimizer, params)
    params = jax.tree.map(placing(layout, AxisType.Auto), params)
    # A device's share of the largest bucket, and all that the iteration makes of it.
    wide = {"wide": params["wide"]}
    bucket = temporary(fo.ns5(routing=fo.Routing(stacked=["wide"], min_dim=8)), wide)
    assert temporary(optimizer, params) <= alone / 8 + bucket


def test_what_divides_a_leaf():
    leaf = jax.ShapeDtypeStruct((3, 16, 16), jnp.float32)
    assert spec("rows", leaf) == P(None, "x", None)
    assert spec("two_axes", leaf) == P(None, "x", "y")
    # Three layers can't be divided among eight devices.
    assert spec("layers", leaf) == P(None, None, None)
    assert spec("columns", jax.ShapeDtypeStruct((16,), jnp.float32)) == P(None)
