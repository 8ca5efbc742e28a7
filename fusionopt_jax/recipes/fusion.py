"""`fusion_opt`: the composed optimiser, one learning rate, any set of components."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax

from fusionopt_jax._checks import (
    check_choice,
    check_count,
    check_decay_rate,
    check_non_negative,
    check_rate_or_schedule,
    is_concrete_number,
)
from fusionopt_jax._matrices.newton_schulz import HotDtype, Preconditioner
from fusionopt_jax._optax import checking_leaves, in_float32, keeping_dtype
from fusionopt_jax._types import Number, ScalarOrSchedule
from fusionopt_jax.routing import SCALAR, SPECTRAL, Routing
from fusionopt_jax.transforms.gain import measure_gain
from fusionopt_jax.transforms.kl_shampoo import kl_shampoo
from fusionopt_jax.transforms.mona import mona
from fusionopt_jax.transforms.normuon import normuon
from fusionopt_jax.transforms.ns5 import Scale, ns5
from fusionopt_jax.transforms.polyak import PolyakRule, polyak
from fusionopt_jax.transforms.schedule_free import schedule_free

Component: TypeAlias = Literal["ns5", "normuon", "mona", "shampoo", "sf"]

COMPONENTS: tuple[Component, ...] = ("ns5", "normuon", "mona", "shampoo", "sf")


def fusion_opt(
    learning_rate: ScalarOrSchedule,
    *,
    components: Iterable[str] = ("ns5", "normuon", "sf"),
    routing: Routing | None = None,
    scalar_learning_rate: ScalarOrSchedule | None = None,
    weight_decay: Number = 0.05,
    scalar_weight_decay: Number = 0.0,
    warmup_steps: int | jax.Array = 0,
    momentum: Number = 0.8,
    nesterov: bool = False,
    mona_alpha: Number = 0.2,
    mona_beta: Number = 0.9,
    shampoo_b2: Number = 0.98,
    shampoo_update_every: int | jax.Array = 10,
    coefficients: str | Sequence[Sequence[float]] = "polar_express",
    steps: int | None = None,
    preconditioner: Preconditioner = "frobenius",
    hot_dtype: HotDtype = "auto",
    scale: Scale = "rms",
    audit_every: int | jax.Array | None = None,
    normuon_beta2: Number = 0.95,
    b1: Number = 0.6,
    r: Number = 2.0,
    weight_lr_power: Number = 2.0,
    adam_b1: Number = 0.9,
    adam_b2: Number = 0.99,
    adam_eps: Number = 1e-8,
    polyak_rule: PolyakRule | None = "ratio",
    gains: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Trains matrices spectrally and everything else with Adam, on one step size.

    Matrices get momentum, then the chosen components; the rest gets Adam. Both
    directions have a root mean square of about 0.2 to 1, so one learning rate serves
    both; one Polyak factor multiplies it, and Schedule-Free averaging takes the place
    of a schedule:

    .. math::
        u = \begin{cases}
            \text{normuon}(\text{ns5}(\text{momentum}(g))) + \lambda z
                & \text{matrices} \\
            \text{adam}(g) + \lambda_s z & \text{the rest}
        \end{cases}, \qquad
        z \leftarrow z - \eta\,\gamma\,u

    Args:
        learning_rate: :math:`\eta`, a positive number or a schedule of the step count
            from 0. 8e-3 suits most networks; the update of a matrix has a root mean
            square of 0.2 times that, as with AdamW.
        components: Any of `"ns5"` (orthogonalise), `"normuon"` (equalise neurons),
            `"mona"` (acceleration), `"shampoo"` (KL-Shampoo preconditioning) and `"sf"`
            (Schedule-Free). `{"ns5"}` is Muon, `{"ns5", "normuon"}` NorMuon; the
            default is SF-NorMuon.
        routing: Which leaves are matrices; the default `Routing()` if `None`. Print
            `routing.table(params)` before training.
        scalar_learning_rate: Learning rate of the leaves that are no matrices; `None`
            takes `learning_rate`.
        weight_decay: Decoupled decay :math:`\lambda` of the matrices, on the fast
            iterate :math:`z` where there is `"sf"`, scaled by the learning rate.
        scalar_weight_decay: The same for the rest.
        warmup_steps: Over how many steps the learning rate rises linearly.
        momentum: Decay rate of the matrices' momentum, in [0, 1).
        nesterov: Let the momentum look one step ahead, as Muon's code does.
        mona_alpha: Strength of `"mona"`, see `mona`.
        mona_beta: Decay rate of `"mona"`.
        shampoo_b2: Decay rate of the factors of `"shampoo"`, see `kl_shampoo`.
        shampoo_update_every: Steps between two renewals of its bases.
        coefficients: Of `"ns5"`, see `ns5`.
        steps: Of `"ns5"`, see `ns5`.
        preconditioner: Of `"ns5"`, see `ns5`; `"aol"` with 4 `steps` is its cheapest
            setting of the same quality on matrices of full rank.
        hot_dtype: Dtype of the Newton–Schulz iterations, see `ns5`.
        scale: Of `"ns5"`, see `ns5`. `"rms"` lets one learning rate serve both groups;
            `"aspect"` is Muon's own.
        audit_every: How often `"ns5"` is checked against fp32, see `ns5`.
        normuon_beta2: Decay rate of `"normuon"`.
        b1: Schedule-Free's interpolation, see `schedule_free`.
        r: The power of the step number in Schedule-Free's weights.
        weight_lr_power: The power of the learning rate in Schedule-Free's weights.
        adam_b1: Adam's first decay rate.
        adam_b2: Adam's second decay rate.
        adam_eps: Adam's epsilon.
        polyak_rule: How the shared factor is computed, see `polyak`; `None` leaves it
            out, and updates need no `value` then.
        gains: Keep the size of each stage's input and output in the state, for
            `diagnostics`: `"momentum"`, `"preconditioner"` (the raw gradient through
            momentum and Shampoo), `"ns5"`, `"normuon"` and, for the rest, `"adam"`.

    Returns:
        A complete optimiser: its updates are to be added by `optax.apply_updates`. Its
        update takes the loss as `value=` unless `polyak_rule` is `None`.

    Raises:
        ValueError: If a component doesn't exist or a setting is out of range; from its
            `init`, if a leaf that is routed to the matrices is none.

    Example:
        >>> import jax, jax.numpy as jnp, optax, fusionopt_jax as fo
        >>> params = {"kernel": jnp.ones((128, 128)), "bias": jnp.zeros(128)}
        >>> tx = fo.fusion_opt(8e-3)
        >>> state = tx.init(params)
        >>> loss_fn = lambda params: jnp.mean((params["kernel"] - 0.5) ** 2)
        >>> loss, grads = jax.value_and_grad(loss_fn)(params)
        >>> updates, state = tx.update(grads, state, params, value=loss)
        >>> params = optax.apply_updates(params, updates)
        >>> deploy = fo.eval_params(state, params)

    Source:
        *SF-NorMuon*, arXiv 2605.23061 (composition, decay on the fast iterate, root
        mean square of 0.2); FusionOpt (the components, the shared step size). The
        defaults of `momentum`, `b1` and `r` are the ones that did best in a prototype
        of this library's training example.
    """
    chosen = checked_components(components)
    routing = Routing() if routing is None else routing
    if not isinstance(routing, Routing):
        raise TypeError(f"`routing` must be a Routing, got {routing!r}.")
    check_rate_or_schedule("learning_rate", learning_rate)
    if scalar_learning_rate is not None:
        check_rate_or_schedule("scalar_learning_rate", scalar_learning_rate)
    check_non_negative("weight_decay", weight_decay)
    check_non_negative("scalar_weight_decay", scalar_weight_decay)
    check_count("warmup_steps", warmup_steps)
    check_decay_rate("momentum", momentum)

    def stage(name: str, tx: optax.GradientTransformation) -> Any:
        return measure_gain(name, tx) if gains else tx

    smoothing: list[optax.GradientTransformation] = []
    if "mona" in chosen:
        smoothing.append(mona(alpha=mona_alpha, b1=mona_beta))
    smoothing.append(
        optax.trace(momentum, nesterov=nesterov, accumulator_dtype=jnp.float32)
    )
    if "ns5" not in chosen:
        # The orthogonalised update doesn't depend on the momentum's scale; without it
        # the momentum has to be the average of the gradients, not their sum.
        smoothing.append(optax.scale(1 - momentum))
    direction = stage("momentum", optax.chain(*smoothing))
    if "shampoo" in chosen:
        whitened = kl_shampoo(
            direction,
            routing=routing,
            b2=shampoo_b2,
            update_every=shampoo_update_every,
        )
        direction = stage("preconditioner", whitened)
    spectral: list[optax.GradientTransformation] = [direction]
    if "ns5" in chosen:
        orthogonaliser = ns5(
            routing=routing,
            coefficients=coefficients,
            steps=steps,
            preconditioner=preconditioner,
            hot_dtype=hot_dtype,
            scale=scale,
            eps=_TINY,
            audit_every=audit_every,
        )
        spectral.append(stage("ns5", orthogonaliser))
    if "normuon" in chosen:
        normaliser = normuon(b2=normuon_beta2, routing=routing)
        spectral.append(stage("normuon", normaliser))
    spectral.append(optax.add_decayed_weights(weight_decay))

    adam = optax.scale_by_adam(
        b1=adam_b1, b2=adam_b2, eps=adam_eps, mu_dtype=jnp.float32
    )
    scalar: list[optax.GradientTransformation] = [
        stage("adam", in_float32(adam)),
        optax.add_decayed_weights(scalar_weight_decay),
    ]
    if scalar_learning_rate is not None:
        scalar.append(_rescale(scalar_learning_rate, learning_rate))

    groups = optax.multi_transform(
        {
            SPECTRAL: checking_leaves("fusion_opt", optax.chain(*spectral)),
            SCALAR: checking_leaves("fusion_opt", optax.chain(*scalar)),
        },
        routing.labels,
    )
    rate = _warmed_up(learning_rate, warmup_steps)
    if "sf" in chosen:
        optimiser = schedule_free(
            groups, rate, b1=b1, r=r, weight_lr_power=weight_lr_power
        )
    else:
        optimiser = keeping_dtype(
            optax.chain(groups, optax.scale_by_learning_rate(rate))
        )
    return optimiser if polyak_rule is None else polyak(optimiser, rule=polyak_rule)


