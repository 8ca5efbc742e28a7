"""Continue a run under another set of components."""

from collections import OrderedDict, defaultdict
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fusionopt_jax._checks import shape_text
from fusionopt_jax._optax import TransformLike, accepting_extra_args
from fusionopt_jax._paths import named_leaves, path_keys, path_name
from fusionopt_jax._states import (
    Component,
    Entry,
    named_tuple_classes,
    state_entries,
)
from fusionopt_jax._types import Array, Leaf, Params
from fusionopt_jax.iterates import (
    ScheduleFreeState,
    average_of,
    check_current,
)
from fusionopt_jax.recipes.accumulate import AccumulateState
from fusionopt_jax.recipes.blocks import in_blocks, written_out
from fusionopt_jax.transforms.gain import GainState
from fusionopt_jax.transforms.quantize_state import QuantizedState

# Measurements belong to the step that made them.
_NEVER_CARRIED = (GainState.__name__,)

# `optax.inject_hyperparams` keeps the settings of an optimiser in its state; those of
# the new one are wanted.
_SETTINGS = "hyperparams"

_SCHEDULE_FREE = ScheduleFreeState.__name__

# Whose count only says which chances are drawn next.
_NEVER_AMBIGUOUS = (*_NEVER_CARRIED, QuantizedState.__name__)

# What these keep of a parameter does not depend on how it is routed.
_OF_THE_PARAMETERS = (_SCHEDULE_FREE, AccumulateState.__name__)


class WarmStartReport(NamedTuple):
    """What `warm_start` does with each component.

    Components are named `group/StateClass`, fields of one `group/StateClass.field`.

    Attributes:
        carried: In both states: taken over from the old one.
        started: Only in the new one: starts as `tx.init` makes it.
        dropped: Only in the old one: left behind.
        moved: Leaves of the parameters that are routed in another way than before, and
            start anew in what `carried` names; only `checkpoints.restore` allows them.
    """

    carried: tuple[str, ...]
    started: tuple[str, ...]
    dropped: tuple[str, ...]
    moved: tuple[str, ...] = ()


def warm_start(tx: TransformLike, params: Params, old_state: Any) -> Any:
    """A state of an optimiser that goes on from the state of another one.

    Everything that both have is carried: Schedule-Free's iterates, weights and counts,
    momentum, Adam's moments, the Polyak averages, second moments and moving averages.
    What the two keep in different dtypes is converted, blocks of 8 bits included.
    What only `tx` has starts as `tx.init` makes it. So a run of SF-NorMuon can go on
    with MONA and Shampoo added, or the other way round.

    Components are matched by the class of their state and their group, however deep
    they lie in chains and wrappers. Settings are no part of a state (those that
    `optax.inject_hyperparams` keeps there are `tx`'s): what the averages mean must be
    the same in both, such as the norm of `polyak`.

    Args:
        tx: The optimiser to go on with.
        params: The training parameters that belong to `old_state`.
        old_state: The state of the optimiser so far.

    Returns:
        A state of `tx`, in its dtypes. It shares arrays with `old_state`: don't use
        that one any more if you donate this one.

    Raises:
        ValueError: If leaves are in other groups than before (it lists them), if shapes
            differ, if a class occurs several times in a group and not as often in the
            other state, or if there is nothing to carry.

    Example:
        >>> import jax.numpy as jnp, optax, fusionopt_jax as fo
        >>> params = {"w": jnp.ones((2, 2))}
        >>> old = optax.chain(optax.trace(0.9))
        >>> _, old_state = old.update(params, old.init(params), params)
        >>> tx = optax.chain(fo.mona(), optax.trace(0.9), fo.ns5())
        >>> state = fo.warm_start(tx, params, old_state)
        >>> state[1].trace["w"][0]
        Array([1., 1.], dtype=float32)
    """
    new_state = accepting_extra_args(tx).init(params)
    return carry(new_state, params, _entries(old_state, params))[0]


