"""The sampling loop: recordings, float64 references, and measured orders."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionopt_jax.dit import Sampler, run_sampler
from fusionopt_jax.dit.sampling import ddpm
from fusionopt_jax.dit.sampling.guidance import guide
from fusionopt_jax.dit.sampling.sampler import At, Prediction
from tests._compare import assert_within
from tests.references import samplers as reference

_ARCHIVE = pathlib.Path(__file__).parents[2] / "data" / "sampler_toy.npz"
RECORDED = dict(np.load(_ARCHIVE))

# Ten float32 steps on values of order ten; the recordings were made in float32 too, and
# two float32 runs of this model were seen to differ by 2.9e-6.
TRAJECTORY = 1e-5

RECORDINGS = {
    "ddpm10": Sampler.ddpm("10"),
    "ddpm10_clip": Sampler.ddpm("10", clip=True),
    "ddpm10_fixedlarge": Sampler.ddpm("10", variance="fixed_large"),
    "ddpm10_fixedsmall": Sampler.ddpm("10", variance="fixed_small"),
    "ddpm10_cfg4": Sampler.ddpm("10"),
    "ddim10": Sampler.ddim("ddim10"),
    "ddim10_eta0.5": Sampler.ddim("ddim10", eta=0.5),
    "ddim10_eta1": Sampler.ddim("ddim10", eta=1.0),
    "ddim10_spacing10": Sampler.ddim("10"),
    "ddim10_cfg4": Sampler.ddim("ddim10"),
}


def toy_network(image, time, label):
    """The closed-form model of the recordings, in JAX."""
    # Rooted in float64: 1 - bar has four digits left in float32 near time 0.
    levels = jnp.asarray(np.sqrt(1.0 - reference.alpha_bars()), image.dtype)
    level = jnp.interp(time, jnp.arange(1000.0), levels)
    phase = jnp.broadcast_to(label[:, None, None, None], image.shape)
    noise = level * image + 0.1 * jnp.sin(3.0 * image + phase)
    return noise, jnp.cos(2.0 * image)


def guided(conditional, unconditional):
    """The guidance of the recordings, of two predictions that are there."""
    pairs = jnp.stack([conditional, unconditional], axis=1)
    pairs = pairs.reshape(-1, *conditional.shape[1:])
    return guide(lambda both: pairs, conditional, 4.0, channels=3)


@functools.cache
def run_recorded(tag, dtype="float32"):
    """One recorded run, by the public loop."""
    sampler = RECORDINGS[tag]
    labels = jnp.asarray(RECORDED["y"], dtype)

    def denoise(image, time, condition):
        noise, logits = toy_network(image, time, labels)
        if tag.endswith("cfg4"):
            null = jnp.full_like(labels, float(RECORDED["null"]))
            noise = guided(noise, toy_network(image, time, null)[0])
        parts = [noise] if "fixed" in tag else [noise, logits]
        return jnp.concatenate(parts, axis=-1)

    run = jax.jit(
        lambda noise, draws: run_sampler(
            sampler, denoise, noise, step_noise=draws, previews=10
        )
    )
    return run(jnp.asarray(RECORDED["z"], dtype), jnp.asarray(RECORDED["noise"], dtype))


def in_float64(tag):
    """One recorded run, by the slow float64 reference."""
    sampler, label = RECORDINGS[tag], RECORDED["y"].reshape(-1, 1, 1, 1)
    if tag.endswith("cfg4"):
        predict = reference.guided(
            reference.toy_network, label, float(RECORDED["null"]), 4.0, channels=3
        )
    else:
        predict = functools.partial(reference.toy_network, label=label)
    start, draws = np.float64(RECORDED["z"]), np.float64(RECORDED["noise"])
    walk = (predict, start, draws, RECORDED[f"{tag}/timestep_map"])
    if sampler.method == "ddim":
        return reference.implicit(*walk, sampler.eta, sampler.clip)
    return reference.ancestral(*walk, sampler.variance, sampler.clip)


def signal_levels(tag):
    """How much of the clean image each step's input holds, in the order of sampling."""
    levels = np.sqrt(reference.alpha_bars()[RECORDED[f"{tag}/timestep_map"]])
    return levels[::-1].reshape(-1, 1, 1, 1, 1)


@pytest.mark.parametrize("tag", [tag for tag in RECORDINGS if tag != "ddpm10_cfg4"])
def test_follows_the_recorded_trajectory(tag):
    samples = run_recorded(tag)
    # A clean prediction divides by the signal, and its rounding error with it.
    # Every third one was kept.
    previews = samples.previews[::3]
    error = (previews - RECORDED[f"{tag}/clean"]) * signal_levels(tag)[::3]
    assert_within(error, np.zeros(error.shape), TRAJECTORY, "clean")
    assert_within(samples.images, RECORDED[f"{tag}/final"], TRAJECTORY, "image")


