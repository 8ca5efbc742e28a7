"""The main job, in tiny settings: its outputs, resuming, and every refusal."""

import contextlib
import csv
import dataclasses
import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import train_dit
from benchmarks import compare_optimizers
from dit_training import (
    autoencoder,
    checkpoints,
    data,
    folders,
    optimizers,
    quality,
    report,
    sampling,
    training,
)
from dit_training.errors import RunError
from PIL import Image

import fusionopt_jax as fo
from fusionopt_jax import dit
from fusionopt_jax.dit import latents
from tests import _compare
from tests.examples._autoencoders import write_autoencoder, write_pictures

TINY = [
    *("--hidden-size", "32", "--depth", "1", "--num-heads", "4", "--batch-size", "8"),
    *("--steps", "6", "--eval-every", "2", "--sampling-steps", "2"),
    *("--generated", "12"),
]
PROMISED = [
    "optimizer",
    "steps",
    "validation_loss",
    "label_accuracy",
    "frechet_distance",
    "cached_seconds",
    "uncached_seconds",
    "max_cache_difference",
]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Sixty images of 4x4 pixels in three classes, each with its own brightness."""
    labels = np.arange(60) % 3
    noise = np.random.default_rng(0).normal(size=(60, 4, 4))
    path = tmp_path_factory.mktemp("data") / "images.npz"
    np.savez(path, images=labels[:, None, None] + 0.1 * noise, labels=labels)
    return path


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """A run of the default optimizer that nothing disturbed."""
    folder = tmp_path_factory.mktemp("finished")
    assert train_dit.main([*TINY, "--data", str(images), "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def without_sampling(monkeypatch):
    """Leave out what follows the training, for tests of the training."""
    monkeypatch.setattr(
        sampling, "measure", lambda *_, **__: {"max_cache_difference": 0.0}
    )
    monkeypatch.setattr(train_dit, "summary_text", lambda *_: "")


def run(images, folder, *arguments):
    """The job on the tiny images; later arguments win."""
    return train_dit.main(
        [*TINY, "--data", str(images), "--out", str(folder), *arguments]
    )


def saved_state(folder):
    """The newest checkpoint of a run, read without the script's own code."""
    items = {name: ocp.args.StandardRestore() for name in ("params", "opt_state")}
    with (
        ocp.CheckpointManager((folder / "checkpoints").resolve()) as manager,
        jax.default_device(jax.devices()[0]),
    ):
        step = manager.latest_step()
        restored = manager.restore(step, args=ocp.args.Composite(**items))
    return step, {name: restored[name] for name in items}


