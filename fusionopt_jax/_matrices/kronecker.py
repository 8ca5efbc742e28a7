"""What the Kronecker-factored methods share: sides, renewals, their trees of state.

A stack of matrices has an input side (its rows) and an output side (its columns), each
with statistics of its own: a NamedTuple of stacks, or `None` for a side without any,
which stands for the identity. Both together are a pair.
"""

import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fusionopt_jax._matrices.buckets import Bucketing, StackFunction, map_stateful
from fusionopt_jax._matrices.norm import frobenius_norm
from fusionopt_jax._matrices.placement import stored
from fusionopt_jax._matrices.view import MatrixView, StackShape
from fusionopt_jax._paths import named_leaves

Sides: TypeAlias = Literal["auto", "both", "small"]
Pair: TypeAlias = tuple[Any, Any]

SIDES: tuple[Sides, ...] = ("auto", "both", "small")

# Two factors cost 6(m² + n²) bytes: 12 a parameter for a square matrix, and more the
# longer it is, while the small factor alone costs less the longer it is.
_BOTH_SIDES_BELOW = 1.5


def first_pair(
    stack: StackShape, sides: Sides, start: Callable[[int, int], Any]
) -> Pair:
    """The pair of a stack before any gradient; `start` of a count and a length."""
    m, n = stack.inputs, stack.outputs
    both = sides == "both" or (
        sides == "auto" and max(m, n) < _BOTH_SIDES_BELOW * min(m, n)
    )
    return (
        start(stack.count, m) if both or m <= n else None,
        start(stack.count, n) if both or n < m else None,
    )


def side_count(pair: Pair) -> int:
    """How many sides have statistics."""
    return sum(side is not None for side in pair)


def running_mean_rate(b2: Any, count: Int[Array, ""]) -> Float[Array, ""]:
    """The decay rate of a step: at first that of a mean of all gradients."""
    earlier = count.astype(jnp.float32)
    return jnp.minimum(b2, earlier / (earlier + 1))


def restored(U: Float[Array, "b m n"], M: Float[Array, "b m n"]) -> Array:
    """U with the norms of M's matrices."""
    norm = frobenius_norm(U)
    return U * (frobenius_norm(M) / jnp.where(norm > 0, norm, 1))


def matrix_keys(tree: Any) -> list[int]:
    """A number for each leaf that depends on the leaf's name alone."""
    return [zlib.crc32(name.encode()) for name, _ in named_leaves(tree)]


def is_due(
    ids: Int[Array, " b"],
    count: Int[Array, ""],
    every: int | Int[Array, ""],
    *,
    stagger: bool,
) -> Bool[Array, " b"]:
    """Whether each matrix is renewed at this step.

    Staggered, its number alone decides: matrices share out the work over the steps, and
    none depends on what else there is.
    """
    every = jnp.asarray(every, jnp.int32)
    phase = ids % every if stagger else jnp.zeros_like(ids)
    return (phase + count % every) % every == 0


