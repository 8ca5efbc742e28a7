r"""Two other uses of a shared factor: to find the rate and hold it, and without units.

The ratio of loss and gradient norm has the task's units, so that one learning rate
means something else on every task. Both of these refer it to itself: with
:math:`\bar\gamma` the geometric mean of :math:`\gamma` over the second half of the
first `steps` steps,

.. math::
    \text{hold:} \quad \gamma'_t = \begin{cases}
        \gamma_t & t < \text{steps} \\ \bar\gamma & \text{after}
    \end{cases}
    \qquad
    \text{relative:} \quad \gamma'_t = \begin{cases}
        1 & t < \text{steps} \\ \gamma_t / \bar\gamma & \text{after.}
    \end{cases}
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax


class ReferredState(NamedTuple):
    """State of `hold` and of `relative`.

    Attributes:
        count: Steps so far.
        log_sum: Sum of the logarithms of the factors that enter the mean.
        factor_used: What the last step was multiplied by.
        inner_state: State of the wrapped transformation.
    """

    count: jax.Array
    log_sum: jax.Array
    factor_used: jax.Array
    inner_state: Any


def hold(inner: Any, steps: int) -> optax.GradientTransformationExtraArgs:
    """Hands on `step_size` for so many steps, and then what it was in them.

    Args:
        inner: Takes the extra argument `step_size`, as `schedule_free` does.
        steps: How long the factor is followed, at least 2.
    """
    return _referred(inner, steps, "hold")


def relative(inner: Any, steps: int) -> optax.GradientTransformationExtraArgs:
    """Hands on `step_size` over what it was in the first steps, during which 1.

    Args:
        inner: Takes the extra argument `step_size`, as `schedule_free` does.
        steps: How long the factor is only watched, at least 2.
    """
    return _referred(inner, steps, "relative")


def _referred(
    inner: Any, steps: int, use: Literal["hold", "relative"]
) -> optax.GradientTransformationExtraArgs:
    """The factor, referred to its geometric mean over steps/2, ..., steps - 1."""
    if steps < 2:
        raise ValueError(f"`steps` must be at least 2, got {steps}.")
    tx = optax.with_extra_args_support(inner)
    first = steps // 2
    tiny = jnp.finfo(jnp.float32).tiny

    def init(params: Any) -> ReferredState:
        zero, one = jnp.zeros([], jnp.float32), jnp.ones([], jnp.float32)
        return ReferredState(jnp.zeros([], jnp.int32), zero, one, tx.init(params))

    def update(
        updates: Any,
        state: ReferredState,
        params: Any = None,
        *,
        step_size: jax.Array,
        **extra: Any,
    ) -> tuple[Any, ReferredState]:
        count, log = state.count, jnp.log(jnp.maximum(step_size, tiny))
        entering = (count >= first) & (count < steps)
        log_sum = state.log_sum + jnp.where(entering, log, 0.0)
        mean = jnp.exp(log_sum / (steps - first))
        if use == "hold":
            factor = jnp.where(count < steps, step_size, mean)
        else:
            factor = jnp.where(count < steps, 1.0, step_size / mean)
        # A factor of zero says that this step is to be left out.
        factor = jnp.where(step_size == 0, 0.0, factor).astype(jnp.float32)
        updates, inner_state = tx.update(
            updates, state.inner_state, params, step_size=factor, **extra
        )
        return updates, ReferredState(count + 1, log_sum, factor, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
