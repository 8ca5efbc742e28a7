"""`fusion_opt_torch`: the first release of the PyTorch FusionOpt, step for step."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from fusionopt_jax._checks import (
    check_choice,
    check_count,
    check_decay_rate,
    check_non_negative,
    check_number,
    check_positive,
    check_rate_or_schedule,
    is_concrete_number,
)
from fusionopt_jax._direction import Direction
from fusionopt_jax._matrices.buckets import Stack, map_leaves, stack_states
from fusionopt_jax._optax import checking_leaves, keeping_dtype, transformation
from fusionopt_jax._types import (
    Array,
    Count,
    Float,
    Number,
    Params,
    Scalar,
    ScalarOrSchedule,
)
from fusionopt_jax.recipes.components import checked_components
from fusionopt_jax.routing import SCALAR, SPECTRAL, Routing, matrix_views
from fusionopt_jax.transforms.mona import mona
from fusionopt_jax.transforms.ns5 import ns5
from fusionopt_jax.transforms.polyak import polyak
from fusionopt_jax.transforms.schedule_free import schedule_free
from fusionopt_jax.transforms.shampoo import shampoo

TorchHotDtype: TypeAlias = Literal["fp32", "bf16", "fp16", "fp16_safe"]

# Those that the release had; what `fusion_opt` has learnt since means nothing here.
_COMPONENTS = ("ns5", "normuon", "mona", "shampoo", "sf")

_HOT_DTYPES: tuple[TorchHotDtype, ...] = ("fp32", "bf16", "fp16", "fp16_safe")

# Published constants: added to the norm before Newton-Schulz, and the smallest sum of
# squares that a row is divided by the root of.
_NORM_EPS = 1e-12
_SMALLEST_SQUARES = 1e-12


class RowScaleState(NamedTuple):
    """State of the row normalisation in `fusion_opt_torch`.

    Attributes:
        square_sum: For each leaf an fp32 array `(matrices, out)`: the average of every
            output neuron's sum of squares. A tuple of such where chunks are unequal.
    """

    square_sum: Params


def fusion_opt_torch(
    lr: ScalarOrSchedule = 3e-4,
    *,
    beta: Number = 0.9,
    beta_p: Number = 0.98,
    gamma_min: Number = 0.1,
    gamma_max: Number = 10.0,
    mu: Number = 0.95,
    mona_alpha: Number = 0.2,
    beta_n: Number = 0.9,
    beta_k: Number = 0.99,
    eigen_period: int | jax.Array = 100,
    shampoo_delta: Number = 1e-4,
    beta_r: Number = 0.95,
    beta1: Number = 0.9,
    beta2: Number = 0.999,
    eps: Number = 1e-8,
    hot_dtype: TorchHotDtype = "fp32",
    warmup_steps: int | jax.Array = 0,
    components: Iterable[str] | None = None,
    spectral_lr: ScalarOrSchedule | None = None,
    scalar_lr: ScalarOrSchedule | None = None,
    spectral_wd: Number = 0.01,
    scalar_wd: Number = 0.0,
    min_spectral_dim: int = 128,
    force_scalar: Sequence[str] = (),
    routing: Routing | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The first release of the PyTorch FusionOpt, for those who come from it.

    It is kept to compare with and to move from; `fusion_opt` is the one to train with.
    Arguments have that project's names and defaults. For each matrix, with
    :math:`m_0 = A_0 = g_0 = r_0 = 0` and :math:`\delta` = `shampoo_delta`,

    .. math::
        A &\leftarrow \beta_n A + g_t - g_{t-1}, \qquad
        m \leftarrow \mu m + g_t + \alpha A \\
        L &\leftarrow \beta_k L + (1-\beta_k)\, g g^\top, \qquad
        R \leftarrow \beta_k R + (1-\beta_k)\, g^\top g \\
        U &= \sqrt{\max(1, \text{out}/\text{in})}\;
        \operatorname{NS}_5\bigl((L+\delta I)^{-1/4}\, m\, (R+\delta I)^{-1/4}\bigr) \\
        r &\leftarrow \beta_r r + (1-\beta_r) {\textstyle\sum_\text{in} U^2}, \qquad
        u = U / \sqrt{\max(r, 10^{-12})}

    and :math:`u` of Adam for the rest. Then, with
    :math:`\gamma = \text{lr}\cdot\min(1, t/\text{warmup})\cdot\operatorname{clamp}(
    \operatorname{EMA}(f)/\operatorname{EMA}(\overline{|g|}),
    \gamma_{\min}, \gamma_{\max})`,

    .. math::
        z \leftarrow (1 - \gamma\lambda)\,z - \gamma u, \qquad
        x \leftarrow x + (z - x)/t, \qquad y = (1-\beta)\,z + \beta x .

    What is known to be unlike the papers that it cites: the steps of matrices are up to
    :math:`1/\sqrt{1-\beta_r}` = 4.5 times too long at first (no bias correction, no
    norm restored); :math:`\gamma` sits at `gamma_max` times `lr` for real networks; the
    average is uniform over the warm-up too; with small gradients the ridge
    :math:`\delta` makes the preconditioner the identity.

    Args:
        lr: Learning rate, non-negative, or a schedule of the step count from 0.
        beta: Schedule-Free's interpolation.
        beta_p: Decay rate of the averages of the loss and of the gradient's size.
        gamma_min: Lower clamp of their ratio.
        gamma_max: Upper clamp.
        mu: Momentum of the matrices.
        mona_alpha: Strength of the acceleration.
        beta_n: Decay rate of the acceleration.
        beta_k: Decay rate of the Shampoo factors.
        eigen_period: Steps between two eigendecompositions, at least 1.
        shampoo_delta: Ridge on the factors, positive.
        beta_r: Decay rate of the rows' sums of squares.
        beta1: Adam's first decay rate.
        beta2: Adam's second decay rate.
        eps: Adam's epsilon.
        hot_dtype: Dtype of the Newton–Schulz iterations. The norm before them is taken
            in fp32 here, and Shampoo's products are; both are in `hot_dtype` there.
        warmup_steps: Steps of linear warm-up.
        components: Any of `"mona"`, `"shampoo"`, `"ns5"`, `"normuon"`, `"sf"`; `None`
            takes all, as that project does.
        spectral_lr: Learning rate of the matrices; `None` takes `lr`.
        scalar_lr: Learning rate of the rest; `None` takes `lr`.
        spectral_wd: Weight decay of the matrices.
        scalar_wd: Weight decay of the rest.
        min_spectral_dim: Matrices with both sides at least this long are spectral.
        force_scalar: Regular expressions of paths that are not spectral.
        routing: Takes the place of `min_spectral_dim` and `force_scalar`. Give
            `Routing(layout="out_in", ...)` for weights as PyTorch has them; without
            one, kernels are `(in, out)`, and embeddings are scalar.

    Returns:
        A complete optimiser, whose update takes the loss as `value=`. A step without it
        uses the ratio 1.

    Raises:
        ValueError: If a setting is out of range, a component doesn't exist, or
            `routing` and `force_scalar` are both given.

    Example:
        >>> import jax.numpy as jnp, fusionopt_jax as fo
        >>> params = {"kernel": jnp.ones((128, 128)), "bias": jnp.zeros(128)}
        >>> tx = fo.fusion_opt_torch(3e-4, components={"ns5", "normuon", "sf"})
        >>> state = tx.init(params)
        >>> updates, state = tx.update(params, state, params, value=1.0)

    Source:
        Taikakim/fusion-optimiser, commit 6bcbc712 (CC0), `optimizer.py`, `groups.py`.
    """
    chosen = checked_components(
        _COMPONENTS if components is None else components, _COMPONENTS
    )
    for name, value in (
        ("beta_p", beta_p),
        ("mu", mu),
        ("beta_n", beta_n),
        ("beta_k", beta_k),
        ("beta_r", beta_r),
        ("beta1", beta1),
        ("beta2", beta2),
    ):
        check_decay_rate(name, value)
    check_number("beta", beta, low=0.0, high=1.0)
    check_positive("shampoo_delta", shampoo_delta)
    check_count("eigen_period", eigen_period, low=1)
    check_non_negative("spectral_wd", spectral_wd)
    check_non_negative("scalar_wd", scalar_wd)
    check_choice("hot_dtype", hot_dtype, _HOT_DTYPES)
    check_count("warmup_steps", warmup_steps)
    for name, rate in (
        ("lr", lr),
        ("spectral_lr", spectral_lr),
        ("scalar_lr", scalar_lr),
    ):
        if rate is not None:
            check_rate_or_schedule(name, rate)
    if routing is None:
        routing = Routing(min_dim=min_spectral_dim, force_scalar=force_scalar)
    elif force_scalar:
        raise ValueError(
            "`routing` and `force_scalar` were both given: name the leaves in "
            "`Routing(force_scalar=...)`."
        )

    momentum = optax.trace(mu, accumulator_dtype=jnp.float32)
    if "mona" in chosen:
        momentum = optax.chain(mona(alpha=mona_alpha, b1=beta_n), momentum)
    if "shampoo" in chosen:
        momentum = shampoo(
            momentum,
            routing=routing,
            b2=beta_k,
            exponent=-0.25,
            sides="both",
            update_every=eigen_period,
            stagger=False,
            damping=shampoo_delta,
            relative=False,
        )
    spectral = [momentum]
    if "ns5" in chosen:
        spectral.append(
            ns5(routing=routing, scale="aspect", hot_dtype=hot_dtype, eps=_NORM_EPS)
        )
    if "normuon" in chosen:
        spectral.append(_unit_rows(beta_r, routing))
    spectral += [
        optax.add_decayed_weights(spectral_wd),
        _scale_by_rate(lr if spectral_lr is None else spectral_lr),
    ]
    scalar = [
        _adam(beta1, beta2, eps),
        optax.add_decayed_weights(scalar_wd),
        _scale_by_rate(lr if scalar_lr is None else scalar_lr),
    ]
    groups = optax.multi_transform(
        {
            SPECTRAL: checking_leaves("fusion_opt_torch", optax.chain(*spectral)),
            SCALAR: checking_leaves("fusion_opt_torch", optax.chain(*scalar)),
        },
        routing.labels,
    )

    def warmup(count: Any) -> Array:
        """The share of the learning rate that this step takes."""
        steps = jnp.maximum(jnp.asarray(warmup_steps, jnp.float32), 1)
        return jnp.minimum((count + 1) / steps, 1.0)

    if "sf" in chosen:
        # Equal weights: the published average is uniform whatever the rate was.
        optimiser = schedule_free(
            # Made of directions alone.
            Direction(*groups),
            warmup,
            b1=beta,
            weight_lr_power=0.0,
            keep_average=True,
        )
    else:
        optimiser = keeping_dtype(
            optax.chain(groups, optax.scale_by_learning_rate(warmup))
        )
    return polyak(
        optimiser,
        rule="ratio",
        norm="mean_abs",
        b1=beta_p,
        min_ratio=gamma_min,
        max_ratio=gamma_max,
        missing_value="unit",
    )


