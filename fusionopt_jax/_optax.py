"""The one place where Optax's types are widened."""

from collections.abc import Callable
from typing import Any

import optax

TransformLike = optax.GradientTransformation | optax.GradientTransformationExtraArgs


def transformation(
    init_fn: Callable[..., Any], update_fn: Callable[..., Any]
) -> optax.GradientTransformationExtraArgs:
    """An Optax transformation whose functions may name their own state class."""
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def accepting_extra_args(
    inner: TransformLike,
) -> optax.GradientTransformationExtraArgs:
    """`inner`, made to ignore the extra arguments that it does not know."""
    return optax.with_extra_args_support(inner)
