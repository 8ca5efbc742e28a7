"""Argument checks, and the wording of their errors.

Every check takes the argument's name first, so that an error can say which one it was.
A value that `optax.inject_hyperparams` has turned into a tracer or an array can't be
looked at while a function is traced; such values pass unchecked.
"""

import difflib
import math
import warnings
from collections.abc import Iterable
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp

from fusionopt_jax._types import Leaf


def is_concrete_number(value: object) -> TypeGuard[int | float]:
    """Whether `value` is a plain number that can be compared at build time."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_number(
    name: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = False,
) -> None:
    """Require a real number within an interval; arrays and tracers pass."""
    if isinstance(value, jax.Array):
        return
    if not is_concrete_number(value):
        raise TypeError(
            f"`{name}` must be a number, got {value!r} of type {type(value).__name__}."
        )
    below = value <= low if low_open else value < low
    above = value >= high if high_open else value > high
    if math.isnan(value) or below or above:
        left = "(" if low_open or low == -math.inf else "["
        right = ")" if high_open or high == math.inf else "]"
        raise ValueError(
            f"`{name}` must lie in {left}{low}, {high}{right}, got {value}."
        )


def check_decay_rate(name: str, value: Any) -> None:
    """Require the decay rate of a moving average, in [0, 1)."""
    check_number(name, value, low=0.0, high=1.0, high_open=True)


def check_positive(name: str, value: Any) -> None:
    """Require a number above zero."""
    check_number(name, value, low=0.0, low_open=True)


def check_non_negative(name: str, value: Any) -> None:
    """Require a number of at least zero."""
    check_number(name, value, low=0.0)


def check_count(name: str, value: Any, *, low: int = 0) -> None:
    """Require an integer of at least `low`; arrays pass, as it stays on the device."""
    if not isinstance(value, jax.Array):
        check_integer(name, value, low=low)


def check_integer(name: str, value: Any, *, low: int) -> None:
    """Require a Python integer of at least `low`; it shapes the program."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"`{name}` must be a Python integer, got {value!r} of type "
            f"{type(value).__name__}. Under `optax.inject_hyperparams`, name it in "
            "`static_args`."
        )
    if value < low:
        raise ValueError(f"`{name}` must be at least {low}, got {value}.")


def check_choice(name: str, value: object, choices: Iterable[Any]) -> None:
    """Require one of a few values; the error lists them and guesses what was meant."""
    allowed = list(choices)
    if value in allowed:
        return
    listed = ", ".join(repr(choice) for choice in allowed)
    hint = did_you_mean(value, allowed)
    raise ValueError(f"`{name}` must be one of {listed}; got {value!r}.{hint}")


def check_rate_or_schedule(name: str, value: Any) -> None:
    """Require a non-negative number or a function of the step count."""
    if not callable(value):
        check_non_negative(name, value)


def check_scalar_value(component: str, value: Any) -> None:
    """Require that a loss handed to `update` is one real number.

    An array of shape (1,) would give every number computed from it that shape, and with
    it the state another structure than `init` made.
    """
    shape = getattr(value, "shape", ())
    if isinstance(value, list | tuple) or shape != ():
        got = f"of shape {shape}" if shape else repr(value)
        raise ValueError(
            f"`{component}` needs the loss as one number, got a `value` {got}. Reduce "
            "it first: `value=jnp.mean(loss)`, or `value=loss[0]` of a single one."
        )
    if jnp.issubdtype(jnp.result_type(value), jnp.complexfloating):
        raise ValueError(
            f"`{component}` needs a real loss, got a `value` of dtype "
            f"{jnp.result_type(value)}."
        )


def renamed(new: str, value: Any, default: float, old: str, given: Any) -> Any:
    """The value of a keyword that was renamed and is still accepted under both names.

    Args:
        new: Its name.
        value: What it was given as, or its default.
        default: The default.
        old: The name that it had.
        given: What it was given as under that name, or `None`.
    """
    if given is None:
        return value
    # An array is what `optax.inject_hyperparams` makes of a default as well.
    if is_concrete_number(value) and value != default:
        raise ValueError(f"`{old}` is the old name of `{new}`: give `{new}` alone.")
    warnings.warn(f"`{old}` is now called `{new}`.", DeprecationWarning, stacklevel=3)
    return given


def did_you_mean(value: object, choices: Iterable[Any]) -> str:
    """A hint that names the nearest allowed word, or nothing."""
    words = [choice for choice in choices if isinstance(choice, str)]
    near = difflib.get_close_matches(str(value), words, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def shape_text(leaf: Leaf) -> str:
    """A leaf's dtype and shape as errors print them, such as `float32[3, 4]`."""
    return f"{leaf.dtype}[{', '.join(str(size) for size in leaf.shape)}]"
