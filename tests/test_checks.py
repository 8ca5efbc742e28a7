"""Argument checks: what passes, what is raised, and that the words help."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fusionopt_jax as fo
from fusionopt_jax import _checks
from tests import _cases


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (1.0, ValueError, r"`b1` must lie in \[0.0, 1.0\), got 1.0"),
        (-0.1, ValueError, "got -0.1"),
        (float("nan"), ValueError, "got nan"),
        ("0.9", TypeError, "must be a number, got '0.9' of type str"),
        (True, TypeError, "of type bool"),
        (None, TypeError, "got None"),
    ],
)
def test_decay_rates_outside_their_interval_are_refused(value, error, words):
    with pytest.raises(error, match=words):
        _checks.check_decay_rate("b1", value)


def test_the_ends_of_intervals_are_open_or_closed_as_told():
    _checks.check_decay_rate("b1", 0.0)
    _checks.check_number("x", 1.0, low=0.0, high=1.0)
    _checks.check_non_negative("x", 0)
    with pytest.raises(ValueError, match=r"\(0.0, inf\)"):
        _checks.check_positive("x", 0.0)


def test_arrays_pass_because_tracers_have_no_value():
    _checks.check_decay_rate("b1", jnp.asarray(7.0))
    _checks.check_count("steps", jnp.asarray(-1))
    # The check runs while the function is traced.
    jax.jit(lambda b1: _checks.check_decay_rate("b1", b1))(7.0)


@pytest.mark.parametrize("value", [2.0, True, "3", np.int64(3)])
def test_what_shapes_the_program_is_a_python_integer(value):
    with pytest.raises(TypeError, match=r"Python integer.*static_args"):
        _checks.check_integer("steps", value, low=1)


def test_integers_have_a_lowest_value():
    _checks.check_integer("steps", 1, low=1)
    with pytest.raises(ValueError, match="`steps` must be at least 1, got 0"):
        _checks.check_integer("steps", 0, low=1)


def test_a_misspelt_choice_is_guessed():
    with pytest.raises(ValueError, match=r"'plain', 'gram'; got 'gran'.*mean 'gram'"):
        _checks.check_choice("method", "gran", ("plain", "gram"))
    with pytest.raises(ValueError, match=r"got 'zzz'\.$"):
        _checks.check_choice("method", "zzz", ("plain", "gram"))


def test_rates_are_numbers_or_schedules():
    _checks.check_rate_or_schedule("learning_rate", 0.0)
    _checks.check_rate_or_schedule("learning_rate", lambda count: -1.0)
    with pytest.raises(ValueError, match="`learning_rate`"):
        _checks.check_rate_or_schedule("learning_rate", -1e-3)
    with pytest.raises(TypeError, match="`learning_rate`"):
        _checks.check_rate_or_schedule("learning_rate", "1e-3")


@pytest.mark.parametrize("value", [1, 0.5, np.float64(2), jnp.ones(()), np.ones(())])
def test_a_loss_is_one_number(value):
    _checks.check_scalar_value("polyak", value)
    jax.jit(lambda v: _checks.check_scalar_value("polyak", v))(value)


@pytest.mark.parametrize("value", [np.ones(1), jnp.ones((2, 1)), [1.0], (1.0,)])
def test_a_loss_of_another_shape_is_refused(value):
    with pytest.raises(ValueError, match=r"`polyak`.*one number.*jnp\.mean"):
        _checks.check_scalar_value("polyak", value)
    with pytest.raises(ValueError, match="real loss"):
        _checks.check_scalar_value("polyak", 1j)


def test_shapes_are_printed_as_jax_prints_them():
    leaf = jax.ShapeDtypeStruct((3, 4), jnp.bfloat16)
    assert _checks.shape_text(leaf) == "bfloat16[3, 4]"
    assert _checks.shape_text(jnp.zeros(())) == "float32[]"


# Every public factory, one setting out of its range, and the word the error must have.
REFUSED = [
    (lambda: fo.ns5(steps=0), "steps"),
    (lambda: fo.ns5(coefficients="quintik"), "quintic"),
    (lambda: fo.ns5(coefficients=[]), "row"),
    (lambda: fo.ns5(coefficients=[(1.0, 2.0)]), "three numbers"),
    (lambda: _cases.unchecked(fo.ns5, hot_dtype="float16"), "hot_dtype"),
    (lambda: _cases.unchecked(fo.ns5, scale="RMS"), "scale"),
    (lambda: _cases.unchecked(fo.ns5, preconditioner="schatten"), "preconditioner"),
    (lambda: _cases.unchecked(fo.ns5, method="fast"), "method"),
    (lambda: _cases.unchecked(fo.ns5, bucketing="some"), "bucketing"),
    (lambda: fo.ns5(eps=-1.0), "eps"),
    (lambda: fo.ns5(audit_every=0), "audit_every"),
    (lambda: fo.normuon(b2=1.0), "b2"),
    (lambda: fo.normuon(eps=-1e-8), "eps"),
    (lambda: fo.mona(b1=1.0), "b1"),
    (lambda: fo.mona(alpha=float("nan")), "alpha"),
    (lambda: fo.schedule_free(fo.mona(), -1.0), "learning_rate"),
    (lambda: fo.schedule_free(fo.mona(), 1.0, b1=1.5), "b1"),
    (lambda: fo.schedule_free(fo.mona(), 1.0, b1_max=1.0), "b1_max"),
    (lambda: fo.schedule_free(fo.mona(), 1.0, averaging_warmup=-1), "averaging_warmup"),
    (
        lambda: _cases.unchecked(fo.schedule_free, fo.mona(), 1.0, inner_params="y"),
        "inner_params",
    ),
    (lambda: fo.schedule_free(fo.mona(), 1.0, b1=0.0, keep_average=False), "average"),
    (lambda: _cases.unchecked(fo.polyak, fo.mona(), rule="momo"), "rule"),
    (lambda: _cases.unchecked(fo.polyak, fo.mona(), norm="l3"), "norm"),
    (lambda: fo.polyak(fo.mona(), b1=1.0), "b1"),
    (lambda: fo.polyak(fo.mona(), min_ratio=0.0), "min_ratio"),
    (lambda: fo.autoscale(fo.mona(), first=0.0), "first"),
    (lambda: fo.autoscale(fo.mona(), b1=1.0), "b1"),
    (lambda: _cases.unchecked(fo.autoscale, fo.mona(), rule="mechanic"), "rule"),
    (lambda: fo.polyak(fo.mona(), min_ratio=2.0, max_ratio=1.0), "max_ratio"),
    (lambda: fo.kl_shampoo(update_every=0), "update_every"),
    (lambda: _cases.unchecked(fo.kl_shampoo, bucketing="heap"), "bucketing"),
    (lambda: fo.shampoo(update_every=0), "update_every"),
    (lambda: _cases.unchecked(fo.shampoo, sides="left"), "sides"),
    (lambda: _cases.unchecked(fo.kl_shampoo, sides="left"), "sides"),
    (lambda: fo.snr_gate(fo.mona(), floor=2.0), "floor"),
    (lambda: _cases.unchecked(fo.snr_gate, fo.mona(), unit="row"), "unit"),
    (lambda: fo.hyperball(fo.mona(), -1.0), "learning_rate"),
    (lambda: fo.accumulate(fo.mona(), every=0), "every"),
    (lambda: fo.measure_gain("", fo.mona()), "name"),
    (lambda: fo.add_cautious_decayed_weights(-1.0), "weight_decay"),
    (lambda: fo.fusion_opt(-1.0), "learning_rate"),
    (lambda: fo.fusion_opt(1.0, weight_decay=-1.0), "weight_decay"),
    (lambda: fo.fusion_opt(1.0, momentum=1.0), "momentum"),
    (lambda: fo.fusion_opt(1.0, warmup_steps=-1), "warmup_steps"),
    (lambda: fo.MatrixAxes(chunks=0), "chunks"),
    (lambda: _cases.unchecked(fo.MatrixAxes, chunk_axis="rows"), "chunk_axis"),
    (lambda: fo.MatrixAxes(reduction_axis=0), "both"),
    (lambda: fo.Rule("("), "regular expression"),
    (lambda: fo.Routing(min_dim=0), "min_dim"),
    (lambda: _cases.unchecked(fo.Routing, layout="torch"), "out_in"),
    (lambda: fo.Routing(force_scalar=["("]), "force_scalar"),
]


@pytest.mark.parametrize(("build", "word"), REFUSED, ids=range(len(REFUSED)))
def test_settings_are_checked_when_built(build, word):
    with pytest.raises(ValueError, match=word):
        build()


@pytest.mark.parametrize(
    ("build", "old", "new"),
    [(fo.mona, "beta", "b1"), (fo.normuon, "beta2", "b2")],
)
def test_old_names_of_decay_rates_are_still_accepted(build, old, new):
    gradient = {"w": jnp.arange(6.0).reshape(2, 3)}

    def second_update(tx):
        _, state = tx.update(gradient, tx.init(gradient))
        return tx.update(jax.tree.map(jnp.square, gradient), state)[0]

    with pytest.warns(DeprecationWarning, match=f"`{old}` is now called `{new}`"):
        renamed = build(**{old: 0.5})
    np.testing.assert_array_equal(
        second_update(renamed)["w"], second_update(build(**{new: 0.5}))["w"]
    )
    with pytest.raises(ValueError, match=f"`{old}` is the old name of `{new}`"):
        build(**{old: 0.5, new: 0.6})
