r"""Classifier-free guidance: pairs of predictions, pushed apart.

.. math::
    \tilde f(x, y) = f(x, \varnothing) + s\,(f(x, y) - f(x, \varnothing))

Both predictions of an image come from one call of the network. They lie side by side in
its batch, not in two halves: on a batch that is sharded, both are then on one device.

Source:
    Ho & Salimans 2022, "Classifier-Free Diffusion Guidance" (arXiv 2207.12598),
    equation 6 with s = 1 + w; Kynkäänniemi et al. 2024, "Applying Guidance in a Limited
    Interval", for the interval.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fusionopt_jax import _checks
from fusionopt_jax._types import Params
from fusionopt_jax.dit.config import DiTConfig
from fusionopt_jax.dit.network.model import apply

GuidedChannels: TypeAlias = Literal[3] | None
"""Guide every channel, or the first three as the published code does."""


@dataclasses.dataclass(frozen=True)
class Guidance:
    """What is guided, and when; static under `jax.jit`, unlike the scale.

    Attributes:
        channels: How many channels are guided; None for all of the image's.
        interval: Guide only where the model time over 1000 lies in this closed interval
            of [0, 1]; None for everywhere.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> Guidance(interval=(0.2, 0.9)).channels
    """

    channels: GuidedChannels = None
    interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        _checks.check_choice("cfg_channels", self.channels, (None, 3))
        if self.interval is None:
            return
        if len(self.interval) != 2:
            raise ValueError(
                "`guidance_interval` must be a pair (low, high), got "
                f"{self.interval!r}."
            )
        low, high = self.interval
        _checks.check_number("guidance_interval[0]", low, low=0.0, high=1.0)
        _checks.check_number("guidance_interval[1]", high, low=float(low), high=1.0)
        object.__setattr__(self, "interval", (float(low), float(high)))


def asked_guidance(
    cfg_scale: Any, channels: GuidedChannels, interval: tuple[float, float] | None
) -> Guidance | None:
    """What a request asks to be guided; None for a scale of 1, which is no guidance.

    Args:
        cfg_scale: A number, or an array, whose values are not looked at.
        channels: As in `Guidance`.
        interval: As in `Guidance`.

    Returns:
        The guidance, or None.

    Raises:
        ValueError: If a setting is out of range, or has no effect.

    Example:
        >>> asked_guidance(1.0, 3, None)
        Traceback (most recent call last):
        ...
        ValueError: `cfg_channels` has no effect with cfg_scale=1, which is no ...
    """
    guidance = Guidance(channels, interval)
    if not (isinstance(cfg_scale, int | float) and cfg_scale == 1.0):
        return guidance
    for name, value in (("cfg_channels", channels), ("guidance_interval", interval)):
        if value is not None:
            raise ValueError(
                f"`{name}` has no effect with cfg_scale=1, which is no guidance; leave "
                "it out, or give another scale."
            )
    return None


def paired(labels: Int[Array, " batch"], null_label: int) -> Int[Array, " pairs"]:
    """Each label with the null label beside it.

    Args:
        labels: [batch] integers.
        null_label: The label that stands for none.

    Returns:
        [2 batch]: label, null label, label, null label, ...

    Example:
        >>> paired(jnp.array([3, 7]), 10).tolist()
        [3, 10, 7, 10]
    """
    return jnp.stack([labels, jnp.full_like(labels, null_label)], axis=1).reshape(-1)


def guide(
    network: Callable[[Array], Array],
    images: Float[Array, "batch height width channels"],
    scale: float | Float[Array, "..."],
    channels: int,
) -> Float[Array, "batch height width outputs"]:
    """The guided prediction of a network that is called with pairs.

    Args:
        network: From images, [2 batch, height, width, channels], each of them twice, to
            predictions: the first of each pair given the label, the second given the
            null label, as `paired` lists them.
        images: [batch, height, width, channels].
        scale: Scalar, or one scale per image.
        channels: How many channels are guided; the others, variance logits among them,
            are those of the label.

    Returns:
        The guided prediction.

    Example:
        >>> conditional = jnp.array([1.0, 0.0]).reshape(2, 1, 1, 1)
        >>> images = jnp.ones((1, 1, 1, 2))
        >>> guide(lambda both: conditional * both, images, 4.0, channels=1).tolist()
        [[[[4.0, 1.0]]]]
    """
    output = network(jnp.repeat(images, 2, axis=0))
    output = output.reshape(images.shape[0], 2, *output.shape[1:])
    conditional, unconditional = output[:, 0], output[:, 1]
    scale = jnp.asarray(scale, output.dtype).reshape(-1, 1, 1, 1)
    base = unconditional[..., :channels]
    guided = base + scale * (conditional[..., :channels] - base)
    return jnp.concatenate([guided, conditional[..., channels:]], axis=-1)


def apply_with_guidance(
    params: Params,
    config: DiTConfig,
    images: Any,
    times: Any,
    labels: Any,
    scale: Any,
    *,
    channels: int | None = None,
    **options: Any,
) -> Float[Array, "b h w c_out"]:
    r"""Evaluate the network with and without the labels, and push the two apart.

    The first `channels` channels become
    :math:`f(\varnothing) + s\,(f(y) - f(\varnothing))`, with s in `scale` and y in
    `labels`; the others are those of f(y).

    Args:
        params: Full parameters.
        config: The sizes; static under `jax.jit`. It must have a null label.
        images: `[batch, input_size, input_size, in_channels]`.
        times: `[batch]` model times.
        labels: `[batch]` integers.
        scale: Guidance scale; 1 is no guidance.
        channels: How many channels are guided. None guides every channel of the image
            and leaves the variance; 3 is what the published model does, unintended by
            its author but behind its published figures.
        options: Handed to :func:`~fusionopt_jax.dit.apply`. A `modulation` among them
            is that of twice as many images: label and null label side by side.

    Returns:
        `[batch, input_size, input_size, config.out_channels]`.

    Raises:
        ValueError: If the model has no null label, or as `apply` does.

    Example:
        >>> from fusionopt_jax.dit import init_params
        >>> config = DiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=4)
        >>> params, images = init_params(config), jnp.ones((1, 8, 8, 4))
        >>> time, label = jnp.array([9.0]), jnp.array([3])
        >>> apply_with_guidance(params, config, images, time, label, 4.0).shape
        (1, 8, 8, 8)

    Source:
        Ho and Salimans, "Classifier-Free Diffusion Guidance" (arXiv 2207.12598),
        equation 6 with s = 1 + w.
    """
    images, times, labels = (jnp.asarray(part) for part in (images, times, labels))
    both_times = jnp.repeat(times, 2)
    both_labels = paired(labels, config.null_label)

    def network(both: Array) -> Array:
        """The network on pairs of images."""
        return apply(params, config, both, both_times, both_labels, **options)

    guided = config.in_channels if channels is None else channels
    return guide(network, images, jnp.asarray(scale), guided)
