r"""Plain Shampoo: a power of a sum of Gram matrices on either side of a momentum.

With :math:`g` the raw gradient and :math:`M` what the inner transformation makes of it:

.. math::
    L \leftarrow b L + (1-b)\, g g^\top, \qquad
    R \leftarrow b R + (1-b)\, g^\top g, \qquad
    U = (L + \delta I)^p\, M\, (R + \delta I)^p .
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

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
    pack_symmetric,
    packed_shape,
    product,
    symmetric_power,
    unpack_symmetric,
)
from fusionopt_jax._matrices.kronecker import SIDES, Sides
from fusionopt_jax._matrices.placement import device_count
from fusionopt_jax._optax import (
    MakesStacks,
    TransformLike,
    accepting_extra_args,
    transformation,
)
from fusionopt_jax._types import Array, Count, Number, Params
from fusionopt_jax.routing import Routing, matrix_views


class ShampooState(NamedTuple):
    """State of `shampoo`.

    Every field but the first and the last is a tree like the parameters with one fp32
    array for each leaf (a tuple of them for one of unequal chunks); `d` is the length
    of the matrices' side. A side that has no factor holds `optax.MaskedNode()`.

    Attributes:
        count: Updates so far.
        input_factors: Symmetric factors of the input side, each the lower triangle in
            a rectangle `(matrices, d + 1, d / 2)` (d rounded up to even).
        input_powers: `(matrices, d, d)`: the factors' powers when last renewed.
        output_factors: As of the input side.
        output_powers: The same.
        inner_state: The state of the inner transformation.
    """

    count: Count
    input_factors: Params
    input_powers: Params
    output_factors: Params
    output_powers: Params
    inner_state: Any


class Side(NamedTuple):
    """What is known of one side of a stack.

    Attributes:
        L: The factors, packed.
        power: Their powers when last renewed.
    """

    L: Float[Array, "b rows half"]
    power: Float[Array, "b d d"]


def shampoo(
    inner: TransformLike | None = None,
    *,
    routing: Routing | None = None,
    b2: Number = 0.98,
    exponent: Number | None = None,
    sides: Sides = "auto",
    update_every: int | Array = 10,
    stagger: bool = True,
    restore_norm: bool = False,
    damping: Number = 1e-4,
    relative: bool = True,
    bucketing: Bucketing = "auto",
    precision: jax.lax.Precision = jax.lax.Precision.HIGHEST,
) -> optax.GradientTransformationExtraArgs:
    r"""Preconditions what an inner momentum returns by powers of Gram matrices.

    .. math::
        L \leftarrow b_2 L + (1-b_2)\, g g^\top, \qquad
        R \leftarrow b_2 R + (1-b_2)\, g^\top g, \qquad
        U = (L + \delta I)^p\, M\, (R + \delta I)^p,

    with the powers taken by an eigendecomposition every `update_every` steps, the very
    first one included. A side that is left out is the identity. This is the rule that
    FusionOpt calls KL-Shampoo; `kl_shampoo` is the one of that paper.

    A matrix's update depends on its own gradients, its leaf's path and its index in the
    leaf (which say at which steps its powers are renewed), and on nothing else in the
    tree. On a mesh each device takes a share of every stack, and of n devices each
    holds 1/n of the state but for what n doesn't divide.

    Args:
        inner: An Optax transformation, such as `optax.trace(0.95)`; it sees the raw
            gradients, and its updates are preconditioned. `None`: the gradients are.
        routing: Where the matrices of a leaf come from; without one, `(in, out)` over
            the last two axes.
        b2: Decay rate of the factors, :math:`b_2`, in [0, 1).
        exponent: :math:`p`, of each side. `None` takes Shampoo's -1/4 with two sides
            and ASGO's -1/2 with one.
        sides: `"both"`; `"small"` keeps a factor of the shorter side alone (of the
            input side of a square matrix); `"auto"` keeps both where the longer side is
            below 1.5 times the shorter.
        update_every: Steps between two renewals of a matrix's powers, at least 1.
        stagger: Renew the powers of different matrices at different steps, so that no
            step pays for all of them; `False` renews all at multiples of
            `update_every`.
        restore_norm: Give each matrix back its norm.
        damping: :math:`\delta`, non-negative.
        relative: Measure :math:`\delta` in each factor's mean eigenvalue, and let the
            factors be means of all gradients until there are :math:`1/(1-b_2)` of them:
            the direction then doesn't change when all gradients are multiplied by a
            constant. `False` takes :math:`\delta` as it is, and averages that start at
            zero, as the published codes do; for small gradients the powers are then
            multiples of the identity.
        bucketing: `"batch"` joins leaves of equal matrices and takes all of them at
            once, `"loop"` goes through them one matrix at a time in a compiled loop,
            `"leaf"` takes the matrices of one leaf at once; `"auto"` loops on CPUs and
            batches elsewhere.
        precision: Of the matrix products.

    Returns:
        A transformation whose updates have the shapes and dtypes of its input. It
        returns a direction: positive sign, no learning rate, no decay.

    Raises:
        ValueError: If a setting is out of range, or a leaf has no matrices.

    Example:
        >>> import jax.numpy as jnp, optax, fusionopt_jax as fo
        >>> tx = optax.chain(fo.shampoo(optax.trace(0.9)), fo.ns5())
        >>> gradient = {"kernel": jnp.ones((4, 6)).at[0, 0].set(3.0)}
        >>> update, state = tx.update(gradient, tx.init(gradient))
        >>> update["kernel"].shape
        (4, 6)

    Source:
        Gupta et al., *Shampoo*, arXiv 1802.09568, Algorithm 1, with averages in place
        of its sums. *ASGO*, arXiv 2503.20762 (one side, exponent -1/2). FusionOpt.
    """
    check_decay_rate("b2", b2)
    if exponent is not None:
        check_number("exponent", exponent)
    check_choice("sides", sides, SIDES)
    check_count("update_every", update_every, low=1)
    check_non_negative("damping", damping)
    check_choice("bucketing", bucketing, BUCKETINGS)
    momentum = accepting_extra_args(optax.identity() if inner is None else inner)
    hole = optax.MaskedNode()

    def first_side(count: int, d: int) -> Side:
        eye = jnp.eye(d, dtype=jnp.float32)
        return Side(
            L=jnp.zeros((count, *packed_shape(d)), jnp.float32),
            power=jnp.broadcast_to(eye, (count, d, d)),
        )

    def init_fn(params: Any) -> ShampooState:
        views = matrix_views(params, routing, "shampoo")
        trees = kronecker.first_trees(params, views, sides, first_side, Side, hole)
        return ShampooState._make(
            [jnp.zeros([], jnp.int32), *trees, momentum.init(params)]
        )

    def update_fn(
        updates: Any,
        state: ShampooState,
        params: Any = None,
        then: StackFunction | None = None,
        **extra_args: Any,
    ) -> tuple[Any, ShampooState]:
        views = matrix_views(updates, routing, "shampoo")
        directions, inner_state = momentum.update(
            updates, state.inner_state, params, **extra_args
        )
        alone = device_count(*jax.tree.leaves(updates)) == 1

        def step(
            stacks: tuple[Array, Array],
            pair: kronecker.Pair,
            ids: Array,
            count: Count,
            *numbers: Array,
            platforms: Any,
        ) -> tuple[Array, kronecker.Pair]:
            """The preconditioned stack, and what is known with its gradient."""
            b, p, delta, every = numbers
            M, G = (stack.astype(jnp.float32) for stack in stacks)
            if relative:
                b = kronecker.running_mean_rate(b, count)
            if exponent is None:
                p = -0.5 / kronecker.side_count(pair)
            period = update_every if isinstance(update_every, int) else every
            # No power may be used before it has been computed once.
            due = kronecker.is_due(ids, count, period, stagger=stagger) | (count == 0)

            def root(old: Array, L: Array) -> Array:
                L = unpack_symmetric(L, old.shape[1])
                ridge = delta
                if relative:
                    ridge = delta * jnp.trace(L, axis1=1, axis2=2)[:, None] / L.shape[1]
                return symmetric_power(L, p, ridge, alone=alone, platforms=platforms)

            def side(one: Side | None, G: Array) -> Side | None:
                if one is None:
                    return None
                fresh = pack_symmetric(gram(G, None, precision))
                L = b * one.L + (1 - b) * fresh
                return Side(L, kronecker.renewed(root, due, period, one.power, L))

            left, right = side(pair[0], G), side(pair[1], G.mT)
            U = M if left is None else product(left.power, M, precision)
            U = U if right is None else product(U, right.power, precision)
            if restore_norm:
                U = kronecker.restored(U, M)
            return U.astype(stacks[0].dtype), (left, right)

        given = 0.0 if exponent is None else exponent
        numbers = [jnp.asarray(x, jnp.float32) for x in (b2, given, damping)]
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
        return results, ShampooState._make([count, *trees, inner_state])

    return MakesStacks(transformation(init_fn, update_fn), bucketing)
