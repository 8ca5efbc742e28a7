"""Two polynomials of the Gram matrix, in fp16, against float64 references."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionopt_jax._matrices import newton_schulz
from fusionopt_jax._matrices.gram_polynomial import (
    GRAM_MINIMAX,
    GRAM_MINIMAX_AOL,
    LARGEST_FACTOR,
    evaluate,
    evaluate_apart,
)
from tests._jaxpr import flops_of_dots

BOUND, BOUND_ROUNDED = 0.15, 0.2
"""What the derivation allows, and for what rounding moves."""

TABLES = {"frobenius": GRAM_MINIMAX, "aol": GRAM_MINIMAX_AOL}
LOWEST = {"frobenius": 1e-3, "aol": 5e-3}

# The singular values of X that rounding may leave above 1, and of what the first
# polynomial makes of it.
BEYOND = (1.01, 1.15)

HALF = ("fp16", pytest.param("fp16_safe", marks=pytest.mark.exhaustive))


def terms(polynomial, values):
    """All Y of singular values and both factors of each product, in float64."""
    Y = [np.ones_like(values), 2 * values**2 - 1]
    factors = []
    for a, b in polynomial.factors:
        factors += [np.asarray(a) @ Y, np.asarray(b) @ Y]
        Y.append(factors[-2] * factors[-1])
    return Y, factors


def on_values(polynomial, values):
    values = np.asarray(values, np.float64)
    return values * (np.asarray(polynomial.output) @ terms(polynomial, values)[0])


def through(table, values):
    for polynomial in table.halves:
        values = on_values(polynomial, values)
    return values


def spread(low, high, count=20001):
    turns = high * np.cos(np.linspace(0, np.pi / 2, count)[:-1])
    return np.concatenate([np.geomspace(low, high, count), turns[turns > low]])


@functools.cache
def compiled(coefficients="gram_minimax", **settings):
    start = settings.get("preconditioner", "frobenius")
    table = newton_schulz.coefficient_table(coefficients, 5, preconditioner=start)
    safety = newton_schulz.safety_factor(coefficients)
    return jax.jit(
        lambda G: newton_schulz.newton_schulz(
            G, table, eps=0, safety=safety, platforms=("cpu",), **settings
        )
    )


def orthogonalised(matrix, **settings):
    return np.asarray(
        compiled(**settings)(jnp.asarray(matrix, jnp.float32)), np.float64
    )


def distance(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("start", TABLES)
def test_every_singular_value_ends_near_one(start):
    table, low = TABLES[start], LOWEST[start]
    assert np.max(np.abs(through(table, spread(low, BEYOND[0])) - 1)) <= BOUND
    # Smaller ones are stretched too, the more the larger they are.
    small = through(table, np.linspace(0, low, 1001))
    assert small[0] == 0
    assert small[1] > 0.5 / 1000
    assert small.max() <= 1 + BOUND
    # What rounding moves between the two, the second brings near 1 all the same.
    first, second = table.halves
    between = on_values(first, spread(low, BEYOND[0])).min()
    assert 0 < between < 0.1
    moved = spread(between, BEYOND[1])
    assert np.max(np.abs(on_values(second, moved) - 1)) <= BOUND_ROUNDED


@pytest.mark.parametrize("start", TABLES)
def test_operands_stay_below_the_bound(start):
    """Of any R with eigenvalues in reach: what is multiplied has its mean apart."""
    for polynomial, high in zip(TABLES[start].halves, BEYOND, strict=True):
        Y, factors = terms(polynomial, np.linspace(0, high, 4001))
        operands = [*factors, np.asarray(polynomial.output) @ Y]
        assert max(np.ptp(operand) for operand in operands) < LARGEST_FACTOR


@pytest.mark.parametrize("kind", ["spread", "equal", "zero", "low rank"])
def test_with_the_identity_apart_the_polynomial_is_the_same(kind):
    values = {
        "spread": np.geomspace(1, 1e-3, 8),
        "equal": np.full(8, 0.3),
        "zero": np.zeros(8),
        "low rank": np.arange(8) < 3,
    }[kind]
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0]
    for polynomial in GRAM_MINIMAX.halves:
        # In float64, where sums of terms up to 100 are right to 1e-10.
        with jax.enable_x64(True):
            R = jnp.asarray(basis * np.asarray(values, np.float64) ** 2 @ basis.T)
            expected = evaluate(polynomial, R, jnp.matmul)
            mean, rest = evaluate_apart(polynomial, R, jnp.matmul)
        found = np.asarray(mean) * np.eye(8) + np.asarray(rest)
        np.testing.assert_allclose(found, expected, atol=1e-10)
        np.testing.assert_allclose(np.trace(rest), 0, atol=1e-10)


SPECTRA = {
    "equal": np.ones(32),
    "condition 1e2": np.geomspace(1, 1e-2, 32),
    "condition 1e3": np.geomspace(1, 1e-3, 32),
    "one large": np.r_[1.0, 0.45 * np.geomspace(1, 1e-2, 31)],
    "low rank": (np.arange(32) < 5).astype(float),
}


def with_values(values, shape, seed=0):
    rng = np.random.default_rng(seed)
    left, _, right = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    return (left * values) @ right


@pytest.mark.parametrize("hot_dtype", HALF)
@pytest.mark.parametrize("shape", [(32, 32), (32, 128), (128, 32)])
@pytest.mark.parametrize("kind", SPECTRA)
def test_it_is_about_as_near_to_the_polar_factor_as_float64(shape, kind, hot_dtype):
    matrix = with_values(SPECTRA[kind], shape).astype(np.float32)
    left, values, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    known = values > 1e-6 * values[0]
    exact = np.where(known, through(GRAM_MINIMAX, values / np.linalg.norm(values)), 0)
    method = distance((left * exact) @ right, (left * known) @ right)
    # Each of 20 roundings to 2^-12 of what is up to 36 (q at zero) in units of what is
    # left. Where the input has nothing, what X is rounded by grows a thousandfold.
    rounding = 0.15 if kind == "low rank" else 0.02
    for size in (1e-20, 1.0, 1e15):
        found = orthogonalised(size * matrix, hot_dtype=hot_dtype)
        assert distance(found, (left * known) @ right) < method + rounding
        assert np.linalg.norm(found, 2) < 1 + BOUND + rounding


@pytest.mark.parametrize("hot_dtype", HALF)
@pytest.mark.parametrize("shape", [(6, 24), (24, 6), (8, 8)])
def test_nothing_leaves_the_range(hot_dtype, shape):
    """Matrices that make R, the factors or q(R) as large as they get."""
    single, line, diagonal, signs = np.zeros((4, *shape))
    single[1, 2] = 1
    line[0] = np.arange(1, shape[1] + 1)
    diagonal[np.arange(6), np.arange(6)] = np.geomspace(1, 1e-3, 6)
    signs[:] = np.where(np.random.default_rng(0).normal(size=shape) > 0, 1, -1)
    for matrix in (single, line, diagonal, signs):
        found = orthogonalised(matrix, hot_dtype=hot_dtype)
        values = np.linalg.svd(found, compute_uv=False)
        assert 1 - BOUND < values[0] < 1 + 1.5 * BOUND


@pytest.mark.parametrize("hot_dtype", HALF)
def test_large_rows_stay_bounded(hot_dtype):
    """Along the axes nothing averages over what q, up to 36, is rounded by."""
    rng = np.random.default_rng(7)
    made = []
    for i in range(300):
        rows = np.full(12, np.exp(rng.uniform(np.log(1e-4), 0)))
        rows *= rng.uniform(0.5, 1, 12) if i % 3 else 1
        rows[: rng.integers(1, 5)] = rng.uniform(0.05, 1)
        G = np.eye(12, 24) if i % 2 else rng.normal(size=(12, 24)) / 5
        made.append(G * rows[:, None])
    largest = lambda stack: np.linalg.norm(stack, 2, axis=(-2, -1)).max()  # noqa: E731
    found = orthogonalised(np.stack(made), hot_dtype=hot_dtype)
    assert largest(found) < 1 + 1.5 * BOUND
    # Beyond what the second polynomial covers it has no bound: half of that is kept.
    first = GRAM_MINIMAX._replace(halves=GRAM_MINIMAX.halves[:1])
    call = jax.jit(
        lambda G: newton_schulz.newton_schulz(G, first, eps=0, hot_dtype=hot_dtype)
    )
    between = np.asarray(call(jnp.asarray(np.stack(made), jnp.float32)), np.float64)
    assert largest(between) < 1 + (BEYOND[1] - 1) / 2


@pytest.mark.parametrize(("platform", "dtype"), [("gpu", "fp16"), ("other", "fp32")])
def test_auto_takes_fp16_and_never_bf16(platform, dtype):
    table = newton_schulz.coefficient_table("gram_minimax", 5)
    program = lambda name: str(  # noqa: E731
        jax.make_jaxpr(
            lambda G: newton_schulz.newton_schulz(
                G, table, hot_dtype=name, platforms=(platform,)
            )
        )(jnp.ones((4, 8)))
    )
    assert program("auto") == program(dtype)


@pytest.mark.parametrize("hot_dtype", HALF)
@pytest.mark.parametrize("start", TABLES)
def test_zero_stays_zero(start, hot_dtype):
    found = orthogonalised(
        np.zeros((2, 4, 6)), hot_dtype=hot_dtype, preconditioner=start
    )
    np.testing.assert_array_equal(found, 0)


@pytest.mark.parametrize("hot_dtype", HALF)
@pytest.mark.parametrize("shape", [(12, 36), (36, 12)])
def test_scaled_rows_are_orthogonalised(hot_dtype, shape):
    matrix = np.random.default_rng(1).normal(size=shape)
    wide = matrix if shape[0] < shape[1] else matrix.T
    scaled = wide / np.sqrt(np.abs(wide @ wide.T).sum(axis=1, keepdims=True))
    left, values, right = np.linalg.svd(scaled, full_matrices=False)
    expected = (left * through(GRAM_MINIMAX_AOL, values)) @ right
    found = orthogonalised(matrix, hot_dtype=hot_dtype, preconditioner="aol")
    found = found if shape[0] < shape[1] else found.T
    assert distance(found, expected) < 0.015


@pytest.mark.parametrize(("start", "count"), [("frobenius", 9), ("aol", 7)])
@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (8, 8)])
def test_it_takes_fewer_products_than_polar_express(start, count, shape):
    table = newton_schulz.coefficient_table("gram_minimax", 5, preconditioner=start)
    program = jax.make_jaxpr(
        lambda G: newton_schulz.newton_schulz(
            G, table, preconditioner=start, hot_dtype="fp16", platforms=("gpu",)
        )
    )
    n = max(shape)
    expected = 2 * 4 * 8 * 8 * n + count * 2 * 8**3
    assert flops_of_dots(program(jnp.ones(shape)).jaxpr) == expected
    found = newton_schulz.newton_schulz_flops(8, n, table, "gram", "fp16")
    assert found == expected
    steps = newton_schulz.coefficient_table("polar_express", 5 - (start == "aol"))
    method = newton_schulz.cheaper_method(8, n, steps, "fp16")
    assert expected < newton_schulz.newton_schulz_flops(8, n, steps, method, "fp16")


@pytest.mark.parametrize("hot_dtype", HALF)
@pytest.mark.parametrize(
    "kind", ["random", "condition 1e2", "condition 1e3", "one large"]
)
def test_it_is_nearer_to_the_polar_factor_than_polar_express(kind, hot_dtype):
    values = {
        "random": None,
        "condition 1e2": np.geomspace(1, 1e-2, 96),
        "condition 1e3": np.geomspace(1, 1e-3, 96),
        "one large": np.r_[1.0, 0.45 * np.geomspace(1, 1e-3, 95)],
    }[kind]
    rng = np.random.default_rng(3)
    left, own, right = np.linalg.svd(rng.normal(size=(96, 384)), full_matrices=False)
    matrix = (left * (own if values is None else values)) @ right
    polar = left @ right
    settings = {"method": "gram", "hot_dtype": hot_dtype}
    express = orthogonalised(matrix, coefficients="polar_express", **settings)
    assert distance(orthogonalised(matrix, **settings), polar) < distance(
        express, polar
    )
