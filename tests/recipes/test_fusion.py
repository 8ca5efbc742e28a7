"""The recipe against Optax's optimisers, and against itself built by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fusionopt_jax as fo
from fusionopt_jax._optax import MakesStacks, chained
from fusionopt_jax.recipes import components
from tests import _cases, _compare, _compile

ROUTING = fo.Routing(min_dim=4)
# Sixteen entries below one, five steps deep, twice compiled.
ROUNDING = 1e-6


def problem():
    """A wide matrix, a tall one and a vector, and gradients for a few steps."""
    rng = np.random.default_rng(5)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    params = {"wide": draw(4, 6), "tall": draw(6, 4), "bias": draw(6)}
    steps = {name: draw(4, *leaf.shape) for name, leaf in params.items()}
    return params, steps, jnp.asarray([2.0, 1.5, 3.0, 0.5])


def path_of(tx, params=None, steps=None, values=None, compiler_options=None):
    """Updates of every step, the last parameters and the last state."""
    first, gradients, losses = problem()
    params = first if params is None else params
    steps = gradients if steps is None else steps
    values = losses if values is None else values
    tx = optax.with_extra_args_support(tx)

    def step(carry, inputs):
        params, state = carry
        grads, value = inputs
        updates, state = tx.update(grads, state, params, value=value)
        return (optax.apply_updates(params, updates), state), updates

    def run(params, steps, values):
        return jax.lax.scan(step, (params, tx.init(params)), (steps, values))

    run = jax.jit(run, compiler_options=compiler_options)
    (params, state), updates = run(params, steps, values)
    return updates, params, state


def recipe(learning_rate=0.1, settings=None, **arguments):
    """The recipe on `ROUTING`, its iterations in float32."""
    arguments = {"routing": ROUTING, "components": ("ns5", "normuon", "sf")} | arguments
    settings = dict(settings or {})
    if "ns5" in arguments["components"]:
        settings["ns5"] = {"hot_dtype": "fp32"} | settings.get("ns5", {})
    return fo.fusion_opt(learning_rate, settings=settings, **arguments)


@pytest.mark.parametrize("scale", ["rms", "aspect"])
@pytest.mark.parametrize("whitening", ["shampoo", "plain_shampoo"])
def test_whitened_stacks_are_orthogonalised_as_in_a_chain(whitening, scale):
    make = {"shampoo": fo.kl_shampoo, "plain_shampoo": fo.shampoo}[whitening]
    settings = {"scale": scale, "coefficients": "polar_express", "eps": 1e-12}
    chained = optax.chain(
        make(optax.trace(0.8, nesterov=True), routing=ROUTING, b2=0.9),
        fo.ns5(routing=ROUTING, hot_dtype="fp32", **settings),
        fo.normuon(routing=ROUTING),
    )
    params, _, _ = problem()
    params.pop("bias")
    tx = recipe(
        learning_rate=1.0,
        components={"ns5", "normuon", whitening},
        polyak_rule=None,
        weight_decay=0.0,
        settings={whitening: {"b2": 0.9}, "ns5": settings},
    )
    _, steps, losses = problem()
    steps.pop("bias")
    updates, _, state = path_of(tx, params, steps, losses)
    expected, _, _ = path_of(chained, params, steps, losses)
    # Whitened by five steps of gradients of condition ten, in another order of sums.
    _compare.assert_trees_within(
        jax.tree.map(jnp.negative, updates), expected, 1e-4, whitening
    )
    (count,) = {int(count) for _, count in optax.tree.get_all_with_path(state, "count")}
    assert count == len(losses)


@pytest.mark.parametrize("bucketing", ["batch", "leaf"])
def test_each_goes_through_its_stacks_as_it_was_told(bucketing):
    handed = []

    def update(updates, state, params=None, then=None):
        handed.append(then)
        return updates, state

    first = MakesStacks(
        optax.GradientTransformationExtraArgs(lambda _: (), update), "batch"
    )
    tx = chained(first, fo.ns5(bucketing=bucketing))
    gradient = {"kernel": jnp.eye(4)}
    tx.update(gradient, tx.init(gradient))
    (then,) = handed
    assert (then is not None) == (bucketing == "batch")


@pytest.mark.parametrize("look_ahead", [False, True])
def test_with_everything_off_it_is_muon_of_optax(look_ahead):
    tx = recipe(
        components={"ns5"},
        polyak_rule=None,
        momentum=0.95,
        nesterov="optax" if look_ahead else False,
        weight_decay=0.01,
        settings={
            "ns5": {
                "coefficients": "quintic",
                "scale": "consistent_rms" if look_ahead else "aspect",
                "eps": 1e-8,
            },
            "adam": {"b2": 0.999, "nesterov": look_ahead},
        },
    )
    muon = optax.contrib.muon(
        0.1,
        beta=0.95,
        nesterov=look_ahead,
        weight_decay=0.01,
        adam_b2=0.999,
        consistent_rms=0.2 if look_ahead else None,
    )
    # Two orders of the same sums, which an older compiler rounds apart.
    ours, theirs = (
        path_of(each, compiler_options=_compile.as_users())[0] for each in (tx, muon)
    )
    _compare.assert_trees_within(ours, theirs, ROUNDING)


def test_the_look_ahead_of_optax_without_orthogonalisation():
    tx = recipe(
        components=(),
        polyak_rule=None,
        nesterov="optax",
        weight_decay=0.0,
        momentum=0.9,
    )
    params, steps, _ = problem()
    updates, _, _ = path_of(tx, params, jax.tree.map(jnp.ones_like, steps))
    # Of equal gradients the average is 1 - b^t, corrected as if it were a step later.
    t = np.arange(1, 5)
    expected = 0.9 * (1 - 0.9**t) / (1 - 0.9 ** (t + 1)) + 0.1 / (1 - 0.9**t)
    for name in ("wide", "tall"):
        _compare.assert_within(updates[name][:, 0, 0], -0.1 * expected, 1e-7, name)


def test_with_the_matrices_off_it_is_schedule_free_of_optax():
    everything_scalar = fo.Routing(min_dim=1000)
    tx = recipe(
        components={"sf"},
        routing=everything_scalar,
        polyak_rule=None,
        settings={"sf": {"b1": 0.9, "r": 0.0}, "adam": {"b1": 0.0, "b2": 0.95}},
    )
    free = optax.contrib.schedule_free(
        optax.adam(0.1, b1=0.0, b2=0.95), learning_rate=0.1, b1=0.9
    )
    updates, params, state = path_of(tx)
    expected, their_params, their_state = path_of(free)
    _compare.assert_trees_within(updates, expected, ROUNDING)
    _compare.assert_trees_within(
        fo.eval_params(state, params),
        optax.contrib.schedule_free_eval_params(their_state, their_params),
        # Numbers of about 2, recovered through a division by b1.
        3 * ROUNDING,
    )


def by_hand(sf=True, polyak=True, **orthogonaliser):
    """The default recipe out of its pieces."""
    spectral = optax.chain(
        optax.trace(0.8, nesterov=True, accumulator_dtype=jnp.float32),
        fo.ns5(
            routing=ROUTING,
            coefficients="polar_express",
            hot_dtype="fp32",
            scale="rms",
            eps=1e-12,
            **orthogonaliser,
        ),
        fo.normuon(routing=ROUTING),
        optax.add_decayed_weights(0.2),
    )
    groups = optax.multi_transform(
        {"spectral": spectral, "scalar": optax.scale_by_adam(b1=0.9, b2=0.99)},
        ROUTING.labels,
    )
    tx = (
        fo.schedule_free(groups, 0.1, b1=0.6, r=2.0)
        if sf
        else optax.chain(groups, optax.scale_by_learning_rate(0.1))
    )
    return fo.polyak(tx) if polyak else tx


@pytest.mark.parametrize(
    ("sf", "polyak"), [(True, True), (True, False), (False, False)]
)
def test_the_recipe_is_its_pieces(sf, polyak):
    arguments = {} if sf else {"components": {"ns5", "normuon"}}
    if polyak:
        arguments["polyak_rule"] = "ratio"
    tx = recipe(**arguments)
    updates, params, state = path_of(tx)
    expected, their_params, their_state = path_of(by_hand(sf, polyak))
    # A decay of zero and casts to the same dtype are all that the recipe adds.
    _compare.assert_trees_identical(updates, expected)
    _compare.assert_trees_identical(params, their_params)
    if sf:
        _compare.assert_trees_identical(
            fo.eval_params(state, params), fo.eval_params(their_state, their_params)
        )


def test_settings_of_the_orthogonaliser_reach_it():
    settings = {"preconditioner": "aol", "steps": 4}
    updates, _, _ = path_of(recipe(settings={"ns5": settings}))
    by_hand_too = by_hand(polyak=False, **settings)
    _compare.assert_trees_identical(updates, path_of(by_hand_too)[0])
    assert not np.array_equal(updates["wide"], path_of(recipe())[0]["wide"])


# The five that FusionOpt began with, in all their sets.
NAMES = ("ns5", "normuon", "mona", "shampoo", "sf")
STATES = {
    "ns5": "NS5State",
    "normuon": "NorMuonState",
    "mona": "MONAState",
    "shampoo": "KLShampooState",
    "sf": "ScheduleFreeState",
}


@pytest.mark.parametrize(
    "components",
    [
        set(chosen)
        for count in range(len(NAMES) + 1)
        for chosen in itertools.combinations(NAMES, count)
    ],
    ids=lambda components: "+".join(sorted(components)) or "none",
)
def test_every_set_holds_what_was_asked_for_and_no_more(components):
    tx = recipe(components=components)
    params, _, _ = problem()
    state = jax.eval_shape(tx.init, params)
    kinds = {
        type(node).__name__
        for node in jax.tree.leaves(
            state, is_leaf=lambda node: type(node).__name__ in STATES.values()
        )
    } | {name for name in STATES.values() if f"{name}(" in str(state)}
    for name, kind in STATES.items():
        assert (kind in kinds) == (name in components), name
    updates, after = jax.eval_shape(
        lambda *args: tx.update(*args, value=1.0), params, state, params
    )
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert jax.tree.map(lambda u: u.shape, updates) == jax.tree.map(
        lambda p: p.shape, params
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", components.COMPONENTS)
def test_every_component_keeps_the_types_of_the_state(name, dtype):
    tx = recipe(
        components={"ns5", name},
        polyak_rule=None,
        weight_decay=0.0 if name == "hyperball" else 0.05,
    )
    params = optax.tree.cast(problem()[0], dtype)
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    described = lambda tree: jax.tree.map(  # noqa: E731
        lambda leaf: (leaf.shape, leaf.dtype), tree
    )
    assert described(after) == described(state)
    assert described(updates) == described(params)


def test_a_component_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match=r"'kl_shampo'.*") as error:
        recipe(components={"ns5", "kl_shampo"})
    assert "Did you mean 'shampoo'?" in str(error.value)
    with pytest.raises(ValueError, match=r"'ns5', 'normuon', 'mona', 'shampoo', 'sf'"):
        recipe(components={"adam"})
    with pytest.raises(TypeError, match=r"\{'ns5', 'sf'\}.*'ns5'"):
        recipe(components="ns5")


def test_what_an_update_lacks_is_named():
    params, steps, _ = problem()
    grads = jax.tree.map(lambda leaf: leaf[0], steps)
    tx = recipe(polyak_rule="ratio")
    state = tx.init(params)
    with pytest.raises(ValueError, match="value=loss"):
        tx.update(grads, state, params)
    with pytest.raises(ValueError, match=r"update\(grads, state, params"):
        tx.update(grads, state, value=1.0)


def no_noise(**settings):
    """Components whose update is as long as the learning rate says."""
    return recipe(
        **{"components": {"ns5"}, "polyak_rule": None, "weight_decay": 0.0} | settings
    )


def sizes(updates, name):
    """Root mean squares of the updates of every step."""
    return np.sqrt(np.mean(np.asarray(updates[name], np.float64) ** 2, axis=(-2, -1)))


def test_warm_up_rises_linearly_from_the_first_step():
    sized = sizes(path_of(no_noise(warmup_steps=3))[0], "wide")
    # 0.2 is the root mean square of every orthogonalised update.
    np.testing.assert_allclose(sized, 0.2 * 0.1 * np.array([1, 2, 3, 3]) / 3, rtol=1e-5)


def test_schedules_are_read_from_step_zero():
    schedule = lambda count: 0.1 * jnp.asarray([1.0, 3.0, 0.0, 2.0])[count]  # noqa: E731
    sized = sizes(path_of(no_noise(learning_rate=schedule))[0], "wide")
    np.testing.assert_allclose(
        sized, 0.2 * 0.1 * np.array([1, 3, 0, 2]), rtol=1e-5, atol=1e-9
    )
    both = path_of(no_noise(learning_rate=schedule, warmup_steps=2))[0]
    np.testing.assert_allclose(
        sizes(both, "wide"), 0.2 * 0.1 * np.array([0.5, 3, 0, 2]), rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize("components", [{"ns5"}, {"ns5", "sf"}])
def test_the_scalar_group_has_its_own_rate(components):
    common = path_of(no_noise(components=components, learning_rate=0.1))[0]
    halved = path_of(
        no_noise(
            components=components,
            learning_rate=0.1,
            scalar_learning_rate=lambda count: 0.05,
        )
    )[0]
    _compare.assert_within(halved["wide"], common["wide"], ROUNDING)
    _compare.assert_within(halved["bias"], 0.5 * common["bias"], ROUNDING)


def test_a_common_rate_of_zero_takes_no_step_and_makes_no_nan():
    updates, _, _ = path_of(no_noise(learning_rate=0.0, scalar_learning_rate=0.1))
    for leaf in jax.tree.leaves(updates):
        np.testing.assert_array_equal(leaf, 0)


def test_each_group_has_its_own_decay():
    params, steps, _ = problem()
    still = jax.tree.map(jnp.zeros_like, steps)
    updates, _, _ = path_of(
        no_noise(weight_decay=0.5, scalar_weight_decay=0.25), steps=still
    )
    first = jax.tree.map(lambda leaf: leaf[0], updates)
    expected = {
        name: -0.1 * (0.25 if name == "bias" else 0.5) * leaf
        for name, leaf in params.items()
    }
    _compare.assert_trees_within(first, expected, ROUNDING)


def test_decay_sits_on_the_fast_iterate():
    params, steps, _ = problem()
    still = jax.tree.map(jnp.zeros_like, steps)
    tx = no_noise(components={"ns5", "sf"}, weight_decay=0.5)
    _, after, state = path_of(tx, steps=still)
    # z shrinks by 1 - lr * decay every step whatever y and x are.
    _compare.assert_within(
        fo.fast_params(state, after)["wide"], 0.95**4 * params["wide"], 3 * ROUNDING
    )


def test_one_step_size_multiplies_both_groups():
    free = dict(components={"ns5", "sf"}, weight_decay=0.0)
    updates, _, state = path_of(recipe(polyak_rule="ratio", **free))
    alone, _, _ = path_of(recipe(polyak_rule=None, **free))
    # One number: the first loss over the norm of the whole first gradient.
    params, steps, values = problem()
    norm = np.sqrt(sum(np.sum(np.square(leaf[0])) for leaf in steps.values()))
    gamma = float(values[0] / norm)
    assert 0.1 < gamma < 10
    for name in params:
        _compare.assert_within(updates[name][0], gamma * alone[name][0], ROUNDING)
    assert "polyak/step_size" in fo.diagnostics(state)


def test_without_orthogonalisation_the_momentum_is_an_average():
    tx = no_noise(components=set())
    _, steps, _ = problem()
    constant = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), steps)
    updates, _, _ = path_of(tx, steps=constant)
    # The first of an average that starts at zero is 1 - 0.8 of the gradient, and 0.8
    # of that again is what the look-ahead adds.
    _compare.assert_within(
        updates["wide"][0], -0.1 * 0.2 * 1.8 * constant["wide"][0], ROUNDING
    )


def test_half_precision_parameters_keep_their_averages_in_float32():
    params = optax.tree.cast(problem()[0], jnp.bfloat16)
    tx = recipe(components={"ns5", "normuon", "sf", "mona", "shampoo"})
    state = tx.init(params)
    dtypes = {
        leaf.dtype
        for leaf in jax.tree.leaves(state)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    assert dtypes == {jnp.dtype(jnp.float32)}


def test_a_routing_is_asked_for_by_type():
    with pytest.raises(TypeError, match=r"`routing` must be a Routing"):
        _cases.unchecked(fo.fusion_opt, 0.1, routing=ROUTING.labels)


def stabilised(**arguments):
    return recipe(**{"polyak_rule": None, "weight_decay": 0.5} | arguments)


def orthogonalised():
    """The matrices' direction up to the decay, out of its pieces."""
    return optax.chain(
        optax.trace(0.8, nesterov=True, accumulator_dtype=jnp.float32),
        fo.ns5(
            routing=ROUTING,
            coefficients="polar_express",
            hot_dtype="fp32",
            scale="rms",
            eps=1e-12,
        ),
    )


