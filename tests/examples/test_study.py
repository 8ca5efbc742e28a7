"""The study: data that is the same everywhere, runs that resume, tables from files."""

import concurrent.futures
import math
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from study import (
    away,
    cells,
    glyphs,
    inline,
    optimizers,
    plan,
    plots,
    records,
    report,
    rules,
    run,
    sources,
    summary,
    times,
    training,
    transformer,
    workloads,
)
from study.records import Job, Record
from study.table import BASE, METHODS, RECIPE

import fusionopt_jax as fo
from fusionopt_jax import dit

DOCS = Path(__file__).parents[2] / "docs"


def record(job, curve=(3.0, 2.0), **changes):
    """A finished run; of two validations, unless told otherwise."""
    fields = {
        "job": job,
        "eval_every": job.steps // 2,
        "curve": list(curve),
        "step_sizes": [],
        "figures": {},
        "seconds": 8.0,
        "total_seconds": 10.0,
        "state_bytes": 200,
        "param_bytes": 100,
        "data": "abc",
        "versions": {"python": "3.11.7"},
    }
    return Record(**fields | changes)


def finish(method, steps, loss, finished=None, workload="lm"):
    """Make every run that the plan asks for, ending at the loss that is given."""
    finished = {} if finished is None else finished
    while jobs := plan.wanted(workload, steps, METHODS[method], finished).jobs:
        for job in jobs:
            finished[job] = record(job, (5.0, loss(job)))
    return finished


# Data


def test_a_glyph_follows_from_its_font_and_number():
    first = glyphs.draw("DejaVuSans", "g", 3)
    again = glyphs.draw("DejaVuSans", "g", 3)
    np.testing.assert_array_equal(first, again)
    assert first.shape == (16, 16)
    assert first.max() > 128
    assert (glyphs.draw("DejaVuSans", "g", 4) != first).any()
    assert (glyphs.draw("DejaVuSans", "q", 3) != first).any()


def test_no_font_is_on_both_sides():
    assert not set(glyphs.TRAIN_FONTS) & set(glyphs.HELD_OUT_FONTS)
    families = {name[:4] for name in glyphs.TRAIN_FONTS}
    assert "STIX" not in families


def test_every_font_draws_every_character():
    for font in (*glyphs.TRAIN_FONTS, *glyphs.HELD_OUT_FONTS):
        drawn = [glyphs.draw(font, character, 0) for character in glyphs.CHARACTERS]
        # A font without a character draws the same box for all of those.
        assert len({image.tobytes() for image in drawn}) == len(glyphs.CHARACTERS)
        assert min(image.max() for image in drawn) > 64


def test_no_file_of_the_text_is_on_both_sides():
    text = sources.load()
    assert not set(text.train_files) & set(text.held_out_files)
    share = len(text.held_out) / (len(text.held_out) + len(text.train))
    # A tenth of the files; they are of unequal length.
    assert 0.03 < share < 0.25
    assert "heapq.py" in text.train_files + text.held_out_files


def test_the_hash_of_a_name_decides():
    assert not sources.is_held_out("heapq.py")
    held_out = [f"{number}.py" for number in range(1000)]
    # A binomial count: 100 +- 9.5.
    assert 60 < sum(map(sources.is_held_out, held_out)) < 140


# The model


def test_a_token_sees_none_that_come_later():
    params = transformer.init(jax.random.key(0), 16, 16, length=6, width=32, depth=1)
    tokens = jnp.arange(6)[None]
    changed = tokens.at[0, 4].set(9)
    causal = [
        transformer.apply(params, some, causal=True) for some in (tokens, changed)
    ]
    np.testing.assert_array_equal(causal[0][:, :4], causal[1][:, :4])
    assert (causal[0][:, 4:] != causal[1][:, 4:]).all()


def test_patches_are_squares():
    image = jnp.arange(256.0).reshape(1, 16, 16, 1)
    np.testing.assert_array_equal(
        workloads.patches(image)[0, 1].reshape(4, 4), image[0, :4, 4:8, 0]
    )


def test_a_new_model_guesses():
    params = transformer.init(jax.random.key(0), 16, 62, length=16, width=32, depth=1)
    logits = transformer.apply(params, jnp.ones((2, 16, 16)), causal=False)
    labels = jnp.zeros((2, 16), jnp.int32)
    loss = workloads._cross_entropy(logits, labels)
    # The logits of a new model are about 0.1: log 62 +- their square.
    assert abs(float(loss) - math.log(62)) < 0.2


