"""Matrices on several devices: whole in an iteration, exchanged before and after."""

import collections
import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fusionopt_jax as fo
from tests import _compare

COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)"
    r"(?:-start)?\("
)
ROUTING = fo.Routing(stacked=("layers", "odd"), min_dim=8)
# A stack that 8 devices share evenly, one that they don't, and single matrices.
SHAPES = {
    "layers": (8, 16, 32),
    "odd": (3, 32, 16),
    "single": (16, 24),
    "bias": (16,),
}
FULLY_SHARDED = {
    "layers": P(None, "x", None),
    "odd": P(None, "x", None),
    "single": P("x", None),
    "bias": P("x"),
}
REPLICATED = {name: P() for name in SHAPES}

KINDS = [AxisType.Auto, AxisType.Explicit]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def mesh_of(kind, devices=8):
    return jax.make_mesh(
        (devices,), ("x",), axis_types=(kind,), devices=jax.devices()[:devices]
    )


def drawn(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32)
        for name, shape in shapes.items()
    }


def placed(tree, mesh, specs):
    return {
        name: jax.device_put(leaf, NamedSharding(mesh, specs[name]))
        for name, leaf in tree.items()
    }


def stepped(tx, params):
    """A compiled step from parameters to parameters."""

    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step).lower(params, tx.init(params), params).compile()


def collectives(program):
    """Those outside of all loops and branches, and those inside."""
    outside, inside = collections.Counter(), collections.Counter()
    for computation in re.split(r"\n(?=%|ENTRY)", program.as_text() or ""):
        found = COLLECTIVE.findall(computation)
        (outside if computation.startswith("ENTRY") else inside).update(found)
    return dict(outside), dict(inside)


@functools.cache
def composition(*more):
    """SF-NorMuon with more components."""
    components = {"ns5", "normuon", "sf", *more}
    return fo.fusion_opt(1e-3, components=components, routing=ROUTING, polyak_rule=None)


