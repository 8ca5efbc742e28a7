"""A DiT as the function that a sampler walks with: its cache and its guidance."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from fusionopt_jax._types import Params
from fusionopt_jax.dit.cache.dit import TimeConditioningCache
from fusionopt_jax.dit.config import DiTConfig
from fusionopt_jax.dit.network.model import recalling_apply
from fusionopt_jax.dit.network.modulation import CachedModulation
from fusionopt_jax.dit.network.residuals import Plan
from fusionopt_jax.dit.sampling.flow import FLOW_TIME_SCALE
from fusionopt_jax.dit.sampling.guidance import Guidance, guide, paired
from fusionopt_jax.dit.sampling.remembering import Remembering
from fusionopt_jax.dit.sampling.sampler import Sampler
from fusionopt_jax.dit.sampling.step_cache import StepCache


def cached_tables(cache: TimeConditioningCache | None, sampler: Sampler) -> Any:
    """What a sampling loop scans over: the tables of the cache, a slice per time.

    Args:
        cache: The cache, or None.
        sampler: Whose times the cache was built for.

    Returns:
        Arrays with a leading axis like `sampler.eval_times()`, or None.

    Example:
        >>> from fusionopt_jax import dit
        >>> cached_tables(None, dit.Sampler.euler(4))
    """
    if cache is None:
        return None
    # A cache may hold one entry for time 0 beyond what the sampler visits.
    count = len(sampler.host_times())
    return cache.block[:count], cache.final[:count]


def denoiser(
    params: Params,
    config: DiTConfig,
    cache: TimeConditioningCache | None,
    labels: Int[Array, " batch"],
    cfg_scale: Float[Array, "..."],
    *,
    guidance: Guidance | None,
    dtype: DTypeLike = jnp.float32,
    unroll: bool = False,
) -> Remembering:
    """A DiT as `run_sampler` calls it.

    The rows of the cache that the labels use are looked up here, once, not at each
    step.

    Args:
        params: Parameters, without the modulators if there is a cache.
        config: Sizes of the model.
        cache: What takes the place of the modulators, or None.
        labels: [batch] of integers.
        cfg_scale: Guidance scale, a scalar or one per image.
        guidance: What is guided and when, or None for no guidance.
        dtype: Type of the operands of the large products.
        unroll: Write the blocks out.

    Returns:
        A network of images, a scalar model time and one slice of `cached_tables`, that
        shows a step cache all of its blocks and each of their branches. With guidance
        it keeps the residuals of each pair. Within an interval the first step, and as
        many more as an extrapolation needs, must then compute: outside, there is no
        null label whose residual could be kept (`check_interval`).

    Example:
        >>> from fusionopt_jax import dit
        >>> config = dit.DiTConfig(input_size=4, hidden_size=32, depth=1, num_heads=2)
        >>> denoise = denoiser(
        ...     dit.init_params(config),
        ...     config,
        ...     None,
        ...     jnp.array([207]),
        ...     jnp.float32(4.0),
        ...     guidance=Guidance(),
        ... )
        >>> from fusionopt_jax.dit.network.residuals import EXACT
        >>> image, time = jnp.ones((1, 4, 4, 4)), jnp.float32(999.0)
        >>> denoise.denoise(image, time, None, EXACT, None)[0].shape
        (1, 4, 4, 8)
    """

    def network(labels: Int[Array, " images"]) -> _Network:
        """The model for images of these labels, through the cache if there is one."""
        rows = None if cache is None else cache.rows(labels)

        def evaluate(
            images: Array, time: Array, tables: Any, plan: Plan, kept: Any
        ) -> tuple[Array, Any]:
            """Its prediction at one time, and what it keeps."""
            modulation = None
            if rows is not None:
                block, final = tables
                modulation = CachedModulation(block, final, rows)
            return recalling_apply(
                params,
                config,
                images,
                jnp.full(images.shape[:1], time),
                labels,
                plan=plan,
                kept=kept,
                modulation=modulation,
                dtype=dtype,
                unroll=unroll,
            )

        return evaluate

    plain = network(labels)
    if guidance is None:
        return Remembering(plain)
    pairs = network(paired(labels, config.null_label))
    channels = guidance.channels or config.in_channels

    def guided(
        images: Array, time: Array, tables: Any, plan: Plan, kept: Any
    ) -> tuple[Array, Any]:
        """The prediction pushed away from that of the null label."""
        after: Any = None

        def both(images: Array) -> Array:
            """The network on pairs."""
            nonlocal after
            output, after = pairs(images, time, tables, plan, kept)
            return output

        return guide(both, images, cfg_scale, channels), after

    if guidance.interval is None:
        return Remembering(guided)
    low, high = (edge * FLOW_TIME_SCALE for edge in guidance.interval)

    def unguided(
        images: Array, time: Array, tables: Any, plan: Plan, kept: Any
    ) -> tuple[Array, Any]:
        """The prediction of the label alone, whose residuals fill those of pairs."""
        # The axis of the batch, before tokens and width.
        halves = jax.tree.map(lambda leaf: leaf[..., ::2, :, :], kept)
        output, halves = plain(images, time, tables, plan, halves)
        return output, jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, -3), halves)

    def sometimes_guided(
        images: Array, time: Array, tables: Any, plan: Plan, kept: Any
    ) -> tuple[Array, Any]:
        """Guided within the interval; outside, the null label is not evaluated."""
        if kept is None and jax.tree.leaves(plan):
            return guided(images, time, tables, plan, None)
        inside = (low <= time) & (time <= high)
        return jax.lax.cond(inside, guided, unguided, images, time, tables, plan, kept)

    return Remembering(sometimes_guided)


_Network: TypeAlias = Callable[[Array, Array, Any, Plan, Any], tuple[Array, Any]]
"""A network as `Remembering` has it."""


def check_interval(
    step_cache: StepCache | None, sampler: Sampler, guidance: Guidance | None
) -> None:
    """Require residuals of pairs where a guidance interval recalls them.

    Args:
        step_cache: The step cache, or None.
        sampler: The walk.
        guidance: What is guided and when.

    Raises:
        ValueError: If a step within the interval is extrapolated from one outside.

    Example:
        >>> from fusionopt_jax import dit
        >>> late, guidance = dit.StepCache.every(4, 2), Guidance(interval=(0.0, 0.8))
        >>> check_interval(late, dit.Sampler.euler(4), guidance)
        Traceback (most recent call last):
        ...
        ValueError: step 1 lies within `guidance_interval` and recalls step 0, which ...
    """
    if step_cache is None or guidance is None or guidance.interval is None:
        return
    low, high = (np.float32(edge * FLOW_TIME_SCALE) for edge in guidance.interval)
    times = sampler.host_times()
    inside = (low <= times) & (times <= high)
    for ahead in sampler.evaluations:
        here = inside[ahead : ahead + sampler.steps]
        for step, source in step_cache.recalled():
            if here[step] and not here[source]:
                raise ValueError(
                    f"step {step} lies within `guidance_interval` and recalls step "
                    f"{source}, which lies outside, where the null label is not "
                    f"evaluated; compute the first {step_cache.order + 1} step(s) "
                    "within the interval."
                )
