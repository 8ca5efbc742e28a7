"""Blocks of 8 bits and stochastic rounding, against float64 and counted chances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionopt_jax import _codec
from tests.references import quantize_state as reference

to_blocks = jax.jit(_codec.to_blocks)
from_blocks = jax.jit(_codec.from_blocks)
stochastic_bf16 = jax.jit(_codec.stochastic_bf16)

SHAPES = [(), (1,), (0,), (3, 0), (7,), (130,), (129,), (2, 3, 384), (2, 259)]


@pytest.fixture
def drawn(rng):
    """Entries of many sizes: normal numbers times powers of ten."""

    def draw(shape):
        sizes = 10.0 ** rng.integers(-4, 3, shape)
        return np.asarray(rng.normal(size=shape) * sizes, np.float32)

    return draw


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_are_those_of_the_reference(shape, drawn):
    x = drawn(shape)
    codes, scales = to_blocks(jnp.asarray(x))
    wanted, wanted_scales, numbers = reference.rounded(x)
    assert (codes.dtype, scales.dtype) == (jnp.int8, jnp.float32)
    np.testing.assert_array_equal(scales, wanted_scales)
    # Between two codes fp32 may take the other; no entry here lies there.
    np.testing.assert_array_equal(codes, wanted)
    # Two products and a quotient in fp32.
    np.testing.assert_allclose(from_blocks(codes, scales), numbers, rtol=4e-7)


def test_an_entry_is_off_by_less_than_a_step(drawn):
    x = drawn((4, 512)).astype(np.float64)
    codes, scales = to_blocks(jnp.asarray(x))
    numbers = np.asarray(from_blocks(codes, scales), np.float64)
    scale = np.repeat(np.asarray(scales, np.float64), 128, axis=-1)
    # Half-way between the roots of k² and (k + 1)² is k² + k + 1/4; 127 is the last.
    size = np.minimum(np.abs(np.asarray(codes, int)) + 0.25, 126.75)
    bound = scale * size / 127**2
    assert np.all(np.abs(numbers - x) <= bound * (1 + 1e-5))
    assert np.max(size) / 127**2 <= 1 / 127


def test_zeros_and_the_largest_entries_are_exact(drawn):
    x = drawn((3, 256))
    x[:, ::3] = 0
    x[1, :128] = 0
    codes, scales = to_blocks(jnp.asarray(x))
    numbers = np.asarray(from_blocks(codes, scales))
    assert np.all(numbers[x == 0] == 0)
    at = np.argmax(np.abs(x), axis=-1)[:, None]
    np.testing.assert_array_equal(*(np.take_along_axis(a, at, 1) for a in (x, numbers)))
    # What was rounded stays as it is.
    again = to_blocks(jnp.asarray(numbers))
    np.testing.assert_array_equal(again[0], codes)
    np.testing.assert_array_equal(again[1], scales)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so_with_its_block(bad, drawn):
    x = drawn((2, 384))
    x[1, 100] = bad
    codes, scales = to_blocks(jnp.asarray(x))
    numbers = np.asarray(from_blocks(codes, scales))
    assert not np.any(np.isfinite(numbers[1, 96:192]))
    assert np.all(np.isfinite(numbers[0]))
    assert np.all(np.isfinite(np.delete(numbers[1], slice(96, 192))))


def test_the_ends_of_the_range():
    largest, tiny = np.finfo(np.float32).max, np.finfo(np.float32).tiny
    x = np.array([[largest, -largest], [tiny, 0], [tiny / 4, -tiny / 8]], np.float32)
    numbers = from_blocks(*to_blocks(jnp.asarray(x)))
    x[2] = 0
    np.testing.assert_array_equal(numbers, x)


@pytest.mark.parametrize(
    ("size", "count"),
    [(1, 1), (128, 1), (129, 1), (192, 2), (768, 8), (1001, 1), (5120, 64)],
)
def test_blocks_of_a_row(size, count):
    assert _codec.scales_shape((3, size)) == (3, count)
    assert reference.parts(size) == count


def test_the_hash_is_the_published_one():
    values = [0, 1, 2, 12345, 2**31, 2**32 - 1]
    found = _codec.mixed(jnp.asarray(values, jnp.uint32))
    assert list(map(int, found)) == [reference.lowbias32(value) for value in values]


def test_rounding_to_bf16_is_right_in_the_mean(drawn):
    count = 2**14
    x = drawn(128)
    many = jnp.repeat(jnp.asarray(x)[:, None], count, axis=1)
    rounded = np.asarray(stochastic_bf16(many, 7), np.float64)
    low, high = reference.neighbours(x)
    assert np.all((rounded == low[:, None]) | (rounded == high[:, None]))
    step = high.astype(np.float64) - low
    chance = (x.astype(np.float64) - low) / step
    error = (np.mean(rounded, axis=1) - x) / step
    # One mean in 2e6 is further off than five standard errors, and a chance is one of
    # 2**16.
    allowed = 5 * np.sqrt(chance * (1 - chance) / count) + 2.0**-16
    assert np.all(np.abs(error) <= allowed)
    assert np.mean(chance) > 0.4


def test_every_step_and_every_entry_draws_for_itself():
    x = jnp.full((64, 512), 1 + 2.0**-8)  # Half-way.
    up = [
        np.asarray(stochastic_bf16(x, seed) > 1, np.float64) - 0.5
        for seed in range(1, 9)
    ]
    draws = np.stack([draw.ravel() for draw in up])
    shifted = np.stack(
        [np.roll(up[0], shift, (0, 1)).ravel() for shift in ((0, 1), (1, 0))]
    )
    correlations = np.corrcoef(np.concatenate([draws, shifted]))
    off_diagonal = correlations[~np.eye(len(correlations), dtype=bool)]
    # Five standard errors of a correlation of independent draws.
    assert np.max(np.abs(off_diagonal)) <= 5 / np.sqrt(x.size)


def test_what_bf16_holds_stays_as_it_is():
    largest = float(jnp.finfo(jnp.bfloat16).max)
    x = np.float32([0, -0.0, 1, -2.5, 2.0**-130, largest, np.inf, -np.inf, np.nan])
    for seed in range(20):
        rounded = np.asarray(stochastic_bf16(jnp.asarray(x), seed), np.float32)
        np.testing.assert_array_equal(rounded, x)
        assert np.signbit(rounded[1])


def test_finite_numbers_stay_finite():
    x = jnp.full(1000, np.finfo(np.float32).max)
    rounded = stochastic_bf16(jnp.stack([x, -x]), 3).astype(jnp.float32)
    assert bool(jnp.all(jnp.isfinite(rounded)))
