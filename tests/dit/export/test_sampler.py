"""Exported samplers: the same images, in a process that lacks this library."""

import dataclasses
import functools
import json
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionopt_jax import dit
from fusionopt_jax.dit.cache.fingerprint import weight_digests
from fusionopt_jax.dit.export.archive import read_archive
from tests._compare import assert_within
from tests.dit._models import random_params

CONFIG = dit.DiTConfig(
    input_size=4, hidden_size=32, depth=2, num_heads=2, num_classes=10
)
SAMPLER = dit.Sampler.ddpm("3")
LABELS = [3, 7]


def weights(dtype=jnp.float32):
    """Parameters in which no layer is zero."""
    params = dit.init_params(CONFIG)
    return jax.tree.map(lambda leaf: (leaf + 0.02).astype(dtype), params)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A DDPM sampler for two labels, exported once."""
    path = tmp_path_factory.mktemp("export") / "sampler.zip"
    params = weights()
    cache = dit.build_cache(params, CONFIG, SAMPLER.eval_times(), LABELS)
    dit.export_sampler(path, dit.strip_modulators(params), CONFIG, cache, SAMPLER)
    return path


@pytest.fixture(scope="module")
def loaded(exported):
    return dit.load_sampler(exported)


def direct(noise, labels, key=None, params=None, sampler=SAMPLER, scale=4.0):
    """The same request through the library."""
    params = weights() if params is None else params
    cache = dit.build_cache(params, CONFIG, sampler.eval_times(), LABELS)
    return dit.sample(params, CONFIG, cache, noise, labels, sampler, scale, key=key)


def test_gives_the_images_of_sample_for_any_batch(loaded):
    key, labels = jax.random.key(1), [3, 7, 10]
    noise = jax.random.normal(jax.random.key(2), (3, 4, 4, 4))
    images, expected = loaded(noise, labels, 4.0, key=key), direct(noise, labels, key)
    scale = float(jnp.abs(expected).max())
    # The same program, compiled apart.
    assert_within(images / scale, expected / scale, 1e-5)
    assert loaded(noise[:1], [7], key=key).shape == (1, 4, 4, 4)


def test_the_readme_runs_without_this_library(exported, tmp_path):
    with zipfile.ZipFile(exported) as file:
        readme = file.read("README.txt").decode()
    code = readme[readme.index("import io") : readme.index("Only the labels")]
    blocked = ("fusionopt_jax", "flax", "optax", "jaxtyping")
    script = "\n".join(
        [
            "import sys, importlib.abc",
            "class Blocker(importlib.abc.MetaPathFinder):",
            "    def find_spec(self, name, path=None, target=None):",
            f"        if name.split('.')[0] in {blocked!r}:",
            "            raise ImportError('blocked: ' + name)",
            "sys.meta_path.insert(0, Blocker())",
            # Before the installed packages, so that the file's own copy is what runs.
            f"sys.path.insert(0, {str(exported)!r})",
            code.replace('"sampler.zip"', repr(str(exported))),
            "import flatbuffers",
            "assert 'sampler.zip' in flatbuffers.__file__, flatbuffers.__file__",
            f"np.save({str(tmp_path / 'images.npy')!r}, images)",
        ]
    )
    subprocess.run(
        [sys.executable, "-I", "-c", script], check=True, cwd=tmp_path, timeout=300
    )
    noise = np.random.default_rng(0).standard_normal((2, 4, 4, 4), dtype=np.float32)
    key = jax.random.wrap_key_data(jnp.array([0, 1], jnp.uint32))
    expected = direct(noise, [3, 3], key)
    scale = float(jnp.abs(expected).max())
    images = np.load(tmp_path / "images.npy")
    # The same program in another process, with products in the platform's precision.
    assert_within(images / scale, expected / scale, 1e-4)


def test_the_file_says_what_is_in_it(exported, loaded):
    assert loaded.signature["labels"] == [3, 7, 10]
    assert loaded.signature["platforms"] == ["cpu", "cuda"]
    assert loaded.signature["model_times"] == SAMPLER.eval_times().tolist()
    names = [entry["name"] for entry in loaded.signature["arrays"]]
    assert not [name for name in names if "adaLN" in name or "embedder/fc" in name]
    held = sum(array.nbytes for array in loaded.arrays)
    full = sum(leaf.nbytes for leaf in jax.tree.leaves(weights()))
    cache = 3 * 4 * (2 * 6 + 2) * 32 * 4
    assert held < full + cache - dit.modulator_bytes(CONFIG)


def test_half_precision_weights_survive_without_guidance(tmp_path):
    params = weights(jnp.bfloat16)
    sampler = dit.Sampler.euler(2)
    cache = dit.build_cache(params, CONFIG, sampler.eval_times(), LABELS)
    path = tmp_path / "half.zip"
    dit.export_sampler(
        path,
        params,
        CONFIG,
        cache,
        sampler,
        platforms=["cpu"],
        batch_size=2,
        guided=False,
    )
    loaded = dit.load_sampler(path)
    noise = jax.random.normal(jax.random.key(2), (2, 4, 4, 4))
    expected = direct(noise, LABELS, params=params, sampler=sampler, scale=1.0)
    assert {str(array.dtype) for array in loaded.arrays} >= {"bfloat16"}
    assert_within(loaded(noise, LABELS), expected, 1e-5)
    with pytest.raises(ValueError, match="no effect on this file"):
        loaded(noise, LABELS, 4.0)
    with pytest.raises(ValueError, match=r"\[2, 4, 4, 4\]"):
        loaded(noise[:1], [3])


def test_a_step_cache_becomes_part_of_the_file(loaded, tmp_path):
    assert loaded.step_cache is None
    path, sampler = tmp_path / "skipping.zip", dit.Sampler.euler(4)
    params = jax.tree.map(lambda leaf: 0.4 * leaf, random_params(CONFIG))
    cache = dit.build_cache(params, CONFIG, sampler.eval_times(), LABELS)
    step_cache = dit.StepCache(
        attention=[True, True, False, True],
        mlp=[[True, True], [True, True], [True, False], [False, False]],
        order=1,
        fingerprint=weight_digests(params),
        sampler=sampler,
    )
    export = functools.partial(
        dit.export_sampler,
        path,
        config=CONFIG,
        cache=cache,
        sampler=sampler,
        platforms=["cpu"],
    )
    export(dit.strip_modulators(params), step_cache=step_cache)
    skipping = dit.load_sampler(path)
    # It samples with the masks; what they were chosen for was compared before.
    assert skipping.step_cache == dataclasses.replace(
        step_cache, fingerprint=None, sampler=None, config=None
    )
    noise = jax.random.normal(jax.random.key(2), (2, 4, 4, 4))
    request = (params, CONFIG, cache, noise, LABELS, sampler, 4.0)
    expected = dit.sample(*request, step_cache=step_cache)
    # The same program, compiled apart.
    assert_within(skipping(noise, LABELS, 4.0), expected, 1e-5)
    _, program, _ = read_archive(path)
    assert "stablehlo.case" in program.mlir_module()

    path.unlink()
    other = jax.tree.map(lambda leaf: leaf, params)
    kernel = other["blocks"]["mlp"]["fc1"]["kernel"]
    other["blocks"]["mlp"]["fc1"]["kernel"] = kernel + 1e-3
    with pytest.raises(dit.StaleCacheError, match="step cache was chosen for other"):
        export(other, step_cache=step_cache)
    with pytest.raises(ValueError, match="for 3 steps"):
        export(params, step_cache=dit.StepCache.every(3, 2))
    assert not path.exists()


def test_requests_that_the_file_cannot_serve_are_errors(loaded, unchecked_types):
    noise = jnp.zeros((2, 4, 4, 4))
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="has 4"):
        loaded(noise, [3, 4], key=key)
    with pytest.raises(ValueError, match="one per image"):
        loaded(noise, [3], key=key)
    with pytest.raises(ValueError, match="noise"):
        loaded(noise[..., :3], [3, 7], key=key)
    with pytest.raises(ValueError, match="key"):
        loaded(noise, [3, 7])


def test_a_file_that_is_no_sampler_is_an_error(exported, tmp_path):
    damaged = tmp_path / "damaged.zip"
    with pytest.raises(FileNotFoundError):
        dit.load_sampler(damaged)
    damaged.write_bytes(exported.read_bytes()[:-500])
    with pytest.raises(ValueError, match="is not a sampler"):
        dit.load_sampler(damaged)
    for name, content in {
        "signature.json": b"{}",
        "other.txt": b"",
        "signature": b"[]",
    }.items():
        with zipfile.ZipFile(damaged, "w") as file:
            file.writestr(name, content)
        with pytest.raises(ValueError, match="is not a sampler"):
            dit.load_sampler(damaged)


def rewritten(source, path, changes):
    """The archive with other contents of some members, each with its own checksum."""
    with zipfile.ZipFile(source) as file, zipfile.ZipFile(path, "w") as new:
        for name in file.namelist():
            new.writestr(name, changes.get(name, file.read(name)))


def test_members_that_a_zip_finds_right_are_compared_with_their_digests(
    exported, tmp_path
):
    path = tmp_path / "rewritten.zip"
    with zipfile.ZipFile(exported) as file:
        members = {name: file.read(name) for name in file.namelist()}
    rewritten(exported, path, {})
    dit.load_sampler(path)
    for name in members.keys() - {"SHA256SUMS"}:
        content = bytearray(members[name])
        content[len(content) // 2] ^= 1
        rewritten(exported, path, {name: bytes(content)})
        with pytest.raises(ValueError, match=f"{name} does not have the digest"):
            dit.load_sampler(path)
    # Two arrays of one shape that changed places.
    one, other = (f"arrays/{index}.npy" for index in (0, 2))
    rewritten(exported, path, {one: members[other], other: members[one]})
    with pytest.raises(ValueError, match="digest"):
        dit.load_sampler(path)
    with zipfile.ZipFile(exported) as file, zipfile.ZipFile(path, "w") as new:
        for name in file.namelist()[:-1]:
            new.writestr(name, file.read(name))
    with pytest.raises(ValueError, match="SHA256SUMS"):
        dit.load_sampler(path)


def damaged(content, kind, rng):
    """The bytes of a file after an accident."""
    content = bytearray(content)
    start = int(rng.integers(len(content)))
    if kind == "truncated":
        return bytes(content[:start])
    if kind == "zeroed":
        end = start + int(rng.integers(1, 4096))
        content[start:end] = bytes(len(content[start:end]))
    elif kind == "directory":
        # The directory at the end says where members lie; few flips would meet it.
        where = len(content) - 1 - int(rng.integers(4000))
        content[where] ^= 1 << int(rng.integers(8))
    else:
        content[start] ^= 1 << int(rng.integers(8))
    return bytes(content)


def check_damage(exported, loaded, path, rng, count):
    """Damage a file `count` times: each is refused, or says what it said before."""
    whole, refused = exported.read_bytes(), 0
    for index in range(count):
        kind = ("flipped", "truncated", "zeroed", "directory")[index % 4]
        path.write_bytes(damaged(whole, kind, rng))
        try:
            again = dit.load_sampler(path)
        except ValueError:
            refused += 1
            continue
        # A flag or a date in the zip, which stand for nothing that is read.
        assert again.signature == loaded.signature
        for array, expected in zip(again.arrays, loaded.arrays, strict=True):
            assert array.dtype == expected.dtype
            np.testing.assert_array_equal(array, expected)
    return refused


def test_damaged_files_are_refused(exported, loaded, tmp_path, rng):
    refused = check_damage(exported, loaded, tmp_path / "damaged.zip", rng, 20)
    assert refused >= 15


@pytest.mark.exhaustive
def test_many_damaged_files_are_refused(exported, loaded, tmp_path, rng):
    refused = check_damage(exported, loaded, tmp_path / "damaged.zip", rng, 600)
    assert refused >= 450


def test_a_file_for_other_platforms_is_an_error(exported, tmp_path):
    path = tmp_path / "cuda.zip"
    params, sampler = weights(), dit.Sampler.euler(1)
    cache = dit.build_cache(params, CONFIG, sampler.eval_times(), [3])
    dit.export_sampler(path, params, CONFIG, cache, sampler, platforms=["cuda"])
    with zipfile.ZipFile(path) as file:
        assert json.loads(file.read("signature.json"))["platforms"] == ["cuda"]
    if jax.default_backend() == "cpu":
        with pytest.raises(ValueError, match="exported for"):
            dit.load_sampler(path)


def test_nothing_is_written_for_a_cache_that_does_not_fit(tmp_path):
    params = weights()
    cache = dit.build_cache(params, CONFIG, SAMPLER.eval_times(), LABELS)
    other = jax.tree.map(lambda leaf: leaf + 1e-3, params)
    path = tmp_path / "sampler.zip"
    with pytest.raises(dit.StaleCacheError, match="weights"):
        dit.export_sampler(path, other, CONFIG, cache, SAMPLER)
    with pytest.raises(dit.StaleCacheError, match="times"):
        dit.export_sampler(path, params, CONFIG, cache, dit.Sampler.euler(3))
    with pytest.raises(ValueError, match="no effect with guided=False"):
        dit.export_sampler(
            path, params, CONFIG, cache, SAMPLER, guided=False, cfg_channels=3
        )
    with pytest.raises(ValueError, match="batch_size"):
        dit.export_sampler(path, params, CONFIG, cache, SAMPLER, batch_size=0)
    assert not list(tmp_path.iterdir())
