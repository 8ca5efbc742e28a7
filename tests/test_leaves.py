"""Which leaves are served, in what their averages are kept, and how they are copied."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from fusionopt_jax import _leaves


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (jnp.bfloat16, jnp.float32),
        (jnp.float16, jnp.float32),
        (jnp.float32, jnp.float32),
        (jnp.complex64, jnp.complex64),
    ],
)
def test_averages_are_kept_in_float32_or_its_complex_numbers(dtype, wide):
    leaf = jnp.ones(3, dtype)
    assert _leaves.wide_dtype(leaf) == wide
    assert _leaves.widened(leaf).dtype == wide
    [zeros] = jax.tree.leaves(_leaves.wide_zeros([leaf]))
    assert zeros.dtype == wide
    # A narrower state holds complex numbers in the narrowest that there are.
    narrow = _leaves.wide_dtype(leaf, jnp.bfloat16)
    assert narrow == (wide if dtype == jnp.complex64 else jnp.bfloat16)


def test_doubles_are_averaged_in_float32_too():
    with jax.enable_x64(True):
        assert _leaves.wide_dtype(jnp.ones(3, jnp.float64)) == jnp.float32
        assert _leaves.wide_dtype(jnp.ones(3, jnp.complex128)) == jnp.complex64


def test_a_copy_of_a_shape_is_a_shape_with_its_sharding():
    mesh = jax.make_mesh((2,), ("x",))
    sharding = jax.NamedSharding(mesh, P("x"))
    shape = jax.ShapeDtypeStruct((4, 3), jnp.bfloat16, sharding=sharding)
    copy = _leaves.copied(shape, jnp.float32)
    assert (copy.shape, copy.dtype, copy.sharding) == ((4, 3), jnp.float32, sharding)
    leaf = jnp.ones(3)
    copy = _leaves.copied(leaf, jnp.float32)
    leaf.delete()
    np.testing.assert_array_equal(copy, np.ones(3))


def test_numbers_of_numpy_are_leaves_like_any():
    _leaves.check_leaves("mona", {"a": np.ones(3, np.float32), "hole": None})
    with pytest.raises(ValueError, match=r"`mona`.*'a' of int64\[3\].*eqx\.filter"):
        _leaves.check_leaves("mona", {"a": np.ones(3, np.int64)})