def renewed(
    renew: Callable[..., Any],
    due: Bool[Array, " b"],
    every: int | Int[Array, ""],
    old: Any,
    *read: Any,
) -> Any:
    """`renew(old, *read)` of the matrices that are due, and the rest of `old`.

    Args:
        renew: Takes stacks of any length and returns what becomes of `old`.
        due: Which matrices are.
        every: After how many steps a matrix is due again. A Python 1 takes all of them
            at once, without a condition.
        old: A tree of stacks.
        *read: What else it needs.
    """
    length = due.shape[0]
    if isinstance(every, int) and every == 1:
        new = renew(old, *read)
        chosen = lambda stack: due.reshape(length, *[1] * (stack.ndim - 1))  # noqa: E731
        return jax.tree.map(lambda n, o: jnp.where(chosen(o), n, o), new, old)
    if length == 1:
        return jax.lax.cond(due[0], renew, lambda old, *_: old, old, *read)
    # Those that are due first, taken a fair share at a time.
    size = -(-length // every) if isinstance(every, int) else 1
    number = jnp.sum(due)
    order = jnp.argsort(~due, stable=True)
    order = jnp.pad(order, (0, -length % size), constant_values=length)

    def some(i: Array, now: Any) -> Any:
        chosen = jax.lax.dynamic_slice_in_dim(order, i * size, size)
        at = lambda stack: stack.at[chosen].get(mode="clip")  # noqa: E731
        new = renew(*jax.tree.map(at, (now, *read)))
        chosen = jnp.where(i * size + jnp.arange(size) < number, chosen, length)
        return jax.tree.map(
            lambda stack, part: stack.at[chosen].set(part, mode="drop"), now, new
        )

    return jax.lax.fori_loop(0, (number + size - 1) // size, some, old)


def first_trees(
    params: Any,
    views: Sequence[MatrixView],
    sides: Sides,
    start: Callable[[int, int], Any],
    kind: Any,
    hole: Any,
) -> list[Any]:
    """The state of every leaf before any gradient; see `state_trees` and `first_pair`.

    Args:
        params: The parameters.
        views: How each leaf is one or more stacks.
        sides: Which sides have statistics.
        start: From the number of matrices and the length of a side to its statistics.
        kind: The NamedTuple that a side is.
        hole: What stands in the trees for a side without statistics; it has no leaves.
    """
    pairs = [
        tuple(first_pair(stack, sides, start) for stack in view.stacks)
        for view in views
    ]
    return state_trees(
        params, views, stored(pairs, *jax.tree.leaves(params)), kind, hole
    )


def map_pairs(
    function: Callable[..., tuple[Array, Pair]],
    directions: Any,
    gradients: Any,
    views: Sequence[MatrixView],
    trees: Sequence[Any],
    kind: Any,
    hole: Any,
    *,
    scalars: Sequence[Array],
    bucketing: Bucketing,
    then: StackFunction | None = None,
) -> tuple[Any, list[Any]]:
    """`function` of every leaf's stacks and pairs, and the trees of its pairs after it.

    Args:
        function: From `(M, G)`, a pair, the matrices' numbers, the scalars and
            `platforms=`, see `map_stateful`, to what becomes of M, in M's dtype, and
            the pair after it.
        directions: A tree of what is preconditioned.
        gradients: A tree of what is learnt from.
        views: How each leaf is one or more stacks.
        trees: The state, as `state_trees` and this function return it.
        kind: The NamedTuple that a side is.
        hole: As for `first_trees`.
        scalars: Arrays that every call is handed.
        bucketing: See `map_stateful`.
        then: What becomes of each result while it is still a stack.
    """

    def whole(*given: Any, platforms: Any) -> tuple[Array, Pair]:
        U, pair = function(*given, platforms=platforms)
        return U if then is None else then(U, platforms=platforms), pair

    leaves, treedef = jax.tree.flatten(gradients)
    results, pairs = map_stateful(
        whole,
        [treedef.flatten_up_to(directions), leaves],
        views,
        states=state_pairs(gradients, views, trees, kind),
        scalars=scalars,
        keys=matrix_keys(gradients),
        turn_state=lambda pair: (pair[1], pair[0]),
        bucketing=bucketing,
    )
    return (
        jax.tree.unflatten(treedef, results),
        state_trees(gradients, views, pairs, kind, hole),
    )


def state_trees(
    tree: Any,
    views: Sequence[MatrixView],
    pairs: Sequence[tuple[Pair, ...]],
    kind: Any,
    hole: Any,
) -> list[Any]:
    """The pairs of every leaf as trees: all fields of the inputs, then of the outputs.

    Args:
        tree: The parameters, or a tree like them.
        views: How each leaf is one or more stacks.
        pairs: For each leaf one pair for each of its stacks.
        kind: The NamedTuple that a side is.
        hole: What stands in the trees for a side without statistics; it has no leaves.
    """
    treedef = jax.tree.structure(tree)

    def field(side: int, name: str) -> Any:
        leaves = [
            view.to_state(
                [hole if p[side] is None else getattr(p[side], name) for p in own]
            )
            for view, own in zip(views, pairs, strict=True)
        ]
        return jax.tree.unflatten(treedef, leaves)

    return [field(side, name) for side in (0, 1) for name in kind._fields]


def state_pairs(
    tree: Any, views: Sequence[MatrixView], trees: Sequence[Any], kind: Any
) -> list[tuple[Pair, ...]]:
    """The inverse of `state_trees`."""
    treedef = jax.tree.structure(tree)
    columns = [
        [
            view.from_state(leaf)
            for view, leaf in zip(views, treedef.flatten_up_to(tree), strict=True)
        ]
        for tree in trees
    ]
    size = len(kind._fields)

    def side(fields: Sequence[Any]) -> Any:
        return kind(*fields) if jax.tree.leaves(fields[0]) else None

    return [
        tuple(
            (side(fields[:size]), side(fields[size:]))
            for fields in zip(*of_leaf, strict=True)
        )
        for of_leaf in zip(*columns, strict=True)
    ]
