r"""One step size for the whole tree, from the loss and the gradient.

.. math::
    \gamma_t = \operatorname{clamp}\!\left(
        \frac{\operatorname{EMA}(f)}{\operatorname{EMA}(\|g\|)}, 0.1, 10\right)
    \qquad\text{or}\qquad
    \gamma_t = \frac{\max(0, f_t - f_\star + \langle g_t, z_t - y_t\rangle)}
                    {\sqrt{\pi/2}\,\operatorname{EMA}(\|g\|_1)} .
"""

import math
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from fusionopt_jax._checks import (
    check_choice,
    check_decay_rate,
    check_number,
    check_positive,
    check_scalar_value,
    is_concrete_number,
)
from fusionopt_jax._leaves import check_leaves, widened
from fusionopt_jax._optax import TransformLike, accepting_extra_args, transformation
from fusionopt_jax._types import Array, Count, Number, Params, Scalar
from fusionopt_jax.iterates import fast_iterate, schedule_free_states

PolyakRule: TypeAlias = Literal["ratio", "schedule_free_plus"]
GradientNorm: TypeAlias = Literal["l2", "mean_abs"]

_RULES: tuple[PolyakRule, ...] = ("ratio", "schedule_free_plus")
_NORMS: tuple[GradientNorm, ...] = ("l2", "mean_abs")


class PolyakState(NamedTuple):
    r"""State of `polyak`.

    Attributes:
        count: Steps that entered the average of the loss; by `"schedule_free_plus"`
            that of the norm.
        step_size: The factor of the last step, :math:`\gamma_t`; 1 before the first.
        loss_average: Moving average of the loss (`"ratio"`), or the last loss.
        norm_average: Moving average of the gradient's norm.
        inner_state: State of the wrapped transformation.
    """

    count: Count
    step_size: Scalar
    loss_average: Scalar
    norm_average: Scalar
    inner_state: Any


