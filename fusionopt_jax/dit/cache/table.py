r"""The table of modulators of an adaLN model: one row for every (time, label) pair.

.. math:: m_{s,l} = M(t_s, y_l)

The modulation M depends on a time and a label, never on the image. A sampler visits a
few dozen times, the same for every request, and a request has a few distinct labels, so
all of it can be computed before the first step. What remains is a table, and the
weights of M need not be in memory any more.

The table is exact, not an approximation, and it belongs to exactly one set of weights,
one list of times and one set of labels. Each of them is kept with it, and any other is
refused.

What every table can do is here. `fusionopt_jax.dit.cache.own_model` has the one for an
adaLN model of your own, `fusionopt_jax.dit.cache.dit` the one for this library's DiT.
"""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, UInt32

from fusionopt_jax._paths import path_name
from fusionopt_jax._types import Params, PyTree
from fusionopt_jax.dit.cache.request import schedule_times

Modulate: TypeAlias = Callable[[Any, Array, Array], Any]
"""From weights, times [rows], labels [rows] to a tree with a leading axis of rows."""

_TableT = TypeVar("_TableT", bound="Table")


class StaleCacheError(ValueError):
    """A cache does not fit the weights, times, labels, dtype or config in use."""


class Table(abc.ABC):
    """What every table of modulators can do; a frozen dataclass of arrays, as a pytree.

    It goes through `jax.jit`, `jax.device_put` and `lax.scan` like any other tree. Scan
    it, do not close over it: a closure bakes the table into the program.

    Attributes:
        times: `[times]` float32, in the order of the sampler.
        labels: `[labels]` int32.
        fingerprint: `[weights, 2]` uint32, digests of the weights it was made from.
    """

    times: Float[Array, "s"]
    labels: Int[Array, "u"]
    fingerprint: UInt32[Array, "parts 2"]

    @property
    @abc.abstractmethod
    def entries(self) -> PyTree[Any]:
        """The arrays that hold the modulators."""

    @abc.abstractmethod
    def digests(self, weights: Params) -> UInt32[Array | np.ndarray, "parts 2"]:
        """Digests of the weights that feed the table, in a fixed order."""

    @abc.abstractmethod
    def weight_names(self, weights: Params) -> list[str]:
        """Their names, in the same order."""

    @abc.abstractmethod
    def blanked_unless(self: _TableT, fits: Bool[Array, ""]) -> _TableT:
        """The table where `fits` holds, and one that gives no image elsewhere."""

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        """Split into arrays with their names, and what is static."""
        data, static = _fields(type(self))
        keys = [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in data]
        return keys, tuple(getattr(self, name) for name in static)

    @classmethod
    def tree_unflatten(
        cls: type[_TableT], static: Sequence[Any], children: Sequence[Any]
    ) -> _TableT:
        """Join leaves of any kind: JAX also puts shardings and holes in their place."""
        table = object.__new__(cls)
        data, names = _fields(cls)
        for name, value in zip((*data, *names), (*children, *static), strict=True):
            object.__setattr__(table, name, value)
        return table

    @property
    def nbytes(self) -> int:
        """Bytes of the modulators on the device."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.entries))

    def rows(self, labels: Any) -> Int[Array, "b"]:
        """The row that each label uses; the same at every time.

        Args:
            labels: `[batch]` integers.

        Returns:
            `[batch]` int32. While `jax.jit` traces, labels that the table lacks can't
            be an error: they get a row beyond the table, which reads as NaN.

        Raises:
            StaleCacheError: If the table lacks a label.

        Example:
            >>> from fusionopt_jax.dit.cache.own_model import ModulatorTable
            >>> table = ModulatorTable.build(lambda w, t, y: t, {}, [9.0], [207, 360])
            >>> table.rows(jnp.array([360, 207, 360])).tolist()
            [1, 0, 1]
        """
        if not isinstance(labels, Tracer) and not isinstance(self.labels, Tracer):
            self._compare_labels(np.asarray(labels))
        matches = jnp.asarray(labels)[:, None] == self.labels[None, :]
        first = jnp.argmax(matches, axis=1).astype(jnp.int32)
        beyond = jnp.int32(self.labels.shape[0])
        return jnp.where(jnp.any(matches, axis=1), first, beyond)

    def check(self, weights: Params, *, times: Any = None, labels: Any = None) -> None:
        """Refuse to go on if the table was made from something else than is in use.

        The weights are compared by digests of their bits. Those of device arrays are
        remembered, so checking again costs nothing.

        Args:
            weights: The weights in use, as the table was built from them.
            times: The times that will be asked for; None does not compare them. A
                trailing entry for time 0 in the table is allowed.
            labels: The labels that will be asked for; None does not compare them.

        Raises:
            StaleCacheError: If anything differs. The message names what, and the
                remedy.
            TypeError: If anything is traced by `jax.jit`; there, use :meth:`checked`.

        Example:
            >>> from fusionopt_jax.dit.cache.own_model import ModulatorTable
            >>> weights = {"slope": jnp.float32(2.0)}
            >>> table = ModulatorTable.build(
            ...     lambda w, t, y: w["slope"] * t, weights, [1.0], [0]
            ... )
            >>> table.check(weights, times=[1.0], labels=[0, 0])
            >>> table.check({"slope": jnp.float32(2.5)})
            Traceback (most recent call last):
            ...
            fusionopt_jax.dit.cache.table.StaleCacheError: the cache was built from ...
        """
        if self._compare(weights, times, labels):
            raise TypeError(
                "weights or cache are traced by `jax.jit`, so that nothing can be "
                "raised; take `cache.checked(...)`, which gives NaN instead."
            )

    def checked(
        self: _TableT, weights: Params, *, times: Any = None, labels: Any = None
    ) -> _TableT:
        """A table that gives no image unless it fits, also inside your own `jax.jit`.

        Whatever is known is compared at once, as :meth:`check` does. Where the weights
        or the table are arguments of a function that is being traced, the comparison
        becomes part of the program: the digests are computed on the device, and a table
        that does not fit becomes NaN, as it does for a label that it lacks. That reads
        each weight that feeds the table once per call of the program, not per step.

        Args:
            weights: As for :meth:`check`.
            times: As for :meth:`check`.
            labels: As for :meth:`check`; traced ones are not compared.

        Returns:
            The table itself, or one that is NaN where it does not fit.

        Raises:
            StaleCacheError: If anything that is known differs.

        Example:
            >>> from fusionopt_jax.dit.cache.own_model import ModulatorTable
            >>> weights = {"slope": jnp.float32(2.0)}
            >>> table = ModulatorTable.build(
            ...     lambda w, t, y: w["slope"] * t, weights, [1.0], [0]
            ... )
            >>> read = jax.jit(lambda weights: table.checked(weights).mods)
            >>> read(weights).tolist(), read({"slope": jnp.float32(2.5)}).tolist()
            ([[2.0]], [[nan]])
        """
        conditions = self._compare(weights, times, labels)
        if not conditions:
            return self
        return self.blanked_unless(jnp.all(jnp.stack(conditions)))

    def check_step(self, step: int) -> None:
        """Require an index into the times."""
        steps = self.times.shape[0]
        if not -steps <= step < steps:
            raise IndexError(f"`step` must lie in [{-steps}, {steps - 1}], got {step}.")

    def _compare(
        self, weights: Params, times: Any, labels: Any
    ) -> list[Bool[Array, ""]]:
        """Raise on what is known to differ; return what only the program can tell."""
        conditions = []
        if times is not None:
            conditions += self._compare_times(schedule_times(times))
        traced = isinstance(labels, Tracer) or isinstance(self.labels, Tracer)
        if labels is not None and not traced:
            self._compare_labels(np.asarray(labels))
        digests = self.digests(weights)
        if digests.shape != self.fingerprint.shape:
            raise StaleCacheError(
                f"the cache was built from {len(self.fingerprint)} weight arrays, not "
                f"{len(digests)}; build it again from the weights in use."
            )
        if isinstance(digests, Tracer) or isinstance(self.fingerprint, Tracer):
            return [*conditions, jnp.all(self.fingerprint == digests)]
        changed = np.any(np.asarray(self.fingerprint) != digests, axis=1)
        if changed.any():
            names = zip(self.weight_names(weights), changed, strict=True)
            raise StaleCacheError(
                "the cache was built from other weights: "
                f"{', '.join(name for name, differs in names if differs)} changed "
                "since (training, an average of weights, a merged adapter and a cast "
                "all do that); build it again from the weights in use."
            )
        return conditions

    def _compare_times(self, wanted: Float[np.ndarray, "n"]) -> list[Bool[Array, ""]]:
        """Require the same times bit by bit, but for a trailing zero."""
        count, expected = self.times.shape[0], wanted
        if count == wanted.size + 1:
            expected = np.append(wanted, np.float32(0))
        traced = isinstance(self.times, Tracer)
        held = expected if traced else np.asarray(self.times)
        if count != expected.size or (count > wanted.size and held[-1] != 0):
            detail = f"{count} steps in the cache, {wanted.size} in use"
        elif traced:
            return [jnp.all(self.times == expected)]
        elif not np.array_equal(held, expected):
            step = int(np.argmax(held != expected))
            detail = (
                f"step {step} is {held[step]} in the cache, {expected[step]} in use"
            )
        else:
            return []
        raise StaleCacheError(
            f"the cache was built for other times ({detail}); build it again with "
            "`sampler.eval_times()` of the sampler in use."
        )

    def _compare_labels(self, wanted: Int[np.ndarray, "..."]) -> None:
        """Require every label to have a row."""
        missing = np.setdiff1d(wanted, np.asarray(self.labels))
        if missing.size:
            shown = ", ".join(str(label) for label in missing[:5])
            raise StaleCacheError(
                f"the cache has no row for label {shown}; build it again with the "
                "labels of this request."
            )


def _fields(table: type[Any]) -> tuple[list[str], list[str]]:
    """Names of the arrays of a table, and of what is static."""
    fields = dataclasses.fields(table)
    static = [field.name for field in fields if field.metadata.get("static")]
    return [field.name for field in fields if field.name not in static], static


def every_pair(
    modulate: Modulate,
    weights: Params,
    times: Float[Array, "s"],
    labels: Int[Array, "u"],
) -> PyTree[Any]:
    """Call a modulation once, with a row for every pair of time and label.

    Args:
        modulate: As :meth:`ModulatorTable.build` has it.
        weights: What it reads.
        times: `[times]`.
        labels: `[labels]`, distinct.

    Returns:
        Its tree, the axis of rows split into two axes `[times, labels]`.

    Raises:
        ValueError: If a leaf has no leading axis of rows.
        TypeError: If a leaf is not floating point.

    Example:
        >>> times, labels = jnp.array([5.0, 1.0]), jnp.array([3, 7])
        >>> every_pair(lambda w, t, y: w * t + y, 2.0, times, labels).tolist()
        [[13.0, 17.0], [5.0, 9.0]]
    """
    steps, count = times.shape[0], labels.shape[0]
    mods = modulate(weights, jnp.repeat(times, count), jnp.tile(labels, steps))

    def unfold(path: Any, leaf: Array) -> Array:
        """Split the axis of rows into times and labels."""
        name = path_name(path) or "its only leaf"
        if leaf.ndim == 0 or leaf.shape[0] != steps * count:
            raise ValueError(
                f"`modulate` returned shape {leaf.shape} at {name}; each leaf must "
                f"start with one axis of rows, here {steps * count}."
            )
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"`modulate` returned {leaf.dtype} at {name}; modulations must be "
                "floating point, so that a missing row can be NaN."
            )
        return leaf.reshape(steps, count, *leaf.shape[1:])

    return jax.tree_util.tree_map_with_path(unfold, mods)
