"""`fusion_opt`: the composed optimiser, one learning rate, any set of components."""

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fusionopt_jax._checks import (
    check_choice,
    check_count,
    check_decay_rate,
    check_non_negative,
    check_rate_or_schedule,
    did_you_mean,
    is_concrete_number,
)
from fusionopt_jax._direction import Direction, check_direction
from fusionopt_jax._matrices.placement import laid_out, staying
from fusionopt_jax._optax import (
    TransformLike,
    accepting_extra_args,
    chained,
    checking_leaves,
    in_float32,
    keeping_dtype,
    transformation,
)
from fusionopt_jax._types import Number, Params, ScalarOrSchedule
from fusionopt_jax.recipes.components import (
    ADAM,
    COMPONENTS,
    adam,
    check_combination,
    checked_components,
    checked_settings,
    in_place,
)
from fusionopt_jax.recipes.momentum import (
    NESTEROV,
    STATE_DTYPES,
    Nesterov,
    StateDtype,
    averages_in,
    momentum_of,
)
from fusionopt_jax.routing import SCALAR, SPECTRAL, Routing
from fusionopt_jax.transforms.gain import measure_gain
from fusionopt_jax.transforms.kl_shampoo import KLShampooState
from fusionopt_jax.transforms.polyak import PolyakRule, polyak
from fusionopt_jax.transforms.shampoo import ShampooState

# States of matrices, which lie on a mesh as their stacks do.
_DIVIDED = (KLShampooState, ShampooState)