def rows(folder):
    """metrics.csv without the column that no two runs share."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{**line, "seconds": None} for line in csv.DictReader(file)]


def error_line(capsys):
    """What was printed as the error, which must be a single line."""
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if "error:" in line]
    assert len(errors) == 1
    assert not any("Traceback" in line for line in lines)
    return errors[0]


def test_a_run_leaves_everything_it_promises(finished):
    assert {"config.json", "loss.png", "samples.png", "checkpoints"} <= {
        entry.name for entry in finished.iterdir()
    }
    summary = json.loads((finished / "summary.json").read_text())
    assert list(summary)[: len(PROMISED)] == PROMISED
    assert summary["optimizer"] == "fusion"
    assert summary["steps"] == 6
    assert np.isfinite([summary[name] for name in PROMISED[1:]]).all()
    # The bound that the issue sets on pixels in [-1, 1].
    assert summary["max_cache_difference"] <= 1e-5

    lines = rows(finished)
    assert [int(line["step"]) for line in lines] == [1, 2, 3, 4, 5, 6]
    measured = [int(line["step"]) for line in lines if line["validation_loss"]]
    assert measured == [2, 4, 6]
    assert float(lines[-1]["validation_loss"]) == pytest.approx(
        summary["validation_loss"], rel=1e-6
    )
    assert all(0.1 <= float(line["step_size"]) <= 10 for line in lines)

    config = json.loads((finished / "config.json").read_text())
    assert config["learning_rate"] == optimizers.LEARNING_RATES["fusion"]
    assert config["model"]["input_size"] == 4
    assert config["dataset"]["classes"] == ["0", "1", "2"]
    for picture in ("loss.png", "samples.png"):
        with Image.open(finished / picture) as opened:
            assert min(opened.size) > 100


def test_an_interrupted_and_resumed_run_ends_bit_for_bit_the_same(
    finished, images, tmp_path, monkeypatch, capsys, without_sampling
):
    add = report.MetricsFile.add

    def add_then_interrupt(metrics, new):
        add(metrics, new)
        if new and new[-1].step == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(report.MetricsFile, "add", add_then_interrupt)
    assert run(images, tmp_path) == 130
    assert "step 3 is saved, continue with --resume" in capsys.readouterr().err
    assert saved_state(tmp_path)[0] == 3

    # Only the folder is given: the settings come from its config.json.
    assert train_dit.main(["--out", str(tmp_path), "--resume"]) == 0
    step, state = saved_state(tmp_path)
    expected_step, expected = saved_state(finished)
    assert step == expected_step == 6
    chex.assert_trees_all_equal(state, expected)
    assert rows(tmp_path) == rows(finished)


def test_a_schedule_free_run_can_be_made_longer(
    finished, images, tmp_path, without_sampling
):
    assert run(images, tmp_path, "--steps", "2") == 0
    assert train_dit.main(["--out", str(tmp_path), "--resume", "--steps", "6"]) == 0
    chex.assert_trees_all_equal(saved_state(tmp_path)[1], saved_state(finished)[1])


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sf-adamw"])
def test_every_optimizer_trains(optimizer, images, tmp_path, without_sampling):
    assert run(images, tmp_path, "--optimizer", optimizer, "--steps", "4") == 0
    losses = [float(line["validation_loss"]) for line in rows(tmp_path)[1::2]]
    assert losses[-1] < losses[0]


def test_a_finite_schedule_can_not_be_made_longer(
    images, tmp_path, capsys, without_sampling
):
    assert run(images, tmp_path, "--optimizer", "adamw", "--steps", "4") == 0
    arguments = ["--out", str(tmp_path), "--resume", "--steps", "6"]
    assert train_dit.main(arguments) == 2
    assert "steps 4 -> 6" in error_line(capsys)


def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(
    images, tmp_path, capsys
):
    # The first step moves the weights by about 1e30 each: finite, but the loss of the
    # second is not. The schedule-free average then still takes the first.
    arguments = ("--optimizer", "sf-adamw", "--learning-rate", "1e30")
    assert run(images, tmp_path, *arguments, "--eval-every", "1") == 2
    message = error_line(capsys)
    step, state = saved_state(tmp_path)
    assert f"the last good checkpoint is {tmp_path / 'checkpoints' / str(step)}" in (
        message
    )
    assert "not finite at step" in message
    assert "--learning-rate" in message
    assert training.all_finite(state)
    assert not (tmp_path / "summary.json").exists()


def empty_config(folder):
    """What a full disk leaves of a file that is written in place."""
    (folder / "config.json").write_text("")


def flip_the_newest_weights(folder):
    """Damage every data file of the newest checkpoint's parameters."""
    step = saved_state(folder)[0]
    for path in (folder / "checkpoints" / str(step) / "params" / "d").iterdir():
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (empty_config, "config.json cannot be read"),
        (flip_the_newest_weights, "checkpoints/6 is damaged"),
    ],
)
def test_a_harmed_run_goes_on_and_says_so(
    harm, says, finished, tmp_path, capsys, without_sampling
):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    harm(folder)
    capsys.readouterr()
    assert train_dit.main(["--out", str(folder), "--resume"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if says in line]
    assert len(lines) == 1
    assert json.loads((folder / "config.json").read_text()) == json.loads(
        (finished / "config.json").read_text()
    )
    chex.assert_trees_all_equal(saved_state(folder)[1], saved_state(finished)[1])


@contextlib.contextmanager
def files_of_at_most(size):
    """Let writing fail past a size, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The signal would end the process.
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)


def test_a_full_disk_leaves_files_as_they_were(tmp_path):
    path = tmp_path / "config.json"
    folders.write_whole(path, "before")
    with (
        files_of_at_most(0),
        pytest.raises(RunError, match=r"config\.json cannot be written") as caught,
    ):
        folders.write_whole(path, "after")
    assert "as it was" in str(caught.value)
    assert path.read_text() == "before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.json"]


def test_a_disk_too_full_for_a_checkpoint_is_one_line(
    images, tmp_path, monkeypatch, capfd, without_sampling
):
    save = checkpoints.checkpoints.save

    def save_on_a_full_disk(manager, step, *arguments, **keywords):
        with files_of_at_most(2**30 if step == 2 else 2000):
            return save(manager, step, *arguments, **keywords)

    monkeypatch.setattr(checkpoints.checkpoints, "save", save_on_a_full_disk)
    assert run(images, tmp_path, "--steps", "4") == 2
    message = error_line(capfd)
    assert "the checkpoint of step 4 cannot be written" in message
    assert "make room, and go on with --resume" in message
    monkeypatch.undo()
    monkeypatch.setattr(
        sampling, "measure", lambda *_, **__: {"max_cache_difference": 0.0}
    )
    monkeypatch.setattr(train_dit, "summary_text", lambda *_: "")
    assert train_dit.main(["--out", str(tmp_path), "--resume"]) == 0
    assert saved_state(tmp_path)[0] == 4


def test_a_second_run_in_one_folder_is_refused(images, tmp_path, capsys):
    with folders.claimed(tmp_path):
        assert run(images, tmp_path) == 2
    assert "another run is writing to it" in error_line(capsys)
    assert [entry.name for entry in tmp_path.iterdir()] == ["lock"]


def test_a_killed_run_leaves_its_folder_free(tmp_path):
    program = (
        "import sys, time; from dit_training import folders\n"
        f"with folders.claimed(folders.Path({str(tmp_path)!r})):\n"
        "    print('claimed', flush=True); time.sleep(600)"
    )
    examples = Path(train_dit.__file__).parent
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=examples, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"claimed\n"
        with pytest.raises(RunError, match="another run"), folders.claimed(tmp_path):
            pass
        process.kill()
        process.wait()
        with folders.claimed(tmp_path):
            pass


def test_part_of_a_row_is_dropped_and_a_wrong_one_named(tmp_path):
    path = tmp_path / "metrics.csv"
    metrics = report.MetricsFile(path, 0)
    metrics.add([report.Row(step, 0.5, 1.0, None, 2.0) for step in (1, 2)])
    with path.open("a") as file:
        file.write("3,0.4")
    assert [row.step for row in report.read_metrics(path)] == [1, 2]
    path.write_text(path.read_text().replace("2,0.5", "2,half"))
    with pytest.raises(RunError, match=r"metrics\.csv, line 3"):
        report.read_metrics(path)


def test_another_config_is_refused_and_changes_nothing(finished, capsys):
    before = (finished / "config.json").read_text()
    arguments = ["--out", str(finished), "--resume", "--hidden-size", "64"]
    assert train_dit.main([*arguments, "--seed", "5"]) == 2
    message = error_line(capsys)
    assert "hidden_size 32 -> 64; seed 0 -> 5" in message
    assert (finished / "config.json").read_text() == before


def test_another_routing_is_refused(finished, monkeypatch, capsys):
    moved = fo.Routing(force_scalar=("attn/proj",), min_dim=16, stacked=("blocks",))
    monkeypatch.setattr(optimizers, "ROUTING", moved)
    assert train_dit.main(["--out", str(finished), "--resume"]) == 2
    assert "blocks/mlp/fc1/kernel" in error_line(capsys)


def test_a_finished_run_is_not_overwritten(finished, images, capsys):
    assert run(images, finished) == 2
    assert "--resume" in error_line(capsys)


def test_fewer_steps_than_were_made_are_refused(finished, capsys):
    assert train_dit.main(["--out", str(finished), "--resume", "--steps", "3"]) == 2
    assert "is at step 6 already" in error_line(capsys)


def test_resuming_nothing_is_refused(tmp_path, capsys):
    assert train_dit.main(["--out", str(tmp_path), "--resume"]) == 2
    assert "holds no checkpoint" in error_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--steps", "0"], "--steps: must be a whole number of at least 1, got '0'"),
        (["--learning-rate", "nan"], "--learning-rate: must be a finite number"),
        (["--optimizer", "sgd"], "invalid choice: 'sgd'"),
        (["--label-dropout", "0"], "add --guidance 1"),
        (["--patch-size", "3"], "of 8 pixels; give one of 1, 2, 4, 8"),
        (["--num-heads", "3"], "`num_heads` must divide `hidden_size`"),
        (["--data", "nowhere"], "--data nowhere: no such folder or .npz file"),
    ],
)
def test_bad_options_are_refused_in_one_line(arguments, expected, tmp_path, capsys):
    assert train_dit.main([*arguments, "--out", str(tmp_path / "run")]) == 2
    assert expected in error_line(capsys)
    assert not (tmp_path / "run").exists()


def test_help_is_no_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        train_dit.main(["--help"])
    assert stopped.value.code == 0
    assert "--resume" in capsys.readouterr().out


@pytest.fixture(scope="module")
def coder_folder(tmp_path_factory):
    return write_autoencoder(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures") / "pictures.npz")


@pytest.fixture(scope="module")
def in_latents(coder_folder, pictures, tmp_path_factory):
    """A run in latents, and what it showed: real images, then generated ones."""
    folder, shown = tmp_path_factory.mktemp("in_latents"), []
    plot = report.plot_samples

    def watch(*arguments):
        shown.extend(arguments[:2])
        plot(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "plot_samples", watch)
        assert run(pictures, folder, "--latents", str(coder_folder)) == 0
    return folder, shown


def test_it_trains_on_latents_and_shows_images(in_latents, coder_folder, pictures):
    folder, (real, generated) = in_latents
    config = json.loads((folder / "config.json").read_text())
    assert config["model"]["input_size"] == 4
    assert config["model"]["in_channels"] == 1
    assert config["autoencoder"]["scaling_factor"] == 0.18215
    assert (folder / "samples.png").exists()
    summary = json.loads((folder / "summary.json").read_text())
    assert np.isfinite(summary["frechet_distance"])

    pixels = data.load(str(pictures))
    model = latents.from_diffusers(coder_folder)
    count = len(pixels.held_out_images)
    # In calls of the sizes that the job has, whose programs are compiled.
    batch = np.resize(pixels.held_out_images, (autoencoder.ENCODED, 8, 8, 3))
    wanted = latents.encode(*model, batch)
    with np.load(folder / "latents.npz") as kept:
        np.testing.assert_array_equal(kept["held_out"], wanted[:count])
        assert kept["train"].shape == (60 - count, 4, 4, 1)
    first = latents.decode(*model, wanted[: autoencoder.DECODED])[0]
    # Its neighbours in the call are others, which nothing may depend on.
    _compare.assert_within(real[0, pixels.held_out_labels[0]], first, 1e-6)
    assert real.shape == generated.shape == (4, 3, 8, 8, 3)


def test_it_goes_on_without_encoding_again(
    in_latents, tmp_path, monkeypatch, without_sampling
):
    folder = shutil.copytree(in_latents[0], tmp_path / "run")
    monkeypatch.delattr(autoencoder.Autoencoder, "encode")
    assert train_dit.main(["--resume", "--out", str(folder), "--steps", "7"]) == 0


def test_what_is_kept_is_of_this_data_and_this_autoencoder(in_latents, capsys):
    path = in_latents[0] / "latents.npz"
    with np.load(path) as file:
        key = str(file["key"])
    assert autoencoder.read_latents(path, key) is not None
    assert autoencoder.read_latents(path, key + "0") is None
    assert autoencoder.read_latents(path.with_name("none.npz"), key) is None
    assert capsys.readouterr().err == ""
    assert autoencoder.read_latents(path.with_name("config.json"), key) is None
    assert "config.json cannot be read" in capsys.readouterr().err


def test_another_autoencoder_is_refused(in_latents, tmp_path, capsys):
    other = write_autoencoder(tmp_path, seed=2)
    before = (in_latents[0] / "latents.npz").read_bytes()
    arguments = ["--resume", "--out", str(in_latents[0]), "--latents", str(other)]
    assert train_dit.main(arguments) == 2
    assert "comes from another config: autoencoder.digest" in error_line(capsys)
    assert (in_latents[0] / "latents.npz").read_bytes() == before


def test_an_autoencoder_that_moved_is_the_same(in_latents, coder_folder, tmp_path):
    moved = autoencoder.load(str(shutil.copytree(coder_folder, tmp_path / "moved")))
    config = json.loads((in_latents[0] / "config.json").read_text())
    assert moved.about() == config["autoencoder"]


def test_the_comparison_finds_when_fusion_is_as_good(
    images, tmp_path, monkeypatch, capsys
):
    arguments = [
        *("--data", str(images), "--out", str(tmp_path), "--seeds", "0", "1"),
        *("--steps", "4", "--eval-every", "2", "--batch-size", "8", "--depth", "1"),
        *("--hidden-size", "32", "--adamw-learning-rates", "1e-3", "2e-3"),
    ]
    status = compare_optimizers.main(arguments)
    results = json.loads((tmp_path / "results.json").read_text())
    assert (tmp_path / "curves.png").exists()
    assert len(results["runs"]) == 2 * (2 + 1)
    ratios = []
    for row in results["seeds"]:
        runs = [run for run in results["runs"] if run["seed"] == row["seed"]]
        points = [
            (loss, step)
            for run in runs
            if run["optimizer"] == "adamw"
            for step, loss in run["curve"]
        ]
        best = min(points)
        assert (row["adamw_best_loss"], row["adamw_steps"]) == best
        fusion = next(run for run in runs if run["optimizer"] == "fusion")
        good = [step for step, loss in fusion["curve"] if loss <= best[0]]
        assert row["fusion_steps"] == (good[0] if good else None)
        # It stops as soon as it is good enough.
        assert fusion["curve"][-1][0] == (good[0] if good else 4)
        ratios.append(good[0] / best[1] if good else np.inf)
    assert status == (0 if np.median(ratios) <= 0.7 else 1)

    # A repeated call trains nothing that is there already.
    monkeypatch.delattr(compare_optimizers.Bench, "run")
    assert compare_optimizers.main(arguments) == status
    assert json.loads((tmp_path / "results.json").read_text()) == results
    capsys.readouterr()
    assert compare_optimizers.main([*arguments, "--steps", "5"]) == 2
    assert "other settings" in error_line(capsys)


def write_images(folder: Path, sizes: dict[str, tuple[int, int]], mode="L"):
    """Save a black image of each size under its name."""
    for name, size in sizes.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size).save(path)


def test_a_folder_of_classes_is_read_in_alphabetical_order(tmp_path):
    for place in range(5):
        for name, shade in (("cat", 0), ("dog", 255)):
            path = tmp_path / name / f"{place}.png"
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (6, 6), (shade, 0, 0)).save(path)
    found = data.load(str(tmp_path))
    assert found.class_names == ("cat", "dog")
    assert found.train_images.shape == (8, 6, 6, 3)
    red = found.train_images[:, 0, 0, 0]
    np.testing.assert_array_equal(red, np.where(found.train_labels == 0, -1, 1))
    np.testing.assert_array_equal(np.bincount(found.held_out_labels), [1, 1])


def test_bad_folders_are_refused(tmp_path):
    with pytest.raises(RunError, match="no images in it"):
        data.load(str(tmp_path))

    write_images(tmp_path, {"a/1.png": (4, 4), "b/1.png": (4, 6)})
    with pytest.raises(RunError, match=r"mixed sizes.*4x4.*4x6.*resize"):
        data.load(str(tmp_path))

    (tmp_path / "b" / "1.png").write_bytes(b"not an image")
    with pytest.raises(RunError, match=r"1\.png cannot be read as an image"):
        data.load(str(tmp_path))

    (tmp_path / "b" / "1.png").unlink()
    with pytest.raises(RunError, match="class folder 'b' holds no images"):
        data.load(str(tmp_path))

    write_images(tmp_path, {"b/1.png": (4, 4)})
    with pytest.raises(RunError, match="2 images are too few for 2 classes"):
        data.load(str(tmp_path))

    write_images(
        tmp_path, {f"{name}/{n}.png": (4, 6) for name in "ab" for n in range(1, 4)}
    )
    with pytest.raises(RunError, match="4x6 pixels are not square"):
        data.load(str(tmp_path))


def test_an_unreadable_folder_is_refused(tmp_path, monkeypatch):
    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(RunError, match=r"Permission denied.*check its permissions"):
        data.load(str(tmp_path))


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"images": np.zeros((4, 2, 2))}, "no array `labels`"),
        ({"images": np.zeros((4, 2)), "labels": [0, 1, 0, 1]}, r"\[N, H, W\]"),
        ({"images": np.zeros((0, 2, 2)), "labels": np.zeros(0, int)}, "no images"),
        ({"images": np.zeros((4, 2, 2)), "labels": [0, 1, 0]}, "one integer per"),
        ({"images": np.zeros((4, 2, 2)), "labels": [0.0, 1, 0, 1]}, "one integer per"),
        ({"images": np.zeros((4, 2, 2)), "labels": [0, -1, 0, 1]}, "found -1"),
        ({"images": np.zeros((4, 2, 2)), "labels": [0, 7, 0, 7]}, "no image has label"),
        ({"images": np.zeros((4, 2, 2)), "labels": [0, 1, 0, 1]}, "every pixel"),
        ({"images": np.full((4, 2, 2), np.nan), "labels": [0, 1, 0, 1]}, "NaN"),
        ({"images": np.eye(4).reshape(4, 2, 2), "labels": [0] * 4}, "only one class"),
    ],
)
def test_bad_arrays_are_refused(arrays, expected, tmp_path):
    path = tmp_path / "images.npz"
    np.savez(path, **arrays)
    with pytest.raises(RunError, match=expected):
        data.load(str(path))


def test_a_broken_npz_is_refused(tmp_path):
    path = tmp_path / "images.npz"
    path.write_bytes(b"PK but no archive")
    with pytest.raises(RunError, match=r"cannot be read as an \.npz file"):
        data.load(str(path))


def test_the_digits_are_split_once_and_for_all():
    digits = data.load("digits")
    assert digits.train_images.shape == (1397, 8, 8, 1)
    assert len(digits.held_out_images) == 400
    assert digits.train_images.min() == -1
    assert digits.train_images.max() == 1
    # 400 of 1797 in proportion: the ten classes have 174 to 183 images each.
    assert set(np.bincount(digits.held_out_labels)) <= {38, 39, 40, 41}
    assert data.load("digits").digest == digits.digest


def identity_judge(real):
    """A judge whose features are the pixels themselves, which must not be negative."""
    pixels = real.reshape(len(real), -1)
    return quality.Judge(
        None, np.eye(64), np.zeros(64), pixels.mean(0), np.cov(pixels, rowvar=False)
    )


def test_frechet_distance_of_gaussians_in_closed_form():
    rng = np.random.default_rng(0)
    real = rng.uniform(1, 2, size=(300, 8, 8, 1))
    judge = identity_judge(real)
    # The ridge of 1e-6 enters the root but not the trace: 64 features x 2 x 1e-6.
    assert quality.frechet_distance(judge, real) == pytest.approx(0, abs=2e-4)
    # A shift by 0.5 in each of 64 features.
    assert quality.frechet_distance(judge, real + 0.5) == pytest.approx(16, abs=2e-4)
    # Twice the spread around one mean: tr(C + 4C - 2 * 2C) = tr(C).
    spread = 2 * real - real.mean(0)
    assert quality.frechet_distance(judge, spread + 3) == pytest.approx(
        np.trace(judge.covariance) + 9 * 64, rel=1e-5
    )


def test_class_means_get_every_label_right_but_are_far_away():
    digits = data.load("digits")
    judge = quality.fit_judge(digits)
    labels = np.arange(500) % 10
    means = np.stack(
        [digits.train_images[digits.train_labels == n].mean(0) for n in range(10)]
    )[labels]
    assert quality.label_accuracy(judge, means, labels) == 1
    # Why there are two figures: the gate of 2 lies between what real images score and
    # what images without variety do.
    assert quality.frechet_distance(judge, means) > 5
    assert quality.frechet_distance(judge, digits.train_images) < 1


def test_every_epoch_is_a_permutation_of_its_own():
    key = jax.random.key(0)
    epochs = [
        np.concatenate(
            [
                training.batch_rows(key, jnp.int32(5 * epoch + place), 20, 4)
                for place in range(5)
            ]
        )
        for epoch in range(2)
    ]
    for rows_of_epoch in epochs:
        np.testing.assert_array_equal(np.sort(rows_of_epoch), np.arange(20))
    assert (epochs[0] != epochs[1]).any()
    # A batch larger than the set takes images more than once.
    few = training.batch_rows(key, jnp.int32(3), 3, 7)
    assert sorted(np.bincount(few)) == [2, 2, 3]


def test_the_routing_cuts_fused_kernels_and_spares_the_ends():
    config = dit.DiTConfig(
        input_size=8,
        in_channels=1,
        hidden_size=128,
        depth=2,
        num_heads=4,
        num_classes=200,
        learn_sigma=False,
    )
    params = jax.eval_shape(lambda: dit.init_params(config, 0))
    matrices = {
        route.path: (route.view.count, route.view.stacks[0].matrix)
        for route in optimizers.ROUTING.routes(params)
        if route.label == "spectral"
    }
    assert matrices == {
        "blocks/attn/qkv/kernel": (2 * 3, (128, 128)),
        "blocks/attn/proj/kernel": (2, (128, 128)),
        "blocks/mlp/fc1/kernel": (2, (128, 512)),
        "blocks/mlp/fc2/kernel": (2, (512, 128)),
        "blocks/adaLN_modulation/kernel": (2 * 6, (128, 128)),
        "final_layer/adaLN_modulation/kernel": (2, (128, 128)),
        "t_embedder/fc2/kernel": (1, (128, 128)),
    }


def test_a_run_from_before_a_model_setting_existed_can_be_resumed():
    wanted = {"optimizer": "muon", "model": dataclasses.asdict(dit.DiTConfig(depth=2))}
    saved = {**wanted, "model": dict(wanted["model"])}
    del saved["model"]["frequency_shift"]
    assert checkpoints.differences(saved, wanted) == []
    wanted["model"]["frequency_shift"] = 1
    assert checkpoints.differences(saved, wanted) == ["model.frequency_shift 0 -> 1"]