def test_follows_the_recorded_steps_of_guided_ddpm():
    # Four-fold guidance of sin(3x + y) amplifies rounding: no float32 code can repeat
    # this run (see the next test). So the network's part and the loop's are compared
    # apart, each from recorded inputs.
    tag = "ddpm10_cfg4"
    images = jnp.asarray(RECORDED[f"{tag}/images"])
    outputs = jnp.asarray(RECORDED[f"{tag}/output"])
    labels = jnp.asarray(RECORDED["y"], jnp.float32)
    null = jnp.full_like(labels, float(RECORDED["null"]))
    table = ddpm.coefficients(RECORDED[f"{tag}/timestep_map"], "learned_range")
    for step, time in enumerate(RECORDINGS[tag].eval_times()):
        noise, logits = toy_network(images[step], time, labels)
        noise = guided(noise, toy_network(images[step], time, null)[0])
        output = jnp.concatenate([noise, logits], axis=-1)
        assert_within(output, outputs[step], TRAJECTORY, f"network at step {step}")
        recorded = Prediction(outputs[step][..., :4], outputs[step][..., 4:])
        at = At(
            jax.tree.map(lambda values, at=step: jnp.float32(values[at]), table),
            z=jnp.asarray(RECORDED["noise"][step]),
            memory=None,
        )
        following = (
            RECORDINGS[tag].step(lambda x, said=recorded: said, images[step], at).image
        )
        assert_within(following, images[step + 1], TRAJECTORY, f"loop at step {step}")


def test_guided_ddpm_cannot_be_repeated_in_float32():
    tag = "ddpm10_cfg4"
    exact, _ = in_float64(tag)
    recording = np.abs(RECORDED[f"{tag}/final"] - exact).max()
    assert recording == pytest.approx(2.07e-4, rel=0.01)
    # Rounding of this size in each of two float32 runs; measured 2.0e-4 here as well.
    assert_within(run_recorded(tag).images, exact, 5 * recording)


@pytest.mark.parametrize("tag", RECORDINGS)
def test_the_closed_loop_is_the_reference_in_float64(tag):
    images, cleans = in_float64(tag)
    with jax.enable_x64(True):
        samples = run_recorded(tag, "float64")
    # Measured 8e-13 for guided DDPM, whose rounding is amplified most; 1e-13 elsewhere.
    assert_within(samples.images, images, 1e-11, "image")
    assert_within(samples.previews, cleans, 1e-11, "clean")


@pytest.mark.parametrize("tag", RECORDINGS)
def test_evaluates_at_the_recorded_times(tag):
    times = RECORDINGS[tag].eval_times()
    assert times.dtype == jnp.float32
    np.testing.assert_array_equal(times, RECORDED[f"{tag}/timestep_map"][::-1])


@pytest.mark.parametrize(
    "sampler",
    [
        Sampler.ddpm("25", variance="fixed_large"),
        Sampler.ddpm("5,10,5", clip=True),
        Sampler.ddim("ddim20", eta=0.3, clip=True),
        Sampler.dpm_solver_pp_2m(20),
        Sampler.dpm_solver_pp_2m(6, spacing="logsnr"),
    ],
    ids=lambda sampler: f"{sampler.method}-{sampler.steps}",
)
def test_follows_the_float64_reference(sampler, rng):
    image = rng.standard_normal((2, 4, 4, 3))
    draws = rng.standard_normal((sampler.steps, 2, 4, 4, 3))
    label = np.array([1.0, 2.0])

    def denoise(image, time, condition):
        return jnp.concatenate(
            toy_network(image, time, jnp.asarray(label, image.dtype)), axis=-1
        )

    def predict(image, time):
        return reference.toy_network(image, time, label[:, None, None, None])

    times = np.asarray(sampler.eval_times(), np.float64)
    if sampler.method == "ddpm":
        expected, _ = reference.ancestral(
            predict,
            image,
            draws,
            times[::-1].astype(int),
            sampler.variance,
            sampler.clip,
        )
    elif sampler.method == "ddim":
        expected, _ = reference.implicit(
            predict, image, draws, times[::-1].astype(int), sampler.eta, sampler.clip
        )
    else:
        expected = reference.multistep(predict, image, np.append(times, 0.0))
    got = run_sampler(
        sampler,
        denoise,
        jnp.asarray(image, jnp.float32),
        step_noise=jnp.asarray(draws, jnp.float32),
    )
    # Measured 4e-6 for the solver in six steps, of which 2e-6 come from its fractional
    # model times, which are float32; below 1e-6 elsewhere.
    assert_within(got.images, expected, 1e-5)


def flow_error(sampler, deviation=2.0):
    """Relative error of a flow sampler where the velocity is known in closed form."""
    noise = jnp.linspace(-2.0, 2.0, 12).reshape(1, 2, 2, 3)

    def denoise(image, time, condition):
        return reference.gaussian_velocity(image, time / 1000.0, deviation)

    images = run_sampler(sampler, denoise, noise).images
    # The flow scales a Gaussian: x_0 = deviation * x_1.
    return float(jnp.abs(images - deviation * noise).max())


