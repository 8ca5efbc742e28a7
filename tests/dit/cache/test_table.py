"""Tables of modulations for models that are not the library's own."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionopt_jax import dit

EXAMPLE = pathlib.Path(__file__).parents[3] / "examples" / "04_cache.py"
WEIGHTS = {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)}


def modulate(weights, times, labels):
    features = jnp.stack([times, labels.astype(jnp.float32)], axis=-1)
    mods = features @ weights["kernel"] + weights["bias"][None, :]
    return {"shift": mods, "deep": [mods[:, None, :2]]}


def table(dtype=None):
    times, labels = [3.0, 1.0], [5, 2, 5]
    return dit.ModulatorTable.build(modulate, WEIGHTS, times, labels, dtype=dtype)


def test_every_pair_of_time_and_label_has_a_row():
    built = table()
    assert built.labels.tolist() == [2, 5]
    assert built.mods["deep"][0].shape == (2, 2, 1, 2)
    kernel = np.arange(6.0).reshape(2, 3)
    for step, time in enumerate([3.0, 1.0]):
        for row, label in enumerate([2, 5]):
            expected = np.array([time, label]) @ kernel + 1.0
            # Small integers: exact in float32.
            np.testing.assert_array_equal(built.mods["shift"][step, row], expected)


def test_rows_follow_the_labels_of_the_batch():
    built = table()
    step = jax.tree.map(lambda leaf: leaf[1], built.mods)
    find = jax.jit(lambda labels: built.rows(labels))
    rows = dit.take_rows(step, find(jnp.array([5, 2, 9, 5])))
    np.testing.assert_array_equal(rows["shift"][0], rows["shift"][3])
    np.testing.assert_array_equal(rows["shift"][1], built.mods["shift"][1, 0])
    assert bool(jnp.isnan(rows["shift"][2]).all())


def test_one_step_by_hand():
    built = table()
    np.testing.assert_array_equal(
        built.at(1, [5, 2])["shift"], built.mods["shift"][1, ::-1]
    )
    with pytest.raises(dit.StaleCacheError, match="label 9"):
        built.at(0, [9])
    with pytest.raises(IndexError, match=r"\[-2, 1\], got 2"):
        built.at(2, [5])


def test_a_stale_table_is_nan_where_its_weights_are_traced():
    built = table()

    @jax.jit
    def rows(built, weights):
        return built.checked(weights, times=[3.0, 1.0]).at(0, jnp.array([5]))

    fits = rows(built, WEIGHTS)
    np.testing.assert_array_equal(fits["shift"][0], built.mods["shift"][0, 1])
    other = {**WEIGHTS, "bias": WEIGHTS["bias"].at[0].add(1e-6)}
    assert all(
        bool(jnp.isnan(leaf).all()) for leaf in jax.tree.leaves(rows(built, other))
    )
    with pytest.raises(TypeError, match="traced by `jax"):
        jax.jit(built.check)(WEIGHTS)


def test_a_table_can_be_kept_in_half_precision():
    assert table(jnp.bfloat16).mods["shift"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("weights", "times", "labels", "words"),
    [
        ({**WEIGHTS, "bias": jnp.array([1.0, 1.0, 1.0 + 1e-7])}, None, None, "bias"),
        ({"kernel": WEIGHTS["kernel"]}, None, None, "2 weight arrays, not 1"),
        (
            jax.tree.map(lambda w: w.astype(jnp.bfloat16), WEIGHTS),
            None,
            None,
            "weights",
        ),
        (WEIGHTS, [3.0, 1.5], None, "times"),
        (WEIGHTS, [3.0, 1.0], [2, 4], "label 4"),
    ],
)
def test_a_stale_table_is_refused(weights, times, labels, words):
    built = table()
    built.check(WEIGHTS, times=[3.0, 1.0], labels=[5])
    with pytest.raises(dit.StaleCacheError, match=words):
        built.check(weights, times=times, labels=labels)


@pytest.mark.parametrize(
    ("function", "times", "labels", "error", "words"),
    [
        (lambda w, t, y: w["bias"], [1.0, 2.0], [0], ValueError, "axis of rows"),
        (lambda w, t, y: {"a": t.sum()}, [1.0], [0], ValueError, "at a;"),
        (modulate, [], [0], ValueError, "times"),
        (modulate, [1.0], [], ValueError, "labels"),
        (modulate, [1.0], [0.5], TypeError, "integers"),
        (modulate, [1.0], [2**32], ValueError, "32 bits"),
        (lambda w, t, y: y, [1.0], [0], TypeError, "floating point"),
    ],
)
def test_what_is_no_table_is_an_error(function, times, labels, error, words):
    with pytest.raises(error, match=words):
        dit.ModulatorTable.build(function, WEIGHTS, times, labels)


def test_the_example_gives_the_same_images_in_nnx_and_linen(capsys):
    spec = importlib.util.spec_from_file_location("cache_example", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    # Two sums of 64 products in another order.
    assert max(example.main()) < 1e-5
    assert "other weights" in capsys.readouterr().out
