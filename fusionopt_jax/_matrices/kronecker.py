r"""One step of Kronecker-factored statistics on one stack of matrices `(b, m, n)`.

No trees and no Optax. A pair holds what is remembered of the rows (the input side) and
of the columns (the output side); a side without a factor is `None` and stands for the
identity. The update formulas are those of `eigenbasis`.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fusionopt_jax._matrices import eigenbasis
from fusionopt_jax._matrices.eigenbasis import Orthonormalisation, Side, Stack

Statistics: TypeAlias = Literal["kl", "gram"]
Sides: TypeAlias = Literal["auto", "both", "small"]
Scaling: TypeAlias = Literal["relative", "absolute"]
FirstBasis: TypeAlias = Literal["identity", "eigh"]

STATISTICS: tuple[Statistics, ...] = ("kl", "gram")
SIDES: tuple[Sides, ...] = ("auto", "both", "small")
SCALINGS: tuple[Scaling, ...] = ("relative", "absolute")
FIRST_BASES: tuple[FirstBasis, ...] = ("identity", "eigh")

# Two factors cost 6(m² + n²) bytes: 12 a parameter for a square matrix, and more the
# longer it is, while the small factor alone costs less the longer it is.
_BOTH_SIDES_BELOW = 1.5

# The published code bounds 1/sqrt(eigenvalue) by max(10, min(side, 4000)).
_LOWEST_LIMIT = 10.0

Count: TypeAlias = Int[Array, ""]


class SideState(NamedTuple):
    """What is remembered of one side of a stack.

    Attributes:
        factor: The packed symmetric factors.
        basis: Their bases; of plain Shampoo, their powers.
        values: Their eigenvalues; `None` for plain Shampoo.
    """

    factor: Float[Array, "b rows half"]
    basis: Float[Array, "b d d"]
    values: Any

    @property
    def eigen(self) -> Side:
        """Basis and eigenvalues."""
        return Side(self.basis, self.values)


Pair: TypeAlias = tuple[SideState | None, SideState | None]

# From unpacked factors and what was known to what is known.
Renewal: TypeAlias = Callable[[Array, Side], Side]


class Settings(NamedTuple):
    """The settings of `kl_shampoo` that the arithmetic needs; see there."""

    b2: Any
    bias_correction: bool
    statistics: Statistics
    exponent: Any
    sides: Sides
    update_every: Any
    stagger: bool
    eps: Any
    damping: Any
    scaling: Scaling
    init_factor: Any
    max_inverse_root: Any
    first_basis: FirstBasis
    orthonormalisation: Orthonormalisation
    precision: jax.lax.Precision
    loop: bool = False

    @property
    def relative(self) -> bool:
        """Whether thresholds are measured in the gradients' own scale."""
        return self.scaling == "relative"

    def number(self, name: str) -> Array:
        """A setting as fp32, whatever dtype a schedule gave it."""
        return jnp.asarray(getattr(self, name), jnp.float32)

    def decay(self, count: Count) -> Array:
        """The decay rate of this step: at first that of a mean of all gradients."""
        b2 = self.number("b2")
        if not self.bias_correction:
            return b2
        earlier = count.astype(jnp.float32)
        return jnp.minimum(b2, earlier / (earlier + 1))

    def power(self, pair: Pair) -> Any:
        """The exponent of each side."""
        if self.exponent is not None:
            return self.number("exponent")
        return -0.5 if self.statistics == "kl" else -0.5 / _side_count(pair)


def first_pair(shape: tuple[int, int, int], settings: Settings) -> Pair:
    """The pair of a stack of the given shape before any gradient."""
    count, m, n = shape
    both = settings.sides == "both" or (
        settings.sides == "auto" and max(m, n) < _BOTH_SIDES_BELOW * min(m, n)
    )

    def side(d: int) -> SideState:
        # Zero stands for "no gradient so far"; see `_started`.
        start = 0.0 if settings.relative else settings.number("init_factor")
        values = jnp.broadcast_to(jnp.asarray(start, jnp.float32), (count, d))
        basis = jnp.broadcast_to(jnp.eye(d, dtype=jnp.float32), (count, d, d))
        return SideState(
            jnp.zeros((count, *eigenbasis.packed_shape(d)), jnp.float32),
            basis,
            values if settings.statistics == "kl" else None,
        )

    return (side(m) if both or m <= n else None, side(n) if both or n < m else None)


def kl_step(
    G: Stack, M: Stack, pair: Pair, count: Count, settings: Settings
) -> tuple[Stack, Pair]:
    """M preconditioned by what is known, and what is known after G."""

    def one(G: Stack, M: Stack, pair: Pair) -> tuple[Stack, Pair]:
        pair = _started(G, pair, settings)
        return _preconditioned(M, pair, settings), _learnt(G, pair, count, settings)

    return _over_stack(one, settings, G, (M, pair))


