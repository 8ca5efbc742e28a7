"""Sampling with a real, small network: the cache changes nothing, errors come early."""

import contextlib
import dataclasses
import functools
from typing import get_args

import jax
import jax.extend
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest

from fusionopt_jax import dit
from fusionopt_jax.dit.network.embeddings import position_embedding
from fusionopt_jax.dit.sampling import METHODS
from fusionopt_jax.dit.sampling.ddpm import DDPM, Variance
from tests._compare import assert_within

CONFIG = dit.DiTConfig(
    input_size=4, hidden_size=32, depth=2, num_heads=2, num_classes=10
)
# Mixed, repeated, and one null label; three distinct ones are padded to four.
LABELS = jnp.array([3, 7, 3, 10, 3, 7])
KEY = jax.random.key(5)

# Diffusion starts where a clean image is 0.006 of the input. The first of few steps
# divides by that, and any rounding with it; fifty steps are what people use.
SAMPLERS = {
    "euler": dit.Sampler.euler(4, shift=2.0),
    "heun": dit.Sampler.heun(3),
    "sit_sde": dit.Sampler.sit_sde(4, convention="noise_at_one"),
    "ddpm": dit.Sampler.ddpm("50"),
    "ddpm_fixed_small": dit.Sampler.ddpm("50", variance="fixed_small"),
    "ddpm_fixed_large": dit.Sampler.ddpm("50", variance="fixed_large", clip=True),
    "ddim": dit.Sampler.ddim("50"),
    "ddim_random": dit.Sampler.ddim("ddim50", eta=0.5),
    "dpm_solver_pp_2m": dit.Sampler.dpm_solver_pp_2m(50),
}


@functools.cache
def weights(seed=0):
    """Weights that predict about the noise in an image, so that samples stay near one.

    Patches enter along directions that no position uses, and leave along the same ones.
    Labels and times move the modulation, and with it the prediction, by some tenths.
    """
    rng = np.random.default_rng(seed)

    def normal(deviation, *shape):
        return deviation * rng.standard_normal(shape).astype(np.float32)

    params = jax.tree.map(
        lambda leaf: leaf + normal(0.02, *leaf.shape), dit.init_params(CONFIG, seed)
    )
    width, patch = CONFIG.hidden_size, 2 * 2 * CONFIG.in_channels
    params["y_embedder"]["embedding_table"] = jnp.asarray(normal(0.35, 11, width))
    params["t_embedder"]["fc2"]["kernel"] = jnp.asarray(normal(0.5, width, width))
    # Four positions, and the mean that layer normalisation removes.
    used = np.concatenate([position_embedding(2, width), np.ones((1, width))])
    free = np.float32(np.linalg.svd(used)[2][len(used) : len(used) + patch])
    params["x_embedder"]["proj"]["kernel"] = jnp.asarray(0.5 * free)
    # Noise comes first in the channels of each pixel, variance logits after it.
    noise = 1.5 * free.T.reshape(width, 4, CONFIG.in_channels)
    logits = normal(0.02, *noise.shape)
    params["final_layer"]["linear"]["kernel"] = jnp.asarray(
        np.concatenate([noise, logits], axis=2).reshape(width, 2 * patch)
    )
    return params


def noise_for(labels, seed=1):
    return jax.random.normal(jax.random.key(seed), (len(labels), 4, 4, 4))


def cached_and_fresh(name, dtype):
    """A request with stripped weights, as a function of the cache, and without one."""
    sampler = SAMPLERS[name]
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), weights())
    stripped = dit.strip_modulators(params)
    # Fifty steps of four labels are more rows than a model of this width has weights.
    cache = dit.build_cache(
        params, CONFIG, sampler.eval_times(), LABELS, dtype=dtype, force=True
    )
    request = (noise_for(LABELS), LABELS, sampler, 2.0)
    options = {"key": KEY, "dtype": dtype}
    fresh = dit.sample(params, CONFIG, None, *request, **options)
    return cache, lambda c: dit.sample(stripped, CONFIG, c, *request, **options), fresh


