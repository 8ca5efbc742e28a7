"""Arrays made once more of what they were made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionopt_jax._rematerialised import afterwards, with_origins

X = jnp.array([[1.0, -2.0, 0.5], [4.0, 0.25, -1.0]])
Y = jnp.array([[0.5, 3.0, 1.0], [-2.0, 1.0, 2.0]])


def origins(function, *args):
    """What a traced function returns, with its origins and what they make again."""
    found = {}

    def traced(*args):
        results, found["origins"] = with_origins(function, *args)
        again = [one.again(*one.arrays) for one in found["origins"]]
        found["counts"] = [len(one.arrays) for one in found["origins"]]
        return results, again

    return *jax.jit(traced)(*args), found["counts"]


def test_makes_the_results_and_makes_them_again():
    def function(x, y):
        moment = 0.9 * y + x
        return {"a": jnp.where(x > 0, moment / jnp.sqrt(y * y), 2.0), "b": x}, moment

    (first, second), again, counts = origins(function, X, Y)
    moment = 0.9 * np.asarray(Y) + np.asarray(X)
    expected = np.where(X > 0, moment / np.abs(Y), 2.0)
    # A few roundings of fp32, the compiler's own order of them.
    np.testing.assert_allclose(first["a"], expected, rtol=1e-6)
    np.testing.assert_allclose(again[0], expected, rtol=1e-6)
    np.testing.assert_array_equal(again[1], X)
    np.testing.assert_allclose(second, moment, rtol=1e-6)
    # Of x, y and the moment that is stored, from which there is no way back.
    assert counts == [3, 1]


def test_what_is_not_made_entry_by_entry_is_kept():
    def function(x):
        product = x.T @ x
        return (jnp.cumsum(product, axis=0) + 1.0, product.sum(axis=0) * 2.0), ()

    (first, _), again, counts = origins(function, X)
    jax.tree.map(np.testing.assert_array_equal, list(first), again)
    assert counts == [1, 1]


def test_a_jitted_function_of_several_leaves_is_looked_into():
    """Optax's bias correction is one, which newer JAX does not write out."""
    shared = jax.jit(lambda x, y, count: (x / count, jnp.abs(y) / count))

    def function(x, y):
        part = y[:1, :2]
        half, quarter = shared(2.0 * x, part, jnp.float32(4))
        return (half + x, quarter * part), ()

    (first, _), again, counts = origins(function, X, Y)
    np.testing.assert_array_equal(first[0], 1.5 * np.asarray(X))
    np.testing.assert_array_equal(again[0], first[0])
    np.testing.assert_array_equal(again[1], first[1])
    # Of x, and of the part of y: neither of what only the other is made of.
    assert counts == [1, 1]


def test_a_constant_is_made_of_nothing():
    (first, _), again, counts = origins(lambda x: ((jnp.zeros(3),), x), X)
    np.testing.assert_array_equal(first[0], again[0])
    assert counts == [0]


@pytest.mark.parametrize("value", [1.0, jnp.inf, -jnp.inf, jnp.nan])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.complex64])
def test_afterwards_changes_no_value(value, dtype):
    written = jnp.full((3, 4), value, dtype)
    for call in (afterwards, jax.jit(afterwards)):
        scalar, (array,) = call(written, jnp.float32(0.5), X)
        assert scalar == 0.5
        np.testing.assert_array_equal(array, X)


def test_afterwards_is_an_identity_to_transformations():
    def function(written, scalar, array):
        scalar, (array,) = afterwards(written, scalar, array)
        return scalar * array

    scales = jnp.array([2.0, 3.0])
    mapped = jax.jit(jax.vmap(function))(X, scales, Y)
    np.testing.assert_array_equal(mapped, scales[:, None] * Y)
    gradient = jax.jit(jax.grad(lambda s: jnp.sum(function(X, s, Y))))(1.0)
    np.testing.assert_allclose(gradient, np.sum(Y), rtol=1e-6)


def test_only_cpus_get_another_program():
    lowered = lambda platform: (  # noqa: E731
        jax.jit(afterwards)
        .trace(X, jnp.float32(1), Y)
        .lower(lowering_platforms=(platform,))
        .as_text()
    )
    assert "optimization_barrier" in lowered("cpu")
    for platform in ("cuda", "rocm", "tpu"):
        text = lowered(platform)
        assert "optimization_barrier" not in text
        assert "select" not in text
