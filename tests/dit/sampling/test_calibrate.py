"""The choice of steps: against every mask there is, and along closed-form walks."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionopt_jax import dit
from fusionopt_jax.dit.sampling.calibrate import measure_residuals, record
from fusionopt_jax.dit.sampling.skip_planning import best_walks, run_errors
from tests.dit._models import CONFIG, random_params
from tests.references import dit as reference

STEPS = 7
SAMPLER = dit.Sampler.euler(steps=STEPS)


def recalled(residuals, times, mask, step, order):
    """What a skipped step is extrapolated to: Neville's scheme, not Lagrange's sum."""
    sources = [k for k in range(step) if mask[k]][-1 : -order - 2 : -1]
    values = [residuals[k] for k in sources]
    for width in range(1, order + 1):
        values = [
            (
                (times[step] - times[sources[i + width]]) * values[i]
                + (times[sources[i]] - times[step]) * values[i + 1]
            )
            / (times[sources[i]] - times[sources[i + width]])
            for i in range(len(values) - 1)
        ]
    return values[0]


def summed_error(residuals, times, mask, order):
    """Sum of the relative errors of the steps that a mask skips."""
    return sum(
        np.linalg.norm(recalled(residuals, times, mask, k, order) - residuals[k])
        / np.linalg.norm(residuals[k])
        for k in range(len(times))
        if not mask[k]
    )


def allowed(steps, order, longest):
    """Every mask whose first steps compute and that skips no longer run than that."""
    for rest in itertools.product((True, False), repeat=steps - order - 1):
        mask = (True,) * (order + 1) + rest
        runs = [len(list(run)) for on, run in itertools.groupby(mask) if not on]
        if max(runs, default=0) <= longest:
            yield mask


@pytest.mark.parametrize(
    ("order", "longest"), [(0, 8), (0, 2), (1, 8), (1, 3), (2, 8), (2, 2)]
)
def test_the_walk_of_least_error_among_all_masks(order, longest):
    generator = np.random.default_rng(order)
    # Uneven times, as a shift or a respaced grid has them.
    times = np.sort(generator.uniform(0, 1000, 9))[::-1]
    residuals = np.cumsum(generator.normal(size=(9, 40)), axis=0)
    found = best_walks(
        run_errors(
            (residuals @ residuals.T)[None],
            times,
            order,
            longest,
            np.zeros(9, bool),
        )
    )
    least = {}
    for mask in allowed(9, order, longest):
        error = summed_error(residuals, times, mask, order)
        least[sum(mask)] = min(least.get(sum(mask), np.inf), error)
    assert set(found) == set(least)
    for count, walk in found.items():
        assert walk.mask.sum() == count
        # Float64 on both sides; the inner products cancel about half of its digits.
        assert walk.error == pytest.approx(least[count], rel=1e-6, abs=1e-6)
        again = summed_error(residuals, times, walk.mask, order)
        assert walk.error == pytest.approx(again, rel=1e-6, abs=1e-6)


def swinging(image, time, condition):
    """A velocity that is no polynomial of the time and depends on the image."""
    return jnp.sin(time / 150) * image + 0.3 * jnp.cos(3.0 * image)


def exact_walk(noise):
    """The velocities of an Euler walk in float64, one step after the other."""
    x, velocities = np.asarray(noise, np.float64), []
    for k in range(STEPS):
        time = 1000.0 * (1.0 - k / STEPS)
        v = np.sin(time / 150) * x + 0.3 * np.cos(3.0 * x)
        velocities.append(v.ravel())
        x = x - v / STEPS
    return np.array(velocities)


@pytest.fixture(scope="module")
def noise():
    return jax.random.normal(jax.random.key(3), (2, 4, 4, 3))


@pytest.fixture(scope="module")
def residuals(noise):
    return record(SAMPLER, swinging, noise)


def test_recorded_errors_are_those_of_a_float64_walk(residuals, noise):
    velocities = exact_walk(noise)
    (products,) = residuals.products["mask"]
    times = np.asarray(SAMPLER.host_times(), np.float64)
    for order in (0, 1, 2):
        runs = run_errors(products, times, order, 8, np.zeros(STEPS, bool))
        for walk in best_walks(runs).values():
            expected = summed_error(velocities, times, walk.mask, order)
            # The walk is in float32: 1e-7 of each velocity, times weights of up to 30.
            assert walk.error == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_the_cheapest_within_a_budget_and_the_best_at_a_cost(residuals, noise, order):
    velocities = exact_walk(noise)
    times = np.asarray(SAMPLER.host_times(), np.float64)
    errors = {
        mask: summed_error(velocities, times, mask, order) / STEPS
        for mask in allowed(STEPS, order, 8)
    }
    for budget in (0.01, 0.1, 0.5):
        cheapest = min(
            (sum(mask), error) for mask, error in errors.items() if error <= budget
        )
        chosen = residuals.choose(budget=budget, order=order)
        assert sum(chosen.mask) == cheapest[0]
        assert errors[chosen.mask] == pytest.approx(cheapest[1], rel=1e-3, abs=1e-4)
    count = order + 2
    chosen = residuals.choose(fraction=count / STEPS, order=order)
    least = min(error for mask, error in errors.items() if sum(mask) <= count)
    assert errors[chosen.mask] == pytest.approx(least, rel=1e-3, abs=1e-4)


def test_a_step_cache_for_a_network_of_ones_own(residuals, noise):
    chosen = residuals.choose(budget=0.05)
    assert chosen.skips
    exact = dit.run_sampler(SAMPLER, swinging, noise).images
    near = dit.run_sampler(SAMPLER, swinging, noise, step_cache=chosen).images
    assert 0 < jnp.max(jnp.abs(near - exact)) < 0.5


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.mark.parametrize("branches", [False, True])
def test_a_budget_of_zero_is_bit_identical(params, branches):
    nothing = dit.calibrate(
        params, CONFIG, SAMPLER, [3, 7], budget=0.0, branches=branches
    )
    assert not nothing.skips
    assert nothing.fraction == pytest.approx(1.0)
    noise = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    exact = dit.sample(params, CONFIG, None, noise, [3, 7], SAMPLER)
    with_cache = dit.sample(
        params, CONFIG, None, noise, [3, 7], SAMPLER, step_cache=nothing
    )
    assert np.array_equal(exact, with_cache)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({}, "give either `budget`"),
        ({"budget": 0.1, "fraction": 0.5}, "give either `budget`"),
        ({"budget": -0.1}, "`budget` must lie in"),
        ({"budget": float("nan")}, "`budget` must lie in"),
        ({"fraction": 0.0}, "`fraction` must lie in"),
        ({"fraction": 0.01}, "`fraction` of 0.01 of 7 steps is out of reach"),
        ({"budget": 0.1, "order": 3}, "`order` must be one of"),
        ({"budget": 0.1, "longest": 0}, "`longest` must be"),
    ],
)
def test_refusals_of_a_choice(residuals, wanted, message):
    with pytest.raises(ValueError, match=message):
        residuals.choose(**wanted)


def test_refusals_of_a_request(params):
    with pytest.raises(ValueError, match="give either `budget`"):
        dit.calibrate(params, CONFIG, SAMPLER, [3])
    with pytest.raises(ValueError, match="labels"):
        dit.calibrate(params, CONFIG, SAMPLER, [11], budget=0.1)
    with pytest.raises(ValueError, match="`noise` must have shape"):
        dit.calibrate(
            params, CONFIG, SAMPLER, [3], budget=0.1, noise=jnp.ones((1, 4, 4, 5))
        )
    with pytest.raises(ValueError, match="`key` is needed"):
        dit.calibrate(params, CONFIG, dit.Sampler.ddim("4", eta=1.0), [3], budget=0.1)
    with pytest.raises(TypeError, match="measures the residuals"):
        jax.jit(
            lambda noise: dit.calibrate(
                params, CONFIG, SAMPLER, [3], budget=0.1, noise=noise
            )
        )(jnp.ones((1, 4, 4, 3)))


@pytest.mark.parametrize(
    ("steps", "wanted", "message"),
    [
        (STEPS, {"fraction": 0.01}, "out of reach"),
        (STEPS, {"budget": 0.1, "order": 3}, "`order` must be one of"),
        (2, {"budget": 0.1, "order": 2}, "the sampler has only 2; lower the order"),
    ],
)
def test_what_cannot_be_chosen_shows_before_the_model_runs(
    params, steps, wanted, message
):
    # A label that there is not, so that the model can't have run.
    with pytest.raises(ValueError, match=message):
        dit.calibrate(params, CONFIG, dit.Sampler.euler(steps), [11], **wanted)


def test_residuals_that_are_no_numbers(noise):
    def broken(image, time, condition):
        return jnp.where(time < 500, jnp.nan, 1.0) * image

    with pytest.raises(ValueError, match="residuals of step 4 hold NaN"):
        record(SAMPLER, broken, noise)


def test_where_nothing_moves_nothing_is_skipped_without_a_budget(noise):
    still = record(SAMPLER, lambda image, time, condition: 0.0 * image, noise)
    assert not still.choose(budget=0.0).skips
    assert sum(still.choose(budget=1e-9, order=0).mask) == 1


def test_other_weights_and_samplers_are_refused(params, noise):
    chosen = dit.calibrate(params, CONFIG, SAMPLER, [3, 7], fraction=0.6)
    other = jax.tree.map(lambda leaf: leaf + 1e-3, params)
    with pytest.raises(dit.StaleCacheError, match="other weights"):
        dit.sample(other, CONFIG, None, noise, [3, 7], SAMPLER, step_cache=chosen)
    scaled = dataclasses.replace(CONFIG, time_scale=0.001)
    with pytest.raises(dit.StaleCacheError, match="config: time_scale"):
        dit.sample(params, scaled, None, noise, [3, 7], SAMPLER, step_cache=chosen)
    shifted = dit.Sampler.euler(steps=STEPS, shift=2.0)
    with pytest.raises(dit.StaleCacheError, match="chosen for"):
        dit.sample(params, CONFIG, None, noise, [3, 7], shifted, step_cache=chosen)


def test_the_first_steps_of_a_guidance_interval_compute(params):
    # Model times 1000, 857, ..., 143: the interval holds 571 to 143, from step 3 on.
    chosen = dit.calibrate(
        params,
        CONFIG,
        SAMPLER,
        [3, 7],
        fraction=0.6,
        order=1,
        guidance_interval=(0.0, 0.6),
    )
    assert chosen.mask == (True, True, False, True, True, False, False)


@pytest.mark.parametrize("branches", [False, True])
def test_the_residuals_of_a_dit_are_those_of_a_float64_walk(
    params, branches, monkeypatch
):
    shape = (2, CONFIG.input_size, CONFIG.input_size, CONFIG.in_channels)
    noise = jax.random.normal(jax.random.key(1), shape)
    found = measure_residuals(
        params, CONFIG, SAMPLER, [3, 7], branches=branches, noise=noise, cfg_scale=1.0
    ).products
    expected = reference_products(params, noise, (3, 7), branches)
    assert set(found) == set(expected)
    for name, products in expected.items():
        norms = np.sqrt(np.diagonal(products, axis1=1, axis2=2))
        error = (found[name][0] - products) / norms[:, :, None] / norms[:, None]
        # Seven steps in float32 leave about 1e-5 of each residual.
        assert np.max(np.abs(error)) < 1e-4


def reference_products(params, noise, labels, branches):
    """Inner products of residuals along an Euler walk, by masks, in float64."""
    sizes = reference.Sizes(CONFIG.patch_size, CONFIG.num_heads, CONFIG.depth)
    weights = jax.tree.map(np.asarray, params)
    residuals = {}
    for image, label in zip(np.float64(noise), labels, strict=True):
        x = image
        for time in 1000.0 * (1.0 - np.arange(STEPS) / STEPS):

            def recall(name, compute):
                value = compute()
                residuals.setdefault(name, []).append(value)
                return value

            x = (
                x
                - reference.forward_one(weights, x, time, label, sizes, recall) / STEPS
            )
    flat = {
        name: np.array(values).reshape(len(labels), STEPS, -1)
        for name, values in residuals.items()
    }
    products = {name: np.einsum("bin,bjn->ij", v, v) for name, v in flat.items()}
    if not branches:
        return {"mask": products["network",][None]}
    return {
        kind: np.stack([products[kind, index] for index in range(CONFIG.depth)])
        for kind in ("attention", "mlp")
    }
