"""The arithmetic of one sampling step, for each method; no networks, no settings.

Every function takes the prediction that the network made and the coefficients of one
step, and returns the next image beside the clean image that this step predicted.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from fusionopt_jax.dit.sampling import schedules

Prediction = tuple[Array, Array]
"""What the network says: noise or velocity, and variance logits, which may be empty."""


class Step(NamedTuple):
    """What one iteration of a sampling loop is handed; stacked along steps for a scan.

    Attributes:
        index: Number of this step, from 1.
        time: Model time.
        condition: What the network is conditioned on beside the time; any tree.
        factors: Coefficients of the method.
        draw: A key, or the noise itself, or None for a deterministic sampler.
        slot: The preview that this step fills; one past the end for none.
    """

    index: Any
    time: Any
    condition: Any
    factors: Any
    draw: Any
    slot: Any


def euler_step(
    image: Array, prediction: Prediction, factors: Any
) -> tuple[Array, Array]:
    """Follow the velocity; `factors` are the flow time and its change."""
    time, change = factors
    velocity, _ = prediction
    return image + change * velocity, image - time * velocity


def ancestral_step(
    image: Array,
    prediction: Prediction,
    factors: Any,
    draw: Array,
    *,
    variance: schedules.Variance,
    clip: bool,
) -> tuple[Array, Array]:
    """Draw the next image from the posterior of the clean prediction."""
    noise, logits = prediction
    clean = clean_prediction(image, noise, factors, clip)
    log_variance = factors.log_variance_low
    if variance == "learned_range":
        share = (logits + 1.0) / 2.0
        log_variance = share * factors.log_variance_high + (1.0 - share) * log_variance
    mean = factors.mean_clean * clean + factors.mean_image * image
    deviation = factors.active * jnp.exp(0.5 * log_variance)
    return mean + deviation * fresh_noise(draw, image), clean


def implicit_step(
    image: Array,
    prediction: Prediction,
    factors: Any,
    draw: Array | None,
    *,
    clip: bool,
) -> tuple[Array, Array]:
    """A DDIM step; it draws no noise if `draw` is None."""
    noise, _ = prediction
    clean = clean_prediction(image, noise, factors, clip)
    if clip:
        noise = (factors.image * image - clean) / factors.noise
    following = factors.next_clean * clean + factors.next_noise * noise
    if draw is not None:
        following = following + factors.deviation * fresh_noise(draw, image)
    return following, clean


def multistep_step(
    image: Array,
    prediction: Prediction,
    factors: Any,
    previous: Array,
    *,
    clip: bool,
) -> tuple[Array, Array]:
    """A DPM-Solver++ step; `previous` is the clean image of the step before."""
    clean = clean_prediction(image, prediction[0], factors, clip)
    ahead = clean + factors.extrapolation * (clean - previous)
    return factors.decay * image + factors.gain * ahead, clean


def clean_prediction(image: Array, noise: Array, factors: Any, clip: bool) -> Array:
    """The clean image that a noise prediction implies."""
    clean = factors.image * image - factors.noise * noise
    return jnp.clip(clean, -1.0, 1.0) if clip else clean


def heun_loop(
    predict: Callable[[Array, Array, Any], Prediction],
    image: Array,
    shown: Array,
    steps: Step,
    report: Callable[[Step, Array, Array], Array],
) -> tuple[Array, Array]:
    """Heun's loop; the second evaluation of a step shares the next step's time."""

    def body(carry: tuple[Any, ...], step: Step) -> tuple[Any, None]:
        """Predict with the slope here, correct with the slope there."""
        image, here, shown = carry
        there = (step.time, step.condition)
        ahead, clean = euler_step(image, slope := predict(image, *here), step.factors)
        _, change = step.factors
        mean_slope = 0.5 * (slope[0] + predict(ahead, *there)[0])
        return (image + change * mean_slope, there, report(step, shown, clean)), None

    # The slice of this step rides along in the carry: scanning over two shifted copies
    # of the conditions would double what a cache takes.
    at = (steps.time, steps.condition)
    first = jax.tree.map(lambda leaf: leaf[0], at)
    time, condition = jax.tree.map(lambda leaf: leaf[1:], at)
    later = steps._replace(time=time, condition=condition)
    (image, _, shown), _ = jax.lax.scan(body, (image, first, shown), later)
    return image, shown


def fresh_noise(draw: Array, image: Array) -> Array:
    """Noise from a key, or the noise that was handed in."""
    if draw.shape == image.shape:
        return draw.astype(image.dtype)
    return jax.random.normal(draw, image.shape, image.dtype)


def preview_slots(steps: int, previews: int) -> Int[Array, " steps"]:
    """For each step the preview it fills; one past the end where it fills none."""
    slots = np.full(steps, previews, np.int32)
    for preview in range(previews):
        slots[(preview + 1) * steps // previews - 1] = preview
    return jnp.asarray(slots)