def fusion_opt(
    learning_rate: ScalarOrSchedule,
    *,
    components: Iterable[str] = ("ns5", "normuon", "sf"),
    routing: Routing | None = None,
    scalar_learning_rate: ScalarOrSchedule | None = None,
    weight_decay: Number = 0.2,
    scalar_weight_decay: Number = 0.0,
    warmup_steps: int | jax.Array = 0,
    momentum: Number = 0.8,
    nesterov: Nesterov = True,
    polyak_rule: PolyakRule | None = None,
    settings: Mapping[str, Any] | None = None,
    groups: Mapping[str, TransformLike] | None = None,
    gains: bool = False,
    state_dtype: StateDtype = "fp32",
) -> optax.GradientTransformationExtraArgs:
    r"""Trains matrices spectrally and everything else with Adam, on one step size.

    Matrices get momentum and the chosen components; the rest gets Adam. Both directions
    have a root mean square of about 0.2 to 1, so one learning rate serves both, and
    Schedule-Free averaging takes the place of a schedule:

    .. math::
        u = \begin{cases}
            \text{normuon}(\text{ns5}(\text{momentum}(g))) + \lambda z
                & \text{matrices} \\
            \text{adam}(g) + \lambda_s z & \text{the rest}
        \end{cases}, \qquad
        z \leftarrow z - \eta\,\gamma\,u

    where the shared factor :math:`\gamma` is 1 unless a `polyak_rule` sets it.
    Components stand in the order in which they are listed here, whatever the order of
    `components`. For the matrices: `"mona"` (acceleration) before the momentum;
    `"shampoo"` (KL-Shampoo) or `"plain_shampoo"` around it; `"ns5"`
    (orthogonalise) and `"normuon"` (equalise neurons) after it; `"snr_gate"` and then
    `"cautious"` around all of these; `"cautious_decay"` in place of the decay, for the
    rest too; `"hyperball"` in place of decay and step. For both groups: `"sf"`
    (Schedule-Free); `"autoscale"` around everything, in place of the Polyak factor,
    with a learning rate near 1.

    Args:
        learning_rate: :math:`\eta`, a positive number or a schedule of the step count
            from 0. 8e-3 suits most networks; the update of a matrix has a root mean
            square of 0.2 times that, as with AdamW.
        components: Any of the names above. `{"ns5"}` is Muon, `{"ns5", "normuon"}`
            NorMuon; the default is SF-NorMuon.
        routing: Which leaves are matrices; the default `Routing()` if `None`. Print
            `routing.table(params)` before training. The `scale` of a rule multiplies
            the learning rate of its leaves.
        scalar_learning_rate: Learning rate of the leaves that are no matrices; `None`
            takes `learning_rate`.
        weight_decay: Decoupled decay :math:`\lambda` of the matrices, on the fast
            iterate :math:`z` where there is `"sf"`, scaled by the learning rate. 0.2
            ended below 0.05 on each of four workloads (`docs/results.md`,
            `python examples/study/run.py --only fixed fixed_0.2`).
        scalar_weight_decay: The same for the rest.
        warmup_steps: Over how many steps the learning rate rises linearly.
        momentum: Decay rate of the matrices' momentum, in [0, 1).
        nesterov: Let the momentum look one step ahead, as Muon's code does; `"optax"`
            corrects the bias of both terms, as `optax.contrib.muon` does. `True` ended
            0.015 and 0.023 below `False` on two of four workloads and level on two
            (`docs/results.md`, `--only fixed_0.2 fixed_nesterov`).
        polyak_rule: How the shared factor :math:`\gamma` is computed from the loss, see
            `polyak`; `None` leaves it out: at one learning rate for four workloads,
            `"ratio"` ended 0.07 and 0.26 higher on two and level on two.
        settings: For a component, or for `"adam"` or `"polyak"`, keyword arguments of
            its transformation: `{"sf": {"b1": 0.9}, "ns5": {"steps": 4}}`. Where
            nothing is said, `"sf"` has `b1=0.6, r=2.0`, `"ns5"` has
            `coefficients="polar_express", scale="rms", eps=1e-12`, `"adam"` has
            `b2=0.99`, and the others what their transformations have.
        groups: Transformations for labels of your own that rules of `routing` give to
            leaves: `{"frozen": optax.set_to_zero()}`. Each returns a direction, as
            `optax.scale_by_adam` does: the learning rate is applied to it, a decay is
            not.
        gains: Keep the size of each stage's input and output in the state, for
            `diagnostics`: `"momentum"`, `"preconditioner"` (the raw gradient through
            momentum and Shampoo), `"ns5"`, `"normuon"` and, for the rest, `"adam"`.
        state_dtype: What averages are kept in between two steps: `"fp32"`; `"bf16"`,
            with stochastic rounding: the momentum, the average gradients of `"mona"`
            and `"snr_gate"`, both moments of Adam; or `"int8"`: the momentum in blocks
            of 8 bits with fp32 scales, the others as for `"bf16"`. SF-NorMuon then
            keeps 8, 6 or 5.03 to 5.06 bytes for each parameter of a matrix, and 12, 8
            or 8 for each of the rest. Both iterates of `"sf"` stay exact, and all else
            is in fp32 as well. See `quantize_state`.

    Returns:
        A complete optimiser, whose updates are added by `optax.apply_updates`. Its
        update needs the loss as `value=` if there is a `polyak_rule`.

    Raises:
        ValueError: If a component doesn't exist or has no meaning beside another, or a
            setting is out of range, doesn't exist or belongs to nothing chosen; from
            its `init`, if a leaf that is routed to the matrices is none, or has a label
            without a group, or a group has no leaf.

    Example:
        >>> import jax, jax.numpy as jnp, optax, fusionopt_jax as fo
        >>> params = {"kernel": jnp.ones((128, 128)), "bias": jnp.zeros(128)}
        >>> tx = fo.fusion_opt(8e-3, settings={"ns5": {"steps": 4}})
        >>> state = tx.init(params)
        >>> loss_fn = lambda params: jnp.mean((params["kernel"] - 0.5) ** 2)
        >>> grads = jax.grad(loss_fn)(params)
        >>> updates, state = tx.update(grads, state, params)
        >>> params = optax.apply_updates(params, updates)
        >>> deploy = fo.eval_params(state, params)

    Source:
        *SF-NorMuon*, arXiv 2605.23061 (composition, decay on the fast iterate, root
        mean square of 0.2; there without look-ahead, `nesterov=False`); FusionOpt (the
        components, the shared step size).
    """
    chosen = checked_components(components)
    check_combination(chosen)
    told = checked_settings(settings, chosen, with_polyak=polyak_rule is not None)
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
    check_choice("nesterov", nesterov, NESTEROV)
    check_choice("state_dtype", state_dtype, STATE_DTYPES)
    _check_effects(chosen, routing, weight_decay, scalar_weight_decay, polyak_rule)
    own = dict(groups or {})
    known = _check_groups(own)

    def build(name: str, **filled: Any) -> optax.GradientTransformationExtraArgs:
        return COMPONENTS[name].build(routing, told[name], **filled)

    def stage(name: str, tx: optax.GradientTransformation) -> Any:
        return measure_gain(name, tx) if gains else tx

    def decayed(
        tx: optax.GradientTransformation, decay: Number
    ) -> optax.GradientTransformation:
        names = in_place("decay", chosen)
        decays = [build(name, weight_decay=decay) for name in names]
        return optax.chain(tx, *(decays or [optax.add_decayed_weights(decay)]))

    smoothing: list[optax.GradientTransformation] = []
    for name in in_place("gradient", chosen):
        fields = COMPONENTS[name].averages
        smoothing.append(averages_in(state_dtype, build(name), fields))
    smoothing.append(momentum_of(momentum, nesterov, state_dtype))
    if "ns5" not in chosen and nesterov != "optax":
        # The orthogonalised update doesn't depend on the momentum's scale; without it
        # the momentum has to be the average of the gradients, not their sum; that of
        # Optax is one.
        smoothing.append(optax.scale(1 - momentum))
    whitened = stage("momentum", optax.chain(*smoothing))
    for name in in_place("momentum", chosen):
        whitened = stage("preconditioner", build(name, inner=whitened))
    after = [stage(name, build(name)) for name in in_place("direction", chosen)]
    spectral = chained(whitened, *after)
    for name in in_place("around", chosen):
        spectral = build(name, inner=spectral)
        spectral = averages_in(state_dtype, spectral, COMPONENTS[name].averages)

    scalar = in_float32(adam(told["adam"], mu_dtype=jnp.float32))
    scalar = averages_in(state_dtype, scalar, ADAM.averages)
    scalar = decayed(stage("adam", scalar), scalar_weight_decay)
    if scalar_learning_rate is not None:
        scalar = optax.chain(scalar, _rescale(scalar_learning_rate, learning_rate))

    rate = _warmed_up(learning_rate, warmup_steps)
    step = optax.scale_by_learning_rate(rate)
    averages = in_place("groups", chosen)
    if in_place("step", chosen):
        (name,) = in_place("step", chosen)
        members = {SPECTRAL: build(name, inner=spectral, learning_rate=rate)}
        rest = {SCALAR: scalar, **own}
        members |= {label: optax.chain(tx, step) for label, tx in rest.items()}
        return _staying(keeping_dtype(_grouped(members, routing)))
    members = {SPECTRAL: decayed(spectral, weight_decay), SCALAR: scalar, **own}
    optimiser = _grouped(members, routing)
    if averages:
        if known:
            # Made of directions alone, and tried one by one.
            optimiser = Direction(*optimiser)
        for name in averages:
            optimiser = build(name, inner=optimiser, learning_rate=rate)
    else:
        optimiser = keeping_dtype(optax.chain(optimiser, step))
    for name in in_place("factor", chosen):
        optimiser = build(name, inner=optimiser)
    if polyak_rule is None:
        return _staying(optimiser)
    return _staying(polyak(optimiser, rule=polyak_rule, **told["polyak"]))


