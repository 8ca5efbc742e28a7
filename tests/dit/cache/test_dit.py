"""The table of the DiT: exact, and refused when stale."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fusionopt_jax import dit, eval_params, schedule_free
from fusionopt_jax.dit.cache.fingerprint import PARTS
from fusionopt_jax.dit.cache.request import distinct_labels
from tests.dit._models import (
    CONFIG,
    LABELS,
    TIMES,
    golden,
    random_batch,
    random_params,
    run,
)
from tests.references import dit as reference


def cached_and_direct(params, cache, labels, step, **options):
    """The output at one step of a cache, and that of the full network."""
    labels = jnp.asarray(labels, jnp.int32)
    images = random_batch(CONFIG, size=len(labels)).images
    times = jnp.full(len(labels), cache.times[step])
    modulation = cache.at(step, labels)
    stripped = dit.strip_modulators(params)
    return (
        run(stripped, CONFIG, images, None, None, modulation=modulation, **options),
        run(params, CONFIG, images, times, labels, **options),
    )


class TestTable:
    def test_matches_the_published_model(self):
        params, config, arrays = golden()
        # All classes of a small model: more rows than its modulators have, on purpose.
        cache = dit.build_cache(
            params, config, arrays["cache/t"], np.arange(10), force=True
        )
        steps, labels = arrays["cache/steps"], arrays["cache/labels"]
        rows = np.asarray(cache.rows(labels))
        block = np.asarray(cache.block)[steps][:, :, rows].swapaxes(1, 2)
        final = np.asarray(cache.final)[steps][:, rows]
        # Measured 7e-6; PyTorch's own rounding of these sums is of that size.
        expected = arrays["cache/mod"]
        chex.assert_trees_all_close(block.reshape(expected.shape), expected, atol=5e-5)
        expected = arrays["cache/final"]
        chex.assert_trees_all_close(final.reshape(expected.shape), expected, atol=5e-5)

    def test_matches_float64_reference(self, params, cache):
        sizes = reference.Sizes(CONFIG.patch_size, CONFIG.num_heads, CONFIG.depth)
        host = jax.tree.map(np.asarray, params)
        for step, time in enumerate(TIMES):
            for row, label in enumerate(np.asarray(cache.labels)):
                block, final = reference.modulators(host, float(time), label, sizes)
                # fp32 cosines of angles up to 999 are off by 6e-5.
                np.testing.assert_allclose(cache.block[step, :, row], block, atol=5e-4)
                np.testing.assert_allclose(cache.final[step, row], final, atol=5e-4)

    @pytest.mark.parametrize("step", [0, 2])
    @pytest.mark.parametrize("labels", [[7, 3, 3, 10], [10, 10, 10, 10]])
    def test_cached_is_direct(self, params, cache, labels, step):
        cached, direct = cached_and_direct(params, cache, labels, step)
        # One product over all rows sums in another order than one per step.
        scale = float(jnp.max(jnp.abs(direct)))
        chex.assert_trees_all_close(cached, direct, atol=1e-5 * max(scale, 1.0))

    def test_cached_is_direct_unrolled(self, params, cache):
        cached, direct = cached_and_direct(params, cache, [3], 1, unroll=True)
        scale = float(jnp.max(jnp.abs(direct)))
        chex.assert_trees_all_close(cached, direct, atol=1e-5 * max(scale, 1.0))

    def test_cached_is_direct_in_bfloat16(self, params):
        half = dit.build_cache(params, CONFIG, TIMES, LABELS, dtype=jnp.bfloat16)
        assert half.block.dtype == half.final.dtype == jnp.bfloat16
        cached, direct = cached_and_direct(
            params, half, [3, 7, 10, 7], 1, dtype=jnp.bfloat16
        )
        # bfloat16 keeps 8 bits: 4e-3 per modulator, averaged over width and blocks.
        scale = float(jnp.max(jnp.abs(direct)))
        chex.assert_trees_all_close(cached, direct, atol=2e-2 * scale)

    def test_zero_time_on_request(self, params, cache):
        longer = dit.build_cache(params, CONFIG, TIMES, LABELS, include_zero_time=True)
        np.testing.assert_array_equal(longer.times, [*TIMES, 0.0])
        # A fourth row of times changes the order of sums, not the sums.
        chex.assert_trees_all_close(longer.block[:3], cache.block, atol=1e-5)
        longer.check(params, CONFIG, times=TIMES)
        again = dit.build_cache(
            params, CONFIG, longer.times, LABELS, include_zero_time=True
        )
        assert again.times.shape == (4,)

    def test_from_the_state_of_a_module(self, params, cache):
        model = dit.DiT(CONFIG, rngs=nnx.Rngs(0))
        nnx.update(model, params)
        from_state = dit.build_cache(nnx.state(model, nnx.Param), CONFIG, TIMES, LABELS)
        chex.assert_trees_all_equal(from_state, cache)


class TestPytree:
    def test_any_leaf_is_allowed(self, cache):
        names = jax.tree.map(lambda leaf: str(leaf.dtype), cache)
        assert names.block == "float32"
        assert names.config == CONFIG
        paths = [
            jax.tree_util.keystr(path)
            for path, _ in jax.tree_util.tree_leaves_with_path(cache)
        ]
        assert paths == [".block", ".final", ".times", ".labels", ".fingerprint"]

    def test_goes_through_jit(self, cache):
        chex.assert_trees_all_equal(jax.jit(lambda cache: cache)(cache), cache)

    def test_is_frozen(self, cache):
        with pytest.raises(dataclasses.FrozenInstanceError):
            cache.times = cache.times + 1


class TestLabels:
    @pytest.mark.parametrize(
        ("request_labels", "held"),
        [
            ([3], [3, 10]),
            ([10], [10]),
            ([3, 3, 7], [3, 7, 10, 10]),
            ([[1, 2], [3, 10]], [1, 2, 3, 10]),
            (range(10), [*range(10), *[10] * 6]),
        ],
    )
    def test_distinct_null_last_padded(self, request_labels, held):
        labels = distinct_labels(CONFIG, list(request_labels))
        np.testing.assert_array_equal(labels, held)
        assert labels.dtype == np.int32

    def test_model_without_null_label(self):
        config = dataclasses.replace(CONFIG, class_dropout_prob=0.0)
        labels = distinct_labels(config, [5, 1, 2])
        np.testing.assert_array_equal(labels, [1, 2, 5, 5])

    def test_rows_on_the_host_and_while_tracing(self, cache):
        labels = jnp.array([10, 3, 7, 3])
        expected = [2, 0, 1, 0]
        np.testing.assert_array_equal(cache.rows(labels), expected)
        traced = jax.jit(lambda cache, labels: cache.rows(labels))(cache, labels)
        np.testing.assert_array_equal(traced, expected)

    def test_missing_label_is_an_error(self, cache):
        with pytest.raises(dit.StaleCacheError, match="no row for label 4, 9"):
            cache.rows(jnp.array([9, 3, 4]))

    def test_missing_label_while_tracing_gives_nan(self, params, cache):
        @jax.jit
        def one_step(cache, labels):
            modulation = cache.at(0, labels)
            images = random_batch(CONFIG, size=2).images
            return dit.apply(params, CONFIG, images, None, None, modulation=modulation)

        out = one_step(cache, jnp.array([3, 4]))
        assert np.all(np.isfinite(out[0]))
        assert np.all(np.isnan(out[1]))

    def test_other_labels_of_the_bucket_compile_nothing(self, params, cache):
        cached_and_direct(params, cache, [3, 7, 10], 0)
        before = run._cache_size()
        other = dit.build_cache(params, CONFIG, TIMES, [1, 8, 1])
        cached_and_direct(params, other, [8, 8, 1], 0)
        assert run._cache_size() == before

    @pytest.mark.parametrize(
        ("labels", "error", "words"),
        [
            ([], ValueError, "at least one label"),
            ([11], ValueError, "got 11"),
            ([1.0], TypeError, "must be integers"),
        ],
    )
    def test_bad_labels(self, params, labels, error, words):
        labels = np.array(labels, int if not labels else None)
        with pytest.raises(error, match=words):
            dit.build_cache(params, CONFIG, TIMES, labels)

    def test_traced_request(self, params):
        with pytest.raises(TypeError, match="known outside"):
            jax.jit(lambda labels: dit.build_cache(params, CONFIG, TIMES, labels))(
                jnp.array([1])
            )
        with pytest.raises(TypeError, match="known outside"):
            jax.jit(lambda times: dit.build_cache(params, CONFIG, times, [1]))(
                jnp.array([1.0])
            )

    @pytest.mark.parametrize("times", [[], [[1.0]], [np.nan], 3.0])
    def test_bad_times(self, params, times):
        with pytest.raises(ValueError, match="list of finite numbers"):
            dit.build_cache(params, CONFIG, times, [1])


def _edit(params, path, change):
    """A copy of the parameters with one leaf changed."""
    params = jax.tree.map(lambda leaf: leaf, params)
    node = params
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = change(node[path[-1]])
    return params


def _one_bit(leaf):
    """The last bit of the last element flipped."""
    host = np.array(leaf)
    host.view(np.uint32).reshape(-1)[-1] ^= 1
    return jnp.asarray(host)


def _swapped(leaf):
    """Two elements in each other's place: the same values, the same sum."""
    host = np.array(leaf)
    flat = host.reshape(-1)
    flat[[0, 1]] = flat[[1, 0]]
    return jnp.asarray(host)


