"""Step caches: slow float64 replays, what the program runs, and what is refused."""

import contextlib
import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionopt_jax import dit
from fusionopt_jax.dit.cache.fingerprint import weight_digests
from fusionopt_jax.dit.sampling import METHODS
from fusionopt_jax.dit.sampling.extrapolation import extrapolation
from tests import _compile
from tests._compare import assert_within
from tests.dit._models import random_params
from tests.references import dit as dit_reference
from tests.references import samplers as reference
from tests.references import step_cache as replay

StepCache = dit.StepCache

CONFIG = dit.DiTConfig(
    input_size=4,
    hidden_size=32,
    depth=2,
    num_heads=2,
    num_classes=10,
    learn_sigma=False,
)
SIZES = dit_reference.Sizes(patch=2, heads=2, depth=2)
LABELS = [3, 7]
SAMPLER = dit.Sampler.euler(6)

# Six steps: two that compute, so that order 1 can begin, and as many skipped ones.
WHOLE = StepCache(mask=[True, True, False, True, False, False], order=1)
OTHER = StepCache(mask=[True, True, True, False, False, True], order=1)
BRANCHES = StepCache(
    attention=[True, True, False, False, True, False],
    mlp=[
        [True, True],
        [True, True],
        [True, False],
        [False, True],
        [True, True],
        [False, False],
    ],
    order=1,
)


@functools.cache
def weights():
    """Parameters in which every modulator and gate matters."""
    return jax.tree.map(lambda leaf: 0.4 * leaf, random_params(CONFIG))


@functools.cache
def noise():
    return jax.random.normal(jax.random.key(2), (2, 4, 4, 4))


def sampled(step_cache, sampler=SAMPLER, scale=2.0, **options):
    """The request that these tests share."""
    return dit.sample(
        weights(),
        CONFIG,
        options.pop("cache", None),
        options.pop("noise", noise()),
        LABELS,
        sampler,
        scale,
        step_cache=step_cache,
        **options,
    )


def replayed(step_cache, sampler=SAMPLER, scale=2.0, interval=(0.0, 1.0)):
    """The same request by the slow reference, image by image; Euler's steps."""
    masks = {}
    for kind in ("mask", "attention", "mlp"):
        mask = getattr(step_cache, kind)
        if mask is None:
            continue
        for index in range(CONFIG.depth):
            name = ("network",) if kind == "mask" else (kind, index)
            masks[name] = [np.ravel(row)[index % np.size(row)] for row in mask]
    params = jax.tree.map(np.asarray, weights())
    images = []
    for image, label in zip(np.float64(noise()), LABELS, strict=True):
        walks = {y: replay.Replay(masks, step_cache.order) for y in (label, 10)}

        def predict(image, step, time, label, walks=walks):
            def recall(name, compute):
                return walks[label].recall(name, step, time, compute)

            return dit_reference.forward_one(
                params, image, 1000.0 * time, label, SIZES, recall
            )

        times = 1.0 - np.arange(sampler.steps + 1) / sampler.steps
        for step, (here, there) in enumerate(itertools.pairwise(times)):
            velocity = predict(image, step, here, label)
            if interval[0] <= here <= interval[1]:
                free = predict(image, step, here, 10)
                velocity = free + scale * (velocity - free)
            image = image + (there - here) * velocity
        images.append(image)
    return np.stack(images)


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


@pytest.mark.parametrize("order", [0, 1, 2])
def test_weights_extend_polynomials_of_their_order(order, rng):
    times = np.sort(rng.uniform(0, 1000, 12))[::-1]
    mask = np.arange(12) < order + 1
    mask[[5, 6, 9]] = True
    weights = extrapolation(times, mask, order)
    values = np.polyval(rng.standard_normal(order + 1), times / 1000)
    last = []
    for step, computed in enumerate(mask):
        last = [step, *last] if computed else last
        used = (last + [0] * order)[: order + 1]
        # A polynomial of this degree is what it is extended by; weights up to 1e3.
        assert_within(weights[step] @ values[used], values[step], 1e-10)
        points = [times[used], values[used], times[step]]
        if not computed:
            assert_within(weights[step] @ values[used], replay.newton(*points), 1e-10)


