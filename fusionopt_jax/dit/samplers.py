r"""One object that says how to walk from noise to an image.

A `Sampler` is plain settings: frozen, hashable, static under `jax.jit`. It owns the
list of times at which it evaluates the network (`Sampler.eval_times`), the very list
that a cache is built for, and the loop over them (`Sampler.run`). The loop knows
nothing of networks: it is given a function from an image and a time to a prediction, so
the arithmetic can be tested on closed forms and reused with any model.

Velocity samplers (`euler`, `heun`) expect :math:`v = \epsilon - x_0`; the others expect
the noise :math:`\epsilon`. Output channels beyond those of the image are the variance
logits of the published DiT: `ddpm` with a learned variance reads them, every other
sampler ignores them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from fusionopt_jax import _checks
from fusionopt_jax.dit import coefficients, schedules

Method: TypeAlias = Literal["euler", "heun", "ddpm", "ddim", "dpm_solver_pp_2m"]
"""The samplers, by the name of their constructor."""

_METHODS = ("euler", "heun", "ddpm", "ddim", "dpm_solver_pp_2m")


class Samples(NamedTuple):
    """What a sampling loop returns.

    Attributes:
        images: The finished images, [batch, height, width, channels], float32.
        previews: Predictions of the clean image along the way,
            [previews, batch, height, width, channels], float32; the last belongs to the
            last step.
    """

    images: Float[Array, "batch height width channels"]
    previews: Float[Array, "previews batch height width channels"]


class _Step(NamedTuple):
    """What one iteration of a loop is handed; leaves have a leading axis of steps."""

    index: Any
    time: Any
    condition: Any
    factors: Any
    draw: Any
    slot: Any


@dataclasses.dataclass(frozen=True)
class Sampler:
    r"""How to walk from noise to an image, and at which times to ask the network.

    Build one with `euler`, `heun`, `ddpm`, `ddim` or `dpm_solver_pp_2m`.

    Attributes:
        method: Which of the five.
        steps: Number of steps.
        shift: Shift of a flow's time grid towards the noise.
        respacing: Grid of `ddpm` and `ddim`, as `schedules.respace` reads it.
        variance: Where `ddpm` takes its variance from.
        eta: Randomness of `ddim`, in [0, 1].
        spacing: Grid of `dpm_solver_pp_2m`.
        clip: Whether each prediction of the clean image is cut to [-1, 1]. Right for
            pixels, wrong for latents, which are not bounded.

    Example:
        >>> sampler = Sampler.euler(steps=4)
        >>> sampler.eval_times().tolist()
        [1000.0, 750.0, 500.0, 250.0]
        >>> velocity = lambda image, time, condition: image
        >>> sampler.run(velocity, jnp.ones((1, 2, 2, 3))).images[0, 0, 0]
        Array([0.31640625, 0.31640625, 0.31640625], dtype=float32)
    """

    method: Method
    steps: int
    shift: float = 1.0
    respacing: str | None = None
    variance: schedules.Variance = "learned_range"
    eta: float = 0.0
    spacing: schedules.Spacing = "time"
    clip: bool = False

    def __post_init__(self) -> None:
        """Check the settings, and that the grid they ask for exists."""
        _checks.check_choice("method", self.method, _METHODS)
        _checks.check_integer("steps", self.steps, low=1)
        _checks.check_choice("clip", self.clip, (True, False))
        if self.is_flow:
            schedules.flow_times(self.steps, self.shift)
            if self.clip:
                raise ValueError(
                    f"`clip` has no meaning for {self.method!r}, which predicts a "
                    "velocity; leave it False."
                )
        elif self.method == "dpm_solver_pp_2m":
            schedules.multistep_times(self.steps, self.spacing)
        else:
            if self.respacing is None:
                raise ValueError(
                    f"`respacing` is needed by {self.method!r}; use "
                    f"Sampler.{self.method}(respacing=...)."
                )
            count = len(schedules.respace(self.respacing))
            if count != self.steps:
                raise ValueError(
                    f"`steps` is {self.steps} but `respacing` {self.respacing!r} has "
                    f"{count} times; use Sampler.{self.method}(respacing=...)."
                )
        _checks.check_number("eta", self.eta, low=0.0, high=1.0)
        _checks.check_choice(
            "variance", self.variance, ("learned_range", "fixed_small", "fixed_large")
        )

    @classmethod
    def euler(cls, steps: int = 50, shift: float = 1.0) -> "Sampler":
        r"""Euler steps along a rectified flow.

        :math:`x_{i+1} = x_i + (t_{i+1}-t_i)\,v(x_i, t_i)`, from :math:`t=1` to 0.

        Args:
            steps: Number of steps, and of evaluations.
            shift: Above 1, more of the steps lie near the noise.

        Returns:
            The sampler.

        Raises:
            ValueError: If an argument is out of range.

        Example:
            >>> Sampler.euler(steps=2).eval_times().tolist()
            [1000.0, 500.0]

        Source:
            Liu et al. 2023, "Flow Straight and Fast", algorithm 1.
        """
        return cls("euler", steps, shift=shift)

    @classmethod
    def heun(cls, steps: int = 25, shift: float = 1.0) -> "Sampler":
        r"""Heun steps along a rectified flow: second order, two evaluations a step.

        :math:`x_{i+1} = x_i + \tfrac12(t_{i+1}-t_i)\,(v(x_i,t_i)+v(x'_{i+1},t_{i+1}))`
        with the Euler prediction :math:`x'_{i+1}`. The last step is a full one as well:
        a velocity, unlike a score over a noise level, is finite at :math:`t=0`. So
        there are `steps + 1` distinct times, the last of which is 0.

        Args:
            steps: Number of steps; there are twice as many evaluations.
            shift: Above 1, more of the steps lie near the noise.

        Returns:
            The sampler.

        Raises:
            ValueError: If an argument is out of range.

        Example:
            >>> Sampler.heun(steps=2).eval_times().tolist()
            [1000.0, 500.0, 0.0]

        Source:
            Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based
            Generative Models", algorithm 1, which falls back to Euler in the last step
            where this does not.
        """
        return cls("heun", steps, shift=shift)

    @classmethod
    def ddpm(
        cls,
        respacing: str | int = "250",
        variance: schedules.Variance = "learned_range",
        clip: bool = False,
    ) -> "Sampler":
        r"""Ancestral sampling, as the published DiT samples.

        :math:`x_{k-1} = \mu(x_k, \hat x_0) + \sigma_k z`; see
        `coefficients.ancestral_coefficients`. It needs a `key`.

        Args:
            respacing: The grid: 250 or "250" evenly, "ddim50" by an integer stride, or
                one count per section such as "10,10,30".
            variance: "learned_range" for networks that predict it (the published ones);
                "fixed_small" or "fixed_large" for the others.
            clip: Whether to cut each clean prediction to [-1, 1]; for pixels.

        Returns:
            The sampler.

        Raises:
            TypeError: If `respacing` is neither a string nor an integer.
            ValueError: If an argument can't be read or is out of range.

        Example:
            >>> Sampler.ddpm("5").eval_times().tolist()
            [999.0, 749.0, 500.0, 250.0, 0.0]

        Source:
            Ho et al. 2020, algorithm 2; Nichol & Dhariwal 2021, equation 15.
        """
        steps = len(schedules.respace(respacing))
        return cls(
            "ddpm", steps, respacing=str(respacing), variance=variance, clip=clip
        )

    @classmethod
    def ddim(
        cls, respacing: str | int = "50", eta: float = 0.0, clip: bool = False
    ) -> "Sampler":
        r"""DDIM: deterministic at :math:`\eta=0`, as random as DDPM at 1.

        See `coefficients.implicit_coefficients`. It is faster than DDPM only through
        fewer steps.

        Args:
            respacing: The grid, as for `ddpm`.
            eta: In [0, 1]; above 0 it needs a `key`.
            clip: Whether to cut each clean prediction to [-1, 1]; for pixels. The noise
                is then derived anew from the cut prediction.

        Returns:
            The sampler.

        Raises:
            TypeError: If `respacing` is neither a string nor an integer.
            ValueError: If an argument can't be read or is out of range.

        Example:
            >>> Sampler.ddim("ddim5").eval_times().tolist()
            [800.0, 600.0, 400.0, 200.0, 0.0]

        Source:
            Song et al. 2021, equation 12.
        """
        steps = len(schedules.respace(respacing))
        return cls("ddim", steps, respacing=str(respacing), eta=eta, clip=clip)

    @classmethod
    def dpm_solver_pp_2m(
        cls,
        steps: int = 20,
        spacing: schedules.Spacing = "time",
        clip: bool = False,
    ) -> "Sampler":
        """DPM-Solver++(2M): second order at one evaluation a step, for noise models.

        See `coefficients.multistep_coefficients`. It ends at time 0 of the training
        grid, where one per cent of noise is left.

        Args:
            steps: Number of steps, and of evaluations; 15 to 25 are usual.
            spacing: "time", or "logsnr", whose steps are of equal difficulty.
            clip: Whether to cut each clean prediction to [-1, 1]; for pixels.

        Returns:
            The sampler.

        Raises:
            ValueError: If an argument is out of range.

        Example:
            >>> Sampler.dpm_solver_pp_2m(steps=3).eval_times().tolist()
            [999.0, 666.0, 333.0]

        Source:
            Lu et al. 2022, "DPM-Solver++", algorithm 2.
        """
        return cls("dpm_solver_pp_2m", steps, spacing=spacing, clip=clip)

    @property
    def is_flow(self) -> bool:
        """Whether the network's prediction is a velocity, not noise."""
        return self.method in ("euler", "heun")

    @property
    def is_random(self) -> bool:
        """Whether sampling draws fresh noise, and so needs a key."""
        return self.method == "ddpm" or (self.method == "ddim" and self.eta > 0)

    @property
    def reads_variance(self) -> bool:
        """Whether the network must predict a variance beside the noise."""
        return self.method == "ddpm" and self.variance == "learned_range"

    def eval_times(self) -> Float[Array, " times"]:
        """Every time at which the network is evaluated, in order and once each.

        Returns:
            Float32 of shape [times], in the units that the network sees: 0 to 999 for a
            diffusion model, 1000 times the flow's time otherwise.

        Example:
            >>> len(Sampler.ddpm("250").eval_times())
            250
        """
        return jnp.asarray(self.host_times(), jnp.float32)

    def host_times(self) -> np.ndarray:
        """`eval_times` as a NumPy array, also while a function is being traced.

        Returns:
            Float32 of shape [times].

        Example:
            >>> Sampler.euler(steps=1).host_times()
            array([1000.], dtype=float32)
        """
        if self.is_flow:
            grid = schedules.flow_times(self.steps, self.shift)
            kept = grid if self.method == "heun" else grid[:-1]
            times = kept * schedules.FLOW_TIME_SCALE
        elif self.method == "dpm_solver_pp_2m":
            times = schedules.multistep_times(self.steps, self.spacing)[:-1]
        else:
            times = schedules.respace(str(self.respacing))[::-1]
        return times.astype(np.float32)

    def run(
        self,
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
            denoise: Called as `denoise(image, time, condition)` with an image batch, a
                scalar model time and one slice of `conditions`; returns the prediction,
                [batch, height, width, channels] or with twice the channels.
            noise: Standard normal, [batch, height, width, channels].
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
            >>> sampler.run(predict, noise, conditions=jnp.zeros(4)).images.shape
            (1, 2, 2, 3)
        """
        _checks.check_integer("previews", previews, low=0)
        if previews > self.steps:
            raise ValueError(
                f"`previews` must be at most the number of steps, {self.steps}, got "
                f"{previews}."
            )
        image = jnp.asarray(noise, jnp.float32)
        shown = jnp.zeros((previews, *image.shape), jnp.float32)
        steps = _Step(
            index=jnp.arange(1, self.steps + 1),
            time=jnp.asarray(self.host_times()),
            condition=conditions,
            factors=self._factors(),
            draw=self._draws(key, step_noise),
            slot=_preview_slots(self.steps, previews),
        )

        def report(step: _Step, shown: Array, clean: Array) -> Array:
            """Keep a preview where this step has one, and count the step."""
            if on_step is not None:
                on_step(step.index)
            return shown.at[step.slot].set(clean, mode="drop") if previews else shown

        if self.method == "heun":
            image, shown = _heun(denoise, image, shown, steps, report)
            return Samples(image, shown)

        def body(carry: tuple[Any, ...], step: _Step) -> tuple[Any, None]:
            """One evaluation and the step it allows."""
            image, memory, shown = carry
            output = denoise(image, step.time, step.condition).astype(jnp.float32)
            self._check_channels(image, output)
            image, clean = self._advance(image, output, memory, step)
            # Only the multistep method looks back; the others carry nothing.
            memory = None if memory is None else clean
            return (image, memory, report(step, shown, clean)), None

        memory = jnp.zeros_like(image) if self.method == "dpm_solver_pp_2m" else None
        (image, _, shown), _ = jax.lax.scan(body, (image, memory, shown), steps)
        return Samples(image, shown)

    def _factors(self) -> Any:
        """The coefficients of every step, as float32 arrays of a leading step axis."""
        if self.is_flow:
            grid = schedules.flow_times(self.steps, self.shift)
            factors: Any = (grid[:-1], np.diff(grid))
        elif self.method == "dpm_solver_pp_2m":
            times = schedules.multistep_times(self.steps, self.spacing)
            factors = coefficients.multistep_coefficients(times)
        else:
            times = schedules.respace(str(self.respacing))
            factors = (
                coefficients.ancestral_coefficients(times, self.variance)
                if self.method == "ddpm"
                else coefficients.implicit_coefficients(times, self.eta)
            )
        return jax.tree.map(lambda values: jnp.asarray(values, jnp.float32), factors)

    def _draws(self, key: Any, step_noise: Any) -> Any:
        """Per step a key or the noise itself; nothing for a deterministic sampler."""
        if not self.is_random:
            return None
        if step_noise is not None:
            if len(step_noise) != self.steps:
                raise ValueError(
                    f"`step_noise` must have one slice per step, {self.steps}, got "
                    f"{len(step_noise)}."
                )
            return step_noise
        if key is None:
            raise ValueError(
                f"`key` is needed: {self.method!r} draws noise at every step; pass "
                "key=jax.random.key(0), or sample with Sampler.ddim(eta=0)."
            )
        return jax.random.split(key, self.steps)

    def _check_channels(self, image: Array, output: Array) -> None:
        """Require a prediction that fits the image, with a variance if one is read."""
        channels = image.shape[-1]
        allowed = (2,) if self.reads_variance else (1, 2)
        if output.shape not in [(*image.shape[:-1], k * channels) for k in allowed]:
            raise ValueError(
                f"the network returned shape {output.shape} for images of shape "
                f"{image.shape}; {self.method!r} needs "
                + (
                    "twice the channels for its learned variance: use variance="
                    "'fixed_small' or 'fixed_large' with a network that has none."
                    if self.reads_variance
                    else "the same, or twice the channels."
                )
            )

    def _advance(
        self, image: Array, output: Array, memory: Any, step: _Step
    ) -> tuple[Array, Array]:
        """The next image, and the clean image that this step predicted."""
        prediction, logits = jnp.split(output, [image.shape[-1]], axis=-1)
        factors = step.factors
        if self.method == "euler":
            time, change = factors
            return image + change * prediction, image - time * prediction
        clean = factors.image * image - factors.noise * prediction
        if self.clip:
            clean = jnp.clip(clean, -1.0, 1.0)
        if self.method == "ddpm":
            return _ancestral_step(image, clean, logits, step, self.variance), clean
        if self.method == "ddim":
            if self.clip:
                prediction = (factors.image * image - clean) / factors.noise
            mean = factors.next_clean * clean + factors.next_noise * prediction
            if self.is_random:
                mean = mean + factors.deviation * _draw(step.draw, image)
            return mean, clean
        ahead = clean + factors.extrapolation * (clean - memory)
        return factors.decay * image + factors.gain * ahead, clean


def _ancestral_step(
    image: Array, clean: Array, logits: Array, step: _Step, variance: str
) -> Array:
    """Draw the next image from the posterior of the clean prediction."""
    factors = step.factors
    log_variance = factors.log_variance_low
    if variance == "learned_range":
        share = (logits + 1.0) / 2.0
        log_variance = share * factors.log_variance_high + (1.0 - share) * log_variance
    mean = factors.mean_clean * clean + factors.mean_image * image
    deviation = factors.active * jnp.exp(0.5 * log_variance)
    return mean + deviation * _draw(step.draw, image)


def _heun(
    denoise: Callable[[Array, Array, Any], Array],
    image: Array,
    shown: Array,
    steps: _Step,
    report: Callable[[_Step, Array, Array], Array],
) -> tuple[Array, Array]:
    """Heun's loop; its second evaluation shares the next step's time."""
    at = (steps.time, steps.condition)

    def body(carry: tuple[Any, ...], step: _Step) -> tuple[Any, None]:
        """Predict with the slope here, correct with the slope there."""
        image, here, shown = carry
        there = (step.time, step.condition)
        time, change = step.factors
        channels = image.shape[-1]
        slope = denoise(image, *here).astype(jnp.float32)[..., :channels]
        ahead = image + change * slope
        other = denoise(ahead, *there).astype(jnp.float32)[..., :channels]
        shown = report(step, shown, image - time * slope)
        return (image + 0.5 * change * (slope + other), there, shown), None

    # The slice of this step rides along in the carry: scanning over two shifted copies
    # of the conditions would double what a cache takes.
    first = jax.tree.map(lambda leaf: leaf[0], at)
    later = steps._replace(
        time=at[0][1:], condition=jax.tree.map(lambda leaf: leaf[1:], at[1])
    )
    (image, _, shown), _ = jax.lax.scan(body, (image, first, shown), later)
    return image, shown


def _draw(draw: Array, image: Array) -> Array:
    """Fresh noise from a key, or the noise that was handed in."""
    if draw.shape == image.shape:
        return draw.astype(jnp.float32)
    return jax.random.normal(draw, image.shape, jnp.float32)


def _preview_slots(steps: int, previews: int) -> Int[Array, " steps"]:
    """For each step the preview it fills; one past the end where it fills none."""
    slots = np.full(steps, previews, np.int32)
    for preview in range(previews):
        slots[(preview + 1) * steps // previews - 1] = preview
    return jnp.asarray(slots)
