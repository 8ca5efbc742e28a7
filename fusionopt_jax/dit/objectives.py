"""Training objectives: rectified flow, and the hybrid loss of the published DiT."""

import math
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from fusionopt_jax import _checks
from fusionopt_jax._types import Params
from fusionopt_jax.dit.config import DiTConfig
from fusionopt_jax.dit.network.embeddings import check_labels
from fusionopt_jax.dit.network.model import apply
from fusionopt_jax.dit.sampling import ddpm, schedules
from fusionopt_jax.dit.sampling.flow import FLOW_TIME_SCALE

TimeDistribution: TypeAlias = Literal["logit_normal", "uniform"]
"""How training draws a flow's time."""


def rectified_flow_loss(
    params: Params,
    config: DiTConfig,
    images: Float[Array, "batch height width channels"],
    labels: Int[Array, " batch"],
    key: PRNGKeyArray,
    *,
    times: TimeDistribution = "logit_normal",
    time_mean: float = 0.0,
    time_std: float = 1.0,
    class_dropout_prob: float | None = None,
    dtype: DTypeLike = jnp.float32,
    remat: bool = False,
) -> Float[Array, ""]:
    r"""Mean squared error of the predicted velocity of a rectified flow.

    :math:`x_t = (1-t)\,x_0 + t\,\epsilon` for images :math:`x_0` and standard normal
    :math:`\epsilon`; the loss is the mean of :math:`(f(x_t, 1000\,t, y) - (\epsilon -
    x_0))^2` over images, pixels and channels, where a label :math:`y` is replaced by
    the null label with probability `class_dropout_prob`. A model with `learn_sigma` is
    trained on the first half of its channels.

    Args:
        params: Parameters of the model.
        config: Its sizes.
        images: [batch, input_size, input_size, in_channels], floating point, of about
            unit scale: latents times their scale factor, or pixels in [-1, 1].
        labels: [batch], integers in [0, num_classes).
        key: Randomness of times, noise and dropped labels.
        times: "logit_normal" draws :math:`t` as the sigmoid of a normal with
            `time_mean` and `time_std`, which trains the middle times more; "uniform"
            draws it in [0, 1).
        time_mean: Above 0 trains nearer to the noise.
        time_std: Positive; the default is that of the paper.
        class_dropout_prob: In [0, 1]; None takes the config's. 0 for validation.
        dtype: Type of the operands of the large products.
        remat: Recompute each block in the backward pass to save memory.

    Returns:
        The loss, a float32 scalar.

    Raises:
        ValueError: If shapes do not fit the config, a setting is out of range, or
            labels are to be dropped from a model without a null label.
        TypeError: If labels are not integers or images are not floating point.

    Example:
        >>> from fusionopt_jax import dit
        >>> config = dit.DiTConfig(input_size=4, hidden_size=32, depth=1, num_heads=2)
        >>> images, labels = jnp.zeros((8, 4, 4, 4)), jnp.arange(8)
        >>> loss = rectified_flow_loss(
        ...     dit.init_params(config), config, images, labels, jax.random.key(0)
        ... )
        >>> bool(0.5 < loss < 1.5)  # a new model predicts 0 for unit noise
        True

    Source:
        Liu et al. 2023, "Flow Straight and Fast", equation 1; logit-normal times from
        Esser et al. 2024, equation 19.
    """
    _checks.check_choice("times", times, ("logit_normal", "uniform"))
    _checks.check_positive("time_std", time_std)
    time_key, noise_key, label_key = jax.random.split(key, 3)
    labels = drop_labels(label_key, config, labels, class_dropout_prob)
    images = jnp.asarray(images)
    batch = images.shape[0]
    if times == "uniform":
        time = jax.random.uniform(time_key, (batch,))
    else:
        normal = jax.random.normal(time_key, (batch,))
        time = jax.nn.sigmoid(time_mean + time_std * normal)
    noise = jax.random.normal(noise_key, images.shape)
    clean = images.astype(jnp.float32)
    share = time[:, None, None, None]
    noisy = (1.0 - share) * clean + share * noise
    velocity = apply(
        params,
        config,
        noisy,
        time * FLOW_TIME_SCALE,
        labels,
        dtype=dtype,
        remat=remat,
    )[..., : config.in_channels]
    return jnp.mean(jnp.square(velocity - (noise - clean)))


