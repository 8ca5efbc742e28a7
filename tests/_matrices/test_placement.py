"""Matrices on several devices: whole in an iteration, exchanged before and after."""

import collections
import functools
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
