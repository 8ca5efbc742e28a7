"""The programs for GPUs and TPUs, read on whatever machine this is.

A program is made for the platform that it is compiled for, not for the one that traces
it. Nothing is compiled here, and nothing runs.
"""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import fusionopt_jax as fo
from tests import _stablehlo

HALF = {"cuda": "f16", "rocm": "f16", "tpu": "bf16"}
ROUTING = fo.Routing(
    [fo.Rule("qkv", "spectral", chunks=3)], min_dim=16, stacked=("blocks",)
)
WIDTH, DEPTH = 32, 4


def parameters(depth=DEPTH):
    """Shapes of stacked layers and of single matrices; tall, wide and square."""
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)  # noqa: E731
    return {
        "blocks": {
            "qkv": shape(depth, WIDTH, 3 * WIDTH),
            "up": shape(depth, WIDTH, 2 * WIDTH),
            "down": shape(depth, 2 * WIDTH, WIDTH),
            "bias": shape(depth, WIDTH),
        },
        "first": shape(WIDTH, 4 * WIDTH),
        "last": shape(4 * WIDTH, WIDTH),
    }


def step_of(optimizer, params, platform):
    """The program of a whole step."""
    optimizer = optax.with_extra_args_support(optimizer)

    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params, value=jnp.float32(1))
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(optimizer.init, params)
    return _stablehlo.program(step, params, state, params, platform=platform)


@functools.cache
def sf_normuon(platform, depth=DEPTH):
    optimizer = fo.fusion_opt(1e-3, routing=ROUTING)
    return step_of(optimizer, parameters(depth), platform)


@pytest.mark.parametrize("platform", HALF)
def test_accelerators_multiply_half_precision_in_batches(platform):
    found = _stablehlo.products(sf_normuon(platform))
    assert found
    for left, right, result in found:
        assert left.dtype == right.dtype == HALF[platform]
        assert result.dtype == "f32"
    # All layers at once, with their three chunks; both single matrices of one shape.
    sizes = {result.shape[0] for _, _, result in found}
    assert sizes == {3 * DEPTH, DEPTH, 2}


@pytest.mark.parametrize(
    "platform", ["cuda", pytest.param("tpu", marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize("make", [fo.ns5, fo.kl_shampoo], ids=["ns5", "kl_shampoo"])
def test_stacks_of_layers_are_never_joined(make, platform):
    """Tall and wide ones of a shape would be, but the copies are two passes."""
    layers = {name: parameters()["blocks"][name] for name in ("up", "down")}
    singles = {name: parameters()[name] for name in ("first", "last")}

    def joined(params):
        text = step_of(make(routing=ROUTING), params, platform)
        # Symmetric factors are unpacked from halves where they are renewed.
        return [
            operation
            for operation in _stablehlo.operations(text)
            if operation.kind == "concatenate" and not operation.inside
        ]

    assert joined({"blocks": layers}) == []
    assert joined(singles)


def test_cpus_multiply_fp32_one_matrix_at_a_time():
    found = _stablehlo.products(sf_normuon("cpu"))
    assert {(tensor.shape[0], tensor.dtype) for dot in found for tensor in dot} == {
        (1, "f32")
    }


@pytest.mark.parametrize("platform", ["cpu", *HALF])
def test_a_step_calls_no_library_and_no_host(platform):
    assert _stablehlo.custom_calls(sf_normuon(platform)) == []


@pytest.mark.parametrize(
    "platform", ["cuda", pytest.param("tpu", marks=pytest.mark.exhaustive)]
)
def test_depth_adds_no_loop_and_no_product_on_accelerators(platform):
    shallow, deep = (sf_normuon(platform, depth) for depth in (DEPTH, 3 * DEPTH))
    for kind in ("while", "dot_general", "concatenate"):
        assert _stablehlo.count(shallow, kind) == _stablehlo.count(deep, kind), kind


def test_only_cpus_loop_over_matrices():
    """One over the layers of each leaf, and one over the chunks of one of them."""
    params = {name: parameters()["blocks"][name] for name in ("qkv", "up")}
    tx = fo.ns5(routing=ROUTING, hot_dtype="fp32")
    loops = {
        platform: _stablehlo.count(step_of(tx, {"blocks": params}, platform), "while")
        for platform in ("cpu", "cuda", "tpu")
    }
    assert loops["cuda"] == loops["tpu"]
    assert loops["cpu"] == loops["cuda"] + 3


@pytest.mark.parametrize(
    "platform",
    [
        "cuda",
        *(pytest.param(p, marks=pytest.mark.exhaustive) for p in ("cpu", "tpu")),
    ],
)
def test_bases_are_renewed_by_products_and_where_they_are_due(platform):
    """Whatever library is called for that, a step that renews nothing calls none."""
    optimizer = fo.fusion_opt(
        1e-3,
        components=("shampoo", "ns5", "normuon", "sf"),
        routing=ROUTING,
    )
    text = step_of(optimizer, parameters(), platform)
    calls = _stablehlo.custom_calls(text)
    assert [name for name, inside in calls if not inside] == []
    if platform == "cuda":
        assert {name for name, _ in calls} == {"cusolver_potrf_ffi"}
    else:
        assert calls == []
    # Gram–Schmidt goes through the columns; elsewhere it is what is left when the
    # product of the columns breaks down.
    assert (_stablehlo.count(text, "cholesky") > 0) == (platform == "tpu")


@pytest.mark.parametrize(
    "platform",
    ["cuda", *(pytest.param(p, marks=pytest.mark.exhaustive) for p in ("cpu", "tpu"))],
)
def test_a_forced_setting_is_the_same_everywhere(platform):
    tx = fo.ns5(routing=ROUTING, hot_dtype="bf16", bucketing="loop")
    params = {"blocks": {"up": parameters()["blocks"]["up"]}}
    found = _stablehlo.products(step_of(tx, params, platform))
    # CPUs multiply fp32 that was rounded to what bf16 can hold.
    dtype = "f32" if platform == "cpu" else "bf16"
    assert {(left.shape[0], left.dtype) for left, _, _ in found} == {(1, dtype)}


@pytest.mark.parametrize(
    "platform",
    ["cuda", *(pytest.param(p, marks=pytest.mark.exhaustive) for p in ("cpu", "tpu"))],
)
def test_a_mesh_has_the_program_of_its_platform(platform):
    mesh = jax.make_mesh((2,), ("x",), (AxisType.Auto,), devices=jax.devices()[:2])
    lying = NamedSharding(mesh, PartitionSpec(None, "x"))
    grads = jax.ShapeDtypeStruct((DEPTH, WIDTH, WIDTH), jnp.float32, sharding=lying)
    tx = fo.ns5()
    text = _stablehlo.program(
        lambda grads: tx.update(grads, tx.init(grads))[0], grads, platform=platform
    )
    # Every device has half of the matrices, on CPUs too: they can't share a loop.
    found = {(left.shape[0], left.dtype) for left, _, _ in _stablehlo.products(text)}
    assert found == {(DEPTH // 2, HALF.get(platform, "f32"))}


def test_a_call_outside_of_a_branch_would_be_found():
    def solve(due, S):
        lower = jax.lax.linalg.cholesky(S)
        return jax.lax.cond(due, lambda: jnp.linalg.qr(S)[0], lambda: lower)

    shapes = (jax.ShapeDtypeStruct((), bool), jax.ShapeDtypeStruct((4, 4), jnp.float32))
    text = _stablehlo.program(solve, *shapes, platform="cuda")
    calls = _stablehlo.custom_calls(text)
    assert {bool(inside) for _, inside in calls} == {False, True}