def of_groups(spectral, scalar=None):
    scalar = optax.scale_by_adam(b1=0.9, b2=0.99) if scalar is None else scalar
    return optax.multi_transform(
        {"spectral": spectral, "scalar": scalar}, ROUTING.labels
    )


def test_the_stabilisers_stand_where_they_are_said_to_stand():
    tx = stabilised(
        components={"ns5", "cautious", "snr_gate", "cautious_decay"},
        settings={"snr_gate": {"floor": 0.25}},
        scalar_weight_decay=0.25,
    )
    gated = fo.snr_gate(orthogonalised(), floor=0.25, routing=ROUTING)
    spectral = optax.chain(fo.cautious(gated), fo.add_cautious_decayed_weights(0.5))
    scalar = optax.chain(
        optax.scale_by_adam(b1=0.9, b2=0.99), fo.add_cautious_decayed_weights(0.25)
    )
    expected = optax.chain(
        of_groups(spectral, scalar), optax.scale_by_learning_rate(0.1)
    )
    _compare.assert_trees_within(path_of(tx)[0], path_of(expected)[0], ROUNDING)


def test_hyperball_takes_the_step_of_the_matrices():
    tx = stabilised(
        components={"ns5", "hyperball"}, weight_decay=0.0, scalar_weight_decay=0.25
    )
    scalar = optax.chain(
        optax.scale_by_adam(b1=0.9, b2=0.99),
        optax.add_decayed_weights(0.25),
        optax.scale_by_learning_rate(0.1),
    )
    expected = of_groups(fo.hyperball(orthogonalised(), 0.1, routing=ROUTING), scalar)
    _compare.assert_trees_within(path_of(tx)[0], path_of(expected)[0], ROUNDING)


