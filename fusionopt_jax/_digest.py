"""A short integer per array that changes whenever any bit of the array does.

For element i with bits b_i and position word p_i = mix(i), the digest is, modulo 2^32,
the two sums over i of h_i = mix(SEED b_i + p_i) and of (p_i | 1) h_i, with a mixing
function that is a bijection of 32-bit words. So a change of one element changes the
digest with certainty, and any other change escapes with a chance of about 2^-64.
Integers add up exactly, in every order: the digest is the same on every device, sharded
or not, and NaN is a bit pattern like any other.
"""

import contextlib
import functools
import math
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Shaped, UInt32

SEED = 0x9E3779B1
"""An odd constant, so that the product with it is a bijection."""

_known: dict[int, tuple[weakref.ref[Any], np.ndarray]] = {}


def array_digest(array: Any) -> UInt32[Array | np.ndarray, "2"]:
    """The digest of one array; remembered for as long as a device array lives.

    A traced array has a traced digest, computed by the program that is being traced.
    """
    if isinstance(array, Tracer):
        return _digest(array, _first_axis_is_whole(array))
    # Known weights are compared now, also by a function that is being traced. Elsewhere
    # this would compute the positions of all elements one operation after another.
    tracing = isinstance(jnp.zeros((), jnp.uint32), Tracer)
    with jax.ensure_compile_time_eval() if tracing else contextlib.nullcontext():
        if not isinstance(array, jax.Array):
            return np.asarray(_digest(jnp.asarray(_in_jax_words(array)), True))
        known = _known.get(id(array))
        # An array never changes, but its id can be given to another one later.
        if known is not None and known[0]() is array:
            return known[1]
        digest = np.asarray(_digest(array, _first_axis_is_whole(array)))
    key = id(array)
    _known[key] = (weakref.ref(array, lambda _: _known.pop(key, None)), digest)
    return digest


def _in_jax_words(array: Any) -> np.ndarray:
    """An array of the host, cut into words that JAX takes without rounding."""
    array = np.asarray(array)
    if jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype:
        return array
    return np.ascontiguousarray(array)[..., None].view(np.uint32)


def _first_axis_is_whole(array: Array) -> bool:
    """Whether a loop over the first axis gathers nothing, as far as is known."""
    if isinstance(array, Tracer):
        spec = jax.typeof(array).sharding.spec
        return not spec or spec[0] is None
    return len(array.sharding.device_set) == 1


@functools.partial(jax.jit, static_argnums=1)
def _digest(array: Shaped[Array, "..."], layered: bool) -> UInt32[Array, "2"]:
    """Both sums of mixed bits."""
    if array.ndim < 3 or not layered:
        return _sums(array, jnp.uint32(0))
    # Layer by layer: backends that do not fuse this into one pass would otherwise hold
    # two words more for every weight.
    size = math.prod(array.shape[1:]) * max(1, array.dtype.itemsize // 4)

    def add_layer(
        total: UInt32[Array, "2"], layer: tuple[UInt32[Array, ""], Array]
    ) -> tuple[UInt32[Array, "2"], None]:
        """Add the sums of one layer."""
        index, values = layer
        return total + _sums(values, index * jnp.uint32(size % 2**32)), None

    indices = jnp.arange(array.shape[0], dtype=jnp.uint32)
    zero = jnp.zeros(2, jnp.uint32)
    return jax.lax.scan(add_layer, zero, (indices, array))[0]


def _sums(array: Shaped[Array, "..."], start: UInt32[Array, ""]) -> UInt32[Array, "2"]:
    """Both sums of an array whose first element has position `start`."""
    words = _as_words(array)
    position = jnp.broadcast_to(start, words.shape)
    stride = 1
    for axis in reversed(range(words.ndim)):
        # Per axis instead of a flat index: reshaping would gather a sharded array.
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position = position + index * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    place = _mix(position + jnp.uint32(sum(str(array.dtype).encode())))
    mixed = _mix(words * jnp.uint32(SEED) + place)
    first = jnp.sum(mixed, dtype=jnp.uint32)
    second = jnp.sum(mixed * (place | jnp.uint32(1)), dtype=jnp.uint32)
    return jnp.stack([first, second])


def _as_words(array: Shaped[Array, "..."]) -> UInt32[Array, "..."]:
    """The bits of an array as 32-bit words."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    elif array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    elif jnp.iscomplexobj(array):
        array = jnp.stack([array.real, array.imag], axis=-1)
    # Elements of 8 bytes become two words on a last axis of their own.
    size = min(array.dtype.itemsize, 4)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[size]
    return jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)


def _mix(words: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A bijection of words in which each bit moves about half of the result."""
    words = words ^ (words >> 16)
    words = words * jnp.uint32(0x7FEB352D)
    words = words ^ (words >> 15)
    words = words * jnp.uint32(0x846CA68B)
    return words ^ (words >> 16)
