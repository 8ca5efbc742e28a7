"""`state_dtype`: what `fusion_opt` holds, and that a run can go on in another one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import fusionopt_jax as fo
from fusionopt_jax import checkpoints
from tests import _compare
from tests.references import quantize_state as reference

DTYPES = ("fp32", "bf16", "int8")
# A square of blocks and halves, a matrix of odd rows, and leaves for Adam.
SHAPES = {"kernel": (8, 256), "odd": (9, 27), "bias": (12,), "scale": ()}
ROUTING = fo.Routing(min_dim=8)
WITH_MONA = ("ns5", "normuon", "sf", "mona")


def optimizer(dtype, components=("ns5", "normuon", "sf"), **settings):
    return fo.fusion_opt(
        1e-2, components=components, routing=ROUTING, state_dtype=dtype, **settings
    )


def draw(rng, dtype=jnp.float32):
    return {
        name: jnp.asarray(rng.normal(size=shape), dtype)
        for name, shape in SHAPES.items()
    }


def trained(tx, rng, steps=3):
    """Parameters and state after a few updates."""
    params = draw(rng)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(draw(rng), state, params, value=jnp.float32(2))
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.fixture(scope="module")
def runs():
    """A run in each dtype."""
    return {
        dtype: trained(optimizer(dtype), np.random.default_rng(3)) for dtype in DTYPES
    }


def held(dtype, leaf):
    tx = fo.fusion_opt(1e-2, state_dtype=dtype)
    state = jax.eval_shape(tx.init, {"kernel": leaf})
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_bytes_of_a_parameter(param_dtype):
    leaf = jax.ShapeDtypeStruct((4096, 1024), param_dtype)
    whole = held("fp32", leaf)
    # bf16 parameters: the average as well, exact as z is.
    z = 4 if param_dtype == jnp.float32 else 8
    assert (z + 4) * leaf.size <= whole <= (z + 4.005) * leaf.size
    # What else there is stays, besides one count.
    assert whole - held("bf16", leaf) == 2 * leaf.size - 2 * 4
    assert whole - held("int8", leaf) == (3 - 4 / 128) * leaf.size - 2 * 4


def test_both_iterates_stay_exact(runs):
    for dtype in DTYPES:
        z = optax.tree.get(runs[dtype][1], "z")
        assert {leaf.dtype for leaf in jax.tree.leaves(z)} == {jnp.dtype(jnp.float32)}
    kept = optax.tree.get(runs["int8"][1], "trace")["kernel"]
    assert kept.dtype == jnp.int8
    for dtype in ("bf16", "int8"):
        moments = optax.tree.get(runs[dtype][1], "ScaleByAdamState")
        assert moments.mu["bias"].dtype == moments.nu["bias"].dtype == jnp.bfloat16


def test_runs_differ_by_a_rounding_of_the_momentum(runs):
    """Of the direction, whose entries are of a fifth of the rate and more."""
    exact = runs["fp32"][0]
    for dtype in ("bf16", "int8"):
        _compare.assert_trees_within(runs[dtype][0], exact, 1e-2, dtype)
        assert np.any(np.asarray(runs[dtype][0]["kernel"] != exact["kernel"]))


@pytest.mark.parametrize("wrong", ["fp16", None, jnp.bfloat16, "int4"], ids=str)
def test_other_dtypes_are_refused(wrong):
    with pytest.raises(ValueError, match="`state_dtype` must be one of 'fp32', 'bf16'"):
        fo.fusion_opt.__wrapped__(1e-2, state_dtype=wrong)


@pytest.mark.parametrize("old", DTYPES)
@pytest.mark.parametrize("new", DTYPES)
def test_a_run_goes_on_in_another_dtype(old, new, runs):
    params, state = runs[old]
    tx = optimizer(new)
    warm = fo.warm_start(tx, params, state)
    fresh = tx.init(params)
    assert jax.tree.structure(warm) == jax.tree.structure(fresh)
    shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(fresh)]
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(warm)] == shapes
    if old == new:
        _compare.assert_trees_identical(warm, state)
        return
    for name in ("kernel", "odd"):
        momentum, carried = numbers(state, name), numbers(warm, name)
        # Half a step of bf16, and of the code of 8 bits, whose roots are equally far
        # apart; else what fp32 rounds away.
        root = lambda x: np.sign(x) * np.sqrt(np.abs(x))  # noqa: E731
        if new == "int8":
            step = np.max(root(np.abs(momentum)), axis=-1, keepdims=True) / 127
            off = np.abs(root(carried) - root(momentum))
            assert np.all(off <= (0.5 + 1e-4) * step)
        else:
            rtol = 2.0**-8 if new == "bf16" else 1e-6
            np.testing.assert_allclose(carried, momentum, rtol=rtol)


def numbers(state, name):
    """The momentum of a matrix in float64."""
    kept = np.asarray(optax.tree.get(state, "trace")[name])
    if kept.dtype != np.int8:
        return kept.astype(np.float64)
    scales = optax.tree.get(state, "trace_scales")
    scale = np.asarray(scales[name], np.float64)
    scale = np.repeat(scale, kept.shape[-1] // scale.shape[-1], axis=-1)
    return scale * reference.LEVELS[kept.astype(int) + 127]


@pytest.mark.exhaustive
def test_components_come_and_go_in_few_bits(runs, rng):
    """Then there are two states in few bits where there was one."""
    params, state = runs["int8"]
    tx = optimizer("int8", WITH_MONA)
    warm = fo.warm_start(tx, params, state)
    report = fo.warm_start_report(tx, params, state)
    assert report.started == ("spectral/MONAState", "spectral/QuantizedState #2")
    np.testing.assert_array_equal(numbers(warm, "kernel"), numbers(state, "kernel"))
    back = fo.warm_start(optimizer("int8"), params, warm)
    np.testing.assert_array_equal(numbers(back, "kernel"), numbers(state, "kernel"))
    tx.update(draw(rng), warm, params, value=1.0)


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("fp32", "int8", "no state of scalar/QuantizedState, spectral/QuantizedState"),
        pytest.param(
            *("int8", "fp32", "nothing takes that of scalar/QuantizedState"),
            marks=pytest.mark.exhaustive,
        ),
        ("bf16", "int8", r"saved as bfloat16\[8, 256\], wanted as int8\[8, 256\]"),
    ],
)
def test_a_checkpoint_of_another_dtype_is_refused_or_converted(
    old, new, match, runs, tmp_path
):
    params, state = runs[old]
    tx = optimizer(new)
    with ocp.CheckpointManager(tmp_path) as manager:
        checkpoints.save(manager, 1, params, state, routing=ROUTING)
        found = checkpoints.restore(manager, params, state, routing=ROUTING)
        _compare.assert_trees_identical(found.opt_state, state)
        with pytest.raises(ValueError, match=match) as error:
            checkpoints.restore(manager, params, tx.init(params), routing=ROUTING)
        assert "`warm_start`" in str(error.value)
        found = checkpoints.restore(
            manager, params, tx.init(params), routing=ROUTING, warm_start=tx
        )
    _compare.assert_trees_identical(found.opt_state, fo.warm_start(tx, params, state))
