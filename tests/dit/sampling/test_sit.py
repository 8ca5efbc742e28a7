"""SiT: recordings of its published code, a float64 reference, closed forms."""

import dataclasses
import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionopt_jax import dit
from fusionopt_jax.dit.sampling.flow import Convention
from fusionopt_jax.dit.sampling.sampler import At, Prediction
from fusionopt_jax.dit.sampling.sit import Diffusion, LastStep, Solver
from tests._compare import assert_within
from tests.dit._recordings import nhwc, part, recording
from tests.references import samplers as reference

# Ten times what float32 changes in the recorded runs (5e-7 to 8e-7 of states of up to
# 3.5, 8e-7 of velocities), at least 1e-5.
TOLERANCE = 1e-5
# The recorded guided outputs are 2.3e-6 from the same in float64: guidance of 4
# multiplies the rounding of the two velocities by 4 and 3.
GUIDED = 2e-5

# The recordings' names of the runs. SiT's `num_steps` are 11 (points), 9 and 6.
RUNS = {
    "ode_euler": dit.Sampler.euler(10, convention="data_at_one"),
    "ode_euler_cfg4": dit.Sampler.euler(10, convention="data_at_one"),
    "ode_heun2": dit.Sampler.heun(10, convention="data_at_one"),
    "ode_heun2_cfg4": dit.Sampler.heun(10, convention="data_at_one"),
    "sde_em": dit.Sampler.sit_sde(9),
    "sde_heun": dit.Sampler.sit_sde(
        6,
        diffusion="linear",
        norm=0.7,
        solver="heun",
        last_step="euler",
        last_step_size=0.1,
    ),
}


@functools.cache
def model():
    """The recorded weights."""
    return dit.from_pytorch(part(recording("sit"), "w/"), num_heads=4, kind="sit")


@functools.cache
def network(scale=None, channels=3):
    """The recorded model at one time, guided if there is a scale, compiled once."""
    params, config = model()

    @jax.jit
    def evaluate(images, times, labels, scale):
        times = jnp.broadcast_to(times, len(images))
        if scale is None:
            return dit.apply(params, config, images, times, labels)
        return dit.apply_with_guidance(
            params, config, images, times, labels, scale, channels=channels
        )

    return lambda images, times, labels: evaluate(images, times, labels, scale)


def start(run):
    """Noise, labels, and the noises of the steps, of which the last draws none."""
    arrays = recording("sit")
    noises = nhwc(arrays[f"{run}/noise"]) if run.startswith("sde") else []
    noises = [*noises, np.zeros((2, 8, 8, 4), np.float32)]
    return jnp.asarray(nhwc(arrays["z"])), jnp.asarray(arrays["y"]), noises


def walk(run, sampler, evaluate=None, sign=1.0, time_of=lambda time: time):
    """Every state of a walk through the sampler's own steps, and the times asked for.

    The network is asked at `time_of` the model time and answers with `sign`.
    """
    image, labels, noises = start(run)
    evaluate = evaluate or network(4.0 if run.endswith("cfg4") else None)
    times, states, asked = sampler.host_times(), [], []
    memory = sampler.start(image)
    for step in range(sampler.steps):

        def predict(x, ahead=0, step=step):
            time = np.float32(time_of(times[step + ahead]))
            asked.append(float(time) / 1000)
            output = sign * evaluate(x, time, labels)
            return Prediction(output[..., :4], output[..., 4:])

        coefficients = jax.tree.map(
            lambda values, step=step: jnp.float32(values[step]), sampler.coefficients()
        )
        z = noises[step] if sampler.is_random else None
        image, _, memory = sampler.step(predict, image, At(coefficients, z, memory))
        states.append(image)
    return np.stack(states), asked


def recorded(run):
    """Every recorded state of a run, after each step."""
    return nhwc(recording("sit")[f"{run}/xs"])


def largest_error(run, states):
    return float(np.abs(states - recorded(run)).max())