def _adam(
    beta1: Number, beta2: Number, eps: Number
) -> optax.GradientTransformationExtraArgs:
    """Adam's direction, its bias corrections to the last digit.

    `optax.scale_by_adam` subtracts a power of the rounded decay rate from 1, which at
    0.999 is 1e-5 off in the first steps: more than separates two runs of the original.
    """

    def init_fn(params: Params) -> optax.ScaleByAdamState:
        zeros = optax.tree.zeros_like(params, dtype=jnp.float32)
        return optax.ScaleByAdamState(
            count=jnp.zeros([], jnp.int32),
            mu=zeros,
            nu=jax.tree.map(jnp.copy, zeros),
        )

    def update_fn(
        updates: Any,
        state: optax.ScaleByAdamState,
        params: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, optax.ScaleByAdamState]:
        del params, extra_args
        count = jnp.asarray(optax.safe_increment(state.count))
        g = optax.tree.cast(updates, jnp.float32)
        mu = optax.tree.update_moment(g, state.mu, beta1, 1)
        nu = optax.tree.update_moment(g, state.nu, beta2, 2)
        bias1, bias2 = _one_minus_power(beta1, count), _one_minus_power(beta2, count)
        direction = jax.tree.map(
            lambda m, v, old: (m / bias1 / (jnp.sqrt(v / bias2) + eps)).astype(
                old.dtype
            ),
            mu,
            nu,
            updates,
        )
        return direction, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return transformation(init_fn, update_fn)