def _staying(tx: TransformLike) -> optax.GradientTransformationExtraArgs:
    """`tx`, on a mesh with a state that lies where its first one does."""
    inner_tx = accepting_extra_args(tx)

    def init_fn(params: Any) -> Any:
        return laid_out(inner_tx.init(params), params, _DIVIDED)

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        updates, after = inner_tx.update(updates, state, params, **extra_args)
        return updates, staying(after, state)

    return transformation(init_fn, update_fn)


def _check_effects(
    chosen: frozenset[str],
    routing: Routing,
    weight_decay: Number,
    scalar_weight_decay: Number,
    polyak_rule: PolyakRule | None,
) -> None:
    """Require that what is asked for has an effect beside the rest."""
    if "cautious_decay" in chosen and not any(
        not is_concrete_number(decay) or decay > 0
        for decay in (weight_decay, scalar_weight_decay)
    ):
        raise ValueError(
            "`components` has 'cautious_decay', but `weight_decay` and "
            "`scalar_weight_decay` are 0: give one of them, or leave it out."
        )
    if "autoscale" in chosen and polyak_rule is not None:
        raise ValueError(
            "'autoscale' estimates the step size that the Polyak factor would "
            "multiply: use one of the two, `polyak_rule=None`."
        )
    if "hyperball" not in chosen:
        return
    without = "'hyperball' keeps every matrix on its sphere and takes the step itself"
    if is_concrete_number(weight_decay) and weight_decay > 0:
        raise ValueError(f"{without}, so that a decay does nothing: `weight_decay=0`.")
    if polyak_rule is not None:
        raise ValueError(
            f"{without}, which no factor can multiply afterwards: `polyak_rule=None`."
        )
    if _has_scales(routing):
        raise ValueError(
            f"{without}, so that the `scale` of a rule can't change its length: leave "
            "it out, or leave 'hyperball' out."
        )


