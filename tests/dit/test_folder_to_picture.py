"""From folders and files of random weights to pictures, with one command, in JAX alone.

No test here can import PyTorch.
"""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from fusionopt_jax import dit
from fusionopt_jax.dit import __main__ as command
from fusionopt_jax.dit.commands import sample as sample_command
from tests.dit import _folders

NAMES = {"3": "tench, Tinca tinca", "7": "golden retriever"}

SIZE = _folders.TRANSFORMER["sample_size"]

STEPS = 3


@pytest.fixture(autouse=True)
def without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A whole pipeline with names of two classes."""
    folder = tmp_path_factory.mktemp("pipeline")
    index = {**_folders.INDEX, "id2label": NAMES}
    return _folders.write_pipeline(folder, index=index)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A checkpoint of the published form, as training leaves it."""
    config = dit.DiTConfig(
        input_size=SIZE, hidden_size=32, depth=1, num_heads=2, num_classes=10
    )
    params = jax.tree.map(lambda leaf: leaf + 0.02, dit.init_params(config))
    arrays = dit.to_pytorch(params, config)
    path = tmp_path_factory.mktemp("published") / "last.pt"
    _folders.write_bin(path, {"ema": arrays, "model": {}, "steps": 400_000})
    return path


def run(*arguments):
    return command.main([str(argument) for argument in arguments])


def sampled(*arguments):
    assert run("sample", "--steps", STEPS, *arguments) == 0


def expected_latents(params, config, labels, sampler, cfg_scale=4.0, step_cache=None):
    """What the library samples of the noise that the command draws."""
    noise_key, step_key = jax.random.split(jax.random.key(0))
    shape = (len(labels), config.input_size, config.input_size, config.in_channels)
    noise = jax.random.normal(noise_key, shape)
    # As the command does, so that without a cache it runs the same program.
    return dit.sample(
        *(params, config, None, noise, labels, sampler, cfg_scale),
        key=step_key,
        donate=True,
        step_cache=step_cache,
    )  # fmt: skip


@pytest.fixture(scope="module")
def latents(pipeline):
    """Of classes 7 and 3, by the functions that the command is made of."""
    params, config = dit.from_diffusers(pipeline)
    return expected_latents(params, config, [7, 3], dit.Sampler.ddim(STEPS))


@pytest.fixture(scope="module")
def pictures(pipeline, latents):
    """The latents, decoded."""
    decoder, config = dit.latents.from_diffusers(pipeline)
    return np.asarray(dit.latents.decode(decoder, config, latents))


def picture(path):
    """The bytes of a picture."""
    with Image.open(path) as image:
        return np.asarray(image)


def as_bytes(images):
    """Two images as a grid has them, with a white line between."""
    pixels = np.rint(255 * np.clip((images + 1) / 2, 0, 1)).astype(np.uint8)
    line = np.full((pixels.shape[1], 1, 3), 255, np.uint8)
    return np.concatenate([pixels[0], line, pixels[1]], axis=1)


