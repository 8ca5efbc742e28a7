"""What every test shares: strict JAX settings, eight CPU devices, fixed seeds."""

import jax
import numpy as np
import pytest

from tests import _compile

_compile.compile_fast()

# Before any backend starts. Eight devices cost nothing where one is used, and let the
# sharding tests run in the same process as the others.
jax.config.update("jax_num_cpu_devices", 8)
# The recordings were made in full float32; a backend must not take shorter products.
jax.config.update("jax_default_matmul_precision", "highest")
# An implicit (n,) against (m, n) is a bug more often than an intention in this library.
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator that starts from the same seed in every test."""
    return np.random.default_rng(20240515)


@pytest.fixture
def key() -> jax.Array:
    """A JAX key that is the same in every test."""
    return jax.random.key(20240515)
