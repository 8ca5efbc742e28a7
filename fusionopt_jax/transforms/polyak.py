r"""One step size for the whole tree, from the loss and the gradient.

.. math::
    \gamma_t = \operatorname{clamp}\!\left(
        \frac{\operatorname{EMA}(f)}{\operatorname{EMA}(\|g\|)}, 0.1, 10\right)
    \qquad\text{or}\qquad
    \gamma_t = \frac{\max(0, f_t - f_\star + \langle g_t, z_t - y_t\rangle)}
                    {\sqrt{\pi/2}\,\operatorname{EMA}(\|g\|_1)} .
"""

import math
from collections.abc import Callable
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
from fusionopt_jax._trees import entries, inner_product, l1_norm, l2_norm
from fusionopt_jax._types import Array, Count, Number, Params, Scalar
from fusionopt_jax.iterates import fast_iterate, schedule_free_states, update_scaled

PolyakRule: TypeAlias = Literal["ratio", "schedule_free_plus"]
GradientNorm: TypeAlias = Literal["l2", "mean_abs"]

_RULES: tuple[PolyakRule, ...] = ("ratio", "schedule_free_plus")
_NORMS: tuple[GradientNorm, ...] = ("l2", "mean_abs")


class PolyakState(NamedTuple):
    r"""State of `polyak` with rule `"ratio"`.

    Attributes:
        count: Steps that entered the average of the loss.
        step_size: The factor of the last step, :math:`\gamma_t`; 1 before the first.
        loss_average: Moving average of the loss.
        norm_average: Moving average of the gradient's norm.
        inner_state: State of the wrapped transformation.
    """

    count: Count
    step_size: Scalar
    loss_average: Scalar
    norm_average: Scalar
    inner_state: Any


class PolyakPlusState(NamedTuple):
    r"""State of `polyak` with rule `"schedule_free_plus"`.

    Attributes:
        count: Steps that entered the average of the norm.
        step_size: The factor of the last step, :math:`\gamma_t`; 1 before the first.
        loss: The last loss that was a number.
        l1_average: Moving average of the gradient's sum of absolute entries, from 0,
            before its bias is corrected.
        inner_state: State of the wrapped transformation.
    """

    count: Count
    step_size: Scalar
    loss: Scalar
    l1_average: Scalar
    inner_state: Any


