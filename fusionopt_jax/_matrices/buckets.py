"""Calls of a function of stacks over many leaves.

`map_stacks` and `map_stateful` join the matrices of equal shape into buckets and call a
function once per bucket; `map_leaves` calls it for each leaf as it lies.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fusionopt_jax._matrices.loop import each
from fusionopt_jax._matrices.placement import (
    alike,
    automatic,
    device_count,
    everywhere,
    spread,
)
from fusionopt_jax._matrices.platform import Platform, by_platform
from fusionopt_jax._matrices.view import MatrixView, StackShape

Stack: TypeAlias = Float[Array, "b m n"]
StackFunction: TypeAlias = Callable[..., Stack]
Bucketing: TypeAlias = Literal["auto", "loop", "batch", "leaf"]

BUCKETINGS: tuple[Bucketing, ...] = ("auto", "loop", "batch", "leaf")


def resolve_bucketing(
    bucketing: Bucketing, platform: Platform, *, devices: int = 1
) -> Bucketing:
    """`"auto"` made definite: loop over matrices on one CPU, batch them elsewhere.

    A CPU's matrix product of one matrix already fills the machine, and the loop keeps
    temporary memory at one matrix; an accelerator needs the batch to be busy, and
    several devices can't share a loop.
    """
    if bucketing != "auto":
        return bucketing
    return "loop" if platform == "cpu" and devices == 1 else "batch"


def map_stacks(
    function: StackFunction,
    leaves: Sequence[Array],
    views: Sequence[MatrixView],
    *,
    bucketing: Bucketing = "auto",
) -> list[Array]:
    """`function` of every leaf's matrices.

    Args:
        function: `function(stack, *, platforms) -> stack`, of stacks `(b, m, n)`; see
            `map_stateful` for the platforms. It must treat the matrices of a stack
            independently, and a transposed one as the matrix itself.
        leaves: Arrays.
        views: How each of them is stacks.
        bucketing: See `map_stateful`.

    Returns:
        The results, shaped like the leaves.
    """

    def stateless(
        stacks: tuple[Stack, ...], state: Any, ids: Array, **platforms: Any
    ) -> Any:
        del ids
        return function(*stacks, **platforms), state

    results, _ = map_stateful(
        stateless,
        [leaves],
        views,
        states=[((),) * len(view.stacks) for view in views],
        bucketing=bucketing,
    )
    return results


def map_stateful(
    function: Callable[..., tuple[Stack, Any]],
    operands: Sequence[Sequence[Array]],
    views: Sequence[MatrixView],
    *,
    states: Sequence[tuple[Any, ...]],
    scalars: Sequence[Array] = (),
    keys: Sequence[int] | None = None,
    turn_state: Callable[[Any], Any] = lambda state: state,
    bucketing: Bucketing = "auto",
) -> tuple[list[Array], list[tuple[Any, ...]]]:
    """`function` of every leaf's matrices and of what is remembered of each.

    Args:
        function: `function(stacks, state, ids, *scalars, platforms) -> (stack, state)`.
            It gets one stack `(b, m, n)` of each operand, a tree of arrays `(b, ...)`,
            int32 `(b,)`, and the platforms that this call may be compiled for, see
            `by_platform`; it returns what takes the place of the first stack and of the
            state. It must treat the matrices of a stack independently, and a
            transposed one, with its state turned, as the matrix itself.
        operands: Lists of leaves, all of the views' shapes. The results take the place
            of the first list's, in its dtypes.
        views: How each leaf is stacks.
        states: For each leaf, one tree of arrays `(count, ...)` for each of its stacks.
        scalars: Arrays handed to every call.
        keys: A number for each leaf. The `ids` of its matrices count on from there, so
            that they depend on the leaf and the index alone; `None` counts from 0.
        turn_state: What the state of a transposed stack is; its own inverse.
        bucketing: `"batch"` makes one batched call of the stacks of equal matrix shape,
            joined, and of each leaf of layers by itself; `"loop"` goes through them one
            matrix at a time in a compiled loop, through a leaf that is a stack as it
            lies and through single matrices joined; `"leaf"` makes one batched call for
            each stack of a leaf; `"auto"` chooses one of the first two by the platform.

    Returns:
        The results, shaped like the leaves, and the new states.
    """

    def mapped(
        operands: Any, states: Any, *scalars: Array
    ) -> tuple[list[Array], list[tuple[Any, ...]]]:
        def bucketed(
            alike: tuple[Platform, ...], operands: Any, states: Any, *scalars: Array
        ) -> Any:
            told = functools.partial(function, platforms=alike)
            calls = _Calls(told, scalars, turn_state, kind(alike[0]))
            return _mapped(calls, operands, views, states, keys or [0] * len(views))

        devices = device_count(*operands[0])
        kind = functools.partial(resolve_bucketing, bucketing, devices=devices)
        results, states = by_platform(bucketed, kind, operands, states, *scalars)
        # Or what comes between two exchanges would be collected by every device.
        return list(map(alike, results, operands[0])), states

    operands = [list(leaves) for leaves in operands]
    states = list(states)
    return automatic(mapped, operands, states, *scalars, like=(operands[0], states))


def map_leaves(
    function: Callable[..., tuple[Any, ...]],
    views: Sequence[MatrixView],
    *,
    written: Sequence[Any] = (),
    states: Sequence[Any] = (),
    read: Sequence[Any] = (),
    scalars: Sequence[Array] = (),
) -> list[Any]:
    """`function` of the stacks of every leaf, leaf by leaf.

    Args:
        function: `function(*written, *states, *read, *scalars)`, which returns what
            takes the place of `written` and `states`; it gets a stack of each of
            `written` and `read`, and an array of each of `states`.
        views: How each leaf is stacks.
        written: Trees of leaves.
        states: Trees that hold, for each leaf, an array `(count, ...)` for each of its
            stacks, as `stack_states` makes them. On a mesh every device holds all.
        read: Trees of leaves.
        scalars: Arrays handed to every call.

    Returns:
        The trees that take the place of `written` and of `states`.
    """
    trees = (*written, *states, *read)
    first, last = len(written), len(written) + len(states)
    treedef = jax.tree.structure((*written, *read)[0])

    def mapped(view: MatrixView, arrays: Sequence[Any], *scalars: Array) -> Any:
        """The results for one leaf."""
        parts = [
            view.from_state(array) if first <= i < last else view.to_stacks(array)
            for i, array in enumerate(arrays)
        ]
        done = [function(*stack, *scalars) for stack in zip(*parts, strict=True)]
        return tuple(
            view.from_stacks(parts)
            if i < first
            else everywhere(view.to_state(parts), *jax.tree.leaves(arrays))
            for i, parts in enumerate(zip(*done, strict=True))
        )

    leaves = zip(*(treedef.flatten_up_to(tree) for tree in trees), strict=True)
    results = [
        automatic(functools.partial(mapped, view), leaf, *scalars, like=leaf[:last])
        for view, leaf in zip(views, leaves, strict=True)
    ]
    return [
        jax.tree.unflatten(treedef, [result[i] for result in results])
        for i in range(last)
    ]


def stack_states(
    tree: Any, views: Sequence[MatrixView], make: Callable[[StackShape], Any]
) -> Any:
    """A tree like `tree` with what `make` returns for the stack of each leaf.

    A leaf of several stacks has a tuple in its place.
    """
    states = [view.to_state([make(stack) for stack in view.stacks]) for view in views]
    return jax.tree.unflatten(jax.tree.structure(tree), states)


class _Calls(NamedTuple):
    """How a function of stacks is called; the arguments of `map_stateful`."""

    function: Callable[..., tuple[Stack, Any]]
    scalars: tuple[Array, ...]
    turn_state: Callable[[Any], Any]
    bucketing: Bucketing


class _Part(NamedTuple):
    """One stack of one leaf, and all that goes with it."""

    stacks: tuple[Stack, ...]
    state: Any
    ids: Array

    def turned(self, calls: _Calls) -> "_Part":
        """The part of the transposed matrices; its own inverse."""
        turned = tuple(stack.mT for stack in self.stacks)
        return _Part(turned, calls.turn_state(self.state), self.ids)


def _mapped(
    calls: _Calls,
    operands: Sequence[Sequence[Array]],
    views: Sequence[MatrixView],
    states: Sequence[tuple[Any, ...]],
    keys: Sequence[int],
) -> tuple[list[Array], list[tuple[Any, ...]]]:
    """`map_stateful` without an explicit mesh."""
    results: list[Any] = [None] * len(views)
    new_states: list[Any] = list(states)
    parts: dict[tuple[int, int], _Part] = {}
    devices = device_count(*operands[0])
    for i, view in enumerate(views):
        leaves = tuple(column[i] for column in operands)
        ids = _ids(view, keys[i])
        if calls.bucketing == "loop" and view.count > 1 and devices == 1:
            # A loop gains nothing from joining stacks, and the copy would cost memory.
            results[i], new_states[i] = _loop(calls, leaves, view, states[i], ids)
            continue
        stacks = zip(*(view.to_stacks(leaf) for leaf in leaves), strict=True)
        for k, stack in enumerate(stacks):
            parts[i, k] = _Part(stack, states[i][k], ids[k])
    done: dict[tuple[int, int], tuple[Stack, Any]] = {}
    layers = [view.batch_axes != () for view in views]
    for members in _buckets(parts, calls, devices, layers):
        # Only stacks that are joined have to lie the same way.
        tall = {at: _tall(parts[at]) for at in members}
        turns = {at: tall[at] and not all(tall.values()) for at in members}
        joined = _joined(
            [parts[at].turned(calls) if turns[at] else parts[at] for at in members]
        )
        stack, state = _called(calls, joined, operands[0], len(members) > 1)
        start = 0
        for at, turn in turns.items():
            mine = slice(start, start + parts[at].ids.shape[0])
            start = mine.stop
            part = _Part((stack[mine],), _cut(state, mine), parts[at].ids)
            part = part.turned(calls) if turn else part
            done[at] = part.stacks[0], part.state
    for i in sorted({i for i, _ in parts}):
        mine = [done[i, k] for k in range(len(views[i].stacks))]
        results[i] = views[i].from_stacks([stack for stack, _ in mine])
        new_states[i] = tuple(state for _, state in mine)
    return results, new_states


def _buckets(
    parts: dict[tuple[int, int], _Part],
    calls: _Calls,
    devices: int,
    layers: Sequence[bool],
) -> list[list[tuple[int, int]]]:
    """The stacks that one call serves; `layers` is of the leaves that have an axis."""
    # A stack that gives every device a matrix needs no other, nor does one of layers on
    # a single device: a copy would be an exchange, or a pass over memory each way.
    buckets: dict[Hashable, list[tuple[int, int]]] = {}
    for at, part in parts.items():
        enough = part.ids.shape[0] >= devices if devices > 1 else layers[at[0]]
        alone = calls.bucketing == "leaf" or enough
        buckets.setdefault(at if alone else _kind(part, calls), []).append(at)
    if devices == 1:
        return list(buckets.values())
    # Nothing hides the first bucket's exchange on its way in, nor the last one's on its
    # way back; each of the others has the iteration of another to hide behind. So the
    # two that have the least to exchange are the first and the last.
    first, *others = sorted(buckets.values(), key=lambda members: _size(parts, members))
    return [first, *others[1:], *others[:1]]


def _size(
    parts: dict[tuple[int, int], _Part], members: Sequence[tuple[int, int]]
) -> int:
    """Numbers in the stacks of a bucket."""
    return sum(parts[at].stacks[0].size for at in members)


def _kind(part: _Part, calls: _Calls) -> Hashable:
    """What stacks that can be joined have in common, once turned."""
    if _tall(part):
        part = jax.eval_shape(lambda part: part.turned(calls), part)
    arrays, structure = jax.tree.flatten((part.stacks, part.state))
    return structure, tuple((array.shape[1:], array.dtype) for array in arrays)


def _tall(part: _Part) -> bool:
    """Whether its matrices have more inputs than outputs."""
    _, rows, columns = part.stacks[0].shape
    return rows > columns


def _joined(parts: Sequence[_Part]) -> _Part:
    """Stacks as one longer stack."""
    if len(parts) == 1:
        return parts[0]
    return jax.tree.map(lambda *stacks: jnp.concatenate(stacks), *parts)


def _cut(state: Any, part: slice) -> Any:
    return jax.tree.map(lambda stack: stack[part], state)


def _called(
    calls: _Calls, part: _Part, leaves: Sequence[Array], joined: bool
) -> tuple[Stack, Any]:
    """The function of a bucket: at once, on several devices, or in a loop."""
    function = calls.function
    if calls.bucketing == "loop":
        function = functools.partial(_each_matrix, function)
    return spread(function, *leaves, joined=joined)(*part, *calls.scalars)


def _loop(
    calls: _Calls,
    leaves: tuple[Array, ...],
    view: MatrixView,
    states: tuple[Any, ...],
    ids: tuple[Array, ...],
) -> tuple[Array, tuple[Any, ...]]:
    """The function of one leaf's matrices, split one layer at a time."""
    written, *read = leaves
    if view.batch_axes == (0,) and view.shape[0] > 1:
        # Splitting the whole leaf would copy it.
        layer = view.one_layer()
        return each(
            view.shape[0],
            lambda written, read: _loop(
                calls, (written[0], *read[0]), layer, written[1], read[1]
            ),
            (written, states),
            (tuple(read), ids),
        )
    stacks = zip(*(view.to_stacks(leaf) for leaf in leaves), strict=True)
    done = [
        _each_matrix(calls.function, *part, *calls.scalars)
        for part in zip(stacks, states, ids, strict=True)
    ]
    return view.from_stacks([stack for stack, _ in done]), tuple(
        state for _, state in done
    )


def _each_matrix(
    function: Callable[..., tuple[Stack, Any]],
    stacks: tuple[Stack, ...],
    state: Any,
    ids: Array,
    *scalars: Array,
) -> tuple[Stack, Any]:
    """The function of each matrix of a stack, in turn."""
    first, *read = stacks
    return each(
        first.shape[0],
        lambda written, read: function(
            (written[0], *read[0]), written[1], read[1], *scalars
        ),
        (first, state),
        (tuple(read), ids),
    )


def _ids(view: MatrixView, key: int) -> tuple[Array, ...]:
    """The numbers of the matrices of each stack, counted on from a leaf's key."""
    ids, start = [], key
    for stack in view.stacks:
        numbers = np.arange(start, start + stack.count) % 2**31
        ids.append(jnp.asarray(numbers, jnp.int32))
        start += stack.count
    return tuple(ids)
