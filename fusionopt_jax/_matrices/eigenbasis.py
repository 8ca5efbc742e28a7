"""Symmetric matrices in fp32: products, orthonormal bases, powers, storage.

One stack of matrices in, one out: no trees, no schedule, no Optax. A symmetric `S` is
`(b, d, d)`, an orthonormal `Q` that tracks its eigenvectors has them as columns.
"""

import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fusionopt_jax._matrices.platform import PLATFORMS, Platform, by_platform

Stack: TypeAlias = Float[Array, "b m n"]
SquareStack: TypeAlias = Float[Array, "b d d"]
Number: TypeAlias = float | int | Float[Array, ""]
"""A number, or a scalar array that a schedule provides."""

# Two Cholesky passes leave about 1e-6 where they work; where they do not, the columns
# were dependent to within fp32.
_ORTHOGONALITY_LIMIT = 1e-4

# Columns that Gram–Schmidt takes at a time: from 8 to 64 a CPU hardly cares.
_PANEL = 16

# Jacobi's method converges quadratically; six to eight sweeps are the rule.
_JACOBI_SWEEPS = 15


def product(A: Array, B: Array, precision: jax.lax.Precision) -> Array:
    """A B in fp32."""
    return jnp.matmul(
        A, B, precision=precision, preferred_element_type=jnp.dtype(jnp.float32)
    )


def gram(
    X: Stack, weights: Float[Array, "b n"] | None, precision: jax.lax.Precision
) -> Float[Array, "b m m"]:
    """X diag(weights) Xᵀ."""
    scaled = X if weights is None else X * jnp.sqrt(weights)[:, None, :]
    # Without a transposed copy.
    return jnp.einsum(
        "bij,bkj->bik",
        scaled,
        scaled,
        precision=precision,
        preferred_element_type=jnp.dtype(jnp.float32),
    )


def inverse(values: Array) -> Array:
    """One over each value, and 0 for 0."""
    positive = values > 0
    return jnp.where(positive, 1 / jnp.where(positive, values, 1), 0)


def power(values: Array, exponent: Number) -> Array:
    """Each value to a power, and 0 for 0."""
    positive = values > 0
    return jnp.where(positive, jnp.where(positive, values, 1) ** exponent, 0)


def symmetric_power(
    S: SquareStack,
    exponent: Number,
    ridge: Array,
    *,
    alone: bool,
    platforms: tuple[Platform, ...] = PLATFORMS,
) -> SquareStack:
    """(S + ridge I) ** exponent by an eigendecomposition; null directions give 0.

    Args:
        S: Positive semi-definite.
        exponent: Any number.
        ridge: `(b, 1)`.
        alone: Whether the program runs on one device, see `eigh`.
        platforms: Those that it may be compiled for, see `by_platform`.
    """
    values, vectors = eigh(S, alone=alone, platforms=platforms)
    scale = power(jnp.maximum(values, 0) + ridge, exponent)
    return product(vectors * scale[:, None, :], vectors.mT, jax.lax.Precision.HIGHEST)


def eigh(
    S: SquareStack, *, alone: bool, platforms: tuple[Platform, ...] = PLATFORMS
) -> tuple[Float[Array, "b d"], SquareStack]:
    """Eigenvalues and eigenvectors, in any order.

    Args:
        S: Symmetric.
        alone: Whether the program runs on one device. Several CPU devices take Jacobi's
            method, which is slow and needs no LAPACK: JAX 0.10 can wait for ever where
            LAPACK and a collective of forced host devices run beside each other.
        platforms: Those that it may be compiled for, see `by_platform`.
    """
    own = lambda platform: platform == "cpu" and not alone  # noqa: E731

    def version(alike: tuple[Platform, ...], S: SquareStack) -> tuple[Array, Array]:
        return jacobi(S) if own(alike[0]) else tuple(jnp.linalg.eigh(S))

    return by_platform(version, own, S, platforms=platforms)


