r"""Steps on a sphere: every matrix keeps the norm that it was initialised with.

.. math::
    \tilde W = W - \gamma R\,U / \|U\|_F, \qquad
    W \leftarrow R\,\tilde W / \|\tilde W\|_F, \qquad R = \|W_0\|_F .
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fusionopt_jax._checks import check_rate_or_schedule
from fusionopt_jax._leaves import check_leaves, is_abstract
from fusionopt_jax._matrices.buckets import Stack, map_leaves, stack_states
from fusionopt_jax._matrices.norm import frobenius_norm
from fusionopt_jax._optax import TransformLike, accepting_extra_args, transformation
from fusionopt_jax._types import Array, Count, Float, Params, Scalar, ScalarOrSchedule
from fusionopt_jax.iterates import schedule_free_states
from fusionopt_jax.routing import Routing, matrix_views


class HyperballState(NamedTuple):
    """State of `hyperball`.

    Attributes:
        count: Updates so far.
        radius: For each leaf an fp32 array `(matrices,)`: every matrix's norm at
            initialisation, 0 where it is not constrained. A tuple of such where chunks
            are unequal.
        inner_state: State of the wrapped transformation.
    """

    count: Count
    radius: Params
    inner_state: Any


def hyperball(
    inner: TransformLike,
    learning_rate: ScalarOrSchedule,
    *,
    routing: Routing | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Takes a step of relative length and puts every matrix back on its sphere.

    .. math::
        \tilde W = W - \gamma R\,\frac{U}{\|U\|_F}, \qquad
        W \leftarrow R\,\frac{\tilde W}{\|\tilde W\|_F}, \qquad
        R = \|W_0\|_F, \quad U = \text{inner}(g)

    The learning rate :math:`\gamma` is then an angle, about the same for every layer
    and width, and the constant norm takes the place of weight decay. A matrix that
    starts at zero (the modulators of an adaLN-zero transformer, LoRA's second factor)
    has no sphere and would stay zero for ever; it takes the plain step
    :math:`W - \gamma U`, throughout. Norms are scaled: entries of an m × n matrix may
    be as large as 3e38/√(mn).

    As the step is not linear in the learning rate, this transformation takes it itself:
    its updates are complete and are added by `optax.apply_updates`. It can be combined
    neither with `schedule_free`, whose average leaves the sphere, nor with `polyak`,
    which would multiply the finished step.

    Args:
        inner: Returns a direction: positive sign, no learning rate, no weight decay.
        learning_rate: :math:`\gamma`, non-negative, or a schedule of the step count
            from 0. It is relative to the norm of the weights.
        routing: Where the matrices of a leaf come from (axes, chunks, stacks): each has
            its own sphere. Without one, `(in, out)` over the last two axes.

    Returns:
        A transformation for the matrices of a model (use `optax.multi_transform` for
        the rest), whose updates have the dtypes of the parameters.

    Raises:
        ValueError: If the learning rate is negative, an update comes without `params`,
            a leaf has no matrices, `inner` contains `schedule_free`, or `polyak` is
            around it.

    Example:
        >>> import jax.numpy as jnp, optax, fusionopt_jax as fo
        >>> tx = fo.hyperball(fo.ns5(), learning_rate=0.1)
        >>> params = {"kernel": jnp.eye(4)}
        >>> gradient = {"kernel": jnp.arange(16.0).reshape(4, 4)}
        >>> updates, _ = tx.update(gradient, tx.init(params), params)
        >>> params = optax.apply_updates(params, updates)
        >>> round(float(jnp.linalg.norm(params["kernel"])), 5)
        2.0

    Source:
        *Hyperball*, arXiv 2606.16899, Algorithm 1; the exception for zero matrices is
        FusionOpt's.
    """
    check_rate_or_schedule("learning_rate", learning_rate)
    inner_tx = accepting_extra_args(inner)

    def init_fn(params: Params) -> HyperballState:
        views = matrix_views(params, routing, "hyperball")
        inner_state = inner_tx.init(params)
        if schedule_free_states(inner_state):
            raise ValueError(
                "`hyperball` can't hold a `schedule_free`: the average of points on a "
                "sphere is not on it. Use one of the two."
            )
        radius = stack_states(
            params, views, lambda stack: jnp.zeros(stack.count, jnp.float32)
        )
        if any(map(is_abstract, jax.tree.leaves(params))):
            radius = jax.eval_shape(lambda: radius)
        else:
            (radius,) = map_leaves(_radius, views, states=[radius], read=[params])
        return HyperballState(
            count=jnp.zeros([], jnp.int32),
            radius=radius,
            inner_state=inner_state,
        )

    def update_fn(
        updates: Any,
        state: HyperballState,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[Any, HyperballState]:
        if params is None:
            raise ValueError(
                "`hyperball` needs the current parameters: call "
                "`update(grads, state, params)`."
            )
        if "step_size" in extra_args:
            raise ValueError(
                "`hyperball` can't be inside `polyak`: multiplying its updates would "
                "leave the sphere. Give it a schedule as `learning_rate`."
            )
        check_leaves("hyperball", updates)
        directions, inner_state = inner_tx.update(
            updates, state.inner_state, params, **extra_args
        )
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        gamma = jnp.asarray(rate, jnp.float32)
        steps, radius = map_leaves(
            _step,
            matrix_views(params, routing, "hyperball"),
            written=[params],
            states=[state.radius],
            read=[directions],
            scalars=[gamma],
        )
        return steps, HyperballState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            radius=radius,
            inner_state=inner_state,
        )

    return transformation(init_fn, update_fn)


def _radius(unknown: Array, W: Stack) -> tuple[Float[Array, " b"]]:
    """The norm of each matrix of a stack."""
    del unknown
    return (frobenius_norm(W)[:, 0, 0],)


def _step(
    weight: Stack, radius: Float[Array, " b"], direction: Stack, gamma: Scalar
) -> tuple[Stack, Float[Array, " b"]]:
    """What one stack moves by, and its radius."""
    W, U = weight.astype(jnp.float32), direction.astype(jnp.float32)
    R = radius[:, None, None]
    norm = frobenius_norm(U)
    moved = W - gamma * R * (U / jnp.where(norm > 0, norm, 1))
    length = frobenius_norm(moved)
    on_sphere = R * (moved / jnp.where(length > 0, length, 1))
    result = jnp.where(R > 0, on_sphere, W - gamma * U)
    return (result - W).astype(weight.dtype), radius
