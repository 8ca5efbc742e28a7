"""The command line, through its own entry point and once as a process."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import numpy as np
import pytest

import fusionopt_jax
from fusionopt_jax import dit
from fusionopt_jax.dit import __main__ as command
from fusionopt_jax.dit import pictures
from fusionopt_jax.dit.commands import sample as sample_command

ROOT = pathlib.Path(__file__).parents[2]

CONFIG = dit.DiTConfig(
    input_size=4, hidden_size=32, depth=1, num_heads=2, num_classes=10
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small model in the published form."""
    params = jax.tree.map(lambda leaf: leaf + 0.02, dit.init_params(CONFIG))
    path = tmp_path_factory.mktemp("weights") / "small.npz"
    np.savez(path, **dit.to_pytorch(params, CONFIG))
    return path


def run(*arguments):
    return command.main([str(argument) for argument in arguments])


def sampled(weights, path, *extra):
    """Images of a short run."""
    base = ["--num-heads", 2, "--labels", "3,7", "--steps", 3, "--out", path]
    assert run("sample", "--weights", weights, *base, *extra) == 0
    return np.load(path)


def test_sample_writes_what_the_library_samples(weights, tmp_path, capsys):
    images = sampled(weights, tmp_path / "a.npy", "--count", 2, "--cfg", 2)
    out = capsys.readouterr().out
    assert out.startswith("cache: 3 steps x 4 labels")
    assert "4 latents of shape 4x4x4" in out
    params, config = dit.from_pytorch(weights, num_heads=2)
    noise = jax.random.normal(jax.random.split(jax.random.key(0))[0], (4, 4, 4, 4))
    expected = dit.sample(
        params, config, None, noise, [3, 3, 7, 7], dit.Sampler.ddim("3"), 2.0
    )
    # With the cache here, without there.
    scale = np.abs(expected).max()
    np.testing.assert_allclose(images / scale, expected / scale, atol=1e-5)


@pytest.mark.parametrize(
    ("steps", "flag", "builds", "line"),
    [
        # The model is 32 wide: 33 rows break even, and a request has 4 labels.
        (8, (), 1, "cache: 8 steps x 4 labels take 0.031 MiB, no more than the 0.032"),
        (9, (), 0, "no cache: 9 steps x 4 labels take 0.0"),
        (9, ("--cache",), 1, "cache: asked for; 9 steps x 4 labels take 0.0"),
        (8, ("--no-cache",), 0, "no cache: asked for; 8 steps x 4 labels take 0.0"),
    ],
)
def test_a_cache_is_used_where_it_saves_memory_unless_told_otherwise(
    weights, tmp_path, capsys, monkeypatch, steps, flag, builds, line
):
    built = []

    def build(*arguments, **options):
        built.append(dit.build_cache(*arguments, **options))
        return built[-1]

    monkeypatch.setattr(sample_command, "build_cache", build)
    sampled(weights, tmp_path / "a.npy", "--steps", steps, *flag)
    assert len(built) == builds
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(line)
    assert said[0].endswith("MiB of modulators that they replace")
    assert len(said) == 2


@pytest.mark.parametrize(
    "extra",
    [
        ("--sampler", "ddpm", "--no-cache"),
        ("--sampler", "dpm", "--cfg-channels", "3"),
        ("--sampler", "euler", "--shift", "2", "--dtype", "bf16"),
    ],
    ids=lambda extra: extra[1],
)
def test_every_kind_of_sampler_runs(weights, tmp_path, extra):
    assert sampled(weights, tmp_path / "a.npy", *extra).shape == (2, 4, 4, 4)


def test_a_picture_of_latents_says_that_it_is_none(weights, tmp_path, capsys):
    path = tmp_path / "grid.png"
    assert run(
        *("sample", "--weights", weights, "--num-heads", 2, "--labels", "3,7"),
        *("--steps", 3, "--out", path),
    ) == 0  # fmt: skip
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "no pixels" in capsys.readouterr().out


def test_inspect_lists_parameters_and_cache(weights, capsys):
    assert run("inspect", "--weights", weights, "--num-heads", 2) == 0
    text = capsys.readouterr().out
    params = dit.from_pytorch(weights, num_heads=2)[0]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert f"{count:,} parameters" in text
    assert "blocks/adaLN_modulation/kernel" in text
    assert "50 steps x 2 labels" in text