@contextlib.contextmanager
def no_compilation():
    """Fail if anything is compiled inside."""
    events = []

    def listen(event, duration, **_):
        if active and "backend_compile" in event:
            events.append(event)

    active = True
    jax.monitoring.register_event_duration_secs_listener(listen)
    yield
    active = False
    assert not events, f"{len(events)} programs were compiled"


def test_every_sampler_is_compared():
    samplers = SAMPLERS.values()
    assert {type(sampler) for sampler in samplers} == set(METHODS)
    variances = {s.variance for s in samplers if isinstance(s, DDPM)}
    assert variances == set(get_args(Variance))


CACHED_TOLERANCES = {
    # One matrix product per block against one per step: sums in another order.
    # Measured 1e-6.
    jnp.float32: 1e-5,
    # The table keeps eight bits: 2^-9 of a modulator, which moves every layer.
    # Measured 1e-2 for four steps of Euler, 6e-3 elsewhere.
    jnp.bfloat16: 2e-2,
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(
            *(name, dtype),
            marks=[pytest.mark.exhaustive]
            if dtype == jnp.bfloat16 and name != "euler"
            else [],
            id=f"{jnp.dtype(dtype).name}-{name}",
        )
        for dtype in CACHED_TOLERANCES
        for name in SAMPLERS
    ],
)
def test_the_cache_changes_nothing(name, dtype):
    cache, cached, fresh = cached_and_fresh(name, dtype)
    assert 0.5 < float(jnp.abs(fresh).max()) < 2.0
    assert_within(cached(cache), fresh, CACHED_TOLERANCES[dtype])
    # The same comparison finds rows of other labels and of other times.
    for axis, wrong in {
        "label": (jnp.roll(cache.block, 1, 2), jnp.roll(cache.final, 1, 1)),
        "time": (cache.block[::-1], cache.final[::-1]),
    }.items():
        other = cached(dataclasses.replace(cache, block=wrong[0], final=wrong[1]))
        assert float(jnp.abs(other - fresh).max()) > 5 * CACHED_TOLERANCES[dtype], axis


def test_conditioning_matters():
    sampler = SAMPLERS["euler"]
    run = functools.partial(dit.sample, weights(), CONFIG, None)
    noise = jnp.repeat(noise_for([0]), 6, axis=0)
    images = run(noise, LABELS, sampler, 2.0)
    assert_within(images[0], images[2], 1e-5, "same label")
    assert float(jnp.abs(images[0] - images[1]).max()) > 1e-3


@pytest.mark.parametrize("name", SAMPLERS)
def test_another_request_of_the_same_bucket_compiles_nothing(name):
    sampler = SAMPLERS[name]
    params = weights()
    stripped = dit.strip_modulators(params)

    def request(labels, seed, scale):
        labels = np.array(labels, np.int32)
        # Fifty steps of four labels are more rows than this model has weights.
        cache = dit.build_cache(
            params, CONFIG, sampler.eval_times(), labels, force=True
        )
        noise, key = noise_for(labels, seed), jax.random.key(seed)
        return dit.sample(
            stripped, CONFIG, cache, noise, labels, sampler, scale, key=key
        )

    request([3, 7, 3, 10, 3, 7], 1, 2.0)
    with no_compilation():
        request([1, 2, 5, 5, 5, 5], 2, 4.5)


@pytest.mark.parametrize("interval", [None, (0.2, 0.8)])
def test_rows_of_the_cache_are_looked_up_once(interval):
    sampler = SAMPLERS["euler"]
    cache = dit.build_cache(weights(), CONFIG, sampler.eval_times(), LABELS)

    def run(labels):
        request = (cache, noise_for(LABELS), labels, sampler, 2.0)
        return dit.sample(weights(), CONFIG, *request, guidance_interval=interval)

    def primitives(jaxpr, inside=False):
        """Every operation, with whether it stands in the loop over the steps."""
        for equation in jaxpr.eqns:
            yield equation.primitive.name, inside
            steps = equation.primitive.name == "scan" and (
                equation.params["length"] == sampler.steps
            )
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from primitives(inner, inside or steps)

    # Looking a label up is the only search for an index in the program.
    found = list(primitives(jax.make_jaxpr(run)(LABELS).jaxpr))
    assert ("argmax", False) in found
    assert ("argmax", True) not in found


