r"""One object that says how to walk from noise to an image.

A `Sampler` is plain settings: frozen, hashable, static under `jax.jit`. It owns the
list of times at which the network is evaluated (`Sampler.eval_times`). A cache is built
for that list and the loop runs over it, so the two cannot disagree.

Velocity samplers (`euler`, `heun`) expect :math:`v = \epsilon - x_0`; the others expect
the noise :math:`\epsilon`.
"""

import dataclasses
from typing import Literal, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fusionopt_jax import _checks
from fusionopt_jax.dit.sampling import schedules

Method: TypeAlias = Literal["euler", "heun", "ddpm", "ddim", "dpm_solver_pp_2m"]
"""The samplers, by the name of their constructor."""

_METHODS = ("euler", "heun", "ddpm", "ddim", "dpm_solver_pp_2m")


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
        >>> hash(sampler) == hash(Sampler.euler(steps=4))
        True
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
