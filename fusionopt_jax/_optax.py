"""The one place where Optax's types are widened."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fusionopt_jax._leaves import check_arrays, check_leaves, copied, is_abstract

TransformLike = optax.GradientTransformation | optax.GradientTransformationExtraArgs


def transformation(
    init_fn: Callable[..., Any], update_fn: Callable[..., Any]
) -> optax.GradientTransformationExtraArgs:
    """An Optax transformation whose functions may name their own state class.

    A model given for its parameters is refused with the remedy, before Optax or a map
    over trees complains of their structure.
    """

    @functools.wraps(update_fn)
    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        check_arrays("update", params)
        return update_fn(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update)


def accepting_extra_args(
    inner: TransformLike,
) -> optax.GradientTransformationExtraArgs:
    """`inner`, made to ignore the extra arguments that it does not know."""
    return optax.with_extra_args_support(inner)


def checking_leaves(
    component: str, inner: TransformLike
) -> optax.GradientTransformationExtraArgs:
    """`inner`, refusing by path every leaf that is no real floating-point array."""
    inner_tx = accepting_extra_args(inner)

    def init_fn(params: Any) -> Any:
        check_leaves(component, params)
        return inner_tx.init(params)

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        check_leaves(component, updates)
        return inner_tx.update(updates, state, params, **extra_args)

    return transformation(init_fn, update_fn)


def keeping_dtype(inner: TransformLike) -> optax.GradientTransformationExtraArgs:
    """`inner`, its updates cast back to the dtypes of the gradients it was given."""
    inner_tx = accepting_extra_args(inner)

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        results, state = inner_tx.update(updates, state, params, **extra_args)
        cast = jax.tree.map(lambda u, g: u.astype(g.dtype), results, updates)
        return cast, state

    return transformation(inner_tx.init, update_fn)


def in_float32(inner: TransformLike) -> optax.GradientTransformationExtraArgs:
    """`inner` on gradients widened to fp32, so that all it accumulates is fp32 too."""
    inner_tx = accepting_extra_args(inner)

    def wide(leaf: Any) -> Any:
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        return copied(leaf, dtype) if is_abstract(leaf) else leaf.astype(dtype)

    def widened(tree: Any) -> Any:
        return jax.tree.map(wide, tree)

    def init_fn(params: Any) -> Any:
        return inner_tx.init(widened(params))

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        return inner_tx.update(widened(updates), state, params, **extra_args)

    return transformation(init_fn, update_fn)
