r"""The stochastic sampler of SiT, for a rectified flow.

In SiT's direction of time, :math:`x_t = t\,x_0 + (1-t)\,\epsilon` with the image
:math:`x_0`, the velocity :math:`v = x_0 - \epsilon` and :math:`t` from 0 (noise) to 1:

.. math::
    s(x,t) &= \frac{t\,v(x,t) - x}{1-t} \qquad\text{(the score)} \\
    \mathrm dx &= \bigl(v + w(t)\,s\bigr)\,\mathrm dt + \sqrt{2\,w(t)}\,\mathrm dW

Every :math:`w \ge 0` has the marginals of the flow, that of the walk without noise. On
the grid :math:`t_0 = 0, \ldots, t_{N-1} = 1-h`, with :math:`b = v + w\,s` and
:math:`h_i = t_{i+1}-t_i`:

.. math::
    \text{euler:}\quad x_{i+1} &= x_i + h_i\,b(x_i,t_i) + \sqrt{2 w_i h_i}\,z_i \\
    \text{heun:}\quad \hat x &= x_i + \sqrt{2 w_i h_i}\,z_i, \qquad
        k = b(\hat x,t_i) \\
    x_{i+1} &= \hat x + \tfrac12 h_i\,\bigl(k + b(\hat x + h_i k,\,t_{i+1})\bigr)

and a last step of size :math:`h` without noise, along :math:`b` ("mean") or along
:math:`v` ("euler").

Source:
    Ma et al. 2024, "SiT: Exploring Flow and Diffusion-based Generative Models with
    Scalable Interpolant Transformers" (arXiv 2401.08740), equations 5, 6 and 9, and its
    published code.
"""

import dataclasses
from typing import ClassVar, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from jaxtyping import Array

from fusionopt_jax import _checks
from fusionopt_jax.dit.sampling.flow import FLOW_TIME_SCALE, Convention
from fusionopt_jax.dit.sampling.sampler import At, Factor, Predict, Sampler, Step

Diffusion: TypeAlias = Literal["sigma", "linear", "constant", "decreasing"]
"""How the diffusion :math:`w` depends on the time."""

Solver: TypeAlias = Literal["euler", "heun"]
"""Euler-Maruyama, or noise first and then a step of Heun."""

LastStep: TypeAlias = Literal["mean", "euler", "tweedie"] | None
"""How the walk ends; None for noisy steps to the very end."""


class SiTCoefficients(NamedTuple):
    r"""Each of shape [steps].

    Attributes:
        t: Time, 0 for noise and 1 for the image.
        dt: Its change over the step.
        gain: :math:`w/(1-t)`; zero in a last step along the velocity.
        deviation: :math:`\sqrt{2\,w\,\mathrm dt}`, of the noise; zero in the last step.
        t_ahead: Time at the end of the step.
        gain_ahead: `gain` there.
        ahead: Weight of the drift there: a half, or zero for a step that is not
            corrected.
    """

    t: Factor
    dt: Factor
    gain: Factor
    deviation: Factor
    t_ahead: Factor
    gain_ahead: Factor
    ahead: Factor


