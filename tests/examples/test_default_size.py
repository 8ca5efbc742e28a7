"""The main job at its default size: a model of the tests' size has no matrices."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_dit
from dit_training import data, folders, optimizers, options, quality, training
from PIL import Image

SHORT = (
    *("--steps", "2", "--eval-every", "2"),
    *("--sampling-steps", "2", "--generated", "10"),
)
RUNS = {
    "fusion": (),
    "adamw": ("--optimizer", "adamw"),
    "muon": ("--optimizer", "muon"),
    "sf-adamw": ("--optimizer", "sf-adamw"),
    "npz": ("--data", "images.npz", "--seed", "1"),
    "folder": ("--data", "images", "--learning-rate", "1e-3"),
    "no guidance": ("--label-dropout", "0", "--guidance", "1"),
    "other model": (
        *("--hidden-size", "160", "--depth", "1", "--num-heads", "8"),
        *("--patch-size", "4", "--batch-size", "32"),
    ),
}
"""What each run is given beside `SHORT`, `--out` and, at its end, `--resume`."""


@pytest.mark.parametrize("optimizer", optimizers.NAMES)
def test_every_optimizer_can_take_a_step_at_the_default_size(optimizer):
    settings = options.Settings()
    digits = data.load(settings.data)
    model = options.model_config(settings, digits)
    step = training.make_train_step(model, optimizer, 2, settings.batch_size)
    # Traced, not compiled: what fails at this size fails while it is traced.
    state = jax.eval_shape(lambda: training.init_state(model, optimizer, 0))
    new, loss, _ = jax.eval_shape(
        step,
        state,
        jnp.asarray(digits.train_images),
        jnp.asarray(digits.train_labels),
        jnp.int32(0),
        jnp.float32(1e-3),
    )
    assert loss.shape == ()
    assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)


def test_every_option_has_a_run():
    given = {text for run in (SHORT, *RUNS.values()) for text in run}
    known = set(re.findall(r"--[a-z-]+", options.command_line().format_help()))
    # Each has tests of its own in `test_train_dit` or `test_processes`.
    elsewhere = {"--help", "--latents", "--out", "--resume"}
    elsewhere |= {"--mesh", "--processes", "--process-id", "--coordinator"}
    assert {text for text in given if text.startswith("--")} == known - elsewhere
    assert {*optimizers.NAMES} <= {"fusion", *given}


@pytest.fixture(scope="module")
def judges():
    """One judge for each set of images: fitting it takes longer than two steps."""
    with pytest.MonkeyPatch.context() as patch:
        fit, known = quality.fit_judge, {}
        patch.setattr(
            quality,
            "fit_judge",
            lambda images: (
                known.get(images.digest) or known.setdefault(images.digest, fit(images))
            ),
        )
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Fifty of the digits, as an .npz file and as folders of classes."""
    folder = tmp_path_factory.mktemp("data")
    digits = data.load("digits")
    chosen = np.concatenate(
        [np.flatnonzero(digits.train_labels == label)[:5] for label in range(10)]
    )
    pixels = ((digits.train_images[chosen, ..., 0] + 1) * 127.5).astype(np.uint8)
    labels = digits.train_labels[chosen]
    np.savez(folder / "images.npz", images=pixels, labels=labels)
    for number, (picture, label) in enumerate(zip(pixels, labels, strict=True)):
        path = folder / "images" / str(label) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    return folder


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", RUNS)
def test_two_steps_with_every_option(
    name, images, judges, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(images)
    out = ("--out", str(tmp_path / "run"))
    assert train_dit.main([*SHORT, *RUNS[name], *out]) == 0, capsys.readouterr().err
    # Two steps again, of a schedule that is as long, or of one that has no end.
    longer = () if name in optimizers.NEEDS_HORIZON else ("--steps", "4")
    assert train_dit.main([*out, "--resume", *longer]) == 0, capsys.readouterr().err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == (4 if longer else 2)
    figures = [value for value in summary.values() if isinstance(value, float)]
    assert np.isfinite(figures).all()


@pytest.mark.exhaustive
def test_without_a_folder(judges, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert train_dit.main([*SHORT]) == 0, capsys.readouterr().err
    assert sorted(path.name for path in folders.RUNS.iterdir()) == [
        "dit-fusion",
        "dit-fusion-2",
    ]
    assert train_dit.main(["--resume", "--steps", "3"]) == 0, capsys.readouterr().err
    newest = json.loads((folders.RUNS / "dit-fusion-2" / "summary.json").read_text())
    assert newest["steps"] == 3
