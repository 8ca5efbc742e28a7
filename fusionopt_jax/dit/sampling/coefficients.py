r"""What a step of each diffusion sampler multiplies by.

The coefficients of a whole run are computed here, once, in float64; the sampler casts
them to the type of its images, float32 as a rule, and scans over them.
"""

from typing import NamedTuple

import numpy as np

from fusionopt_jax import _checks
from fusionopt_jax.dit.sampling import schedules


class AncestralCoefficients(NamedTuple):
    """What a step of ancestral sampling multiplies by; arrays of shape [steps].

    Attributes:
        image: Factor of the noisy image in the clean prediction.
        noise: Factor of the predicted noise in the clean prediction.
        mean_clean: Factor of the clean prediction in the posterior mean.
        mean_image: Factor of the noisy image in the posterior mean.
        log_variance_low: Log variance of the posterior, the lower end of a learned
            range.
        log_variance_high: Log variance at the upper end of a learned range.
        active: 1, or 0 for the last step, which adds no noise.
    """

    image: np.ndarray
    noise: np.ndarray
    mean_clean: np.ndarray
    mean_image: np.ndarray
    log_variance_low: np.ndarray
    log_variance_high: np.ndarray
    active: np.ndarray


class ImplicitCoefficients(NamedTuple):
    """What a DDIM step multiplies by; arrays of shape [steps].

    Attributes:
        image: Factor of the noisy image in the clean prediction.
        noise: Factor of the predicted noise in the clean prediction.
        next_clean: Factor of the clean prediction in the next image.
        next_noise: Factor of the predicted noise in the next image.
        deviation: Standard deviation of the fresh noise; zero in the last step.
    """

    image: np.ndarray
    noise: np.ndarray
    next_clean: np.ndarray
    next_noise: np.ndarray
    deviation: np.ndarray


class MultistepCoefficients(NamedTuple):
    """What a DPM-Solver++(2M) step multiplies by; arrays of shape [steps].

    Attributes:
        image: Factor of the noisy image in the clean prediction.
        noise: Factor of the predicted noise in the clean prediction.
        decay: Factor of the noisy image in the next image.
        gain: Factor of the extrapolated clean prediction in the next image.
        extrapolation: How far to extrapolate from the previous clean prediction; zero
            in a first-order step.
    """

    image: np.ndarray
    noise: np.ndarray
    decay: np.ndarray
    gain: np.ndarray
    extrapolation: np.ndarray


def ancestral_coefficients(
    times: np.ndarray, variance: schedules.Variance
) -> AncestralCoefficients:
    r"""Coefficients of ancestral sampling on a respaced grid.

    With :math:`\bar\alpha` read at `times` and :math:`\beta_k =
    1-\bar\alpha_k/\bar\alpha_{k-1}`, the posterior has mean
    :math:`\frac{\sqrt{\bar\alpha_{k-1}}\beta_k}{1-\bar\alpha_k}x_0 +
    \frac{(1-\bar\alpha_{k-1})\sqrt{1-\beta_k}}{1-\bar\alpha_k}x_k` and variance
    :math:`\tilde\beta_k = \beta_k(1-\bar\alpha_{k-1})/(1-\bar\alpha_k)`.

    Args:
        times: Rising integer times as `respace` gives them.
        variance: `"fixed_small"` is :math:`\tilde\beta`, `"fixed_large"` is
            :math:`\beta`, `"learned_range"` leaves the choice between the two to the
            network.

    Returns:
        Coefficients in the order of sampling, from the last time to the first.

    Raises:
        ValueError: If `variance` is not one of the three words.

    Example:
        >>> times = schedules.respace(10)
        >>> ancestral_coefficients(times, "fixed_small").active.tolist()[-2:]
        [1.0, 0.0]

    Source:
        Ho et al. 2020, equations 6 and 7; Nichol & Dhariwal 2021, equation 15. As in
        their code, the variance of the first time, which is zero, is replaced by that
        of the second before the logarithm is taken.
    """
    _checks.check_choice(
        "variance", variance, ("learned_range", "fixed_small", "fixed_large")
    )
    bars, previous = _alpha_bars_at(times)
    betas = 1.0 - bars / previous
    posterior = betas * (1.0 - previous) / (1.0 - bars)
    if len(times) > 1:
        posterior = np.concatenate([posterior[1:2], posterior[1:]])
        large = np.concatenate([posterior[:1], betas[1:]])
    else:
        posterior = large = betas
    low = np.log(large if variance == "fixed_large" else posterior)
    high = np.log(betas)
    return AncestralCoefficients(
        *_clean_factors(bars),
        mean_clean=(betas * np.sqrt(previous) / (1.0 - bars))[::-1],
        mean_image=((1.0 - previous) * np.sqrt(1.0 - betas) / (1.0 - bars))[::-1],
        log_variance_low=low[::-1],
        log_variance_high=high[::-1],
        active=_all_but_last(len(times)),
    )


