r"""DDPM: ancestral sampling, with the variance that the network learned.

On the kept times, with :math:`\beta_k = 1-\bar\alpha_k/\bar\alpha_{k-1}`:

.. math::
    \hat x_0 &= (x_k - \sqrt{1-\bar\alpha_k}\,\epsilon_\theta) / \sqrt{\bar\alpha_k} \\
    \tilde\mu_k &= \frac{\sqrt{\bar\alpha_{k-1}}\,\beta_k}{1-\bar\alpha_k}\,\hat x_0
        + \frac{(1-\bar\alpha_{k-1})\sqrt{1-\beta_k}}{1-\bar\alpha_k}\,x_k \\
    \tilde\beta_k &= \beta_k\,(1-\bar\alpha_{k-1})/(1-\bar\alpha_k) \\
    \log\sigma_k^2 &= v \log\beta_k + (1-v) \log\tilde\beta_k \\
    x_{k-1} &= \tilde\mu_k + \sigma_k z

Source:
    Ho et al. 2020, "Denoising Diffusion Probabilistic Models", equations 6 and 7 and
    algorithm 2; Nichol & Dhariwal 2021, "Improved Denoising Diffusion Probabilistic
    Models", equation 15, for the learned variance.
"""

import dataclasses
from typing import ClassVar, Literal, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fusionopt_jax import _checks
from fusionopt_jax.dit.sampling import schedules
from fusionopt_jax.dit.sampling.sampler import At, Factor, Predict, Sampler, Step

Variance: TypeAlias = Literal["learned_range", "fixed_small", "fixed_large"]
"""Where ancestral sampling takes the variance of a step from."""


class AncestralCoefficients(NamedTuple):
    r"""What a step of ancestral sampling multiplies by; each of shape [steps].

    Attributes:
        alpha: :math:`\sqrt{\bar\alpha}`, the share of the clean image.
        sigma: :math:`\sqrt{1-\bar\alpha}`, the share of the noise.
        mean_clean: Factor of the clean prediction in the posterior mean.
        mean_image: Factor of the noisy image in the posterior mean.
        log_variance_low: Log variance of the posterior, the lower end of a learned
            range.
        log_variance_high: Log variance at the upper end of a learned range.
        active: 1, or 0 for the last step, which adds no noise.
    """

    alpha: Factor
    sigma: Factor
    mean_clean: Factor
    mean_image: Factor
    log_variance_low: Factor
    log_variance_high: Factor
    active: Factor


@dataclasses.dataclass(frozen=True)
class DDPM(Sampler):
    r"""Ancestral sampling, as the published DiT samples.

    :math:`x_{k-1} = \tilde\mu_k + \sigma_k z`; the equations head this module. It needs
    a `key`.

    Attributes:
        respacing: The grid: 250 or "250" evenly, "ddim50" by an integer stride,
            "leading50" as diffusers does, or one count per section such as "10,10,30";
            see `schedules.respace`.
        variance: "learned_range" for networks that predict it (the published ones);
            "fixed_small" or "fixed_large" for the others.
        clip: Whether each prediction of the clean image is cut to [-1, 1]. Right for
            pixels, wrong for latents, which are not bounded.
        steps: Number of times in the grid.

    Raises:
        TypeError: If `respacing` is neither a string nor an integer.
        ValueError: If a setting can't be read or is out of range.

    Example:
        >>> DDPM("5").eval_times().tolist()
        [999.0, 749.0, 500.0, 250.0, 0.0]

    Source:
        Ho et al. 2020, algorithm 2; Nichol & Dhariwal 2021, equation 15.
    """

    method: ClassVar[str] = "ddpm"
    respacing: str | int = "250"
    variance: Variance = "learned_range"
    clip: bool = False
    steps: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        """Check the settings; 250 and "250" are one sampler."""
        times = schedules.respace(self.respacing)
        object.__setattr__(self, "respacing", str(self.respacing))
        object.__setattr__(self, "steps", len(times))
        _check_variance(self.variance)
        _checks.check_choice("clip", self.clip, (True, False))

    @property
    def is_random(self) -> bool:
        """True: every step but the last draws noise."""
        return True

    @property
    def reads_variance(self) -> bool:
        """Whether the network must predict a variance beside the noise."""
        return self.variance == "learned_range"

    def host_times(self) -> np.ndarray:
        """The kept times, from the last to the first; see `Sampler.host_times`."""
        return schedules.respace(self.respacing)[::-1].astype(np.float32)

    def coefficients(self) -> AncestralCoefficients:
        """Those of the posterior; see `Sampler.coefficients`."""
        return coefficients(schedules.respace(self.respacing), self.variance)

    def step(self, predict: Predict, x: Array, at: At) -> Step:
        """Draw from the posterior of the clean prediction; see `Sampler.step`."""
        c: AncestralCoefficients = at.coefficients
        noise, logits = predict(x)
        clean = schedules.clean_prediction(x, noise, c, self.clip)
        log_variance = c.log_variance_low
        if self.reads_variance:
            v = (logits + 1.0) / 2.0
            log_variance = v * c.log_variance_high + (1.0 - v) * c.log_variance_low
        mean = c.mean_clean * clean + c.mean_image * x
        return Step(mean + c.active * jnp.exp(0.5 * log_variance) * at.z, clean)


def coefficients(times: np.ndarray, variance: Variance) -> AncestralCoefficients:
    r"""Coefficients of ancestral sampling on a grid; the equations head this module.

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
        >>> coefficients(times, "fixed_small").active.tolist()[-2:]
        [1.0, 0.0]

    Source:
        Ho et al. 2020, equations 6 and 7; Nichol & Dhariwal 2021, equation 15. As in
        their code, the variance of the first time, which is zero, is replaced by that
        of the second before the logarithm is taken.
    """
    _check_variance(variance)
    bar, bar_before = schedules.alpha_bars_at(times)
    beta = 1.0 - bar / bar_before
    beta_tilde = beta * (1.0 - bar_before) / (1.0 - bar)
    if len(times) > 1:
        beta_tilde[0] = beta_tilde[1]
        large = np.concatenate([beta_tilde[:1], beta[1:]])
    else:
        beta_tilde = large = beta
    low = np.log(large if variance == "fixed_large" else beta_tilde)
    return AncestralCoefficients(
        alpha=np.sqrt(bar)[::-1],
        sigma=np.sqrt(1.0 - bar)[::-1],
        mean_clean=(np.sqrt(bar_before) * beta / (1.0 - bar))[::-1],
        mean_image=((1.0 - bar_before) * np.sqrt(1.0 - beta) / (1.0 - bar))[::-1],
        log_variance_low=low[::-1],
        log_variance_high=np.log(beta)[::-1],
        active=np.append(np.ones(len(times) - 1), 0.0),
    )


def _check_variance(variance: str) -> None:
    """Require one of the three words."""
    _checks.check_choice(
        "variance", variance, ("learned_range", "fixed_small", "fixed_large")
    )