def diffusion_loss(
    params: Params,
    config: DiTConfig,
    images: Float[Array, "batch height width channels"],
    labels: Int[Array, " batch"],
    key: PRNGKeyArray,
    *,
    class_dropout_prob: float | None = None,
    dtype: DTypeLike = jnp.float32,
    remat: bool = False,
) -> Float[Array, ""]:
    r"""The hybrid loss of the published DiT: noise error plus a variational bound.

    :math:`x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\epsilon` at a
    uniform integer time; the loss is the mean of :math:`(\epsilon_\theta - \epsilon)^2`
    plus, for a model with `learn_sigma`, the term :math:`L_t` of the variational bound
    in bits per dimension, whose mean is detached so that it trains the variance alone.

    Args:
        params: Parameters of the model.
        config: Its sizes.
        images: [batch, input_size, input_size, in_channels], floating point, scaled to
            about [-1, 1].
        labels: [batch], integers in [0, num_classes).
        key: Randomness of times, noise and dropped labels.
        class_dropout_prob: In [0, 1]; None takes the config's. 0 for validation.
        dtype: Type of the operands of the large products.
        remat: Recompute each block in the backward pass to save memory.

    Returns:
        The loss, a float32 scalar.

    Raises:
        ValueError: If shapes do not fit the config, a setting is out of range, or
            labels are to be dropped from a model without a null label.
        TypeError: If labels are not integers or images are not floating point.

    Example:
        >>> from fusionopt_jax import dit
        >>> config = dit.DiTConfig(input_size=4, hidden_size=32, depth=1, num_heads=2)
        >>> images, labels = jnp.zeros((8, 4, 4, 4)), jnp.arange(8)
        >>> loss = diffusion_loss(
        ...     dit.init_params(config), config, images, labels, jax.random.key(0)
        ... )
        >>> bool(0.5 < loss < 3.0)
        True

    Source:
        Nichol & Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models",
        equations 15 and 16. As in the published DiT, the bound has weight 1, not the
        0.001 of equation 16, and the likelihood of the first time uses a tanh
        approximation of the normal distribution.
    """
    time_key, noise_key, label_key = jax.random.split(key, 3)
    labels = drop_labels(label_key, config, labels, class_dropout_prob)
    images = jnp.asarray(images)
    clean = images.astype(jnp.float32)
    index = jax.random.randint(time_key, images.shape[:1], 0, schedules.TRAINING_STEPS)
    noise = jax.random.normal(noise_key, images.shape)
    bars = _per_image(schedules.linear_alpha_bars(), index)
    noisy = jnp.sqrt(bars) * clean + jnp.sqrt(1.0 - bars) * noise
    output = apply(
        params,
        config,
        noisy,
        index.astype(jnp.float32),
        labels,
        dtype=dtype,
        remat=remat,
    )
    predicted, logits = jnp.split(output, [config.in_channels], axis=-1)
    loss = jnp.mean(jnp.square(predicted - noise))
    if config.learn_sigma:
        predicted = jax.lax.stop_gradient(predicted)
        loss = loss + jnp.mean(bound_term(clean, noisy, predicted, logits, index))
    return loss