def toy_step(denoise, sampler, image, draws, label):
    """The reference's walk of a sampler, with any prediction."""
    if sampler.method in ("ddim", "dpm_solver_pp_2m"):
        times = np.asarray(sampler.eval_times(), np.float64)
        if sampler.method == "ddim":
            walk = (image, draws, times[::-1].astype(int))
            return reference.implicit(denoise, *walk, sampler.eta, False)[0]
        return reference.multistep(denoise, image, np.append(times, 0.0))
    times = 1.0 - np.arange(sampler.steps + 1) / sampler.steps

    def velocity(image, time):
        return denoise(image, 1000.0 * time)[0]

    if sampler.method == "heun":
        return reference.heun_flow(velocity, image, times)[-1]
    for here, there in itertools.pairwise(times):
        image = image + (there - here) * velocity(image, here)
    return image


@pytest.mark.parametrize(
    ("sampler", "order"),
    [
        (dit.Sampler.euler(8), 0),
        (dit.Sampler.heun(8), 1),
        (dit.Sampler.ddim("ddim10", eta=0.5), 2),
        (dit.Sampler.dpm_solver_pp_2m(16), 1),
    ],
    ids=lambda value: getattr(value, "method", value),
)
def test_a_whole_prediction_is_recalled_as_in_the_reference(sampler, order, rng):
    image = rng.standard_normal((2, 4, 4, 3))
    draws = rng.standard_normal((sampler.steps, 2, 4, 4, 3))
    label = np.array([1.0, 2.0]).reshape(-1, 1, 1, 1)
    step_cache = StepCache.every(sampler.steps, 3, order=order)
    slots = len(sampler.evaluations)
    walk = replay.Replay({slot: step_cache.mask for slot in range(slots)}, order)
    calls = itertools.count()

    def predict(image, time):
        step, slot = divmod(next(calls), slots)
        compute = functools.partial(reference.toy_network, image, time, label)
        return walk.recall(slot, step, time, lambda: np.stack(compute()))

    expected = toy_step(predict, sampler, image, draws, label)
    assert next(calls) == slots * sampler.steps

    def denoise(image, time, condition):
        levels = jnp.asarray(np.sqrt(1.0 - reference.alpha_bars()), image.dtype)
        level = jnp.interp(time, jnp.arange(1000.0), levels)
        return level * image + 0.1 * jnp.sin(3.0 * image + jnp.asarray(label))

    with jax.enable_x64(True):
        got = dit.run_sampler(
            sampler,
            denoise,
            jnp.asarray(image),
            step_noise=jnp.asarray(draws),
            step_cache=step_cache,
        ).images
    # The loop's times are float32 where the solver's are fractions; float64 elsewhere.
    fractional = sampler.method == "dpm_solver_pp_2m"
    assert_within(got, expected, 1e-5 if fractional else 1e-11)


EVERY = [
    dit.Sampler.euler(8, shift=2.0),
    dit.Sampler.heun(8, convention="data_at_one"),
    dit.Sampler.sit_sde(8, solver="heun"),
    dit.Sampler.ddpm("8"),
    dit.Sampler.ddim("8", eta=0.5),
    dit.Sampler.dpm_solver_pp_2m(16),
]


@pytest.mark.parametrize("sampler", EVERY, ids=lambda sampler: sampler.method)
def test_lines_are_extended_exactly_by_every_sampler(sampler):
    start = np.linspace(-1.0, 1.0, 12).reshape(1, 2, 2, 3)

    def denoise(image, time, condition):
        line = jnp.asarray(start) + 0.2 * time.astype(image.dtype) / 1000
        return jnp.concatenate([line, -line], axis=-1)

    def run(step_cache):
        with jax.enable_x64(True):
            options = {"key": jax.random.key(0), "step_cache": step_cache}
            walk = dit.run_sampler(sampler, denoise, jnp.asarray(start), **options)
            return np.asarray(walk.images)

    exact, step_cache = run(None), StepCache.every(sampler.steps, 3, order=1)
    # Diffusion divides by the share of a clean image, 0.006 at first, and rounding too.
    assert_within(run(step_cache), exact, 1e-11)
    reusing = run(dataclasses.replace(step_cache, order=0))
    assert np.abs(reusing - exact).max() > 1e-3


def test_every_sampler_is_among_them():
    assert {type(sampler) for sampler in EVERY} == set(METHODS)


# Six float32 steps against float64, on values up to 3. Measured 1e-6.
REPLAYED = 1e-5


