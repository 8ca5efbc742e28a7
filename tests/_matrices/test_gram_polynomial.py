"""One polynomial of the Gram matrix, in fp32, against singular value decompositions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import fusionopt_jax as fo
from fusionopt_jax._matrices import newton_schulz
from fusionopt_jax._matrices.gram_polynomial import GRAM_MINIMAX, GRAM_MINIMAX_AOL

BOUND = 0.1
"""What the derivation allows."""

# The rounding of R, 2^-24 of its largest eigenvalue, turns q where q is steep: at the
# smallest singular values by up to |dq/dr| σ = 1/(2 σ²) times that, 0.03 at σ = 1e-3.
ROUNDING = 0.03


def on_values(values, polynomial=GRAM_MINIMAX.whole):
    """What it makes of singular values, in float64."""
    values = np.asarray(values, np.float64)
    Y = [np.ones_like(values), 2 * values**2 - 1]
    for a, b in polynomial.factors:
        Y.append((np.asarray(a) @ Y) * (np.asarray(b) @ Y))
    return values * (np.asarray(polynomial.output) @ Y)


def table_for(preconditioner="frobenius"):
    return newton_schulz.coefficient_table(
        "gram_minimax", 5, preconditioner=preconditioner
    )


@functools.cache
def compiled(**settings):
    table = table_for(**settings)
    return jax.jit(lambda G: newton_schulz.newton_schulz(G, table, eps=0, **settings))


@pytest.mark.parametrize(
    ("polynomial", "low"), [(GRAM_MINIMAX.whole, 1e-3), (GRAM_MINIMAX_AOL.whole, 5e-3)]
)
def test_every_singular_value_ends_near_one(polynomial, low):
    # A little above 1 as well, where rounding may leave the largest.
    turns = 1.001 * np.cos(np.linspace(0, np.pi / 2, 20001)[:-1])
    values = np.concatenate([np.geomspace(low, 1.001, 20001), turns[turns > low]])
    assert np.max(np.abs(on_values(values, polynomial) - 1)) <= BOUND
    # Smaller ones are stretched too, the more the larger they are.
    small = on_values(np.linspace(0, low, 1001), polynomial)
    assert small[0] == 0
    assert small[1] > 0.5 / 1000
    assert small.max() <= 1 + BOUND


VALUES = {
    "equal": np.ones(16),
    "condition 1e3": np.geomspace(1, 1e-3, 16),
    "condition 1e6": np.geomspace(1, 1e-6, 16),
    "low rank": np.arange(16) < 5,
    "one large": np.r_[1.0, np.full(15, 2e-3)],
}


@pytest.mark.parametrize("shape", [(16, 16), (16, 32), (64, 16)])
@pytest.mark.parametrize("kind", VALUES)
def test_matrices_follow_the_polynomial(shape, kind):
    rng = np.random.default_rng(0)
    left, _, right = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    matrix = ((left * VALUES[kind]) @ right).astype(np.float32)
    left, values, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    expected = on_values(values / np.linalg.norm(values))
    # Where the input is rounding itself, there is nothing to follow.
    known = values > 1e-6 * values[0]
    expected = (left * np.where(known, expected, 0)) @ right
    for size in (1e-20, 1.0, 1e15):
        actual = np.asarray(compiled()(jnp.asarray(size * matrix)), np.float64)
        error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
        assert error < ROUNDING
        found = np.linalg.svd(actual, compute_uv=False)
        assert found.max() < 1 + BOUND + ROUNDING


def test_scaled_rows_are_orthogonalised():
    matrix = np.random.default_rng(1).normal(size=(12, 36))
    sums = np.abs(matrix @ matrix.T).sum(axis=1, keepdims=True)
    left, values, right = np.linalg.svd(matrix / np.sqrt(sums), full_matrices=False)
    expected = (left * on_values(values, GRAM_MINIMAX_AOL.whole)) @ right
    actual = compiled(preconditioner="aol")(jnp.asarray(matrix, jnp.float32))
    assert np.linalg.norm(actual - expected) < ROUNDING * np.linalg.norm(expected)


def test_zero_stays_zero():
    out = compiled()(jnp.zeros((2, 4, 6)))
    np.testing.assert_array_equal(out, 0)


def products(jaxpr):
    """The shapes of all matrix products of a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.invars[0].aval.shape, equation.invars[1].aval.shape
        for inside in jaxprs_in_params(equation.params):
            yield from products(inside)


@pytest.mark.parametrize(("start", "count"), [("frobenius", 11), ("aol", 8)])
@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (8, 8)])
def test_it_takes_few_small_products_and_two_large(start, count, shape):
    table = table_for(start)
    program = jax.make_jaxpr(
        lambda G: newton_schulz.newton_schulz(G, table, preconditioner=start)
    )
    found = list(products(program(jnp.ones(shape)).jaxpr))
    assert len(found) == count + 2
    small = count + 2 if shape == (8, 8) else count
    assert found.count(((8, 8), (8, 8))) == small
    flops = newton_schulz.newton_schulz_flops(8, max(shape), table, "gram")
    assert flops == 4 * 8 * 8 * max(shape) + count * 2 * 8**3


@pytest.mark.parametrize("start", ["frobenius", "aol"])
def test_it_is_nearer_to_the_polar_factor_than_polar_express(start):
    """Also with a condition number of 1e4, where neither lifts all singular values."""
    for condition in (1e1, 1e3, 1e4):
        rng = np.random.default_rng(3)
        left, _, right = np.linalg.svd(rng.normal(size=(16, 32)), full_matrices=False)
        matrix = (left * np.geomspace(1, 1 / condition, 16)) @ right
        scaled = matrix
        if start == "aol":
            sums = np.abs(matrix @ matrix.T).sum(axis=1, keepdims=True)
            scaled = matrix / np.sqrt(sums)
        left, _, right = np.linalg.svd(scaled, full_matrices=False)
        steps = 4 if start == "aol" else 5
        express = fo.ns5(
            coefficients="polar_express", steps=steps, preconditioner=start, eps=0
        )
        whole = fo.ns5(coefficients="gram_minimax", preconditioner=start, eps=0)
        G = jnp.asarray(matrix, jnp.float32)
        error = lambda tx: np.linalg.norm(  # noqa: E731
            tx.update(G, tx.init(G))[0] - left @ right  # noqa: B023
        )
        assert error(whole) < error(express)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"steps": 5}, "and no steps; leave `steps` out"),
        ({"method": "plain"}, 'no plain form; use method="auto"'),
        ({"hot_dtype": "bf16"}, 'Use hot_dtype="fp16" or "fp32"'),
    ],
)
def test_what_it_cannot_do_is_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        fo.ns5(coefficients="gram_minimax", **setting)


def test_ns5_is_the_polynomial():
    matrix = jax.random.normal(jax.random.key(0), (12, 8))
    tx = fo.ns5(coefficients="gram_minimax", eps=0)
    update, _ = tx.update({"w": matrix}, tx.init({"w": matrix}))
    left, values, right = np.linalg.svd(np.asarray(matrix, np.float64), False)
    expected = (left * on_values(values / np.linalg.norm(values))) @ right
    assert np.linalg.norm(update["w"] - expected) < ROUNDING * np.linalg.norm(expected)