@pytest.mark.parametrize(
    ("workload", "method"),
    [
        ("conv", "sf_normuon_conv"),
        *(
            pytest.param(*both, marks=pytest.mark.exhaustive)
            for both in (
                *((name, "sf_normuon") for name in (*workloads.NAMES, "lm_640")),
                *(("digits_3x156", "blocks_3x156"), ("away_digits_3", "adamw_away")),
                ("away_glyphs_0.9", "full_ratio_away"),
            )
        ),
    ],
)
def test_every_workload_takes_a_step(workload, method, monkeypatch):
    # The reference untrained, and all of it traced for shapes alone.
    monkeypatch.setattr(
        workloads, "_reference", lambda task: workloads.get(task).init(0)
    )
    workloads.get.cache_clear()
    task = workloads.get(workload)
    workloads.get.cache_clear()
    params = jax.eval_shape(lambda: task.init(1))

    def step(params):
        tx = METHODS[method].optimizer(task, 1e-3, 0.1, 100, params)
        loss, grads = jax.value_and_grad(task.loss)(params, task.train, 3, 1)
        state = tx.init(params)
        updates, _ = tx.update(grads, state, params, value=loss)
        return updates, task.validate(params, task.held_out)

    updates, loss = jax.eval_shape(step, params)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
    assert loss.shape == ()


def test_the_distance_from_a_reference():
    config = dit.DiTConfig(
        *(4, 2, 1),
        **{"hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 3},
        learn_sigma=False,
    )
    reference = dit.init_params(config, 0)
    own = jax.tree.map(lambda leaf: leaf, reference)
    images, labels = jnp.ones((2, 4, 4, 1)), jnp.array([0, 2])
    arguments = (reference, config, images, labels, jax.random.key(0))
    assert away.distance(own, *arguments) == 0
    # What is added to the last bias is added to every number of the velocity.
    own["final_layer"]["linear"]["bias"] += 0.5
    np.testing.assert_allclose(away.distance(own, *arguments), 0.25, rtol=1e-6)


# The optimisers


def tiny_setting(rate=1e-3, decay=0.1):
    params = {
        "blocks": {
            "qkv": 0.1 * jnp.ones((1, 128, 384)),
            "norm1": jnp.ones((1, 128)),
        },
        **{name: jnp.ones((4, 128)) for name in ("reader", "positions", "writer")},
    }
    return params, optimizers.Setting(
        *(rate, decay, 100, params),
        *(transformer.routing(), transformer.routing(chunks=False)),
    )


@pytest.mark.parametrize("name", METHODS)
def test_every_row_builds(name):
    params, setting = tiny_setting()
    tx = METHODS[name].build(setting)
    # Traced for shapes alone: nothing is compiled.
    state = jax.eval_shape(tx.init, params)
    if METHODS[name].part in ("baselines", "rules", "components", "accumulation"):
        # The rows of the other parts differ from these by numbers.
        updates, after = jax.eval_shape(
            lambda grads, state, params: tx.update(grads, state, params, value=1.0),
            *(params, state, params),
        )
        assert jax.tree.structure(after) == jax.tree.structure(state)
        assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)


def test_the_rate_warms_up_and_falls_to_zero():
    _, setting = tiny_setting(rate=0.5)
    rate = optimizers.warmup_cosine(setting)
    # 7.5 % of a hundred steps, to a whole step.
    np.testing.assert_allclose(
        [rate(0), rate(4), rate(8), rate(100)], [0, 0.25, 0.5, 0]
    )