def test_a_new_progress_callback_compiles_nothing():
    sampler, labels = SAMPLERS["euler"], LABELS

    def run(callback):
        noise = noise_for(labels)
        return dit.sample(
            weights(), CONFIG, None, noise, labels, sampler, 1.0, progress=callback
        )

    first, second = [], []
    run(lambda *call: first.append(call))
    with no_compilation():
        run(lambda *call: second.append(call))
    # Callbacks of a program may come out of order.
    assert sorted(first) == sorted(second) == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_guidance_of_scale_one_is_none():
    sampler = SAMPLERS["euler"]
    run = functools.partial(dit.sample, weights(), CONFIG, None, noise_for(LABELS))
    plain = run(LABELS, sampler, 1.0)
    # Rounding of base + 1 * (conditional - base).
    assert_within(run(LABELS, sampler, jnp.float32(1.0)), plain, 1e-5)
    mixed = run(LABELS, sampler, jnp.array([1.0, 3.0, 1.0, 3.0, 1.0, 3.0]))
    assert_within(mixed[::2], plain[::2], 1e-5, "scale 1")
    strong = run(LABELS, sampler, 3.0)
    assert_within(mixed[1::2], strong[1::2], 1e-5, "scale 3")


@pytest.mark.parametrize(
    "settings", [{"cfg_channels": 3}, {"guidance_interval": (0.2, 0.8)}]
)
def test_settings_of_guidance_without_guidance_are_refused(settings):
    request = (weights(), CONFIG)
    sampler, (name,) = SAMPLERS["euler"], settings
    match = f"`{name}` has no effect with cfg_scale=1"
    with pytest.raises(ValueError, match=match):
        dit.sample(*request, None, noise_for(LABELS), LABELS, sampler, 1.0, **settings)
    with pytest.raises(ValueError, match=match):
        dit.calibrate(
            *request, sampler, LABELS, fraction=0.5, cfg_scale=1.0, **settings
        )


def test_three_guided_channels_leave_the_fourth_to_the_label():
    sampler = dit.Sampler.euler(1)
    run = functools.partial(dit.sample, weights(), CONFIG, None, noise_for(LABELS))
    plain = run(LABELS, sampler, 1.0)
    three = run(LABELS, sampler, 4.0, cfg_channels=3)
    every = run(LABELS, sampler, 4.0)
    # Batches of 6 and of 12: sums in another order.
    assert_within(three[..., 3], plain[..., 3], 1e-5)
    assert_within(three[..., :3], every[..., :3], 1e-5)
    assert float(jnp.abs(every[..., 3] - plain[..., 3]).max()) > 1e-3


def test_guidance_interval_limits_guidance():
    sampler = dit.Sampler.euler(2)
    run = functools.partial(dit.sample, weights(), CONFIG, None, noise_for(LABELS))
    plain, strong = run(LABELS, sampler, 1.0), run(LABELS, sampler, 3.0)
    never = run(LABELS, sampler, 3.0, guidance_interval=(0.0, 0.1))
    always = run(LABELS, sampler, 3.0, guidance_interval=(0.5, 1.0))
    first = run(LABELS, sampler, 3.0, guidance_interval=(0.6, 1.0))
    assert_within(never, plain, 1e-5)
    assert_within(always, strong, 1e-5)
    assert float(jnp.abs(first - plain).max()) > 1e-3
    assert float(jnp.abs(first - strong).max()) > 1e-3


