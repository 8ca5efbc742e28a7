"""`kl_shampoo_torch`: the published KL-Shampoo optimiser, step for step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fusionopt_jax._checks import (
    check_count,
    check_decay_rate,
    check_non_negative,
    check_number,
    check_positive,
    check_rate_or_schedule,
)
from fusionopt_jax._leaves import wide_zeros
from fusionopt_jax._matrices import kronecker
from fusionopt_jax._matrices.eigenbasis import (
    eigh,
    ordered,
    packed_shape,
    power_step,
    unpack_symmetric,
)
from fusionopt_jax._matrices.placement import device_count
from fusionopt_jax._optax import transformation
from fusionopt_jax._types import Array, Count, Number, Params, ScalarOrSchedule
from fusionopt_jax.routing import Routing, matrix_views
from fusionopt_jax.transforms.kl_shampoo import Side, learn, precondition

# Published constants: the bound on 1/sqrt(eigenvalue) is max(10, min(side, 4000)), and
# what is added to a root mean square before it divides.
_LOWEST_BOUND, _HIGHEST_BOUND = 10.0, 4000.0
_TINY = 1e-30

_HIGHEST = jax.lax.Precision.HIGHEST


class KLShampooTorchState(NamedTuple):
    """State of `kl_shampoo_torch`.

    The statistics are laid out as those of `KLShampooState`, and mean something else.

    Attributes:
        count: Updates so far.
        average: The average of the gradients, fp32.
        input_factors: Symmetric factors of the input side, packed.
        input_bases: `(matrices, d, d)`: bases, their vectors as columns.
        input_eigenvalues: `(matrices, d)`.
        output_factors: As of the input side.
        output_bases: The same.
        output_eigenvalues: The same.
    """

    count: Count
    average: Params
    input_factors: Params
    input_bases: Params
    input_eigenvalues: Params
    output_factors: Params
    output_bases: Params
    output_eigenvalues: Params


def kl_shampoo_torch(
    lr: ScalarOrSchedule = 1e-4,
    *,
    betas: tuple[Number, Number] = (0.9, 0.98),
    shampoo_beta: Number | None = None,
    eps: Number = 1e-8,
    weight_decay: Number = 0.01,
    precondition_frequency: int | jax.Array = 10,
    init_factor: Number = 0.1,
    normalize_grads: bool = False,
    using_damping: bool = False,
    using_clamping: bool = True,
    routing: Routing | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The published code of KL-Shampoo, for those who compare with it.

    `kl_shampoo` is the one to train with. Here, as in that code:

    * the first gradient starts the factors from bare products :math:`g g^\top / n` and
      the bases from their eigenvectors, and moves nothing, neither the momentum nor by
      decay;
    * the eigenvalues start at `init_factor`, and `eps` and the bounds on them are
      absolute: the update depends on the gradients' scale;
    * the basis of a null space is rounding error;
    * all bases take their power step at multiples of `precondition_frequency`;
    * decay follows the update: :math:`w \leftarrow (w - \eta u)(1 - \eta\lambda)`.

    Args:
        lr: Learning rate :math:`\eta`, non-negative, or a schedule of the step count
            from 0.
        betas: Decay rates of the gradients' average and of the statistics.
        shampoo_beta: Takes the place of the second one; `None` (there any negative
            number) leaves it.
        eps: Added to the inverse of the scale that a gradient's entry is multiplied by.
        weight_decay: :math:`\lambda`.
        precondition_frequency: Steps between two power steps, at least 1.
        init_factor: The first eigenvalues, positive.
        normalize_grads: Divide the update of each leaf by its root mean square.
        using_damping: Add `eps` to every squared entry in the eigenvalues.
        using_clamping: Bound the inverse roots of the eigenvalues.
        routing: Where the matrices of a leaf come from; without one, the last two axes.

    Returns:
        A complete optimiser of leaves that are matrices. Its updates are to be added by
        `optax.apply_updates`, and its update needs `params`.

    Raises:
        ValueError: If a setting is out of range, a leaf has no matrices, or `params` is
            missing.

    Example:
        >>> import jax.numpy as jnp, optax, fusionopt_jax as fo
        >>> params = {"kernel": jnp.ones((4, 6))}
        >>> tx = fo.kl_shampoo_torch(1e-2)
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> float(jnp.max(jnp.abs(updates["kernel"])))
        0.0

    Source:
        `kl_opt.py` of yorkerlin/KL-Methods, for matrices. A tensor of three axes, there
        a product of three factors, is here a stack of matrices. Everything is fp32.
    """
    check_rate_or_schedule("lr", lr)
    for name, rate in (("betas[0]", betas[0]), ("betas[1]", betas[1])):
        check_decay_rate(name, rate)
    if shampoo_beta is not None:
        check_decay_rate("shampoo_beta", shampoo_beta)
    check_non_negative("eps", eps)
    check_number("weight_decay", weight_decay, low=0.0)
    check_count("precondition_frequency", precondition_frequency, low=1)
    check_positive("init_factor", init_factor)
    hole = optax.MaskedNode()

    def first_side(count: int, d: int) -> Side:
        start = jnp.asarray(init_factor, jnp.float32)
        return Side(
            S=jnp.zeros((count, *packed_shape(d)), jnp.float32),
            Q=jnp.broadcast_to(jnp.eye(d, dtype=jnp.float32), (count, d, d)),
            values=jnp.broadcast_to(start, (count, d)),
        )

    def init_fn(params: Any) -> KLShampooTorchState:
        views = matrix_views(params, routing, "kl_shampoo_torch")
        trees = kronecker.first_trees(params, views, "both", first_side, Side, hole)
        return KLShampooTorchState._make(
            [jnp.zeros([], jnp.int32), wide_zeros(params), *trees]
        )

    def update_fn(
        updates: Any, state: KLShampooTorchState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, KLShampooTorchState]:
        del extra_args
        if params is None:
            raise ValueError(
                "`kl_shampoo_torch` decays the parameters: call "
                "`update(grads, state, params)`."
            )
        views = matrix_views(updates, routing, "kl_shampoo_torch")
        alone = device_count(*jax.tree.leaves(updates)) == 1
        first = state.count == 0
        b1 = jnp.asarray(betas[0], jnp.float32)
        average = jax.tree.map(
            lambda m, g: jnp.where(first, m, b1 * m + (1 - b1) * g.astype(jnp.float32)),
            state.average,
            updates,
        )

        def step(
            stacks: tuple[Array, Array],
            pair: kronecker.Pair,
            ids: Array,
            first: Array,
            due: Array,
            *numbers: Array,
            platforms: Any,
        ) -> tuple[Array, kronecker.Pair]:
            """The preconditioned average, and the statistics after the gradient."""
            del ids
            b, epsilon = numbers
            M, G = stacks[0], stacks[1].astype(jnp.float32)
            U = precondition(M, *pair, -0.5, epsilon, _HIGHEST)

            def side(old: Side, new: Any) -> Side:
                d = old.Q.shape[1]
                S, values = unpack_symmetric(new.S, d), new.values
                if using_clamping:
                    bound = max(_LOWEST_BOUND, min(d, _HIGHEST_BOUND))
                    values = jnp.maximum(values, bound**-2)

                def eigenvectors() -> Array:
                    values, Q = eigh(S, alone=alone, platforms=platforms)
                    return ordered(Q, values)[0]

                def tracked() -> Array:
                    step = lambda: power_step(S, old.Q, _HIGHEST, platforms)  # noqa: E731
                    return jax.lax.cond(due, step, lambda: old.Q)

                Q = jax.lax.cond(first, eigenvectors, tracked)
                return Side(new.S, Q, jnp.where(first, old.values, values))

            # Bare products at first: as if the other factor were the identity.
            rows, columns = (
                one._replace(values=jnp.where(first, 1, one.values)) for one in pair
            )
            damping = epsilon if using_damping else 0.0
            new = learn(G, rows, columns, b, damping, _HIGHEST)
            a, c = side(pair[0], new[0]), side(pair[1], new[1])
            return jnp.where(first, 0, U), (a, c)

        b2 = betas[1] if shampoo_beta is None else shampoo_beta
        moved, trees = kronecker.map_pairs(
            step,
            average,
            updates,
            views,
            state[2:],
            Side,
            hole,
            scalars=[
                first,
                state.count % jnp.asarray(precondition_frequency, jnp.int32) == 0,
                *(jnp.asarray(x, jnp.float32) for x in (b2, eps)),
            ],
            bucketing="leaf",
        )
        rate = jnp.asarray(lr(state.count) if callable(lr) else lr, jnp.float32)
        decay = jnp.where(first, 0, rate * jnp.asarray(weight_decay, jnp.float32))

        def change(u: Array, p: Array) -> Array:
            if normalize_grads:
                u = u / (_TINY + jnp.sqrt(jnp.mean(u * u)))
            # (p - lr u)(1 - decay) - p.
            wide = p.astype(jnp.float32)
            return (-rate * (1 - decay) * u - decay * wide).astype(p.dtype)

        count = jnp.asarray(optax.safe_increment(state.count))
        return (
            jax.tree.map(change, moved, params),
            KLShampooTorchState._make([count, average, *trees]),
        )

    return transformation(init_fn, update_fn)
