"""Packing, power steps and powers of symmetric matrices against NumPy."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionopt_jax._matrices import eigenbasis
from tests import _compare
from tests.references import kl_shampoo as reference
from tests.references import shampoo

HIGHEST = jax.lax.Precision.HIGHEST


def orthogonal(rng, d):
    return np.linalg.qr(rng.normal(size=(d, d)))[0]


METHODS = {
    "gram_schmidt": eigenbasis.gram_schmidt,
    "cholesky_qr": functools.partial(eigenbasis.cholesky_qr, precision=HIGHEST),
}
methods = pytest.mark.parametrize("method", METHODS)


@functools.partial(jax.jit, static_argnames="method")
def power_step(S, Q, method):
    return METHODS[method](S @ Q, Q)


def symmetric(rng, values):
    basis = orthogonal(rng, len(values))
    return jnp.asarray((basis * values) @ basis.T, jnp.float32)[None]


@pytest.mark.parametrize("d", [1, 2, 5])
def test_packing_keeps_every_entry_in_half_the_space(rng, d):
    square = rng.normal(size=(3, d, d))
    full = jnp.asarray(square + np.swapaxes(square, 1, 2), jnp.float32)
    packed = jax.jit(eigenbasis.pack_symmetric)(full)
    assert packed.shape[1:] == eigenbasis.packed_shape(d)
    assert packed[0].size <= (d + 1) * (d + 2) // 2
    unpacked = jax.jit(lambda p: eigenbasis.unpack_symmetric(p, d))(packed)
    np.testing.assert_array_equal(unpacked, full)


@methods
@pytest.mark.parametrize("condition", [1e1, 1e4, 1e10])
def test_power_steps_end_at_the_eigenvectors(rng, method, condition):
    values = np.geomspace(1, 1 / condition, 6)
    matrix = symmetric(rng, values)
    basis = jnp.eye(6)[None]
    for _ in range(60):
        basis = power_step(matrix, basis, method)
    # Two passes leave a few units in the last place.
    _compare.assert_within((basis.mT @ basis)[0], np.eye(6), 3e-6)
    rotated = np.asarray(basis.mT @ matrix @ basis, np.float64)[0]
    # Neighbouring eigenvalues differ by a factor of at least 1.58, whose 60th power is
    # below float32's rounding of the largest.
    _compare.assert_within(rotated, np.diag(values), 1e-6)


@methods
def test_dependent_columns_still_give_an_orthonormal_basis(rng, method):
    vector = rng.normal(size=(5, 1))
    matrix = jnp.asarray(vector @ vector.T, jnp.float32)[None]
    start = jnp.eye(5)[None]
    basis = power_step(matrix, start, method)[0]
    _compare.assert_within(basis.T @ basis, np.eye(5), 3e-6)
    cosine = abs(np.asarray(basis)[:, 0] @ vector[:, 0]) / np.linalg.norm(vector)
    assert cosine == pytest.approx(1.0, abs=1e-6)


@methods
def test_null_space_keeps_its_basis(rng, method):
    old = orthogonal(rng, 5)
    span = orthogonal(rng, 5)[:, :2]
    matrices = [span @ np.diag([2.0, 0.5]) @ span.T, np.zeros((5, 5))]
    stepped = power_step(
        jnp.asarray(np.stack(matrices), jnp.float32),
        jnp.asarray(np.stack([old, old]), jnp.float32),
        method,
    )
    for matrix, basis in zip(matrices, np.asarray(stepped), strict=True):
        expected = reference.orthonormal(matrix @ old, old)
        signs = np.sign(np.sum(expected * basis, axis=0))
        # Two factorisations, each a few units in the last place of float32.
        _compare.assert_within(signs * basis, expected, 3e-6)
    _compare.assert_within(stepped[1], old, 3e-6)


@methods
@pytest.mark.parametrize("d", [7, 16, 40])
@pytest.mark.parametrize("rank", [1.0, 0.5])
def test_long_sides_are_taken_a_few_columns_at_a_time(rng, method, d, rank):
    matrices, starts = [], []
    for size in (1.0, 1e-25):
        known = orthogonal(rng, d)[:, : round(rank * d)]
        spectrum = np.geomspace(1, 1e-3, known.shape[1])
        matrices.append(size * (known * spectrum) @ known.T)
        starts.append(orthogonal(rng, d))
    S, Q = (np.stack(stack).astype(np.float32) for stack in (matrices, starts))
    basis = np.asarray(power_step(jnp.asarray(S), jnp.asarray(Q), method), np.float64)
    for i in range(2):
        # Rounding to 6e-8 in each of up to 40 products of a sum.
        _compare.assert_within(basis[i].T @ basis[i], np.eye(d), 3e-6)
        # What S can say of its range is what its first columns span.
        rounded = S[i].astype(np.float64) @ Q[i].astype(np.float64)
        first = np.linalg.qr(rounded[:, : round(rank * d) // 2])[0]
        ours = basis[i][:, : first.shape[1]]
        # A condition of 1e3 amplifies the rounding of the product.
        _compare.assert_within(ours @ (ours.T @ first), first, 1e-3)


def test_no_lapack_where_collectives_may_run_beside_it():
    stack = jax.ShapeDtypeStruct((2, 6, 6), jnp.float32)
    step = jax.jit(lambda S, Q: eigenbasis.power_step(S, Q, HIGHEST))
    powers = {
        alone: jax.jit(
            functools.partial(
                lambda S, alone: eigenbasis.symmetric_power(
                    S, -0.5, jnp.ones((2, 1)), alone=alone
                ),
                alone=alone,
            )
        )
        for alone in (True, False)
    }

    def calls(program, *args):
        return re.findall(r"custom_call @([\w$]+)", program.lower(*args).as_text())

    lapack = lambda names: [name for name in names if "lapack" in name]  # noqa: E731
    assert lapack(calls(step, stack, stack)) == []
    assert lapack(calls(powers[False], stack)) == []
    # The same search finds it where it is.
    assert lapack(calls(powers[True], stack))
    assert lapack(calls(jax.jit(jnp.linalg.qr), stack))


@pytest.mark.parametrize("d", [1, 2, 3, 8, 21])
def test_jacobi_finds_eigenvalues_and_vectors(rng, d):
    # Full rank, rank one, and two equal eigenvalues beside a negative one.
    vector = rng.normal(size=(d, 1))
    equal = np.sign(np.arange(d) - 0.5) * np.maximum(np.arange(d), 2)
    basis = orthogonal(rng, d)
    matrices = [
        basis @ np.diag(np.geomspace(1, 1e-4, d)) @ basis.T,
        vector @ vector.T,
        basis @ np.diag(equal) @ basis.T,
    ]
    S = np.stack(matrices).astype(np.float32)
    values, vectors = jax.jit(eigenbasis.jacobi)(jnp.asarray(S))
    vectors = np.asarray(vectors, np.float64)
    for i in range(3):
        largest = np.abs(np.linalg.eigvalsh(S[i].astype(np.float64))).max()
        # Each of about 8 d rotations of an axis rounds to 6e-8.
        _compare.assert_within(vectors[i].T @ vectors[i], np.eye(d), 1e-5)
        again = (vectors[i] * np.asarray(values[i])) @ vectors[i].T
        _compare.assert_within(again / largest, S[i] / largest, 1e-5)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("exponent", [-0.25, -0.5, 0.5])
def test_symmetric_power(rng, exponent, alone):
    matrix = symmetric(rng, np.geomspace(1, 1e-2, 6))
    result = eigenbasis.symmetric_power(
        matrix, exponent, jnp.full((1, 1), 1e-3), alone=alone
    )
    expected = shampoo.power(matrix[0], exponent, ridge=1e-3)
    # Float32 eigenvalues to 1e-7, a relative 1e-5 of the smallest.
    _compare.assert_within(result[0], expected, 1e-4)


@pytest.mark.parametrize("alone", [True, False])
def test_null_directions_without_ridge_give_zero(rng, alone):
    result = eigenbasis.symmetric_power(
        jnp.zeros((1, 3, 3)), -0.25, jnp.zeros((1, 1)), alone=alone
    )
    assert not np.asarray(result).any()
