"""Gradient accumulation that runs the optimiser once for every few gradients."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fusionopt_jax._checks import check_count, check_scalar_value
from fusionopt_jax._leaves import check_leaves, wide_zeros, widened
from fusionopt_jax._optax import TransformLike, accepting_extra_args, transformation
from fusionopt_jax._types import Array, Count, Params, Scalar


class AccumulateState(NamedTuple):
    """State of `accumulate`.

    Attributes:
        micro_step: Gradients added up since the inner optimiser last ran.
        gradient_sum: Their sum, shaped like the parameters, in fp32.
        value_count: How many of them came with a loss.
        value_sum: Sum of those losses.
        inner_state: State of the wrapped optimiser.
    """

    micro_step: Count
    gradient_sum: Params
    value_count: Count
    value_sum: Scalar
    inner_state: Any


def accumulate(
    tx: TransformLike, every: int | jax.Array
) -> optax.GradientTransformationExtraArgs:
    r"""Runs an optimiser once for every few gradients, on their mean.

    .. math::
        \bar g = \frac1k \sum_{i=1}^{k} g_i, \qquad \bar f = \frac1k \sum_{i=1}^{k} f_i

    Every :math:`k`-th call (`every`) runs `tx` on :math:`\bar g` and
    `value`:math:`=\bar f`; the calls between return zeros and only add up. The branch
    is taken at run time by `jax.lax.cond`, so that what the optimiser costs
    (Newton–Schulz, Shampoo) is paid once in :math:`k` calls. (`optax.MultiSteps` runs
    it in every call, selects afterwards, and hands on the last loss instead of the
    mean.)

    Args:
        tx: A complete optimiser or any transformation.
        every: Calls for each update, :math:`k`, at least 1; an integer or an integer
            array.

    Returns:
        A transformation whose updates have the dtypes of the parameters, or of the
        gradients where an update comes without `params`. The sums are kept in fp32; the
        mean is cast back to the gradients' dtype. Of extra arguments other than
        `value`, `tx` sees those of the call that runs it.

    Raises:
        ValueError: If `every` is below 1, or `value` is not one number.
        TypeError: If `every` is no integer.

    Example:
        >>> import jax.numpy as jnp, optax, fusionopt_jax as fo
        >>> tx = fo.accumulate(optax.sgd(1.0), every=2)
        >>> params = {"w": jnp.zeros(2)}
        >>> state = tx.init(params)
        >>> updates, state = tx.update({"w": jnp.array([1.0, 0.0])}, state, params)
        >>> updates["w"]
        Array([0., 0.], dtype=float32)
        >>> updates, state = tx.update({"w": jnp.array([0.0, 1.0])}, state, params)
        >>> updates["w"]
        Array([-0.5, -0.5], dtype=float32)
    """
    check_count("every", every, low=1)
    inner = accepting_extra_args(tx)

    def init_fn(params: Params) -> AccumulateState:
        check_leaves("accumulate", params, complex_too=True)
        return AccumulateState(
            micro_step=jnp.zeros([], jnp.int32),
            gradient_sum=wide_zeros(params),
            value_count=jnp.zeros([], jnp.int32),
            value_sum=jnp.zeros([], jnp.float32),
            inner_state=inner.init(params),
        )

    def update_fn(
        updates: Any,
        state: AccumulateState,
        params: Params | None = None,
        *,
        value: Array | float | None = None,
        **extra_args: Any,
    ) -> tuple[Any, AccumulateState]:
        check_leaves("accumulate", updates, complex_too=True)
        micro_step = state.micro_step + 1
        gradient_sum = jax.tree.map(
            lambda total, g: total + widened(g), state.gradient_sum, updates
        )
        value_count, value_sum = state.value_count, state.value_sum
        if value is not None:
            check_scalar_value("accumulate", value)
            value_count = value_count + 1
            value_sum = value_sum + jnp.asarray(value, jnp.float32)

        like = updates if params is None else params

        def run(inner_state: Any, like: Any) -> tuple[Any, Any]:
            """The inner update on the means."""
            mean = jax.tree.map(
                lambda total, g: (total / micro_step).astype(g.dtype),
                gradient_sum,
                updates,
            )
            known = {} if value is None else {"value": value_sum / value_count}
            results, inner_state = inner.update(
                mean, inner_state, params, **known, **extra_args
            )
            return (
                jax.tree.map(lambda u, p: u.astype(p.dtype), results, like),
                inner_state,
            )

        def wait(inner_state: Any, like: Any) -> tuple[Any, Any]:
            """Zeros."""
            return jax.tree.map(jnp.zeros_like, like), inner_state

        full = micro_step >= every
        # As operands, because outside of `jit` a branch doesn't know the sharding of
        # the arrays that it closes over.
        results, inner_state = jax.lax.cond(full, run, wait, state.inner_state, like)
        return results, AccumulateState(
            micro_step=jnp.where(full, 0, micro_step),
            gradient_sum=jax.tree.map(
                lambda total: jnp.where(full, 0, total), gradient_sum
            ),
            value_count=jnp.where(full, 0, value_count),
            value_sum=jnp.where(full, 0, value_sum),
            inner_state=inner_state,
        )

    return transformation(init_fn, update_fn)
