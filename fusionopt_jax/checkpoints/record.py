"""The record that lies beside the arrays of a checkpoint, and comparisons with it."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from fusionopt_jax._checks import shape_text
from fusionopt_jax._digest import array_digest
from fusionopt_jax._paths import named_leaves
from fusionopt_jax._states import named_tuple_classes, state_entries
from fusionopt_jax._types import Params, PyTree
from fusionopt_jax.routing import Routing

ITEM = "about"
"""The name under which Orbax keeps the record."""

FORMAT = 1


def make(
    items: Mapping[str, PyTree[Any]], routing: Routing, about: Mapping[str, Any]
) -> dict[str, Any]:
    """The record of `params`, `opt_state` and what else there is, as JSON has it."""
    params = items["params"]
    content = {
        "format": FORMAT,
        "about": dict(about),
        "routing": routing.fingerprint(params),
        "components": components(params, items["opt_state"]),
        "arrays": {
            item: [
                (name, _described(leaf), _digest(leaf))
                for name, leaf in named_leaves(tree)
            ]
            for item, tree in items.items()
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


def changed(content: dict[str, Any], item: str, tree: PyTree[Any]) -> list[str]:
    """The leaves of a restored tree whose bits are not those that were saved."""
    saved = {name: digest for name, _, digest in content["arrays"][item]}
    return [
        f"{item}/{name}"
        for name, leaf in named_leaves(tree)
        if saved[name] != _digest(leaf)
    ]


def check_arrays(content: dict[str, Any], item: str, target: PyTree[Any]) -> None:
    """Require arrays of the names, dtypes and shapes that were saved."""
    saved = {name: text for name, text, _ in content["arrays"][item]}
    wanted = {name: _described(leaf) for name, leaf in named_leaves(target)}
    differing = [
        f"  {name}: saved as {saved.get(name, 'absent')}, "
        f"wanted as {wanted.get(name, 'absent')}"
        for name in sorted({*saved, *wanted})
        if saved.get(name) != wanted.get(name)
    ]
    if differing:
        raise ValueError(
            f"The checkpoint holds another `{item}` than it is restored into:\n"
            + "\n".join(differing)
            + "\nRestore into what was saved, and convert it then."
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
            "Restore into the state of the optimiser that wrote it, and go on with "
            "`warm_start(tx, params, state)`."
        )


def components(params: Params, opt_state: PyTree[Any]) -> list[str]:
    """Titles of the components that have leaves in a state."""
    entries = state_entries(opt_state, named_tuple_classes(params))
    return list(dict.fromkeys(entry.component.title for entry in entries))


def _described(leaf: Any) -> str:
    """A leaf's dtype and shape."""
    array = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return shape_text(jax.ShapeDtypeStruct(array.shape, array.dtype))


def _digest(leaf: Any) -> str:
    """A leaf's digest as text."""
    return np.asarray(array_digest(leaf)).tobytes().hex()


def _sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
