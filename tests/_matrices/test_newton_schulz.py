"""Newton-Schulz against singular value decompositions, in every form and dtype."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionopt_jax._matrices import newton_schulz
from tests import _compare
from tests._jaxpr import flops_of_dots

SHAPES = [(8, 8), (8, 12), (8, 40), (1, 8)]


@functools.cache
def compiled(coefficients="quintic", steps=5, **settings):
    table = newton_schulz.coefficient_table(coefficients, steps)
    safety = newton_schulz.safety_factor(coefficients)
    return jax.jit(
        lambda G: newton_schulz.newton_schulz(G, table, safety=safety, **settings)
    )


def orthogonalize(matrix, **settings):
    return np.asarray(
        compiled(**settings)(jnp.asarray(matrix, jnp.float32)), np.float64
    )


def with_values(values, shape, seed=0):
    """A matrix of given singular values, and its singular vectors."""
    rng = np.random.default_rng(seed)
    left, _, right = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    return (left * np.asarray(values)) @ right, left, right


def on_values(values, rows, safety=1.0, eps=1e-7):
    """What the polynomial makes of singular values, in float64."""
    values = np.asarray(values, np.float64)
    values = values / (safety * np.linalg.norm(values) + eps)
    for a, b, c in rows:
        values = a * values + b * values**3 + c * values**5
    return values


# Rounding of the five steps, each of which may triple an error, by hot_dtype: 2^-24,
# 2^-8 and 2^-11, and the singular values below them.
HALF = {"fp32": 5e-5, "bf16": 0.15, "fp16": 0.02, "fp16_safe": 0.02}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["plain", "gram"])
@pytest.mark.parametrize("coefficients", ["quintic", "polar_express"])
def test_singular_values_follow_the_polynomial(shape, method, coefficients):
    values = np.geomspace(1.0, 0.05, shape[0])
    matrix, left, right = with_values(values, shape)
    rows = newton_schulz.coefficient_table(coefficients, 5)
    expected = on_values(values, rows, newton_schulz.safety_factor(coefficients))
    actual = orthogonalize(matrix, coefficients=coefficients, method=method)
    _compare.assert_within(actual, (left * expected) @ right, HALF["fp32"])


ILL_POSED = {
    "ill-conditioned": np.geomspace(1.0, 1e-6, 8),
    "low rank": np.array([1.0, 0.7, 0.5, 0, 0, 0, 0, 0]),
    "rank one": np.array([1.0, 0, 0, 0, 0, 0, 0, 0]),
    "near zero": 1e-15 * np.linspace(1.0, 0.2, 8),
    "huge": 1e15 * np.linspace(1.0, 0.2, 8),
}


@pytest.mark.parametrize("hot_dtype", list(HALF))
@pytest.mark.parametrize("method", ["plain", "gram"])
@pytest.mark.parametrize("kind", ILL_POSED)
def test_ill_posed_input_in_half_precision(hot_dtype, method, kind):
    values = ILL_POSED[kind]
    matrix, _, _ = with_values(values, (8, 12))
    settings = {"hot_dtype": hot_dtype, "method": method, "eps": 0.0}
    out = orthogonalize(matrix, **settings)
    assert np.isfinite(out).all()
    actual = np.linalg.svd(out, compute_uv=False)
    # The polynomial overshoots 1 by at most a fifth, in any precision.
    assert actual.max() < 1.21 + HALF[hot_dtype]
    # Singular values well above the rounding are known to be brought near 1.
    known = values / np.linalg.norm(values) > 0.02
    expected = on_values(values, [(3.4445, -4.7750, 2.0315)] * 5, eps=0.0)[known]
    assert len(expected) > 0
    # Each known value has its image among the actual ones.
    nearest = np.abs(expected[:, None] - actual[None, :]).min(axis=1)
    assert nearest.max() < HALF[hot_dtype], expected


@pytest.mark.parametrize("hot_dtype", list(HALF))
@pytest.mark.parametrize("shape", [(48, 192), (192, 48)])
def test_one_large_direction_beside_many_small_ones(hot_dtype, shape):
    """Momenta of a young model: rounding must not lift what it spreads of the first."""
    values = np.concatenate([[1.0], 0.45 * np.geomspace(1, 1e-3, 47)])
    matrix, left, right = with_values(values, shape)
    rows = newton_schulz.coefficient_table("polar_express", 5)
    expected = (left * on_values(values, rows, 1.02)) @ right
    found = orthogonalize(
        matrix, coefficients="polar_express", method="gram", hot_dtype=hot_dtype
    )
    # Rounding the first one alone moves the smallest by their own size: in fp32 by up
    # to 2^-24 / 3.6e-4^2, half a percent.
    tolerance = max(HALF[hot_dtype], 5e-3)
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize(
    "hot_dtype", ["fp16", pytest.param("fp16_safe", marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize("method", ["plain", "gram"])
@pytest.mark.parametrize(
    "settings",
    [{}, pytest.param({"preconditioner": "aol"}, marks=pytest.mark.exhaustive)],
)
def test_large_matrices_keep_every_bit_of_fp16(hot_dtype, method, settings):
    # Entries of a matrix of norm 1 are near 1/sqrt(m n) = 0.004, and of its Gram matrix
    # far below 6e-5, where fp16 loses bits.
    matrix, _, _ = with_values(np.arange(128) < 4, (128, 512), seed=7)
    matrix = matrix.astype(np.float32).astype(np.float64)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    if settings:
        sums = np.abs(matrix @ matrix.T).sum(axis=1, keepdims=True)
        left, values, right = np.linalg.svd(matrix / np.sqrt(sums), full_matrices=False)
    else:
        values /= np.linalg.norm(values)
    size = np.linalg.norm(values)
    rows = newton_schulz.coefficient_table("quintic", 5)
    for a, b, c in rows:
        values = a * values + b * values**3 + c * values**5
    expected = (left * np.where(np.arange(128) < 4, values, 0)) @ right
    actual = orthogonalize(matrix, hot_dtype=hot_dtype, method=method, **settings)
    error = np.linalg.norm(actual - expected)
    # Rounding the input to 11 bits changes it by at most 2^-11/sqrt(3) of its norm,
    # mostly in directions that it lacks, and these grow by the product of the a. The
    # other roundings are as small, and come when less growth is left.
    slope = np.prod([a for a, _, _ in rows])
    assert error < slope * 2**-11 / np.sqrt(3) * size


@pytest.mark.parametrize("method", ["plain", "gram"])
@pytest.mark.parametrize("coefficients", ["quintic", "polar_express"])
def test_the_largest_entries_stay_in_the_range_of_fp16(method, coefficients):
    """A single entry makes X, R and Z as large as they get; its null space makes Q."""
    matrix = np.zeros((6, 24))
    matrix[0, 0] = 1
    call = lambda dtype: orthogonalize(  # noqa: E731
        matrix, coefficients=coefficients, method=method, hot_dtype=dtype
    )
    # The terms of a step add up to 47 at most; rounded to 11 bits, they are 47/2^12 =
    # 0.011 off, and later steps stretch that by up to 4. An overflow is not finite.
    _compare.assert_within(call("fp16"), call("fp32"), 0.05)


@pytest.mark.parametrize("hot_dtype", list(HALF))
@pytest.mark.parametrize("method", ["plain", "gram"])
@pytest.mark.parametrize("preconditioner", ["frobenius", "aol"])
@pytest.mark.parametrize("shape", [(12, 8), (8, 1)])
def test_tall_matrices_follow_the_polynomial(hot_dtype, method, preconditioner, shape):
    matrix, _, _ = with_values(np.geomspace(1.0, 0.05, shape[1]), shape, seed=9)
    X = matrix / np.linalg.norm(matrix)
    if preconditioner == "aol":
        # arXiv 2512.04632: of a tall matrix, the columns are scaled.
        X = matrix / np.sqrt(np.abs(matrix.T @ matrix).sum(axis=0))
    for a, b, c in newton_schulz.coefficient_table("quintic", 5):
        R = X.T @ X
        X = a * X + X @ (b * R + c * R @ R)
    actual = orthogonalize(
        matrix, method=method, preconditioner=preconditioner, hot_dtype=hot_dtype
    )
    assert np.linalg.norm(actual - X) < HALF[hot_dtype] * np.linalg.norm(X)


def test_gram_is_plain_in_float32():
    rng = np.random.default_rng(3)
    for steps in (1, 2, 3, 5, 7):
        matrix = rng.normal(size=(2, 8, 12))
        plain = orthogonalize(matrix, steps=steps, method="plain")
        gram = orthogonalize(matrix, steps=steps, method="gram")
        # Other products in another order; later steps amplify their rounding.
        _compare.assert_within(gram, plain, 5e-5)


@pytest.mark.parametrize("hot_dtype", list(HALF))
def test_zero_stays_zero(hot_dtype):
    for settings in ({}, {"preconditioner": "aol"}, {"method": "gram"}):
        out = orthogonalize(np.zeros((2, 4, 6)), hot_dtype=hot_dtype, **settings)
        np.testing.assert_array_equal(out, 0)


def test_a_zero_matrix_beside_others_changes_nothing():
    rng = np.random.default_rng(4)
    matrix = rng.normal(size=(4, 6))
    pair = orthogonalize(np.stack([matrix, np.zeros((4, 6))]))
    np.testing.assert_array_equal(pair[1], 0)
    _compare.assert_within(pair[0], orthogonalize(matrix[None])[0], 2e-6)


def test_aol_scales_below_one_and_does_in_four_steps_what_takes_five():
    rng = np.random.default_rng(5)
    for shape in SHAPES:
        X = rng.normal(size=shape)
        X /= np.linalg.norm(X)
        scaled = X * newton_schulz._aol_scale(jnp.asarray(X @ X.T, jnp.float32))
        # Almost-orthogonal rows: no singular value above 1, none below the norm's.
        assert np.linalg.norm(scaled, 2) <= 1 + 1e-6
        assert np.linalg.norm(scaled, 2) >= np.linalg.norm(X, 2)
        # arXiv 2512.04632: each row over the root of its sum of absolute products.
        sums = np.abs(X @ X.T).sum(axis=1, keepdims=True)
        _compare.assert_within(scaled, X / np.sqrt(sums), 1e-6)
    matrix, left, right = with_values(np.linspace(1.0, 0.3, 8), (8, 40))
    polar = left @ right
    error = lambda **settings: np.linalg.norm(  # noqa: E731
        orthogonalize(matrix, coefficients="polar_express", **settings) - polar
    )
    assert error(steps=4, preconditioner="aol") < error(steps=4)


@pytest.mark.parametrize("hot_dtype", list(HALF))
@pytest.mark.parametrize("method", ["plain", "gram"])
@pytest.mark.parametrize("coefficients", ["quintic", "polar_express"])
def test_aol_steps_follow_the_scaled_matrix(hot_dtype, method, coefficients):
    """The first Gram matrix is scaled, not computed again."""
    matrix, _, _ = with_values(np.geomspace(1.0, 0.05, 8), (8, 40), seed=6)
    rows = newton_schulz.coefficient_table(coefficients, 4)
    sums = np.abs(matrix @ matrix.T).sum(axis=1, keepdims=True)
    X = matrix / np.sqrt(sums) / newton_schulz.safety_factor(coefficients)
    for a, b, c in rows:
        R = X @ X.T
        X = a * X + (b * R + c * R @ R) @ X
    actual = orthogonalize(
        matrix,
        coefficients=coefficients,
        steps=4,
        method=method,
        preconditioner="aol",
        hot_dtype=hot_dtype,
        eps=0.0,
    )
    relative = np.linalg.norm(actual - X) / np.linalg.norm(X)
    assert relative < HALF[hot_dtype]


def test_the_norm_is_safe_in_every_range():
    # In fp16 the sum of 600 squares of 1e4 or of 1e-4 leaves the range.
    for size in (1e4, 1e-4):
        G = jnp.full((2, 20, 30), size, jnp.float16)
        norm = np.asarray(newton_schulz.frobenius_norm(G), np.float64)
        expected = float(G[0, 0, 0]) * np.sqrt(600)
        np.testing.assert_allclose(norm, expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(4, 4), (4, 6), (4, 32)])
@pytest.mark.parametrize("method", ["plain", "gram"])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 6])
def test_flops_are_those_of_the_program(shape, method, steps):
    table = newton_schulz.coefficient_table("quintic", steps)
    program = jax.make_jaxpr(
        lambda G: newton_schulz.newton_schulz(G, table, method=method)
    )(jnp.ones((1, *shape)))
    counted = flops_of_dots(program.jaxpr)
    assert counted == newton_schulz.newton_schulz_flops(*shape, table, method)


def test_auto_takes_the_cheaper_form():
    table = newton_schulz.coefficient_table("quintic", 5)
    for n, hot_dtype in itertools.product((8, 10, 16, 64), HALF):
        costs = {
            method: newton_schulz.newton_schulz_flops(8, n, table, method, hot_dtype)
            for method in ("plain", "gram")
        }
        cheaper = newton_schulz.cheaper_method(8, n, table, hot_dtype)
        assert costs[cheaper] == min(costs.values())
    assert newton_schulz.cheaper_method(128, 128, table) == "plain"
    assert newton_schulz.cheaper_method(128, 512, table) == "gram"


def test_tables_are_cut_and_repeated():
    rows = ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    assert newton_schulz.coefficient_table(rows, 1) == rows[:1]
    assert newton_schulz.coefficient_table(rows, 4) == (*rows, rows[1], rows[1])
    assert len(newton_schulz.coefficient_table("polar_express", 3)) == 3
    assert len(set(newton_schulz.coefficient_table("quintic", 5))) == 1


@pytest.mark.parametrize(
    ("platform", "dtype"), [("cpu", "fp32"), ("gpu", "fp16"), ("other", "bf16")]
)
def test_the_platform_chooses_the_dtype(platform, dtype):
    assert newton_schulz.resolve_hot_dtype("auto", platform) == dtype
    assert newton_schulz.resolve_hot_dtype("bf16", platform) == "bf16"


@pytest.mark.parametrize("method", ["plain", "gram"])
def test_sums_are_fp32_where_floats_are_wide(method):
    matrix = np.random.default_rng(0).normal(size=(1, 4, 6))
    expected = orthogonalize(matrix, method=method)
    table = newton_schulz.coefficient_table("quintic", 5)
    with jax.enable_x64(True):
        result = newton_schulz.newton_schulz(
            jnp.asarray(matrix, jnp.float32), table, method=method
        )
    assert result.dtype == jnp.float32
    # The same float32 products, compiled apart; entries are below 1.
    _compare.assert_within(result, expected, 1e-6)