def test_blocks_are_recalled_as_in_the_reference_and_a_new_mask_compiles_nothing():
    assert_within(sampled(WHOLE), replayed(WHOLE), REPLAYED, "first mask")
    with no_compilation():
        images = sampled(OTHER)
    assert_within(images, replayed(OTHER), REPLAYED, "second mask")
    # What it replays is not what the exact network gives.
    exact = sampled(None)
    assert float(jnp.abs(images - exact).max()) > 100 * REPLAYED


def test_branches_are_recalled_as_in_the_reference():
    assert_within(sampled(BRANCHES), replayed(BRANCHES), REPLAYED)


def test_guidance_in_an_interval_recalls_pairs_computed_in_it():
    # Times 1, 5/6, 4/6, 3/6, 2/6, 1/6: steps 2 to 4 are guided.
    step_cache = StepCache(mask=[True, False, True, False, True, False])
    interval = (0.3, 0.7)
    images = sampled(step_cache, guidance_interval=interval)
    assert_within(images, replayed(step_cache, interval=interval), REPLAYED)
    with pytest.raises(ValueError, match="step 2 lies within `guidance_interval`"):
        sampled(StepCache.every(6, 3), guidance_interval=interval)
    # A guidance scale of 1 evaluates no null label anywhere.
    StepCache.every(6, 3).check(SAMPLER)


@pytest.mark.parametrize("cached", [False, True])
def test_a_mask_that_skips_nothing_is_no_step_cache(cached):
    cache = None
    if cached:
        times = SAMPLER.eval_times()
        cache = dit.build_cache(weights(), CONFIG, times, LABELS, force=True)
    exact = sampled(None, cache=cache)
    every = [True] * 6
    with no_compilation():
        for masks in ({"mask": every}, {"attention": every, "mlp": every}):
            got = sampled(StepCache(**masks, order=1), cache=cache)
            np.testing.assert_array_equal(got, exact)


def test_works_with_all_that_sampling_can_do():
    """Heun, a cache, half precision, unrolled, previews, progress, a mesh, donation."""
    sampler = dit.Sampler.heun(6)
    times = sampler.eval_times()
    cache = dit.build_cache(weights(), CONFIG, times, LABELS, force=True)
    plain = sampled(WHOLE, sampler)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.P("data"))
    start, seen = jax.device_put(noise(), rows), []
    samples = sampled(
        WHOLE,
        sampler,
        cache=cache,
        noise=start,
        unroll=True,
        previews=2,
        progress=lambda *call: seen.append(call),
        donate=True,
    )
    assert start.is_deleted()
    assert sorted(seen) == [(step, 6) for step in range(1, 7)]
    assert samples.images.sharding.is_equivalent_to(rows, 4)
    # Modulators in one product instead of six, and batches of one: sums in other order.
    assert_within(samples.images, plain, REPLAYED)
    half = sampled(BRANCHES, cache=cache_of(SAMPLER), dtype=jnp.bfloat16)
    # Eight bits in every operand, 2^-9 of it. Measured 4e-3.
    assert_within(half, replayed(BRANCHES), 2e-2)


@functools.cache
def cache_of(sampler):
    """A cache for these weights."""
    return dit.build_cache(weights(), CONFIG, sampler.eval_times(), LABELS, force=True)


def computations(text):
    """The computations of a compiled program, by name, as lists of lines."""
    found, name = {}, ""
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if head:
            name = "ENTRY" if head[1] else head[2]
            found[name] = []
        elif name:
            found[name].append(line)
    return found


def outside_conditionals(found, name="ENTRY"):
    """Every line that runs whatever the conditionals choose."""
    for line in found[name]:
        yield line
        if " conditional(" not in line:
            for called in re.findall(
                r"(?:calls|body|condition|to_apply)=%?([\w.\-]+)", line
            ):
                yield from outside_conditionals(found, called)


def program(step_cache):
    """The text of the compiled program, as a user's compiler writes it."""

    @jax.jit
    def run(params, start):
        return dit.sample(
            params, CONFIG, None, start, LABELS, SAMPLER, 2.0, step_cache=step_cache
        )

    lowered = run.lower(weights(), noise())
    return lowered.compile(compiler_options=_compile.as_users()).as_text()