def test_one_command_from_a_folder_to_a_picture(pipeline, pictures, tmp_path):
    path = tmp_path / "grid.png"
    script = (
        "import runpy, sys; sys.modules['torch'] = None;"
        "runpy._run_module_as_main('fusionopt_jax.dit', alter_argv=False)"
    )
    done = subprocess.run(
        [
            *(sys.executable, "-c", script, "sample", "--weights", pipeline),
            *("--labels", "Golden Retriever, 3", "--steps", str(STEPS)),
            *("--out", path),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "labels: 7 (golden retriever), 3 (tench, Tinca tinca)" in done.stdout
    assert f"decoder: {pipeline / 'vae'}, of the pipeline" in done.stdout
    assert "2 images of shape 8x8x3" in done.stdout
    grid = picture(path)
    # Another process may fuse its sums in another way, by far less than one of 255.
    assert grid.shape == (8, 17, 3)
    assert np.abs(grid.astype(int) - as_bytes(pictures)).max() <= 1
    # Not three copies of a grey picture.
    assert (grid[..., 0] != grid[..., 1]).mean() > 0.5


@pytest.mark.parametrize("form", ["bin", "sharded", "fp16"])
def test_every_form_of_a_folder_gives_the_same_picture(
    pipeline, pictures, tmp_path, form
):
    folder = _folders.write_pipeline(tmp_path / form, form=form)
    path = tmp_path / "images.npy"
    sampled("--weights", folder, "--labels", "7,3", "--out", path)
    # The command decodes image by image and uses a cache: another order of sums.
    np.testing.assert_allclose(np.load(path), pictures, atol=1e-4)


def test_a_transformer_alone_is_decoded_by_what_is_given(
    pipeline, pictures, tmp_path, capsys
):
    path = tmp_path / "images.npy"
    base = ("--weights", pipeline / "transformer", "--labels", "7,3", "--out", path)
    sampled(*base)
    assert (
        "latents of shape 4x4x4, no pictures; `--decoder` m" in capsys.readouterr().out
    )
    assert np.load(path).shape == (2, SIZE, SIZE, 4)
    sampled(*base, "--decoder", pipeline / "vae")
    assert f"decoder: {pipeline / 'vae'}, asked for" in capsys.readouterr().out
    np.testing.assert_allclose(np.load(path), pictures, atol=1e-4)


def test_pictures_are_decoded_in_tiles_and_in_half_precision(
    pipeline, latents, tmp_path
):
    path = tmp_path / "images.npy"
    base = ("--weights", pipeline, "--labels", "7,3", "--out", path)
    # Without a cache it runs the program that made the latents.
    sampled(*base, "--no-cache", "--tile", 2, "--decoder-dtype", "bf16")
    decoder, config = dit.latents.from_diffusers(pipeline)

    def decoded(**how):
        rows = [
            dit.latents.decode(decoder, config, row[None], **how) for row in latents
        ]
        return np.concatenate(rows)

    np.testing.assert_array_equal(np.load(path), decoded(tile=2, dtype=jnp.bfloat16))
    for other in ({"tile": 2}, {"dtype": jnp.bfloat16}):
        assert (decoded(**other) != np.load(path)).any()


def test_labels_are_compared_with_the_config_before_the_weights_are_read(
    tmp_path, monkeypatch, capsys
):
    folder = _folders.write_pipeline(tmp_path / "pipeline")
    cut(folder, "transformer")
    base = ("--weights", folder, "--out", tmp_path / "a.png")
    words = ("must lie in [0, 10] for num_classes=10",)
    refused(monkeypatch, capsys, words, *base, "--labels", "11")


def test_without_a_decoder_it_shows_latents_and_says_so(pipeline, tmp_path, capsys):
    path = tmp_path / "grid.png"
    sampled("--weights", pipeline, "--no-decoder", "--labels", "7,3", "--out", path)
    said = capsys.readouterr().out
    assert "the first three channels, stretched, which are no pixels; `--decod" in said
    # Four times as large, to be seen.
    assert picture(path).shape == (4 * SIZE, 4 * (2 * SIZE + 1), 3)


def test_frequency_shift_is_that_of_the_model(pipeline, latents, tmp_path):
    path = tmp_path / "latents.npy"
    base = ("--weights", pipeline, "--no-decoder", "--labels", "7,3", "--out", path)
    sampled(*base, "--no-cache", "--frequency-shift", 1)
    params, config = dit.from_diffusers(pipeline, frequency_shift=1)
    expected = expected_latents(params, config, [7, 3], dit.Sampler.ddim(STEPS))
    np.testing.assert_array_equal(np.load(path), expected)
    # The two conventions give different pictures; see the recordings of diffusers.
    assert np.abs(expected - latents).max() > 1e-2 * np.abs(latents).max()


@pytest.mark.parametrize(
    ("kind", "extra", "sampler"),
    [
        ("sit", (), dit.Sampler.euler(STEPS, convention="data_at_one")),
        (
            "sit",
            ("--sampler", "sit_sde", "--norm", 0.5),
            dit.Sampler.sit_sde(STEPS, norm=0.5, convention="data_at_one"),
        ),
        ("repa", ("--sampler", "heun"), dit.Sampler.heun(STEPS)),
        ("flow", ("--shift", 2), dit.Sampler.euler(STEPS, shift=2.0)),
    ],
    ids=["sit", "sit_sde", "repa", "flow"],
)
def test_a_kind_is_sampled_in_its_own_direction(
    published, tmp_path, kind, extra, sampler
):
    path = tmp_path / "latents.npy"
    base = ("--weights", published, "--num-heads", 2, "--labels", "7,3", "--out", path)
    sampled(*base, "--kind", kind, "--cfg-scale", 2, "--no-cache", *extra)
    read_as = "dit" if kind == "flow" else kind
    params, config = dit.from_pytorch(published, num_heads=2, kind=read_as)
    expected = expected_latents(params, config, [7, 3], sampler, 2.0)
    np.testing.assert_array_equal(np.load(path), expected)


@pytest.mark.filterwarnings("default:.*projectors")
def test_projectors_of_repa_are_left_out_and_said_so(published, tmp_path, capsys):
    arrays = {**dit.to_pytorch(*dit.from_pytorch(published, num_heads=2))}
    arrays["projectors.0.0.weight"] = np.zeros((8, 32), np.float32)
    path = tmp_path / "repa.safetensors"
    save_file(arrays, path)
    base = ("--num-heads", 2, "--labels", 7, "--out", tmp_path / "a.npy")
    sampled("--weights", path, "--kind", "repa", *base)
    said = capsys.readouterr().err
    assert said.startswith("warning: 1 arrays of REPA's projectors")
    assert said.count("\n") == 1
    assert run("sample", "--weights", path, *base) == 2
    assert "REPA" in capsys.readouterr().err


def test_steps_are_skipped_where_asked(published, tmp_path, capsys):
    path = tmp_path / "latents.npy"
    base = ("--weights", published, "--num-heads", 2, "--labels", "7,3", "--out", path)
    sampled(*base, "--kind", "flow", "--steps", 6, "--step-cache", 2, "--no-cache")
    assert "step cache: 4 of 6 steps compute" in capsys.readouterr().out
    params, config = dit.from_pytorch(published, num_heads=2)
    skipping = dit.StepCache.every(6, 2, order=1)
    sampler = dit.Sampler.euler(6)
    expected = expected_latents(params, config, [7, 3], sampler, step_cache=skipping)
    np.testing.assert_array_equal(np.load(path), expected)


def edited(folder, part, change):
    """Change what `config.json` of a part says."""
    path = folder / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def weights_of(folder, part):
    return folder / part / f"{_folders.FILE_NAME}.safetensors"


def cut(folder, part):
    path = weights_of(folder, part)
    path.write_bytes(path.read_bytes()[:-1000])


def renamed(folder):
    path = weights_of(folder, "transformer")
    path.rename(path.with_suffix(".bin"))


def half_downloaded(folder):
    path = weights_of(folder, "transformer")
    path.rename(path.with_name(f"{path.name}.incomplete"))


def lost_a_shard(folder):
    _folders.write_weights(
        folder / "transformer", _folders.transformer_arrays(), "sharded"
    )
    weights_of(folder, "transformer").unlink()
    next((folder / "transformer").glob("*-00002-of-*")).unlink()


def disagreeing(folder):
    path = weights_of(folder, "transformer")
    arrays = load_file(path)
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.weight"
    save_file({**arrays, name: arrays[name] + 0.5}, path)


def of_another_family(folder):
    edited(folder, "transformer", {"_class_name": "FluxTransformer2DModel"})


def of_other_channels(folder):
    vae = {**_folders.VAE, "latent_channels": 8}
    _folders.write_json(folder / "vae" / "config.json", vae)
    _folders.write_weights(folder / "vae", _folders.vae_arrays(vae))


def without_config(folder):
    (folder / "transformer" / "config.json").unlink()


def of_another_schedule(folder):
    scheduler = {**_folders.SCHEDULER, "prediction_type": "v_prediction"}
    _folders.write_json(folder / "scheduler" / "scheduler_config.json", scheduler)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: cut(folder, "transformer"), ("transformer", "again")),
        (lambda folder: cut(folder, "vae"), ("vae", "again")),
        (renamed, (".bin", "rename it to end in .safetensors")),
        (half_downloaded, (".incomplete", "fetch it to its end")),
        (lost_a_shard, ("00002-of-00002", "fetch")),
        (without_config, ("transformer", "config.json", "fetch it too")),
        (disagreeing, ("blocks.1.norm1.emb", "disagree")),
        (of_another_family, ("Flux",)),
        (of_other_channels, ("vae", "8 channels", "samples 4")),
        (of_another_schedule, ("scheduler_config.json", "v_prediction")),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_folder_that_can_not_be_used_is_an_error_of_one_line(
    tmp_path, monkeypatch, capsys, damage, words
):
    folder = _folders.write_pipeline(tmp_path / "pipeline")
    damage(folder)
    refused(
        monkeypatch, capsys, words, "--weights", folder, "--out", tmp_path / "a.png"
    )
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--decoder", "{tmp}/none"), ("none", "there is no")),
        (("--decoder", "{pipeline}/transformer"), ("AutoencoderKL",)),
        (("--decoder", "{pipeline}/model_index.json"), ("give the folder",)),
        (("--labels", "tensch"), ("tensch", "nearest names are: tench")),
        (("--labels", "11"), ("must lie in [0, 10]",)),
        (("--kind", "sit"), ("diffusers has no sit",)),
        (("--num-heads", "2"), ("--num-heads", "leave it out")),
        (("--entry", "ema"), ("--entry", "leave it out")),
        (("--sampler", "euler"), ("predicts 'epsilon'", "--sampler ddim")),
        (("--kind", "flow", "--sampler", "ddim"), ("use one of euler, heun, sit_sde",)),
        (("--kind", "dit", "--sampler", "heun"), ("use one of ddpm, ddim",)),
        (("--sampler", "sit_sde"), ("needs `--kind`",)),
        (("--norm", "2"), ("`--norm` has no effect on ddim",)),
        (("--cfg", "-1"), ("`--cfg` must lie in",)),
        (("--seed", "-1"), ("`--seed` must lie between",)),
        (("--seed", str(2**32)), ("`--seed` must lie between",)),
        (("--cfg", "1", "--cfg-channels", "3"), ("--cfg-channels", "leave it out")),
        (("--steps", "4", "--step-cache", "5"), ("--step-cache", "the 4 steps")),
        (("--steps", "2", "--step-cache", "2"), ("no effect on 2 steps",)),
        (("--steps", "0"), ("`--steps` must look like '250'",)),
        (("--steps", "2000"), ("`--steps` '2000' asks for",)),
        (("--eta", "2"), ("`--eta` must lie in",)),
        (("--tile", "5"), ("`--tile` must lie between 1 and 4",)),
        (("--tile", "2", "--no-decoder"), ("`--tile` has no effect without",)),
        (("--decoder-dtype", "bf16", "--no-decoder"), ("`--decoder-dtype` has no",)),
    ],
    ids=lambda value: " ".join(value),
)
def test_options_that_do_not_fit_are_an_error_of_one_line(
    pipeline, tmp_path, monkeypatch, capsys, arguments, words
):
    arguments = [part.format(tmp=tmp_path, pipeline=pipeline) for part in arguments]
    out = tmp_path / "a.png"
    refused(monkeypatch, capsys, words, "--weights", pipeline, "--out", out, *arguments)


