r"""Numbers of a state in fewer bits.

In blocks of 8 bits, each with one fp32 scale:

.. math::
    c = \operatorname{round}\Bigl(127 \operatorname{sign}(x) \sqrt{|x| / s}\Bigr),
    \qquad x \approx s\,c\,|c| / 127^2, \qquad s = \max_\text{block} |x|

The square makes steps that grow with the number, from s/16129 at zero to s/64. In bf16
with stochastic rounding: up or down to a neighbour, by a chance that makes the mean
exact.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from fusionopt_jax._types import Array, Float, Int

BLOCK = 128
"""How many numbers at most share a scale, where a row can be halved that far."""

_LARGEST = 127
_TINY = float(jnp.finfo(jnp.float32).tiny)


def scales_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scales of an array: its own, with blocks along the last axis.

    A row is halved while that can be done and its parts are longer than `BLOCK`. So all
    blocks are of one length and their number is a power of two, as that of devices is.
    """
    if not shape:
        return ()
    count = 1
    while shape[-1] // count > BLOCK and shape[-1] // count % 2 == 0:
        count *= 2
    return (*shape[:-1], count)


def to_blocks(
    x: Float[Array, "*shape"],
) -> tuple[Int[Array, "*shape"], Float[Array, "*scales"]]:
    """int8 codes of an array, and the fp32 scale of each of their blocks.

    Zeros stay zeros and the largest entry of a block is exact. A block with an entry
    that is not finite comes back as NaN; one without a normal number as zeros.
    """
    blocks = _split(x.astype(jnp.float32))
    scales = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True, initial=0.0)
    scales = jnp.where(scales < _TINY, 0.0, scales)
    usable = (scales > 0) & jnp.isfinite(scales)
    # XLA multiplies by the reciprocal, and takes that of the largest numbers for zero.
    unit = jnp.where(scales > 1, 0.25, 1.0)
    shares = jnp.where(usable, unit * blocks / jnp.where(usable, unit * scales, 1), 0)
    codes = jnp.round(_LARGEST * jnp.sign(shares) * jnp.sqrt(jnp.abs(shares)))
    scales = scales.reshape(scales_shape(x.shape))
    return codes.astype(jnp.int8).reshape(x.shape), scales


def from_blocks(
    codes: Int[Array, "*shape"], scales: Float[Array, "*scales"]
) -> Float[Array, "*shape"]:
    """The fp32 numbers that codes and scales stand for."""
    wide = _split(codes.astype(jnp.float32))
    largest = jnp.abs(wide) == _LARGEST
    # Selected, since XLA may divide the scales instead and round the largest entry.
    shares = jnp.where(largest, jnp.sign(wide), wide * jnp.abs(wide) / _LARGEST**2)
    return (shares * scales.reshape(*wide.shape[:-1], 1)).reshape(codes.shape)


def stochastic_bf16(x: Float[Array, "*shape"], seed: Any) -> Float[Array, "*shape"]:
    """An array in bf16, each entry rounded up or down so that its mean is right.

    The chance comes from the seed and the entry's position alone, and so is the same
    on any number of devices. What bf16 holds exactly stays as it is; finite numbers
    stay finite, and others what they are.

    Args:
        x: The array, taken in fp32.
        seed: An unsigned 32-bit integer, another one for each step and each array.
    """
    x = x.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    kept = jnp.uint32(0xFFFF0000)
    exponent = jnp.uint32(0x7F800000)
    rounded = (bits + (_random_bits(x.shape, seed) >> 16)) & kept
    overflows = rounded & exponent == exponent
    rounded = jnp.where(overflows, bits & kept, rounded) >> 16
    narrow = jax.lax.bitcast_convert_type(rounded.astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), narrow, x.astype(jnp.bfloat16))


def _split(x: Array) -> Array:
    """An array with its last axis as blocks and their entries."""
    shape = scales_shape(x.shape)
    size = x.shape[-1] // shape[-1] if x.shape else 1
    return x.reshape(*shape, size)


def _random_bits(shape: tuple[int, ...], seed: Any) -> Array:
    """32 bits for each entry, a hash of its position and of the seed."""
    position = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :]) % 2**32
        place = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        position = position + place * jnp.uint32(stride)
    return mixed(mixed(position) ^ seed)


def mixed(x: Any) -> Any:
    """A permutation of the 32-bit integers, each bit of which depends on all of them.

    Source: C. Wellons, *Prospecting for Hash Functions*, 2018 (`lowbias32`).
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