def widths_of_products(lines):
    """The last size of the result of every matrix product."""
    pattern = r"= f32\[(?:\d+,)*(\d+)\]\S* (?:dot|custom-call)\("
    return {int(size) for line in lines for size in re.findall(pattern, line)}


@pytest.mark.parametrize(
    ("step_cache", "hidden"),
    [(None, set()), (WHOLE, {96, 128}), (BRANCHES, {96, 128})],
    ids=["none", "whole", "branches"],
)
def test_skipped_blocks_are_not_run(step_cache, hidden):
    found = computations(program(step_cache))
    every = [line for lines in found.values() for line in lines]
    # Queries, keys and values are 96 wide, the MLP 128; nothing else is.
    assert widths_of_products(every) >= {96, 128}
    unconditional = widths_of_products(outside_conditionals(found))
    assert {96, 128} & unconditional == {96, 128} - hidden
    assert any(" conditional(" in line for line in every) == bool(hidden)
    # Nothing chooses between tokens that were computed and tokens that were kept.
    assert not [line for line in every if re.search(r"f32\[4,4,32\]\S* select\(", line)]


@pytest.mark.parametrize("sampler", [dit.Sampler.euler(6), dit.Sampler.heun(6)])
def test_the_network_runs_as_often_as_the_mask_says(sampler):
    count = itertools.count()

    def denoise(image, time, condition, plan, kept):
        def branch(tokens):
            jax.debug.callback(lambda: next(count))
            return jnp.sin(tokens)

        residual, kept = plan.network(branch, kept, image)
        return image + residual, kept

    step_cache = StepCache(mask=[True, False, False, True, False, False])
    network = dit.Remembering(denoise)
    dit.run_sampler(sampler, network, jnp.ones((1, 2, 2, 1)), step_cache=step_cache)
    jax.effects_barrier()
    assert next(count) == 2 * len(sampler.evaluations)
    assert step_cache.fraction == pytest.approx(1 / 3)


def test_a_network_that_remembers_needs_no_step_cache():
    def denoise(image, time, condition, plan, kept):
        residual, kept = plan.mlp(jnp.sin, kept, image)
        return image + residual, kept

    def plain(image, time, condition):
        return image + jnp.sin(image)

    start = jnp.ones((1, 2, 2, 1))
    network = dit.Remembering(denoise)
    got = dit.run_sampler(SAMPLER, network, start).images
    exact = dit.run_sampler(SAMPLER, plain, start).images
    np.testing.assert_array_equal(got, exact)
    # One that recalls nothing differs from one that does, and from none.
    skipping = StepCache(mlp=[True, False] * 3)
    again = dit.run_sampler(SAMPLER, network, start, step_cache=skipping).images
    assert float(jnp.abs(again - exact).max()) > 1e-3
    with pytest.raises(ValueError, match="never asks its plan for"):
        dit.run_sampler(SAMPLER, network, start, step_cache=WHOLE)
    with pytest.raises(ValueError, match=r"dit\.Remembering"):
        dit.run_sampler(SAMPLER, plain, start, step_cache=skipping)


@dataclasses.dataclass(frozen=True)
class Twice(dit.Sampler):
    """Evaluates twice at one time, and may say so."""

    method = "twice"
    steps: int = 4
    says: tuple[int, ...] = (0,)

    @property
    def evaluations(self):
        return self.says

    def host_times(self):
        return np.float32(np.arange(self.steps, 0, -1))

    def coefficients(self):
        return {}

    def step(self, predict, x, at):
        x = x - 0.1 * predict(x).value
        return dit.sampling.sampler.Step(x - 0.1 * predict(x).value, clean=x)


def test_a_sampler_that_evaluates_otherwise_says_so():
    start, step_cache = jnp.ones((1, 2, 2, 1)), StepCache.every(4, 2)
    run = functools.partial(
        dit.run_sampler, denoise=lambda x, t, c: x, noise=start, step_cache=step_cache
    )
    right = run(Twice(says=(0, 0))).images
    # Each evaluation recalls its own of the step before: 1, 0.9, then twice the same.
    expected = 1.0
    for _ in range(2):
        first, second = expected, 0.9 * expected
        expected -= 2 * 0.1 * (first + second)
    assert_within(right, np.full((1, 2, 2, 1), expected), 1e-6)
    for says in ((0,), (0, 0, 0)):
        with pytest.raises(ValueError, match="its `evaluations` say"):
            run(Twice(says=says))