@pytest.mark.parametrize(
    ("use", "expected"),
    [
        # Steps 2 and 3 give the reference, the root of 2 x 8.
        (rules.hold, [1.0, 1.0, 2.0, 8.0, 4.0, 0.0, 4.0]),
        (rules.relative, [1.0, 1.0, 1.0, 1.0, 1.5, 0.0, 0.5]),
    ],
)
def test_a_factor_is_referred_to_its_start(use, expected):
    inner = fo.schedule_free(optax.identity(), 1.0, b1=0.0)
    tx = use(inner, steps=4)
    params = jnp.zeros(())
    state = tx.init(params)
    moved = []
    for factor in (1.0, 1.0, 2.0, 8.0, 6.0, 0.0, 2.0):
        updates, state = tx.update(
            jnp.ones(()), state, params, step_size=jnp.float32(factor)
        )
        params = params + updates
        moved.append(-float(updates))
    # The exponential of a mean of fp32 logarithms: a few parts in 10^7, of sums of 20.
    np.testing.assert_allclose(moved, expected, atol=1e-5)
    with pytest.raises(ValueError, match="at least 2, got 1"):
        use(inner, steps=1)


# What to run next


def tried_by(finished, method):
    """Rate and decay of the runs that tuned a row, in their order."""
    tuning = [job for job in finished if job.method == method and job.seed == 0]
    return [(job.rate, job.decay) for job in tuning]


@pytest.mark.parametrize(
    ("best", "expected"),
    [
        (4e-3, [4e-3, 8e-3, 2e-3]),
        # Up while it gets better; down is then known to be worse.
        (1.6e-2, [4e-3, 8e-3, 1.6e-2, 3.2e-2]),
        (1e-3, [4e-3, 8e-3, 2e-3, 1e-3, 5e-4]),
    ],
)
def test_the_rate_climbs_until_both_neighbours_are_worse(best, expected):
    finished = finish("adamw", 800, lambda job: abs(math.log2(job.rate / best)))
    rates = [rate for rate, decay in tried_by(finished, "adamw") if decay == 0.05]
    assert rates == expected
    assert plan.wanted("lm", 800, METHODS["adamw"], finished).tuned.rate == best


@pytest.mark.parametrize(
    ("best", "expected"),
    [
        (0.05, [0.05, 0.2, 0.0]),
        (0.2, [0.05, 0.2, 0.4]),
        (0.8, [0.05, 0.2, 0.4, 0.8]),
        (0.0, [0.05, 0.2, 0.0]),
    ],
)
def test_the_decay_climbs_at_the_best_rate(best, expected):
    finished = finish("adamw", 800, lambda job: job.rate + abs(job.decay - best))
    tuned = plan.wanted("lm", 800, METHODS["adamw"], finished)
    assert tuned == plan.Wanted([], 0, plan.Tuned(6.25e-5, best), (1, 2, 3, 4, 5))
    tried = tried_by(finished, "adamw")
    assert [decay for rate, decay in tried if rate == 6.25e-5] == expected
    assert len({job.path for job in finished}) == len(finished)


def test_a_climb_ends():
    finished = finish("adamw", 800, lambda job: -job.rate)
    rates = [rate for rate, decay in tried_by(finished, "adamw") if decay == 0.05]
    assert max(rates) == 4e-3 * 2**plan.REACH


def test_what_diverges_climbs_down():
    loss = lambda job: 1.0 if job.rate < 1e-3 else math.inf  # noqa: E731
    finished = finish("adamw", 800, loss)
    assert plan.wanted("lm", 800, METHODS["adamw"], finished).tuned.rate == 5e-4


def test_a_run_that_diverged_is_the_worst():
    job = Job("lm", "adamw", 1e-3, 0.05, 0, 800)
    assert record(job, (3.0,)).final == math.inf
    assert record(job, (3.0, 2.5)).final == 2.5


def test_a_row_starts_where_its_base_is_best():
    method, base = METHODS["hyperball"], METHODS["normuon"]
    # By itself it asks for what tunes its base.
    before = plan.wanted("lm", 800, method, {})
    assert before.jobs == plan.wanted("lm", 800, base, {}).jobs
    assert before.least == 3 + 3
    loss = lambda job: abs(job.rate - 1.6e-2) + abs(job.decay - 0.4)  # noqa: E731
    finished = finish("normuon", 800, loss)
    finished = finish("hyperball", 800, lambda job: abs(job.rate - 8e-3), finished)
    # One decay of its own is taken as it is.
    expected = [(rate, 0.0) for rate in (1.6e-2, 3.2e-2, 8e-3, 4e-3)]
    assert tried_by(finished, "hyperball") == expected
    tuned = plan.wanted("lm", 800, method, finished).tuned
    assert tuned == plan.Tuned(8e-3, 0.0)
    # A larger model starts at the smallest one's.
    (job,) = plan.wanted("lm_256", 800, base, finished).jobs
    assert job == Job("lm_256", "normuon", 1.6e-2, 0.4, 0, 800)