def test_options_of_folders_have_no_effect_on_files(
    published, tmp_path, monkeypatch, capsys
):
    words = ("--frequency-shift", "leave it out")
    base = ("--weights", published, "--out", tmp_path / "a.npy")
    refused(monkeypatch, capsys, words, *base, "--frequency-shift", 0)


def refused(monkeypatch, capsys, words, *arguments):
    """Require one line with these words, and nothing sampled."""

    def sample(*arguments, **options):
        raise AssertionError("sampled")

    monkeypatch.setattr(sample_command, "sample", sample)
    labels = () if "--labels" in arguments else ("--labels", "3,7")
    assert run("sample", *labels, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (KeyboardInterrupt, 130, "stopped, and nothing was written"),
        (OSError("no space left"), 1, "error: no space left"),
    ],
)
def test_what_fails_later_has_another_code(
    published, tmp_path, monkeypatch, capsys, raised, code, words
):
    def sample(*arguments, **options):
        raise raised

    monkeypatch.setattr(sample_command, "sample", sample)
    base = ("--weights", published, "--num-heads", 2, "--labels", 3)
    out = ("--sampler", "euler", "--out", tmp_path / "a.npy")
    assert run("sample", *base, *out) == code
    said = capsys.readouterr()
    assert said.err == f"{words}\n"
    # What was not given, and what was taken for it.
    assert said.out.startswith("kind: flow, a DiT trained with rectified_flow_loss; ")