def test_inspect_knows_the_published_sizes(capsys):
    assert run("inspect", "--model", "DiT-XL/2") == 0
    text = capsys.readouterr().out
    # The published count has the fixed position table, 256 x 1152, no parameter here.
    assert f"{675_129_632 - 256 * 1152:,} parameters" in text
    assert "modulators 861.4 MiB in fp32, 33% of the parameters" in text
    assert "74.7 MiB in fp32" in text
    # The first time kernel reads sines and cosines, no hidden features.
    routes = text.split("for training:")[1].splitlines()
    (time_kernel,) = [line for line in routes if line.startswith("t_embedder/fc1/k")]
    assert "scalar" in time_kernel
    # 28 layers of three and of six square kernels.
    assert "84 x (1152, 1152)" in text
    assert "168 x (1152, 1152)" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sample", "--labels", "3;7", "--out", "a.npy"], "commas"),
        (["sample", "--labels", "3", "--out", "a.jpg"], ".png or .npy"),
        (["sample", "--labels", "3", "--out", "none/a.npy"], "mkdir -p none"),
        (["sample", "--labels", "3", "--out", "a.npy", "--count", "0"], "--count"),
        (["sample", "--labels", "11", "--out", "a.npy"], "must lie in"),
        (["sample", "--labels", "3,", "--out", "a.npy"], "commas"),
        (["sample", "--labels", "tench", "--out", "a.npy"], "is not; give whole"),
        (["sample", "--labels", "9" * 10, "--out", "a.npy"], "no number of a class"),
        (["sample", "--labels", "3", "--out", "a.npy", "--columns", "2"], "1 images"),
        (["sample", "--labels", "3", "--out", "a.npy", "--columns", "0"], "--columns"),
        (["sample", "--labels", "3", "--out", "a.npy", "--steps", "x"], "--steps"),
        (
            ["sample", "--labels", "3", "--out", "a.npy", "--sampler", "dpm",
             "--steps", "ddim5"],
            "whole number",
        ),
        (
            ["sample", "--labels", "3", "--out", "a.npy", "--shift", "2"],
            "`--shift` has no effect on ddim",
        ),
        (["inspect", "--model", "DiT-XL/2"], "either"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    weights, arguments, words, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments, "--weights", weights, "--num-heads", 2) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_missing_weights_and_unknown_models_are_errors(capsys, tmp_path):
    missing = tmp_path / "none.npz"
    assert run("inspect", "--weights", missing) == 2
    assert str(missing) in capsys.readouterr().err
    assert run("inspect", "--model", "DiT-XL/3") == 2
    assert "DiT-XL/2" in capsys.readouterr().err


def test_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "fusionopt_jax.dit", "sample", "--help"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "--cfg" in done.stdout


def test_commands_on_pages_are_understood():
    found = []
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = page.read_text().replace("\\\n", " ")
        found += re.findall(r"^python -m fusionopt_jax\.dit (.*)$", text, re.MULTILINE)
    assert len(found) >= 5
    for line in found:
        command._parser().parse_args(shlex.split(line))


def test_without_flax_it_names_the_extra_in_one_line():
    script = (
        "import runpy, sys; sys.modules['flax'] = None; sys.argv = ['dit', '--help'];"
        "runpy._run_module_as_main('fusionopt_jax.dit', alter_argv=False)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert 'pip install "fusionopt-jax[dit]"' in done.stderr


def test_says_its_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        run("--version")
    assert capsys.readouterr().out == f"fusionopt_jax {fusionopt_jax.__version__}\n"


@pytest.mark.parametrize("out", ["none/a.npy", "none/a.png", "a.jpg"])
def test_a_wrong_target_is_an_error_before_sampling(
    weights, monkeypatch, tmp_path, out
):
    def sample(*arguments, **options):
        raise AssertionError("sampled")

    monkeypatch.setattr(sample_command, "sample", sample)
    base = ("sample", "--weights", weights, "--num-heads", 2, "--labels", 3)
    assert run(*base, "--out", tmp_path / out) == 2


def test_a_folder_without_permission_is_an_error(monkeypatch, tmp_path):
    # Asked of the system, since a superuser may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match=r"a\.npy"):
        pictures.check_target(tmp_path / "a.npy")


def test_grids_are_filled_column_by_column():
    images = np.linspace(-1, 1, 6, dtype=np.float32)[:, None, None, None]
    grid = pictures.picture_grid(np.tile(images, (1, 2, 2, 1)), columns=3)
    assert grid.shape == (5, 8, 3)
    assert grid[[0, 3]][:, [0, 3, 6], 0].T.ravel().tolist() == [
        0,
        51,
        102,
        153,
        204,
        255,
    ]
    assert (grid[2] == 255).all()


def test_numbers_that_are_none_are_not_written(tmp_path):
    images = np.full((1, 2, 2, 3), np.nan, np.float32)
    with pytest.raises(ValueError, match="NaN"):
        pictures.save_images(tmp_path / "a.png", images)
    assert not list(tmp_path.iterdir())


def test_a_png_without_pillow_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match="extra `dit`"):
        pictures.save_images(tmp_path / "a.png", np.zeros((1, 2, 2, 3), np.float32))
