"""Guidance: pairs in one call are two calls, pushed apart by the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionopt_jax import dit
from fusionopt_jax.dit.sampling.guidance import Guidance, guide, paired
from tests._compare import assert_within
from tests.dit._models import random_batch, random_params

CONFIG = dit.DiTConfig(
    input_size=4,
    in_channels=4,
    hidden_size=16,
    depth=1,
    num_heads=2,
    num_classes=10,
)


def test_pairs_are_pushed_apart_per_image_and_channel(rng):
    images = rng.standard_normal((3, 2, 2, 2)).astype(np.float32)
    bias = rng.standard_normal((6, 1, 1, 3)).astype(np.float32)
    scale = np.array([0.0, 1.0, 4.0], np.float32)

    def network(both):
        # Two channels of prediction and one of variance.
        return jnp.concatenate([both, both[..., :1]], axis=-1) + bias

    got = guide(network, jnp.asarray(images), jnp.asarray(scale), channels=1)
    given, null = np.float64(bias[0::2]), np.float64(bias[1::2])
    expected = np.concatenate([images, images[..., :1]], axis=-1) + given
    pushed = null + scale[:, None, None, None] * (given - null)
    expected[..., :1] = images[..., :1] + pushed[..., :1]
    # A few float32 roundings of numbers of order ten.
    assert_within(got, expected, 1e-5)


@pytest.mark.parametrize("cached", [False, True])
def test_one_call_on_pairs_is_two_calls(cached):
    params = random_params(CONFIG)
    images, _, labels = random_batch(CONFIG)
    times = jnp.full(3, 500.0)
    null = jnp.full_like(labels, CONFIG.null_label)
    given = dit.apply(params, CONFIG, images, times, labels)
    base = dit.apply(params, CONFIG, images, times, null)
    options = {}
    if cached:
        cache = dit.build_cache(params, CONFIG, [500.0], labels, force=True)
        options["modulation"] = cache.at(0, paired(labels, CONFIG.null_label))
    got = dit.apply_with_guidance(
        params, CONFIG, images, times, labels, 3.0, channels=3, **options
    )
    expected = np.float64(given)
    expected[..., :3] = (base + 3.0 * (np.float64(given) - base))[..., :3]
    # Batches of 3 and of 6: sums in another order, five-fold by the guidance.
    scale = np.abs(expected).max()
    assert_within(got / scale, expected / scale, 1e-5)


def test_what_is_guided_is_a_value(unchecked_types):
    assert hash(Guidance(3, (0, 1))) == hash(Guidance(3, (0.0, 1.0)))
    assert jax.tree.leaves(Guidance()) == [Guidance()]
    for settings in [(2,), (None, (0.5,)), (None, (0.6, 0.4)), (None, (-0.1, 1.0))]:
        with pytest.raises(ValueError, match=r"cfg_channels|guidance_interval"):
            Guidance(*settings)
