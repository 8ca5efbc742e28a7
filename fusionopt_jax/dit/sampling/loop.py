"""The loop that turns a sampler's settings into images, with any function as network.

It knows nothing of networks: it is given a function from an image and a time to a
prediction, so the arithmetic can be checked on closed forms and reused with any model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from fusionopt_jax import _checks
from fusionopt_jax._paths import named_leaves
from fusionopt_jax.dit.network.residuals import EXACT, Plan
from fusionopt_jax.dit.sampling.remembering import Remembering, remembering
from fusionopt_jax.dit.sampling.sampler import At, Prediction, Sampler
from fusionopt_jax.dit.sampling.step_cache import Plans, StepCache


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
    denoise: Callable[[Array, Array, Any], Array] | Remembering,
    noise: Float[Array, "batch height width channels"],
    *,
    conditions: Any = None,
    step_cache: StepCache | Plans | None = None,
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
            [batch, height, width, channels] or with twice the channels. A network that
            shows its inner residuals to a step cache is a `Remembering`.
        noise: Standard normal, [batch, height, width, channels]. The loop computes in
            its type: float64 for float64, which JAX has under `jax.enable_x64`, and
            float32 for any other.
        conditions: A tree whose leaves have a leading axis like `eval_times`; the
            loop scans over it.
        step_cache: Which steps evaluate the network; the others recall what it said. Of
            a plain `denoise` that is its whole prediction, used again or extrapolated;
            of a `Remembering` what it shows. Either a `StepCache`, or the arrays of its
            `plan`, which may be traced. See `StepCache`.
        key: For samplers that draw noise.
        step_noise: The noise to use in place of drawing it, one slice per step, to
            repeat a run of other code.
        previews: How many clean predictions to keep along the way.
        on_step: Called inside the loop with the number of finished steps, traced.

    Returns:
        The images and the previews.

    Raises:
        StaleCacheError: If the step cache was chosen for another sampler.
        ValueError: If the sampler draws noise and has neither `key` nor
            `step_noise`, if there are more previews than steps, if `conditions` or
            the prediction have a wrong shape, or if the step cache is for another
            number of steps or for branches that the network does not show.

    Example:
        >>> from fusionopt_jax import dit
        >>> predict = lambda image, time, condition: image * condition
        >>> noise = jnp.ones((1, 2, 2, 3))
        >>> sampler = dit.Sampler.ddim("ddim4")
        >>> samples = run_sampler(sampler, predict, noise, conditions=jnp.zeros(4))
        >>> samples.images.shape
        (1, 2, 2, 3)
        >>> step_cache = dit.StepCache(mask=[True, False, True, False])
        >>> samples = run_sampler(
        ...     sampler, predict, noise, conditions=jnp.zeros(4), step_cache=step_cache
        ... )
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
    _check_conditions(sampler, conditions)
    if isinstance(step_cache, StepCache):
        step_cache = step_cache.plan(sampler)
    denoise = remembering(denoise)
    # What an evaluation depends on beside the image, with a leading axis of times.
    evaluations = (jnp.asarray(sampler.host_times()), conditions)
    plans = jax.tree.map(jnp.asarray, step_cache)
    kept = _kept_before(sampler, denoise, image, evaluations, plans)
    here = None
    if sampler.looks_ahead:
        # The evaluation of this step rides along in the carry, and the scan brings that
        # of the next: scanning over both would double what a cache takes.
        here = jax.tree.map(lambda leaf: leaf[0], evaluations)
        evaluations = jax.tree.map(lambda leaf: leaf[1:], evaluations)
    steps = _Slices(
        index=jnp.arange(1, sampler.steps + 1),
        evaluation=evaluations,
        plans=plans,
        coefficients=jax.tree.map(
            lambda values: jnp.asarray(values, dtype), sampler.coefficients()
        ),
        draw=_draws(sampler, key, step_noise),
        slot=_preview_slots(sampler.steps, previews),
    )

    def network(
        image: Array, evaluation: Any, plan: Plan, kept: Any
    ) -> tuple[Prediction, Any]:
        """The network's prediction with variance logits, if any, and what it keeps."""
        time, condition = evaluation
        output, kept = denoise.denoise(image, time, condition, plan, kept)
        output = output.astype(dtype)
        _check_channels(sampler, image, output)
        return Prediction(*jnp.split(output, [image.shape[-1]], axis=-1)), kept

    def fresh_noise(draw: Any) -> Array | None:
        """The noise of a step: none, what was handed in, or drawn from a key."""
        if draw is None:
            return None
        if step_noise is not None:
            return draw.astype(dtype)
        return jax.random.normal(draw, image.shape, dtype)

    def report(step: _Slices, shown: Array, clean: Array) -> Array:
        """Keep a preview where this step has one, and count the step."""
        if on_step is not None:
            on_step(step.index)
        return shown.at[step.slot].set(clean, mode="drop") if previews else shown

    def body(carry: tuple[Any, ...], step: _Slices) -> tuple[Any, None]:
        """One step of the sampler."""
        image, memory, here, kept, shown = carry
        visited = [step.evaluation] if here is None else [here, step.evaluation]
        asked, renewed = [], []

        def predict(image: Array, ahead: int = 0) -> Prediction:
            """The network at the time of this step, or of the next."""
            if step.plans is None:
                return network(image, visited[ahead], EXACT, None)[0]
            slot = len(asked)
            asked.append(ahead)
            _check_asked(sampler, asked, whole=False)
            prediction, after = network(
                image, visited[ahead], step.plans[slot], kept[slot]
            )
            renewed.append(after)
            return prediction

        at = At(step.coefficients, fresh_noise(step.draw), memory)
        image, clean, memory = sampler.step(predict, image, at)
        if step.plans is not None:
            _check_asked(sampler, asked, whole=True)
        here = None if here is None else step.evaluation
        shown = report(step, shown, clean)
        return (image, memory, here, tuple(renewed), shown), None

    carry = (image, sampler.start(image), here, kept, shown)
    (image, *_, shown), _ = jax.lax.scan(body, carry, steps)
    return Samples(image, shown)