def test_the_recipe_is_what_fusion_opt_does_by_default():
    rng = np.random.default_rng(0)
    shapes = {"matrix": (128, 130), "rest": (5,)}
    params, grads = (
        {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
        for _ in range(2)
    )
    method = METHODS[RECIPE]
    names = types.SimpleNamespace(routing=fo.Routing(), unchunked=fo.Routing())
    row = method.optimizer(names, method.centre, method.decays[0], 800, params)
    after = []
    for tx in (row, fo.fusion_opt(8e-3)):
        _, state = tx.update(grads, tx.init(params), params)
        after.append(tx.update(grads, state, params))
    jax.tree.map(np.testing.assert_array_equal, *after)


def test_ablations_start_at_the_setting_of_their_base():
    (job,) = plan.wanted("lm", 800, METHODS["mona"], {}).jobs
    base = METHODS[BASE]
    assert (job.rate, job.decay) == (base.centre, base.decays[0])
    (first, *_) = plan.wanted("lm", 800, METHODS["beta_0.9"], {}).jobs
    assert first == Job("lm", "beta_0.9", job.rate, job.decay, 1, 800)


def test_a_long_row_takes_the_rate_of_its_base():
    finished = finish("normuon", 800, lambda job: abs(job.rate - 4e-3) - job.decay)
    finished = finish("normuon_x3", 800, lambda job: 1.0, finished)
    finished = finish("decay_z", 800, lambda job: abs(job.decay - 0.8), finished)
    for name, rate, steps in (("normuon_x3", 4e-3, 2400), ("decay_z", 8e-3, 1600)):
        tuned = plan.wanted("lm", 800, METHODS[name], finished).tuned
        assert tuned == plan.Tuned(rate, 0.8)
        assert {job.steps for job in finished if job.method == name} == {steps}
    assert tried_by(finished, "normuon_x3") == []


def test_the_first_rows_come_first():
    steps = {"lm": 10, "vit": 10}
    jobs = list(plan.in_order(steps, list(METHODS.values()), {}))
    assert [job[:3] for job in jobs[:4]] == [
        *(("lm", "adamw", 4e-3), ("vit", "adamw", 4e-3)),
        *(("lm", "fixed", 8e-3), ("lm", "fixed", 8e-3)),
    ]
    # Some seeds of every row come before the last seeds of the first.
    finished = finish("adamw", 10, lambda job: 1.0)
    for seed in (3, 5):
        finished.pop(next(job for job in finished if job.seed == seed))
    names = [
        job.method for job in plan.in_order(steps, list(METHODS.values()), finished)
    ]
    assert names[0] == "adamw"
    second = names.index("adamw", names.index("sf_adamw"))
    assert second < names.index("plus")


def test_what_is_no_baseline_runs_on_one_workload():
    for method in METHODS.values():
        places = plan.places(method, workloads.NAMES)
        if method.part == "rules":
            assert places == ["lm"]
        elif method.part == "baselines" and method.base is None and not method.on:
            assert places == list(workloads.NAMES)
    rows = summary.collect({})
    shown = report.losses("baselines", rows).splitlines()
    (line,) = [line for line in shown if "--only muon_95" in line]
    assert (line.count("not run yet"), line.count("not planned")) == (1, 3)


# Runs


@pytest.fixture
def small(monkeypatch):
    """A workload of sixteen numbers, whose runs have four steps."""

    def loss(params, train, step, seed):
        return jnp.sum((params["kernel"] - train) ** 2) + 0 * (step + seed)

    routing = fo.Routing(min_dim=4)
    workload = workloads.Workload(
        name="digits",
        init=lambda seed: {"kernel": jnp.full((4, 4), 1.0 + seed)},
        loss=loss,
        validate=lambda params, target: jnp.sum((params["kernel"] - target) ** 2),
        train=jnp.eye(4),
        held_out=jnp.eye(4),
        routing=routing,
        unchunked=routing,
        digest="abc",
        judge=lambda params: {"frechet_distance": float(params["kernel"][0, 0])},
    )
    caches = (training.compiled, training._init_state, training._validation)
    monkeypatch.setattr(workloads, "get", lambda name: workload)
    monkeypatch.setattr(workloads, "STEPS", 4)
    monkeypatch.setattr(workloads, "EVAL_EVERY", 2)
    monkeypatch.setattr(workloads, "TUNING_EVAL_EVERY", 4)
    for cached in caches:
        cached.cache_clear()
    yield workload
    for cached in caches:
        cached.cache_clear()


def test_a_run_repeats_itself(small, tmp_path):
    job = Job("digits", "sf_adamw", 0.1, 0.0, 1, 4)
    first, again = training.run(job), training.run(job)
    assert first.curve == again.curve
    # Adam's step is the rate: the fast iterate falls from 2 by 0.1 in each of four.
    assert 9 < first.final < first.curve[0] < 4 * 1 + 12 * 4
    assert first.figures == again.figures
    assert first.figures["frechet_distance"] < 2
    assert first.param_bytes == 64
    records.write(tmp_path, first)
    assert records.read_all(tmp_path) == {job: first}


def test_tuning_validates_less_often_and_ends_the_same(small, monkeypatch):
    job = Job("digits", "ratio", 0.1, 0.0, 0, 4)
    tuning = training.run(job)
    assert (tuning.eval_every, len(tuning.curve), tuning.figures) == (4, 1, {})
    assert len(tuning.step_sizes) == 2
    monkeypatch.setattr(workloads, "TUNING_EVAL_EVERY", 2)
    often = training.run(job)
    assert (often.eval_every, len(often.curve)) == (2, 2)
    assert often.final == tuning.final
    assert often.step_sizes == tuning.step_sizes


def test_a_run_that_is_no_number_ends(small):
    done = training.run(Job("digits", "adamw", math.inf, 0.0, 1, 4))
    assert (done.curve, done.figures, done.final) == ([], {}, math.inf)


def commands(monkeypatch, folder, *more, fails_at=None):
    """Run the command with runs that cost nothing; the jobs that it asks for."""
    asked = []

    def pretend(job):
        if len(asked) == fails_at:
            raise KeyboardInterrupt
        asked.append(job)
        return record(job, (5.0, 1 + abs(math.log(job.rate / 4e-3)) + job.decay))

    monkeypatch.setattr(training, "run", pretend)
    given = ("--out", str(folder), "--workload", "lm", "--only", "adamw")
    return run.main([*given, "--seeds", "1", "2", *more]), asked


def test_the_command_goes_on_where_it_was_stopped(monkeypatch, tmp_path, capsys):
    code, first = commands(monkeypatch, tmp_path, fails_at=3)
    assert (code, len(first)) == (130, 3)
    # What a kill in the middle of a write leaves behind is no result.
    beside = (tmp_path / first[0].path).with_name(".rate1_decay0_seed1_4.json.new")
    beside.write_text("{")
    code, rest = commands(monkeypatch, tmp_path)
    assert code == 0
    # Three rates, two other decays, two seeds.
    assert len(first) + len(rest) == 3 + 2 + 2
    assert not set(first) & set(rest)
    assert commands(monkeypatch, tmp_path) == (0, [])
    assert "go on from here" in capsys.readouterr().err.replace("goes", "go")


def test_runs_side_by_side_are_the_same(monkeypatch, tmp_path):
    _, one_by_one = commands(monkeypatch, tmp_path / "one")
    # Threads in place of processes, which would not know what is patched here.
    threads = concurrent.futures.ThreadPoolExecutor
    monkeypatch.setattr(
        run, "ProcessPoolExecutor", lambda workers, mp_context: threads(workers)
    )
    code, asked = commands(monkeypatch, tmp_path / "three", "--processes", "3")
    assert code == 0
    assert sorted(asked) == sorted(one_by_one)


def test_list_runs_nothing(monkeypatch, tmp_path, capsys):
    commands(monkeypatch, tmp_path, fails_at=3)
    capsys.readouterr()
    monkeypatch.setattr(training, "run", None)
    assert run.main(["--out", str(tmp_path), "--list"]) == 0
    listed = capsys.readouterr().out
    assert "adamw            lm untuned (7 runs)" in listed
    assert "3 runs made" in listed


def test_runs_on_other_data_are_not_mixed(monkeypatch, tmp_path, capsys):
    commands(monkeypatch, tmp_path, fails_at=2)
    (path,) = tmp_path.glob("*/*/rate0.004*.json")
    path.write_text(path.read_text().replace('"abc"', '"abd"'))
    code, asked = commands(monkeypatch, tmp_path)
    assert (code, len(asked)) == (2, 1)
    assert "data differs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--seeds", "0"], "seed 0 is the one that is tuned on"),
        (["--processes", "0"], "at least 1"),
        (["--only", "adam"], "invalid choice: 'adam'"),
    ],
)
def test_refuses(arguments, text, capsys):
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert text in capsys.readouterr().err


