r"""Shampoo whose two factors whiten each other, around any momentum.

With :math:`g` the raw gradient of :math:`m \times n`, :math:`M` what the inner
transformation makes of it, and :math:`S = Q \operatorname{diag}(\lambda) Q^\top` for
the side of the rows (:math:`a`) and that of the columns (:math:`c`):

.. math::
    U = S_a^{-1/2} M S_c^{-1/2}, \qquad
    S_a \leftarrow b S_a + (1-b)\, g S_c^{-1} g^\top / n, \qquad
    S_c \leftarrow b S_c + (1-b)\, g^\top S_a^{-1} g / m .

Eigenvalues are renewed at every step, bases by a power step every few.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Bool, Float

from fusionopt_jax._checks import (
    check_choice,
    check_count,
    check_decay_rate,
    check_non_negative,
    check_number,
)
from fusionopt_jax._matrices import kronecker
from fusionopt_jax._matrices.buckets import BUCKETINGS, Bucketing, StackFunction
from fusionopt_jax._matrices.eigenbasis import (
    gram,
    inverse,
    ordered,
    pack_symmetric,
    packed_shape,
    power,
    power_step,
    product,
    unpack_symmetric,
)
from fusionopt_jax._matrices.kronecker import SIDES, Sides
from fusionopt_jax._optax import (
    MakesStacks,
    TransformLike,
    accepting_extra_args,
    transformation,
)
from fusionopt_jax._types import Array, Count, Number, Params
from fusionopt_jax.routing import Routing, matrix_views

# The published code bounds 1/sqrt(eigenvalue) by max(10, min(side, 4000)).
_LOWEST_BOUND, _HIGHEST_BOUND = 10.0, 4000.0


class KLShampooState(NamedTuple):
    """State of `kl_shampoo`.

    Every field but the first and the last is a tree like the parameters with one fp32
    array for each leaf (a tuple of them for one of unequal chunks); `d` is the length
    of the matrices' side. A side that has no factor holds `optax.MaskedNode()`.

    Attributes:
        count: Updates so far.
        input_factors: Symmetric factors of the input side, each the lower triangle in
            a rectangle `(matrices, d + 1, d / 2)` (d rounded up to even).
        input_bases: `(matrices, d, d)`: orthonormal bases, their vectors as columns.
        input_eigenvalues: `(matrices, d)`.
        output_factors: As of the input side.
        output_bases: The same.
        output_eigenvalues: The same.
        inner_state: The state of the inner transformation.
    """

    count: Count
    input_factors: Params
    input_bases: Params
    input_eigenvalues: Params
    output_factors: Params
    output_bases: Params
    output_eigenvalues: Params
    inner_state: Any


class Side(NamedTuple):
    """What is known of one side of a stack.

    Attributes:
        S: The factors, packed.
        Q: Orthonormal bases that track their eigenvectors.
        values: An eigenvalue for each vector; 0 stands for "no gradient so far".
    """

    S: Float[Array, "b rows half"]
    Q: Float[Array, "b d d"]
    values: Float[Array, "b d"]


def precondition(
    M: Array,
    a: Side | None,
    c: Side | None,
    p: Number,
    eps: Number | Array,
    precision: jax.lax.Precision,
) -> Array:
    """Q_a [(Q_aᵀ M Q_c) ⊙ s / (1 + eps s)] Q_cᵀ, s the outer product of λ^p."""
    if a is None or c is None:
        # One side: the smaller product first, (Q diag(s) Qᵀ) M.
        side = c if a is None else a
        if side is None:
            return M
        s = power(side.values, p)[:, None, :]
        root = product(side.Q * (s / (1 + eps * s)), side.Q.mT, precision)
        return product(*((M, root) if a is None else (root, M)), precision)
    s = power(a.values, p)[:, :, None] * power(c.values, p)[:, None, :]
    inner = _rotated(M, a, c, precision) * (s / (1 + eps * s))
    return product(product(a.Q, inner, precision), c.Q.mT, precision)


def learn(
    G: Array,
    a: Side | None,
    c: Side | None,
    b: Number,
    damping: Number | Array,
    precision: jax.lax.Precision,
) -> tuple[Side | None, Side | None]:
    """Both sides after one gradient, their bases left as they are.

    S_a ← b S_a + (1-b) G S_c⁻¹ Gᵀ / n,
    λ_a ← b λ_a + (1-b) mean_j((Q_aᵀ G Q_c)²_ij / λ_c,j), and the other way round.
    """

    def side(one: Side | None, other: Side | None, G: Array, H2: Array) -> Side | None:
        if one is None:
            return None
        if other is None:
            weights, white, ridge = None, G, damping
        else:
            weights = inverse(other.values)
            white = product(G, other.Q, precision)
            H2 = H2 * weights[:, None, :]
            ridge = damping * jnp.mean(weights, axis=1, keepdims=True)
        S = pack_symmetric(gram(white, weights, precision) / G.shape[2])
        values = jnp.mean(H2, axis=2) + ridge
        return Side(b * one.S + (1 - b) * S, one.Q, b * one.values + (1 - b) * values)

    H2 = jnp.square(_rotated(G, a, c, precision))
    return side(a, c, G, H2), side(c, a, G.mT, H2.mT)


def kl_shampoo(
    inner: TransformLike | None = None,
    *,
    routing: Routing | None = None,
    b2: Number = 0.98,
    exponent: Number = -0.5,
    sides: Sides = "auto",
    update_every: int | Array = 10,
    stagger: bool = True,
    restore_norm: bool = False,
    eps: Number = 1e-8,
    damping: Number = 0.0,
    bucketing: Bucketing = "auto",
    precision: jax.lax.Precision = jax.lax.Precision.HIGHEST,
) -> optax.GradientTransformationExtraArgs:
    r"""Whitens what an inner momentum returns, by factors of the raw gradients.

    .. math::
        U = Q_a\left[\frac{(Q_a^\top M Q_c)\odot s}{1 + \epsilon s}\right]Q_c^\top,
        \qquad s = \lambda_a^{p}\,(\lambda_c^{p})^\top, \quad p = -\tfrac12,

    with the bases and eigenvalues of the step before; then, with the raw gradient
    :math:`g` of :math:`m \times n`,

    .. math::
        S_a \leftarrow b_2 S_a + (1-b_2)\, g S_c^{-1} g^\top / n, \qquad
        \lambda_a \leftarrow b_2 \lambda_a + (1-b_2)\operatorname{mean}_j
            \bigl((Q_a^\top g\, Q_c)_{ij}^2 / \lambda_{c,j}\bigr),

    the same for :math:`c` with rows and columns exchanged, and every `update_every`
    steps :math:`Q_a \leftarrow \operatorname{orth}(S_a Q_a)`, without any
    eigendecomposition. A side that is left out is the identity.

    :math:`b_2` is at first that of a mean of all gradients, the eigenvalues start from
    the first gradient that isn't zero, :math:`\epsilon` and the damping are measured in
    the gradients' own scale, and :math:`1/\sqrt\lambda` stays below
    max(10, min(d, 4000)), relative to the root of the mean eigenvalue of a side of
    length d. So the update doesn't change when all gradients are multiplied by a
    constant.

    A matrix's update depends on its own gradients, its leaf's path and its index in the
    leaf (which say at which steps its bases are renewed), and on nothing else in the
    tree. On a mesh each device takes a share of every stack, and of n devices each
    holds 1/n of the state but for what n doesn't divide.

    Args:
        inner: An Optax transformation, such as `optax.trace(0.95)`; it sees the raw
            gradients, and its updates are preconditioned. `None`: the gradients are.
        routing: Where the matrices of a leaf come from; without one, `(in, out)` over
            the last two axes.
        b2: Decay rate of factors and eigenvalues, :math:`b_2`, in [0, 1).
        exponent: :math:`p`, of each side.
        sides: `"both"`; `"small"` keeps a factor of the shorter side alone (of the
            input side of a square matrix); `"auto"` keeps both where the longer side is
            below 1.5 times the shorter, 12 bytes a parameter if square, 13 at most.
        update_every: Steps between two renewals of a matrix's bases, at least 1.
            1, with a `b2` of 0.9, is the setting with the best published evidence; 10
            is the published code's.
        stagger: Renew the bases of different matrices at different steps, so that no
            step pays for all of them; `False` renews all at multiples of
            `update_every`, as the published code does.
        restore_norm: Give each matrix back its norm, as SOAP-Muon does before `ns5`.
        eps: :math:`\epsilon`, added to :math:`1/s`.
        damping: Added to every squared gradient entry in the eigenvalues.
        bucketing: `"batch"` joins leaves of equal matrices and takes all of them at
            once, `"loop"` goes through them one matrix at a time in a compiled loop,
            `"leaf"` takes the matrices of one leaf at once; `"auto"` loops on CPUs and
            batches elsewhere.
        precision: Of the matrix products. Less than the highest lets GPUs shorten
            operands to TF32, which turns the bases by large angles.

    Returns:
        A transformation whose updates have the shapes and dtypes of its input. It
        returns a direction: positive sign, no learning rate, no decay, and a root mean
        square near that of a whitened gradient, 1. The very first update, before there
        are statistics, is what `inner` returns divided by the gradients' root mean
        square.

    Raises:
        ValueError: If a setting is out of range, or a leaf has no matrices.

    Example:
        >>> import jax.numpy as jnp, optax, fusionopt_jax as fo
        >>> whitened = fo.kl_shampoo(optax.trace(0.95), b2=0.9, update_every=1)
        >>> tx = optax.chain(whitened, fo.ns5())
        >>> gradient = {"kernel": jnp.ones((4, 6)).at[0, 0].set(3.0)}
        >>> update, state = tx.update(gradient, tx.init(gradient))
        >>> update["kernel"].shape
        (4, 6)

    Source:
        Lin et al., arXiv 2509.03378, Claims 2 and 3. `kl_shampoo_torch` is its code,
        step for step. A tensor of three axes, there a product of three factors, is here
        a stack of matrices. *ASGO*, arXiv 2503.20762 (one side).
    """
    check_decay_rate("b2", b2)
    check_number("exponent", exponent)
    check_choice("sides", sides, SIDES)
    check_count("update_every", update_every, low=1)
    check_non_negative("eps", eps)
    check_non_negative("damping", damping)
    check_choice("bucketing", bucketing, BUCKETINGS)
    momentum = accepting_extra_args(optax.identity() if inner is None else inner)
    hole = optax.MaskedNode()

    def first_side(count: int, d: int) -> Side:
        eye = jnp.eye(d, dtype=jnp.float32)
        return Side(
            S=jnp.zeros((count, *packed_shape(d)), jnp.float32),
            Q=jnp.broadcast_to(eye, (count, d, d)),
            values=jnp.zeros((count, d), jnp.float32),
        )

    def init_fn(params: Any) -> KLShampooState:
        views = matrix_views(params, routing, "kl_shampoo")
        trees = kronecker.first_trees(params, views, sides, first_side, Side, hole)
        return KLShampooState._make(
            [jnp.zeros([], jnp.int32), *trees, momentum.init(params)]
        )

    def step(
        stacks: tuple[Array, Array],
        pair: tuple[Side | None, Side | None],
        ids: Array,
        count: Count,
        *numbers: Array,
        platforms: Any,
    ) -> tuple[Array, tuple[Side | None, Side | None]]:
        """The preconditioned stack, and what is known after its gradient."""
        b, p, epsilon, ridge, every = numbers
        M, G = (stack.astype(jnp.float32) for stack in stacks)
        a, c = _started(G, *pair)
        unit = _mean_square(a, c)
        scale = power(unit, -p)[:, None, None]
        U = precondition(M, a, c, p, epsilon * scale, precision)
        b = kronecker.running_mean_rate(b, count)
        a, c = learn(G, a, c, b, ridge * unit[:, None], precision)
        period = update_every if isinstance(update_every, int) else every
        due = kronecker.is_due(ids, count, period, stagger=stagger)
        due &= _is_finite(U, a, c)
        renewed = functools.partial(_renewed, due, period, precision, platforms)
        if restore_norm:
            U = kronecker.restored(U, M)
        return U.astype(stacks[0].dtype), (renewed(a), renewed(c))

    def update_fn(
        updates: Any,
        state: KLShampooState,
        params: Any = None,
        then: StackFunction | None = None,
        **extra_args: Any,
    ) -> tuple[Any, KLShampooState]:
        views = matrix_views(updates, routing, "kl_shampoo")
        directions, inner_state = momentum.update(
            updates, state.inner_state, params, **extra_args
        )
        numbers = [jnp.asarray(x, jnp.float32) for x in (b2, exponent, eps, damping)]
        results, trees = kronecker.map_pairs(
            step,
            directions,
            updates,
            views,
            state[1:-1],
            Side,
            hole,
            scalars=[state.count, *numbers, jnp.asarray(update_every, jnp.int32)],
            bucketing=bucketing,
            then=then,
        )
        results = jax.tree.map(lambda r, g: r.astype(g.dtype), results, updates)
        count = jnp.asarray(optax.safe_increment(state.count))
        return results, KLShampooState._make([count, *trees, inner_state])

    return MakesStacks(transformation(init_fn, update_fn), bucketing)


def _rotated(
    X: Array, a: Side | None, c: Side | None, precision: jax.lax.Precision
) -> Array:
    """Q_aᵀ X Q_c."""
    if c is not None:
        X = product(X, c.Q, precision)
    return X if a is None else product(a.Q.mT, X, precision)


def _started(
    G: Array, a: Side | None, c: Side | None
) -> tuple[Side | None, Side | None]:
    """Both sides with eigenvalues that start from the first gradient that isn't zero.

    Their product over both sides is the square of its root mean square.
    """
    # Squares of tiny gradients would leave the range of fp32.
    largest = jnp.max(jnp.abs(G), axis=(1, 2), keepdims=True)
    scaled = G / jnp.where(largest > 0, largest, 1)
    start = largest[:, :, 0] * jnp.sqrt(jnp.mean(scaled * scaled, axis=(1, 2)))[:, None]
    if a is None or c is None:
        start = start * start

    def side(one: Side | None) -> Side | None:
        if one is None:
            return None
        return one._replace(values=jnp.where(one.values > 0, one.values, start))

    return side(a), side(c)


def _mean_square(a: Side | None, c: Side | None) -> Float[Array, " b"]:
    """A gradient's mean square as the eigenvalues see it."""
    means = [jnp.mean(side.values, axis=1) for side in (a, c) if side is not None]
    return functools.reduce(jnp.multiply, means)


