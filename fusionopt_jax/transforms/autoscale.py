r"""A step size estimated from how far the parameters have come, as Prodigy does.

.. math::
    r_{t+1} &= \beta r_t + (1-\beta)\, d_t^p\, \langle g_t, x_0 - x_t \rangle, \qquad
    s_{t+1} = \beta s_t + (1-\beta)\, d_t^p\, g_t \\
    d_{t+1} &= \max\bigl(d_t,\; r_{t+1} / \|s_{t+1}\|_1 \bigr)
"""

from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from fusionopt_jax._checks import check_choice, check_decay_rate, check_positive
from fusionopt_jax._leaves import check_leaves, copied, wide_dtype, wide_zeros, widened
from fusionopt_jax._optax import TransformLike, accepting_extra_args, transformation
from fusionopt_jax._trees import inner_product, l1_norm
from fusionopt_jax._types import Array, Number, Params, Scalar
from fusionopt_jax.iterates import update_scaled

AutoscaleRule: TypeAlias = Literal["prodigy", "d_adaptation"]

# The power p of the estimate in the weight of a gradient.
_POWERS: dict[AutoscaleRule, int] = {"prodigy": 2, "d_adaptation": 1}


class AutoscaleState(NamedTuple):
    r"""State of `autoscale`.

    Attributes:
        step_size: The estimate :math:`d_t`, which the next step takes.
        numerator: :math:`r_t`, with the estimate in units of the first.
        gradient_average: :math:`s_t`, in the same units, shaped like the parameters.
        first_params: :math:`x_0`, shaped like the parameters, in fp32.
        inner_state: State of the wrapped transformation.
    """

    step_size: Scalar
    numerator: Scalar
    gradient_average: Params
    first_params: Params
    inner_state: Any


def autoscale(
    inner: TransformLike,
    *,
    first: Number = 1e-6,
    b1: Number = 0.995,
    rule: AutoscaleRule = "prodigy",
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies the learning rate by an estimate of the distance to the solution.

    .. math::
        r_{t+1} &= \beta r_t + (1-\beta)\, d_t^p\, \langle g_t, x_0 - x_t \rangle,
        \qquad s_{t+1} = \beta s_t + (1-\beta)\, d_t^p\, g_t \\
        d_{t+1} &= \max\bigl(d_t,\; r_{t+1} / \|s_{t+1}\|_1 \bigr)

    :math:`d_t` is handed down as the extra argument `step_size`, which `schedule_free`
    multiplies into its learning rate; if there is no `schedule_free` inside, the
    updates are multiplied. The learning rate inside is then near 1, and a schedule of
    it ends or begins below 1. It grows from `first`, and never falls.

    For a convex loss whose solution :math:`x_\star` differs from :math:`x_0` by at most
    :math:`D` in any entry, :math:`d_t \le D` throughout. The norm of :math:`s` is the
    dual of the largest entry: it fits directions whose entries are about 1, such as
    Adam's, and of an orthogonalised matrix scaled to a root mean square it is an
    approximation.

    Where the gradient is no number, no parameter moves and the estimate stays.

    Args:
        inner: The optimiser. With `schedule_free` inside, :math:`x_t` above is the
            point where gradients are taken.
        first: The first estimate, :math:`d_0`, positive and below any step size that
            could be right: it decides for how many steps the estimate has to grow. A
            step that is lost in the rounding of the parameters (1e-7 of fp32 ones, 1e-2
            of bf16 ones) starts nothing.
        b1: Decay rate of both averages, :math:`\beta`, in [0, 1). Prodigy takes the
            root of Adam's second.
        rule: `"prodigy"` weighs each gradient with the square of the estimate, so that
            recent ones count more while it grows; `"d_adaptation"` with the estimate.

    Returns:
        A transformation that needs `params`. Its state holds two more copies of the
        parameters in fp32.

    Raises:
        ValueError: If a setting is out of range, or an update comes without `params`.

    Example:
        >>> import jax.numpy as jnp, optax, fusionopt_jax as fo
        >>> tx = fo.autoscale(fo.schedule_free(optax.scale_by_adam(b1=0.0), 1.0))
        >>> params = {"w": jnp.array([0.3, -0.1])}
        >>> state = tx.init(params)
        >>> for _ in range(50):
        ...     updates, state = tx.update(params, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> bool(0.01 < state.step_size < 0.3)
        True

    Source:
        Mishchenko and Defazio, *Prodigy*, arXiv 2306.06101, Algorithm 4; Defazio and
        Mishchenko, *D-Adaptation*, arXiv 2301.07733, for the plain weight. Both know
        the schedule of the learning rate and weigh with it; this wrapper does not, as
        the published code with `safeguard_warmup`. D-Adaptation's own numerator for
        Adam is an inner product of gradients, which stands for the one here where the
        parameters are what dual averaging makes them.
    """
    check_positive("first", first)
    check_decay_rate("b1", b1)
    check_choice("rule", rule, _POWERS)
    p = _POWERS[rule]
    inner_tx = accepting_extra_args(inner)

    def init_fn(params: Params) -> AutoscaleState:
        check_leaves("autoscale", params, complex_too=True)
        return AutoscaleState(
            step_size=jnp.array(first, jnp.float32),
            numerator=jnp.zeros([], jnp.float32),
            gradient_average=wide_zeros(params),
            first_params=jax.tree.map(lambda x: copied(x, wide_dtype(x)), params),
            inner_state=inner_tx.init(params),
        )

    def update_fn(
        updates: Any,
        state: AutoscaleState,
        params: Params | None = None,
        *,
        step_size: Array | float = 1.0,
        **extra_args: Any,
    ) -> tuple[Any, AutoscaleState]:
        if params is None:
            raise ValueError(
                "`autoscale` needs the current parameters: call "
                "`update(grads, state, params)`."
            )
        check_leaves("autoscale", updates, complex_too=True)
        d = state.step_size
        # In units of the first estimate, so that its powers stay in range.
        weight = (1 - b1) * (d / first) ** p

        moved = jax.tree.map(lambda x0, x: x0 - widened(x), state.first_params, params)
        r = b1 * state.numerator + weight * inner_product(updates, moved)
        s = jax.tree.map(
            lambda s, g: b1 * s + weight * widened(g), state.gradient_average, updates
        )
        norm = l1_norm(s)
        estimate = jnp.where(norm > 0, r / jnp.where(norm > 0, norm, 1), 0)

        usable = jnp.isfinite(r) & jnp.isfinite(norm)
        inner_updates, inner_state = update_scaled(
            inner_tx,
            jnp.where(usable, d * jnp.asarray(step_size, jnp.float32), 0),
            updates,
            state.inner_state,
            params,
            extra_args,
        )
        return inner_updates, AutoscaleState(
            step_size=jnp.where(usable, jnp.maximum(d, estimate), d),
            numerator=jnp.where(usable, r, state.numerator),
            gradient_average=jax.tree.map(
                lambda new, old: jnp.where(usable, new, old), s, state.gradient_average
            ),
            first_params=state.first_params,
            inner_state=inner_state,
        )

    return transformation(init_fn, update_fn)
