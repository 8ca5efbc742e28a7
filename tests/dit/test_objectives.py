"""The training losses against float64 formulas, through a network that is known."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionopt_jax import dit
from fusionopt_jax.dit import objectives
from tests._compare import assert_within
from tests.references import samplers as reference

CONFIG = dit.DiTConfig(
    input_size=4,
    hidden_size=32,
    depth=1,
    num_heads=2,
    num_classes=10,
    learn_sigma=False,
)
SIGMA = dataclasses.replace(CONFIG, learn_sigma=True)
# Two scalars are all the parameters that the stand-in below has.
WEIGHTS = {"prediction": jnp.float32(0.3), "logits": jnp.float32(0.2)}


@pytest.fixture
def calls(monkeypatch):
    """What the network was called with; it returns scaled copies of its input."""
    seen = []

    def network(params, config, images, times, labels, **options):
        seen.append((images, times, labels))
        parts = [params["prediction"] * images]
        if config.learn_sigma:
            parts.append(params["logits"] * jnp.sin(images))
        return jnp.concatenate(parts, axis=-1)

    monkeypatch.setattr(objectives, "apply", network)
    return seen


def batch_of(rng, size):
    images = jnp.asarray(rng.uniform(-1, 1, (size, 4, 4, 4)), jnp.float32)
    return images, jnp.asarray(rng.integers(0, 10, size))


def test_rectified_flow_loss_is_the_velocity_error(calls, rng, key):
    images, labels = batch_of(rng, 64)
    loss = dit.rectified_flow_loss(WEIGHTS, CONFIG, images, labels, key)
    noisy, times, _ = (np.asarray(part, np.float64) for part in calls[0])
    clean, time = np.asarray(images, np.float64), times[:, None, None, None] / 1000.0
    noise = (noisy - (1.0 - time) * clean) / time
    expected = np.mean((0.3 * noisy - (noise - clean)) ** 2)
    # The noise is recovered by dividing by t, which is at least 0.05 in this batch.
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert times.min() > 50
    assert noise.std() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.7)])
def test_flow_times_are_logit_normal(calls, rng, key, mean, std):
    images, labels = batch_of(rng, 4096)
    dit.rectified_flow_loss(
        WEIGHTS, CONFIG, images, labels, key, time_mean=mean, time_std=std
    )
    time = np.asarray(calls[0][1], np.float64) / 1000.0
    logit = np.log(time / (1 - time))
    # Standard errors of mean and deviation at 4096 draws: std / 64 and std / 90.
    assert logit.mean() == pytest.approx(mean, abs=5 * std / 64)
    assert logit.std() == pytest.approx(std, abs=5 * std / 90)


def test_flow_times_can_be_uniform(calls, rng, key):
    images, labels = batch_of(rng, 4096)
    dit.rectified_flow_loss(WEIGHTS, CONFIG, images, labels, key, times="uniform")
    time = np.sort(np.asarray(calls[0][1])) / 1000.0
    # Kolmogorov-Smirnov distance; 1.95 / sqrt(n) has a chance of one in a thousand.
    assert np.abs(time - (np.arange(4096) + 0.5) / 4096).max() < 1.95 / 64


@pytest.mark.parametrize("loss", [dit.rectified_flow_loss, dit.diffusion_loss])
def test_labels_are_dropped_as_often_as_the_config_says(calls, rng, key, loss):
    images, labels = batch_of(rng, 4096)
    loss(WEIGHTS, SIGMA, images, labels, key)
    loss(WEIGHTS, SIGMA, images, labels, key, class_dropout_prob=0.0)
    seen = np.asarray(calls[0][2])
    dropped = seen == CONFIG.null_label
    # Binomial: 0.1 with a standard error of 0.0047.
    assert dropped.mean() == pytest.approx(0.1, abs=0.024)
    np.testing.assert_array_equal(seen[~dropped], np.asarray(labels)[~dropped])
    np.testing.assert_array_equal(calls[1][2], labels)


def divergence(clean, noisy, predicted, logits, index):
    """KL of the model's step from the posterior in bits, from Bayes' rule."""
    bars = reference.alpha_bars()
    bar, previous = bars[index], bars[index - 1]
    weight_clean, _, small = reference.posterior(bar, previous)
    guess = (noisy - math.sqrt(1 - bar) * predicted) / math.sqrt(bar)
    gap = weight_clean * (clean - guess)
    share = (logits + 1) / 2
    log_variance = share * math.log(1 - bar / previous) + (1 - share) * math.log(small)
    nats = 0.5 * (log_variance - math.log(small))
    nats = nats + (small + gap**2) / (2 * np.exp(log_variance)) - 0.5
    return np.mean(nats) / math.log(2)


def test_diffusion_loss_is_noise_error_plus_bound(calls, rng, key):
    images, labels = batch_of(rng, 32)
    loss = dit.diffusion_loss(WEIGHTS, SIGMA, images, labels, key)
    noisy, times, _ = (np.asarray(part, np.float64) for part in calls[0])
    clean = np.asarray(images, np.float64)
    index = times.astype(int)
    assert index.min() > 0, "the first time has a test of its own"
    bar = reference.alpha_bars()[index][:, None, None, None]
    noise = (noisy - np.sqrt(bar) * clean) / np.sqrt(1 - bar)
    bound = [
        divergence(clean[k], noisy[k], 0.3 * noisy[k], 0.2 * np.sin(noisy[k]), index[k])
        for k in range(32)
    ]
    expected = np.mean((0.3 * noisy - noise) ** 2) + np.mean(bound)
    # Float32 against float64; the guess at t near 999 divides by a signal of 0.006.
    assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_without_a_learned_variance_the_loss_is_the_noise_error(calls, rng, key):
    images, labels = batch_of(rng, 32)
    loss = dit.diffusion_loss(WEIGHTS, CONFIG, images, labels, key)
    noisy, times, _ = (np.asarray(part, np.float64) for part in calls[0])
    bar = reference.alpha_bars()[times.astype(int)][:, None, None, None]
    noise = (noisy - np.sqrt(bar) * np.asarray(images)) / np.sqrt(1 - bar)
    assert float(loss) == pytest.approx(np.mean((0.3 * noisy - noise) ** 2), rel=1e-4)


def test_the_bound_trains_the_variance_alone(calls, rng, key):
    images, labels = batch_of(rng, 32)
    hybrid = jax.grad(dit.diffusion_loss)(WEIGHTS, SIGMA, images, labels, key)
    simple = jax.grad(dit.diffusion_loss)(WEIGHTS, CONFIG, images, labels, key)
    assert float(hybrid["prediction"]) == pytest.approx(float(simple["prediction"]))
    assert abs(float(hybrid["logits"])) > 1e-6
    assert float(simple["logits"]) == 0.0


def test_the_first_term_is_the_likelihood_of_rounded_images(rng):
    levels = rng.integers(0, 256, (2, 4, 4, 4))
    levels[0, 0, 0] = [0, 255, 1, 254]
    clean = levels / 127.5 - 1.0
    noise = rng.standard_normal(clean.shape)
    bar = reference.alpha_bars()[0]
    noisy = math.sqrt(bar) * clean + math.sqrt(1 - bar) * noise
    predicted = noise + 0.1 * rng.standard_normal(clean.shape)
    logits = rng.uniform(-1, 1, clean.shape)
    arrays = (jnp.asarray(a, jnp.float32) for a in (clean, noisy, predicted, logits))
    got = objectives.bound_term(*arrays, jnp.zeros(2, jnp.int32))
    # The posterior of the first step is the clean image; its variance is that of the
    # second step, and the upper end of the range is beta.
    mean = (noisy - math.sqrt(1 - bar) * predicted) / math.sqrt(bar)
    small = reference.posterior(*reference.alpha_bars()[[1, 0]])[2]
    share = (logits + 1) / 2
    deviation = np.exp(0.5 * (share * math.log(1e-4) + (1 - share) * math.log(small)))
    normal = np.vectorize(lambda value: 0.5 * math.erfc(-value / math.sqrt(2)))
    above = normal((clean + 1 / 255 - mean) / deviation)
    below = normal((clean - 1 / 255 - mean) / deviation)
    above[levels == 255], below[levels == 0] = 1.0, 0.0
    expected = np.mean(-np.log(above - below), axis=(1, 2, 3)) / math.log(2)
    # The published loss approximates the normal distribution within 3e-4; bits of
    # masses near one half double that.
    assert_within(got, expected, 2e-3)


def test_the_bound_vanishes_for_a_perfect_network(rng):
    clean = jnp.asarray(rng.uniform(-1, 1, (3, 4, 4, 4)), jnp.float32)
    noise = jnp.asarray(rng.standard_normal(clean.shape), jnp.float32)
    index = jnp.array([1, 300, 999])
    bar = jnp.asarray(reference.alpha_bars()[[1, 300, 999]], jnp.float32)
    bar = bar[:, None, None, None]
    noisy = jnp.sqrt(bar) * clean + jnp.sqrt(1 - bar) * noise
    bound = objectives.bound_term(clean, noisy, noise, -jnp.ones_like(clean), index)
    # At t = 1, 1 - bar is 2e-4 and keeps three to four digits in float32.
    assert_within(bound, np.zeros(3), 1e-3)


@pytest.mark.parametrize("loss", [dit.rectified_flow_loss, dit.diffusion_loss])
def test_every_parameter_of_a_real_network_gets_a_finite_gradient(loss, rng, key):
    params = dit.init_params(SIGMA)
    params = jax.tree.map(lambda leaf: leaf + 0.02, params)
    images, labels = batch_of(rng, 4)
    value, grads = jax.jit(jax.value_and_grad(loss), static_argnums=1)(
        params, SIGMA, images, labels, key
    )
    assert bool(jnp.isfinite(value))
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert bool(jnp.isfinite(leaf).all()), jax.tree_util.keystr(path)
        assert float(jnp.abs(leaf).max()) > 0.0, jax.tree_util.keystr(path)


@pytest.mark.parametrize("loss", [dit.rectified_flow_loss, dit.diffusion_loss])
def test_bad_batches_are_errors(unchecked_types, rng, key, loss):
    params = dit.init_params(CONFIG)
    images, labels = batch_of(rng, 4)
    never = dataclasses.replace(CONFIG, class_dropout_prob=0.0)
    with pytest.raises(ValueError, match="must lie in"):
        loss(params, CONFIG, images, labels.at[0].set(11), key)
    with pytest.raises(ValueError, match="channels come last"):
        loss(params, CONFIG, images[..., :3], labels, key)
    with pytest.raises(TypeError, match="integers"):
        loss(params, CONFIG, images, labels.astype(jnp.float32), key)
    with pytest.raises(ValueError, match="class_dropout_prob"):
        loss(params, CONFIG, images, labels, key, class_dropout_prob=1.5)
    with pytest.raises(ValueError, match="no null label"):
        loss(dit.init_params(never), never, images, labels, key, class_dropout_prob=0.1)


def test_unknown_time_distributions_are_errors(unchecked_types, rng, key):
    images, labels = batch_of(rng, 4)
    with pytest.raises(ValueError, match="logit_normal"):
        dit.rectified_flow_loss({}, CONFIG, images, labels, key, times="normal")
    with pytest.raises(ValueError, match="time_std"):
        dit.rectified_flow_loss({}, CONFIG, images, labels, key, time_std=0.0)
