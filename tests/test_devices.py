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
from tests import _compare

STEPS = 20
ROUTING = fo.Routing(stacked=("layers", "odd"), min_dim=8)
# Stacks that eight devices share evenly and unevenly, single matrices, a vector.
SHAPES = {"layers": (8, 8, 16), "odd": (3, 16, 16), "single": (16, 8), "bias": (16,)}

COMPOSITIONS = {
    "sf_normuon": {"components": ("ns5", "normuon", "sf")},
    "mona": {"components": ("ns5", "normuon", "sf", "mona")},
    "kl_shampoo_10": {"components": ("ns5", "normuon", "sf", "shampoo")},
    "kl_shampoo_1": {
        "components": ("ns5", "normuon", "sf", "shampoo"),
        "settings": {"shampoo": {"b2": 0.9, "update_every": 1}},
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
EVERY_RUN = [
    ("sf_normuon", "rows", AxisType.Explicit),
    ("kl_shampoo_1", "two_axes", AxisType.Auto),
]


def spec(layout, leaf):
    """How a leaf is divided: from its last axis back, where the axis can be."""
    sizes, wanted = LAYOUTS[layout]
    if leaf.ndim < max(2, len(wanted)):
        return P()
    axes = (None,) * (leaf.ndim - len(wanted)) + wanted
    divides = lambda size, axis: axis is None or size % sizes[axis] == 0  # noqa: E731
    return P(
        *(
            axis if divides(size, axis) else None
            for size, axis in zip(leaf.shape, axes, strict=True)
        )
    )


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


def run(composition, place):
    """Parameters, and their average, after all steps of gradients that follow them."""
    tx = fo.fusion_opt(1e-2, routing=ROUTING, **COMPOSITIONS[composition])
    params, noise = start()
    params = jax.tree.map(place, params)
    state = jax.jit(tx.init)(params)

    @jax.jit
    def step(params, state, noise):
        grads = jax.tree.map(lambda p, n: p + n, params, noise)
        updates, state = tx.update(grads, state, params, value=jnp.float32(1.0))
        return optax.apply_updates(params, updates), state

    for i in range(STEPS):
        drawn = jax.tree.map(lambda stack, i=i: place(stack[i]), noise)
        # Programs of several forced host devices share few threads: one at a time.
        params, state = jax.block_until_ready(step(params, state, drawn))
    return jax.tree.map(np.asarray, (params, fo.eval_params(state, params)))


@functools.cache
def on_one_device(composition):
    return run(composition, jnp.asarray)


def check(composition, layout, kind):
    sizes, _ = LAYOUTS[layout]
    mesh = jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes)
    )

    def place(leaf):
        return jax.device_put(leaf, NamedSharding(mesh, spec(layout, leaf)))

    expected = on_one_device(composition)
    # What a user may expect of twenty steps in float32: entries are near 1, each step
    # moves them by 0.01, and sums are taken in another order.
    _compare.assert_trees_within(run(composition, place), expected, 1e-5, layout)


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


def test_what_divides_a_leaf():
    leaf = jax.ShapeDtypeStruct((3, 16, 16), jnp.float32)
    assert spec("rows", leaf) == P(None, "x", None)
    assert spec("two_axes", leaf) == P(None, "x", "y")
    # Three layers can't be divided among eight devices.
    assert spec("layers", leaf) == P(None, None, None)
    assert spec("columns", jax.ShapeDtypeStruct((16,), jnp.float32)) == P()
