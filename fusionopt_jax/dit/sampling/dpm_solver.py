r"""DPM-Solver++(2M): a multistep solver of second order, for noise models.

With :math:`\alpha=\sqrt{\bar\alpha}`, :math:`\sigma=\sqrt{1-\bar\alpha}`,
:math:`\lambda=\log(\alpha/\sigma)`, :math:`h_i=\lambda_{i+1}-\lambda_i` and
:math:`r_i=h_{i-1}/h_i`:

.. math::
    \hat x_i &= (x_i - \sigma_i\,\epsilon_\theta)\,/\,\alpha_i \\
    D_i &= \hat x_i + \frac{1}{2r_i}\,(\hat x_i-\hat x_{i-1}) \\
    x_{i+1} &= \frac{\sigma_{i+1}}{\sigma_i}\,x_i - \alpha_{i+1}\,(e^{-h_i}-1)\,D_i

Source:
    Lu et al. 2022, "DPM-Solver++", algorithm 2; the grids after Lu et al. 2022,
    "DPM-Solver", section 3.4 and appendix D.4.
"""

import dataclasses
from typing import ClassVar, Literal, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fusionopt_jax import _checks
from fusionopt_jax.dit.sampling import schedules
from fusionopt_jax.dit.sampling.sampler import At, Factor, Predict, Sampler, Step

Spacing: TypeAlias = Literal["time", "logsnr"]
"""Whether the steps are even in time or in the log signal-to-noise ratio."""


class MultistepCoefficients(NamedTuple):
    r"""What a step multiplies by; each of shape [steps].

    Attributes:
        alpha: :math:`\alpha_i`, the share of the clean image.
        sigma: :math:`\sigma_i`, the share of the noise.
        decay: :math:`\sigma_{i+1}/\sigma_i`.
        gain: :math:`-\alpha_{i+1}(e^{-h_i}-1)`.
        extrapolation: :math:`1/(2r_i)`; zero in a first-order step.
    """

    alpha: Factor
    sigma: Factor
    decay: Factor
    gain: Factor
    extrapolation: Factor


@dataclasses.dataclass(frozen=True)
class DPMSolverPP2M(Sampler):
    """DPM-Solver++(2M): second order at one evaluation a step, for noise models.

    The equations head this module. It ends at time 0 of the training grid, where one
    per cent of noise is left.

    Attributes:
        steps: Number of steps, and of evaluations; 15 to 25 are usual.
        spacing: "time", or "logsnr", whose steps are of equal difficulty.
        clip: Whether each prediction of the clean image is cut to [-1, 1]; for pixels.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> DPMSolverPP2M(steps=3).eval_times().tolist()
        [999.0, 666.0, 333.0]

    Source:
        Lu et al. 2022, "DPM-Solver++", algorithm 2.
    """

    method: ClassVar[str] = "dpm_solver_pp_2m"
    steps: int = 20
    spacing: Spacing = "time"
    clip: bool = False

    def __post_init__(self) -> None:
        """Check the settings."""
        solver_times(self.steps, self.spacing)
        _checks.check_choice("clip", self.clip, (True, False))

    def host_times(self) -> np.ndarray:
        """The starts of the steps; see `Sampler.host_times`."""
        return solver_times(self.steps, self.spacing)[:-1].astype(np.float32)

    def coefficients(self) -> MultistepCoefficients:
        """Those of the equations above; see `Sampler.coefficients`."""
        return coefficients(solver_times(self.steps, self.spacing))

    def start(self, x: Array) -> Array:
        """No clean prediction yet; the first step multiplies it by zero."""
        return jnp.zeros_like(x)

    def step(self, predict: Predict, x: Array, at: At) -> Step:
        """Extrapolate from the clean prediction before; see `Sampler.step`."""
        c: MultistepCoefficients = at.coefficients
        clean = schedules.clean_prediction(x, predict(x).value, c, self.clip)
        d = clean + c.extrapolation * (clean - at.memory)
        return Step(c.decay * x + c.gain * d, clean, memory=clean)


def coefficients(times: np.ndarray) -> MultistepCoefficients:
    """Coefficients of DPM-Solver++(2M) on a grid; the equations head this module.

    Args:
        times: Falling times as `solver_times` gives them, [steps + 1].

    Returns:
        Coefficients of the steps. The first step is of first order, for want of an
        earlier prediction, and so is the last of fewer than 15 steps, where
        extrapolating over the steep end of the schedule is unstable.

    Example:
        >>> coefficients(solver_times(2, "time")).extrapolation.tolist()
        [0.0, 0.0]

    Source:
        Lu et al. 2022, "DPM-Solver++", algorithm 2; the first-order last step is the
        `lower_order_final` of the published code.
    """
    log_bar = np.interp(
        times,
        np.arange(schedules.TRAINING_STEPS),
        np.log(schedules.linear_alpha_bars()),
    )
    alpha, sigma = np.exp(0.5 * log_bar), np.sqrt(-np.expm1(log_bar))
    h = np.diff(half_log_snr(log_bar))
    extrapolation = np.concatenate([[0.0], h[1:] / (2.0 * h[:-1])])
    if len(h) < 15:
        extrapolation[-1] = 0.0
    return MultistepCoefficients(
        alpha=alpha[:-1],
        sigma=sigma[:-1],
        decay=sigma[1:] / sigma[:-1],
        gain=-alpha[1:] * np.expm1(-h),
        extrapolation=extrapolation,
    )


def solver_times(steps: int, spacing: Spacing) -> np.ndarray:
    r"""The fractional times of DPM-Solver++(2M), from noise to image.

    Args:
        steps: Number of steps, at least 1.
        spacing: `"time"` divides the times 999 to 0 evenly, the usual choice for
            latents; `"logsnr"` divides :math:`\lambda =
            \log(\sqrt{\bar\alpha}/\sqrt{1-\bar\alpha})` evenly.

    Returns:
        Float64 of shape [steps + 1], from 999 to 0. Between two integer times,
        :math:`\log\bar\alpha` is linear.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> solver_times(3, "time").tolist()
        [999.0, 666.0, 333.0, 0.0]

    Source:
        Lu et al. 2022, "DPM-Solver", section 3.4 and appendix D.4.
    """
    _checks.check_integer("steps", steps, low=1)
    _checks.check_choice("spacing", spacing, ("time", "logsnr"))
    last = schedules.TRAINING_STEPS - 1.0
    if spacing == "time":
        return np.linspace(last, 0.0, steps + 1)
    logs = np.log(schedules.linear_alpha_bars())
    ends = half_log_snr(logs[[-1, 0]])
    wanted = np.linspace(ends[0], ends[1], steps + 1)
    # log(abar) from lambda: abar = sigmoid(2 lambda); `interp` wants rising abscissae.
    wanted_logs = -np.logaddexp(0.0, -2.0 * wanted)
    times = np.interp(-wanted_logs, -logs, np.arange(len(logs), dtype=np.float64))
    times[0], times[-1] = last, 0.0
    return times


def half_log_snr(log_bars: np.ndarray) -> np.ndarray:
    r"""Half the log signal-to-noise ratio, from the logarithms of signal fractions.

    :math:`\lambda = \log\sqrt{\bar\alpha} - \log\sqrt{1-\bar\alpha}`.

    Args:
        log_bars: :math:`\log\bar\alpha`, negative, of any shape.

    Returns:
        Float64 of the same shape.

    Example:
        >>> half_log_snr(np.log(np.array([0.5]))).round(6)
        array([0.])

    Source:
        Lu et al. 2022, "DPM-Solver", section 2.
    """
    return 0.5 * (log_bars - np.log(-np.expm1(log_bars)))
