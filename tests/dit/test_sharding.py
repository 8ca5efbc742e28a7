"""A DiT on eight devices: where its parameters lie, and the numbers of one device."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fusionopt_jax as fo
from fusionopt_jax import dit
from fusionopt_jax._paths import named_leaves
from fusionopt_jax.dit import sharding
from fusionopt_jax.dit.routing import ROUTING
from tests import _compare

CONFIG = dit.DiTConfig(
    input_size=4,
    in_channels=4,
    hidden_size=32,
    depth=2,
    num_heads=4,
    num_classes=7,
    learn_sigma=False,
)
SHAPES = jax.eval_shape(lambda: dit.init_params(CONFIG))
MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 4},
    "data_fsdp": {"data": 2, "fsdp": 4},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
}
EVERY_RUN = "data_fsdp"


def mesh_of(sizes, kind=AxisType.Auto):
    count = int(np.prod(list(sizes.values())))
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(kind,) * len(sizes),
        devices=jax.devices()[:count],
    )


def specs(sizes, rules=None, params=SHAPES):
    placed = dit.shardings(params, mesh_of(sizes), rules)
    return {name: leaf.spec for name, leaf in named_leaves(placed)}


def test_every_parameter_has_logical_axes():
    expected = {name: len(leaf.shape) for name, leaf in named_leaves(SHAPES)}
    assert expected == {name: len(axes) for name, axes in sharding.LOGICAL_AXES.items()}


def test_data_keeps_every_parameter_whole():
    assert {axis for spec in specs({"data": 8}).values() for axis in spec} == {None}
    assert dit.batch_sharding(mesh_of({"data": 8})).spec == P(("data",))


def test_fsdp_divides_every_matrix():
    found = specs({"fsdp": 8})
    undivided = {name for name, spec in found.items() if "fsdp" not in spec}
    # The docstring of `RULES` lists them: biases that are not as wide as the network.
    assert undivided == {
        "t_embedder/fc1/bias",
        "blocks/attn/qkv/bias",
        "blocks/mlp/fc1/bias",
        "blocks/adaLN_modulation/bias",
        "final_layer/adaLN_modulation/bias",
        "final_layer/linear/bias",
    }
    assert found["blocks/attn/proj/kernel"] == P(None, None, "fsdp")


def test_tensor_divides_what_a_block_computes_inside():
    found = specs({"tensor": 4})
    assert found["blocks/mlp/fc1/kernel"] == P(None, None, "tensor")
    assert found["blocks/mlp/fc2/kernel"] == P(None, "tensor", None)
    assert found["blocks/attn/qkv/bias"] == P(None, "tensor")
    assert found["x_embedder/proj/kernel"] == P(None, None)
    assert dit.batch_sharding(mesh_of({"tensor": 4})).spec == P(None)


def test_rules_join_by_the_names_of_the_axes():
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    found = specs(sizes)
    assert found["blocks/mlp/fc1/kernel"] == P(None, "fsdp", "tensor")
    assert dit.batch_sharding(mesh_of(sizes)).spec == P(("data", "fsdp"))
    assert found == specs(sizes, dit.joined_rules("data", "fsdp", "tensor"))


def test_own_rules_say_what_is_whole():
    found = specs({"x": 2, "y": 2}, {"mlp": ("x", "y"), "embed": None})
    assert found["blocks/mlp/fc1/kernel"] == P(None, None, ("x", "y"))
    assert found["blocks/attn/proj/kernel"] == P(None, None, None)


def test_configs_states_and_stripped_parameters_are_served():
    mesh = mesh_of({"fsdp": 8})
    placed = dit.shardings(CONFIG, mesh)
    assert placed == dit.shardings(SHAPES, mesh)
    model = nnx.eval_shape(lambda: dit.DiT(CONFIG, rngs=nnx.Rngs(0)))
    state = dit.shardings(nnx.state(model, nnx.Param), mesh)
    assert isinstance(state, nnx.State)
    assert nnx.to_pure_dict(state) == placed
    digests = {"adaLN_modulation": {"fingerprint": np.zeros((2, 2), np.uint32)}}
    stripped = SHAPES | {"final_layer": {"linear": SHAPES["final_layer"]["linear"]}}
    stripped["final_layer"] |= digests
    found = specs({"fsdp": 8}, params=stripped)
    assert found["final_layer/adaLN_modulation/fingerprint"] == P(None, None)


ODD = dataclasses.replace(CONFIG, hidden_size=36)


@pytest.mark.parametrize(
    ("params", "sizes", "rules", "expected"),
    [
        (ODD, {"x": 8}, {"embed": "x"}, r"proj/bias float32\[2, 36\]: 'embed' is "),
        (ODD, {"fsdp": 8}, None, r"'condition' None in `rules` to keep it whole"),
        (CONFIG, {"fdsp": 8}, None, r"no ready rules.*'fdsp'.*Did you mean 'fsdp'"),
        (CONFIG, {"x": 8}, {"mlp": "y"}, r"'mlp' by the mesh axis 'y'; the mesh has"),
        (CONFIG, {"x": 8}, {"mpl": "x"}, r"logical axis 'mpl'.*Did you mean 'mlp'"),
        (CONFIG, {"x": 8}, {"embed": "x", "mlp": "x"}, r"can't divide both"),
        ({"lora": SHAPES["x_embedder"]}, {"data": 8}, None, r"lora/proj/bias.*no p"),
        ({"x_embedder": {"proj": {"bias": SHAPES["x_embedder"]["proj"]["kernel"]}}},
         {"data": 8}, None, r"no parameter of a DiT, whose axes are embed"),
    ],
)  # fmt: skip
def test_what_can_not_be_divided_is_named(params, sizes, rules, expected):
    with pytest.raises(ValueError, match=expected):
        dit.shardings(params, mesh_of(sizes), rules)


def test_an_explicit_mesh_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"axis_types=\(AxisType\.Auto,\)"):
        dit.shardings(CONFIG, mesh_of({"data": 8}, AxisType.Explicit))


def test_the_state_lies_like_its_parameters():
    mesh = mesh_of({"fsdp": 8})
    placed = dit.shardings(CONFIG, mesh)
    params = jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
        SHAPES,
        placed,
    )
    tx = fo.fusion_opt(1e-4, routing=routing())
    state = jax.eval_shape(tx.init, params)
    found = dit.state_shardings(state, params)
    shapes = {leaf.shape for leaf in jax.tree.leaves(SHAPES)}
    table = {name: leaf for name, leaf in named_leaves(found)}
    divided = {name for name, leaf in table.items() if "fsdp" in leaf.spec}
    # Every moment and fast iterate of the divided parameters, and nothing else.
    wanted = {name for name, leaf in named_leaves(placed) if "fsdp" in leaf.spec}
    assert {name for name in wanted if any(n.endswith(name) for n in divided)} == wanted
    assert all(leaf.shape in shapes for n, leaf in named_leaves(state) if n in divided)
    assert table[next(name for name in table if "count" in name)].spec == P()
    with pytest.raises(ValueError, match="is not on a mesh; place the parameters"):
        dit.state_shardings(state, jax.device_put(dit.init_params(CONFIG)))


def routing():
    """The model's own, for kernels as small as these."""
    return dataclasses.replace(ROUTING, min_dim=8)