# What the runs say together


@pytest.fixture
def finished():
    """AdamW ends at 2, 2.1, ...; SF-NorMuon is 0.1 below and there in half the time."""
    adamw = finish("adamw", 800, lambda job: 2 + 0.1 * job.seed + job.decay)
    for job in list(adamw):
        adamw[job] = adamw[job]._replace(curve=[3.0, adamw[job].final])
    both = finish(
        "sf_normuon", 800, lambda job: 1.9 + 0.1 * job.seed + job.decay, adamw
    )
    for job in both:
        if job.method == "sf_normuon":
            # Down to AdamW's end halfway between 0 + 400 and 800 steps.
            curve = [both[job].final + 0.2, both[job].final]
            both[job] = both[job]._replace(
                curve=curve,
                seconds=16.0,
                step_sizes=[1.0, 1.0],
                figures={"frechet_distance": 1.0 * job.seed},
            )
    return both


def test_figures_of_a_row(finished):
    rows = summary.collect(finished)
    row, adamw = rows["lm", "sf_normuon"], rows["lm", "adamw"]
    assert list(row.runs) == [1, 2, 3]
    # 2.0, 2.1, 2.2: the variance of three numbers 0.1 apart is 0.01.
    expected = (2.1, math.sqrt(0.01 / 3), 3)
    np.testing.assert_allclose(summary.final(row), expected, rtol=1e-12)
    np.testing.assert_allclose(summary.difference(adamw, row).mean, 0.1, rtol=1e-12)
    # From 0.1 above AdamW's end at step 400 to 0.1 below at 800: there at 600 of 800.
    np.testing.assert_allclose(summary.shares(row, rows), [0.75] * 3, rtol=1e-12)
    assert summary.cost(row, adamw) == 2
    assert summary.figure(row, "frechet_distance") == summary.estimate([1, 2, 3])
    assert summary.final(rows["vit", "adamw"]) is None