class _Slices(NamedTuple):
    """What each iteration of the loop is handed, stacked along the steps.

    Attributes:
        index: Number of the step, from 1.
        evaluation: Model time and condition of this step's evaluation, or of the next
            step's for a sampler that looks ahead.
        plans: What each evaluation of the step computes and recalls; None for all.
        coefficients: Of the sampler.
        draw: A key, or the noise itself, or None for a deterministic sampler.
        slot: The preview that this step fills; one past the end for none.
    """

    index: Any
    evaluation: Any
    plans: Any
    coefficients: Any
    draw: Any
    slot: Any


def _kept_before(
    sampler: Sampler, denoise: Remembering, image: Array, evaluations: Any, plans: Any
) -> tuple[Any, ...]:
    """Zeros like what each evaluation of a step keeps; the first step replaces them."""
    if plans is None:
        return ()
    counts = {len(leaf) for leaf in jax.tree.leaves(plans)}
    if (len(plans), counts) != (len(sampler.evaluations), {sampler.steps}):
        raise ValueError(
            f"`step_cache` holds {len(plans)} plan(s) of {sorted(counts)} steps, but "
            f"the sampler needs {len(sampler.evaluations)} of {sampler.steps}: make "
            "them with `step_cache.plan(sampler)` of this sampler."
        )

    def keep(image: Array, evaluation: Any, plan: Plan) -> Any:
        """What the first evaluation keeps."""
        time, condition = evaluation
        return denoise.denoise(image, time, condition, plan, None)[1]

    first = jax.tree.map(lambda leaf: leaf[0], (evaluations, plans))
    kept = jax.eval_shape(keep, image, first[0], first[1][0])
    if not jax.tree.leaves(kept):
        raise ValueError(
            "the step cache skips what this network never asks its plan for; skip what "
            "it asks for: `mask` for plan.network, `attention` or `mlp` for the others."
        )
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), kept)
    return (zeros,) * len(plans)


def _check_asked(sampler: Sampler, asked: list[int], *, whole: bool) -> None:
    """Require the calls of `predict` that the sampler declares, as far as they came."""
    declared = sampler.evaluations if whole else sampler.evaluations[: len(asked)]
    if tuple(asked) != declared:
        raise ValueError(
            f"a step of {sampler.method!r} calls `predict` {asked} steps ahead, where "
            f"its `evaluations` say {sampler.evaluations}; a step cache needs them "
            "right."
        )


def _check_conditions(sampler: Sampler, conditions: Any) -> None:
    """Require a slice for each time."""
    count = len(sampler.host_times())
    for path, leaf in named_leaves(conditions):
        if jnp.ndim(leaf) == 0 or len(leaf) != count:
            name = f"conditions/{path}" if path else "conditions"
            raise ValueError(
                f"`{name}` must have a leading axis of {count}, one slice per time of "
                f"`sampler.eval_times()`, got {_checks.shape_text(jnp.asarray(leaf))}."
            )


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
            "key=jax.random.key(0), or take a sampler that draws none: Sampler.ddim() "
            "for a noise model, Sampler.euler() for a flow."
        )
    return jax.random.split(key, sampler.steps)


def _preview_slots(steps: int, previews: int) -> Int[Array, " steps"]:
    """For each step the preview it fills; one past the end where it fills none."""
    slots = np.full(steps, previews, np.int32)
    for preview in range(previews):
        slots[(preview + 1) * steps // previews - 1] = preview
    return jnp.asarray(slots)


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