def trained(sizes):
    """Loss, gradient, parameters and state of one step on a mesh, or on one device."""
    # A low rate: SF-NorMuon and Adam normalise what is rounding noise, such as the
    # gradient of the bias of the keys, and the rate then scales its difference.
    tx = fo.fusion_opt(1e-4, routing=routing())
    rng = np.random.default_rng(3)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    # A fresh model's modulators are zero, and so is most of its gradient.
    params = jax.tree.map(lambda leaf: 0.1 * draw(*leaf.shape), SHAPES)
    images, labels = draw(8, 4, 4, 4), np.arange(8, dtype=np.int32) % 7
    places = {}
    state_at = None
    if sizes is not None:
        mesh = mesh_of(sizes)
        whole, params_at = NamedSharding(mesh, P()), dit.shardings(CONFIG, mesh)
        params = jax.device_put(params, params_at)
        images, labels = jax.device_put((images, labels), dit.batch_sharding(mesh))
        state_at = dit.state_shardings(jax.eval_shape(tx.init, params), params)
        places = {"out_shardings": (whole, params_at, params_at, state_at)}
    state = jax.jit(tx.init, out_shardings=state_at)(params)

    @functools.partial(jax.jit, **places)
    def step(params, state, images, labels):
        loss, grads = jax.value_and_grad(dit.rectified_flow_loss)(
            params, CONFIG, images, labels, jax.random.key(5)
        )
        updates, state = tx.update(grads, state, params, value=loss)
        return loss, grads, optax.apply_updates(params, updates), state

    results = jax.block_until_ready(step(params, state, images, labels))
    return jax.tree.map(np.asarray, (params, *results))


@functools.cache
def trained_on_one_device():
    return trained(None)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == EVERY_RUN else [pytest.mark.exhaustive])
        for name in MESHES
    ],
)
def test_a_step_on_a_mesh_is_that_of_one_device(name):
    before, loss, grads, params, state = trained(MESHES[name])
    _, *expected = trained_on_one_device()
    # Sums over eight images and 32 features in another order: a few units of the last
    # of 24 bits, of a loss near 2 and of gradients whose entries are below 1.
    _compare.assert_trees_within((loss, grads), tuple(expected[:2]), 2e-6, name)
    # The step moves the weights by ten times as much and more.
    _compare.assert_trees_within((params, state), tuple(expected[2:]), 1e-5, name)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, params)
    assert min(jax.tree.leaves(moved)) >= 5e-5