# Small enough that the orthogonalised update doesn't depend on the gradient's scale.
_TINY = 1e-12


def checked_components(components: Iterable[str]) -> frozenset[str]:
    """The chosen components, each of which exists."""
    if isinstance(components, str):
        raise TypeError(
            f"`components` must be a set of names such as {{'ns5', 'sf'}}, got the "
            f"string {components!r}."
        )
    chosen = frozenset(components)
    for name in sorted(chosen, key=str):
        check_choice("components", name, COMPONENTS)
    return chosen


def _warmed_up(
    rate: ScalarOrSchedule, warmup_steps: int | jax.Array
) -> ScalarOrSchedule:
    """The rate, rising linearly over its first steps."""
    if is_concrete_number(warmup_steps) and warmup_steps == 0:
        return rate

    def warmed_up(count: jax.Array) -> jax.Array:
        steps = jnp.maximum(jnp.asarray(warmup_steps, jnp.float32), 1)
        return jnp.minimum((count + 1) / steps, 1.0) * _at(rate, count)

    return warmed_up


def _rescale(
    wanted: ScalarOrSchedule, common: ScalarOrSchedule
) -> optax.GradientTransformation:
    """Multiplies a direction by `wanted / common`, by which the common rate cancels."""

    def ratio(count: Any) -> jax.Array:
        below = _at(common, count)
        return jnp.where(
            below > 0, _at(wanted, count) / jnp.where(below > 0, below, 1), 0
        )

    return optax.scale_by_schedule(ratio)


def _at(rate: ScalarOrSchedule, count: Any) -> jax.Array:
    """A rate at a step, in fp32."""
    value: Any = rate(count) if isinstance(rate, Callable) else rate
    return jnp.asarray(value, jnp.float32)
