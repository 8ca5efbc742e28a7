r"""Samplers of a rectified flow: Euler and Heun, in either direction of its time.

The flow joins noise and image by a straight line, along which the network predicts the
velocity :math:`v = \mathrm dx/\mathrm dt`. Two conventions are published:

.. math::
    \text{noise at one:}\quad x_t &= (1-t)\,x_0 + t\,\epsilon, & v &= \epsilon - x_0,
        & t &: 1 \to 0 \\
    \text{data at one:}\quad x_t &= t\,x_0 + (1-t)\,\epsilon, & v &= x_0 - \epsilon,
        & t &: 0 \to 1

with the image :math:`x_0` and the noise :math:`\epsilon`. They describe the same line:
a network of one, given :math:`1-t` and its sign changed, is a network of the other.

Source:
    Liu et al. 2023, "Flow Straight and Fast", algorithm 1 (Euler); Karras et al. 2022,
    "Elucidating the Design Space of Diffusion-Based Generative Models", algorithm 1
    (Heun); Esser et al. 2024, "Scaling Rectified Flow Transformers", equation 23 (the
    shift). Noise at one is the convention of Esser et al. and of REPA (Yu et al. 2025);
    data at one that of Liu et al. and of SiT (Ma et al. 2024).
"""

import dataclasses
from typing import ClassVar, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from jaxtyping import Array

from fusionopt_jax import _checks
from fusionopt_jax.dit.sampling.sampler import At, Factor, Predict, Sampler, Step

FLOW_TIME_SCALE = 1000.0
"""What a flow time in [0, 1] is multiplied by before the network sees it."""

Convention: TypeAlias = Literal["noise_at_one", "data_at_one"]
"""Which end of the line is t = 1, and with it the sign of the velocity."""


class FlowCoefficients(NamedTuple):
    """Each of shape [steps], and negative where the noise is at one.

    Attributes:
        left: The change of the flow's time from here to the image.
        dt: Its change over the step.
    """

    left: Factor
    dt: Factor


class HeunCoefficients(NamedTuple):
    """Each of shape [steps]; the first two as in `FlowCoefficients`.

    Attributes:
        left: The change of the flow's time from here to the image.
        dt: Its change over the step.
        ahead: Weight of the velocity at the end of the step: a half, or zero.
    """

    left: Factor
    dt: Factor
    ahead: Factor


class _Flow(Sampler):
    """What Euler and Heun share: the time grid."""

    shift: float
    convention: Convention

    def __post_init__(self) -> None:
        """Check the settings."""
        self._times()

    def _times(self) -> np.ndarray:
        """The starts of the steps and the end."""
        return flow_times(self.steps, self.shift, self.convention)

    def _changes(self) -> FlowCoefficients:
        """Changes of the time."""
        times = self._times()
        return FlowCoefficients(left=times[-1] - times[:-1], dt=np.diff(times))


@dataclasses.dataclass(frozen=True)
class Euler(_Flow):
    r"""Euler steps along a rectified flow.

    :math:`x_{i+1} = x_i + (t_{i+1}-t_i)\,v(x_i, t_i)`, from the noise to the image. The
    clean image that a velocity implies is :math:`\hat x_0 = x_i + (t_N-t_i)\,v`.

    Attributes:
        steps: Number of steps, and of evaluations. SiT's `num_steps` counts the points
            of the grid, one more; REPA's counts steps.
        shift: Positive; above 1, more of the steps lie near the noise. See
            `flow_times`.
        convention: "noise_at_one" for models that predict noise minus image (those of
            `rectified_flow_loss`, REPA); "data_at_one" for image minus noise (SiT).

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> Euler(steps=2).eval_times().tolist()
        [1000.0, 500.0]
        >>> Euler(steps=2, convention="data_at_one").eval_times().tolist()
        [0.0, 500.0]

    Source:
        Liu et al. 2023, "Flow Straight and Fast", algorithm 1.
    """

    method: ClassVar[str] = "euler"
    steps: int = 50
    shift: float = 1.0
    convention: Convention = "noise_at_one"

    def host_times(self) -> np.ndarray:
        """The starts of the steps; see `Sampler.host_times`."""
        return (self._times()[:-1] * FLOW_TIME_SCALE).astype(np.float32)

    def coefficients(self) -> FlowCoefficients:
        """Changes of the time; see `Sampler.coefficients`."""
        return self._changes()

    def step(self, predict: Predict, x: Array, at: At) -> Step:
        """Follow the velocity; see `Sampler.step`."""
        left, dt = at.coefficients
        v = predict(x).value
        return Step(x + dt * v, clean=x + left * v)