def solver_error(sampler, deviation=0.5):
    """Error of a noise-model sampler where the expected noise is known."""
    bars = reference.alpha_bars()
    logs = jnp.asarray(np.log(bars), jnp.float32)
    noise = jnp.linspace(-2.0, 2.0, 12).reshape(1, 2, 2, 3)

    def denoise(image, time, condition):
        bar = jnp.exp(jnp.interp(time, jnp.arange(1000.0), logs))
        return reference.gaussian_noise(image, bar, deviation)

    def spread(bar):
        return np.sqrt(bar * deviation**2 + 1.0 - bar)

    images = run_sampler(sampler, denoise, noise).images
    exact = noise * (spread(bars[0]) / spread(bars[-1]))
    return float(jnp.abs(images - exact).max())


@pytest.mark.parametrize(
    ("error", "make", "order"),
    [
        (flow_error, Sampler.euler, 1),
        (flow_error, lambda n: Sampler.euler(n, shift=2.0), 1),
        (flow_error, Sampler.heun, 2),
        (flow_error, lambda n: Sampler.heun(n, shift=2.0), 2),
        (solver_error, lambda n: Sampler.dpm_solver_pp_2m(n, spacing="logsnr"), 2),
    ],
    ids=["euler", "euler-shift", "heun", "heun-shift", "dpm_solver_pp_2m"],
)
def test_error_falls_with_the_order_of_the_method(error, make, order):
    errors = [error(make(steps)) for steps in (20, 40, 80)]
    measured = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    # Halving the step divides the error by 2^order up to the next order in the step,
    # a relative 1/20 to 1/80 times a constant of a few.
    assert np.all(np.abs(measured - order) < 0.3), (errors, measured)


def test_more_ddim_steps_approach_the_solver():
    fine = solver_error(Sampler.ddim("500"))
    coarse = solver_error(Sampler.ddim("50"))
    # DDIM ends at the clean image, the solver at time 0 of the grid, where 1 % of
    # noise is left: their limits differ by less than that.
    assert fine < 0.02 < 1.5 * coarse


@pytest.mark.parametrize("make", [Sampler.euler, Sampler.heun])
def test_conditions_are_those_of_the_time(make):
    sampler = make(5)
    times = sampler.eval_times()

    def denoise(image, time, condition):
        # The velocity is the gap between the time and the condition of the same slice.
        return jnp.full_like(image, time - condition["time"])

    samples = run_sampler(
        sampler, denoise, jnp.zeros((1, 2, 2, 1)), conditions={"time": times}
    )
    assert float(jnp.abs(samples.images).max()) == 0.0


def test_previews_end_with_the_last_clean_prediction():
    samples = run_sampler(
        Sampler.euler(7), lambda x, t, c: 0.3 * x, jnp.ones((1, 2, 2, 1)), previews=3
    )
    assert samples.previews.shape == (3, 1, 2, 2, 1)
    # Euler's last step goes to time 0, so its clean prediction is the image.
    assert_within(samples.previews[-1], samples.images, 1e-6)


def test_steps_are_counted_in_order():
    seen = []
    run_sampler(
        Sampler.euler(4),
        lambda x, t, c: x,
        jnp.ones((1, 2, 2, 1)),
        on_step=lambda index: jax.debug.callback(
            lambda i: seen.append(int(i)), index, ordered=True
        ),
    )
    jax.effects_barrier()
    assert seen == [1, 2, 3, 4]


def test_a_key_gives_the_same_images_again_and_another_key_others():
    def run(seed):
        return run_sampler(
            Sampler.ddim("ddim5", eta=1.0),
            lambda x, t, c: 0.1 * x,
            jnp.ones((1, 2, 2, 1)),
            key=jax.random.key(seed),
        ).images

    np.testing.assert_array_equal(run(3), run(3))
    assert float(jnp.abs(run(3) - run(4)).max()) > 1e-3


@pytest.mark.parametrize(
    ("sampler", "options", "channels", "words"),
    [
        (Sampler.ddpm("5"), {}, 2, "key"),
        (Sampler.ddim("5", eta=0.5), {}, 1, "key"),
        (Sampler.ddpm("5"), {"key": jax.random.key(0)}, 1, "twice the channels"),
        (Sampler.heun(5), {}, 3, "as many channels"),
        (Sampler.euler(5), {"previews": 6}, 1, "previews"),
        (Sampler.ddpm("5"), {"step_noise": jnp.ones((4, 1, 2, 2, 1))}, 2, "step_noise"),
        (Sampler.heun(5), {"conditions": {"a": jnp.ones(5)}}, 1, "axis of 6"),
    ],
)
def test_runs_that_cannot_work_are_errors(sampler, options, channels, words):
    def denoise(image, time, condition):
        return jnp.concatenate([image] * channels, axis=-1)

    with pytest.raises(ValueError, match=words):
        run_sampler(sampler, denoise, jnp.ones((1, 2, 2, 1)), **options)
