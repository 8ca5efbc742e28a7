r"""A residual that some steps compute and the others recall.

Along a sampler's walk, what a stack of layers adds to its input changes little from one
step to the next. So it need not be computed in each of them. With the residuals
:math:`r_j` that were computed last, at times :math:`t_j`, a step at time :math:`t` that
is skipped uses

.. math:: r(t) \approx \sum_j w_j(t)\, r_j

whose weights are known before the walk begins, as is the list of the steps that
compute. A layer knows neither the list nor how the weights came about: it is handed one
`Recall` per evaluation, asks it for its residual, and returns what is to be kept for
the next.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array


class Recall(NamedTuple):
    """Whether one evaluation computes a residual, and what it uses if not.

    Called as `residual, kept = recall(branch, kept, *operands)`. The program has a
    conditional around the branch: an evaluation that recalls does not run it.

    Attributes:
        compute: Boolean scalar: whether this evaluation computes. None computes always
            and keeps nothing.
        weights: `[kept]`, of the kept residuals, newest first; 1, 0, ... where this
            evaluation computes.

    Example:
        >>> kept = jnp.stack([jnp.full(2, 5.0), jnp.full(2, 3.0)])  # newest first
        >>> recall = Recall(jnp.array(False), jnp.array([2.0, -1.0]))
        >>> residual, kept = recall(jnp.sin, kept, jnp.ones(2))
        >>> residual.tolist()
        [7.0, 7.0]
        >>> residual, kept = Recall()(jnp.square, None, jnp.full(2, 3.0))
        >>> residual.tolist()
        [9.0, 9.0]
    """

    compute: Any = None
    weights: Any = None

    def __call__(
        self, branch: Callable[..., Array], kept: Array | None, *operands: Array
    ) -> tuple[Array, Array | None]:
        """The residual of this evaluation, computed or recalled.

        Args:
            branch: From `operands` to the residual, an array of any shape.
            kept: `[kept, *residual]`, what the evaluation before returned as such; None
                before the first, which then computes.
            operands: What the branch reads; it may close over anything else.

        Returns:
            The residual, and what the next evaluation is handed as `kept`.
        """
        if self.compute is None:
            return branch(*operands), None
        if kept is None:
            fresh = branch(*operands)
            return fresh, jnp.stack([fresh] * self.weights.shape[-1])

        def renew(kept: Array, *operands: Array) -> Array:
            """Compute, and let go of the oldest."""
            return jnp.concatenate([branch(*operands)[None], kept[:-1]])

        def keep(kept: Array, *_: Array) -> Array:
            """Leave everything as it is."""
            return kept

        after: Array = jax.lax.cond(self.compute, renew, keep, kept, *operands)
        if len(after) == 1:
            return after[0], after
        # Not a matrix product, which accelerators may round to fewer bits.
        weights = self.weights.astype(after.dtype)
        residual = weights[0] * after[0]
        for weight, earlier in zip(weights[1:], after[1:], strict=True):
            residual = residual + weight * earlier
        return residual, after


class Plan(NamedTuple):
    """What one evaluation of a network is told: where it computes and where it recalls.

    Attributes:
        network: For all that is between the embedding and the last map, together.
        attention: For the attention of each block; compute is a scalar or `[depth]`.
        mlp: For the MLP of each block; likewise.
    """

    network: Recall = Recall()
    attention: Recall = Recall()
    mlp: Recall = Recall()


EXACT = Plan()
"""Compute everything and keep nothing."""


def per_block(recall: Recall, depth: int) -> Recall:
    """A `Recall` with a leading axis of blocks, for a loop over them.

    Args:
        recall: For all blocks alike, or with that axis already.
        depth: Number of blocks.

    Returns:
        `compute` of shape `[depth]` and `weights` of shape `[depth, kept]`.

    Example:
        >>> recall = Recall(jnp.array(True), jnp.array([1.0, 0.0]))
        >>> per_block(recall, 3).weights.shape
        (3, 2)
    """
    if recall.compute is None:
        return recall
    return Recall(
        jnp.broadcast_to(recall.compute, (depth,)),
        jnp.broadcast_to(recall.weights, (depth, recall.weights.shape[-1])),
    )
