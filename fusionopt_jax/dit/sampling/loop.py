"""The loop that turns a sampler's settings into images, with any function as network.

It knows nothing of networks: it is given a function from an image and a time to a
prediction, so the arithmetic can be checked on closed forms and reused with any model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from fusionopt_jax import _checks
from fusionopt_jax.dit.sampling import coefficients, schedules
from fusionopt_jax.dit.sampling.sampler import Sampler
from fusionopt_jax.dit.sampling.steps import (
    Prediction,
    Step,
    ancestral_step,
    euler_step,
    heun_loop,
    implicit_step,
    multistep_step,
    preview_slots,
)


class Samples(NamedTuple):
    """What a sampling loop returns.

    Attributes:
        images: The finished images, [batch, height, width, channels], in the type of
            the noise, at least float32.
        previews: Predictions of the clean image along the way,
            [previews, batch, height, width, channels], in the type of the images; the
            last belongs to the last step.
    """

    images: Float[Array, "batch height width channels"]
    previews: Float[Array, "previews batch height width channels"]


def run_sampler(
    sampler: Sampler,
    denoise: Callable[[Array, Array, Any], Array],
    noise: Float[Array, "batch height width channels"],
    *,
    conditions: Any = None,
    key: PRNGKeyArray | None = None,
    step_noise: Float[Array, "steps batch height width channels"] | None = None,
    previews: int = 0,
    on_step: Callable[[Array], None] | None = None,
) -> Samples:
    """Walk from noise to images with any function as the network.

    One `lax.scan`, so it compiles once whatever the number of steps; traceable.

    Args:
        sampler: The walk.
        denoise: Called as `denoise(image, time, condition)` with an image batch, a
            scalar model time and one slice of `conditions`; returns the prediction,
            [batch, height, width, channels] or with twice the channels.
        noise: Standard normal, [batch, height, width, channels]. The loop computes in
            its type: float64 for float64, which JAX has under `jax.enable_x64`, and
            float32 for any other.
        conditions: A tree whose leaves have a leading axis like `eval_times`; the
            loop scans over it.
        key: For samplers that draw noise.
        step_noise: The noise to use in place of drawing it, one slice per step, to
            repeat a run of other code.
        previews: How many clean predictions to keep along the way.
        on_step: Called inside the loop with the number of finished steps, traced.

    Returns:
        The images and the previews.

    Raises:
        ValueError: If the sampler draws noise and has neither `key` nor
            `step_noise`, if there are more previews than steps, or if the
            prediction has a wrong number of channels.

    Example:
        >>> predict = lambda image, time, condition: image * condition
        >>> noise = jnp.ones((1, 2, 2, 3))
        >>> sampler = Sampler.ddim("ddim4")
        >>> samples = run_sampler(sampler, predict, noise, conditions=jnp.zeros(4))
        >>> samples.images.shape
        (1, 2, 2, 3)
    """
    _checks.check_integer("previews", previews, low=0)
    if previews > sampler.steps:
        raise ValueError(
            f"`previews` must be at most the number of steps, {sampler.steps}, got "
            f"{previews}."
        )
    dtype = jnp.promote_types(jnp.asarray(noise).dtype, jnp.float32)
    image = jnp.asarray(noise, dtype)
    shown = jnp.zeros((previews, *image.shape), dtype)
    steps = Step(
        index=jnp.arange(1, sampler.steps + 1),
        time=jnp.asarray(sampler.host_times()),
        condition=conditions,
        factors=_factors(sampler, dtype),
        draw=_draws(sampler, key, step_noise),
        slot=preview_slots(sampler.steps, previews),
    )

    def predict(image: Array, time: Array, condition: Any) -> Prediction:
        """The network's prediction and, if it has any, variance logits."""
        output = denoise(image, time, condition).astype(dtype)
        _check_channels(sampler, image, output)
        prediction, logits = jnp.split(output, [image.shape[-1]], axis=-1)
        return prediction, logits

    def report(step: Step, shown: Array, clean: Array) -> Array:
        """Keep a preview where this step has one, and count the step."""
        if on_step is not None:
            on_step(step.index)
        return shown.at[step.slot].set(clean, mode="drop") if previews else shown

    if sampler.method == "heun":
        return Samples(*heun_loop(predict, image, shown, steps, report))

    def body(carry: tuple[Any, ...], step: Step) -> tuple[Any, None]:
        """One evaluation and the step it allows."""
        image, memory, shown = carry
        prediction = predict(image, step.time, step.condition)
        image, clean = _advance(sampler, image, prediction, memory, step)
        # Only the multistep method looks back; the others carry nothing.
        memory = None if memory is None else clean
        return (image, memory, report(step, shown, clean)), None

    memory = jnp.zeros_like(image) if sampler.method == "dpm_solver_pp_2m" else None
    (image, _, shown), _ = jax.lax.scan(body, (image, memory, shown), steps)
    return Samples(image, shown)


