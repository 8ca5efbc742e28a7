"""The choice of a step cache, from the residuals of a walk that skips nothing.

`skip_planning` has the equations.
"""

import dataclasses
import itertools
from typing import Any

import numpy as np

from fusionopt_jax import _checks
from fusionopt_jax.dit.cache.fingerprint import WeightDigests
from fusionopt_jax.dit.config import DiTConfig
from fusionopt_jax.dit.sampling.extrapolation import extrapolation
from fusionopt_jax.dit.sampling.flow import FLOW_TIME_SCALE
from fusionopt_jax.dit.sampling.sampler import Sampler
from fusionopt_jax.dit.sampling.skip_planning import Walk, best_walks, run_errors
from fusionopt_jax.dit.sampling.step_cache import ATTENTION_SHARE, StepCache

LONGEST = 8
"""Most steps that are skipped in a row."""

ROUNDING = 1e-9
"""A third and two thirds of a half may add up to a little more than a half."""


@dataclasses.dataclass(frozen=True, eq=False)
class Residuals:
    """What is kept of the residuals of a walk that skips nothing.

    Attributes:
        sampler: The walk.
        products: By the names of the masks of a `StepCache`, and for each evaluation in
            a step, the inner products of the residuals of all steps, [streams, steps,
            steps]: one stream for the network, one a block for a branch.
        interval: Guidance interval of the request, or None.
        fingerprint: Digests of the weights; None if they are not known.
        config: Of the model; None if it is not known.

    Example:
        See :func:`record`.
    """

    sampler: Sampler
    products: dict[str, list[np.ndarray]]
    interval: tuple[float, float] | None = None
    fingerprint: WeightDigests | None = None
    config: DiTConfig | None = None

    def choose(
        self,
        *,
        budget: float | None = None,
        fraction: float | None = None,
        order: int = 1,
        longest: int = LONGEST,
    ) -> StepCache:
        """The cheapest step cache within a budget, or the best one at a cost.

        Args:
            budget: Mean over the steps of the relative error of what is recalled; see
                `calibrate`. That of two branches is the sum of theirs.
            fraction: The share of the network's work that may be left.
            order: Order of the extrapolation, 0, 1 or 2.
            longest: Most steps that are skipped in a row, at least 1.

        Returns:
            The step cache, with the sampler, the config and the digests of the weights.

        Raises:
            ValueError: As for `calibrate`.
        """
        _check_choice(budget, fraction)
        _checks.check_choice("order", order, (0, 1, 2))
        _checks.check_integer("longest", longest, low=1)
        steps = self.sampler.steps
        if budget == 0.0:
            # An error may be exactly 0 where nothing moves; still nothing is skipped.
            return self._step_cache(
                dict.fromkeys(self.products, np.ones(steps, bool)), order
            )
        if steps <= order:
            raise ValueError(
                f"with order={order} the first {order + 1} steps compute, but the "
                f"sampler has only {steps}; lower the order."
            )
        walks = {name: self._walks(name, order, longest) for name in self.products}
        found = []
        for counts in itertools.product(*walks.values()):
            chosen = dict(zip(walks, counts, strict=True))
            error = sum(walks[name][n].error for name, n in chosen.items()) / steps
            cost = sum(_cost(name, n, steps) for name, n in chosen.items())
            if budget is not None and error <= budget:
                found.append((cost, error, counts))
            elif fraction is not None and cost <= fraction + ROUNDING:
                found.append((error, cost, counts))
        if not found:
            raise ValueError(
                f"`fraction` of {fraction} of {steps} steps is out of reach: with "
                f"order={order} the first {order + 1} steps compute, and at most "
                f"{longest} are skipped in a row; raise it, or lower the order."
            )
        *_, counts = min(found)
        masks = {n: walks[n][k].mask for n, k in zip(walks, counts, strict=True)}
        return self._step_cache(masks, order)

    def _walks(self, name: str, order: int, longest: int) -> dict[int, Walk]:
        """The best walks of one mask."""
        times = np.asarray(self.sampler.host_times(), np.float64)
        total: Any = 0.0
        every = self.products[name]
        for ahead, products in zip(self.sampler.evaluations, every, strict=True):
            visited = times[ahead : ahead + self.sampler.steps]
            # Refuses times at which nothing can be extrapolated.
            extrapolation(visited, np.ones(len(visited), bool), order)
            runs = run_errors(
                products, visited, order, longest, self._computed(visited, order)
            )
            total = total + runs / len(every)
        return best_walks(total)

    def _computed(self, times: np.ndarray, order: int) -> np.ndarray:
        """The first steps within a guidance interval: no null label came before."""
        if self.interval is None:
            return np.zeros(len(times), bool)
        low, high = (np.float32(edge * FLOW_TIME_SCALE) for edge in self.interval)
        inside = (low <= times) & (times <= high)
        return inside & (np.cumsum(inside) <= order + 1)

    def _step_cache(self, masks: dict[str, np.ndarray], order: int) -> StepCache:
        """A step cache of these masks that knows what it was measured on."""
        return StepCache(
            **masks,
            order=order,
            fingerprint=self.fingerprint,
            sampler=self.sampler,
            config=self.config,
        )


def _cost(name: str, count: int, steps: int) -> float:
    """The share of the network's work of a mask that computes so many steps."""
    shares = {"mask": 1.0, "attention": ATTENTION_SHARE, "mlp": 1.0 - ATTENTION_SHARE}
    return shares[name] * count / steps


def _check_choice(budget: float | None, fraction: float | None) -> None:
    """Require a budget of error or a share of the work, in range."""
    if (budget is None) == (fraction is None):
        raise ValueError(
            "give either `budget`, the mean relative error that is allowed (0.02, "
            "say), or `fraction`, the share of the work that may be left (0.5, say)."
        )
    if budget is not None:
        _checks.check_non_negative("budget", budget)
    if fraction is not None:
        _checks.check_number("fraction", fraction, low=0.0, high=1.0, low_open=True)
