"""A walk over optimiser states: every leaf, and the component that it belongs to.

A component is a NamedTuple state, such as `optax.TraceState`, that holds leaves itself.
It is found again in another state by its group (the labels of the `multi_transform`s
around it), the name of its class, and its number among the equal ones of its group,
however deep in chains and wrappers it lies.
"""

import collections
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import optax

from fusionopt_jax._types import KeyPath


class Component(NamedTuple):
    """Where a component is.

    Attributes:
        group: Labels of the `multi_transform`s around it, outermost first.
        kind: Name of its class; empty for leaves that no NamedTuple holds.
        number: Its place among the components of that kind in the group, from 0.
    """

    group: tuple[str, ...]
    kind: str
    number: int

    @property
    def title(self) -> str:
        """The component as errors and reports name it, such as `spectral/NS5State`."""
        number = f" #{self.number + 1}" if self.number else ""
        return "/".join((*self.group, self.kind or "state")) + number


class Entry(NamedTuple):
    """One leaf of a state.

    Attributes:
        component: What holds it.
        path: Its key path inside the component; the first key is the field.
        leaf: The leaf.
    """

    component: Component
    path: KeyPath
    leaf: Any


def state_entries(state: Any, not_components: Collection[type] = ()) -> list[Entry]:
    """Every leaf of an optimiser state, in the order of `jax.tree.leaves`.

    Args:
        state: The state.
        not_components: NamedTuple classes that are containers of parameters.
    """
    owners: list[tuple[tuple[str, ...], str]] = [((), "")]
    found: list[tuple[int, KeyPath, Any]] = []

    def visit(node: Any, group: tuple[str, ...], owner: int, path: KeyPath) -> None:
        children = children_of(node)
        if children is None:
            found.append((owner, path, node))
        elif isinstance(node, optax.MultiTransformState):
            for (label,), child in children_of(node.inner_states) or []:
                visit(child, (*group, str(label.key)), owner, ())
        else:
            if is_named_tuple(node) and type(node) not in not_components:
                owners.append((group, type(node).__name__))
                owner, path = len(owners) - 1, ()
            for key, child in children:
                visit(child, group, owner, (*path, *key))

    visit(state, (), 0, ())
    seen: collections.Counter[tuple[tuple[str, ...], str]] = collections.Counter()
    components: dict[int, Component] = {}
    for owner in sorted({owner for owner, _, _ in found}):
        components[owner] = Component(*owners[owner], seen[owners[owner]])
        seen[owners[owner]] += 1
    return [Entry(components[owner], path, leaf) for owner, path, leaf in found]


def children_of(node: Any) -> list[tuple[KeyPath, Any]] | None:
    """The keys and children of a pytree node one level down, or `None` for a leaf."""
    flat = jax.tree_util.tree_flatten_with_path(
        node, is_leaf=lambda child: child is not node
    )[0]
    return None if any(not path for path, _ in flat) else flat


def is_named_tuple(node: Any) -> bool:
    """Whether a node is an instance of a NamedTuple class."""
    return isinstance(node, tuple) and hasattr(node, "_fields")


def named_tuple_classes(tree: Any) -> set[type]:
    """The NamedTuple classes that a tree is kept in."""
    own = {type(tree)} if is_named_tuple(tree) else set()
    children = children_of(tree) or []
    return own.union(*(named_tuple_classes(child) for _, child in children))
