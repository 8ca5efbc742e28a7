"""Weights alone, in files that programs without JAX read."""

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.flax
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec

import fusionopt_jax as fo
from fusionopt_jax import checkpoints, dit
from tests import _cases

ROUTING = fo.Routing(min_dim=8)


def parameters():
    """A small tree, two of its leaves divided among eight devices."""
    mesh = jax.make_mesh((8,), ("x",))
    rng = np.random.default_rng(5)

    def divided(*shape, spec):
        values = rng.normal(size=shape).astype(np.float32)
        return jax.device_put(values, NamedSharding(mesh, PartitionSpec(*spec)))

    return {
        "layers": {
            "kernel": divided(8, 16, 24, spec=("x",)),
            "bias": np.ones((8, 24), np.float32),
        },
        "head": divided(24, 16, spec=(None, "x")),
    }


def test_exported_weights_are_what_safetensors_reads(tmp_path):
    params = parameters()
    half = params | {"half": jnp.asarray([1.0, -2.5, jnp.nan], jnp.bfloat16)}
    half |= {"flags": np.array([True, False]), "count": jnp.int32(7)}
    half |= {"empty": jnp.zeros((0, 3), jnp.float16), "big": np.arange(3.0)}
    path = tmp_path / "weights.safetensors"
    checkpoints.export_safetensors(path, half, step=40, metadata={"licence": "CC0-1.0"})
    names = ["big", "count", "empty", "flags", "half", "head"]
    names += ["layers/bias", "layers/kernel"]
    with safetensors.safe_open(path, "flax") as file:
        assert sorted(file.keys()) == names
        kept = file.metadata()
        # JAX would round what has eight bytes.
        read = {name: file.get_tensor(name) for name in names if name != "big"}
    assert kept == {
        "format": "flax",
        "step": "40",
        "licence": "CC0-1.0",
        "digest": checkpoints.weights_digest(half),
    }
    assert read["half"].dtype == jnp.bfloat16
    for name, leaf in read.items():
        keys = name.split("/")
        wanted = half[keys[0]][keys[1]] if len(keys) > 1 else half[name]
        assert leaf.shape == np.shape(wanted), name
        assert np.asarray(leaf).tobytes() == np.asarray(wanted).tobytes(), name
    as_numpy = safetensors.numpy.load_file(path)
    np.testing.assert_array_equal(as_numpy["big"], np.arange(3.0))
    assert as_numpy["half"].dtype == ml_dtypes.bfloat16
    assert list(tmp_path.iterdir()) == [path]


def test_the_digest_of_a_file_is_that_of_its_weights(tmp_path):
    params = parameters()
    path = tmp_path / "weights.safetensors"
    checkpoints.export_safetensors(path, params, routing=ROUTING)
    with safetensors.safe_open(path, "np") as file:
        kept = file.metadata()
    ROUTING.check(params, kept["routing"])
    read = safetensors.numpy.load_file(path)
    assert checkpoints.weights_digest(read) == kept["digest"]
    read["head"] = read["head"].copy()
    read["head"][0, 0] += 1
    assert checkpoints.weights_digest(read) != kept["digest"]


@pytest.mark.exhaustive
def test_the_weights_of_a_dit(tmp_path):
    config = dit.DiTConfig(
        input_size=4,
        in_channels=1,
        patch_size=2,
        hidden_size=32,
        depth=2,
        num_heads=2,
        num_classes=3,
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype),
        jax.eval_shape(lambda: dit.init_params(config, 0)),
    )
    path = tmp_path / "dit.safetensors"
    checkpoints.export_safetensors(path, params)
    read = safetensors.flax.load_file(path)
    nested: dict = {}
    for name, leaf in read.items():
        *folders, last = name.split("/")
        place = nested
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = leaf
    chex.assert_trees_all_equal(nested, params)


@pytest.mark.parametrize(
    ("params", "error", "said"),
    [
        ({"key": jax.random.key}, TypeError, "leaf 'key'"),
        ({"big": np.zeros(2, ">f4")}, TypeError, "leaf 'big', >f4"),
        ({"small": np.zeros(2, ml_dtypes.int4)}, TypeError, "leaf 'small', int4"),
        ({"a": {"b": np.zeros(1)}, "a/b": np.zeros(1)}, ValueError, "'a/b' twice"),
        (np.zeros(1), ValueError, "name ''"),
    ],
)
def test_what_the_format_has_no_place_for(params, error, said, tmp_path):
    with pytest.raises(error, match=said):
        checkpoints.export_safetensors(tmp_path / "w.safetensors", params)
    assert not list(tmp_path.iterdir())


def test_other_names_and_metadata_are_refused(tmp_path):
    params = {"w": np.zeros(1)}
    with pytest.raises(ValueError, match=r"end in .safetensors, got 'w.bin'"):
        checkpoints.export_safetensors(tmp_path / "w.bin", params)
    path = tmp_path / "w.safetensors"
    with pytest.raises(ValueError, match="can't name 'step'"):
        checkpoints.export_safetensors(path, params, metadata={"step": "1"})
    with pytest.raises(TypeError, match="text by text"):
        _cases.unchecked(
            checkpoints.export_safetensors, path, params, metadata={"config": {}}
        )


def test_a_failed_export_leaves_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    checkpoints.export_safetensors(path, {"w": np.zeros(1)})
    before = path.read_bytes()

    def full(_):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        checkpoints.export_safetensors(path, {"w": np.ones(1)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