@pytest.mark.parametrize("run", RUNS)
def test_every_state_is_the_recorded_one(run):
    states, _ = walk(run, RUNS[run])
    for step, (state, expected) in enumerate(zip(states, recorded(run), strict=True)):
        assert_within(state, expected, TOLERANCE, f"{run} after step {step + 1}")


def test_the_velocity_is_the_recorded_one():
    arrays = recording("sit")
    images, labels = jnp.asarray(nhwc(arrays["in/x_nchw"])), jnp.asarray(arrays["in/y"])
    expected = nhwc(arrays["out/velocity"])

    def velocity(times):
        # The second half of the output has no meaning.
        return network()(images, jnp.float32(times), labels)[..., :4]

    assert_within(velocity(1000.0 * arrays["in/t"]), expected, TOLERANCE)
    # The tolerance tells a model time of 1e6 t, and 1 - t.
    for wrong in (1e6 * arrays["in/t"], 1000.0 * (1.0 - arrays["in/t"])):
        assert float(np.abs(velocity(wrong) - expected).max()) > 1e3 * TOLERANCE


@pytest.mark.parametrize("scale", ["4", "1.5"])
def test_guidance_is_that_of_the_published_code(scale):
    arrays = recording("sit")
    images, labels = jnp.asarray(nhwc(arrays["cfg/x"])), jnp.asarray(arrays["cfg/y"])
    expected = nhwc(arrays[f"cfg/out{scale}"])

    def guided(channels):
        evaluate = network(float(scale), channels)
        return evaluate(images, 1000.0 * arrays["cfg/t"], labels)[..., :4]

    assert_within(guided(3), expected, GUIDED)
    assert float(np.abs(guided(None) - expected).max()) > 0.1


