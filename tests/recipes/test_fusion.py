"""The recipe against Optax's optimisers, and against itself built by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fusionopt_jax as fo
from tests import _cases, _compare

pytestmark = pytest.mark.usefixtures("quick_compilation")

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


def path_of(tx, params=None, steps=None, values=None):
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

    @jax.jit
    def run(params, steps, values):
        return jax.lax.scan(step, (params, tx.init(params)), (steps, values))

    (params, state), updates = run(params, steps, values)
    return updates, params, state


def recipe(learning_rate=0.1, **settings):
    return fo.fusion_opt(
        learning_rate, **{"routing": ROUTING, "hot_dtype": "fp32"} | settings
    )


def test_with_everything_off_it_is_muon_of_optax():
    tx = recipe(
        components={"ns5"},
        polyak_rule=None,
        coefficients="quintic",
        scale="aspect",
        momentum=0.95,
        adam_b2=0.999,
        weight_decay=0.01,
    )
    # Optax's eps is 1e-8 of a norm near 1; neither matters here. It looks ahead with
    # another bias correction than Muon's, so both are compared without looking ahead.
    muon = optax.contrib.muon(
        0.1, beta=0.95, nesterov=False, weight_decay=0.01, adam_b2=0.999
    )
    _compare.assert_trees_within(path_of(tx)[0], path_of(muon)[0], ROUNDING)


def test_with_the_matrices_off_it_is_schedule_free_of_optax():
    everything_scalar = fo.Routing(min_dim=1000)
    tx = recipe(
        components={"sf"},
        routing=everything_scalar,
        polyak_rule=None,
        b1=0.9,
        r=0.0,
        adam_b1=0.0,
        adam_b2=0.95,
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
        optax.trace(0.8, accumulator_dtype=jnp.float32),
        fo.ns5(
            routing=ROUTING,
            coefficients="polar_express",
            hot_dtype="fp32",
            scale="rms",
            eps=1e-12,
            **orthogonaliser,
        ),
        fo.normuon(routing=ROUTING),
        optax.add_decayed_weights(0.05),
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


@pytest.mark.parametrize(("sf", "polyak"), [(True, True), (False, False)])
def test_the_recipe_is_its_pieces(sf, polyak):
    components = {"ns5", "normuon", "sf"} if sf else {"ns5", "normuon"}
    tx = recipe(components=components, polyak_rule="ratio" if polyak else None)
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
    updates, _, _ = path_of(recipe(**settings))
    _compare.assert_trees_identical(updates, path_of(by_hand(**settings))[0])
    assert not np.array_equal(updates["wide"], path_of(recipe())[0]["wide"])


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
    tx = recipe()
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
    tx = no_noise(components={"ns5", "sf"}, weight_decay=0.5, b1=0.6)
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
    # The first of an average that starts at zero is 1 - 0.8 of the gradient.
    _compare.assert_within(
        updates["wide"][0], -0.1 * 0.2 * constant["wide"][0], ROUNDING
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