def pinned(step_cache=WHOLE, sampler=SAMPLER):
    """A step cache that knows what it was chosen for."""
    digests = weight_digests(weights())
    return dataclasses.replace(
        step_cache, fingerprint=digests, sampler=sampler, config=CONFIG
    )


def test_other_weights_or_samplers_are_refused():
    step_cache, params = pinned(), weights()
    step_cache.check(SAMPLER, params)
    step_cache.check(SAMPLER, dit.strip_modulators(params))
    other = jax.tree.map(lambda leaf: leaf, params)
    kernel = other["blocks"]["mlp"]["fc1"]["kernel"]
    other["blocks"]["mlp"]["fc1"]["kernel"] = kernel.at[1, 0, 0].add(1e-6)
    request = (CONFIG, None, noise(), LABELS)
    with pytest.raises(dit.StaleCacheError, match="blocks/mlp/fc1/kernel changed"):
        dit.sample(other, *request, SAMPLER, step_cache=step_cache)
    shifted = dit.Sampler.euler(6, shift=2.0)
    with pytest.raises(dit.StaleCacheError, match=r"chosen for Euler\(steps=6"):
        dit.sample(params, *request, shifted, step_cache=step_cache)
    with pytest.raises(ValueError, match="for 6 steps, but the sampler has 5"):
        dit.sample(params, *request, dit.Sampler.euler(5), step_cache=WHOLE)
    # The same weights are another model under another config.
    for name, value in (("time_scale", 0.001), ("num_heads", 4)):
        config = dataclasses.replace(CONFIG, **{name: value})
        with pytest.raises(dit.StaleCacheError, match=rf"config: {name} \("):
            dit.sample(
                *(params, config, None, noise(), LABELS, SAMPLER),
                step_cache=step_cache,
            )
    free = dataclasses.replace(step_cache, fingerprint=None, sampler=None, config=None)
    assert free == WHOLE
    free.check(shifted, other, dataclasses.replace(CONFIG, time_scale=0.001))


def test_what_was_planned_for_another_sampler_is_refused():
    plans = StepCache.every(5, 2).plan(dit.Sampler.euler(5))
    start = jnp.ones((1, 2, 2, 1))
    for sampler in (dit.Sampler.heun(5), dit.Sampler.euler(4)):
        with pytest.raises(ValueError, match="but the sampler needs"):
            dit.run_sampler(sampler, lambda x, t, c: x, start, step_cache=plans)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({}, ValueError, "needs `mask`"),
        ({"mask": [False, True]}, ValueError, "skips step 0"),
        ({"mask": [True, False], "order": 1}, ValueError, "the first 2 of the 2"),
        ({"mask": [0, 4, 8]}, TypeError, "boolean per step"),
        ({"mask": []}, TypeError, "boolean per step"),
        ({"mask": [[True]]}, ValueError, r"shape \[steps\]"),
        ({"mask": [True], "order": 3}, ValueError, "order"),
        ({"mask": [True], "order": 1.0}, TypeError, "order"),
        ({"mask": [True], "mlp": [True]}, ValueError, "the one or the others"),
        ({"mlp": [True], "attention": [True] * 2}, ValueError, "for 2 steps"),
        ({"mask": [True], "sampler": SAMPLER}, ValueError, "for 1 steps"),
    ],
)
def test_masks_that_mean_nothing_are_errors(unchecked_types, settings, error, words):
    with pytest.raises(error, match=words):
        StepCache(**settings)


def test_a_mask_of_another_depth_is_an_error():
    with pytest.raises(ValueError, match="for 3 blocks, but the model has 2"):
        sampled(StepCache(mlp=[[True] * 3] * 6))


def test_extrapolating_between_equal_times_is_an_error():
    with pytest.raises(ValueError, match="order=0"):
        extrapolation(np.array([2.0, 1.0, 1.0]), [True, True, False], 1)


def test_a_step_cache_is_a_value():
    assert dataclasses.replace(WHOLE) == WHOLE
    assert len({WHOLE, BRANCHES, StepCache(mask=np.array(WHOLE.mask), order=1)}) == 2
    assert StepCache.every(6, 2).mask == (True, False) * 3
    assert StepCache(attention=[True, False]).fraction == pytest.approx(5 / 6)
    assert BRANCHES.fraction == pytest.approx((3 / 6) / 3 + (8 / 12) * 2 / 3)