def _with_delta(leaf):
    """A low-rank adapter merged into a stack of kernels."""
    generator = np.random.default_rng(2)
    depth, inputs, outputs = leaf.shape
    down = generator.normal(0, 1e-3, (depth, inputs, 2))
    up = generator.normal(0, 1e-3, (depth, 2, outputs))
    return leaf + jnp.asarray(down @ up, jnp.float32)


KERNEL = ("blocks", "adaLN_modulation", "kernel")

CHANGES = {
    "average of weights": lambda params: jax.tree.map(
        lambda a, b: 0.5 * (a + b), params, random_params(CONFIG, seed=9)
    ),
    "swap to a moving average": lambda params: jax.tree.map(
        lambda leaf: 0.9999 * leaf, params
    ),
    "merged low-rank delta": lambda params: _edit(params, KERNEL, _with_delta),
    "two elements swapped": lambda params: _edit(params, KERNEL, _swapped),
    "cast to bfloat16": lambda params: jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16), params
    ),
    "NaN in one place": lambda params: _edit(
        params, KERNEL, lambda leaf: leaf.at[0, 0, 0].set(jnp.nan)
    ),
    **{
        f"one bit of {'/'.join(path)}": (
            lambda params, path=path: _edit(params, path, _one_bit)
        )
        for path in PARTS
    },
}


