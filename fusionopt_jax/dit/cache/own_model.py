"""The table of modulators of your own adaLN model, in NNX, Linen or plain functions.

A model can use it if its modulation can be taken from outside. That is the `mods=None`
pattern::

    def __call__(self, x, cond, mods=None):
        if mods is None:
            mods = self.modulation(cond)      # what the table replaces
        shift, scale, gate = jnp.split(mods, 3, axis=-1)
        ...

Write one function from weights, times and labels to all modulations of the model, as a
tree of any shape, and the rest is here. `examples/04_cache.py` shows all of it, for
NNX and for Linen.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt32

from fusionopt_jax._digest import array_digest
from fusionopt_jax._paths import named_leaves
from fusionopt_jax._types import Params, PyTree
from fusionopt_jax.dit.cache.fingerprint import stacked
from fusionopt_jax.dit.cache.request import distinct_integers, schedule_times
from fusionopt_jax.dit.cache.table import Modulate, Table, every_pair
from fusionopt_jax.dit.network.modulation import take_rows


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class ModulatorTable(Table):
    """Every modulation that a sampling run of your own adaLN model needs.

    Build it with :meth:`build`, before the loop take its `rows`, scan over `mods`, and
    in every step hand `take_rows(step, rows)` to the model.

    Attributes:
        mods: What the modulation function returned, with leading axes [times, labels].
        times: `[times]` float32, in the order of the sampler.
        labels: `[labels]` int32, distinct.
        fingerprint: `[leaves, 2]` uint32, digests of the weights in the order of their
            leaves.
    """

    mods: PyTree[Any]
    times: Float[Array, "s"]
    labels: Int[Array, "u"]
    fingerprint: UInt32[Array, "parts 2"]

    @classmethod
    def build(
        cls,
        modulate: Modulate,
        weights: Params,
        times: Any,
        labels: Any,
        *,
        dtype: DTypeLike | None = None,
    ) -> "ModulatorTable":
        """Call a model's modulation once for every pair of time and label.

        Args:
            modulate: `modulate(weights, times, labels)` with two arrays of equal length
                [rows]; returns a tree of floating-point leaves with a leading axis of
                rows. It is jitted.
            weights: A tree of arrays, such as `nnx.state(model)` or Linen's variables:
                the weights that `modulate` reads. Changing any of them makes the table
                stale, so leave out what it does not read.
            times: `[times]` in the order of the sampler, such as
                `sampler.eval_times()`.
            labels: The labels of a request; repeats are dropped. Add the null label
                yourself if there is guidance.
            dtype: Type of the table; None keeps what `modulate` returns.

        Returns:
            The table.

        Raises:
            ValueError: If `times` or `labels` is empty or no list of numbers, or if
                `modulate` returned something without a leading axis of rows.
            TypeError: If labels are not integers, `modulate` did not return floating
                point, or times or labels are traced by `jax.jit`.

        Example:
            >>> def modulate(weights, times, labels):
            ...     return weights["slope"] * times + labels
            >>> weights = {"slope": jnp.float32(2.0)}
            >>> table = ModulatorTable.build(modulate, weights, [5.0, 1.0], [7, 3])
            >>> table.mods.tolist(), table.labels.tolist()
            ([[13.0, 17.0], [5.0, 9.0]], [3, 7])
        """
        times = jnp.asarray(schedule_times(times))
        distinct = jnp.asarray(distinct_integers(labels))

        def table(weights: Params, times: Array, labels: Array) -> PyTree[Any]:
            """Every row, in the type of the table."""
            mods = every_pair(modulate, weights, times, labels)
            return (
                mods
                if dtype is None
                else jax.tree.map(lambda leaf: leaf.astype(dtype), mods)
            )

        return cls(
            mods=jax.jit(table)(weights, times, distinct),
            times=times,
            labels=distinct,
            fingerprint=jnp.asarray(_leaf_digests(weights)),
        )

    def at(self, step: int, labels: Any) -> PyTree[Any]:
        """The modulation of each image at one time, for sampling by hand.

        Args:
            step: Index into `times`; negative ones count from the end.
            labels: `[batch]` integers.

        Returns:
            The tree with leaves `[batch, ...]`.

        Raises:
            IndexError: If there is no such step.
            StaleCacheError: If the table lacks a label.

        Example:
            >>> table = ModulatorTable.build(lambda w, t, y: t + y, {}, [9.0], [3, 7])
            >>> table.at(0, jnp.array([7, 7, 3])).tolist()
            [16.0, 16.0, 12.0]
        """
        self.check_step(step)
        step_mods = jax.tree.map(lambda leaf: leaf[step], self.mods)
        return take_rows(step_mods, self.rows(labels))

    @property
    def entries(self) -> PyTree[Any]:
        """The arrays that hold the modulators."""
        return self.mods

    def digests(self, weights: Params) -> UInt32[Array | np.ndarray, "parts 2"]:
        """Digests of the weights, in the order of their leaves."""
        return _leaf_digests(weights)

    def weight_names(self, weights: Params) -> list[str]:
        """Paths of the weights, in the order of their leaves."""
        return [name or "the only one" for name, _ in named_leaves(weights)]

    def blanked_unless(self, fits: Bool[Array, ""]) -> "ModulatorTable":
        """The table where `fits` holds, and NaN elsewhere."""
        mods = jax.tree.map(
            lambda leaf: jnp.where(fits, leaf, jnp.nan).astype(leaf.dtype), self.mods
        )
        return dataclasses.replace(self, mods=mods)


def _leaf_digests(weights: Params) -> UInt32[Array | np.ndarray, "leaves 2"]:
    """Digests of every leaf, in their order."""
    return stacked([array_digest(leaf) for leaf in jax.tree.leaves(weights)])