def polyak(
    inner: TransformLike,
    *,
    rule: PolyakRule = "ratio",
    norm: GradientNorm = "l2",
    decay: Number | None = None,
    min_ratio: Number = 0.1,
    max_ratio: Number = 10.0,
    f_min: Number = 0.0,
    missing_value: Literal["error", "unit"] = "error",
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies the learning rate of everything inside by one shared factor.

    The factor :math:`\gamma_t` is computed once from the whole tree, on the device, and
    handed down as the extra argument `step_size`, which `schedule_free` multiplies into
    its learning rate. If there is no `schedule_free` inside, the updates themselves are
    multiplied, which is the same for every optimiser that is linear in its learning
    rate.

    .. math::
        \text{"ratio":} \quad & \gamma_t = \operatorname{clamp}\bigl(
            \operatorname{EMA}(f_t) / \operatorname{EMA}(\|g_t\|),\,
            \text{`min_ratio`},\, \text{`max_ratio`}\bigr) \\
        \text{"schedule_free_plus":} \quad & \gamma_t =
            \frac{\max(0,\, f_t - f_\star + \langle g_t, z_t - y_t \rangle)}
                 {\sqrt{\pi/2}\;\operatorname{EMA}(\|g_t\|_1)}

    What the loss may be: where its average is zero or negative, `"ratio"` gives
    `min_ratio`; a loss that is not above :math:`f_\star - \langle g, z - y \rangle`
    gives 0 by `"schedule_free_plus"`. If the loss or the gradient's norm is infinite or
    NaN, the factor is 0 and the averages stay as they are: no step is taken on a number
    that says nothing. A NaN gradient still reaches the inner state; put
    `optax.apply_if_finite` around the optimiser to drop such steps whole.

    Args:
        inner: The optimiser.
        rule: How the factor is computed. `"schedule_free_plus"` needs a
            `schedule_free` inside.
        norm: For `"ratio"`: `"l2"` is the norm of the whole gradient; `"mean_abs"` is
            the mean absolute entry, as FusionOpt has it, which puts the ratio at
            `max_ratio` for any network of more than a few thousand parameters.
        decay: Decay rate of the averages, in [0, 1). `None` is 0.98 for `"ratio"` and 0
            (no averaging) for `"schedule_free_plus"`, as published.
        min_ratio: Lower clamp of `"ratio"`.
        max_ratio: Upper clamp of `"ratio"`.
        f_min: The lowest value that the loss can reach, :math:`f_\star`, for
            `"schedule_free_plus"`.
        missing_value: What an update without `value` does: `"error"`, or `"unit"` for a
            factor of exactly 1, with the norm's average still advancing.

    Returns:
        A transformation whose update takes the loss as `value=`.

    Raises:
        ValueError: If a setting is out of range, or `value` or `params` is missing from
            an update that needs it, or `"schedule_free_plus"` finds no `schedule_free`.

    Example:
        >>> import jax.numpy as jnp, optax, fusionopt_jax as fo
        >>> tx = fo.polyak(fo.schedule_free(optax.identity(), learning_rate=0.1))
        >>> params = {"w": jnp.ones(4)}
        >>> state = tx.init(params)
        >>> loss, grads = jnp.asarray(3.0), {"w": jnp.ones(4)}
        >>> updates, state = tx.update(grads, state, params, value=loss)
        >>> state.step_size
        Array(1.5, dtype=float32)

    Source:
        `"ratio"`: FusionOpt's first release, with the norm corrected.
        `"schedule_free_plus"`: Defazio, *ScheduleFree+*, arXiv 2605.19095. Its
        published code corrects the bias of the norm's average anew at every step when
        `decay` > 0; here it is corrected once. While the interpolation is annealed,
        that code weighs the inner product with the new value; here it is taken with
        the parameters as they are, which the old value made.
    """
    check_choice("rule", rule, _RULES)
    check_choice("norm", norm, _NORMS)
    check_choice("missing_value", missing_value, ("error", "unit"))
    if decay is None:
        decay = 0.98 if rule == "ratio" else 0.0
    check_decay_rate("decay", decay)
    check_positive("min_ratio", min_ratio)
    if is_concrete_number(min_ratio):
        check_number("max_ratio", max_ratio, low=min_ratio)
    check_number("f_min", f_min)
    inner_tx = accepting_extra_args(inner)

    def init_fn(params: Params) -> PolyakState:
        check_leaves("polyak", params, complex_too=True)
        inner_state = inner_tx.init(params)
        if rule == "schedule_free_plus" and not schedule_free_states(inner_state):
            raise ValueError(
                "`polyak` with rule 'schedule_free_plus' needs a `schedule_free` "
                "inside it, whose fast iterate enters the step size; without one use "
                "rule 'ratio'."
            )
        return PolyakState(
            count=jnp.zeros([], jnp.int32),
            step_size=jnp.ones([], jnp.float32),
            # Two arrays, not one twice: a buffer can be donated only once.
            loss_average=jnp.zeros([], jnp.float32),
            norm_average=jnp.zeros([], jnp.float32),
            inner_state=inner_state,
        )

    def update_fn(
        updates: Any,
        state: PolyakState,
        params: Params | None = None,
        *,
        value: Array | float | None = None,
        **extra_args: Any,
    ) -> tuple[Any, PolyakState]:
        if value is None and missing_value == "error":
            raise ValueError(
                "`polyak` needs the loss: call `update(grads, state, params, "
                "value=loss)`."
            )
        check_leaves("polyak", updates, complex_too=True)
        if value is not None:
            check_scalar_value("polyak", value)
        if rule == "ratio":
            averages = _ratio(updates, state, value)
        else:
            averages = _schedule_free_plus(updates, state, params, value)
        step_size, loss_average, norm_average, counted = averages
        if value is not None:
            extra_args["value"] = value
        inner_updates, inner_state = inner_tx.update(
            updates, state.inner_state, params, step_size=step_size, **extra_args
        )
        if not schedule_free_states(inner_state):
            inner_updates = jax.tree.map(
                lambda u: (step_size * u).astype(u.dtype), inner_updates
            )
        return inner_updates, PolyakState(
            count=state.count + counted.astype(jnp.int32),
            step_size=step_size,
            loss_average=loss_average,
            norm_average=norm_average,
            inner_state=inner_state,
        )

    def _ratio(
        updates: Any, state: PolyakState, value: Array | float | None
    ) -> tuple[Scalar, Scalar, Scalar, Array]:
        """clamp(EMA(f) / EMA(‖g‖)); the averages start at their first value."""
        size = _gradient_norm(updates, norm)
        loss = state.loss_average if value is None else _as_fp32(value)
        usable = jnp.isfinite(loss) & jnp.isfinite(size)

        def average(old: Scalar, new: Scalar, started: Array) -> Scalar:
            mixed = jnp.where(started, decay * old + (1 - decay) * new, new)
            return jnp.where(usable, mixed, old)

        # The first loss may come later than the first gradient.
        loss_average, counted = state.loss_average, jnp.zeros_like(usable)
        if value is not None:
            loss_average = average(state.loss_average, loss, state.count > 0)
            counted = usable
        norm_average = average(state.norm_average, size, state.norm_average > 0)
        tiny = jnp.finfo(jnp.float32).tiny
        ratio = loss_average / jnp.maximum(norm_average, tiny)
        step_size = jnp.clip(ratio, min_ratio, max_ratio)
        if value is None:
            step_size = jnp.ones_like(step_size)
        return jnp.where(usable, step_size, 0.0), loss_average, norm_average, counted

    def _schedule_free_plus(
        updates: Any,
        state: PolyakState,
        params: Params | None,
        value: Array | float | None,
    ) -> tuple[Scalar, Scalar, Scalar, Array]:
        """max(0, f − f* + ⟨g, z − y⟩) / (√(π/2) EMA(‖g‖₁)), bias-corrected."""
        if params is None:
            raise ValueError(
                "`polyak` with rule 'schedule_free_plus' needs the parameters: call "
                "`update(grads, state, params, value=loss)`."
            )
        size = _gradient_norm(updates, "l1")
        loss = state.loss_average if value is None else _as_fp32(value)
        lag = _inner_product(updates, fast_iterate(state, params), params)
        usable = jnp.isfinite(loss) & jnp.isfinite(size) & jnp.isfinite(lag)
        count = state.count + usable.astype(jnp.int32)
        norm_average = jnp.where(
            usable, decay * state.norm_average + (1 - decay) * size, state.norm_average
        )
        corrected = norm_average / (
            1 - jnp.asarray(decay, jnp.float32) ** jnp.maximum(count, 1)
        )
        scale = jnp.maximum(
            math.sqrt(math.pi / 2) * corrected, jnp.finfo(jnp.float32).tiny
        )
        step_size = jnp.maximum(0.0, loss - f_min + lag) / scale
        if value is None:
            step_size = jnp.ones_like(step_size)
        # With no gradient there is no direction, and nothing to divide by.
        usable_step = usable & (size > 0)
        loss_average = jnp.where(usable, loss, state.loss_average)
        return (
            jnp.where(usable_step, step_size, 0.0),
            loss_average,
            norm_average,
            usable,
        )

    return transformation(init_fn, update_fn)


def _as_fp32(value: Array | float) -> Scalar:
    return jnp.asarray(value, jnp.float32)


def _gradient_norm(updates: Any, norm: Literal["l1", "l2", "mean_abs"]) -> Scalar:
    """A norm over all leaves, in fp32."""
    leaves = [jnp.abs(widened(leaf)) for leaf in jax.tree.leaves(updates)]
    if norm == "l2":
        return jnp.sqrt(_total(jnp.sum(leaf * leaf) for leaf in leaves))
    total = _total(jnp.sum(leaf) for leaf in leaves)
    size = sum(leaf.size for leaf in leaves)
    return total / max(size, 1) if norm == "mean_abs" else total


def _inner_product(gradient: Any, z: Params, y: Params) -> Scalar:
    """⟨g, z − y⟩ over all leaves, in fp32."""
    products = jax.tree.map(
        lambda g, a, b: jnp.sum(
            jnp.real(jnp.conj(widened(g)) * (widened(a) - widened(b)))
        ),
        gradient,
        z,
        y,
    )
    return _total(jax.tree.leaves(products))


def _total(terms: Any) -> Scalar:
    """The sum of some scalars, 0 if there are none."""
    return sum(terms, start=jnp.zeros([], jnp.float32))