@kinds
@pytest.mark.parametrize(
    ("more", "specs"),
    [
        pytest.param((), FULLY_SHARDED, id="sf-normuon-fsdp"),
        pytest.param((), REPLICATED, id="sf-normuon-dp"),
        pytest.param(("shampoo",), FULLY_SHARDED, id="shampoo-fsdp"),
        pytest.param(
            *(("shampoo",), REPLICATED),
            id="shampoo-dp",
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_no_device_waits_for_another_inside_a_loop(more, specs, kind):
    params = placed(drawn(SHAPES), mesh_of(kind), specs)
    _, inside = collectives(stepped(composition(*more), params))
    assert inside == {}


@kinds
@pytest.mark.parametrize("layers", [16, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_a_loop_over_matrices_is_one_of_each_device(layers, kind):
    specs = {"layers": FULLY_SHARDED["layers"]}
    params = placed(drawn({"layers": (layers, 16, 32)}), mesh_of(kind), specs)
    program = stepped(fo.ns5(routing=STACKED, bucketing="loop"), params)
    assert collectives(program) == ({"all-to-all": 2}, {})


STACKED = fo.Routing(min_dim=8, stacked=("layers",))


@kinds
@pytest.mark.parametrize("layers", [8, 3], ids=["divisible", "padded"])
def test_a_fully_sharded_stack_is_exchanged_once_each_way(layers, kind):
    specs = {"layers": FULLY_SHARDED["layers"]}
    params = placed(drawn({"layers": (layers, 16, 32)}), mesh_of(kind), specs)
    program = stepped(fo.ns5(routing=STACKED), params)
    assert collectives(program) == ({"all-to-all": 2}, {})


@kinds
@pytest.mark.parametrize("layers", [8, 3], ids=["divisible", "padded"])
def test_replicated_matrices_are_shared_out_and_collected_once(layers, kind):
    params = placed(drawn({"layers": (layers, 16, 32)}), mesh_of(kind), {"layers": P()})
    outside, inside = collectives(stepped(fo.ns5(routing=STACKED), params))
    # What lacks a share is collected by a sum of shares and zeros.
    assert sum(outside.values()) == 1
    assert set(outside) <= {"all-gather", "all-reduce"}
    assert inside == {}


@kinds
@pytest.mark.parametrize("specs", [FULLY_SHARDED, REPLICATED], ids=["fsdp", "dp"])
def test_parameters_stay_where_they_are(specs, kind):
    params = placed(drawn(SHAPES), mesh_of(kind), specs)
    shardings = stepped(composition(), params).output_shardings[0]
    for name, leaf in params.items():
        assert leaf.sharding.is_equivalent_to(shardings[name], leaf.ndim), name


def test_each_device_iterates_on_its_share():
    """The program of one device multiplies one of eight matrices."""
    shapes = {"layers": SHAPES["layers"]}
    params = placed(drawn(shapes), mesh_of(AxisType.Auto), {"layers": P()})
    tx = fo.ns5(routing=STACKED)
    step = jax.jit(lambda grads: tx.update(grads, tx.init(grads))[0])
    text = step.lower(params).compile().as_text() or ""
    products = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", text)
    assert products
    assert {
        int(shape.split(",")[0]) for shape in products if shape.count(",") == 2
    } <= {1}


@kinds
@pytest.mark.parametrize("specs", [FULLY_SHARDED, REPLICATED], ids=["fsdp", "dp"])
@pytest.mark.parametrize(
    "jitted",
    [True, pytest.param(False, marks=pytest.mark.exhaustive)],
    ids=["jitted", "eager"],
)
def test_devices_change_nothing(specs, kind, jitted):
    params, grads = drawn(SHAPES), drawn(SHAPES, seed=1)
    tx = composition()
    expected, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    mesh = mesh_of(kind, devices=2)
    params, grads = (placed(tree, mesh, specs) for tree in (params, grads))
    update = jax.jit(tx.update) if jitted else tx.update
    updates, _ = update(grads, tx.init(params), params)
    # Another program for the same numbers.
    _compare.assert_trees_within(updates, expected, 2e-5)


@kinds
@pytest.mark.parametrize("specs", [P(None, "x"), P("x"), P()], ids=str)
def test_devices_change_nothing_for_unequal_parts(specs, kind):
    routing = fo.Routing([fo.Rule("qkv", "spectral", chunks=(16, 8, 8))])
    tx = fo.snr_gate(
        optax.chain(fo.ns5(routing=routing), fo.normuon(routing=routing)),
        routing=routing,
    )
    grads = drawn({"qkv": (12, 32)})
    expected, state = jax.jit(tx.update)(grads, tx.init(grads))
    sharded = placed(grads, mesh_of(kind, devices=2), {"qkv": specs})
    updates, same = jax.jit(tx.update)(sharded, tx.init(sharded))
    # Another program for the same numbers.
    _compare.assert_trees_within(updates, expected, 2e-5)
    chex.assert_trees_all_equal_shapes_and_dtypes(same, state)


TWO_AXES = {"x": 4, "y": 2}
SPLITS = [
    P(None, "x", "y"),
    P(None, ("x", "y"), None),
    P(None, "x"),
    P(None, None, "y"),
]
TWO_AXES_CASES = [
    (split, layers, kind) for split in SPLITS for layers in (8, 3) for kind in KINDS
]
# Every split, a stack that is filled up, and an explicit mesh.
TWO_AXES_EVERY_RUN = [
    *((split, 8, AxisType.Auto) for split in SPLITS),
    (SPLITS[0], 3, AxisType.Explicit),
]


def check_two_axes(split, layers, kind):
    """No device ever holds more of the stack than it does of the leaf."""
    sizes, names = tuple(TWO_AXES.values()), tuple(TWO_AXES)
    mesh = jax.make_mesh(sizes, names, axis_types=(kind, kind))
    params = placed(drawn({"layers": (layers, 16, 32)}), mesh, {"layers": split})
    program = stepped(fo.ns5(routing=STACKED), params)
    outside, inside = collectives(program)
    assert inside == {}
    _, rows, columns = params["layers"].sharding.shard_shape((layers, 16, 32))
    if rows * columns == 16 * 32 / 8:
        # One exchange over each axis, each way.
        assert outside == {"all-to-all": 4}
    filled = -(-layers // mesh.size) * mesh.size
    assert largest_array(program) <= filled * rows * columns


@pytest.mark.parametrize(("split", "layers", "kind"), TWO_AXES_EVERY_RUN, ids=str)
def test_a_mesh_of_two_axes_never_copies_a_stack(split, layers, kind):
    check_two_axes(split, layers, kind)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("split", "layers", "kind"),
    [case for case in TWO_AXES_CASES if case not in TWO_AXES_EVERY_RUN],
    ids=str,
)
def test_no_mesh_of_two_axes_copies_a_stack(split, layers, kind):
    check_two_axes(split, layers, kind)


def largest_array(program):
    """Numbers in the largest array of a device."""
    shapes = re.findall(r"\bf32\[([\d,]+)\]", program.as_text() or "")
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def test_a_copied_stack_would_be_found():
    mesh = mesh_of(AxisType.Auto)
    params = placed(drawn({"layers": (8, 16, 32)}), mesh, FULLY_SHARDED)
    copy = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))
    assert largest_array(copy.lower(params).compile()) == 8 * 16 * 32


INSTRUCTION = re.compile(r"^\s*(?:ROOT )?(%[\w.\-]+) = .*? ([a-z\-]+)\((.*)$")


def waits(program):
    """Kind of each instruction, and the loops that have to end before it starts."""
    text = program.as_text() or ""
    found = {}
    for line in text[text.index("\nENTRY") :].splitlines():
        if match := INSTRUCTION.match(line):
            name, kind, rest = match.groups()
            # Operands, and what a schedule was told to put before it.
            needed = [
                other for other in re.findall(r"%[\w.\-]+", rest) if other in found
            ]
            loops = set().union(*(found[other][1] for other in needed))
            loops |= {other for other in needed if found[other][0] == "while"}
            found[name] = kind, loops
    return found


THREE_BUCKETS = {"a": (8, 16, 64), "b": (8, 16, 16), "c": (8, 16, 32)}


@pytest.mark.parametrize(
    ("more", "kind"),
    [
        ((), AxisType.Auto),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in (((), AxisType.Explicit), (("mona",), AxisType.Auto))
        ),
    ],
    ids=str,
)
def test_buckets_wait_for_no_other_bucket(more, kind):
    """So that one is exchanged while another is computed."""
    specs = dict.fromkeys(THREE_BUCKETS, P(None, "x", None))
    params = placed(drawn(THREE_BUCKETS), mesh_of(kind), specs)
    tx = fo.fusion_opt(
        1e-3,
        components={"ns5", "normuon", "sf", *more},
        routing=fo.Routing(min_dim=8, stacked=tuple(THREE_BUCKETS)),
        polyak_rule=None,
    )
    found = list(waits(stepped(tx, params)).values())
    assert [loops for kind, loops in found if kind == "while"] == [set()] * 3
    exchanges = [loops for kind, loops in found if kind == "all-to-all"]
    # Those on the way in wait for no loop, those on the way back for their own alone.
    assert {len(loops) for loops in exchanges} == {0, 1}
    assert len(set().union(*exchanges)) == 3


def test_a_bucket_that_waits_would_be_found():
    def loop(x):
        return jax.lax.fori_loop(0, 7, lambda _, x: jnp.tanh(x @ x), x)

    waiting = jax.jit(lambda x, y: loop(loop(x) + y))
    found = waits(waiting.lower(jnp.eye(8), jnp.eye(8)).compile()).values()
    assert sorted(len(loops) for kind, loops in found if kind == "while") == [0, 1]


def test_an_update_may_be_inside_of_shard_map():
    params, grads = drawn(SHAPES), drawn(SHAPES, seed=1)
    tx = composition()
    expected, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    mesh = mesh_of(AxisType.Auto, devices=2)
    inside = jax.shard_map(
        lambda grads, params: tx.update(grads, tx.init(params), params)[0],
        mesh=mesh,
        in_specs=P(),
        out_specs=P(),
    )
    _compare.assert_trees_within(jax.jit(inside)(grads, params), expected, 2e-5)
