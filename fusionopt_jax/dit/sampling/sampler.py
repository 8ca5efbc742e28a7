r"""What a sampler is: settings, the times it visits, its coefficients and one step.

A sampler is a frozen dataclass: plain settings, hashable, static under `jax.jit`. Each
method is one class in the file of its paper, and all that the rest of the library asks
of it is written here. It owns the list of times at which the network is evaluated
(`Sampler.eval_times`). A cache is built for that list and the loop runs over it, so the
two cannot disagree.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

if TYPE_CHECKING:
    from fusionopt_jax.dit.sampling.ddim import DDIM
    from fusionopt_jax.dit.sampling.ddpm import DDPM
    from fusionopt_jax.dit.sampling.dpm_solver import DPMSolverPP2M
    from fusionopt_jax.dit.sampling.flow import Euler, Heun
    from fusionopt_jax.dit.sampling.sit import SiTSDE


Factor: TypeAlias = Any
"""A coefficient: a NumPy array of shape [steps], of which a step is handed a scalar."""


class Prediction(NamedTuple):
    """What the network says of a noisy image.

    Attributes:
        value: Noise, or a velocity, shaped as the image.
        logits: Variance logits, shaped as the image, or without channels if the network
            predicts none.
    """

    value: Array
    logits: Array


Predict: TypeAlias = Callable[..., Prediction]
"""`predict(x)` evaluates the network at the time of the step; `predict(x, 1)` at that
of the next one, for samplers that look ahead."""


class At(NamedTuple):
    """Where a step stands.

    Attributes:
        coefficients: This step's slice of `Sampler.coefficients`.
        z: Fresh standard normal noise shaped as the image; None unless the sampler
            `is_random`.
        memory: What the step before returned as such, or `Sampler.start`.
    """

    coefficients: Any
    z: Any
    memory: Any


class Step(NamedTuple):
    """What a step returns.

    Attributes:
        image: The next image.
        clean: The clean image that this step predicted; the previews show it.
        memory: What the next step is handed; structured as `Sampler.start` returns it.
    """

    image: Array
    clean: Array
    memory: Any = None


@dataclasses.dataclass(frozen=True)
class Sampler(abc.ABC):
    r"""How to walk from noise to an image, and at which times to ask the network.

    Build one with `Sampler.euler`, `heun`, `sit_sde`, `ddpm`, `ddim` or
    `dpm_solver_pp_2m`, which are the classes below by their short names. The first
    three expect a network that predicts a velocity, :math:`v = \epsilon - x_0` or its
    negative as their `convention` says; the others one that predicts the noise
    :math:`\epsilon`.

    A sampler of your own is a frozen dataclass derived from this one, with `method`,
    `steps`, `host_times`, `coefficients` and `step`; `sample`, `run_sampler` and
    `export_sampler` take it as it is.

    Attributes:
        steps: Number of steps.

    Example:
        >>> from fusionopt_jax import dit
        >>> sampler = dit.Sampler.euler(steps=4)
        >>> sampler.eval_times().tolist()
        [1000.0, 750.0, 500.0, 250.0]
        >>> sampler == dit.Sampler.euler(4), isinstance(sampler, dit.Sampler)
        (True, True)
    """

    euler: ClassVar[type["Euler"]]
    heun: ClassVar[type["Heun"]]
    sit_sde: ClassVar[type["SiTSDE"]]
    ddpm: ClassVar[type["DDPM"]]
    ddim: ClassVar[type["DDIM"]]
    dpm_solver_pp_2m: ClassVar[type["DPMSolverPP2M"]]

    method: ClassVar[str]
    """The short name, for messages and records."""

    steps: int

    @property
    def looks_ahead(self) -> bool:
        """Whether a step evaluates the network at the next step's time too.

        There is then one time more than there are steps.
        """
        return False

    @property
    def evaluations(self) -> tuple[int, ...]:
        """How far ahead each call of `predict` in a step is, in their order.

        A step cache keeps the residuals of each of them apart. A sampler of your own
        that calls it otherwise than once, or once here and once ahead, says so here.
        """
        return (0, 1) if self.looks_ahead else (0,)

    @property
    def is_random(self) -> bool:
        """Whether sampling draws fresh noise, and so needs a key."""
        return False

    @property
    def reads_variance(self) -> bool:
        """Whether the network must predict a variance beside the noise."""
        return False

    @abc.abstractmethod
    def host_times(self) -> np.ndarray:
        """`eval_times` as a NumPy array, also while a function is being traced.

        Returns:
            Float32 of shape [times].
        """

    def eval_times(self) -> Float[Array, " times"]:
        """Every time at which the network is evaluated, in order and once each.

        Returns:
            Float32 of shape [times], in the units that the network sees, 0 to 999 for a
            diffusion model, 1000 times the flow's time otherwise.

        Example:
            >>> from fusionopt_jax import dit
            >>> len(dit.Sampler.ddpm("250").eval_times())
            250
        """
        return jnp.asarray(self.host_times(), jnp.float32)

    @abc.abstractmethod
    def coefficients(self) -> Any:
        """What the steps multiply by, computed on the host in float64.

        Returns:
            A tree of NumPy arrays of shape [steps]. The loop casts them to the type of
            the images and hands each step its own.
        """

    def start(self, x: Array) -> Any:
        """What the first step is handed as `memory`; None for methods that keep none.

        Args:
            x: The noise to start from.

        Returns:
            Any tree of arrays.
        """
        # Only methods that look back need to know what it is shaped like.
        del x

    @abc.abstractmethod
    def step(self, predict: Predict, x: Array, at: At) -> Step:
        """One step.

        Args:
            predict: The network; see `Predict`.
            x: The noisy image, [batch, height, width, channels].
            at: The coefficients of this step, its noise and the memory.

        Returns:
            The next image, the clean prediction, and the memory.
        """
