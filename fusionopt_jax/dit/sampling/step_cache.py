"""Steps that recall what the network added in earlier ones instead of computing it.

What the blocks of a network add to their input changes little from one step of a
sampler to the next. A step cache is a list of the steps that compute it; the others
extrapolate it from the last steps that did (`extrapolation` has the equation). It is an
approximation, unlike a cache of modulators, and the two go together.

Source:
    Selvaraju et al. 2024, "FORA: Fast-Forward Caching in Diffusion Transformer
    Acceleration" (reuse, in all but every n-th step); Liu et al. 2025, "From Reusing to
    Forecasting: Accelerating Diffusion Models with TaylorSeers" (extrapolation); Ma et
    al. 2025, "MagCache" (one residual for all blocks together, steps chosen
    beforehand).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from fusionopt_jax import _checks
from fusionopt_jax._types import Params
from fusionopt_jax.dit.cache.fingerprint import WeightDigests, weight_digests
from fusionopt_jax.dit.cache.table import StaleCacheError
from fusionopt_jax.dit.config import DiTConfig, differences
from fusionopt_jax.dit.network.model import as_dict
from fusionopt_jax.dit.network.residuals import Plan, Recall
from fusionopt_jax.dit.sampling.extrapolation import extrapolation, source_steps
from fusionopt_jax.dit.sampling.sampler import Sampler

Mask: TypeAlias = Sequence[bool] | Sequence[Sequence[bool]] | np.ndarray
"""True where a step computes: [steps], or [steps, depth] of a branch."""

Plans: TypeAlias = tuple[Plan, ...]
"""One plan per evaluation in a step; each array has a leading axis of steps."""

ATTENTION_SHARE = 1.0 / 3.0
"""Of a block's products with weights: 4 D^2 a token, against 8 D^2 of the MLP."""