@dataclasses.dataclass(frozen=True)
class Heun(_Flow):
    r"""Heun steps along a rectified flow: second order, two evaluations a step.

    :math:`x_{i+1} = x_i + \tfrac12(t_{i+1}-t_i)\,(v(x_i,t_i)+v(x'_{i+1},t_{i+1}))` with
    the Euler prediction :math:`x'_{i+1}`. The last step is a full one as well, unless
    told otherwise: a velocity, unlike a score over a noise level, is finite at the
    image. So there are `steps + 1` distinct times, the last of which is the image's.

    Attributes:
        steps: Number of steps; there are twice as many evaluations. SiT's `num_steps`
            counts the points of the grid, one more; REPA's counts steps.
        shift: Positive; above 1, more of the steps lie near the noise. See
            `flow_times`.
        convention: "noise_at_one" for models that predict noise minus image (those of
            `rectified_flow_loss`, REPA); "data_at_one" for image minus noise (SiT).
        correct_last: Whether the last step is corrected, as in SiT's code ("heun2").
            False makes it a step of Euler, as Karras et al. and REPA do; the velocity
            at the image is then evaluated, like the others, but not used.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> Heun(steps=2).eval_times().tolist()
        [1000.0, 500.0, 0.0]
        >>> Heun(steps=2, convention="data_at_one").eval_times().tolist()
        [0.0, 500.0, 1000.0]

    Source:
        Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative
        Models", algorithm 1.
    """

    method: ClassVar[str] = "heun"
    steps: int = 25
    shift: float = 1.0
    convention: Convention = "noise_at_one"
    correct_last: bool = True

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        _checks.check_choice("correct_last", self.correct_last, (True, False))

    @property
    def looks_ahead(self) -> bool:
        """True: a step also evaluates the network at its end."""
        return True

    def host_times(self) -> np.ndarray:
        """The starts of the steps and the end; see `Sampler.host_times`."""
        return (self._times() * FLOW_TIME_SCALE).astype(np.float32)

    def coefficients(self) -> HeunCoefficients:
        """Changes of the time, and weights; see `Sampler.coefficients`."""
        ahead = np.full(self.steps, 0.5)
        if not self.correct_last:
            ahead[-1] = 0.0
        return HeunCoefficients(*self._changes(), ahead)

    def step(self, predict: Predict, x: Array, at: At) -> Step:
        """Predict with the velocity here, correct with the one there."""
        left, dt, ahead = at.coefficients
        v = predict(x).value
        v_ahead = predict(x + dt * v, 1).value
        slope = (1.0 - ahead) * v + ahead * v_ahead
        return Step(x + dt * slope, clean=x + left * v)


def flow_times(
    steps: int, shift: float = 1.0, convention: Convention = "noise_at_one"
) -> np.ndarray:
    r"""The time grid of a rectified flow, from noise to image.

    :math:`t_i = s\,u_i/(1+(s-1)\,u_i)` with :math:`u_i = 1-i/N`, where :math:`N` is
    `steps` and :math:`s` is `shift`; with the data at one, 1 minus that.

    Args:
        steps: Number of steps, at least 1.
        shift: Positive; above 1 it spends more steps near the noise, which larger
            images need. The default leaves the grid even.
        convention: Which end is 1, the noise or the data.

    Returns:
        Float64 of shape [steps + 1], from 1 to 0, or from 0 to 1 with the data at one.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> flow_times(4).tolist(), flow_times(2, shift=3.0).tolist()
        ([1.0, 0.75, 0.5, 0.25, 0.0], [1.0, 0.75, 0.0])
        >>> flow_times(2, 3.0, "data_at_one").tolist()
        [0.0, 0.25, 1.0]

    Source:
        Esser et al. 2024, "Scaling Rectified Flow Transformers", equation 23.
    """
    _checks.check_integer("steps", steps, low=1)
    _checks.check_positive("shift", shift)
    _checks.check_choice("convention", convention, get_args(Convention))
    done = np.arange(steps + 1) / steps
    even = 1.0 - done
    stretch = 1.0 + (shift - 1.0) * even
    return (shift * even if convention == "noise_at_one" else done) / stretch