def test_previews_come_back_on_request():
    request = (noise_for(LABELS), LABELS, SAMPLERS["euler"], 1.0)
    samples = dit.sample(weights(), CONFIG, None, *request, previews=2)
    assert samples.previews.shape == (2, 6, 4, 4, 4)
    assert_within(samples.previews[-1], samples.images, 1e-5)
    assert_within(samples.images, dit.sample(weights(), CONFIG, None, *request), 1e-5)


def test_noise_is_kept_unless_donated():
    request = (weights(), CONFIG, None)
    sampler = SAMPLERS["euler"]
    noise = noise_for(LABELS)
    kept = dit.sample(*request, noise, LABELS, sampler, 1.0)
    assert not noise.is_deleted()
    donated = dit.sample(*request, noise, LABELS, sampler, 1.0, donate=True)
    assert noise.is_deleted()
    np.testing.assert_array_equal(kept, donated)


@pytest.mark.parametrize("labels_axis", [None, "data"])
def test_a_batch_sharded_over_devices_stays_so(labels_axis):
    sampler = SAMPLERS["heun"]
    # Seven of them and the null label: one row of the cache for each device.
    labels = jnp.arange(8) % 7
    noise = noise_for(labels)
    params = weights()
    # More rows than a model of this width has weights.
    cache = dit.build_cache(params, CONFIG, sampler.eval_times(), labels, force=True)
    stripped = dit.strip_modulators(params)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = dit.batch_sharding(mesh)
    placed = (
        jax.device_put(stripped, dit.shardings(stripped, mesh)),
        CONFIG,
        jax.device_put(cache, dit.cache_shardings(cache, mesh, labels_axis)),
    )
    spread = dit.sample(*placed, *jax.device_put((noise, labels), rows), sampler, 2.0)
    assert spread.sharding.is_equivalent_to(rows, 4)
    single = dit.sample(stripped, CONFIG, cache, noise, labels, sampler, 2.0)
    # A batch of two per device against one of sixteen: sums in another order.
    assert_within(spread, single, 1e-5)
    request = jax.device_put((noise[::-1], labels[::-1]), rows)
    with no_compilation():
        dit.sample(*placed, *request, sampler, 2.0)


def test_can_be_called_inside_a_jitted_function():
    sampler = SAMPLERS["euler"]
    cache = dit.build_cache(weights(), CONFIG, sampler.eval_times(), LABELS)

    @jax.jit
    def run(params, cache, noise, labels):
        return dit.sample(params, CONFIG, cache, noise, labels, sampler, 2.0)

    request = (weights(), cache, noise_for(LABELS), LABELS)
    outer = dit.sample(weights(), CONFIG, cache, *request[2:], sampler, 2.0)
    assert_within(run(*request), outer, 1e-5)
    unknown = run(*request[:3], LABELS.at[1].set(9))
    # An unknown label can't be an error here; it must not be another label's image.
    assert bool(jnp.isnan(unknown[1]).all())
    assert bool(jnp.isfinite(unknown[0]).all())


def test_a_stale_cache_inside_a_jitted_function_gives_no_image():
    sampler = SAMPLERS["euler"]
    cache = dit.build_cache(weights(), CONFIG, sampler.eval_times(), LABELS)
    noise = noise_for(LABELS)

    @jax.jit
    def run(params, cache):
        return dit.sample(params, CONFIG, cache, noise, LABELS, sampler, 2.0)

    # One weight that only the table knows; the stripped one keeps its digest.
    other = jax.tree.map(lambda leaf: leaf, weights())
    kernel = other["blocks"]["adaLN_modulation"]["kernel"]
    other["blocks"]["adaLN_modulation"]["kernel"] = kernel.at[1, 0, 0].add(1e-6)
    for form in (lambda params: params, dit.strip_modulators):
        assert bool(jnp.isfinite(run(form(weights()), cache)).all())
        assert bool(jnp.isnan(run(form(other), cache)).all())
    late = dataclasses.replace(cache, times=cache.times + 1.0)
    assert bool(jnp.isnan(run(weights(), late)).all())