@dataclasses.dataclass(frozen=True)
class StepCache:
    r"""Which steps of a sampler compute the network, and which extrapolate from them.

    Give `mask` to skip all blocks of a step together, which keeps one residual,
    [batch, tokens, hidden], or `attention` and `mlp` (or one of them) to skip these
    branches of the blocks apart, which keeps one such residual for each block and
    branch. There are `order + 1` of each in memory, twice as many with guidance, and
    again twice as many with a sampler that evaluates twice a step. In float32, guided,
    a DiT-XL/2 of 256 pixels keeps 2.4 MB an image of the network, or 132 MB of all
    branches, times `order + 1`. The patch embedding and the final layer, both with the
    modulation of the present time, run in every step.

    Where a branch is skipped, what is extrapolated is its output before the gate.

    It is frozen and hashable. Nothing in it needs to be known of the weights; what
    `calibrate` returns knows them and their config, and is refused with others.

    Attributes:
        mask: [steps] booleans, True where the step computes.
        attention: The same for the attention of the blocks: [steps] for all blocks
            alike, or [steps, depth].
        mlp: The same for their MLPs.
        order: Order of the extrapolation: 0, 1 or 2. The first `order + 1` steps must
            compute. The higher it is, and the farther a skipped step is from those that
            computed, the more it magnifies what does not lie on its polynomial.
        fingerprint: Digests of the weights that the mask was chosen for; None for any.
        sampler: The sampler that it was chosen for; None for any of as many steps.
        config: The config of the model that it was chosen for; None for any. The same
            weights are another model under another `num_heads` or `time_scale`.

    Raises:
        TypeError: If a mask has other values than booleans, or `order` is no integer.
        ValueError: If there is no mask, or one for the network and one for branches, if
            masks are for different numbers of steps, or if an early step is skipped
            that has too few before it.

    Example:
        >>> cache = StepCache(mask=[True, False, True, False])
        >>> cache.steps, cache.fraction
        (4, 0.5)
        >>> StepCache.every(steps=6, n=3, order=1).mask
        (True, True, False, True, False, False)

    Source:
        As the head of this module says.
    """

    mask: Mask | None = None
    attention: Mask | None = None
    mlp: Mask | None = None
    order: int = 0
    fingerprint: WeightDigests | None = None
    sampler: Sampler | None = None
    config: DiTConfig | None = None

    def __post_init__(self) -> None:
        """Check the masks and turn them into tuples."""
        _checks.check_integer("order", self.order, low=0)
        _checks.check_choice("order", self.order, (0, 1, 2))
        for name in ("mask", "attention", "mlp"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _tuples(name, value, self.order))
        masks = self._masks()
        if not masks:
            raise ValueError(
                "a step cache needs `mask`, or `attention` and `mlp`: True for each "
                "step that computes, such as StepCache.every(steps=50, n=2)."
            )
        if self.mask is not None and len(masks) > 1:
            raise ValueError(
                "`mask` skips all blocks together, `attention` and `mlp` skip their "
                "branches; give the one or the others."
            )
        counts = {len(mask) for mask in masks.values()}
        if len(counts) > 1:
            raise ValueError(
                f"`attention` is for {len(masks['attention'])} steps, `mlp` for "
                f"{len(masks['mlp'])}; they must be for one number of steps."
            )
        if self.sampler is not None:
            self._compare_steps(self.sampler)

    def check_depth(self, depth: int) -> None:
        """Require that masks with an axis of blocks have one for each.

        Args:
            depth: Number of blocks of the model.

        Raises:
            ValueError: If a mask is for another number of blocks.
        """
        for name, mask in self._masks().items():
            shape = np.shape(mask)
            if len(shape) == 2 and shape[1] != depth:
                raise ValueError(
                    f"`{name}` of the step cache is for {shape[1]} blocks, but the "
                    f"model has {depth}."
                )

    @classmethod
    def every(cls, steps: int, n: int, *, order: int = 0) -> "StepCache":
        """Compute all blocks in every n-th step, and in the first `order + 1`.

        Args:
            steps: Number of steps of the sampler.
            n: Distance of the steps that compute; 1 skips nothing.
            order: Order of the extrapolation.

        Returns:
            The step cache.

        Raises:
            ValueError: If a number is out of range.

        Example:
            >>> StepCache.every(steps=5, n=2).mask
            (True, False, True, False, True)

        Source:
            Selvaraju et al. 2024, "FORA".
        """
        _checks.check_integer("steps", steps, low=1)
        _checks.check_integer("n", n, low=1)
        _checks.check_integer("order", order, low=0)
        index = np.arange(steps)
        return cls(mask=(index % n == 0) | (index <= order), order=order)

    @property
    def steps(self) -> int:
        """Number of steps that the masks are for."""
        return len(next(iter(self._masks().values())))

    @property
    def skips(self) -> bool:
        """Whether any step skips anything; if not, it is as if there were none."""
        return not all(np.all(mask) for mask in self._masks().values())

    @property
    def fraction(self) -> float:
        """Share of the network's work that is left, in (0, 1].

        For a `mask`, that of the steps that compute. For branches, attention counts as
        one third of a block and the MLP as two thirds, as their products with weights
        do in a DiT with an MLP four times as wide.
        """
        if self.mask is not None:
            return float(np.mean(self.mask))
        shares = {"attention": ATTENTION_SHARE, "mlp": 1.0 - ATTENTION_SHARE}
        masks = self._masks()
        return float(
            sum(
                share * (np.mean(masks[name]) if name in masks else 1.0)
                for name, share in shares.items()
            )
        )

    def check(
        self,
        sampler: Sampler,
        params: Params | None = None,
        config: DiTConfig | None = None,
    ) -> None:
        """Refuse a sampler or a model other than those that the masks are for.

        Args:
            sampler: The sampler in use.
            params: The DiT's parameters in use, full or stripped; None does not compare
                them. They are not compared either if a `jax.jit` traces them.
            config: Its config in use; None does not compare it.

        Raises:
            StaleCacheError: If it was chosen for another sampler, another config or
                other weights.
            ValueError: If it is for another number of steps.

        Example:
            >>> from fusionopt_jax import dit
            >>> dit.StepCache.every(steps=4, n=2).check(dit.Sampler.euler(4))
        """
        self._compare_steps(sampler)
        if self.sampler is not None and self.sampler != sampler:
            raise StaleCacheError(
                f"the step cache was chosen for {self.sampler}, not for {sampler}; "
                f"calibrate it again, or {_UNPIN}."
            )
        kept = self.config
        if kept is not None and config is not None and kept != config:
            raise StaleCacheError(
                "the step cache was chosen for another config: "
                f"{differences(kept, config, 'there')}; calibrate it again, or "
                f"{_UNPIN}."
            )
        if self.fingerprint is None or params is None:
            return
        digests = weight_digests(as_dict(params))
        if digests is None or digests == self.fingerprint:
            return
        kept, used = dict(self.fingerprint), dict(digests)
        names = [name for name in {**kept, **used} if kept.get(name) != used.get(name)]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise StaleCacheError(
            f"the step cache was chosen for other weights: {', '.join(names[:3])}"
            f"{more} changed since; calibrate it again, or {_UNPIN}."
        )

    def plan(self, sampler: Sampler) -> Plans | None:
        """The masks and the weights of the extrapolation as arrays for a loop to scan.

        `run_sampler` takes the step cache as it is. Inside your own `jax.jit`, hand it
        this as an argument of the function instead: another mask of the same kind and
        order then compiles nothing.

        Args:
            sampler: Whose times the residuals belong to.

        Returns:
            A plan for each evaluation in a step, or None if nothing is skipped. The
            arrays are NumPy's; `compute` is [steps] or [steps, depth], `weights` the
            same and [order + 1].

        Raises:
            StaleCacheError: If the masks were chosen for another sampler.
            ValueError: If they are for another number of steps, or if the sampler
                returns to a time and the order is above 0.

        Example:
            >>> from fusionopt_jax import dit
            >>> cache = StepCache(mask=[True, True, False, False], order=1)
            >>> (plan,) = cache.plan(dit.Sampler.euler(4))
            >>> plan.network.weights.tolist()
            [[1.0, 0.0], [1.0, 0.0], [2.0, -1.0], [3.0, -2.0]]
        """
        self.check(sampler)
        return _plans(self, sampler) if self.skips else None

    def recalled(self) -> set[tuple[int, int]]:
        """Every pair of a skipped step and a step that it recalls, over all masks.

        Example:
            >>> sorted(StepCache(mask=[True, False, True, False]).recalled())
            [(1, 0), (3, 2)]
        """
        pairs = set()
        for mask in self._masks().values():
            columns = np.asarray(mask).reshape(self.steps, -1).T
            for column in columns:
                for step in np.flatnonzero(~column).tolist():
                    sources = source_steps(column, step, self.order).tolist()
                    pairs.update((step, source) for source in sources)
        return pairs

    def _masks(self) -> dict[str, Any]:
        """The masks that there are, by name."""
        every = {"mask": self.mask, "attention": self.attention, "mlp": self.mlp}
        return {name: mask for name, mask in every.items() if mask is not None}

    def _compare_steps(self, sampler: Sampler) -> None:
        """Require a mask for as many steps as the sampler has."""
        if self.steps != sampler.steps:
            raise ValueError(
                f"the step cache is for {self.steps} steps, but the sampler has "
                f"{sampler.steps}: calibrate one for it, or make one with "
                f"StepCache.every(steps={sampler.steps}, n=2)."
            )


