"""The one place where Optax's types are widened."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fusionopt_jax._leaves import check_arrays, check_leaves, copied, is_abstract

TransformLike = optax.GradientTransformation | optax.GradientTransformationExtraArgs


class MakesStacks(optax.GradientTransformationExtraArgs):
    """A transformation that takes matrices out of their leaves.

    Its `update` has an argument `then`: a function of what it makes of a stack, before
    that goes back into its leaf.

    Attributes:
        bucketing: How it goes through its stacks.
    """

    bucketing: str

    def __new__(
        cls, tx: optax.GradientTransformationExtraArgs, bucketing: str
    ) -> "MakesStacks":
        """`tx`, with how it goes through its stacks."""
        made = super().__new__(cls, tx.init, tx.update)
        made.bucketing = bucketing
        return made


class OfStacks(optax.GradientTransformationExtraArgs):
    """A transformation that can run on stacks which another has taken out.

    Attributes:
        on_stacks: From a stack `(b, m, n)` and `platforms=`, those that it may be
            compiled for, to a stack: each matrix by itself, and a transposed matrix to
            the transposed result.
        finish: From the leaves that this made, and the state, to what `update` returns.
        bucketing: How it goes through stacks by itself.
    """

    on_stacks: Callable[..., Any]
    finish: Callable[[Any, Any], tuple[Any, Any]]
    bucketing: str

    def __new__(
        cls,
        tx: optax.GradientTransformationExtraArgs,
        on_stacks: Callable[..., Any],
        finish: Callable[[Any, Any], tuple[Any, Any]],
        bucketing: str,
    ) -> "OfStacks":
        """`tx`, with what it is made of."""
        made = super().__new__(cls, tx.init, tx.update)
        made.on_stacks, made.finish, made.bucketing = on_stacks, finish, bucketing
        return made


def chained(
    first: TransformLike, *rest: TransformLike
) -> optax.GradientTransformationExtraArgs:
    """`optax.chain`, in which the second works on the stacks that the first makes.

    Where both can, and go through them in one way. On a mesh they would otherwise cross
    between devices once more.
    """
    chain = optax.chain(first, *rest)
    second = rest[0] if rest else None
    if not (isinstance(first, MakesStacks) and isinstance(second, OfStacks)):
        return chain
    if first.bucketing != second.bucketing:
        return chain
    others = [accepting_extra_args(tx) for tx in rest[1:]]

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        of_first, of_second, *before = state
        updates, of_first = first.update(
            updates, of_first, params, then=second.on_stacks, **extra_args
        )
        updates, of_second = second.finish(updates, of_second)
        after = []
        for tx, of_tx in zip(others, before, strict=True):
            updates, of_tx = tx.update(updates, of_tx, params, **extra_args)
            after.append(of_tx)
        return updates, (of_first, of_second, *after)

    return transformation(chain.init, update_fn)


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
