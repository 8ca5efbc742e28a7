"""What states in blocks of 8 bits stand for, so that another state can take it over."""

from collections import defaultdict
from typing import Any

import jax.numpy as jnp
import numpy as np

from fusionopt_jax._matrices.placement import alike
from fusionopt_jax._paths import path_keys
from fusionopt_jax._states import Entry
from fusionopt_jax.transforms.quantize_state import (
    SCALES,
    QuantizedState,
    blocks_of,
    numbers_of,
)


def written_out(entries: list[Entry]) -> list[Entry]:
    """What a state holds, each leaf in 8 bits with its numbers, and no scales."""
    scales = _scales(entries)
    taken = set(scales.values())
    return [
        entry._replace(
            leaf=numbers_of(
                jnp.asarray(entry.leaf), jnp.asarray(entries[scales[at]].leaf)
            )
        )
        if at in scales
        else entry
        for at, entry in enumerate(entries)
        if at not in taken
    ]


def in_blocks(entries: list[Entry], leaves: list[Any]) -> list[Any]:
    """The leaves of a state again, out of those that `written_out` leaves of it.

    Args:
        entries: What the state holds, for the places of codes and scales.
        leaves: A leaf for each entry that is no scale.
    """
    scales = _scales(entries)
    rest = iter(leaves)
    found: dict[int, Any] = {}
    for at in sorted(set(range(len(entries))) - set(scales.values())):
        leaf = next(rest)
        if at in scales:
            leaf, scale = blocks_of(leaf)
            found[scales[at]] = alike(scale, entries[scales[at]].leaf)
        found[at] = leaf
    return [found[at] for at in range(len(entries))]


def _scales(entries: list[Entry]) -> dict[int, int]:
    """For the place of each leaf in 8 bits, that of its scales."""
    waiting: dict[Any, list[int]] = defaultdict(list)
    for at, (component, path, _) in enumerate(entries):
        keys = path_keys(path)
        if component.kind == QuantizedState.__name__ and keys[0] == "scales":
            own = (keys[1].removesuffix(SCALES), *keys[2:])
            waiting[component.group, own].append(at)
    pairs = {}
    for at, (component, path, leaf) in enumerate(entries):
        own = waiting.get((component.group, path_keys(path)))
        if own and np.dtype(leaf.dtype) == np.int8:
            pairs[at] = own.pop(0)
    return pairs