def implicit_coefficients(times: np.ndarray, eta: float) -> ImplicitCoefficients:
    r"""Coefficients of DDIM on a respaced grid.

    :math:`\sigma_k = \eta\sqrt{\frac{1-\bar\alpha_{k-1}}{1-\bar\alpha_k}}
    \sqrt{1-\frac{\bar\alpha_k}{\bar\alpha_{k-1}}}` and
    :math:`x_{k-1} = \sqrt{\bar\alpha_{k-1}}\,x_0 +
    \sqrt{1-\bar\alpha_{k-1}-\sigma_k^2}\,\epsilon + \sigma_k z`.

    Args:
        times: Rising integer times as `respace` gives them.
        eta: :math:`\eta`, in [0, 1]: 0 is deterministic, 1 has the variance of DDPM.

    Returns:
        Coefficients in the order of sampling, from the last time to the first.

    Raises:
        ValueError: If `eta` is outside [0, 1].

    Example:
        >>> implicit_coefficients(schedules.respace("ddim10"), eta=0.0).deviation.max()
        np.float64(0.0)

    Source:
        Song et al. 2021, "Denoising Diffusion Implicit Models", equations 12 and 16.
    """
    _checks.check_number("eta", eta, low=0.0, high=1.0)
    bars, previous = _alpha_bars_at(times)
    deviation = (
        eta * np.sqrt((1.0 - previous) / (1.0 - bars)) * np.sqrt(1.0 - bars / previous)
    )
    return ImplicitCoefficients(
        *_clean_factors(bars),
        next_clean=np.sqrt(previous)[::-1],
        next_noise=np.sqrt(1.0 - previous - deviation**2)[::-1],
        deviation=deviation[::-1] * _all_but_last(len(times)),
    )


def multistep_coefficients(times: np.ndarray) -> MultistepCoefficients:
    r"""Coefficients of DPM-Solver++(2M) on a grid.

    With :math:`\alpha=\sqrt{\bar\alpha}`, :math:`\sigma=\sqrt{1-\bar\alpha}`,
    :math:`\lambda=\log(\alpha/\sigma)`, :math:`h_i=\lambda_{i+1}-\lambda_i`,
    :math:`r_i=h_{i-1}/h_i`: :math:`x_{i+1} = \frac{\sigma_{i+1}}{\sigma_i}x_i -
    \alpha_{i+1}(e^{-h_i}-1)\,D_i` and :math:`D_i = \hat x_i + \frac{1}{2r_i}(\hat
    x_i-\hat x_{i-1})`.

    Args:
        times: Falling times as `multistep_times` gives them, [steps + 1].

    Returns:
        Coefficients of the steps. The first step is of first order, for want of an
        earlier prediction, and so is the last of fewer than 15 steps, where
        extrapolating over the steep end of the schedule is unstable.

    Example:
        >>> times = schedules.multistep_times(2, "time")
        >>> multistep_coefficients(times).extrapolation.tolist()
        [0.0, 0.0]

    Source:
        Lu et al. 2022, "DPM-Solver++", algorithm 2; the first-order last step is the
        `lower_order_final` of the published code.
    """
    logs = np.interp(
        times,
        np.arange(schedules.TRAINING_STEPS),
        np.log(schedules.linear_alpha_bars()),
    )
    bars = np.exp(logs)
    deviations = np.sqrt(-np.expm1(logs))
    steps = np.diff(schedules.half_log_snr(logs))
    extrapolation = np.concatenate([[0.0], steps[1:] / (2.0 * steps[:-1])])
    if len(steps) < 15:
        extrapolation[-1] = 0.0
    return MultistepCoefficients(
        image=1.0 / np.sqrt(bars[:-1]),
        noise=deviations[:-1] / np.sqrt(bars[:-1]),
        decay=deviations[1:] / deviations[:-1],
        gain=-np.sqrt(bars[1:]) * np.expm1(-steps),
        extrapolation=extrapolation,
    )


def _alpha_bars_at(times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Signal fractions at the kept times, and at the kept time before each."""
    bars = schedules.linear_alpha_bars()[times]
    return bars, np.concatenate([[1.0], bars[:-1]])


def _clean_factors(bars: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Factors of image and noise in the clean prediction, in the order of sampling."""
    return np.sqrt(1.0 / bars)[::-1], np.sqrt(1.0 / bars - 1.0)[::-1]


def _all_but_last(count: int) -> np.ndarray:
    """Ones, and a zero at the end."""
    active = np.ones(count)
    active[-1] = 0.0
    return active
