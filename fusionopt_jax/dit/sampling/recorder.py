"""What `calibrate` keeps of a walk: the inner products of its residuals.

Residuals are large and products of them are few. So of each step the host is handed
some of the numbers of its residuals, and multiplies them once the walk is over.
"""

from typing import Any

import jax
import numpy as np
from jax.experimental import io_callback
from jaxtyping import Array

from fusionopt_jax.dit.network.residuals import Plan, Recall
from fusionopt_jax.dit.sampling.remembering import Remembering
from fusionopt_jax.dit.sampling.sampler import Sampler

NUMBERS = 2**16
"""Most numbers that are kept of the residual of one step; of larger ones as many are
picked at random, which finds a relative error to a per cent of itself."""


class Recorder:
    """Sees every residual of a walk, and keeps some of its numbers.

    Attributes:
        sampler: The walk.
        branches: Whether the residuals are those of branches, a pair of trees whose
            leaves have a leading axis of blocks.

    Example:
        >>> import jax.numpy as jnp
        >>> from fusionopt_jax import dit
        >>> from fusionopt_jax.dit.sampling.remembering import remembering
        >>> recorder = Recorder(dit.Sampler.euler(steps=2), branches=False)
        >>> network = remembering(lambda image, time, condition: image * time / 1000)
        >>> samples = dit.run_sampler(
        ...     recorder.sampler,
        ...     recorder.watch(network),
        ...     jnp.ones((1, 1, 1, 1)),
        ...     step_cache=recorder.plans(),
        ... )
        >>> recorder.products()["mask"][0].tolist()
        [[[1.0, 0.25], [0.25, 0.0625]]]
    """

    def __init__(self, sampler: Sampler, branches: bool) -> None:
        self.sampler = sampler
        self.branches = branches
        self._seen: list[Any] = []

    def plans(self) -> tuple[Plan, ...]:
        """Compute everything, and keep the last residual.

        Returns:
            A plan for each evaluation in a step, as `StepCache.plan` returns them.
        """
        steps = self.sampler.steps
        recall = Recall(np.ones(steps, bool), np.ones((steps, 1)))
        plan = (
            Plan(attention=recall, mlp=recall)
            if self.branches
            else Plan(network=recall)
        )
        return (plan,) * len(self.sampler.evaluations)

    def watch(self, network: Remembering) -> Remembering:
        """The same network, which shows what it keeps.

        Args:
            network: A network that asks the plan for the residuals.

        Returns:
            What `run_sampler` walks with, under `plans`.
        """

        def denoise(
            image: Array, time: Array, condition: Any, plan: Plan, kept: Any
        ) -> tuple[Array, Any]:
            """Evaluate it, and hand some numbers of its residuals to the host."""
            output, kept = network.denoise(image, time, condition, plan, kept)
            io_callback(self._seen.append, None, self._picked(kept), ordered=True)
            return output, kept

        return Remembering(denoise)

    def _picked(self, kept: Any) -> dict[str, list[Array]]:
        """By masks the newest residuals, each [streams, numbers]."""
        if not self.branches:
            return {"mask": [_some(leaf[:1]) for leaf in jax.tree.leaves(kept)]}
        names = ("attention", "mlp")
        return {
            name: [_some(leaf[:, 0]) for leaf in jax.tree.leaves(branch)]
            for name, branch in zip(names, kept, strict=True)
        }

    def products(self) -> dict[str, list[np.ndarray]]:
        """Inner products of the residuals of all steps, for each evaluation.

        Returns:
            By masks, for each evaluation in a step float64 of shape [streams, steps,
            steps], as `Residuals.products` has them.

        Raises:
            ValueError: If residuals are not finite.
        """
        jax.effects_barrier()
        every = len(self.sampler.evaluations)
        return {
            name: [
                _products([seen[name] for seen in self._seen[place::every]])
                for place in range(every)
            ]
            for name in self._seen[0]
        }


def _some(residuals: Array) -> Array:
    """All numbers of each residual, or `NUMBERS` of them, the same in every step."""
    flat = residuals.reshape(len(residuals), -1)
    if flat.shape[1] <= NUMBERS:
        return flat
    places = np.random.default_rng(0).choice(flat.shape[1], NUMBERS, replace=False)
    return flat[:, np.sort(places)]


def _products(steps: list[list[Any]]) -> np.ndarray:
    """[streams, steps, steps] of the residuals that each step showed."""
    products = []
    for leaves in zip(*steps, strict=True):
        # In float64: a small error is the difference of large products.
        values = np.stack(leaves, axis=1).astype(np.float64)
        bad = ~np.isfinite(values).all(axis=(0, 2))
        if bad.any():
            raise ValueError(
                f"the residuals of step {np.flatnonzero(bad)[0]} hold NaN or infinite "
                "numbers, so no error can be measured; look for them in the weights "
                "and the noise."
            )
        products.append(values @ values.transpose(0, 2, 1))
    return np.concatenate(products)
