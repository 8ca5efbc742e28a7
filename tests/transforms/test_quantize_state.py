"""`quantize_state`: what is remembered in few bits, and how far that is from fp32."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fusionopt_jax as fo
from tests import _cases, _compare
from tests.references import quantize_state as reference

DECAY, STEPS = 0.8, 12
SHAPES = {"wide": (3, 384), "odd": (5, 7), "vector": (130,), "scalar": ()}


def draw(rng, dtype=jnp.float32):
    return {
        name: jnp.asarray(rng.normal(size=shape), dtype)
        for name, shape in SHAPES.items()
    }


def run(tx, history):
    """All updates of a history of gradients, and the last state."""
    state = tx.init(history[0])
    update = jax.jit(tx.update)
    found = []
    for gradients in history:
        updates, state = update(gradients, state)
        found.append(updates)
    return found, state


def test_momentum_in_8_bits_is_that_of_the_reference(rng):
    history = [draw(rng) for _ in range(STEPS)]
    tx = fo.quantize_state(optax.trace(DECAY), {"trace": "int8"})
    found, state = run(tx, history)
    for name, shape in SHAPES.items():
        kept, exact = np.zeros(shape), np.zeros(shape)
        off = 0.0
        for updates, gradients in zip(found, history, strict=True):
            gradient = np.asarray(gradients[name], np.float64)
            momentum = DECAY * kept + gradient
            exact = DECAY * exact + gradient
            off *= DECAY
            # Rounded at the same places: fp32's share of it, and no code flipped.
            np.testing.assert_allclose(updates[name], momentum, rtol=0, atol=4e-6)
            # What each rounding left behind, as far as it is remembered.
            assert np.max(np.abs(updates[name] - exact)) <= off + 4e-6
            scale = np.max(np.abs(momentum))
            _, _, kept = reference.rounded(momentum)
            off += scale / 127
        codes = state.inner_state.trace[name]
        assert (codes.dtype, codes.shape) == (jnp.int8, shape)


def test_bytes_of_a_matrix():
    params = {"w": jax.ShapeDtypeStruct((256, 768), jnp.float32)}

    def held(dtype):
        tx = fo.quantize_state(optax.trace(DECAY), {"trace": dtype})
        leaves = jax.tree.leaves(jax.eval_shape(tx.init, params))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    # Besides, the count of steps; a row of 768 is 8 blocks of 96.
    assert held("bf16") == 4 + 2 * 256 * 768
    assert held("int8") == 4 + 256 * 768 + 4 * 256 * 8


def test_a_slow_average_moves_in_the_mean():
    """Each step moves it by less than rounding to the nearest would see."""
    tx = fo.quantize_state(fo.mona(alpha=0.0, b1=0.9999), {"gradient_average": "bf16"})
    size, steps = 2**14, 200
    start = jnp.full(size, 1 + 2.0**-7)
    state = tx.init(start)
    state = state._replace(
        inner_state=fo.transforms.mona.MONAState(start.astype(jnp.bfloat16))
    )
    gradient = jnp.full(size, 2.0)
    (state, _) = jax.jit(
        lambda state: jax.lax.scan(
            lambda state, _: (tx.update(gradient, state)[1], None), state, length=steps
        )
    )(state)
    average = np.asarray(state.inner_state.gradient_average, np.float64)
    expected = 2 - (1 - 2.0**-7) * 0.9999**steps
    assert abs(expected - (1 + 2.0**-7)) > 2 * 2.0**-7
    # Five standard errors of the mean of entries that are rounded independently.
    allowed = 5 * np.std(average) / np.sqrt(size)
    assert abs(np.mean(average) - expected) <= allowed
    nearest = jnp.asarray(1 + 2.0**-7, jnp.bfloat16)
    moved = jnp.asarray(0.9999 * 1.0078125 + 1e-4 * 2, jnp.bfloat16)
    assert moved == nearest


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_the_first_update_is_that_of_fp32(dtype, rng):
    gradients = draw(rng)
    found, state = run(
        fo.quantize_state(fo.mona(), {"gradient_average": dtype}), [gradients]
    )
    expected, exact = run(fo.mona(), [gradients])
    _compare.assert_trees_identical(found, expected)
    assert int(state.count) == 1
    average = exact.gradient_average["vector"]
    kept = np.asarray(state.inner_state.gradient_average["vector"])
    if dtype == "int8":
        kept = reference.LEVELS[kept.astype(int) + 127]
        kept = kept * np.repeat(
            np.asarray(state.scales["gradient_average_scales"]["vector"]), 65
        )
        _, _, expected = reference.rounded(average)
        np.testing.assert_allclose(kept, expected, rtol=1e-6)
    else:
        low, high = reference.neighbours(average)
        assert np.all((kept == low) | (kept == high))


def test_runs_are_repeated_bit_for_bit(rng):
    history = [draw(rng, jnp.bfloat16) for _ in range(3)]
    tx = fo.quantize_state(optax.scale_by_adam(), {"mu": "bf16", "nu": "bf16"})
    _, state = run(tx, history)
    _compare.assert_trees_identical(run(tx, history)[1], state)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.inner_state[1:])} == {
        jnp.dtype(jnp.bfloat16)
    }


def test_leaves_and_fields_are_rounded_by_chances_of_their_own():
    params = {"a": jnp.full(4096, 1 + 2.0**-8), "b": jnp.full(4096, 1 + 2.0**-8)}
    tx = fo.quantize_state(
        optax.scale_by_adam(b1=0, b2=0), {"mu": "bf16", "nu": "bf16"}
    )
    _, state = tx.update(params, tx.init(params))
    up = np.stack(
        [np.asarray(leaf) > 1 for leaf in jax.tree.leaves(state.inner_state.mu)]
    )
    correlation = np.corrcoef(up)[0, 1]
    assert abs(correlation) <= 5 / np.sqrt(4096)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_what_is_not_finite_stays_so(dtype):
    gradients = {"w": jnp.array([[1.0, jnp.nan], [jnp.inf, 2.0], [0.0, 0.0]])}
    tx = fo.quantize_state(optax.trace(DECAY), {"trace": dtype})
    (_, updates), _ = run(tx, [gradients, jax.tree.map(jnp.zeros_like, gradients)])
    finite = np.isfinite(updates["w"])
    assert not finite[0, 1]
    assert not finite[1, 0]
    assert np.all(finite[2])
    # In 8 bits the block, here a row, goes with its worst entry.
    assert bool(finite[0, 0]) == bool(finite[1, 1]) == (dtype == "bf16")


@pytest.mark.parametrize("tree", [{}, None, {"w": jnp.zeros((0, 4))}], ids=str)
def test_empty_trees(tree):
    tx = fo.quantize_state(optax.trace(DECAY), {"trace": "int8"})
    updates, state = tx.update(tree, tx.init(tree))
    assert jax.tree.structure(updates) == jax.tree.structure(tree)
    assert int(state.count) == 1


def test_every_part_of_the_state_is_found_by_the_parameters():
    """Codes and scales take a tree that is shaped like the parameters."""
    params = draw(np.random.default_rng(0))
    tx = fo.quantize_state(optax.trace(DECAY), {"trace": "int8"})
    names = {name: name for name in params}
    found = optax.tree.map_params(tx, lambda _, name: name, tx.init(params), names)
    assert found.scales == {"trace_scales": names}
    assert found.inner_state.trace == names


@pytest.mark.parametrize(
    ("inner", "fields", "error", "match"),
    [
        (optax.trace(0.9), {}, ValueError, "`fields` is empty"),
        (optax.trace(0.9), "trace", TypeError, "must map names"),
        (optax.trace(0.9), {"trace": "fp16"}, ValueError, r"\['trace'\]` must be one"),
        (optax.trace(0.9), {"mu": "int8"}, ValueError, "one of 'trace'; got 'mu'"),
        (
            optax.chain(optax.trace(0.9)),
            {"trace": "int8"},
            TypeError,
            "parts of a chain",
        ),
        (
            optax.scale_by_adam(),
            {"mu": "bf16", "nu": "int4"},
            ValueError,
            "'bf16', 'int8'",
        ),
    ],
    # Functions print an address, which differs between processes.
    ids=["nothing", "no_mapping", "no_dtype", "no_field", "chain", "second_dtype"],
)
def test_what_is_refused(inner, fields, error, match):
    with pytest.raises(error, match=match):
        _cases.unchecked(fo.quantize_state, inner, fields).init({"w": jnp.ones(2)})


def test_complex_leaves_are_refused_by_path():
    tx = fo.quantize_state(optax.trace(0.9), {"trace": "int8"})
    with pytest.raises(ValueError, match="'w' of complex64"):
        tx.init({"w": jnp.ones(2, jnp.complex64)})
