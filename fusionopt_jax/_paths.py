"""Key paths of trees as names, the one way in which leaves are spoken of."""

from typing import Any

import jax

from fusionopt_jax._types import KeyPath


def path_keys(path: KeyPath) -> tuple[str, ...]:
    """A key path as names, without the `.value` of NNX variables.

    Dictionary keys, attributes and places in a sequence are names alike, so that a
    module, its `State` and a pure dict of it have the same ones.
    """
    names = [
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))
        for key in path
    ]
    # Only an attribute of something that has a name: a dictionary may well have a
    # "value" beside "query" and "key", and a state a field of that name.
    if (
        len(names) > 1
        and names[-1] == "value"
        and isinstance(path[-1], jax.tree_util.GetAttrKey)
    ):
        names.pop()
    return tuple(names)


def path_name(path: KeyPath) -> str:
    """A key path as slash-joined names."""
    return "/".join(path_keys(path))


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """The name and the leaf of everything in a tree, in the order of its leaves."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(path_name(path), leaf) for path, leaf in leaves]
