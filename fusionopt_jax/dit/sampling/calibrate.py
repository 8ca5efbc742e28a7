"""Which steps may be skipped: measured on a walk of the model that skips nothing.

Along such a walk, the residual that a `StepCache` would recall is known in every step,
and so is what it would be extrapolated to from any earlier steps. `record` keeps their
inner products, from which `Residuals.choose` finds the cheapest choice of steps within
a budget of error, or the one of least error at a given cost; `skip_planning` has the
equations. `calibrate` does both for a DiT.

The errors are those along the exact walk. Errors that add up on the way, and move the
walk itself, are not in them: look at samples before a budget is settled.

Source:
    The rule is ours. Ma et al. 2025, "MagCache", choose steps by the magnitudes of
    residuals from one calibration, greedily; Ma et al. 2024, "Learning-to-Cache", learn
    which layers to skip.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from fusionopt_jax._types import Params
from fusionopt_jax.dit.cache.dit import TimeConditioningCache
from fusionopt_jax.dit.cache.fingerprint import weight_digests
from fusionopt_jax.dit.config import DiTConfig
from fusionopt_jax.dit.network.model import as_dict
from fusionopt_jax.dit.sampling.denoiser import cached_tables, denoiser
from fusionopt_jax.dit.sampling.guidance import GuidedChannels, asked_guidance
from fusionopt_jax.dit.sampling.loop import run_sampler
from fusionopt_jax.dit.sampling.recorder import Recorder
from fusionopt_jax.dit.sampling.remembering import Remembering, remembering
from fusionopt_jax.dit.sampling.sample import check_request, check_variance
from fusionopt_jax.dit.sampling.sampler import Sampler
from fusionopt_jax.dit.sampling.step_cache import StepCache
from fusionopt_jax.dit.sampling.step_choice import Residuals


def calibrate(
    params: Params,
    config: DiTConfig,
    sampler: Sampler,
    labels: Int[Array | np.ndarray, " batch"] | Sequence[int],
    *,
    budget: float | None = None,
    fraction: float | None = None,
    order: int = 1,
    branches: bool = False,
    cache: TimeConditioningCache | None = None,
    noise: Float[Array | np.ndarray, "batch height width channels"] | None = None,
    cfg_scale: float | Float[Array, ""] | Float[Array, " batch"] = 1.5,
    cfg_channels: GuidedChannels = None,
    guidance_interval: tuple[float, float] | None = None,
    key: PRNGKeyArray | None = None,
    dtype: DTypeLike = jnp.float32,
) -> StepCache:
    r"""Choose the steps that a `StepCache` computes, from the model's own residuals.

    The model samples one image for each of `labels` and skips nothing. What each choice
    of steps would have recalled is then known, and with it the relative error of each
    skipped step, :math:`\|\hat r - r\| / \|r\|`. Of all choices the cheapest is
    returned whose mean error over the walk (0 where a step computes) is within
    `budget`; or, given `fraction` instead, the one of least error that leaves no more
    than this share of the work. Both are exact, not greedy.

    Args:
        params: Parameters, with the modulators or, given a cache, without.
        config: Sizes of the model.
        sampler: The walk that the step cache is for.
        labels: [batch] integers; ten or twenty images of typical labels are enough.
        budget: At least 0, which skips nothing; 0.01 to 0.05 are usual.
        fraction: In (0, 1], the share of the network's work that may be left, as in
            `StepCache.fraction`; 0.5 halves it.
        order: Order of the extrapolation, 0, 1 or 2.
        branches: Choose steps for the attention and the MLPs apart, which keeps a
            residual for each block and branch, instead of for all blocks together.
        cache: As for `sample`.
        noise: [batch, input_size, input_size, in_channels], standard normal; None draws
            it from a fixed key.
        cfg_scale: Guidance scale of the request that the step cache is for, as for
            `sample`; like the next three.
        cfg_channels: See `sample`.
        guidance_interval: See `sample`. Its first `order + 1` steps compute.
        key: Randomness of samplers that draw noise.
        dtype: Type of the operands of the large products.

    Returns:
        A step cache that knows the weights, the config and the sampler, and is refused
        with others.

    Raises:
        ValueError: If neither or both of `budget` and `fraction` are given or one is
            out of range, if the sampler has too few steps for the order or the
            fraction, if residuals are not finite, or as `sample` does.
        TypeError: If it is called inside a `jax.jit`, where nothing can be measured.

    Example:
        >>> from fusionopt_jax import dit
        >>> config = dit.DiTConfig(
        ...     input_size=4, hidden_size=32, depth=1, num_heads=2, num_classes=10
        ... )
        >>> params, sampler = dit.init_params(config), dit.Sampler.euler(steps=6)
        >>> step_cache = dit.calibrate(params, config, sampler, [3, 7], fraction=0.5)
        >>> step_cache.fraction <= 0.5, step_cache.sampler == sampler
        (True, True)
        >>> noise = jax.random.normal(jax.random.key(0), (2, 4, 4, 4))
        >>> images = dit.sample(
        ...     params, config, None, noise, [3, 7], sampler, step_cache=step_cache
        ... )

    Source:
        As the head of this module says.
    """
    # With zeros for what is measured: what can't be chosen shows before the model runs.
    steps, every = sampler.steps, len(sampler.evaluations)
    still = {"mask": [np.zeros((1, steps, steps))] * every}
    Residuals(sampler, still).choose(budget=budget, fraction=fraction, order=order)
    return measure_residuals(
        params,
        config,
        sampler,
        labels,
        branches=branches,
        cache=cache,
        noise=noise,
        cfg_scale=cfg_scale,
        cfg_channels=cfg_channels,
        guidance_interval=guidance_interval,
        key=key,
        dtype=dtype,
    ).choose(budget=budget, fraction=fraction, order=order)


def measure_residuals(
    params: Params,
    config: DiTConfig,
    sampler: Sampler,
    labels: Int[Array | np.ndarray, " batch"] | Sequence[int],
    *,
    branches: bool = False,
    cache: TimeConditioningCache | None = None,
    noise: Float[Array | np.ndarray, "batch height width channels"] | None = None,
    cfg_scale: float | Float[Array, ""] | Float[Array, " batch"] = 1.5,
    cfg_channels: GuidedChannels = None,
    guidance_interval: tuple[float, float] | None = None,
    key: PRNGKeyArray | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Residuals:
    """The measurement of `calibrate` alone, for several choices from one of it.

    Args:
        params: As for `calibrate`, like everything else here.
        config: See there.
        sampler: See there.
        labels: See there.
        branches: See there.
        cache: See there.
        noise: See there.
        cfg_scale: See there.
        cfg_channels: See there.
        guidance_interval: See there.
        key: See there.
        dtype: See there.

    Returns:
        What `Residuals.choose` needs.

    Raises:
        ValueError: As for `calibrate`.
        TypeError: As for `calibrate`.

    Example:
        >>> from fusionopt_jax import dit
        >>> config = dit.DiTConfig(
        ...     input_size=4, hidden_size=32, depth=1, num_heads=2, num_classes=10
        ... )
        >>> params, sampler = dit.init_params(config), dit.Sampler.euler(steps=6)
        >>> residuals = measure_residuals(params, config, sampler, [3, 7])
        >>> half, third = (residuals.choose(fraction=1 / n) for n in (2, 3))
    """
    labels = jnp.asarray(labels)
    if noise is None:
        shape = (len(labels), config.input_size, config.input_size, config.in_channels)
        noise = jax.random.normal(jax.random.key(0), shape)
    noise = jnp.asarray(noise, jnp.float32)
    arrays = (params, cache, noise, labels, cfg_scale, key)
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(arrays)):
        raise TypeError(
            "calibrate measures the residuals of a model, which is impossible while "
            "`jax.jit` traces it; call it outside and hand its result in."
        )
    check_variance(config, sampler)
    check_request(config, noise, labels, cfg_scale)
    guidance = asked_guidance(cfg_scale, cfg_channels, guidance_interval)
    if cache is not None:
        needed = np.asarray(labels)
        if guidance is not None:
            needed = np.append(needed, config.null_label)
        cache.check(params, config, times=sampler.host_times(), labels=needed)
    recorder = Recorder(sampler, branches)

    # Weights as arguments: closed over, they would become constants of the program.
    @jax.jit
    def walk(
        params: Params, cache: Any, noise: Array, labels: Array, scale: Array, key: Any
    ) -> Array:
        """The walk that skips nothing."""
        network = denoiser(
            params, config, cache, labels, scale, guidance=guidance, dtype=dtype
        )
        return run_sampler(
            sampler,
            recorder.watch(network),
            noise,
            conditions=cached_tables(cache, sampler),
            step_cache=recorder.plans(),
            key=key,
        ).images

    scale = jnp.asarray(cfg_scale, jnp.float32)
    jax.block_until_ready(walk(params, cache, noise, labels, scale, key))
    return Residuals(
        sampler,
        recorder.products(),
        interval=None if guidance is None else guidance.interval,
        fingerprint=weight_digests(as_dict(params)),
        config=config,
    )


def record(
    sampler: Sampler,
    denoise: Callable[[Array, Array, Any], Array] | Remembering,
    noise: Float[Array, "batch height width channels"],
    *,
    conditions: Any = None,
    key: PRNGKeyArray | None = None,
) -> Residuals:
    """Walk with any function as the network, and keep what a choice of steps needs.

    Args:
        sampler: The walk.
        denoise: As for `run_sampler`: the residual is what `plan.network` recalls of a
            `Remembering`, and the prediction of a plain function.
        noise: [batch, height, width, channels], standard normal.
        conditions: As for `run_sampler`.
        key: For samplers that draw noise.

    Returns:
        What `Residuals.choose` needs.

    Raises:
        ValueError: If residuals are not finite, or as `run_sampler` does.

    Example:
        >>> from fusionopt_jax import dit
        >>> sampler = dit.Sampler.euler(steps=6)
        >>> predict = lambda image, time, condition: image * time / 1000
        >>> residuals = record(sampler, predict, jnp.ones((1, 2, 2, 3)))
        >>> residuals.choose(fraction=0.5).mask
        (True, True, False, False, True, False)
    """
    recorder = Recorder(sampler, branches=False)
    walk = run_sampler(
        sampler,
        recorder.watch(remembering(denoise)),
        noise,
        conditions=conditions,
        step_cache=recorder.plans(),
        key=key,
    )
    jax.block_until_ready(walk.images)
    return Residuals(sampler, recorder.products())
