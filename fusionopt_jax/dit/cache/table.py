"""The modulator cache for your own adaLN model, in NNX, Linen or plain functions.

A model can use it if its modulation depends on a time and a label, not on the image,
and if it takes the modulation from outside when there is one. That is the `mods=None`
pattern::

    def __call__(self, x, cond, mods=None):
        if mods is None:
            mods = self.modulation(cond)      # what the cache replaces
        shift, scale, gate = jnp.split(mods, 3, axis=-1)
        ...

Write one function from weights, times and labels to all modulations of the model, as a
tree of any shape, and the rest is here: `build_table` calls it once for every pair of
time and label, `check_table` refuses a table of other weights, times or labels, and
`take_rows` cuts one step of the table down to a batch. `examples/adaln_block.py` shows
all of it, for NNX and for Linen.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt32

from fusionopt_jax._digest import array_digest
from fusionopt_jax._paths import named_leaves, path_name
from fusionopt_jax._types import Params, PyTree
from fusionopt_jax.dit.cache.dit import StaleCacheError, schedule_times
from fusionopt_jax.dit.cache.use import label_rows

Modulate: TypeAlias = Callable[[Any, Array, Array], Any]
"""From weights, times [rows], labels [rows] to a tree with a leading axis of rows."""


class ModulatedBlock(Protocol):
    """What a block looks like that can be handed its modulation.

    A Flax module with such a `__call__` satisfies it as it is; nothing is to be
    inherited.
    """

    def __call__(self, x: Any, cond: Any, mods: Any = None) -> Any:
        """Run the block, with `mods` in place of the modulation of `cond` if given.

        Args:
            x: What the block transforms.
            cond: The conditioning vector; unused with `mods`.
            mods: Modulation out of a cache, or None to compute it.

        Returns:
            The transformed `x`.
        """
        ...


class ModulationTable(NamedTuple):
    """Every modulation that a sampling run needs, as a tree of arrays.

    Attributes:
        mods: What the modulation function returned, with leading axes [times, labels].
            Scan it over its first axis; do not close over it.
        times: [times], in the order of the sampler.
        labels: [labels], distinct.
        digests: [leaves, 2], digests of the weights in the order of their leaves.
    """

    mods: PyTree[Any]
    times: Float[Array, " times"]
    labels: Int[Array, " labels"]
    digests: UInt32[Array, "leaves 2"]


def build_table(
    modulate: Modulate,
    weights: Params,
    times: Any,
    labels: Any,
    *,
    dtype: DTypeLike | None = None,
) -> ModulationTable:
    """Call a model's modulation once for every pair of time and label.

    Args:
        modulate: `modulate(weights, times, labels)` with two arrays of equal length
            [rows]; returns a tree whose leaves have a leading axis of rows. It is
            jitted.
        weights: A tree of arrays, such as `nnx.state(model)` or Linen's variables: the
            weights that `modulate` reads. Changing any of them makes the table stale,
            so leave out what it does not read.
        times: [times] in the order of the sampler, such as `sampler.eval_times()`.
        labels: The labels of a request; repeats are dropped. Add the null label
            yourself if there is guidance.
        dtype: Type of the table; None keeps what `modulate` returns.

    Returns:
        The table.

    Raises:
        ValueError: If `times` or `labels` is empty or no list of numbers, or if
            `modulate` returned something without a leading axis of rows.
        TypeError: If labels are not integers.

    Example:
        >>> def modulate(weights, times, labels):
        ...     return weights["slope"] * times + labels
        >>> weights = {"slope": jnp.float32(2.0)}
        >>> table = build_table(modulate, weights, [5.0, 1.0], [7, 3])
        >>> table.mods.tolist(), table.labels.tolist()
        ([[13.0, 17.0], [5.0, 9.0]], [3, 7])
    """
    times = schedule_times(times)
    distinct = _distinct(labels)
    rows = len(times) * len(distinct)
    mods = jax.jit(modulate)(
        weights,
        jnp.repeat(jnp.asarray(times), len(distinct)),
        jnp.tile(jnp.asarray(distinct), len(times)),
    )

    def unfold(path: Any, leaf: Array) -> Array:
        """Split the axis of rows into times and labels."""
        if leaf.ndim == 0 or leaf.shape[0] != rows:
            name = path_name(path)
            raise ValueError(
                f"`modulate` returned shape {leaf.shape} at "
                f"{repr(name) if name else 'its only leaf'}; each leaf must start with "
                f"one axis of rows, here {rows}."
            )
        leaf = leaf.reshape(len(times), len(distinct), *leaf.shape[1:])
        return leaf if dtype is None else leaf.astype(dtype)

    return ModulationTable(
        mods=jax.tree_util.tree_map_with_path(unfold, mods),
        times=jnp.asarray(times),
        labels=jnp.asarray(distinct),
        digests=jnp.asarray(_digests(weights)),
    )


def check_table(
    table: ModulationTable, weights: Params, times: Any = None, labels: Any = None
) -> None:
    """Refuse a table that was built from something else than what is in use.

    Args:
        table: The table.
        weights: The weights in use, as they were handed to `build_table`.
        times: The times that will be asked for; None does not compare them.
        labels: The labels that will be asked for; None does not compare them.

    Raises:
        StaleCacheError: If anything differs; the message names what.

    Example:
        >>> weights = {"slope": jnp.float32(2.0)}
        >>> table = build_table(lambda w, t, y: w["slope"] * t, weights, [1.0], [0])
        >>> check_table(table, weights, [1.0], [0, 0])
        >>> check_table(table, {"slope": jnp.float32(2.5)})
        Traceback (most recent call last):
        ...
        fusionopt_jax.dit.cache.StaleCacheError: the table was built from other w...
    """
    digests, held = _digests(weights), np.asarray(table.digests)
    if digests.shape != held.shape:
        raise StaleCacheError(
            f"the table was built from {len(held)} weight arrays, not {len(digests)}; "
            "build it again with `build_table`."
        )
    changed = np.any(digests != held, axis=1)
    if changed.any():
        name, _ = named_leaves(weights)[int(np.argmax(changed))]
        raise StaleCacheError(
            f"the table was built from other weights: {name} changed since; build it "
            "again with `build_table` from the weights in use."
        )
    if times is not None and not np.array_equal(schedule_times(times), table.times):
        raise StaleCacheError(
            "the table was built for other times; build it again with the times in use."
        )
    if labels is not None:
        missing = np.setdiff1d(_distinct(labels), np.asarray(table.labels))
        if missing.size:
            raise StaleCacheError(
                f"the table has no row for label {missing[0]}; build it again with the "
                "labels of this request."
            )


def take_rows(
    mods: PyTree[Any], known: Int[Array, " known"], labels: Int[Array, " batch"]
) -> PyTree[Any]:
    """One step of a table, cut down to the label of each image.

    Args:
        mods: One step of `ModulationTable.mods`, leaves [labels, ...].
        known: `ModulationTable.labels`.
        labels: [batch], the label of each image.

    Returns:
        The tree with leaves [batch, ...]; NaN for a label that the table lacks.

    Example:
        >>> mods = jnp.array([[1.0], [2.0]])
        >>> take_rows(mods, jnp.array([3, 7]), jnp.array([7, 3, 7])).tolist()
        [[2.0], [1.0], [2.0]]
    """
    rows = label_rows(known, labels)
    return jax.tree.map(
        lambda leaf: jnp.take(leaf, rows, axis=0, mode="fill", fill_value=jnp.nan), mods
    )


def _distinct(labels: Any) -> Int[np.ndarray, " labels"]:
    """The distinct labels in rising order."""
    values = np.asarray(labels)
    if values.size == 0:
        raise ValueError("`labels` is empty; a table needs at least one label.")
    if not np.issubdtype(values.dtype, np.integer):
        raise TypeError(f"`labels` must be integers, got {values.dtype}.")
    return np.unique(values).astype(np.int32)


def _digests(weights: Params) -> UInt32[np.ndarray, "leaves 2"]:
    """Digests of every leaf, which change with any bit of it."""
    digests = [array_digest(leaf) for leaf in jax.tree.leaves(weights)]
    return np.stack(digests) if digests else np.zeros((0, 2), np.uint32)