def bound_term(
    clean: Float[Array, "batch height width channels"],
    noisy: Float[Array, "batch height width channels"],
    predicted_noise: Float[Array, "batch height width channels"],
    logits: Float[Array, "batch height width channels"],
    index: Int[Array, " batch"],
) -> Float[Array, " batch"]:
    r"""One term of the variational bound of a diffusion, in bits per dimension.

    For :math:`t>0` the divergence of the model's Gaussian step from the true posterior
    :math:`q(x_{t-1}|x_t,x_0)`; for :math:`t=0` minus the log likelihood of `clean`,
    rounded to 256 levels in [-1, 1].

    Args:
        clean: :math:`x_0`.
        noisy: :math:`x_t`.
        predicted_noise: The network's :math:`\epsilon`.
        logits: Its variance logits, -1 for the posterior's variance and 1 for
            :math:`\beta_t`.
        index: :math:`t`, in [0, 999].

    Returns:
        Float32, the mean over pixels and channels of each image.

    Example:
        >>> x = jnp.zeros((1, 2, 2, 1))
        >>> bound_term(x, x, x, -jnp.ones_like(x), jnp.array([500])).round(5)
        Array([0.], dtype=float32)

    Source:
        Ho et al. 2020, equations 5 and 13; Nichol & Dhariwal 2021, equation 15.
    """
    every_time = np.arange(schedules.TRAINING_STEPS)
    table = ddpm.coefficients(every_time, "learned_range")
    # The table is in the order of sampling, from the last time to the first.
    at = jax.tree.map(lambda values: _per_image(values[::-1], index), table)
    guess = (noisy - at.sigma * predicted_noise) / at.alpha
    mean = at.mean_clean * guess + at.mean_image * noisy
    share = (logits + 1.0) / 2.0
    log_variance = share * at.log_variance_high + (1.0 - share) * at.log_variance_low
    true_mean = at.mean_clean * clean + at.mean_image * noisy
    divergence = 0.5 * (
        log_variance
        - at.log_variance_low
        + jnp.exp(at.log_variance_low - log_variance)
        + jnp.square(true_mean - mean) * jnp.exp(-log_variance)
        - 1.0
    )
    likelihood = _rounded_log_likelihood(clean, mean, 0.5 * log_variance)
    first = (index == 0)[:, None, None, None]
    nats = jnp.where(first, -likelihood, divergence)
    return jnp.mean(nats, axis=(1, 2, 3)) / math.log(2.0)


def _rounded_log_likelihood(value: Array, mean: Array, log_deviation: Array) -> Array:
    """Log probability of `value` under a Gaussian rounded to 256 levels in [-1, 1]."""
    centred, scale = value - mean, jnp.exp(-log_deviation)
    below = _normal_cdf(scale * (centred - 1.0 / 255.0))
    above = _normal_cdf(scale * (centred + 1.0 / 255.0))
    # The two end levels also take the tails.
    mass = jnp.where(value > 0.999, 1.0, above) - jnp.where(value < -0.999, 0.0, below)
    return jnp.log(jnp.maximum(mass, 1e-12))


def _normal_cdf(value: Array) -> Array:
    """The tanh approximation of the normal distribution, which is within 3e-4 of it."""
    cubic = value + 0.044715 * value**3
    return 0.5 * (1.0 + jnp.tanh(math.sqrt(2.0 / math.pi) * cubic))


def _per_image(table: np.ndarray, index: Array) -> Array:
    """One number per image out of a table over times, to multiply images with."""
    return jnp.asarray(table, jnp.float32)[index][:, None, None, None]


def drop_labels(
    key: PRNGKeyArray,
    config: DiTConfig,
    labels: Int[Array, " batch"],
    class_dropout_prob: float | None = None,
) -> Int[Array, " batch"]:
    """Replace labels by the null label at random, so that a model can be guided.

    Args:
        key: Which labels are dropped.
        config: Sizes of the model.
        labels: [batch] of integers.
        class_dropout_prob: In [0, 1]; None takes the config's.

    Returns:
        Labels, some of them `config.null_label`.

    Raises:
        ValueError: If a label is out of range, or labels are to be dropped from a model
            without a null label.

    Example:
        >>> from fusionopt_jax import dit
        >>> config = dit.DiTConfig(num_classes=10)
        >>> drop_labels(jax.random.key(0), config, jnp.array([1, 2]), 1.0).tolist()
        [10, 10]
    """
    labels = jnp.asarray(labels)
    check_labels(config, labels)
    if class_dropout_prob is None:
        class_dropout_prob = config.class_dropout_prob
    _checks.check_number("class_dropout_prob", class_dropout_prob, low=0.0, high=1.0)
    if class_dropout_prob == 0:
        return labels
    dropped = jax.random.bernoulli(key, class_dropout_prob, labels.shape)
    return jnp.where(dropped, config.null_label, labels)
