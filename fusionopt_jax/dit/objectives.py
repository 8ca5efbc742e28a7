"""Training objectives: rectified flow, and the hybrid loss of the published DiT."""

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from fusionopt_jax import _checks
from fusionopt_jax._types import Params
from fusionopt_jax.dit import schedules
from fusionopt_jax.dit.config import DiTConfig
from fusionopt_jax.dit.model import apply, check_labels

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
        time * schedules.FLOW_TIME_SCALE,
        labels,
        dtype=dtype,
        remat=remat,
    )[..., : config.in_channels]
    return jnp.mean(jnp.square(velocity - (noise - clean)))


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
