"""Folders of weights: every form that is read, and every damage that is refused."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from fusionopt_jax.dit.weights.files import read_weights
from fusionopt_jax.dit.weights.folder import read_folder
from tests.dit._folders import (
    FILE_NAME,
    VAE,
    vae_arrays,
    write_bin,
    write_json,
    write_weights,
)

ARRAYS = {name: array for name, array in vae_arrays().items() if "decoder" in name}


@pytest.fixture
def folder(tmp_path):
    """A part's folder without weights."""
    write_json(tmp_path / "vae" / "config.json", VAE)
    return tmp_path / "vae"


class TestForms:
    @pytest.mark.parametrize("form", ["safetensors", "bin", "fp16", "sharded"])
    def test_values(self, folder, form):
        write_weights(folder, ARRAYS, form)
        for source in (folder, folder.parent, str(folder)):
            weights, config = read_folder(source, "vae")
            assert config == VAE
            assert weights.shapes == {n: a.shape for n, a in ARRAYS.items()}
            assert weights.nbytes == sum(array.nbytes for array in ARRAYS.values())
            for name, array in ARRAYS.items():
                np.testing.assert_array_equal(weights[name], array)

    def test_several_bin_files_with_an_index(self, folder):
        names = list(ARRAYS)
        where = {}
        for file, part in (("one.bin", names[::2]), ("two.bin", names[1::2])):
            write_bin(folder / file, {name: ARRAYS[name] for name in part})
            where |= dict.fromkeys(part, file)
        index = folder / f"{FILE_NAME}.bin.index.json"
        write_json(index, {"metadata": {}, "weight_map": where})
        weights, _ = read_folder(folder, "vae")
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(weights[name], array)

    @pytest.mark.parametrize(
        "name",
        [
            f"{FILE_NAME}.safetensors.index.fp16.json",
            f"{FILE_NAME}.safetensors.fp16.index.json",
            f"{FILE_NAME}.fp16.safetensors.index.json",
        ],
    )
    def test_names_of_the_index_of_a_variant(self, folder, name):
        write_weights(folder, ARRAYS, "sharded")
        (folder / f"{FILE_NAME}.safetensors.index.json").rename(folder / name)
        weights, _ = read_folder(folder, "vae")
        assert weights.shapes.keys() == ARRAYS.keys()

    def test_half_precision_comes_as_fp32(self, folder):
        from safetensors.flax import save_file

        half = {name: jnp.asarray(a, jnp.bfloat16) for name, a in ARRAYS.items()}
        save_file(half, folder / f"{FILE_NAME}.fp16.safetensors")
        weights, _ = read_folder(folder, "vae")
        for name, array in half.items():
            np.testing.assert_array_equal(weights[name], array.astype(jnp.float32))
            assert weights[name].dtype == np.float32

    def test_which_of_several_is_taken(self, folder):
        # Each holds one array, whose value says which file it is of.
        for value, (form, name) in enumerate(
            [("fp16", "w"), ("bin", "w"), ("safetensors", "w")]
        ):
            write_weights(folder, {name: np.full(2, value, np.float32)}, form)
            weights, _ = read_folder(folder, "vae")
            assert weights["w"][0] == value

    def test_no_array_is_read_before_it_is_asked_for(self, folder):
        write_weights(folder, ARRAYS, "sharded")
        weights, _ = read_folder(folder, "vae")
        for shard in folder.glob("*.safetensors"):
            with shard.open("r+b") as stream:
                stream.truncate(shard.stat().st_size // 2)
        assert weights.shapes.keys() == ARRAYS.keys()
        with pytest.raises(ValueError, match="became shorter while it was read"):
            dict(weights)


class TestWrongFolder:
    def test_no_folder(self, folder):
        with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
            read_folder(folder / "nowhere", "vae")
        with pytest.raises(ValueError, match=r"is a file; give the folder that holds"):
            read_folder(folder / "config.json", "vae")

    def test_neither_pipeline_nor_part(self, folder):
        (folder / "config.json").rename(folder / "settings.json")
        with pytest.raises(FileNotFoundError, match=r"vae has no config\.json; fetch"):
            read_folder(folder.parent, "vae")
        with pytest.raises(FileNotFoundError, match=r"'vae' nor .*settings\.json"):
            read_folder(folder, "vae")
        with pytest.raises(FileNotFoundError, match="neither a folder 'transformer'"):
            read_folder(folder.parent, "transformer")

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("{", r"config\.json is no JSON"),
            ("[]", "holds a list, no settings"),
            ("\udcff", r"config\.json is no JSON"),
        ],
    )
    def test_damaged_config(self, folder, content, words):
        write_weights(folder, ARRAYS)
        path = folder / "config.json"
        path.write_bytes(content.encode(errors="surrogateescape"))
        with pytest.raises(ValueError, match=words):
            read_folder(folder, "vae")

    def test_several_variants(self, folder):
        for variant in ("fp16", "ema"):
            write_weights(folder, ARRAYS, variant)
        with pytest.raises(ValueError, match=r"several variants.*: ema, fp16; leave"):
            read_folder(folder, "vae")

    def test_no_weights(self, folder):
        words = r"no diffusion_pytorch_model\.safetensors or .*\.bin \(it holds config"
        with pytest.raises(FileNotFoundError, match=words):
            read_folder(folder, "vae")


