"""Networks that show a step cache what they add, so that it can be recalled."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxtyping import Array

from fusionopt_jax.dit.network.residuals import Plan


@dataclasses.dataclass(frozen=True)
class Remembering:
    """A network with inner residuals that a step cache can recall.

    Attributes:
        denoise: Called as `denoise(image, time, condition, plan, kept)`; returns the
            prediction, and what is to be handed on as `kept`. It asks `plan.network`,
            `plan.attention` and `plan.mlp`, as far as it has such residuals, for each
            of them: `residual, kept = plan.network(branch, kept, *operands)`. Before
            the first step `kept` is None, and where nothing is skipped it stays so.

    Example:
        >>> import jax.numpy as jnp
        >>> from fusionopt_jax import dit
        >>> def denoise(image, time, condition, plan, kept):
        ...     tokens = 2.0 * image
        ...     residual, kept = plan.network(jnp.sin, kept, tokens)
        ...     return (tokens + residual) * time / 1000, kept
        >>> samples = dit.run_sampler(
        ...     dit.Sampler.euler(4),
        ...     dit.Remembering(denoise),
        ...     jnp.ones((1, 2, 2, 3)),
        ...     step_cache=dit.StepCache(mask=[True, False, True, False]),
        ... )
        >>> samples.images.shape
        (1, 2, 2, 3)
    """

    denoise: Callable[[Array, Array, Any, Plan, Any], tuple[Array, Any]]


def remembering(denoise: Remembering | Callable[..., Array]) -> Remembering:
    """Any network as one that remembers: of a plain one, the whole prediction.

    Args:
        denoise: A `Remembering`, or a function as `run_sampler` takes it, whose
            prediction is then the residual that `plan.network` recalls.

    Returns:
        A `Remembering`.

    Example:
        >>> import jax.numpy as jnp
        >>> from fusionopt_jax.dit.network.residuals import EXACT
        >>> network = remembering(lambda image, time, condition: image * time)
        >>> network.denoise(jnp.array(2.0), jnp.array(3.0), None, EXACT, None)
        (Array(6., dtype=float32, weak_type=True), None)
    """
    if isinstance(denoise, Remembering):
        return denoise

    def whole(
        image: Array, time: Array, condition: Any, plan: Plan, kept: Any
    ) -> tuple[Array, Any]:
        """The prediction itself is what is kept."""
        if (plan.attention.compute, plan.mlp.compute) != (None, None):
            raise ValueError(
                "the step cache has `attention` or `mlp`, but this network shows no "
                "such branches: give StepCache(mask=...), or wrap a function that asks "
                "the plan for them in dit.Remembering."
            )
        return plan.network(lambda image: denoise(image, time, condition), kept, image)

    return Remembering(whole)
