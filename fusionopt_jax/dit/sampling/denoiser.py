"""A DiT as the function that a sampler walks with: its cache and its guidance."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from fusionopt_jax._types import Params
from fusionopt_jax.dit.cache.dit import TimeConditioningCache
from fusionopt_jax.dit.config import DiTConfig
from fusionopt_jax.dit.network.model import apply
from fusionopt_jax.dit.network.modulation import CachedModulation
from fusionopt_jax.dit.sampling.flow import FLOW_TIME_SCALE
from fusionopt_jax.dit.sampling.guidance import Guidance, guide, paired
from fusionopt_jax.dit.sampling.sampler import Sampler


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
) -> Callable[[Array, Array, Any], Array]:
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
        A function of images, a scalar model time and one slice of `cached_tables`.

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
        >>> denoise(jnp.ones((1, 4, 4, 4)), jnp.float32(999.0), None).shape
        (1, 4, 4, 8)
    """

    def network(labels: Int[Array, " images"]) -> Callable[[Array, Array, Any], Array]:
        """The model for images of these labels, through the cache if there is one."""
        rows = None if cache is None else cache.rows(labels)

        def evaluate(images: Array, time: Array, tables: Any) -> Array:
            """Its prediction at one time."""
            modulation = None
            if rows is not None:
                block, final = tables
                modulation = CachedModulation(block, final, rows)
            return apply(
                params,
                config,
                images,
                jnp.full(images.shape[:1], time),
                labels,
                modulation=modulation,
                dtype=dtype,
                unroll=unroll,
            )

        return evaluate

    plain = network(labels)
    if guidance is None:
        return plain
    pairs = network(paired(labels, config.null_label))
    channels = guidance.channels or config.in_channels

    def guided(images: Array, time: Array, tables: Any) -> Array:
        """The prediction pushed away from that of the null label."""
        return guide(
            lambda both: pairs(both, time, tables), images, cfg_scale, channels
        )

    if guidance.interval is None:
        return guided
    low, high = (edge * FLOW_TIME_SCALE for edge in guidance.interval)

    def sometimes_guided(images: Array, time: Array, tables: Any) -> Array:
        """Guided within the interval; outside, the null label is not evaluated."""
        inside = (low <= time) & (time <= high)
        return jax.lax.cond(inside, guided, plain, images, time, tables)

    return sometimes_guided