def test_both_forms_of_shampoo_stand_around_the_momentum():
    momentum = optax.trace(0.8, nesterov=True, accumulator_dtype=jnp.float32)
    for name, whitening in (("shampoo", fo.kl_shampoo), ("plain_shampoo", fo.shampoo)):
        tx = stabilised(components={name, "normuon"}, settings={name: {"b2": 0.9}})
        averaged = optax.chain(momentum, optax.scale(1 - 0.8))
        spectral = optax.chain(
            whitening(averaged, b2=0.9, routing=ROUTING),
            fo.normuon(routing=ROUTING),
            optax.add_decayed_weights(0.5),
        )
        expected = optax.chain(of_groups(spectral), optax.scale_by_learning_rate(0.1))
        # Inverse roots of singular factors enlarge the roundings of two programs.
        _compare.assert_trees_within(
            path_of(tx)[0], path_of(expected)[0], 10 * ROUNDING
        )


def test_autoscale_is_around_everything():
    tx = stabilised(
        components={"ns5", "autoscale"}, settings={"autoscale": {"first": 1e-2}}
    )
    spectral = optax.chain(orthogonalised(), optax.add_decayed_weights(0.5))
    inner = optax.chain(of_groups(spectral), optax.scale_by_learning_rate(0.1))
    expected = fo.autoscale(inner, first=1e-2)
    _compare.assert_trees_within(path_of(tx)[0], path_of(expected)[0], ROUNDING)


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        ({"components": {"shampoo", "plain_shampoo"}}, "don't go together"),
        ({"components": {"hyperball", "autoscale"}}, "don't go together"),
        (
            {"components": {"autoscale", "sf"}, "polyak_rule": "ratio"},
            "`polyak_rule=None`",
        ),
        ({"components": {"hyperball", "sf"}}, "don't go together"),
        ({"components": {"hyperball", "cautious_decay"}}, "don't go together"),
        ({"components": {"hyperball"}}, "`weight_decay=0`"),
        (
            {"components": {"hyperball"}, "weight_decay": 0, "polyak_rule": "ratio"},
            "`polyak_rule=None`",
        ),
        (
            {
                "components": {"hyperball"},
                "weight_decay": 0,
                "routing": fo.Routing([fo.Rule("wide", scale=0.5)], min_dim=4),
            },
            "`scale`",
        ),
        (
            {"components": {"cautious_decay"}, "weight_decay": 0},
            "give one of them",
        ),
    ],
)
def test_what_has_no_meaning_together_is_an_error(arguments, remedy):
    with pytest.raises(ValueError, match=remedy):
        stabilised(**arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mona": {"alpha": 0.1}}, "'mona', which is not among the components"),
        ({"nsS": {"steps": 4}}, "Did you mean 'ns5'"),
        ({"ns5": {"stpes": 4}}, "(?s)'coefficients'.*Did you mean 'steps'"),
        ({"ns5": {"routing": ROUTING}}, "fills in"),
        ({"sf": {"learning_rate": 1.0}}, "fills in"),
        ({"sf": {"b1": 2.0}}, "`b1`"),
        ({"adam": {"beta": 1.0}}, "'b1', 'b2'"),
    ],
)
def test_settings_without_effect_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        fo.fusion_opt(0.1, settings=settings)