def jacobi(S: SquareStack) -> tuple[Float[Array, "b d"], SquareStack]:
    """`eigh` by Jacobi rotations of d/2 disjoint pairs of axes at a time.

    In every round axis i of the first half is paired with axis i of the second. The
    d - 1 rounds of a round-robin tournament pair every axis with every other, and leave
    the axes in their first order. An odd d gets an axis of zeros, which never turns.
    """
    d = S.shape[-1]
    half = (d + 1) // 2
    # The first axis stays, the others go round.
    up, down = range(1, half - 1), range(half + 1, 2 * half)
    circle = [0, half, *up, *down, half - 1] if half > 1 else [0, 1]
    round_robin = jnp.asarray(circle)
    odd = ((0, 0), (0, d % 2), (0, d % 2))
    others = 1 - jnp.eye(2 * half, dtype=S.dtype)[None]
    rounding = d * float(jnp.finfo(jnp.float32).eps) ** 2
    tiny = rounding * jnp.sum(jnp.square(S), axis=(1, 2))

    def rotated(rows: Array, c: Array, s: Array) -> Array:
        first, second = rows[:, :half], rows[:, half:]
        return jnp.concatenate([c * first - s * second, s * first + c * second], axis=1)

    def diagonal(block: Array) -> Array:
        return jnp.diagonal(block, axis1=1, axis2=2)[:, :, None]

    def turn(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        A, V = carry
        # The smaller of the two angles that make the entry between the pair zero.
        between = diagonal(A[:, :half, half:])
        gap = diagonal(A[:, half:, half:]) - diagonal(A[:, :half, :half])
        divisor = jnp.abs(gap) + jnp.sqrt(gap * gap + 4 * between * between)
        sign = jnp.where(gap < 0, -1.0, 1.0)
        t = sign * 2 * between / jnp.where(divisor > 0, divisor, 1)
        c = 1 / jnp.sqrt(1 + t * t)
        A = rotated(rotated(A, c, c * t).mT, c, c * t)
        V = rotated(V, c, c * t)
        return A[:, round_robin][:, :, round_robin], V[:, round_robin]

    def sweep(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        A, V, count = carry
        A, V = jax.lax.fori_loop(0, 2 * half - 1, turn, (A, V))
        return A, V, count + 1

    def unfinished(carry: tuple[Array, Array, Array]) -> Array:
        A, _, count = carry
        outside = jnp.sum(jnp.square(A * others), axis=(1, 2))
        return (count < _JACOBI_SWEEPS) & jnp.any(outside > tiny)

    A = jnp.pad(S, odd)
    V = jnp.broadcast_to(jnp.eye(2 * half, dtype=S.dtype), A.shape)
    A, V, _ = jax.lax.while_loop(unfinished, sweep, (A, V, jnp.asarray(0)))
    return diagonal(A)[:, :d, 0], V[:, :d, :d].mT


def ordered(
    Q: SquareStack, values: Float[Array, "b d"]
) -> tuple[SquareStack, Float[Array, "b d"]]:
    """The same basis with the largest eigenvalue first."""
    order = jnp.argsort(values, axis=1, descending=True)
    return (
        jnp.take_along_axis(Q, order[:, None, :], axis=2),
        jnp.take_along_axis(values, order, axis=1),
    )


def power_step(
    S: SquareStack,
    Q: SquareStack,
    precision: jax.lax.Precision,
    platforms: tuple[Platform, ...] = PLATFORMS,
) -> SquareStack:
    """The orthonormal factor of S Q: one step towards the eigenvectors of S."""
    return orthonormal(product(S, Q, precision), Q, precision, platforms)


def orthonormal(
    Y: SquareStack,
    Q: SquareStack,
    precision: jax.lax.Precision,
    platforms: tuple[Platform, ...] = PLATFORMS,
) -> SquareStack:
    """Orthonormal columns that span what the first columns of Y span, for every number.

    Where Y has no direction of its own to give (all of it, before the first gradient),
    its columns are rounding error, and the basis stays as near to the old one as the
    new directions let it.

    CPUs take Gram–Schmidt in matrix products: LAPACK's QR isn't faster there, and JAX
    0.10 can wait for ever where LAPACK and a collective of forced host devices run
    beside each other. Accelerators, which would go through it column by column, take
    Cholesky-QR.
    """
    on_cpu = lambda platform: platform == "cpu"  # noqa: E731

    def version(alike: tuple[Platform, ...], *stacks: SquareStack) -> SquareStack:
        if on_cpu(alike[0]):
            return gram_schmidt(*stacks)
        return cholesky_qr(*stacks, precision=precision)

    return by_platform(version, on_cpu, Y, Q, platforms=platforms)


# As Gram–Schmidt, traced once for each shape: the platform has use for one of them.
@functools.partial(jax.jit, static_argnames="precision", inline=True)
def cholesky_qr(
    Y: SquareStack, Q: SquareStack, *, precision: jax.lax.Precision
) -> SquareStack:
    """`orthonormal` by two Cholesky passes; by Gram–Schmidt where those break down.

    Scaled columns have the same Q; those of S Q are then nearly orthonormal, however
    large the condition of S, once Q is near its eigenvectors.
    """
    scaled, rounding = _scaled(Y)
    lengths = _lengths(scaled)
    # A column without a direction would make the product singular.
    unit = scaled / jnp.where(lengths > 0, lengths, 1)
    X = jnp.where(lengths <= rounding, Q, unit)
    for _ in range(2):
        lower = jax.lax.linalg.cholesky(product(X.mT, X, precision))
        X = jax.lax.linalg.triangular_solve(lower, X, lower=True, transpose_a=True)
    identity = jnp.eye(X.shape[-1], dtype=X.dtype)[None]
    error = jnp.max(jnp.abs(product(X.mT, X, precision) - identity))
    return jax.lax.cond(
        # The comparison is true for NaN as well.
        ~(error < _ORTHOGONALITY_LIMIT),
        lambda: gram_schmidt(Y, Q),
        lambda: X,
    )


@functools.partial(jax.jit, inline=True)
def gram_schmidt(Y: SquareStack, Q: SquareStack) -> SquareStack:
    """`orthonormal` by Gram–Schmidt on the columns of Y, then on those of Q.

    Columns that add no more than rounding error to those before them give way to the
    old ones, which come last and so are orthogonalised against all that is new.
    """
    new = _gram_schmidt(*_scaled(Y), kept=0.5)
    free = ~jnp.any(new != 0, axis=1)

    def completed() -> SquareStack:
        order = jnp.argsort(free, axis=1, stable=True)
        last = jnp.where(free[:, None, :], Q, new)
        last = jnp.take_along_axis(last, order[:, None, :], axis=2)
        back = jnp.argsort(order, axis=1)[:, None, :]
        return jnp.take_along_axis(_gram_schmidt(last, 0.0, kept=0.0), back, axis=2)

    return jax.lax.cond(jnp.any(free), completed, lambda: new)


def _gram_schmidt(
    Y: SquareStack, least: Float[Array, "b 1 1"] | float, *, kept: float
) -> SquareStack:
    """Orthonormal columns by Gram–Schmidt, twice over; zeros where nothing is left.

    A few columns at a time, so that most of the work is in matrix products.

    Args:
        Y: The columns.
        least: Those of which no more is left after the first pass become zeros.
        kept: Those of which no more is left of 1 after the second pass do as well:
            they were rounding error.
    """
    d = Y.shape[-1]
    width = min(_PANEL, d)
    columns = jnp.arange(d + -d % width)[None, None, :]
    padded = jnp.pad(Y, ((0, 0), (0, 0), (0, -d % width)))

    def without(X: Array, basis: Array) -> Array:
        highest = jax.lax.Precision.HIGHEST
        return X - product(basis, product(basis.mT, X, highest), highest)

    def orthonormalised(panel: Array, least: Any) -> Array:
        def column(j: Array, panel: Array) -> Array:
            x = jax.lax.dynamic_slice_in_dim(panel, j, 1, axis=2)
            x = without(x, jnp.where(columns[:, :, :width] < j, panel, 0))
            length = _lengths(x)
            stays = length > least
            x = jnp.where(stays, x / jnp.where(stays, length, 1), 0)
            return jax.lax.dynamic_update_slice_in_dim(panel, x, j, axis=2)

        return jax.lax.fori_loop(0, width, column, panel)

    def step(k: Array, basis: Array) -> Array:
        start = k * width
        panel = jax.lax.dynamic_slice_in_dim(basis, start, width, axis=2)
        before = jnp.where(columns < start, basis, 0)
        # Once leaves the rounding of what was subtracted; twice doesn't.
        for limit in (least, kept):
            panel = orthonormalised(without(panel, before), limit)
        return jax.lax.dynamic_update_slice_in_dim(basis, panel, start, axis=2)

    return jax.lax.fori_loop(0, padded.shape[2] // width, step, padded)[:, :, :d]


def _scaled(Y: SquareStack) -> tuple[SquareStack, Float[Array, "b 1 1"]]:
    """Y divided by its largest entry, and the length of a column of rounding error."""
    # Squares of tiny columns would leave the range of fp32.
    largest = jnp.max(jnp.abs(Y), axis=(1, 2), keepdims=True)
    Y = Y / jnp.where(largest > 0, largest, 1)
    # Of the product that made Y, with a margin of 4.
    share = 4 * float(jnp.finfo(jnp.float32).eps) * Y.shape[-1] ** 0.5
    return Y, share * jnp.max(_lengths(Y), axis=2, keepdims=True)


def _lengths(Y: Stack) -> Float[Array, "b 1 n"]:
    """The length of each column."""
    return jnp.sqrt(jnp.sum(Y * Y, axis=1, keepdims=True))


def packed_shape(d: int) -> tuple[int, int]:
    """The shape in which `pack_symmetric` keeps a symmetric d × d matrix."""
    even = d + d % 2
    return even + 1, even // 2


def pack_symmetric(S: SquareStack) -> Float[Array, "b rows half"]:
    """The lower triangle of each matrix as a rectangle of half the size.

    With halves of size h = d/2, the lower triangle of the last h rows and columns is
    turned into the corner that the lower triangle of the first h columns leaves free
    when it is moved down by one row. An odd d is padded with zeros.
    """
    d = S.shape[-1]
    rows, half = packed_shape(d)
    padded = jnp.pad(S, ((0, 0), (0, d % 2), (0, d % 2)))
    first = jnp.pad(padded[:, :, :half], ((0, 0), (1, 0), (0, 0)))
    last = jnp.pad(padded[:, half:, half:].mT, ((0, 0), (0, rows - half), (0, 0)))
    return jnp.where(_corner(rows, half), last, first)


def unpack_symmetric(packed: Float[Array, "b rows half"], d: int) -> SquareStack:
    """The inverse of `pack_symmetric`."""
    half = packed_shape(d)[1]
    below, corner = packed[:, 1:], _corner(half, half)
    # Row i, column j of the packed corner is row j, column i of the last block.
    last = jnp.where(corner, packed[:, :half], packed[:, :half].mT)
    first = jnp.where(corner.mT, below[:, :half], below[:, :half].mT)
    cross = below[:, half:]
    left = jnp.concatenate([first, cross], axis=1)
    right = jnp.concatenate([cross.mT, last], axis=1)
    return jnp.concatenate([left, right], axis=2)[:, :d, :d]


def _corner(rows: int, columns: int) -> Array:
    """Where the row's number is at most the column's."""
    return (jnp.arange(rows)[:, None] <= jnp.arange(columns)[None, :])[None]