def test_a_row_with_a_seed_that_diverged_has_diverged():
    found = summary.estimate([1.0, math.inf, 2.0])
    assert (found.mean, found.seeds) == (math.inf, 3)
    assert cells.text(found) == "diverged (3)"


def test_what_never_comes_down_says_so(finished):
    for job, done in finished.items():
        if job.method == "sf_normuon" and job.seed:
            finished[job] = done._replace(curve=[9.0, 9.0])
    rows = summary.collect(finished)
    shares = summary.shares(rows["lm", "sf_normuon"], rows)
    assert cells.share_text(shares) == "never (never to never)"


def test_the_ratio_beside_no_rule(finished):
    assert "| bytes | not run yet |  | not run yet | 0.008 |  |" in report.ratio(
        summary.collect(finished)
    )
    runs = finish("ratio", 800, lambda job: 1.8 + 0.1 * job.seed + job.decay, finished)
    for name, loss in (("fixed", 2.0), ("fixed_ratio", 2.25)):
        runs = finish(name, 800, lambda job, loss=loss: loss, runs)
    for job, done in runs.items():
        if job.method in ("ratio", "fixed_ratio"):
            runs[job] = done._replace(step_sizes=[0.5 * job.seed, 2.0])
    # All rates end alike, so the first that is tried is the best.
    shown = (
        "| bytes | +0.2500 ± 0.0000 (3) | 0.5 to 2.0 "
        "| -0.1000 ± 0.0000 (3) | 0.008, 0.008 | 0.5 to 2.0 |"
    )
    assert shown in report.ratio(summary.collect(runs))


