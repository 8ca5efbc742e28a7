r"""Samplers of a rectified flow: Euler and Heun.

The flow is :math:`x_t = (1-t)\,x_0 + t\,\epsilon` for :math:`t` from 1 (noise) to 0.
The network predicts its velocity :math:`v = \mathrm dx/\mathrm dt = \epsilon - x_0`.

Source:
    Liu et al. 2023, "Flow Straight and Fast", algorithm 1 (Euler); Karras et al. 2022,
    "Elucidating the Design Space of Diffusion-Based Generative Models", algorithm 1
    (Heun); Esser et al. 2024, "Scaling Rectified Flow Transformers", equation 23 (the
    shift).
"""

import dataclasses
from typing import ClassVar, NamedTuple

import numpy as np
from jaxtyping import Array

from fusionopt_jax import _checks
from fusionopt_jax.dit.sampling.sampler import At, Factor, Predict, Sampler, Step

FLOW_TIME_SCALE = 1000.0
"""What a flow time in [0, 1] is multiplied by before the network sees it."""


class FlowCoefficients(NamedTuple):
    """Each of shape [steps].

    Attributes:
        t: The flow's time.
        dt: Its change over the step, negative.
    """

    t: Factor
    dt: Factor


class _Flow(Sampler):
    """What Euler and Heun share: the time grid."""

    shift: float

    def __post_init__(self) -> None:
        """Check the settings."""
        flow_times(self.steps, self.shift)

    def coefficients(self) -> FlowCoefficients:
        """Times and their changes; see `Sampler.coefficients`."""
        times = flow_times(self.steps, self.shift)
        return FlowCoefficients(t=times[:-1], dt=np.diff(times))


@dataclasses.dataclass(frozen=True)
class Euler(_Flow):
    r"""Euler steps along a rectified flow.

    :math:`x_{i+1} = x_i + (t_{i+1}-t_i)\,v(x_i, t_i)`, from :math:`t=1` to 0. The clean
    image that a velocity implies is :math:`\hat x_0 = x_i - t_i\,v`.

    Attributes:
        steps: Number of steps, and of evaluations.
        shift: Positive; above 1, more of the steps lie near the noise. See
            `flow_times`.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> Euler(steps=2).eval_times().tolist()
        [1000.0, 500.0]

    Source:
        Liu et al. 2023, "Flow Straight and Fast", algorithm 1.
    """

    method: ClassVar[str] = "euler"
    steps: int = 50
    shift: float = 1.0

    def host_times(self) -> np.ndarray:
        """The starts of the steps; see `Sampler.host_times`."""
        times = flow_times(self.steps, self.shift)[:-1]
        return (times * FLOW_TIME_SCALE).astype(np.float32)

    def step(self, predict: Predict, x: Array, at: At) -> Step:
        """Follow the velocity; see `Sampler.step`."""
        t, dt = at.coefficients
        v = predict(x).value
        return Step(x + dt * v, clean=x - t * v)


@dataclasses.dataclass(frozen=True)
class Heun(_Flow):
    r"""Heun steps along a rectified flow: second order, two evaluations a step.

    :math:`x_{i+1} = x_i + \tfrac12(t_{i+1}-t_i)\,(v(x_i,t_i)+v(x'_{i+1},t_{i+1}))` with
    the Euler prediction :math:`x'_{i+1}`. The last step is a full one as well: a
    velocity, unlike a score over a noise level, is finite at :math:`t=0`. So there are
    `steps + 1` distinct times, the last of which is 0.

    Attributes:
        steps: Number of steps; there are twice as many evaluations.
        shift: Positive; above 1, more of the steps lie near the noise. See
            `flow_times`.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> Heun(steps=2).eval_times().tolist()
        [1000.0, 500.0, 0.0]

    Source:
        Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative
        Models", algorithm 1, which falls back to Euler in the last step where this does
        not.
    """

    method: ClassVar[str] = "heun"
    looks_ahead: ClassVar[bool] = True
    steps: int = 25
    shift: float = 1.0

    def host_times(self) -> np.ndarray:
        """The starts of the steps and the end; see `Sampler.host_times`."""
        times = flow_times(self.steps, self.shift)
        return (times * FLOW_TIME_SCALE).astype(np.float32)

    def step(self, predict: Predict, x: Array, at: At) -> Step:
        """Predict with the velocity here, correct with the one there."""
        t, dt = at.coefficients
        v = predict(x).value
        v_ahead = predict(x + dt * v, 1).value
        return Step(x + dt * (0.5 * (v + v_ahead)), clean=x - t * v)


def flow_times(steps: int, shift: float = 1.0) -> np.ndarray:
    r"""The time grid of a rectified flow, from noise to image.

    :math:`t_i = s\,u_i/(1+(s-1)\,u_i)` with :math:`u_i = 1-i/N`, where :math:`N` is
    `steps` and :math:`s` is `shift`.

    Args:
        steps: Number of steps, at least 1.
        shift: Positive; above 1 it spends more steps near the noise, which larger
            images need. The default leaves the grid even.

    Returns:
        Float64 of shape [steps + 1], from 1 to 0.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> flow_times(4).tolist(), flow_times(2, shift=3.0).tolist()
        ([1.0, 0.75, 0.5, 0.25, 0.0], [1.0, 0.75, 0.0])

    Source:
        Esser et al. 2024, "Scaling Rectified Flow Transformers", equation 23.
    """
    _checks.check_integer("steps", steps, low=1)
    _checks.check_positive("shift", shift)
    even = 1.0 - np.arange(steps + 1) / steps
    return shift * even / (1.0 + (shift - 1.0) * even)
