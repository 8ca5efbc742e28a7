r"""DDIM: implicit sampling, from deterministic to as random as DDPM.

On the kept times:

.. math::
    \hat x_0 &= (x_k - \sqrt{1-\bar\alpha_k}\,\epsilon_\theta) / \sqrt{\bar\alpha_k} \\
    \sigma_k &= \eta\,\sqrt{\frac{1-\bar\alpha_{k-1}}{1-\bar\alpha_k}}
        \sqrt{1-\frac{\bar\alpha_k}{\bar\alpha_{k-1}}} \\
    x_{k-1} &= \sqrt{\bar\alpha_{k-1}}\,\hat x_0
        + \sqrt{1-\bar\alpha_{k-1}-\sigma_k^2}\,\epsilon_\theta + \sigma_k z

Source:
    Song et al. 2021, "Denoising Diffusion Implicit Models", equations 12 and 16.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import numpy as np
from jaxtyping import Array

from fusionopt_jax import _checks
from fusionopt_jax.dit.sampling import schedules
from fusionopt_jax.dit.sampling.sampler import At, Factor, Predict, Sampler, Step


class ImplicitCoefficients(NamedTuple):
    r"""What a DDIM step multiplies by; each of shape [steps].

    Attributes:
        alpha: :math:`\sqrt{\bar\alpha}`, the share of the clean image.
        sigma: :math:`\sqrt{1-\bar\alpha}`, the share of the noise.
        next_clean: Factor of the clean prediction in the next image.
        next_noise: Factor of the predicted noise in the next image.
        deviation: :math:`\sigma_k`, of the fresh noise; zero in the last step.
    """

    alpha: Factor
    sigma: Factor
    next_clean: Factor
    next_noise: Factor
    deviation: Factor


@dataclasses.dataclass(frozen=True)
class DDIM(Sampler):
    r"""DDIM: deterministic at :math:`\eta=0`, as random as DDPM at 1.

    :math:`x_{k-1} = \sqrt{\bar\alpha_{k-1}}\,\hat x_0 +
    \sqrt{1-\bar\alpha_{k-1}-\sigma_k^2}\,\epsilon_\theta + \sigma_k z`; the equations
    head this module. It is faster than DDPM only through fewer steps.

    Attributes:
        respacing: The grid: 50 or "50" evenly, "ddim50" by an integer stride,
            "leading50" as diffusers does, or one count per section such as "10,10,30";
            see `schedules.respace`.
        eta: In [0, 1]; above 0 it needs a `key`.
        clip: Whether each prediction of the clean image is cut to [-1, 1]; for pixels.
            The noise is then derived anew from the cut prediction.
        steps: Number of times in the grid.

    Raises:
        TypeError: If `respacing` is neither a string nor an integer.
        ValueError: If a setting can't be read or is out of range.

    Example:
        >>> DDIM("ddim5").eval_times().tolist()
        [800.0, 600.0, 400.0, 200.0, 0.0]

    Source:
        Song et al. 2021, equation 12. The pipeline of diffusers takes the same steps
        with its "leading" grid, the last of them to the clean image
        (`set_alpha_to_one`), and guides every channel.
    """

    method: ClassVar[str] = "ddim"
    respacing: str | int = "50"
    eta: float = 0.0
    clip: bool = False
    steps: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        """Check the settings; 50 and "50" are one sampler."""
        times = schedules.respace(self.respacing)
        object.__setattr__(self, "respacing", str(self.respacing))
        object.__setattr__(self, "steps", len(times))
        _checks.check_number("eta", self.eta, low=0.0, high=1.0)
        _checks.check_choice("clip", self.clip, (True, False))

    @property
    def is_random(self) -> bool:
        """Whether sampling draws fresh noise, and so needs a key."""
        return self.eta > 0

    def host_times(self) -> np.ndarray:
        """The kept times, from the last to the first; see `Sampler.host_times`."""
        return schedules.respace(self.respacing)[::-1].astype(np.float32)

    def coefficients(self) -> ImplicitCoefficients:
        """Those of the equations above; see `Sampler.coefficients`."""
        return coefficients(schedules.respace(self.respacing), self.eta)

    def step(self, predict: Predict, x: Array, at: At) -> Step:
        """Put less noise on the clean prediction; see `Sampler.step`."""
        c: ImplicitCoefficients = at.coefficients
        noise = predict(x).value
        clean = schedules.clean_prediction(x, noise, c, self.clip)
        if self.clip:
            noise = (x - c.alpha * clean) / c.sigma
        following = c.next_clean * clean + c.next_noise * noise
        if self.is_random:
            following = following + c.deviation * at.z
        return Step(following, clean)


def coefficients(times: np.ndarray, eta: float) -> ImplicitCoefficients:
    r"""Coefficients of DDIM on a grid; the equations head this module.

    Args:
        times: Rising integer times as `respace` gives them.
        eta: :math:`\eta`, in [0, 1]: 0 is deterministic, 1 has the variance of DDPM.

    Returns:
        Coefficients in the order of sampling, from the last time to the first.

    Raises:
        ValueError: If `eta` is outside [0, 1].

    Example:
        >>> coefficients(schedules.respace("ddim10"), eta=0.0).deviation.max()
        np.float64(0.0)

    Source:
        Song et al. 2021, "Denoising Diffusion Implicit Models", equations 12 and 16.
    """
    _checks.check_number("eta", eta, low=0.0, high=1.0)
    bar, bar_before = schedules.alpha_bars_at(times)
    deviation = eta * np.sqrt(
        (1.0 - bar_before) / (1.0 - bar) * (1.0 - bar / bar_before)
    )
    return ImplicitCoefficients(
        alpha=np.sqrt(bar)[::-1],
        sigma=np.sqrt(1.0 - bar)[::-1],
        next_clean=np.sqrt(bar_before)[::-1],
        next_noise=np.sqrt(1.0 - bar_before - deviation**2)[::-1],
        deviation=deviation[::-1],
    )