def test_known_weights_are_compared_while_tracing():
    sampler = SAMPLERS["euler"]
    cache = dit.build_cache(weights(), CONFIG, sampler.eval_times(), LABELS)

    def run(params, noise, labels):
        return dit.sample(params, CONFIG, cache, noise, labels, sampler, 2.0)

    shapes = jax.eval_shape(lambda: (noise_for(LABELS), LABELS))
    jax.eval_shape(functools.partial(run, weights()), *shapes)
    with pytest.raises(dit.StaleCacheError, match="other weights"):
        jax.eval_shape(functools.partial(run, weights(seed=1)), *shapes)


def test_a_cache_that_does_not_fit_is_refused():
    sampler = SAMPLERS["euler"]
    params = weights()
    cache = dit.build_cache(params, CONFIG, sampler.eval_times(), LABELS)
    noise = noise_for(LABELS)
    stripped = dit.strip_modulators(params)
    other = jax.tree.map(lambda leaf: 0.999 * leaf, params)
    cases = {
        "times": (stripped, LABELS, dit.Sampler.euler(4)),
        "steps": (stripped, LABELS, dit.Sampler.euler(5)),
        "label": (stripped, LABELS.at[0].set(4), sampler),
        "weights": (other, LABELS, sampler),
    }
    for words, (weights_in_use, labels, walk) in cases.items():
        with pytest.raises(dit.StaleCacheError, match=words):
            dit.sample(weights_in_use, CONFIG, cache, noise, labels, walk)
    other_config = dataclasses.replace(CONFIG, time_scale=0.5)
    with pytest.raises(dit.StaleCacheError, match="time_scale"):
        dit.sample(stripped, other_config, cache, noise, LABELS, sampler)


PLAIN = dataclasses.replace(CONFIG, learn_sigma=False)
UNGUIDED = dataclasses.replace(CONFIG, class_dropout_prob=0.0)


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"labels": LABELS.at[0].set(11)}, {}, "must lie in"),
        ({"labels": LABELS[:5]}, {}, "one per image"),
        ({"noise": jnp.zeros((6, 4, 4, 3))}, {}, "channels come last"),
        ({"noise": jnp.zeros((6, 4, 4))}, {}, "channels come last"),
        ({"sampler": SAMPLERS["ddpm"]}, {}, "key"),
        ({"config": PLAIN, "sampler": SAMPLERS["ddpm"]}, {"key": KEY}, "fixed_small"),
        (
            {"config": UNGUIDED, "labels": LABELS.at[3].set(0)},
            {},
            "no null label",
        ),
        ({"cfg_scale": -1.0}, {}, "cfg_scale"),
        ({"cfg_scale": jnp.ones(3)}, {}, "one per image"),
        ({}, {"cfg_channels": 2}, "cfg_channels"),
        ({}, {"guidance_interval": (0.7, 0.3)}, "guidance_interval"),
        ({}, {"guidance_interval": (0.1, 1.3)}, "guidance_interval"),
        ({}, {"guidance_interval": (0.1,)}, "pair"),
        ({}, {"previews": 5}, "previews"),
        ({"params": dit.strip_modulators(weights())}, {}, "modulation"),
    ],
)
def test_a_request_that_cannot_work_is_an_error(
    unchecked_types, changes, options, words
):
    request = {
        "params": weights(),
        "config": CONFIG,
        "cache": None,
        "noise": noise_for(LABELS),
        "labels": LABELS,
        "sampler": SAMPLERS["euler"],
        "cfg_scale": 2.0,
    }
    with pytest.raises(ValueError, match=words):
        dit.sample(**{**request, **changes}, **options)


def test_labels_must_be_integers(unchecked_types):
    with pytest.raises(TypeError, match="integers"):
        dit.sample(
            weights(),
            CONFIG,
            None,
            noise_for(LABELS),
            jnp.ones(6),
            SAMPLERS["euler"],
        )