def test_a_decay_that_still_climbs_is_marked(finished):
    rows = summary.collect(finished)
    assert cells.final_text(rows["lm", "adamw"]) == "2.300 ± 0.071 (5)"
    job = next(job for job in finished if job.method == "adamw" and job.decay == 0.2)
    del finished[job]
    row = summary.collect(finished)["lm", "adamw"]
    # The best decay is 0, which a climb reaches only after 0.2 has been tried.
    assert (row.tuned, row.settled, row.runs) == (plan.Tuned(4e-3, 0.05), False, {})
    job = Job("lm", "adamw", 4e-3, 0.05, 1, 800)
    finished[job] = record(job, (3.0, 2.15))
    row = summary.collect(finished)["lm", "adamw"]
    assert cells.final_text(row) == "2.1500 (1) †"


def test_one_rate_for_all():
    assert (
        summary.common_rate(finish("adamw", 800, lambda job: job.rate), "adamw") is None
    )
    best = {"lm": 4e-3, "vit": 1.6e-2}
    loss = lambda job: 2.0 + abs(math.log2(job.rate / best[job.workload]))  # noqa: E731
    runs = finish("adamw", 800, loss)
    runs = finish("adamw", 800, loss, runs, "vit")
    found = summary.common_rate(runs, "adamw")
    # In the middle: a factor of two from the best of either, so 3 in place of 2.
    assert found == summary.Common(8e-3, {"lm": 0.5, "vit": 0.5})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ((1.23456, 0.0123, 3), "1.235 ± 0.012 (3)"),
        ((1.23456, math.nan, 1), "1.2346 (1)"),
        ((math.inf, math.nan, 3), "diverged (3)"),
        ((12.3456, 2.0, 3), "12.3 ± 2.0 (3)"),
        ((4.0469e11, 1.5e11, 3), "4.0e+11 ± 1.5e+11 (3)"),
    ],
)
def test_an_error_has_two_figures(value, text):
    assert cells.text(summary.Estimate(*value)) == text


def test_the_page_is_filled_from_the_files(finished, tmp_path):
    page = (DOCS / "results.md").read_text()
    seconds = {"lm": {"adamw": [1.0, 1.5], "sf_normuon": [2.0, 3.0]}}
    filled = report.filled(page, finished, seconds)
    assert "| AdamW, cosine | 2.300 ± 0.071 (5) | not run yet |" in filled
    # Three quarters of the steps, each of which takes twice the time.
    assert "| SF-NorMuon, no rule | bytes | 0.75 (0.75 to 0.75) | 1.50 |" in filled
    assert "`--only full`" in filled
    # Filling it again changes nothing, and no block is left empty.
    assert report.filled(filled, finished, seconds) == filled
    assert "-->\n<!-- end" not in filled
    with pytest.raises(ValueError, match="no block 'loses'"):
        report.filled("<!-- study: loses -->\n<!-- end -->", {})


@pytest.mark.parametrize("name", report.PAGES)
def test_the_page_is_what_its_files_say(name):
    page = (DOCS.parent / name).read_text()
    assert "<!-- study: " in page or "<!-- = " in page
    files = records.read_all(run.RESULTS), times.read(run.RESULTS)
    assert report.filled(page, *files) == page