class TestStale:
    @pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
    @pytest.mark.parametrize("strip", [False, True])
    def test_other_weights(self, params, cache, change, strip):
        changed = change(params)
        changed = dit.strip_modulators(changed) if strip else changed
        with pytest.raises(dit.StaleCacheError, match="other weights"):
            cache.check(changed, CONFIG)

    def test_average_of_a_schedule_free_run(self, params):
        tx = schedule_free(optax.identity(), learning_rate=1e-3)
        state, trained = tx.init(params), params
        for _ in range(3):
            updates, state = tx.update(params, state, trained)
            trained = optax.apply_updates(trained, updates)
        deployed = eval_params(state, trained)
        fresh = dit.build_cache(deployed, CONFIG, TIMES, LABELS)
        fresh.check(deployed, CONFIG)
        cache = dit.build_cache(trained, CONFIG, TIMES, LABELS)
        with pytest.raises(dit.StaleCacheError, match="other weights"):
            cache.check(deployed, CONFIG)

    def test_running_average_beside_the_training(self, params):
        average, trained, caches = params, params, []
        for step in range(3):
            trained = jax.tree.map(lambda leaf: 1.01 * leaf, trained)
            average = optax.incremental_update(trained, average, 0.1)
            caches.append(dit.build_cache(average, CONFIG, TIMES, LABELS))
            for age, cache in enumerate(reversed(caches)):
                if age == 0:
                    cache.check(average, CONFIG)
                else:
                    with pytest.raises(dit.StaleCacheError, match="other weights"):
                        cache.check(average, CONFIG)
            with pytest.raises(dit.StaleCacheError, match="other weights"):
                caches[step].check(trained, CONFIG)

    @pytest.mark.parametrize("path", PARTS)
    def test_message_names_the_weight(self, params, cache, path):
        changed = _edit(params, path, _one_bit)
        with pytest.raises(dit.StaleCacheError, match=f": {'/'.join(path)} changed"):
            cache.check(changed, CONFIG)

    def test_same_weights_in_other_arrays_fit(self, params, cache):
        copied = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params)
        cache.check(copied, CONFIG, times=TIMES, labels=[3, 7, 10])
        cache.check(jax.tree.map(np.asarray, params), CONFIG)
        cache.check(dit.strip_modulators(copied), CONFIG)

    def test_weights_that_do_not_feed_it_may_change(self, params, cache):
        changed = _edit(params, ("blocks", "attn", "qkv", "kernel"), _one_bit)
        cache.check(changed, CONFIG)

    def test_nan_weights_equal_themselves(self, params):
        broken = CHANGES["NaN in one place"](params)
        cache = dit.build_cache(broken, CONFIG, TIMES, LABELS)
        cache.check(broken, CONFIG)

    @pytest.mark.parametrize(
        ("times", "words"),
        [
            (TIMES[::-1], "step 0 is 999.0 in the cache, 17.25 in use"),
            (TIMES[:2], "3 steps in the cache, 2 in use"),
            (np.nextafter(TIMES, np.float32(0)), "step 0 is 999.0 in the cache"),
            ([*TIMES, 5.0], "3 steps in the cache, 4 in use"),
        ],
    )
    def test_other_times(self, params, cache, times, words):
        with pytest.raises(dit.StaleCacheError, match=words):
            cache.check(params, CONFIG, times=times)

    def test_other_labels(self, params, cache):
        with pytest.raises(dit.StaleCacheError, match="no row for label 5"):
            cache.check(params, CONFIG, labels=[3, 5])

    def test_other_dtype(self, params, cache):
        with pytest.raises(dit.StaleCacheError, match="holds float32, but bfloat16"):
            cache.check(params, CONFIG, dtype=jnp.bfloat16)

    def test_other_config(self, params, cache):
        other = dataclasses.replace(CONFIG, time_scale=1e-3)
        with pytest.raises(
            dit.StaleCacheError, match=r"time_scale \(1\.0 in the cache"
        ):
            cache.check(params, other)

    def test_modulators_taken_out_by_hand(self, params, cache):
        blocks = {k: v for k, v in params["blocks"].items() if k != "adaLN_modulation"}
        with pytest.raises(ValueError, match="take modulators out with `strip_"):
            cache.check({**params, "blocks": blocks}, CONFIG)

    def test_no_cache_from_stripped_parameters(self, params):
        stripped = dit.strip_modulators(params)
        with pytest.raises(ValueError, match="before `strip_modulators`"):
            dit.build_cache(stripped, CONFIG, TIMES, LABELS)