def gram_step(
    G: Stack,
    M: Stack,
    pair: Pair,
    count: Count,
    offset: int,
    settings: Settings,
) -> tuple[Stack, Pair]:
    """Plain Shampoo: learn from G, renew what is due, apply the powers to M."""
    b2 = settings.decay(count)

    def learn(G: Stack, pair: Pair) -> tuple[Pair]:
        def side(state: SideState | None, X: Stack) -> SideState | None:
            if state is None:
                return None
            fresh = eigenbasis.gram(X, None, settings.precision)
            fresh = eigenbasis.pack_symmetric(fresh)
            return state._replace(factor=b2 * state.factor + (1 - b2) * fresh)

        return ((side(pair[0], G), side(pair[1], G.mT)),)

    def apply(pair: Pair, M: Stack) -> tuple[Stack]:
        a, c = pair
        if a is not None:
            M = eigenbasis.product(a.basis, M, settings.precision)
        if c is not None:
            M = eigenbasis.product(M, c.basis, settings.precision)
        return (M,)

    (pair,) = _over_stack(learn, settings, G, (pair,))
    exponent = settings.power(pair)

    def powers(S: Array, side: Side) -> Side:
        ridge = settings.number("damping")
        if settings.relative:
            ridge = ridge * jnp.trace(S, axis1=1, axis2=2)[:, None] / S.shape[-1]
        return side._replace(basis=eigenbasis.symmetric_power(S, exponent, ridge))

    # No power may be used before it has been computed once.
    pair = _renewed(pair, powers, powers, count, offset, settings)
    (result,) = _over_stack(apply, settings, pair, (M,))
    return result, pair


def renewed_bases(pair: Pair, count: Count, offset: int, settings: Settings) -> Pair:
    """The bases after this step's share of power steps."""
    method = eigenbasis.resolve_orthonormalisation(settings.orthonormalisation)

    def step(S: Array, side: Side) -> Side:
        if settings.first_basis == "identity":
            # Axes come in an arbitrary order, and an orthonormalisation favours the
            # first: the largest first makes the result independent of that order.
            side = eigenbasis.ordered(side)
        basis = eigenbasis.power_step(S, side.basis, method, settings.precision)
        return Side(basis, side.values)

    def eigenvectors(S: Array, side: Side) -> Side:
        # The values learnt so far belong to another basis.
        mean = jnp.mean(side.values, axis=1, keepdims=True)
        return Side(
            eigenbasis.eigenvectors(S), jnp.broadcast_to(mean, side.values.shape)
        )

    at_first = eigenvectors if settings.first_basis == "eigh" else None
    return _renewed(pair, step, at_first, count, offset, settings)


def group_count(pair: Pair, settings: Settings) -> int:
    """How many groups of matrices of this pair are renewed at steps of their own."""
    return sum(
        _groups(side.basis.shape[0], settings)[1] for side in pair if side is not None
    )


def _renewed(
    pair: Pair,
    renew: Renewal,
    at_first: Renewal | None,
    count: Count,
    offset: int,
    settings: Settings,
) -> Pair:
    """Both sides with what is due replaced; all of it at first, if that is given."""
    renewed: list[SideState | None] = []
    for side in pair:
        if side is None:
            renewed.append(None)
            continue
        eigen = _renewed_side(side, renew, at_first, count, offset, settings)
        renewed.append(SideState(side.factor, *eigen))
        offset += _groups(side.basis.shape[0], settings)[1]
    return renewed[0], renewed[1]


def _renewed_side(
    side: SideState,
    renew: Renewal,
    at_first: Renewal | None,
    count: Count,
    offset: int,
    settings: Settings,
) -> Side:
    """Bases and eigenvalues of one side, those of the groups that are due replaced."""
    size, groups = _groups(side.basis.shape[0], settings)
    every = jnp.asarray(settings.update_every, count.dtype)
    d = side.basis.shape[-1]

    def one_group(index: Array, eigen: Side) -> Side:
        start = index * size
        cut = lambda stack: jax.lax.dynamic_slice_in_dim(stack, start, size)  # noqa: E731
        new = renew(
            eigenbasis.unpack_symmetric(cut(side.factor), d), jax.tree.map(cut, eigen)
        )
        return jax.tree.map(
            lambda stack, part: jax.lax.dynamic_update_slice_in_dim(
                stack, part, start, 0
            ),
            eigen,
            new,
        )

    def due_groups() -> Side:
        phase = (count + offset) % every if settings.stagger else count % every
        # Groups `phase`, `phase + every`, ... below `groups`.
        number = jnp.maximum(groups - phase + every - 1, 0) // every
        return jax.lax.fori_loop(
            0, number, lambda i, eigen: one_group(phase + i * every, eigen), side.eigen
        )

    if at_first is None:
        return due_groups()
    return jax.lax.cond(
        count == 0,
        lambda: at_first(eigenbasis.unpack_symmetric(side.factor, d), side.eigen),
        due_groups,
    )