def _one_minus_power(decay: Number, count: Count) -> Scalar:
    """1 - decay^count without cancellation."""
    if is_concrete_number(decay):
        log = math.log(decay) if decay > 0 else -math.inf
    else:
        log = jnp.log(decay)
    return -jnp.expm1(count.astype(jnp.float32) * log)


def _unit_rows(
    decay: Number, routing: Routing
) -> optax.GradientTransformationExtraArgs:
    """Divides neurons by the root of an average of their sums of squares."""

    def init_fn(params: Params) -> RowScaleState:
        views = matrix_views(params, routing, "fusion_opt_torch")
        return RowScaleState(
            stack_states(
                params,
                views,
                lambda stack: jnp.zeros((stack.count, stack.outputs), jnp.float32),
            )
        )

    def scale(
        stack: Stack, r: Float[Array, "b out"]
    ) -> tuple[Stack, Float[Array, "b out"]]:
        U = stack.astype(jnp.float32)
        r = decay * r + (1 - decay) * jnp.sum(U * U, axis=1)
        U = U / jnp.sqrt(jnp.maximum(r, _SMALLEST_SQUARES))[:, None, :]
        return U.astype(stack.dtype), r

    def update_fn(
        updates: Any, state: RowScaleState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, RowScaleState]:
        del params, extra_args
        views = matrix_views(updates, routing, "fusion_opt_torch")
        updates, square_sum = map_leaves(
            scale, views, written=[updates], states=[state.square_sum]
        )
        return updates, RowScaleState(square_sum)

    return transformation(init_fn, update_fn)


def _scale_by_rate(rate: ScalarOrSchedule) -> optax.GradientTransformation:
    """Multiplies a direction by a learning rate, without turning its sign."""
    if callable(rate):
        return optax.scale_by_schedule(rate)
    return optax.scale(rate)