def _check_groups(groups: Mapping[str, TransformLike]) -> bool:
    """Require directions under labels of one's own; whether all could be tried."""
    for label in groups:
        if label in (SPECTRAL, SCALAR):
            raise ValueError(
                f"`groups` has {label!r}, which `components` and `settings` make up: "
                "name a group of your own, and give its label to leaves by a `Rule`."
            )
    return all(
        [check_direction(f"groups[{label!r}]", tx) for label, tx in groups.items()]
    )


def _grouped(
    members: Mapping[str, TransformLike], routing: Routing
) -> optax.GradientTransformationExtraArgs:
    """Every group's transformation on its leaves, then the factors of the rules."""

    def labels(params: Params) -> Any:
        """The label of each leaf, each of which has a group, and each group a leaf."""
        routes = routing.routes(params)
        for route in routes:
            if route.label not in members:
                hint = did_you_mean(route.label, members)
                raise ValueError(
                    f"Leaf {route.path!r} has the label {route.label!r}, for which "
                    f"there is no group: give one in `groups={{{route.label!r}: ...}}`."
                    f"{hint}"
                )
        found = {route.label for route in routes}
        idle = [name for name in members if name not in {SPECTRAL, SCALAR, *found}]
        if routes and idle:
            raise ValueError(
                f"`groups` has {idle[0]!r}, which no leaf has as its label: give it to "
                f"leaves by `Rule(pattern, {idle[0]!r})`, or leave the group out."
            )
        treedef = jax.tree.structure(params)
        return treedef.unflatten([route.label for route in routes])

    checked: dict[Hashable, TransformLike] = {
        # What a group of one's own takes is its own matter.
        label: checking_leaves("fusion_opt", tx) if label in (SPECTRAL, SCALAR) else tx
        for label, tx in members.items()
    }
    tx = optax.multi_transform(checked, labels)
    return optax.chain(tx, _scaled(routing)) if _has_scales(routing) else tx


def _has_scales(routing: Routing) -> bool:
    return any(rule.scale != 1 for rule in routing.rules)


def _scaled(routing: Routing) -> optax.GradientTransformationExtraArgs:
    """Multiplies each leaf by the factor that its rule has."""

    def update_fn(updates: Any, state: Any, params: Any = None, **_: Any) -> Any:
        del params
        scaled = lambda u, scale: (u * scale).astype(u.dtype)  # noqa: E731
        return jax.tree.map(scaled, updates, routing.scales(updates)), state

    return transformation(lambda _: optax.EmptyState(), update_fn)


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