def _groups(matrices: int, settings: Settings) -> tuple[int, int]:
    """Matrices that are renewed together, and how many such groups there are."""
    if not settings.stagger:
        return matrices, 1
    every = settings.update_every
    size = -(-matrices // every) if isinstance(every, int) else 1
    return size, -(-matrices // size)


def _started(G: Stack, pair: Pair, settings: Settings) -> Pair:
    """The pair with eigenvalues that start from the first gradient that isn't zero.

    Their product over both sides is the square of its root mean square.
    """
    if not settings.relative:
        return pair
    # Squares of tiny gradients would leave the range of fp32.
    largest = jnp.max(jnp.abs(G), axis=(1, 2), keepdims=True)
    scaled = G / jnp.where(largest > 0, largest, 1)
    mean_square = jnp.mean(scaled * scaled, axis=(1, 2))
    start = settings.number("init_factor") * largest[:, 0, 0] * jnp.sqrt(mean_square)
    if _side_count(pair) == 1:
        start = start * start

    def side(state: SideState | None) -> SideState | None:
        if state is None:
            return None
        values = jnp.where(state.values > 0, state.values, start[:, None])
        return state._replace(values=values)

    return side(pair[0]), side(pair[1])


def _preconditioned(M: Stack, pair: Pair, settings: Settings) -> Stack:
    """M in the eigenbases, scaled, and back."""
    a, c = _eigen(pair)
    exponent = settings.power(pair)
    unit = _unit(pair, settings)
    eps = settings.number("eps") * eigenbasis.power(unit, -exponent)
    return eigenbasis.precondition(
        M,
        a,
        c,
        exponent=exponent,
        eps=jnp.broadcast_to(eps[:, None, None], (M.shape[0], 1, 1)),
        precision=settings.precision,
    )


def _learnt(G: Stack, pair: Pair, count: Count, settings: Settings) -> Pair:
    """The pair after one gradient, its bases left as they are."""
    b2, first = settings.decay(count), count == 0
    damping = settings.number("damping") * _unit(pair, settings)[:, None]
    a, c = _eigen(pair)
    fresh_a, fresh_c = eigenbasis.whitened_squares(G, a, c, settings.precision)

    def side(
        state: SideState | None, other: Side | None, X: Stack, fresh: Array
    ) -> SideState | None:
        if state is None:
            return None
        damped = damping
        if other is not None:
            inverses = eigenbasis.inverse(other.values)
            damped = damping * jnp.mean(inverses, axis=1, keepdims=True)
        values = b2 * state.values + (1 - b2) * (fresh + damped)
        values = _bounded(values, settings)
        if not settings.relative:
            # The published code's first call starts the factors from bare products
            # and leaves the eigenvalues alone.
            values = jnp.where(first, state.values, values)
            if other is not None:
                other = other._replace(values=jnp.where(first, 1.0, other.values))
        S = eigenbasis.whitened_gram(X, other, settings.precision)
        factor = b2 * state.factor + (1 - b2) * eigenbasis.pack_symmetric(S)
        return SideState(factor, state.basis, values)

    return side(pair[0], c, G, fresh_a), side(pair[1], a, G.mT, fresh_c)


def _bounded(values: Array, settings: Settings) -> Array:
    """Eigenvalues large enough for the bound on their inverse roots."""
    if settings.max_inverse_root is None:
        return values
    largest = jnp.minimum(values.shape[-1], settings.number("max_inverse_root"))
    floor = jnp.maximum(_LOWEST_LIMIT, largest) ** -2.0
    if settings.relative:
        floor = floor * jnp.mean(values, axis=1, keepdims=True)
    return jnp.maximum(values, floor)


def _unit(pair: Pair, settings: Settings) -> Float[Array, " b"]:
    """A gradient's mean square as the eigenvalues see it, or 1 in absolute terms."""
    means = [jnp.mean(state.values, axis=1) for state in pair if state is not None]
    unit = functools.reduce(jnp.multiply, means)
    return unit if settings.relative else jnp.ones_like(unit)


def _eigen(pair: Pair) -> tuple[Side | None, Side | None]:
    """Basis and eigenvalues of either side."""
    a, c = pair
    return (None if a is None else a.eigen, None if c is None else c.eigen)


def _side_count(pair: Pair) -> int:
    """How many sides have a factor."""
    return sum(side is not None for side in pair)


def _over_stack(
    function: Callable[..., Any], settings: Settings, read: Any, written: Any
) -> Any:
    """`function(read, *written)`, which returns what becomes of `written`.

    All are trees of stacks, taken at once or matrix by matrix in a compiled loop that
    writes where it has read.
    """
    leading = jax.tree.leaves(read)[0].shape[0]
    if not settings.loop or leading == 1:
        return function(read, *written)

    def step(i: Array, written: Any) -> Any:
        at = lambda stack: jax.lax.dynamic_slice_in_dim(stack, i, 1)  # noqa: E731
        old = jax.tree.map(at, written)
        new = function(jax.tree.map(at, read), *old)
        return jax.tree.map(
            # What the function hands through needn't be written again.
            lambda stack, old, new: (
                stack
                if new is old
                else jax.lax.dynamic_update_slice_in_dim(stack, new, i, 0)
            ),
            written,
            old,
            new,
        )

    return jax.lax.fori_loop(0, leading, step, written)