def warm_start_report(
    tx: TransformLike, params: Params, old_state: Any
) -> WarmStartReport:
    """What `warm_start` would carry, start anew and drop, without doing it.

    Args:
        tx: The optimiser to go on with.
        params: The training parameters that belong to `old_state`.
        old_state: The state of the optimiser so far.

    Returns:
        The names of the components.

    Raises:
        ValueError: As `warm_start`.

    Example:
        >>> import jax.numpy as jnp, optax, fusionopt_jax as fo
        >>> params = {"w": jnp.ones((2, 2))}
        >>> old_state = optax.trace(0.9).init(params)
        >>> report = fo.warm_start_report(
        ...     optax.chain(fo.mona(), optax.trace(0.9)), params, old_state
        ... )
        >>> report.carried, report.started
        (('TraceState',), ('MONAState',))
    """
    new_state = accepting_extra_args(tx).init(params)
    return carry(new_state, params, _entries(old_state, params))[1]


def _entries(state: Any, params: Params) -> list[Entry]:
    """What a state holds."""
    return state_entries(state, named_tuple_classes(params))


def carry(
    new_state: Any, params: Params, old: list[Entry], moved: Collection[str] = ()
) -> tuple[Any, WarmStartReport]:
    """A new state with what an old one has, and the report.

    Args:
        new_state: What the new optimiser starts from.
        params: The training parameters that belong to the old state.
        old: What the old state holds; of paths only the names count.
        moved: Names of parameters that start anew where they are routed.
    """
    places = _entries(new_state, params)
    new = written_out(places)
    old = _with_averages(written_out(old), new, params)
    _check_groups(new, old, params, moved)
    _check_unambiguous(new, old)
    known = {(entry.component, path_keys(entry.path)): entry.leaf for entry in old}
    components = _fields(old)
    leaves, carried, started = [], [], []
    for entry in new:
        component, field = entry.component, _field(entry)
        if component.kind in _NEVER_CARRIED or field == _SETTINGS:
            leaves.append(entry.leaf)
        elif component not in components:
            leaves.append(entry.leaf)
            started.append(component.title)
        elif field not in components[component]:
            leaves.append(entry.leaf)
            started.append(f"{component.title}.{field}")
        elif component.kind not in _OF_THE_PARAMETERS and _is_of(entry, moved):
            leaves.append(entry.leaf)
        else:
            leaves.append(
                _checked(entry, known.get((component, path_keys(entry.path))))
            )
            carried.append(component.title)
    if not carried:
        held = ", ".join(component.title for component in components) or "nothing"
        raise ValueError(
            f"`warm_start` found nothing to carry: the old state (with {held}) and the "
            "new optimiser share no component in the same group. Pass the whole state "
            "of the optimiser so far, or start with `tx.init(params)`."
        )
    new_components = _fields(new)
    dropped = [
        component.title
        for component in components
        if component not in new_components and component.kind not in _NEVER_CARRIED
    ]
    structure = jax.tree.structure(new_state)
    state = jax.tree.unflatten(structure, in_blocks(places, leaves))
    return state, WarmStartReport(
        _unique(carried), _unique(started), _unique(dropped), tuple(sorted(moved))
    )


def _checked(entry: Entry, old: Leaf | None) -> Array:
    """An old leaf in the new leaf's dtype, if it is there and of the same shape."""
    name = f"{entry.component.title}.{path_name(entry.path)}"
    if old is None:
        raise ValueError(
            f"`warm_start`: the old state has no {name}, but other leaves of that "
            "field. Pass the parameters that the old state belongs to, and route them "
            "as they were routed."
        )
    if old.shape != entry.leaf.shape:
        raise ValueError(
            f"`warm_start`: {name} is {shape_text(old)} in the old state and "
            f"{shape_text(entry.leaf)} in the new one. Its axes or chunks are routed "
            "differently, or a setting changed its size; keep both as they were."
        )
    return jnp.asarray(old, entry.leaf.dtype)


def _is_of(entry: Entry, names: Collection[str]) -> bool:
    """Whether a leaf of a state belongs to one of these parameters."""
    keys = path_keys(entry.path[1:])
    return any("/".join(keys[:end]) in names for end in range(1, len(keys) + 1))


