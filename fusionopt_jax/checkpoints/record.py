"""The record that lies beside the arrays of a checkpoint, and comparisons with it."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from fusionopt_jax._checks import shape_text
from fusionopt_jax._digest import array_digest
from fusionopt_jax._paths import path_keys
from fusionopt_jax._states import (
    Component,
    Entry,
    named_tuple_classes,
    state_entries,
)
from fusionopt_jax._types import Params, PyTree
from fusionopt_jax.checkpoints.extras import Plain
from fusionopt_jax.routing import Routing

ITEM = "about"
"""The name under which Orbax keeps the record."""

FORMAT = 1


def make(
    items: Mapping[str, list[tuple[str, Any]]],
    params: Params,
    opt_state: PyTree[Any],
    routing: Routing,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """The record of a checkpoint, as JSON has it.

    Args:
        items: The named leaves of `params`, of `opt_state` and of what else there is.
        params: The parameters.
        opt_state: The state.
        routing: What the optimiser was built with.
        about: What else to keep.
    """
    entries = state_entries(opt_state, named_tuple_classes(params))
    content = {
        "format": FORMAT,
        "about": dict(about),
        "routing": routing.fingerprint(params),
        "components": list(dict.fromkeys(entry.component.title for entry in entries)),
        # Of each leaf of the state: what another optimiser finds it by.
        "places": [(*entry.component, path_keys(entry.path)) for entry in entries],
        "arrays": {
            item: [(name, described(leaf), digest(leaf)) for name, leaf in leaves]
            for item, leaves in items.items()
        },
    }
    # As it will be read: tuples as lists, and every key a string.
    content = json.loads(json.dumps(content))
    return content | {"sha256": _sha256(content)}


def intact(content: Any) -> bool:
    """Whether what was read is a record, exactly as it was made."""
    if not isinstance(content, dict) or "sha256" not in content:
        return False
    rest = {name: value for name, value in content.items() if name != "sha256"}
    return content["sha256"] == _sha256(rest)


def changed(
    content: dict[str, Any], item: str, leaves: list[tuple[str, Any]]
) -> list[str]:
    """The names of restored leaves whose bits are not those that were saved."""
    saved = {name: bits for name, _, bits in content["arrays"][item]}
    return [f"{item}/{name}" for name, leaf in leaves if saved[name] != digest(leaf)]


def differing(contents: list[dict[str, Any]]) -> list[str]:
    """What is not the same in all of several records."""
    parts = [dict(_parts(content)) for content in contents]
    names = sorted({name for one in parts for name in one})
    return [
        name
        for name in names
        if any(one.get(name) != parts[0].get(name) for one in parts)
    ]


def check_arrays(
    content: dict[str, Any], item: str, leaves: list[tuple[str, Any]]
) -> None:
    """Require leaves of the names, dtypes and shapes that were saved."""
    saved = {name: text for name, text, _ in content["arrays"][item]}
    wanted = {name: described(leaf) for name, leaf in leaves}
    others = [
        f"  {name}: saved as {saved.get(name, 'absent')}, "
        f"wanted as {wanted.get(name, 'absent')}"
        for name in sorted({*saved, *wanted})
        if saved.get(name) != wanted.get(name)
    ]
    if others:
        remedy = "Restore into what was saved, and convert it then."
        if item == "opt_state":
            remedy = (
                "Restore into what was saved, or pass the optimiser to go on with as "
                "`warm_start`, which converts what differs in dtype."
            )
        raise ValueError(
            f"The checkpoint holds another `{item}` than it is restored into:\n"
            + "\n".join([*others, remedy])
        )


def check_components(
    content: dict[str, Any], params: Params, opt_state: PyTree[Any]
) -> None:
    """Require the components that wrote the checkpoint."""
    saved, wanted = content["components"], components(params, opt_state)
    missing = [title for title in wanted if title not in saved]
    unused = [title for title in saved if title not in wanted]
    if missing or unused:
        parts = [
            *([f"it has no state of {', '.join(missing)}"] if missing else []),
            *([f"nothing takes that of {', '.join(unused)}"] if unused else []),
        ]
        raise ValueError(
            f"The checkpoint was written by another optimiser: {'; '.join(parts)}. "
            "Pass the optimiser to go on with as `warm_start`, to carry over what both "
            "have."
        )


def components(params: Params, opt_state: PyTree[Any]) -> list[str]:
    """Titles of the components that have leaves in a state."""
    entries = state_entries(opt_state, named_tuple_classes(params))
    return list(dict.fromkeys(entry.component.title for entry in entries))


def entries(content: dict[str, Any], leaves: list[tuple[str, Any]]) -> list[Entry]:
    """What the saved state holds, out of its named leaves."""
    if "places" not in content:
        raise ValueError(
            "An older version of this library wrote the checkpoint, and left out what "
            "`warm_start` needs. Restore into the state of the optimiser that wrote "
            "it, and call `warm_start(tx, params, opt_state)`."
        )
    named = dict(leaves)
    return [
        Entry(
            Component(tuple(group), kind, number),
            tuple(map(jax.tree_util.DictKey, keys)),
            named[name],
        )
        for (name, _, _), (group, kind, number, keys) in zip(
            content["arrays"]["opt_state"], content["places"], strict=True
        )
    ]


def described(leaf: Any) -> str:
    """A leaf's dtype and shape, or the type of a plain value."""
    if isinstance(leaf, Plain):
        return leaf.kind
    array = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return shape_text(jax.ShapeDtypeStruct(array.shape, array.dtype))


def digest(leaf: Any) -> str:
    """A leaf's digest as text; of a plain value the whole of it."""
    if isinstance(leaf, Plain):
        return leaf.text
    return np.asarray(array_digest(leaf)).tobytes().hex()


def _parts(content: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The parts of a record under names that people know."""
    for item, leaves in content["arrays"].items():
        for name, text, bits in leaves:
            yield f"{item}/{name}", (text, bits)
    yield from ((f"about/{name}", value) for name, value in content["about"].items())
    yield "routing", content["routing"]
    yield "the components", content["components"]


def _sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