def test_a_model_without_null_label_is_not_guided(
    published, tmp_path, monkeypatch, capsys
):
    read = dit.from_pytorch(published, num_heads=2, has_null_label=False)
    monkeypatch.setattr(sample_command, "read_model", lambda *_: read)
    words = ("no null label", "--cfg 1")
    refused(
        *(monkeypatch, capsys, words, "--weights", published),
        *("--out", tmp_path / "a.npy"),
    )  # fmt: skip


class TestInspect:
    def test_a_pipeline(self, pipeline, capsys):
        assert run("inspect", "--weights", pipeline) == 0
        text = capsys.readouterr().out
        assert f"{pipeline}: a folder of diffusers, DiTPipeline" in text
        assert "model_index.json names 2 classes" in text
        assert "transformer/diffusion_pytorch_model.safetensors: 0.2" in text
        assert "num_heads=2, " in text
        assert "norm_eps=1e-05" in text
        arrays = _folders.vae_arrays().values()
        count = sum(array.size for array in arrays)
        assert f"encoder and decoder, {count:,} parameters" in text
        assert "scaling_factor=0.18215" in text

    def test_a_decoder(self, pipeline, capsys):
        assert run("inspect", "--weights", pipeline / "vae") == 0
        text = capsys.readouterr().out
        assert "a folder of diffusers, AutoencoderKL" in text
        assert "block_out_channels=(8, 16)" in text
        assert "blocks/" not in text

    def test_a_file(self, published, capsys):
        assert run("inspect", "--weights", published, "--num-heads", 2) == 0
        text = capsys.readouterr().out
        assert f"{published}: a file of 0.1" in text
        assert "DiTConfig(input_size=4" in text

    def test_nothing(self, tmp_path, capsys):
        assert run("inspect", "--weights", pathlib.Path(tmp_path) / "none") == 2
        assert "there is no file or folder" in capsys.readouterr().err