def _check_groups(
    new: list[Entry], old: list[Entry], params: Params, moved: Collection[str]
) -> None:
    """Require that every leaf is in the group that it was in, but for these."""
    names = {name for name, _ in named_leaves(params)}.difference(moved)

    def groups(found: list[Entry]) -> dict[str, set[str]]:
        """The groups in which each parameter has state."""
        members: dict[str, set[str]] = defaultdict(set)
        for entry in found:
            name = path_name(entry.path[1:])
            if entry.component.group and name in names:
                members[name].add("/".join(entry.component.group))
        return members

    before, now = groups(old), groups(new)
    others = [
        f"  {name}: was in {_listed(before[name])}, now in {_listed(now[name])}"
        for name in sorted(names)
        if name in before and name in now and before[name] != now[name]
    ]
    if others:
        raise ValueError(
            "`warm_start`: the routing differs. These leaves moved:\n"
            + "\n".join(others)
            + "\nBuild the new optimiser with the old routing, or start with "
            "`tx.init(params)`."
        )


def _check_unambiguous(new: list[Entry], old: list[Entry]) -> None:
    """Require that components of one kind in one group are equally many in both."""

    def counts(found: list[Entry]) -> dict[tuple[tuple[str, ...], str], int]:
        numbers: dict[tuple[tuple[str, ...], str], int] = {}
        for component, _, _ in found:
            key = component.group, component.kind
            numbers[key] = max(numbers.get(key, 0), component.number + 1)
        return numbers

    before, now = counts(old), counts(new)
    for key in before.keys() & now.keys():
        group, kind = key
        if before[key] != now[key] and kind not in _NEVER_AMBIGUOUS:
            raise ValueError(
                f"`warm_start`: {Component(group, kind, 0).title} occurs "
                f"{before[key]} times in the old state and {now[key]} times in the new "
                "one, so nothing says which goes on as which. Keep their number."
            )


def _with_averages(old: list[Entry], new: list[Entry], params: Params) -> list[Entry]:
    """What is old, with Schedule-Free's averages written out where the new has them."""
    averages = [
        component
        for component, fields in _fields(new).items()
        if component.kind == _SCHEDULE_FREE and "x" in fields
    ]
    old_ones = {
        component: fields
        for component, fields in _fields(old).items()
        if component.kind == _SCHEDULE_FREE
    }
    if not averages:
        kept = any(entry.component.kind == _SCHEDULE_FREE for entry in new)
        if kept and any(
            _unrecoverable(old, c) for c, f in old_ones.items() if "x" in f
        ):
            raise ValueError(
                "`warm_start`: the old `schedule_free` ran with `b1`=0, so its average "
                "can't be recovered from the parameters, and the new one does not keep "
                "it. Build the new one with `keep_average=True`."
            )
        return old
    written = list(old)
    for component, fields in old_ones.items():
        if "x" not in fields:
            written += _average(old, component, params)
    return written


def _average(old: list[Entry], component: Component, params: Params) -> list[Entry]:
    """The average of a Schedule-Free state that does not keep it."""
    own = [entry for entry in old if entry.component == component]
    scalars = {_field(entry): entry.leaf for entry in own if len(entry.path) == 1}
    paths = [entry.path[1:] for entry in own if _field(entry) == "z"]
    # Ordered as the leaves are, since the sample of y is.
    z = OrderedDict(
        (path_name(entry.path[1:]), entry.leaf) for entry in own if _field(entry) == "z"
    )
    leaves = dict(named_leaves(params))
    y = OrderedDict((name, leaves[name]) for name in z)
    names = ("count", "b1", "weight_sum", "max_learning_rate", "y_sample")
    state = ScheduleFreeState(
        **{name: scalars[name] for name in names}, z=z, x=None, inner_state=None
    )
    check_current(state, y, "warm_start")
    return [
        Entry(component, (jax.tree_util.GetAttrKey("x"), *path), leaf)
        for path, leaf in zip(paths, average_of(state, y).values(), strict=True)
    ]


def _unrecoverable(old: list[Entry], component: Component) -> bool:
    """Whether only the state itself holds its average."""
    return any(
        entry.component == component
        and _field(entry) == "b1"
        and float(np.asarray(entry.leaf)) == 0.0
        for entry in old
    )


def _fields(found: list[Entry]) -> dict[Component, set[str]]:
    """Every component, and which of its fields have leaves."""
    components: dict[Component, set[str]] = {}
    for entry in found:
        components.setdefault(entry.component, set()).add(_field(entry))
    return components


def _field(entry: Entry) -> str:
    """The field of a component that holds a leaf."""
    return path_name(entry.path[:1])


def _listed(groups: set[str]) -> str:
    return ", ".join(repr(group) for group in sorted(groups))


def _unique(names: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