def test_figures_in_a_sentence(finished):
    runs = finish(BASE, 800, lambda job: 1.5 + 0.1 * job.seed, finished)
    runs = finish("full", 800, lambda job: 1.2, runs)
    # AdamW's longer runs are none that others of the usual length gain over.
    runs = finish("adamw_rest", 800, lambda job: 2.4, runs)
    runs = finish("adamw_rest_x3", 800, lambda job: 1.3, runs)
    rows = summary.collect(runs)
    page = "by <!-- = less lm sf_normuon -->?<!-- / --> and <!-- = final lm full -->?"
    expected = "by <!-- = less lm sf_normuon -->+0.4000 ± 0.0000 (3)<!-- / --> and "
    expected += "<!-- = final lm full -->1.2000 ± 0.0000 (3)<!-- / -->"
    assert inline.filled(page + "<!-- / -->", rows, {}) == expected
    assert inline.filled(expected, rows, {}) == expected
    # SF-NorMuon takes twice AdamW's time, and three quarters of its steps.
    seconds = {"lm": {"adamw": [1.0, 1.5], "sf_normuon": [2.0, 3.0]}}
    assert inline.cost(seconds, "lm", "sf_normuon") == "2.00"
    assert inline.cost(seconds, "vit", "sf_normuon") == "not run yet"
    cost = "of <!-- = cost lm sf_normuon -->2.00<!-- / -->"
    assert inline.filled(cost.replace("2.00", ""), rows, seconds) == cost
    assert inline.share(rows, "lm", "sf_normuon") == "0.75 (0.75 to 0.75)"
    # AdamW ends at 2.3 over five seeds: from there to 1.7 of the way to 1.2.
    assert inline.gain(rows, "lm", BASE, "full") == "55 %"
    assert inline.judged(rows, "lm", "sf_normuon", "frechet_distance").startswith("2.0")
    assert inline.factors(rows, "lm", "sf_normuon") == "1.0 to 1.0"
    for figure in ("less", "final", "share"):
        assert inline.FIGURES[figure](rows, "vit", "adamw") == "not run yet"
    with pytest.raises(ValueError, match="no figure 'lesser'"):
        inline.filled("by <!-- = lesser --><!-- / -->", rows, {})
    with pytest.raises(ValueError, match="ends a paragraph"):
        inline.filled("by\n<!-- = less lm full --><!-- / -->", rows, {})


def test_the_recipe_beside_the_better_adamw(finished):
    runs = finish("adamw_rest", 800, lambda job: 1.5, finished)
    runs = finish(RECIPE, 800, lambda job: 1.0, runs)
    # AdamW's step and the recipe's, of two rounds.
    seconds = {"lm": {"adamw": [2.0, 4.0], RECIPE: [3.0, 8.0]}}
    lines = report.recipe(summary.collect(runs), seconds).splitlines()
    # From 5 to 1 in the last half of the steps it passes 1.5 at seven eighths of that.
    assert lines[2] == (
        "| bytes | 1.5000 ± 0.0000 (3) | not run yet | 1.0000 ± 0.0000 (3) "
        "| 0.94 (0.94 to 0.94) | 1.64 |"
    )
    assert lines[3].count("not run yet") == 5


def test_steps_are_timed_in_turns(tmp_path, capsys):
    only = ("adamw", RECIPE)
    found = times.measure(["lm"], only, rounds=2, steps=1, progress=print)
    assert capsys.readouterr().out.splitlines()[-1] == "lm: round 2 of 2"
    assert {name: len(one) for name, one in found["lm"].items()} == {
        "adamw": 2,
        RECIPE: 2,
    }
    assert min(min(one) for one in found["lm"].values()) > 0
    assert times.read(tmp_path) == {}
    times.write(tmp_path, {"lm": {"adamw": [2.0, 4.0, 5.0], RECIPE: [3.0, 8.0, 5.0]}})
    seconds = times.read(tmp_path)
    assert times.ratio(seconds, "lm", RECIPE) == (1.5, 1.25, 1.75)
    assert times.ratio(seconds, "lm", "muon") is None
    assert times.ratio(seconds, "vit", RECIPE) is None
    (line,) = report.step_times(seconds).splitlines()[2:]
    assert line.startswith("| bytes | not run yet | 1.50 (1.25 to 1.75) |")
    # They aren't taken for runs.
    assert records.read_all(tmp_path) == {}


def test_the_plots_draw(finished, tmp_path):
    plots.factors(finished, tmp_path / "empty.png")
    assert not (tmp_path / "empty.png").exists()
    for job in list(finished):
        if job.method == "sf_normuon":
            done = finished[job]._replace(job=job._replace(method="ratio"))
            finished[done.job] = done
    finish(RECIPE, 800, lambda job: 1.0, finished)
    plots.shares(finished, tmp_path / "one_length.png")
    assert not (tmp_path / "one_length.png").exists()
    finished = finish("adamw_rest", 800, lambda job: 1.5, finished)
    finished = finish("adamw_rest_x3", 800, lambda job: 1.2, finished)
    finished = finish("sf_normuon_x3", 800, lambda job: 1.0, finished)
    for draw in (
        *(plots.curves, plots.rates),
        *(plots.factors, plots.shares),
    ):
        draw(finished, tmp_path / f"{draw.__name__}.png")
        assert (tmp_path / f"{draw.__name__}.png").stat().st_size > 5000
