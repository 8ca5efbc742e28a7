"""Packing, power steps and powers of symmetric matrices against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionopt_jax._matrices import eigenbasis
from tests import _compare
from tests.references import kl_shampoo as reference
from tests.references import shampoo

pytestmark = pytest.mark.usefixtures("quick_compilation")

HIGHEST = jax.lax.Precision.HIGHEST


def orthogonal(rng, d):
    return np.linalg.qr(rng.normal(size=(d, d)))[0]


@functools.partial(jax.jit, static_argnames="method")
def power_step(S, Q, method):
    return eigenbasis.power_step(S, Q, method, HIGHEST)


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


@pytest.mark.parametrize("method", ["qr", "cholesky_qr"])
@pytest.mark.parametrize("condition", [1e1, 1e4, 1e10])
def test_power_steps_end_at_the_eigenvectors(rng, method, condition):
    values = np.geomspace(1, 1 / condition, 6)
    matrix = symmetric(rng, values)
    basis = jnp.eye(6)[None]
    for _ in range(60):
        basis = power_step(matrix, basis, method)
    # Two passes of Cholesky-QR, like one QR, leave a few units in the last place.
    _compare.assert_within((basis.mT @ basis)[0], np.eye(6), 3e-6)
    rotated = np.asarray(basis.mT @ matrix @ basis, np.float64)[0]
    # Neighbouring eigenvalues differ by a factor of at least 1.58, whose 60th power is
    # below float32's rounding of the largest.
    _compare.assert_within(rotated, np.diag(values), 1e-6)


@pytest.mark.parametrize("method", ["qr", "cholesky_qr"])
def test_dependent_columns_still_give_an_orthonormal_basis(rng, method):
    vector = rng.normal(size=(5, 1))
    matrix = jnp.asarray(vector @ vector.T, jnp.float32)[None]
    start = jnp.eye(5)[None]
    basis = power_step(matrix, start, method)[0]
    _compare.assert_within(basis.T @ basis, np.eye(5), 3e-6)
    cosine = abs(np.asarray(basis)[:, 0] @ vector[:, 0]) / np.linalg.norm(vector)
    assert cosine == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("method", ["qr", "cholesky_qr"])
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


@pytest.mark.parametrize("exponent", [-0.25, -0.5, 0.5])
def test_symmetric_power(rng, exponent):
    matrix = symmetric(rng, np.geomspace(1, 1e-2, 6))
    result = eigenbasis.symmetric_power(matrix, exponent, jnp.full((1, 1), 1e-3))
    expected = shampoo.power(matrix[0], exponent, ridge=1e-3)
    # Float32 eigenvalues to 1e-7, a relative 1e-5 of the smallest.
    _compare.assert_within(result[0], expected, 1e-4)


def test_null_directions_without_ridge_give_zero(rng):
    result = eigenbasis.symmetric_power(jnp.zeros((1, 3, 3)), -0.25, jnp.zeros((1, 1)))
    assert not np.asarray(result).any()