def _advance(
    sampler: Sampler, image: Array, prediction: Prediction, memory: Any, step: Step
) -> tuple[Array, Array]:
    """The next image, and the clean image that this step predicted."""
    factors, draw = step.factors, step.draw
    if sampler.method == "euler":
        return euler_step(image, prediction, factors)
    if sampler.method == "ddpm":
        return ancestral_step(
            image,
            prediction,
            factors,
            draw,
            variance=sampler.variance,
            clip=sampler.clip,
        )
    if sampler.method == "ddim":
        return implicit_step(image, prediction, factors, draw, clip=sampler.clip)
    return multistep_step(image, prediction, factors, memory, clip=sampler.clip)


def _factors(sampler: Sampler, dtype: DTypeLike) -> Any:
    """The coefficients of every step, as arrays of a leading step axis."""
    if sampler.is_flow:
        grid = schedules.flow_times(sampler.steps, sampler.shift)
        factors: Any = (grid[:-1], np.diff(grid))
    elif sampler.method == "dpm_solver_pp_2m":
        times = schedules.multistep_times(sampler.steps, sampler.spacing)
        factors = coefficients.multistep_coefficients(times)
    else:
        times = schedules.respace(str(sampler.respacing))
        factors = (
            coefficients.ancestral_coefficients(times, sampler.variance)
            if sampler.method == "ddpm"
            else coefficients.implicit_coefficients(times, sampler.eta)
        )
    return jax.tree.map(lambda values: jnp.asarray(values, dtype), factors)


def _draws(sampler: Sampler, key: Any, step_noise: Any) -> Any:
    """Per step a key or the noise itself; nothing for a deterministic sampler."""
    if not sampler.is_random:
        return None
    if step_noise is not None:
        if len(step_noise) != sampler.steps:
            raise ValueError(
                f"`step_noise` must have one slice per step, {sampler.steps}, got "
                f"{len(step_noise)}."
            )
        return step_noise
    if key is None:
        raise ValueError(
            f"`key` is needed: {sampler.method!r} draws noise at every step; pass "
            "key=jax.random.key(0), or sample with Sampler.ddim(eta=0)."
        )
    return jax.random.split(key, sampler.steps)


def _check_channels(sampler: Sampler, image: Array, output: Array) -> None:
    """Require a prediction that fits the image, with a variance if one is read."""
    channels = image.shape[-1]
    allowed = (2,) if sampler.reads_variance else (1, 2)
    if output.shape in [(*image.shape[:-1], k * channels) for k in allowed]:
        return
    remedy = (
        "twice the channels, for its learned variance; use variance='fixed_small' "
        "or 'fixed_large' with a network that predicts none."
        if sampler.reads_variance
        else "as many channels, or twice as many."
    )
    raise ValueError(
        f"the network returned shape {output.shape} for images of shape "
        f"{image.shape}; {sampler.method!r} needs {remedy}"
    )
