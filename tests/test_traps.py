"""Traps that other optimisers spring silently, and what happens here instead."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import PartitionSpec as P

import fusionopt_jax as fo
from tests import _cases, _compare


def test_injected_hyperparameters_do_not_swallow_the_routing():
    # A callable would be taken for a schedule and called with the step count.
    routing = fo.Routing(min_dim=4, force_scalar=["^head"])
    params = {"body": jnp.ones((4, 4)), "head": jnp.ones((4, 4))}
    tx = optax.inject_hyperparams(fo.fusion_opt)(
        learning_rate=0.1, routing=routing, components=frozenset({"ns5"})
    )
    state = tx.init(params)
    assert set(state.hyperparams) >= {"learning_rate", "weight_decay"}
    assert "routing" not in state.hyperparams
    # Only the matrix that the routing names has momentum.
    trace = optax.tree.get(state, "trace")
    assert trace["body"].shape == (4, 4)
    assert trace["head"] == optax.MaskedNode()


def test_what_shapes_the_program_says_so_when_injected():
    # A dtype can be called, so it is taken for a schedule as well.
    injected = optax.inject_hyperparams(_cases.free(fo.schedule_free))
    tx = injected(optax.identity(), 0.1, state_dtype=jnp.bfloat16)
    with pytest.raises(TypeError, match=r"`state_dtype`.*static_args"):
        tx.init({"w": jnp.ones((2, 2))})
    tx = optax.inject_hyperparams(fo.schedule_free, static_args=("state_dtype",))(
        optax.identity(), 0.1, state_dtype=jnp.bfloat16
    )
    state = tx.init({"w": jnp.ones((2, 2))})
    assert optax.tree.get(state, "z")["w"].dtype == jnp.bfloat16
    tx = optax.inject_hyperparams(_cases.free(fo.ns5))(steps=2)
    with pytest.raises(TypeError, match=r"`steps`.*static_args"):
        tx.init({"w": jnp.ones((2, 2))})


def scanned():
    """A transformer whose layers are stacked by scan, and its table of embeddings."""
    return {
        "layers": {"kernel": jnp.ones((16, 16, 24)), "bias": jnp.ones((16, 24))},
        "norm": {"scale": jnp.ones((16, 16))},
        "embedding": jnp.ones((40, 16)),
    }


def test_scanned_trees_are_not_routed_backwards():
    # By rank alone every one of these is routed wrongly.
    by_rank = jax.tree.map(lambda leaf: leaf.ndim == 2, scanned())
    assert by_rank["layers"] == {"kernel": False, "bias": True}
    routing = fo.Routing(min_dim=8, stacked=["layers", "norm"])
    assert routing.labels(scanned()) == {
        "layers": {"kernel": "spectral", "bias": "scalar"},
        "norm": {"scale": "scalar"},
        "embedding": "scalar",
    }
    # Forgetting the prefix is seen in the table, which counts the groups.
    table = fo.Routing(min_dim=8).table(scanned())
    assert "layers/kernel" in table
    assert "rank 3, no rule" in table


def test_a_half_precision_average_does_not_freeze():
    # In bf16 a sum of equal weights stops growing after 256 to 512 of them, and the
    # average then follows the latest iterate for ever.
    params = {"w": jnp.zeros(2, jnp.bfloat16)}
    tx = fo.schedule_free(optax.identity(), 1e-3, b1=0.9)
    grads = {"w": jnp.asarray([1.0, -1.0], jnp.bfloat16)}

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    steps = 2000
    (params, state), _ = jax.jit(
        lambda: jax.lax.scan(step, (params, tx.init(params)), length=steps)
    )()
    assert state.weight_sum.dtype == jnp.float32
    # Two thousand additions of 1e-6 in float32.
    np.testing.assert_allclose(float(state.weight_sum), steps * 1e-6, rtol=1e-3)
    assert float(state.b1) == np.float32(0.9)
    # z falls by 1e-3 a step; its mean is half of that.
    mean = 1e-3 * (steps + 1) / 2
    average = np.asarray(fo.eval_params(state, params)["w"], np.float64)
    # Rounded to eight bits once, when it is read.
    np.testing.assert_allclose(average, [-mean, mean], rtol=2**-8)


def test_the_average_is_found_where_that_of_optax_is_lost():
    params = {"w": jnp.ones((2, 2))}
    theirs = optax.chain(
        optax.clip(1.0), optax.contrib.schedule_free(optax.sgd(0.1), 0.1)
    )
    with pytest.raises(AttributeError):
        optax.contrib.schedule_free_eval_params(theirs.init(params), params)
    ours = optax.chain(optax.clip(1.0), fo.schedule_free(optax.identity(), 0.1))
    _compare.assert_trees_identical(fo.eval_params(ours.init(params), params), params)


def test_the_first_value_of_a_schedule_is_used():
    schedule = lambda count: jnp.where(count == 0, 1.0, 0.0)  # noqa: E731
    params, grads = {"w": jnp.zeros(2)}, {"w": jnp.ones(2)}
    for tx in (
        fo.schedule_free(optax.identity(), schedule, b1=0.0),
        fo.fusion_opt(
            schedule,
            components=set(),
            polyak_rule=None,
            settings={"adam": {"b1": 0.0}},
        ),
    ):
        state = tx.init(params)
        first, state = tx.update(grads, state, params)
        second, _ = tx.update(grads, state, optax.apply_updates(params, first))
        # Adam's first update is one in each entry, but for its eps.
        np.testing.assert_allclose(first["w"], -1.0, rtol=1e-6)
        np.testing.assert_array_equal(second["w"], 0.0)


def counting():
    """A transformation that counts how often it ran at run time."""
    runs = []

    def update(updates, state, params=None, *, value=None, **extra_args):
        jax.debug.callback(lambda v: runs.append(float(v)), value)
        return updates, state

    init = lambda params: optax.EmptyState()  # noqa: E731
    return optax.GradientTransformationExtraArgs(init, update), runs


def micro_steps(tx):
    """Four gradients with losses 1, 2, 3 and 6 through a compiled update."""
    params = {"w": jnp.zeros(2)}
    state = tx.init(params)
    step = jax.jit(lambda s, v: tx.update({"w": jnp.ones(2)}, s, params, value=v)[1])
    for value in (1.0, 2.0, 3.0, 6.0):
        state = step(state, jnp.asarray(value))
    jax.effects_barrier()


def test_accumulation_pays_once_and_hands_on_the_mean_loss():
    inner, runs = counting()
    micro_steps(optax.MultiSteps(inner, 4))
    # What is avoided: four runs, each with its own loss.
    assert runs == [1.0, 2.0, 3.0, 6.0]
    inner, runs = counting()
    micro_steps(fo.accumulate(inner, 4))
    assert runs == [3.0]


def test_normuon_keeps_a_number_for_each_output_neuron():
    # A Flax kernel is (in, out). With (out, in) statistics this column would stay big.
    params = {"kernel": jnp.ones((3, 5))}
    tx = fo.normuon()
    state = tx.init(params)
    assert state.second_moment["kernel"].shape == (1, 5)
    update = jnp.ones((3, 5)).at[:, 2].set(100.0)
    normalised, _ = tx.update({"kernel": update}, state)
    norms = np.linalg.norm(normalised["kernel"], axis=0)
    np.testing.assert_allclose(norms, norms[0], rtol=1e-5)
    # The same network in the layout of PyTorch gives the transpose.
    tx = fo.normuon(routing=fo.Routing(min_dim=1, layout="out_in"))
    params = {"weight": params["kernel"].T}
    state = tx.init(params)
    assert state.second_moment["weight"].shape == (1, 5)
    turned, _ = tx.update({"weight": update.T}, state)
    _compare.assert_within(turned["weight"], normalised["kernel"].T, 1e-5)


def test_polyak_in_each_group_is_not_one_step_size():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    grads = {"a": jnp.asarray([1.0, 0.0]), "b": jnp.asarray([0.0, 4.0])}
    labels = {"a": "a", "b": "b"}
    direction = optax.sgd(1.0)
    split = optax.multi_transform(
        {label: fo.polyak(direction) for label in "ab"}, labels
    )
    shared = fo.polyak(optax.multi_transform({"a": direction, "b": direction}, labels))
    for tx, expected in ((split, (4.0, 1.0)), (shared, (4.0 / 17**0.5,) * 2)):
        updates, _ = tx.update(grads, tx.init(params), params, value=4.0)
        factors = float(-updates["a"][0]), float(-updates["b"][1] / 4)
        np.testing.assert_allclose(factors, expected, rtol=1e-6)


def test_optax_sees_only_extra_arguments_it_can_take():
    # A plain transformation of Optax inside a wrapper must not meet `value`.
    tx = fo.polyak(fo.schedule_free(optax.scale_by_adam(), 0.1))
    params = {"w": jnp.ones(2)}
    tx.update(params, tx.init(params), params, value=1.0, anything=3)


def test_names_of_coefficients_are_those_of_the_documentation():
    for name in ("quintic", "polar_express", "gram_minimax"):
        fo.ns5(coefficients=name)
        fo.fusion_opt(0.1, settings={"ns5": {"coefficients": name}})
    with pytest.raises(ValueError, match="'quintic', 'polar_express', 'gram_minimax'"):
        fo.ns5(coefficients="muon")


def test_updates_have_the_dtype_of_the_parameters_with_wide_state():
    params = {"w": jnp.ones((4, 4), jnp.bfloat16)}
    tx = fo.fusion_opt(0.1, routing=fo.Routing(min_dim=2))
    updates, _ = tx.update(params, tx.init(params), params, value=1.0)
    assert updates["w"].dtype == jnp.bfloat16


def test_restoring_into_another_routing_is_an_error_and_not_a_missing_moment(tmp_path):
    params = {"body": jnp.ones((4, 4)), "head": jnp.ones((4, 4))}
    saved = fo.Routing(min_dim=4)
    moved = fo.Routing(min_dim=4, force_scalar=["^head"])
    tx = fo.fusion_opt(0.1, routing=saved)
    _, state = tx.update(params, tx.init(params), params, value=1.0)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", tx.init(params))
    _compare.assert_trees_identical(restored, state)
    with pytest.raises(ValueError, match=r"(?s)head: saved as spectral.*now scalar"):
        moved.check(params, saved.fingerprint(params))
    # Going on under the other split is refused as well.
    with pytest.raises(ValueError, match="head"):
        fo.warm_start(fo.fusion_opt(0.1, routing=moved), params, state)


def test_a_stack_of_kernels_is_no_longer_skipped():
    # Rank 4 without a rule is said in the table; with axes it is orthogonalised.
    kernel = {"conv": jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 4, 8)))}
    rule = fo.Rule("conv", axes=fo.MatrixAxes((0, 1, 2), 3))
    tx = fo.ns5(routing=fo.Routing([rule], min_dim=1), hot_dtype="fp32")
    update, _ = tx.update(kernel, tx.init(kernel))
    values = np.linalg.svd(np.reshape(update["conv"], (36, 8)), compute_uv=False)
    # Where the quintic takes values between 0.1 and 1 of the norm.
    assert values.min() > 0.6
    assert values.max() < 1.25


def test_the_state_can_be_fetched_by_its_name():
    params = _cases.parameters()
    tx = fo.fusion_opt(
        0.1,
        routing=_cases.ROUTING,
        components=("ns5", "mona", "sf"),
        polyak_rule="ratio",
    )
    state = tx.init(params)
    for name in ("PolyakState", "ScheduleFreeState", "NS5State", "MONAState"):
        assert type(optax.tree.get(state, name)).__name__ == name


def test_missing_loss_in_a_group_says_what_to_pass():
    labels = {"a": "a", "b": "b"}
    tx = optax.multi_transform(
        {"a": fo.polyak(optax.sgd(0.1)), "b": optax.sgd(0.1)}, labels
    )
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    with pytest.raises(ValueError, match="value=loss"):
        tx.update(params, tx.init(params), params)


@pytest.mark.parametrize(
    "spec",
    [
        P("x", "y"),
        pytest.param(P("x", None), marks=pytest.mark.exhaustive),
        pytest.param(P(None, "y"), marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "name",
    [
        "ns5",
        "normuon",
        "kl_shampoo",
        "shampoo",
        "kl_shampoo_torch",
        "snr_gate",
        "hyperball",
        "fusion_opt",
        "fusion_opt_torch",
    ],
)
def test_a_matrix_may_be_sharded_over_an_explicit_mesh(name, spec):
    # `jax.make_mesh` makes explicit axes, on which `optax.contrib.muon` raises.
    case = _cases.named(name)
    tx = _cases.transformation(case)
    expected, _ = _cases.first_update(case)
    params, grads, _ = _cases.start(case)
    with jax.set_mesh(jax.make_mesh((2, 2), ("x", "y"))):
        put = lambda leaf: jax.device_put(  # noqa: E731
            leaf, P(None, *spec) if leaf.ndim == 3 else spec if leaf.ndim == 2 else P()
        )
        params, grads = jax.tree.map(put, (params, grads))
        extra = _cases.arguments(case)
        step = jax.jit(lambda g, s, p: tx.update(g, s, p, **extra))
        state = jax.jit(lambda p: tx.init(p))(params)
        updates, after = step(grads, state, params)
        types = lambda tree: jax.tree.map(jax.typeof, tree)  # noqa: E731
        assert types(updates) == types(params)
        assert types(after) == types(state)
        step(grads, after, params)
        assert step._cache_size() == 1
    # Another program for the same numbers.
    _compare.assert_trees_within(updates, expected, 2e-5)