WRONG = {
    "sign": lambda run: walk(run, RUNS[run], sign=-1.0),
    "1 - t": lambda run: walk(run, RUNS[run], time_of=lambda time: 1000.0 - time),
    "1000 t": lambda run: walk(run, RUNS[run], time_of=lambda time: 1000.0 * time),
    "noise at one": lambda run: walk(
        run, dataclasses.replace(RUNS[run], convention="noise_at_one")
    ),
    "num_steps as steps": lambda run: walk(
        run, dataclasses.replace(RUNS[run], steps=RUNS[run].steps + 1)
    ),
    "four channels": lambda run: walk(run, RUNS[run], network(4.0, None)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_readings_would_be_noticed(wrong):
    run = "ode_euler_cfg4" if wrong == "four channels" else "ode_euler"
    states, _ = WRONG[wrong](run)
    found = largest_error(run, states[: len(recorded(run))])
    # Least for another number of intervals.
    assert found > 100 * TOLERANCE, found


@pytest.mark.parametrize("run", RUNS)
def test_asks_once_at_each_recorded_time(run):
    _, asked = walk(run, RUNS[run], lambda x, time, labels: jnp.zeros((2, 8, 8, 8)))
    called = recording("sit")[f"{run}/times_called"]
    if run.startswith("sde"):
        # SiT asks for the drift's velocity and for the score's apart, but for the
        # velocity alone in the last step of the second run.
        called = called[::2]
    # The recorded grids are float32 all the way.
    assert_within(asked[: len(called)], called, 2e-7)


def test_a_whole_program_ends_in_the_recorded_state():
    run = "ode_euler_cfg4"
    params, config = model()
    noise, labels, _ = start(run)
    cache = dit.build_cache(params, config, RUNS[run].eval_times(), labels)
    images = dit.sample(
        dit.strip_modulators(params),
        config,
        cache,
        noise,
        labels,
        RUNS[run],
        4.0,
        cfg_channels=3,
    )
    assert_within(images, recorded(run)[-1], TOLERANCE)


@pytest.mark.parametrize("run", ["sde_em", "sde_heun"])
def test_whole_stochastic_programs_end_in_the_recorded_states(run):
    noise, labels, noises = start(run)

    def denoise(image, time, condition):
        return network()(image, time, labels)

    samples = dit.run_sampler(
        RUNS[run], denoise, noise, step_noise=jnp.stack(noises), previews=1
    )
    assert_within(samples.images, recorded(run)[-1], TOLERANCE)


def test_an_exported_file_walks_as_the_library_does(tmp_path):
    params, config = model()
    sampler = dit.Sampler.sit_sde(3, "decreasing", last_step="tweedie")
    noise, labels, _ = start("sde_em")
    cache = dit.build_cache(params, config, sampler.eval_times(), labels)
    weights, key = dit.strip_modulators(params), jax.random.key(3)
    path = tmp_path / "sampler.zip"
    dit.export_sampler(
        path, weights, config, cache, sampler, guided=False, platforms=["cpu"]
    )
    loaded = dit.load_sampler(path)
    about = loaded.signature["sampler"]
    settings = {name: about[name] for name in about if name != "method"}
    assert getattr(dit.Sampler, about["method"])(**settings) == sampler
    images = dit.sample(weights, config, cache, noise, labels, sampler, 1.0, key=key)
    # One program against another, which orders sums otherwise.
    assert_within(loaded(noise, labels, key=key), images, TOLERANCE)
    other = loaded(noise, labels, key=jax.random.key(4))
    assert float(jnp.abs(other - images).max()) > 0.1


@pytest.mark.parametrize("run", RUNS)
def test_noise_at_one_is_the_same_walk_of_the_opposite_network(run):
    # REPA's direction: asked at 1 - t, answering with noise - image.
    other = dataclasses.replace(RUNS[run], convention="noise_at_one")
    states, _ = walk(run, other, sign=-1.0, time_of=lambda time: 1000.0 - time)
    assert_within(states, recorded(run), TOLERANCE)


def in_float64(sampler, velocity, image, noises=None):
    """The loop in float64 with a velocity of SiT's direction as network."""

    def denoise(x, time, condition):
        time = time.astype(x.dtype) / 1000.0
        if sampler.convention == "noise_at_one":
            return -velocity(x, 1.0 - time)
        return velocity(x, time)

    with jax.enable_x64(True):
        samples = dit.run_sampler(
            sampler,
            denoise,
            jnp.asarray(image),
            step_noise=None if noises is None else jnp.asarray(noises),
            previews=1,
        )
    return np.asarray(samples.images), np.asarray(samples.previews[0])


# Model times are float32. Multiples of 1/8 are exact in it, so that nothing but float64
# rounding is left: some fifty operations on numbers of up to 30.
ROUNDING = 1e-13

SETTINGS = [
    (diffusion, solver, last)
    for diffusion in get_args(Diffusion)
    for solver in get_args(Solver)
    for last in (*get_args(get_args(LastStep)[0]), None)
    # Heun to the very end divides by zero in the reference; see below.
    if (solver, last) != ("heun", None)
]


@pytest.mark.parametrize(("diffusion", "solver", "last"), SETTINGS)
def test_the_closed_loop_is_the_reference(diffusion, solver, last, rng):
    # One form is walked in the other direction: neither knows of the other.
    convention = "noise_at_one" if diffusion == "linear" else "data_at_one"
    settings = {"norm": 0.6, "last_step": last, "convention": convention}
    steps = 8
    if last is not None:
        steps, settings["last_step_size"] = 7, 0.25
    sampler = dit.Sampler.sit_sde(steps, diffusion, solver=solver, **settings)
    image = rng.standard_normal((2, 2, 2, 3))
    noises = rng.standard_normal((steps, *image.shape))
    velocity = functools.partial(reference.linear_velocity, deviation=0.4, mean=0.7)
    found, clean = in_float64(sampler, velocity, image, noises)
    states = reference.sit_stochastic(
        velocity, image, noises if last is None else noises[:-1], sampler
    )
    assert_within(found, states[-1], ROUNDING)
    if solver == "euler":
        t = 0.875 if last is None else 0.75
        expected = states[-2] + (1.0 - t) * velocity(states[-2], t)
        assert_within(clean, expected, ROUNDING, "clean")


@pytest.mark.parametrize("convention", get_args(Convention))
@pytest.mark.parametrize(("shift", "correct_last"), [(1.0, False), (1.5, True)])
def test_a_flow_is_the_reference(convention, shift, correct_last, rng):
    image = rng.standard_normal((2, 2, 2, 3))
    velocity = functools.partial(reference.linear_velocity, deviation=0.4, mean=0.7)
    u = np.linspace(1.0, 0.0, 9)
    times = 1.0 - shift * u / (1.0 + (shift - 1.0) * u)
    sampler = dit.Sampler.heun(8, shift, convention, correct_last)
    found, _ = in_float64(sampler, velocity, image)
    # Shifted times are rounded to float32; the velocity's slope in t is below 10.
    tolerance = ROUNDING if shift == 1.0 else 10 * 2.0**-24
    expected = reference.heun_flow(velocity, image, times, correct_last)[-1]
    assert_within(found, expected, tolerance)


def moments(sampler, deviation, mean):
    """Mean and deviation of the samples of N(mean, deviation^2), without drawing any.

    The walk is an affine map of the first noise and of those of its steps. An image of
    zeros shows its constant, and images with one unit noise each its factors.
    """
    count = sampler.steps + 2
    units = np.eye(count - 1, count, 1)[..., None, None, None]
    velocity = functools.partial(
        reference.linear_velocity, deviation=deviation, mean=mean
    )
    images, _ = in_float64(sampler, velocity, units[0], units[1:])
    constant, factors = images[0, 0, 0, 0], images[1:, 0, 0, 0] - images[0, 0, 0, 0]
    return constant, np.sqrt(np.sum(factors**2))


@pytest.mark.parametrize("solver", get_args(Solver))
@pytest.mark.parametrize("diffusion", get_args(Diffusion))
def test_samples_approach_the_distribution_of_the_data(diffusion, solver):
    for steps in (20, 80):
        sampler = dit.Sampler.sit_sde(
            steps + 1, diffusion, solver=solver, last_step_size=1 / steps
        )
        found = np.array(moments(sampler, deviation=0.5, mean=2.0))
        # Of first order in the step; measured 3 / steps for "constant", whose score
        # grows most towards the image, below 0.4 / steps for the others.
        assert_within(found, [2.0, 0.5], 4 / steps)


def test_steps_of_heun_may_end_at_the_image():
    sampler = dit.Sampler.sit_sde(80, solver="heun", last_step=None)
    found = np.array(moments(sampler, deviation=0.5, mean=2.0))
    # As above; measured 3e-4.
    assert_within(found, [2.0, 0.5], 0.01)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"diffusion": "SBDM"}, "begins at 0"),
        ({"diffusion": "sigmoid"}, "Did you mean 'sigma'"),
        ({"norm": 0.0}, "norm"),
        ({"solver": "heun2"}, "Did you mean 'heun'"),
        ({"last_step": "Mean"}, "Did you mean 'mean'"),
        ({"last_step_size": 1.0}, "last_step_size"),
        ({"last_step": None, "last_step_size": 0.1}, "no effect"),
        ({"steps": 1}, "steps"),
        ({"convention": "data_at_1"}, "Did you mean 'data_at_one'"),
        (
            {"solver": "heun", "last_step": None, "diffusion": "constant"},
            "last_step='mean'",
        ),
        (
            {"solver": "heun", "last_step": None, "diffusion": "decreasing"},
            "last_step='mean'",
        ),
    ],
)
def test_settings_without_a_walk_are_errors(unchecked_types, settings, words):
    with pytest.raises(ValueError, match=words):
        dit.Sampler.sit_sde(**settings)


@pytest.mark.parametrize("make", [dit.Sampler.euler, dit.Sampler.heun])
def test_other_conventions_are_errors(unchecked_types, make):
    with pytest.raises(ValueError, match="Did you mean 'data_at_one'"):
        make(5, convention="data_at_1")


def test_a_key_is_needed():
    image = jnp.ones((1, 2, 2, 1))
    with pytest.raises(ValueError, match="key"):
        dit.run_sampler(dit.Sampler.sit_sde(3), lambda x, t, c: x, image)