@dataclasses.dataclass(frozen=True)
class SiTSDE(Sampler):
    r"""The stochastic sampler of SiT; the equations head this module.

    It needs a `key`. The names that SiT's code has for the settings are in brackets.

    Attributes:
        steps: Number of steps (`num_steps`, which is one more where `last_step` is
            None): noisy ones, evenly from 0 to `1 - last_step_size`, and the last,
            whose slice of a `step_noise` is not used. At least 2, or 1 without a last
            step.
        diffusion: :math:`w` (`diffusion_form`): "sigma" and "linear" are both
            :math:`c\,(1-t)`, "constant" is :math:`c`, "decreasing" is
            :math:`\frac14 (c\,\cos \pi t + 1)^2`, with c in `norm`. SiT's "SBDM",
            :math:`c\,(1-t)/t`, is infinite at the first time, 0, and is refused.
        norm: c (`diffusion_norm`), positive.
        solver: "euler" is Euler-Maruyama, "heun" adds the noise and then takes a step
            of Heun, at two evaluations (`sampling_method`). The last step evaluates
            twice as well, but uses the first answer alone.
        last_step: "mean" follows the drift, "euler" the velocity alone. "tweedie" is
            the expected image :math:`x + (1-t)\,v`, which on a straight line is the
            same as "euler". None has no such step; the last noisy one ends at the
            image.
        last_step_size: Size of the last step, in (0, 1).
        convention: "data_at_one" for models that predict image minus noise (SiT);
            "noise_at_one" for noise minus image (those of `rectified_flow_loss`, REPA),
            which are asked at :math:`1-t` and whose sign is changed. REPA's own
            stochastic sampler is this one with "noise_at_one" and the other defaults.

    Raises:
        ValueError: If a setting is out of range or has no effect, or if the drift is
            infinite at a time of the walk.

    Example:
        >>> SiTSDE(steps=3, last_step_size=0.25).eval_times().tolist()
        [0.0, 375.0, 750.0]
        >>> SiTSDE(5, last_step=None, convention="noise_at_one").eval_times().tolist()
        [1000.0, 800.0, 600.0, 400.0, 200.0]

    Source:
        Ma et al. 2024, "SiT" (arXiv 2401.08740), equations 5, 6 and 9. Its code asks
        the network twice at every point, for the velocity and for the score; here one
        answer serves both.
    """

    method: ClassVar[str] = "sit_sde"
    steps: int = 250
    diffusion: Diffusion = "sigma"
    norm: float = 1.0
    solver: Solver = "euler"
    last_step: LastStep = "mean"
    last_step_size: float = 0.04
    convention: Convention = "data_at_one"

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.diffusion == "SBDM":
            raise ValueError(
                "`diffusion` 'SBDM' divides by the time, and the walk begins at 0, "
                "where SiT's own code gives no finite sample; use 'sigma'."
            )
        _checks.check_choice("diffusion", self.diffusion, get_args(Diffusion))
        _checks.check_positive("norm", self.norm)
        _checks.check_choice("solver", self.solver, get_args(Solver))
        _checks.check_choice(
            "last_step", self.last_step, ("mean", "euler", "tweedie", None)
        )
        _checks.check_choice("convention", self.convention, get_args(Convention))
        _checks.check_number(
            "last_step_size",
            self.last_step_size,
            low=0.0,
            high=1.0,
            low_open=True,
            high_open=True,
        )
        default = type(self).last_step_size
        if self.last_step is None and self.last_step_size != default:
            raise ValueError(
                "`last_step_size` has no effect with last_step=None; leave it out."
            )
        _checks.check_integer(
            "steps", self.steps, low=1 if self.last_step is None else 2
        )
        if not all(np.isfinite(values).all() for values in self.coefficients()):
            raise ValueError(
                f"`last_step` None ends a step of Heun at the image, where the drift "
                f"with `diffusion` {self.diffusion!r} is infinite; use "
                "last_step='mean', or diffusion='sigma'."
            )

    @property
    def is_random(self) -> bool:
        """True: every step but the last draws noise."""
        return True

    @property
    def looks_ahead(self) -> bool:
        """Whether a step also evaluates the network at its end."""
        return self.solver == "heun"

    def _times(self) -> np.ndarray:
        """The starts of the steps and the end, 1, in float64."""
        if self.last_step is None:
            return np.linspace(0.0, 1.0, self.steps + 1)
        return np.append(np.linspace(0.0, 1.0 - self.last_step_size, self.steps), 1.0)

    def host_times(self) -> np.ndarray:
        """The starts of the steps, and the end for Heun; see `Sampler.host_times`."""
        times = self._times() if self.looks_ahead else self._times()[:-1]
        if self.convention == "noise_at_one":
            times = 1.0 - times
        return (times * FLOW_TIME_SCALE).astype(np.float32)

    def _gain(self, t: np.ndarray) -> np.ndarray:
        r""":math:`w/(1-t)`, what the drift has of :math:`t v - x`."""
        if self.diffusion in ("sigma", "linear"):
            return np.full_like(t, self.norm)
        with np.errstate(divide="ignore", invalid="ignore"):
            if self.diffusion == "constant":
                return self.norm / (1.0 - t)
            return 0.25 * (self.norm * np.cos(np.pi * t) + 1.0) ** 2 / (1.0 - t)

    def coefficients(self) -> SiTCoefficients:
        """Those of the equations above; see `Sampler.coefficients`."""
        times = self._times()
        t, t_ahead, dt = times[:-1], times[1:], np.diff(times)
        gain, gain_ahead = self._gain(t), self._gain(t_ahead)
        deviation = np.sqrt(2.0 * gain * (1.0 - t) * dt)
        ahead = np.full_like(t, 0.5 if self.looks_ahead else 0.0)
        if not self.looks_ahead:
            gain_ahead = np.zeros_like(t)
        if self.last_step is not None:
            deviation[-1] = ahead[-1] = gain_ahead[-1] = 0.0
            if self.last_step != "mean":
                gain[-1] = 0.0
        return SiTCoefficients(t, dt, gain, deviation, t_ahead, gain_ahead, ahead)

    def step(self, predict: Predict, x: Array, at: At) -> Step:
        """Follow the drift, with noise; see `Sampler.step`."""
        c: SiTCoefficients = at.coefficients
        sign = 1.0 if self.convention == "data_at_one" else -1.0
        noise = c.deviation * at.z
        if not self.looks_ahead:
            v = sign * predict(x).value
            drift = v + c.gain * (c.t * v - x)
            return Step(x + c.dt * drift + noise, clean=x + (1.0 - c.t) * v)
        x = x + noise
        v = sign * predict(x).value
        drift = v + c.gain * (c.t * v - x)
        x_ahead = x + c.dt * drift
        v_ahead = sign * predict(x_ahead, 1).value
        drift_ahead = v_ahead + c.gain_ahead * (c.t_ahead * v_ahead - x_ahead)
        slope = (1.0 - c.ahead) * drift + c.ahead * drift_ahead
        return Step(x + c.dt * slope, clean=x + (1.0 - c.t) * v)