def test_settings_of_a_factor_need_its_rule():
    with pytest.raises(ValueError, match="'polyak', which `polyak_rule`=None"):
        fo.fusion_opt(0.1, settings={"polyak": {"b1": 0.5}})
    with pytest.raises(ValueError, match="no effect"):
        fo.fusion_opt(0.1, polyak_rule="ratio", settings={"polyak": {"f_min": 1.0}})
    with pytest.raises(TypeError, match="must map keywords"):
        _cases.unchecked(fo.fusion_opt, 0.1, settings={"sf": 0.9})


FROZEN = fo.Routing([fo.Rule("^tall$", "frozen")], min_dim=4)


@pytest.mark.parametrize("components", [{"ns5"}, {"ns5", "sf"}])
def test_a_group_of_ones_own(components):
    tx = recipe(
        components=components, routing=FROZEN, groups={"frozen": optax.set_to_zero()}
    )
    updates, params, state = path_of(tx)
    np.testing.assert_array_equal(updates["tall"], 0)
    assert np.all(updates["wide"] != 0)
    if "sf" in components:
        deployed = fo.eval_params(state, params)["tall"]
        np.testing.assert_array_equal(deployed, problem()[0]["tall"])


def test_the_rate_of_a_group_of_ones_own_is_the_common_one():
    tx = recipe(
        components={"ns5"},
        polyak_rule=None,
        routing=FROZEN,
        groups={"frozen": optax.identity()},
    )
    updates, _, _ = path_of(tx)
    _compare.assert_within(updates["tall"], -0.1 * problem()[1]["tall"], ROUNDING)