_UNPIN = (
    "take its masks for these all the same with dataclasses.replace(step_cache, "
    "fingerprint=None, sampler=None, config=None)"
)


@functools.lru_cache(maxsize=64)
def _plans(step_cache: StepCache, sampler: Sampler) -> Plans:
    """What `StepCache.plan` returns, found again by every request."""
    masks = {
        "network": step_cache.mask,
        "attention": step_cache.attention,
        "mlp": step_cache.mlp,
    }
    skipping = {
        name: np.array(mask)
        for name, mask in masks.items()
        if mask is not None and not np.all(mask)
    }
    times = np.asarray(sampler.host_times(), np.float64)
    plans = []
    for ahead in sampler.evaluations:
        visited = times[ahead : ahead + sampler.steps]
        weights = {
            name: extrapolation(visited, mask, step_cache.order)
            for name, mask in skipping.items()
        }
        plans.append(
            Plan(**{name: Recall(skipping[name], weights[name]) for name in weights})
        )
    for array in jax.tree.leaves(plans):
        array.setflags(write=False)
    return tuple(plans)


def _tuples(name: str, value: Any, order: int) -> Any:
    """A mask as tuples of booleans, checked."""
    mask = np.asarray(value)
    if mask.dtype != np.bool_:
        raise TypeError(
            f"`{name}` must hold a boolean per step, True where it computes, got "
            f"{_checks.shape_text(mask)}; from a list of steps, make one with "
            "np.isin(np.arange(steps), list)."
        )
    axes = (1,) if name == "mask" else (1, 2)
    if mask.ndim not in axes or not mask.size:
        shapes = "[steps]" if name == "mask" else "[steps] or [steps, depth]"
        raise ValueError(f"`{name}` must have shape {shapes}, got {list(mask.shape)}.")
    if not mask[: order + 1].all():
        early = int(np.argwhere(~mask)[0, 0])
        raise ValueError(
            f"`{name}` skips step {early}, but with order={order} the first "
            f"{order + 1} of the {len(mask)} steps must compute."
        )
    if mask.ndim == 1:
        return tuple(mask.tolist())
    return tuple(tuple(row) for row in mask.tolist())