def _is_finite(U: Array, a: Side | None, c: Side | None) -> Bool[Array, " b"]:
    """Whether bases may be renewed: what isn't finite must not be in them.

    Besides, all that reads the old bases comes before it this way, so that a compiled
    loop can write the new ones in their place.
    """
    read = [U, *(side.S for side in (a, c) if side is not None)]
    return jnp.isfinite(sum(jnp.sum(stack, axis=(1, 2)) for stack in read))


def _renewed(
    due: Array,
    every: int | Array,
    precision: jax.lax.Precision,
    platforms: Any,
    side: Side | None,
) -> Side | None:
    """A side with bounded eigenvalues and, where it is due, a power step of its basis.

    Axes come in an arbitrary order, and an orthonormalisation favours the first: the
    largest first makes the result independent of that order.
    """
    if side is None:
        return None
    d = side.values.shape[1]
    bound = max(_LOWEST_BOUND, min(d, _HIGHEST_BOUND))
    floor = jnp.mean(side.values, axis=1, keepdims=True) / bound**2
    values = jnp.maximum(side.values, floor)

    def step(old: tuple[Array, Array], S: Array) -> tuple[Array, Array]:
        Q, values = ordered(*old)
        return power_step(unpack_symmetric(S, d), Q, precision, platforms), values

    return Side(side.S, *kronecker.renewed(step, due, every, (side.Q, values), side.S))