def test_labels_and_groups_that_miss_each_other_are_named():
    params, _, _ = problem()
    with pytest.raises(ValueError, match=r"'tall' has the label 'frozen'.*`groups="):
        recipe(routing=FROZEN).init(params)
    with pytest.raises(ValueError, match="'frozen', which no leaf has"):
        recipe(groups={"frozen": optax.set_to_zero()}).init(params)
    with pytest.raises(ValueError, match="'spectral', which `components`"):
        recipe(groups={"spectral": optax.set_to_zero()})
    with pytest.raises(ValueError, match="goes against the gradient"):
        recipe(routing=FROZEN, groups={"frozen": optax.adam(0.1)})


@pytest.mark.parametrize("components", [{"ns5"}, {"ns5", "sf"}])
def test_the_scale_of_a_rule_multiplies_the_rate(components):
    scaled = fo.Routing([fo.Rule("^(wide|bias)$", scale=0.25)], min_dim=4)
    updates = path_of(no_noise(components=components, routing=scaled))[0]
    plain = path_of(no_noise(components=components))[0]
    for name, factor in (("wide", 0.25), ("bias", 0.25), ("tall", 1.0)):
        _compare.assert_within(updates[name], factor * plain[name], ROUNDING)


def test_what_is_scheduled_or_injected_stays_in_reach():
    tx = optax.inject_hyperparams(fo.fusion_opt)(
        learning_rate=0.1, scalar_learning_rate=0.05, settings={"sf": {"b1": 0.9}}
    )
    reached = tx.init(problem()[0]).hyperparams
    assert set(reached) == {
        "learning_rate",
        "scalar_learning_rate",
        "weight_decay",
        "scalar_weight_decay",
        "warmup_steps",
        "momentum",
    }
