"""From noise and labels to images: the model, the cache and the sampler in one program.

`sample` joins three things that know nothing of each other. A `Sampler` walks over its
times (`loop`); the network predicts, and the cache, if there is one, supplies what
conditioning would compute (`denoiser`). All of it is one compiled program. The cache
enters it as an argument that `lax.scan` cuts into steps: closed over, it would become a
constant of the executable, which would then be compiled anew for every request.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from fusionopt_jax import _checks
from fusionopt_jax._types import Params
from fusionopt_jax.dit.cache.dit import TimeConditioningCache
from fusionopt_jax.dit.config import DiTConfig
from fusionopt_jax.dit.network.embeddings import check_labels
from fusionopt_jax.dit.sampling.denoiser import cached_tables, check_interval, denoiser
from fusionopt_jax.dit.sampling.guidance import (
    Guidance,
    GuidedChannels,
    asked_guidance,
)
from fusionopt_jax.dit.sampling.loop import Samples, run_sampler
from fusionopt_jax.dit.sampling.sampler import Sampler
from fusionopt_jax.dit.sampling.step_cache import Plans, StepCache

ProgressCallback: TypeAlias = Callable[[int, int], Any]
"""Called with the number of finished steps and the number of all steps."""

_listeners: dict[int, tuple[ProgressCallback, int]] = {}
_tickets = itertools.count()


@overload
def sample(
    params: Params,
    config: DiTConfig,
    cache: TimeConditioningCache | None,
    noise: Float[Array | np.ndarray, "batch height width channels"],
    labels: Int[Array | np.ndarray, " batch"] | Sequence[int],
    sampler: Sampler,
    cfg_scale: float | Float[Array, ""] | Float[Array, " batch"] = ...,
    *,
    cfg_channels: GuidedChannels = ...,
    guidance_interval: tuple[float, float] | None = ...,
    step_cache: StepCache | None = ...,
    key: PRNGKeyArray | None = ...,
    dtype: DTypeLike = ...,
    unroll: bool = ...,
    progress: ProgressCallback | None = ...,
    previews: None = ...,
    donate: bool = ...,
) -> Float[Array, "batch height width channels"]: ...


@overload
def sample(
    params: Params,
    config: DiTConfig,
    cache: TimeConditioningCache | None,
    noise: Float[Array | np.ndarray, "batch height width channels"],
    labels: Int[Array | np.ndarray, " batch"] | Sequence[int],
    sampler: Sampler,
    cfg_scale: float | Float[Array, ""] | Float[Array, " batch"] = ...,
    *,
    cfg_channels: GuidedChannels = ...,
    guidance_interval: tuple[float, float] | None = ...,
    step_cache: StepCache | None = ...,
    key: PRNGKeyArray | None = ...,
    dtype: DTypeLike = ...,
    unroll: bool = ...,
    progress: ProgressCallback | None = ...,
    previews: int,
    donate: bool = ...,
) -> Samples: ...


def sample(
    params: Params,
    config: DiTConfig,
    cache: TimeConditioningCache | None,
    noise: Float[Array | np.ndarray, "batch height width channels"],
    labels: Int[Array | np.ndarray, " batch"] | Sequence[int],
    sampler: Sampler,
    cfg_scale: float | Float[Array, ""] | Float[Array, " batch"] = 1.5,
    *,
    cfg_channels: GuidedChannels = None,
    guidance_interval: tuple[float, float] | None = None,
    step_cache: StepCache | None = None,
    key: PRNGKeyArray | None = None,
    dtype: DTypeLike = jnp.float32,
    unroll: bool = False,
    progress: ProgressCallback | None = None,
    previews: int | None = None,
    donate: bool = False,
) -> Float[Array, "batch height width channels"] | Samples:
    r"""Sample images of the given labels, as one compiled program.

    With the network's prediction :math:`f`, guidance scale :math:`s` (`cfg_scale`) and
    the null label :math:`\varnothing`, each evaluation uses :math:`f(x,\varnothing) +
    s\,(f(x,y) - f(x,\varnothing))`.

    A second call with other labels, noise, key or guidance scale compiles nothing, as
    long as the cache has the same bucket of labels. Nothing is read from a cache that
    does not fit: weights, times and labels are compared first.

    Args:
        params: Parameters, with the modulators or, given a cache, without
            (`strip_modulators`).
        config: Sizes of the model.
        cache: What `build_cache` made for `sampler.eval_times()` and these labels, or
            None to compute the modulation in every step.
        noise: Standard normal, [batch, input_size, input_size, in_channels]. It is
            copied unless `donate`. Sharded on the batch axis, the images are too.
        labels: [batch] of integers in [0, num_classes]; num_classes is the null label.
        sampler: The walk; see `Sampler`.
        cfg_scale: 1 samples without guidance, at half the cost. Larger is more typical
            and less varied. A scalar, or one per image; an array is guided whatever its
            values.
        cfg_channels: None guides every channel; 3 only the first three, as the
            published code does, whose scale of 1.5 is about 1.375 on all four.
        guidance_interval: Guide only where the model time over 1000 lies in this closed
            interval of [0, 1] (1 is noise, or the image for a sampler with the data at
            one); elsewhere the null label is not evaluated.
        step_cache: Which steps compute the network's blocks; the others extrapolate
            what those added. An approximation, unlike `cache`; see `StepCache`. Another
            one of the same kind and order compiles nothing.
        key: Randomness of `Sampler.ddpm`, of `Sampler.sit_sde`, and of `Sampler.ddim`
            with eta above 0.
        dtype: Type of the operands of the large products; sums and images are float32.
        unroll: Write the blocks out for a lower latency; compiles longer.
        progress: Called on the host as steps finish, with their number and the total;
            not necessarily in order. Waits for the images before it returns.
        previews: Number of clean predictions to return along the way; None returns the
            images alone.
        donate: Whether `noise` may be overwritten. Only for an array used nowhere else.

    Returns:
        Images, [batch, height, width, channels], float32, or `Samples` with the
        previews if `previews` is a number. The range is the model's: a latent model
        returns latents, which its autoencoder decodes.

    Raises:
        StaleCacheError: If the cache was built for other weights, times or labels, or
            without the null label that guidance needs, or if the step cache was chosen
            for another model or another sampler. Inside your own `jax.jit`, with
            weights or cache as its arguments, values can't be an error: the program
            compares them, and the images are NaN if the cache does not fit.
        ValueError: If a shape, a label or a setting does not fit, if the sampler needs
            a `key` and has none, or a learned variance that the model does not predict,
            if the step cache is for another number of steps, or if settings of the
            guidance are given without guidance.

    Example:
        >>> from fusionopt_jax import dit
        >>> config = dit.DiTConfig(
        ...     input_size=4, hidden_size=32, depth=1, num_heads=2, num_classes=10
        ... )
        >>> params = dit.init_params(config)
        >>> noise = jax.random.normal(jax.random.key(0), (2, 4, 4, 4))
        >>> sampler = dit.Sampler.euler(steps=2)
        >>> cache = dit.build_cache(params, config, sampler.eval_times(), [3, 7])
        >>> weights = dit.strip_modulators(params)
        >>> sample(weights, config, cache, noise, [3, 7], sampler).shape
        (2, 4, 4, 4)

    Source:
        Ho & Salimans 2022, "Classifier-Free Diffusion Guidance", equation 6, with
        :math:`s = 1 + w`; the interval is that of Kynkäänniemi et al. 2024.
    """
    noise = jnp.asarray(noise, jnp.float32)
    labels = jnp.asarray(labels)
    check_variance(config, sampler)
    check_request(config, noise, labels, cfg_scale)
    guidance = asked_guidance(cfg_scale, cfg_channels, guidance_interval)
    if cache is not None:
        wanted = labels
        if guidance is not None and not isinstance(labels, Tracer):
            wanted = np.append(np.asarray(labels), config.null_label)
        cache = cache.checked(params, config, times=sampler.host_times(), labels=wanted)
    plans = planned(step_cache, params, config, sampler, guidance)
    ticket = next(_tickets)
    if progress is not None:
        _listeners[ticket] = (progress, sampler.steps)
    program = _run_donating if donate else _run
    try:
        samples = program(
            params,
            cache,
            noise,
            labels,
            jnp.asarray(cfg_scale, jnp.float32),
            key,
            # The callback is found by this number: as a static argument, every new
            # callback would compile the program again.
            jnp.asarray(ticket, jnp.int32),
            plans,
            config=config,
            sampler=sampler,
            guidance=guidance,
            dtype=jnp.dtype(dtype),
            unroll=unroll,
            reports=progress is not None,
            previews=previews or 0,
        )
        if progress is not None:
            jax.block_until_ready(samples)
            jax.effects_barrier()
    finally:
        _listeners.pop(ticket, None)
    return samples.images if previews is None else samples


def _program(
    params: Params,
    cache: TimeConditioningCache | None,
    noise: Float[Array, "batch height width channels"],
    labels: Int[Array, " batch"],
    cfg_scale: Float[Array, "..."],
    key: PRNGKeyArray | None,
    ticket: Int[Array, ""],
    plans: Plans | None,
    *,
    config: DiTConfig,
    sampler: Sampler,
    guidance: Guidance | None,
    dtype: DTypeLike,
    unroll: bool,
    reports: bool,
    previews: int,
) -> Samples:
    """What `sample` compiles."""

    def report(index: Array) -> None:
        """Tell the host that a step is done."""
        jax.debug.callback(_tell, ticket, index)

    return run_sampler(
        sampler,
        denoiser(
            params,
            config,
            cache,
            labels,
            cfg_scale,
            guidance=guidance,
            dtype=dtype,
            unroll=unroll,
        ),
        noise,
        conditions=cached_tables(cache, sampler),
        step_cache=plans,
        key=key,
        previews=previews,
        on_step=report if reports else None,
    )


_STATIC = (
    "config",
    "sampler",
    "guidance",
    "dtype",
    "unroll",
    "reports",
    "previews",
)
_run = jax.jit(_program, static_argnames=_STATIC)
_run_donating = jax.jit(_program, static_argnames=_STATIC, donate_argnames=("noise",))


def _tell(ticket: Any, index: Any) -> None:
    """Pass a finished step on to whoever listens to this call of `sample`."""
    listener = _listeners.get(int(ticket))
    if listener is not None:
        callback, total = listener
        callback(int(index), total)


def check_request(
    config: DiTConfig,
    noise: Array,
    labels: Array,
    cfg_scale: Any,
) -> None:
    """Require noise, labels and scales that fit the model and each other."""
    size, channels = config.input_size, config.in_channels
    if noise.ndim != 4 or noise.shape[1:] != (size, size, channels):
        raise ValueError(
            f"`noise` must have shape [batch, {size}, {size}, {channels}], got "
            f"{_checks.shape_text(noise)}; channels come last here."
        )
    if labels.shape != noise.shape[:1]:
        raise ValueError(
            f"`labels` must have shape [{noise.shape[0]}], one per image of `noise`, "
            f"got {_checks.shape_text(labels)}."
        )
    check_labels(config, labels)
    if not isinstance(cfg_scale, jax.Array):
        _checks.check_number("cfg_scale", cfg_scale, low=0.0)
    elif cfg_scale.shape not in ((), noise.shape[:1]):
        raise ValueError(
            "`cfg_scale` must be one number, or one per image of shape "
            f"[{noise.shape[0]}], got {_checks.shape_text(cfg_scale)}."
        )


def planned(
    step_cache: StepCache | None,
    params: Params,
    config: DiTConfig,
    sampler: Sampler,
    guidance: Guidance | None,
) -> Plans | None:
    """What `run_sampler` is handed for a step cache that fits the request.

    Args:
        step_cache: The step cache, or None.
        params: Parameters.
        config: Sizes of the model.
        sampler: The walk.
        guidance: What is guided and when, or None.

    Returns:
        Its plans; None if it skips nothing.

    Raises:
        StaleCacheError: If it was chosen for another model or another sampler.
        ValueError: If it is for another number of steps or blocks, or recalls residuals
            of the null label where there are none.

    Example:
        >>> from fusionopt_jax import dit
        >>> config = dit.DiTConfig(input_size=4, hidden_size=32, depth=1, num_heads=2)
        >>> params, sampler = dit.init_params(config), dit.Sampler.euler(4)
        >>> planned(dit.StepCache.every(4, 1), params, config, sampler, None)
    """
    if step_cache is None:
        return None
    step_cache.check(sampler, params, config)
    step_cache.check_depth(config.depth)
    check_interval(step_cache, sampler, guidance)
    return step_cache.plan(sampler)


def check_variance(config: DiTConfig, sampler: Sampler) -> None:
    """Require a model that predicts what the sampler reads.

    Args:
        config: Sizes of the model.
        sampler: The walk.

    Raises:
        ValueError: If the sampler reads a variance that the model does not predict.

    Example:
        >>> from fusionopt_jax import dit
        >>> check_variance(dit.CONFIGS["DiT-S/2"], dit.Sampler.ddpm())
    """
    if sampler.reads_variance and not config.learn_sigma:
        raise ValueError(
            "`sampler` reads a learned variance, which a model with learn_sigma=False "
            "does not predict; use Sampler.ddpm(variance='fixed_small') or "
            "'fixed_large'."
        )
