"""Caches in files: read as they were written, or refused."""

import dataclasses
import io
import json
import os

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionopt_jax import dit
from fusionopt_jax.dit.cache import registry
from fusionopt_jax.dit.cache.file import read_arrays, write_arrays
from tests.dit._models import (
    CONFIG,
    LABELS,
    TIMES,
    random_params,
)


def damaged(content, kind, rng):
    """The bytes of a file after an accident."""
    content = bytearray(content)
    start, other = (int(place) for place in rng.integers(len(content), size=2))
    if kind == "truncated":
        return bytes(content[:start])
    if kind == "zeroed":
        end = start + int(rng.integers(1, 2048))
        content[start:end] = bytes(len(content[start:end]))
    elif kind == "directory":
        # The end says where members lie; few flips of the whole would meet it.
        content[-1 - int(rng.integers(700))] ^= 1 << int(rng.integers(8))
    elif kind == "moved":
        # A block of the disk in the place of another one.
        content[start : start + 512] = content[other : other + 512]
    else:
        content[start] ^= 1 << int(rng.integers(8))
    return bytes(content)


def exchanged(path, rng):
    """The bytes of a sound archive in which two members or two runs changed places."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    if rng.integers(2):
        one, other = rng.choice(sorted(arrays), size=2, replace=False)
        arrays[one], arrays[other] = arrays[other], arrays[one]
    else:
        flat = arrays["array block"]
        length = flat.size // 8
        one, other = rng.choice(8, size=2, replace=False) * length
        held = flat[one : one + length].copy()
        flat[one : one + length] = flat[other : other + length]
        flat[other : other + length] = held
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def check_damage(cache, path, count):
    """Damage a file `count` times: each is refused, or is the same cache."""
    kinds = ("flipped", "truncated", "zeroed", "directory", "moved", "exchanged")
    cache.save(path)
    whole, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    wanted = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(cache)]
    for index in range(count):
        kind = kinds[index % len(kinds)]
        path.write_bytes(whole)
        path.write_bytes(
            exchanged(path, rng) if kind == "exchanged" else damaged(whole, kind, rng)
        )
        try:
            loaded = dit.TimeConditioningCache.load(path)
        except dit.StaleCacheError:
            refused += 1
            continue
        # A flag or a date in the zip, which stand for nothing that is read.
        assert loaded.config == cache.config
        held = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(loaded)]
        assert held == wanted
    return refused


class TestFile:
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_written_once_and_read_by_the_next_process(self, params, tmp_path, dtype):
        path = tmp_path / "cache.npz"

        def get():
            return dit.get_or_build_cache(
                params, CONFIG, TIMES, LABELS, path=path, dtype=dtype
            )

        built = get()
        written = path.read_bytes()
        dit.clear_cache_registry()
        chex.assert_trees_all_equal(get(), built)
        assert registry.cache_counts() == (0, 1, 0)
        assert path.read_bytes() == written
        assert list(tmp_path.iterdir()) == [path]

    def test_hit_still_writes_the_file(self, params, tmp_path):
        built = dit.get_or_build_cache(params, CONFIG, TIMES, LABELS)
        path = tmp_path / "cache.npz"
        dit.get_or_build_cache(params, CONFIG, TIMES, LABELS, path=path)
        chex.assert_trees_all_equal(dit.TimeConditioningCache.load(path), built)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"times": TIMES[:2]}, "other times"),
            ({"labels": [5]}, "no row for label 5"),
            ({"dtype": jnp.bfloat16}, "holds float32"),
            ({"params": random_params(CONFIG, seed=5)}, "other weights"),
            ({"config": dataclasses.replace(CONFIG, time_scale=2.0)}, "another config"),
            (
                {"config": dataclasses.replace(CONFIG, frequency_shift=1)},
                r"another config: frequency_shift \(0 in the cache, 1 in use\)",
            ),
        ],
    )
    def test_that_does_not_fit_is_refused_and_kept(
        self, params, tmp_path, change, words
    ):
        path = tmp_path / "cache.npz"
        request = {
            "params": params,
            "config": CONFIG,
            "times": TIMES,
            "labels": LABELS,
        }
        dit.get_or_build_cache(**request, path=path)
        written = path.read_bytes()
        with pytest.raises(dit.StaleCacheError, match=rf"cache\.npz .*{words}"):
            dit.get_or_build_cache(**{**request, **change}, path=path)
        assert path.read_bytes() == written

    def test_file_from_before_a_setting_existed(self, cache, tmp_path):
        path = tmp_path / "cache.npz"
        cache.save(path)
        with np.load(path) as file:
            kind = str(file["format"])
        about, arrays = read_arrays(path, kind)
        config = json.loads(about)
        for name in ("frequency_shift", "norm_eps"):
            del config[name]
        write_arrays(path, kind, json.dumps(config), arrays)
        chex.assert_trees_all_equal(dit.TimeConditioningCache.load(path), cache)

    def test_damaged_file_is_refused(self, cache, tmp_path):
        assert check_damage(cache, tmp_path / "cache.npz", 40) >= 30

    @pytest.mark.exhaustive
    def test_many_damaged_files_are_refused(self, cache, tmp_path):
        assert check_damage(cache, tmp_path / "cache.npz", 800) >= 600

    @pytest.mark.parametrize("name", ["block", "final", "times", "labels"])
    def test_altered_table_is_refused(self, params, cache, tmp_path, name):
        path = tmp_path / "cache.npz"
        cache.save(path)
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        # As a sound archive, whose checksums are right again.
        flat = arrays[f"array {name}"]
        flat[flat.size // 2] ^= 1
        np.savez(path, **arrays)
        with pytest.raises(dit.StaleCacheError, match=r"cache\.npz is not a readable"):
            dit.get_or_build_cache(params, CONFIG, TIMES, LABELS, path=path)

    def test_errors_of_the_file_system_are_not_damage(self, cache, tmp_path):
        with pytest.raises(IsADirectoryError):
            dit.TimeConditioningCache.load(tmp_path)
        with pytest.raises(FileNotFoundError):
            dit.TimeConditioningCache.load(tmp_path / "nowhere.npz")
        path = tmp_path / "cache.npz"
        cache.save(path)
        with pytest.raises(NotADirectoryError):
            dit.TimeConditioningCache.load(path / "cache.npz")

    def test_file_of_something_else_is_refused(self, tmp_path):
        path = tmp_path / "cache.npz"
        np.savez(path, images=np.zeros(3))
        with pytest.raises(dit.StaleCacheError, match="format"):
            dit.TimeConditioningCache.load(path)

    def test_interrupted_write_leaves_the_old_file(self, cache, tmp_path, monkeypatch):
        path = tmp_path / "cache.npz"
        cache.save(path)
        written = path.read_bytes()

        def fail(*_):
            raise OSError("disk full")

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            dataclasses.replace(cache, times=cache.times + 1).save(path)
        assert path.read_bytes() == written
        assert list(tmp_path.iterdir()) == [path]
