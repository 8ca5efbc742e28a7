r"""Kronecker factors of a stack of matrices: statistics, eigenbases, inverse roots.

One stack of matrices in, one out: no trees, no schedule, no Optax. Every stack is
`(b, m, n)`. A side of it has a factor :math:`S` `(b, d, d)`, an orthonormal basis
:math:`Q` `(b, d, d)` that tracks the eigenvectors of :math:`S`, and eigenvalues
:math:`\lambda` `(b, d)`; `a` is the side of the rows, `c` that of the columns:

.. math::
    S_a \leftarrow b S_a + (1-b)\,G S_c^{-1} G^\top / n, \qquad
    \lambda_a \leftarrow b \lambda_a + (1-b)\,
        \operatorname{mean}_j\bigl((Q_a^\top G Q_c)_{ij}^2 / \lambda_{c,j}\bigr),

with rows and columns exchanged for the other side. A side that is `None` is the
identity.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Orthonormalisation: TypeAlias = Literal["auto", "qr", "cholesky_qr"]
Stack: TypeAlias = Float[Array, "b m n"]
SquareStack: TypeAlias = Float[Array, "b d d"]
Number: TypeAlias = float | int | Float[Array, ""]
"""A number, or a scalar array that a schedule provides."""

ORTHONORMALISATIONS: tuple[Orthonormalisation, ...] = ("auto", "qr", "cholesky_qr")

# Two Cholesky passes leave about 1e-6 where they work; where they do not, the columns
# were dependent to within fp32.
_ORTHOGONALITY_LIMIT = 1e-4


class Side(NamedTuple):
    """The eigenbasis of one side of a stack of matrices.

    Attributes:
        basis: Orthonormal vectors as columns, fp32 `(b, d, d)`.
        values: An eigenvalue for each of them, fp32 `(b, d)`.
    """

    basis: SquareStack
    values: Any


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


def rotated(
    X: Stack, a: Side | None, c: Side | None, precision: jax.lax.Precision
) -> Stack:
    """Q_aᵀ X Q_c."""
    if c is not None:
        X = product(X, c.basis, precision)
    if a is not None:
        X = product(a.basis.mT, X, precision)
    return X


def precondition(
    M: Stack,
    a: Side | None,
    c: Side | None,
    *,
    exponent: Number,
    eps: Float[Array, "b 1 1"],
    precision: jax.lax.Precision,
) -> Stack:
    """Q_a [(Q_aᵀ M Q_c) / (1/s + eps)] Q_cᵀ, s the outer product of λ^exponent."""
    if a is None or c is None:
        # One side: the smaller product first, (Q diag Qᵀ) M.
        side = c if a is None else a
        if side is None:
            return M
        scale = power(side.values, exponent)[:, None, :]
        scale = scale / (1 + scale * eps)
        root = product(side.basis * scale, side.basis.mT, precision)
        return product(*((M, root) if a is None else (root, M)), precision)
    scale = (
        power(a.values, exponent)[:, :, None] * power(c.values, exponent)[:, None, :]
    )
    inner = rotated(M, a, c, precision) * (scale / (1 + scale * eps))
    left = product(a.basis, inner, precision)
    return product(left, c.basis.mT, precision)


def whitened_squares(
    G: Stack, a: Side | None, c: Side | None, precision: jax.lax.Precision
) -> tuple[Float[Array, "b m"], Float[Array, "b n"]]:
    """What one gradient says of the eigenvalues of either side."""
    squares = jnp.square(rotated(G, a, c, precision))
    over_columns = squares if c is None else squares * inverse(c.values)[:, None, :]
    over_rows = squares if a is None else squares * inverse(a.values)[:, :, None]
    return jnp.mean(over_columns, axis=2), jnp.mean(over_rows, axis=1)


def whitened_gram(
    G: Stack, other: Side | None, precision: jax.lax.Precision
) -> Float[Array, "b m m"]:
    """G S_c⁻¹ Gᵀ / n, with S_c read off its eigenbasis."""
    if other is not None:
        G = product(G, other.basis, precision)
    weights = None if other is None else inverse(other.values)
    return gram(G, weights, precision) / G.shape[-1]


def symmetric_power(S: SquareStack, exponent: Number, ridge: Array) -> SquareStack:
    """(S + ridge I) ** exponent by an eigendecomposition; null directions give 0."""
    values, vectors = jnp.linalg.eigh(S)
    scale = power(jnp.maximum(values, 0) + ridge, exponent)
    return product(vectors * scale[:, None, :], vectors.mT, jax.lax.Precision.HIGHEST)


def ordered(side: Side) -> Side:
    """The same basis with the largest eigenvalue first."""
    order = jnp.argsort(side.values, axis=1, descending=True)
    return Side(
        jnp.take_along_axis(side.basis, order[:, None, :], axis=2),
        jnp.take_along_axis(side.values, order, axis=1),
    )


def eigenvectors(S: SquareStack) -> SquareStack:
    """The eigenvectors of each matrix as columns, that of the largest value first."""
    return jnp.linalg.eigh(S)[1][:, :, ::-1]


def resolve_orthonormalisation(
    method: Orthonormalisation,
) -> Literal["qr", "cholesky_qr"]:
    """`"auto"` made definite: QR on CPUs, Cholesky-QR elsewhere.

    LAPACK's QR is quick; accelerators go through a stack of QRs one column at a time,
    and through Cholesky-QR with matrix products.
    """
    if method != "auto":
        return method
    return "qr" if jax.default_backend() == "cpu" else "cholesky_qr"


def power_step(
    S: SquareStack,
    Q: SquareStack,
    method: Literal["qr", "cholesky_qr"],
    precision: jax.lax.Precision,
) -> SquareStack:
    """The orthonormal factor of S Q: one step towards the eigenvectors of S.

    In the null space of S (all of it, before the first gradient) there is nowhere to
    go: S Q is rounding error there, and the basis stays as near to the old one as the
    new directions let it.
    """
    Y = product(S, Q, precision)
    norms = jnp.linalg.norm(Y, axis=1)
    rounding = _rounding(S.shape[-1]) * jnp.max(norms, axis=1)
    completed = lambda: _gram_schmidt(Y, Q, rounding)  # noqa: E731
    if method == "cholesky_qr":
        spent = norms <= rounding[:, None]
        stepped = _cholesky_qr(jnp.where(spent[:, None, :], Q, Y), precision)
        error = jnp.abs(product(stepped.mT, stepped, precision) - _identity(stepped))
        # The comparison is true for NaN as well.
        return jax.lax.cond(
            ~(jnp.max(error) < _ORTHOGONALITY_LIMIT), completed, lambda: stepped
        )
    stepped, R = jnp.linalg.qr(Y)
    spent = jnp.abs(jnp.diagonal(R, axis1=1, axis2=2)) <= rounding[:, None]
    return jax.lax.cond(jnp.any(spent), completed, lambda: stepped)


def _rounding(d: int) -> float:
    """The relative error of a product of d × d matrices in fp32, with a margin of 4."""
    return 4 * float(jnp.finfo(jnp.float32).eps) * d**0.5


def _cholesky_qr(Y: SquareStack, precision: jax.lax.Precision) -> SquareStack:
    """The Q of a QR factorisation by two Cholesky passes; NaN where they break down.

    Scaled columns have the same Q; those of S Q are then nearly orthonormal, however
    large the condition of S, once Q is near its eigenvectors.
    """
    norms = jnp.linalg.norm(Y, axis=1, keepdims=True)
    Q = Y / jnp.where(norms > 0, norms, 1)
    for _ in range(2):
        lower = jax.lax.linalg.cholesky(product(Q.mT, Q, precision))
        Q = jax.lax.linalg.triangular_solve(lower, Q, lower=True, transpose_a=True)
    return Q


def _gram_schmidt(
    Y: SquareStack, Q: SquareStack, rounding: Float[Array, " b"]
) -> SquareStack:
    """Orthonormal columns from those of Y, and from old ones where Y has none to give.

    Columns that add no more than rounding error to those before them give way to the
    old ones, which come last and so are orthogonalised against all that is new.
    """

    def adding(candidates: SquareStack, least: Array) -> Callable[..., SquareStack]:
        def add(j: Array, basis: SquareStack) -> SquareStack:
            free = ~jnp.any(basis[:, :, j] != 0, axis=1)
            column = candidates[:, :, j]
            # Once leaves the rounding of what was subtracted; twice doesn't.
            for _ in range(2):
                shares = jnp.einsum("bij,bi->bj", basis, column, precision="highest")
                column -= jnp.einsum("bij,bj->bi", basis, shares, precision="highest")
            length = jnp.linalg.norm(column, axis=1)
            chosen = (free & (length > least))[:, None]
            unit = column / jnp.where(length > 0, length, 1)[:, None]
            return basis.at[:, :, j].set(jnp.where(chosen, unit, basis[:, :, j]))

        return add

    d = Y.shape[-1]
    basis = jax.lax.fori_loop(0, d, adding(Y, rounding), jnp.zeros_like(Y))
    return jax.lax.fori_loop(0, d, adding(Q, jnp.zeros_like(rounding)), basis)


def _identity(stack: SquareStack) -> Float[Array, "1 d d"]:
    """The identity that every matrix of a stack is compared with."""
    return jnp.eye(stack.shape[-1], dtype=stack.dtype)[None]


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
