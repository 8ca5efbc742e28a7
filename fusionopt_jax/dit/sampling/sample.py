"""From noise and labels to images: the model, the cache and the sampler in one program.

`sample` joins three things that know nothing of each other. A `Sampler` walks over its
times; the network predicts; the cache, if there is one, supplies what conditioning
would compute. The whole walk is one compiled program. The cache enters it as an
argument that `lax.scan` cuts into steps: closed over, it would become a constant of the
executable, which would then be compiled anew for every request.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from fusionopt_jax import _checks
from fusionopt_jax._types import Params
from fusionopt_jax.dit.cache.dit import TimeConditioningCache
from fusionopt_jax.dit.cache.use import cache_rows, checked_cache
from fusionopt_jax.dit.config import DiTConfig
from fusionopt_jax.dit.network.model import apply, check_labels
from fusionopt_jax.dit.network.modulation import CachedModulation
from fusionopt_jax.dit.sampling import schedules
from fusionopt_jax.dit.sampling.guidance import guide
from fusionopt_jax.dit.sampling.loop import Samples, run_sampler
from fusionopt_jax.dit.sampling.sampler import Sampler

ProgressCallback: TypeAlias = Callable[[int, int], Any]
"""Called with the number of finished steps and the number of all steps."""

GuidedChannels: TypeAlias = Literal[3] | None
"""Guide every channel, or the first three as the published code does."""

_listeners: dict[int, tuple[ProgressCallback, int]] = {}
_tickets = itertools.count()


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
    key: PRNGKeyArray | None = None,
    dtype: DTypeLike = jnp.float32,
    unroll: bool = False,
    progress: ProgressCallback | None = None,
    previews: int = 0,
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
            and less varied. A scalar, or one per image.
        cfg_channels: None guides every channel; 3 only the first three, as the
            published code does, whose scale of 1.5 is about 1.375 on all four.
        guidance_interval: Guide only where the model time over 1000 lies in this closed
            interval of [0, 1] (1 is noise); elsewhere the null label is not evaluated.
        key: Randomness of `Sampler.ddpm`, and of `Sampler.ddim` with eta above 0.
        dtype: Type of the operands of the large products; sums and images are float32.
        unroll: Write the blocks out for a lower latency; compiles longer.
        progress: Called on the host as steps finish, with their number and the total;
            not necessarily in order. Waits for the images before it returns.
        previews: Number of clean predictions to return along the way.
        donate: Whether `noise` may be overwritten. Only for an array used nowhere else.

    Returns:
        Images, [batch, height, width, channels], float32, or `Samples` with the
        previews if `previews` is above 0. The range is the model's: a latent model
        returns latents, which its autoencoder decodes.

    Raises:
        StaleCacheError: If the cache was built for other weights, times or labels, or
            without the null label that guidance needs. Inside your own `jax.jit`, with
            weights or cache as its arguments, values can't be an error: the program
            compares them, and the images are NaN if the cache does not fit.
        ValueError: If a shape, a label or a setting does not fit, if the sampler needs
            a `key` and has none, or a learned variance that the model does not predict.

    Example:
        >>> from fusionopt_jax import dit
        >>> config = dit.DiTConfig(
        ...     input_size=4, hidden_size=32, depth=1, num_heads=2, num_classes=10
        ... )
        >>> params = dit.init_params(config)
        >>> noise = jax.random.normal(jax.random.key(0), (2, 4, 4, 4))
        >>> sampler = Sampler.euler(steps=2)
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
    guided = not (isinstance(cfg_scale, int | float) and cfg_scale == 1.0)
    interval = check_sampler(config, sampler, cfg_channels, guidance_interval)
    _check_request(config, noise, labels, cfg_scale)
    if guided:
        # Raises where the model has no null label to guide with.
        _ = config.null_label
    if cache is not None:
        wanted = labels
        if guided and not isinstance(labels, Tracer):
            wanted = np.append(np.asarray(labels), config.null_label)
        cache = checked_cache(
            cache, params, config, times=sampler.host_times(), labels=wanted
        )
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
            config=config,
            sampler=sampler,
            guided=guided,
            cfg_channels=cfg_channels,
            interval=interval,
            dtype=jnp.dtype(dtype),
            unroll=unroll,
            reports=progress is not None,
            previews=previews,
        )
        if progress is not None:
            jax.block_until_ready(samples)
            jax.effects_barrier()
    finally:
        _listeners.pop(ticket, None)
    return samples if previews else samples.images


def walk(
    params: Params,
    cache: TimeConditioningCache | None,
    noise: Float[Array, "batch height width channels"],
    labels: Int[Array, " batch"],
    cfg_scale: Float[Array, "..."],
    key: PRNGKeyArray | None,
    ticket: Int[Array, ""] | None = None,
    *,
    config: DiTConfig,
    sampler: Sampler,
    guided: bool,
    cfg_channels: GuidedChannels = None,
    interval: tuple[float, float] | None = None,
    dtype: DTypeLike = jnp.float32,
    unroll: bool = False,
    reports: bool = False,
    previews: int = 0,
) -> Samples:
    """The program of `sample`, without its checks: pure, to be jitted or exported."""
    channels = noise.shape[-1]
    steps = None
    if cache is not None:
        # A cache may hold one entry for time 0 beyond what the sampler visits.
        count = len(sampler.host_times())
        steps = (cache.block[:count], cache.final[:count])

    def network(
        images: Array, time: Array, step: Any, image_labels: Array
    ) -> Float[Array, "images height width outputs"]:
        """The prediction for every image, through the cache if there is one."""
        modulation = None
        if cache is not None:
            modulation = CachedModulation(
                step[0], step[1], cache_rows(cache, image_labels)
            )
        times = jnp.full(images.shape[:1], time)
        return apply(
            params,
            config,
            images,
            times,
            image_labels,
            modulation=modulation,
            dtype=dtype,
            unroll=unroll,
        )

    def plain(image: Array, time: Array, step: Any) -> Array:
        """The prediction of the labels alone."""
        return network(image, time, step, labels)

    def with_guidance(image: Array, time: Array, step: Any) -> Array:
        """The prediction pushed away from that of the null label."""
        # Pairs lie side by side, not in two halves: on a batch that is sharded, both
        # members of a pair are then on one device.
        null = jnp.full_like(labels, config.num_classes)
        pairs = jnp.stack([labels, null], axis=1).reshape(-1)
        output = network(jnp.repeat(image, 2, axis=0), time, step, pairs)
        output = output.reshape(image.shape[0], 2, *output.shape[1:])
        return guide(output[:, 0], output[:, 1], cfg_scale, cfg_channels or channels)

    def denoise(image: Array, time: Array, step: Any) -> Array:
        """The prediction that the sampler sees."""
        if not guided:
            return plain(image, time, step)
        if interval is None:
            return with_guidance(image, time, step)
        low, high = (edge * schedules.FLOW_TIME_SCALE for edge in interval)
        inside = (low <= time) & (time <= high)
        return jax.lax.cond(inside, with_guidance, plain, image, time, step)

    def report(index: Array) -> None:
        """Tell the host that a step is done."""
        jax.debug.callback(_tell, ticket, index)

    return run_sampler(
        sampler,
        denoise,
        noise,
        conditions=steps,
        key=key,
        previews=previews,
        on_step=report if reports else None,
    )


_STATIC = (
    "config",
    "sampler",
    "guided",
    "cfg_channels",
    "interval",
    "dtype",
    "unroll",
    "reports",
    "previews",
)
_run = jax.jit(walk, static_argnames=_STATIC)
_run_donating = jax.jit(walk, static_argnames=_STATIC, donate_argnames=("noise",))


def _tell(ticket: Any, index: Any) -> None:
    """Pass a finished step on to whoever listens to this call of `sample`."""
    listener = _listeners.get(int(ticket))
    if listener is not None:
        callback, total = listener
        callback(int(index), total)


def _check_request(
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


def check_sampler(
    config: DiTConfig,
    sampler: Sampler,
    cfg_channels: GuidedChannels,
    interval: tuple[float, float] | None,
) -> tuple[float, float] | None:
    """Require settings that the model can serve; returns the interval as floats."""
    _checks.check_choice("cfg_channels", cfg_channels, (None, 3))
    if sampler.reads_variance and not config.learn_sigma:
        raise ValueError(
            "`sampler` reads a learned variance, which a model with learn_sigma=False "
            "does not predict; use Sampler.ddpm(variance='fixed_small') or "
            "'fixed_large'."
        )
    if interval is None:
        return None
    if len(interval) != 2:
        raise ValueError(
            f"`guidance_interval` must be a pair (low, high), got {interval!r}."
        )
    low, high = interval
    _checks.check_number("guidance_interval[0]", low, low=0.0, high=1.0)
    _checks.check_number("guidance_interval[1]", high, low=float(low), high=1.0)
    return float(low), float(high)
