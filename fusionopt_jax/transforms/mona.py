r"""Momentum with an acceleration term: gradient differences fed into the gradient.

.. math::
    A_t = \beta A_{t-1} + w\,(g_t - g_{t-1}), \qquad \tilde g_t = g_t + \alpha A_t,
    \qquad A_0 = g_0 = 0,

with :math:`w = 1 - \beta` (weighted) or :math:`w = 1` (plain). Summed by parts, the
average of differences is the difference to an average, so one buffer is enough:

.. math::
    A_t = w\,(g_t - e_{t-1}), \qquad
    e_t = \beta e_{t-1} + (1-\beta)\,g_t, \quad e_0 = 0 .
"""

from typing import Any, NamedTuple

import jax
import optax

from fusionopt_jax._checks import check_decay_rate, check_number, renamed
from fusionopt_jax._leaves import check_leaves, wide_zeros, widened
from fusionopt_jax._optax import transformation
from fusionopt_jax._types import Array, Number, Params


class MONAState(NamedTuple):
    """State of `mona`.

    Attributes:
        gradient_average: The moving average of the gradients, :math:`e_t`, shaped like
            the parameters, in fp32.
    """

    gradient_average: Params


def mona(
    *,
    alpha: Number = 0.2,
    b1: Number = 0.9,
    weighted: bool = False,
    beta: Number | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds an average of gradient differences to the gradient, before the momentum.

    .. math::
        \tilde g_t = g_t + k\,(g_t - e_{t-1}), \qquad
        e_t = \beta e_{t-1} + (1-\beta) g_t, \qquad
        k = \alpha w, \quad w \in \{1 - \beta, 1\}

    :math:`k > 0` gives the fresh gradient more weight (a high-pass: faster early,
    noisier at small batches); :math:`k < 0` gives the past more weight (a slow-average
    mix, which the analysis of the predecessor paper ties to flatter minima). Steady
    gradients pass unchanged for either sign.

    Args:
        alpha: Strength of the acceleration, :math:`\alpha`, of either sign.
        b1: Decay rate of the average, :math:`\beta`, in [0, 1).
        weighted: Weigh each difference by :math:`1-\beta`, as the paper does, or sum
            them up plainly, as FusionOpt does. `mona(alpha=a, weighted=False)` is
            `mona(alpha=a / (1 - b1), weighted=True)`.
        beta: The old name of `b1`.

    Returns:
        A transformation whose updates have the shapes and dtypes of its input.

    Raises:
        ValueError: If `b1` is outside [0, 1) or given under both names.

    Example:
        >>> import jax.numpy as jnp, fusionopt_jax as fo
        >>> tx = fo.mona(alpha=0.5)
        >>> gradient = {"w": jnp.ones(2)}
        >>> update, state = tx.update(gradient, tx.init(gradient))
        >>> update["w"]
        Array([1.5, 1.5], dtype=float32)

    Source:
        *MONA*, arXiv 2605.26842 (weighted form, as third parties restate it), and its
        predecessor *Exploring Landscapes for Better Minima along Valleys*, arXiv
        2510.27153. FusionOpt keeps two buffers, the last gradient and the average of
        differences; this is the same sequence from one.
    """
    b1 = renamed("b1", b1, 0.9, "beta", beta)
    check_number("alpha", alpha)
    check_decay_rate("b1", b1)

    def init_fn(params: Any) -> MONAState:
        check_leaves("mona", params, complex_too=True)
        return MONAState(wide_zeros(params))

    def update_fn(
        updates: Any, state: MONAState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, MONAState]:
        del params, extra_args
        check_leaves("mona", updates, complex_too=True)
        k = alpha * (1 - b1) if weighted else alpha

        def accelerate(g: Array, e: Array) -> Array:
            fresh = widened(g)
            return (fresh + k * (fresh - e)).astype(g.dtype)

        def average(g: Array, e: Array) -> Array:
            return b1 * e + (1 - b1) * widened(g)

        e = state.gradient_average
        return (
            jax.tree.map(accelerate, updates, e),
            MONAState(jax.tree.map(average, updates, e)),
        )

    return transformation(init_fn, update_fn)