def polyak(
    inner: TransformLike,
    *,
    rule: PolyakRule = "ratio",
    norm: GradientNorm | None = None,
    b1: Number | None = None,
    min_ratio: Number | None = None,
    max_ratio: Number | None = None,
    f_min: Number | None = None,
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
    NaN, the factor is 0, the averages stay as they are and no parameter moves, whatever
    the inner transformation made of it. A NaN gradient still reaches the inner state;
    put `optax.apply_if_finite` around the optimiser to drop such steps whole.

    Args:
        inner: The optimiser.
        rule: How the factor is computed. `"schedule_free_plus"` needs a
            `schedule_free` inside.
        norm: Of `"ratio"`: `"l2"`, the default, is the norm of the whole gradient;
            `"mean_abs"` is the mean absolute entry, as FusionOpt has it, which puts the
            ratio at `max_ratio` for any network of more than a few thousand parameters.
        b1: Decay rate of the averages, in [0, 1). `None` is 0.98 for `"ratio"` and 0
            (no averaging) for `"schedule_free_plus"`, as published.
        min_ratio: Lower clamp of `"ratio"`; 0.1 if `None`.
        max_ratio: Upper clamp of `"ratio"`; 10 if `None`.
        f_min: Of `"schedule_free_plus"`: the lowest value that the loss can reach,
            :math:`f_\star`; 0 if `None`.
        missing_value: What an update without `value` does: `"error"`, or `"unit"` for a
            factor of exactly 1, with the norm's average still advancing.

    Returns:
        A transformation whose update takes the loss as `value=`, one number.

    Raises:
        ValueError: If a setting is out of range or belongs to the other rule, or
            `value` or `params` is missing from an update that needs it, or `value` is
            not one number, or `"schedule_free_plus"` finds no `schedule_free`.

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
        `b1` > 0; here it is corrected once. While the interpolation is annealed,
        that code weighs the inner product with the new value; here it is taken with
        the parameters as they are, which the old value made.
    """
    check_choice("rule", rule, _RULES)
    check_choice("missing_value", missing_value, ("error", "unit"))
    if rule == "ratio":
        _refuse_settings(rule, f_min=f_min)
        norm = "l2" if norm is None else norm
        check_choice("norm", norm, _NORMS)
        first, advance = _ratio(norm, b1, min_ratio, max_ratio)
    else:
        _refuse_settings(rule, norm=norm, min_ratio=min_ratio, max_ratio=max_ratio)
        first, advance = _schedule_free_plus(b1, f_min)
    inner_tx = accepting_extra_args(inner)

    def init_fn(params: Params) -> PolyakState | PolyakPlusState:
        check_leaves("polyak", params, complex_too=True)
        return first(inner_tx.init(params))

    def update_fn(
        updates: Any,
        state: PolyakState | PolyakPlusState,
        params: Params | None = None,
        *,
        value: Array | float | None = None,
        **extra_args: Any,
    ) -> tuple[Any, PolyakState | PolyakPlusState]:
        if value is None and missing_value == "error":
            raise ValueError(
                "`polyak` needs the loss: call `update(grads, state, params, "
                "value=loss)`."
            )
        check_leaves("polyak", updates, complex_too=True)
        loss = None
        if value is not None:
            check_scalar_value("polyak", value)
            loss = jnp.asarray(value, jnp.float32)
            extra_args["value"] = value
        state = advance(updates, state, params, loss)
        inner_updates, inner_state = update_scaled(
            inner_tx, state.step_size, updates, state.inner_state, params, extra_args
        )
        return inner_updates, state._replace(inner_state=inner_state)

    return transformation(init_fn, update_fn)


# How a rule starts its state and computes the step size in it.
_Rule: TypeAlias = tuple[Callable[[Any], Any], Callable[..., Any]]


def _ratio(
    norm: GradientNorm,
    b1: Number | None,
    min_ratio: Number | None,
    max_ratio: Number | None,
) -> _Rule:
    """clamp(EMA(f) / EMA(‖g‖)); the averages start at their first value."""
    b1 = 0.98 if b1 is None else b1
    low = 0.1 if min_ratio is None else min_ratio
    high = 10.0 if max_ratio is None else max_ratio
    check_decay_rate("b1", b1)
    check_positive("min_ratio", low)
    check_number("max_ratio", high, low=low if is_concrete_number(low) else 0.0)

    def first(inner_state: Any) -> PolyakState:
        return PolyakState(
            count=jnp.zeros([], jnp.int32),
            step_size=jnp.ones([], jnp.float32),
            # Two arrays, not one twice: a buffer can be donated only once.
            loss_average=jnp.zeros([], jnp.float32),
            norm_average=jnp.zeros([], jnp.float32),
            inner_state=inner_state,
        )

    def advance(
        updates: Any, state: PolyakState, params: Params | None, loss: Scalar | None
    ) -> PolyakState:
        del params
        if norm == "l2":
            size = l2_norm(updates)
        else:
            size = l1_norm(updates) / max(entries(updates), 1)
        usable = jnp.isfinite(size)
        if loss is not None:
            usable &= jnp.isfinite(loss)

        def average(old: Scalar, new: Scalar, started: Array) -> Scalar:
            mixed = jnp.where(started, b1 * old + (1 - b1) * new, new)
            return jnp.where(usable, mixed, old)

        norm_average = average(state.norm_average, size, state.norm_average > 0)
        if loss is None:
            # The first loss may come later than the first gradient.
            step_size = jnp.ones([], jnp.float32)
            loss_average, count = state.loss_average, state.count
        else:
            loss_average = average(state.loss_average, loss, state.count > 0)
            count = _counted(state.count, usable)
            tiny = jnp.finfo(jnp.float32).tiny
            ratio = loss_average / jnp.maximum(norm_average, tiny)
            step_size = jnp.clip(ratio, low, high)
        return PolyakState(
            count=count,
            step_size=jnp.where(usable, step_size, 0.0),
            loss_average=loss_average,
            norm_average=norm_average,
            inner_state=state.inner_state,
        )

    return first, advance


def _schedule_free_plus(b1: Number | None, f_min: Number | None) -> _Rule:
    """max(0, f − f* + ⟨g, z − y⟩) / (√(π/2) EMA(‖g‖₁)), bias-corrected."""
    b1 = 0.0 if b1 is None else b1
    lowest = 0.0 if f_min is None else f_min
    check_decay_rate("b1", b1)
    check_number("f_min", lowest)

    def first(inner_state: Any) -> PolyakPlusState:
        if not schedule_free_states(inner_state):
            raise ValueError(
                "`polyak` with rule 'schedule_free_plus' needs a `schedule_free` "
                "inside it, whose fast iterate enters the step size; without one use "
                "rule 'ratio'."
            )
        return PolyakPlusState(
            count=jnp.zeros([], jnp.int32),
            step_size=jnp.ones([], jnp.float32),
            loss=jnp.zeros([], jnp.float32),
            l1_average=jnp.zeros([], jnp.float32),
            inner_state=inner_state,
        )

    def advance(
        updates: Any, state: PolyakPlusState, params: Params | None, loss: Scalar | None
    ) -> PolyakPlusState:
        if params is None:
            raise ValueError(
                "`polyak` with rule 'schedule_free_plus' needs the parameters: call "
                "`update(grads, state, params, value=loss)`."
            )
        size = l1_norm(updates)
        y = jax.tree.map(widened, params)
        z = jax.tree.map(widened, fast_iterate(state.inner_state, params))
        lag = inner_product(updates, optax.tree.sub(z, y))
        f = state.loss if loss is None else loss
        usable = jnp.isfinite(f) & jnp.isfinite(size) & jnp.isfinite(lag)

        count = _counted(state.count, usable)
        l1_average = b1 * state.l1_average + (1 - b1) * size
        l1_average = jnp.where(usable, l1_average, state.l1_average)
        steps = jnp.maximum(count, 1).astype(jnp.float32)
        corrected = l1_average / (1 - jnp.asarray(b1, jnp.float32) ** steps)

        tiny = jnp.finfo(jnp.float32).tiny
        scale = jnp.maximum(math.sqrt(math.pi / 2) * corrected, tiny)
        step_size = jnp.maximum(0.0, f - lowest + lag) / scale
        if loss is None:
            step_size = jnp.ones([], jnp.float32)
        # With no gradient there is no direction, and nothing to divide by.
        return PolyakPlusState(
            count=count,
            step_size=jnp.where(usable & (size > 0), step_size, 0.0),
            loss=jnp.where(usable, f, state.loss),
            l1_average=l1_average,
            inner_state=state.inner_state,
        )

    return first, advance


def _counted(count: Count, usable: Array) -> Count:
    """A step counter, advanced where the step is usable; it stops at its largest."""
    return jnp.where(usable, jnp.asarray(optax.safe_increment(count)), count)


def _refuse_settings(rule: PolyakRule, **settings: Any) -> None:
    """Require that settings of the other rule are not given."""
    given = [name for name, value in settings.items() if value is not None]
    if given:
        other = next(one for one in _RULES if one != rule)
        listed = ", ".join(f"`{name}`" for name in given)
        raise ValueError(
            f"{listed} has no effect with `rule`={rule!r}: leave it out, or choose "
            f"rule {other!r}, which it belongs to."
        )