class TestHalfDownloaded:
    def test_missing_shard(self, folder):
        write_weights(folder, ARRAYS, "sharded")
        (folder / f"{FILE_NAME}-00002-of-00002.safetensors").unlink()
        with pytest.raises(
            FileNotFoundError,
            match=r"lacks 1 of the 2 files[^:]*:\s+\S+-00002-of-00002",
        ):
            read_folder(folder, "vae")

    def test_missing_index(self, folder):
        write_weights(folder, ARRAYS, "sharded")
        (folder / f"{FILE_NAME}.safetensors.index.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"index\.json, which says what is"):
            read_folder(folder, "vae")

    def test_shards_of_different_downloads(self, folder):
        write_weights(folder, ARRAYS, "sharded")
        one, two = sorted(folder.glob("*.safetensors"))
        shutil.copy(one, two)
        with pytest.raises(ValueError, match=r"00002-of-00002.* is not the file that"):
            read_folder(folder, "vae")

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ({}, "no `weight_map`"),
            ({"weight_map": {"a": "../other.safetensors"}}, "sends a to '../other"),
            ({"weight_map": {"a": 3}}, "sends a to 3"),
        ],
    )
    def test_damaged_index(self, folder, content, words):
        path = folder / f"{FILE_NAME}.safetensors.index.json"
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=words):
            read_folder(folder, "vae")

    def test_unfinished_file(self, folder):
        (folder / f"{FILE_NAME}.bin.incomplete").write_bytes(b"PK")
        with pytest.raises(FileNotFoundError, match=r"unfinished .*bin\.incomplete"):
            read_folder(folder, "vae")

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"", r"is empty; fetch it again"),
            (
                b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
                r"pointer of Git LFS.*git lfs pull",
            ),
            (b"<!DOCTYPE html><html>", r"is a web page"),
        ],
    )
    @pytest.mark.parametrize("suffix", ["safetensors", "bin"])
    def test_something_else_in_its_place(self, folder, suffix, content, words):
        (folder / f"{FILE_NAME}.{suffix}").write_bytes(content)
        with pytest.raises(ValueError, match=rf"{FILE_NAME}\.{suffix}.*{words}"):
            read_folder(folder, "vae")

    @pytest.mark.parametrize("suffix", ["safetensors", "bin"])
    @pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
    def test_truncated_file(self, folder, suffix, share):
        write_weights(folder, ARRAYS, suffix)
        path = folder / f"{FILE_NAME}.{suffix}"
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
        with pytest.raises(ValueError, match=rf"{suffix}.*(cut off|fetch it again)"):
            read_folder(folder, "vae")

    @pytest.mark.parametrize(
        ("form", "name", "words"),
        [
            ("safetensors", "weights.bin", r"a \.safetensors file by its content"),
            ("safetensors", "weights.npz", r"a \.safetensors file by its content"),
            ("bin", "weights.safetensors", r"PyTorch or \.npz file by its content"),
        ],
    )
    def test_renamed_file(self, folder, form, name, words):
        write_weights(folder, ARRAYS, form)
        (folder / f"{FILE_NAME}.{form}").rename(folder / name)
        with pytest.raises(ValueError, match=words):
            read_weights(folder / name)
