"""Weights from PyTorch files: the values, the errors, and that nothing is executed."""

import dataclasses
import io
import pathlib
import pickle
import re
import sys
import zipfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionopt_jax import dit
from fusionopt_jax.dit.weights import files, pt_file
from tests.dit._models import CONFIG, DATA, random_params

# Written by torch.save of PyTorch 2.13: {"model", "ema", "opt", "args"} as a published
# training script saves them. Entry k of a state dict (without the position embedding)
# holds scale * (k + i / size) in element i; "ema" is fp32 with scale 1, "model" is
# bfloat16 with scale 2 and has its matrices stored transposed.
TORCH_FILE = DATA / "dit_torch.pt"

HEADS = CONFIG.num_heads


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def weights(params):
    return dit.to_pytorch(params, CONFIG)


class TestTorchFile:
    @pytest.mark.parametrize(
        # bfloat16 keeps 8 bits, so the second file's values are rounded to 2^-9.
        ("entry", "scale", "rounding"),
        [(None, 1, 1e-7), ("ema", 1, 1e-7), ("model", 2, 2.0**-8)],
    )
    def test_values(self, entry, scale, rounding):
        params, config = dit.from_pytorch(TORCH_FILE, num_heads=1, entry=entry)
        assert config == dit.DiTConfig(
            input_size=4,
            patch_size=2,
            in_channels=1,
            hidden_size=4,
            depth=2,
            num_heads=1,
            num_classes=2,
        )
        arrays = dit.to_pytorch(params, config)
        order = [
            "x_embedder.proj",
            "t_embedder.mlp.0",
            "t_embedder.mlp.2",
            "y_embedder.embedding_table",
            *(
                f"blocks.{index}.{name}"
                for index in range(2)
                for name in (
                    "attn.qkv",
                    "attn.proj",
                    "mlp.fc1",
                    "mlp.fc2",
                    "adaLN_modulation.1",
                )
            ),
            "final_layer.linear",
            "final_layer.adaLN_modulation.1",
        ]
        entries = [
            f"{name}.{kind}"
            for name in order
            for kind in ("weight", "bias")
            if f"{name}.{kind}" in arrays
        ]
        assert len(entries) == len(arrays) - 1
        for k, name in enumerate(entries):
            got = arrays[name].ravel()
            expected = scale * (k + np.arange(got.size) / got.size)
            np.testing.assert_allclose(got, expected, rtol=rounding, err_msg=name)

    def test_missing_entry(self):
        with pytest.raises(
            ValueError, match="no `entry` 'best'; it has model, ema, opt"
        ):
            dit.from_pytorch(TORCH_FILE, num_heads=1, entry="best")

    def test_entry_that_is_no_state_dict(self):
        with pytest.raises(ValueError, match="state is dict instead of floating point"):
            dit.from_pytorch(TORCH_FILE, num_heads=1, entry="opt")

    def test_torch_is_not_imported(self):
        dit.from_pytorch(TORCH_FILE, num_heads=1)
        assert "torch" not in sys.modules


class TestRoundTrip:
    def test_there_and_back(self, params, weights):
        again, config = dit.from_pytorch(weights, num_heads=HEADS)
        assert config == CONFIG
        chex.assert_trees_all_equal(again, params)

    def test_published_names_and_layouts(self, params, weights):
        assert weights["pos_embed"].shape == (1, 4, 16)
        assert weights["x_embedder.proj.weight"].shape == (16, 3, 2, 2)
        np.testing.assert_array_equal(
            weights["blocks.1.attn.qkv.weight"],
            params["blocks"]["attn"]["qkv"]["kernel"][1].T,
        )
        kernel = params["x_embedder"]["proj"]["kernel"].reshape(2, 2, 3, 16)
        np.testing.assert_array_equal(
            weights["x_embedder.proj.weight"][5, 2, 0, 1], kernel[0, 1, 2, 5]
        )

    @pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
    def test_files(self, params, weights, tmp_path, suffix):
        path = tmp_path / f"weights{suffix}"
        if suffix == ".npz":
            np.savez(path, **weights)
        else:
            from safetensors.numpy import save_file

            save_file(weights, path)
        again, _ = dit.from_pytorch(path, num_heads=HEADS)
        chex.assert_trees_all_equal(again, params)

    def test_half_precision_safetensors(self, params, weights, tmp_path):
        from safetensors.flax import save_file

        half = {name: jnp.asarray(v, jnp.bfloat16) for name, v in weights.items()}
        save_file(half, tmp_path / "weights.safetensors")
        again, _ = dit.from_pytorch(tmp_path / "weights.safetensors", num_heads=HEADS)
        rounded = jax.tree.map(
            lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), params
        )
        chex.assert_trees_all_equal(again, rounded)

    def test_prefix_of_parallel_training(self, params, weights):
        wrapped = {f"module.{name}": value for name, value in weights.items()}
        again, _ = dit.from_pytorch(wrapped, num_heads=HEADS)
        chex.assert_trees_all_equal(again, params)

    def test_moving_average_first(self, params, weights):
        other = {name: value + 1 for name, value in weights.items()}
        nested = {"model": other, "ema": weights, "step": 7}
        again, _ = dit.from_pytorch(nested, num_heads=HEADS)
        chex.assert_trees_all_equal(again, params)

    def test_model_without_null_label(self, weights):
        _, config = dit.from_pytorch(weights, num_heads=HEADS, has_null_label=False)
        assert (config.num_classes, config.num_labels) == (11, 11)

    @pytest.mark.parametrize(("width", "heads"), [(384, 6), (1152, 16)])
    def test_heads_of_published_widths(self, width, heads):
        config = dataclasses.replace(
            CONFIG, hidden_size=width, depth=1, num_heads=heads
        )
        shapes = jax.eval_shape(lambda: dit.init_params(config))
        params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
        _, found = dit.from_pytorch(dit.to_pytorch(params, config))
        assert found == config


class TestKinds:
    @pytest.mark.parametrize("kind", ["sit", "repa"])
    def test_embeds_time_as_it_is(self, params, weights, kind):
        again, config = dit.from_pytorch(weights, HEADS, kind=kind)
        assert config == dataclasses.replace(CONFIG, time_scale=1e-3)
        chex.assert_trees_all_equal(again, params)
        same = dit.from_pytorch(weights, HEADS, kind=kind, time_scale=1e-3)[1]
        assert same == config
        with pytest.raises(ValueError, match=rf"`time_scale` .*{kind}.* is 0\.001"):
            dit.from_pytorch(weights, HEADS, kind=kind, time_scale=1.0)

    def test_own_scale(self, weights):
        _, config = dit.from_pytorch(weights, HEADS, time_scale=0.5)
        assert config.time_scale == 0.5

    def test_unknown_kind(self, weights, unchecked_types):
        with pytest.raises(ValueError, match="`kind` must be one of 'dit', 'sit', 're"):
            dit.from_pytorch(weights, HEADS, kind="mdt")

    def test_projectors_are_left_out_and_said_so(self, params, weights):
        extra = {
            f"projectors.{encoder}.{layer}.{part}": np.zeros(3, np.float32)
            for encoder in range(2)
            for layer in (0, 2, 4)
            for part in ("weight", "bias")
        }
        told = []
        with pytest.warns(UserWarning, match=r"12 arrays .*\(projectors\.0\.0\.weight"):
            again, _ = dit.from_pytorch(
                {"ema": {**weights, **extra}},
                HEADS,
                kind="repa",
                progress=lambda *done: told.append(done),
            )
        chex.assert_trees_all_equal(again, params)
        size = sum(array.nbytes for array in weights.values())
        assert told[-1] == (size, size)
        for kind in ("dit", "sit"):
            with pytest.raises(ValueError, match=r"projectors.*REPA; pass kind=.repa"):
                dit.from_pytorch({**weights, **extra}, HEADS, kind=kind)

    def test_blocks_that_an_older_version_kept_apart(self, params, weights):
        # The first two blocks, and those after them counted from zero.
        older = {
            re.sub(r"^blocks\.2\.", "decoder_blocks.0.", name): array
            for name, array in weights.items()
        }
        again, _ = dit.from_pytorch(older, HEADS, kind="repa")
        chex.assert_trees_all_equal(again, params)
        with pytest.raises(ValueError, match=r"decoder_blocks.*pass kind=.repa"):
            dit.from_pytorch(older, HEADS, kind="sit")

    @pytest.mark.parametrize("kind", ["dit", "repa"])
    def test_normalised_queries_are_refused(self, weights, kind):
        name = "blocks.1.attn.q_norm.weight"
        with pytest.raises(
            ValueError, match=r"\(qk_norm\) is not supported:\s+" + name
        ):
            dit.from_pytorch({**weights, name: np.ones(8, np.float32)}, kind=kind)


class TestWrongWeights:
    def test_one_error_lists_everything(self, weights):
        wrong = dict(weights)
        del wrong["blocks.2.mlp.fc1.bias"]
        wrong["blocks.0.extra.weight"] = np.zeros(3, np.float32)
        wrong["t_embedder.mlp.0.weight"] = np.zeros((16, 255), np.float32)
        with pytest.raises(ValueError, match="not the weights of a DiT") as caught:
            dit.from_pytorch(wrong, num_heads=HEADS)
        text = str(caught.value)
        assert "blocks.2.mlp.fc1.bias is missing" in text
        assert "blocks.0.extra.weight is unexpected" in text
        assert (
            "t_embedder.mlp.0.weight has shape (16, 255) instead of (16, 256)" in text
        )

    @pytest.mark.parametrize("seed", range(20))
    def test_renamed_entry(self, weights, seed):
        name = sorted(weights)[seed * len(weights) // 20]
        wrong = {("x" + key if key == name else key): v for key, v in weights.items()}
        with pytest.raises(ValueError, match=f"{name} is missing"):
            dit.from_pytorch(wrong, num_heads=HEADS)

    @pytest.mark.parametrize("seed", range(20))
    def test_misshapen_entry(self, weights, seed):
        name = sorted(weights)[seed * len(weights) // 20]
        wrong = {**weights, name: weights[name][..., :-1]}
        with pytest.raises(ValueError, match=r"DiT|`num_heads`|must divide|divisible"):
            dit.from_pytorch(wrong, num_heads=HEADS)

    @pytest.mark.parametrize(
        ("value", "words"),
        [
            (np.zeros((48, 16), np.int64), "is int64 instead of floating point"),
            (np.zeros((48, 16), complex), "is complex128 instead of"),
            (np.full((48, 16), np.nan, np.float32), "not finite"),
            (3.0, "is float instead of floating point"),
            (np.array(None), "is object instead of"),
        ],
    )
    def test_wrong_values(self, weights, value, words):
        name = "blocks.1.attn.qkv.weight"
        with pytest.raises(ValueError, match=f"{name}.*{words}"):
            dit.from_pytorch({**weights, name: value}, num_heads=HEADS)

    def test_another_position_embedding(self, weights):
        learned = {**weights, "pos_embed": weights["pos_embed"] + 0.1}
        with pytest.raises(ValueError, match="differs from the fixed sine table"):
            dit.from_pytorch(learned, num_heads=HEADS)

    def test_unknown_number_of_heads(self, weights):
        with pytest.raises(ValueError, match=r"`num_heads` is needed.*width 16"):
            dit.from_pytorch(weights)

    def test_name_that_is_no_text(self, weights):
        with pytest.raises(ValueError, match="names that are not text, such as 3"):
            dit.from_pytorch({**weights, 3: np.zeros(3)}, num_heads=HEADS)

    def test_params_of_another_config(self, params):
        other = dataclasses.replace(CONFIG, depth=2)
        with pytest.raises(ValueError, match="do not fit the config"):
            dit.to_pytorch(params, other)
        with pytest.raises(ValueError, match="adaLN_modulation/kernel is missing"):
            dit.to_pytorch(dit.strip_modulators(params), CONFIG)

    def test_files_that_are_none(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no weight file"):
            dit.from_pytorch(tmp_path / "nowhere.pt")
        (tmp_path / "weights.h5").write_bytes(b"")
        with pytest.raises(ValueError, match=r"must end in \.pt"):
            dit.from_pytorch(tmp_path / "weights.h5")
        np.savez(tmp_path / "objects.npz", a=np.array([print], object))
        with pytest.raises(ValueError, match=r"not a readable \.npz"):
            dit.from_pytorch(tmp_path / "objects.npz")

    def test_every_reader_is_in_the_list(self):
        modules = pathlib.Path(pt_file.__file__).parent.glob("*_file.py")
        listed = {reader.__module__.split(".")[-1] for reader in files.FORMATS.values()}
        assert listed == {module.stem for module in modules}

    def test_missing_safetensors_names_the_extra(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "safetensors", None)
        (tmp_path / "weights.safetensors").write_bytes(b"anything")
        with pytest.raises(ImportError, match="extra `dit`"):
            dit.from_pytorch(tmp_path / "weights.safetensors")


def archive(path, program, storages=(), *, compression=zipfile.ZIP_STORED):
    """A `.pt` archive around a pickle program."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", program)
        for key, data in dict(storages).items():
            file.writestr(f"archive/data/{key}", data)
    return path


class Global:
    """Pickles as a reference to a name, whether it can be imported here or not."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    """Pickles as a call of a name."""

    def __init__(self, target, *arguments, state=None):
        self.target, self.arguments, self.state = target, arguments, state


class Pickler(pickle._Pickler):
    """Writes any program, calls of unknown names included, as an attacker would."""

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Global):
            self.write(f"c{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, Call):
            self.save(obj.target)
            self.save(obj.arguments)
            self.write(pickle.REDUCE)
            if obj.state is not None:
                self.save(obj.state)
                self.write(pickle.BUILD)
        else:
            super().save(obj, save_persistent_id)


def dumps(obj):
    """A protocol-2 pickle, as `torch.save` writes them."""
    stream = io.BytesIO()
    Pickler(stream, 2).dump(obj)
    return stream.getvalue()


def tensor(size, shape, strides, *, offset=0, key="0", kind="FloatStorage"):
    """A program for a dict of one tensor, laid out by hand."""
    out = io.BytesIO()
    out.write(b"\x80\x02}")
    out.write(pickle.BINUNICODE + (1).to_bytes(4, "little") + b"w")
    out.write(b"ctorch._utils\n_rebuild_tensor_v2\n(")
    out.write(b"(" + dumps("storage")[2:-1])
    out.write(f"ctorch\n{kind}\n".encode())
    for part in (key, "cpu", size):
        out.write(dumps(part)[2:-1])
    out.write(b"tQ")
    for part in (offset, shape, strides, False, None):
        out.write(dumps(part)[2:-1])
    out.write(b"tRs.")
    return out.getvalue()


class TestHostileFile:
    @pytest.mark.parametrize(
        ("module", "name"),
        [
            ("os", "system"),
            ("posix", "system"),
            ("builtins", "eval"),
            ("builtins", "getattr"),
            ("subprocess", "Popen"),
            ("torch.nn.modules.linear", "Linear"),
            ("collections", "OrderedDict.fromkeys"),
            ("torch._utils", "_rebuild_tensor_v2.__globals__"),
            ("numpy", "load"),
        ],
    )
    def test_no_name_is_reached(self, tmp_path, module, name):
        program = dumps({"a": Call(Global(module, name), "touch executed")})
        path = archive(tmp_path / "hostile.pt", program)
        with pytest.raises(ValueError, match=f"asks for {module}"):
            dit.from_pytorch(path)

    def test_python_would_have_run_it(self, tmp_path):
        # The same program runs in an open unpickler: the fence is what stops it.
        victim = tmp_path / "executed"
        program = dumps(Call(Global("os", "mkdir"), str(victim)))
        with pytest.raises(ValueError, match="asks for os"):
            dit.from_pytorch(archive(tmp_path / "hostile.pt", program))
        assert not victim.exists()
        pickle.loads(program)
        assert victim.exists()

    def test_stand_ins_can_not_be_changed(self, tmp_path):
        attack = {"run": 1, "__call__": 2, "items": 3, "__class__": 4}
        targets = {
            "function": Global("torch._utils", "_rebuild_tensor_v2"),
            "class": Global("argparse", "Namespace"),
            "storage": Global("torch", "FloatStorage"),
        }
        before = dict(vars(pt_file))
        for name, target in targets.items():
            for state in (attack, (None, attack)):
                out = io.BytesIO(dumps(target)[:-1])
                out.seek(0, 2)
                out.write(dumps(state)[2:-1] + b"b.")
                path = archive(tmp_path / f"{name}.pt", out.getvalue())
                with pytest.raises(ValueError, match=r"PyTorch file|dict of weights"):
                    dit.from_pytorch(path)
        assert dict(vars(pt_file)) == before
        dit.from_pytorch(TORCH_FILE, num_heads=1)

    def test_attributes_of_a_dict_hide_nothing(self, tmp_path):
        program = dumps(Call(Global("collections", "OrderedDict"), state={"items": 1}))
        path = archive(tmp_path / "dict.pt", program)
        with pytest.raises(ValueError, match="not the weights of a DiT"):
            dit.from_pytorch(path)

    @pytest.mark.parametrize(
        ("program", "words"),
        [
            (tensor(4, (10**6, 10**6), (0, 0)), "reaches beyond its storage"),
            (tensor(4, (5,), (1,)), "reaches beyond its storage"),
            (tensor(4, (2,), (3,), offset=1), "reaches beyond its storage"),
            (tensor(4, (4,), (-1,)), "non-negative"),
            (tensor(4, (4,), (1,), offset=-4), "non-negative"),
            (tensor(4, (4, 1), (1,)), "shape without strides"),
            (tensor(8, (8,), (1,)), "has 16 bytes instead of 32"),
            (tensor(4, (4,), (1,), kind="DoubleStorage"), "16 bytes instead of 32"),
            (tensor(4, (4,), (1,), key="1"), "archive/data/1"),
            (tensor(4, (4,), (1,), key="../data.pkl"), "archive/data/../data.pkl"),
            (tensor(4, (4,), (1,), kind="QInt8Storage"), "asks for torch.QInt8Storage"),
            (tensor("4", (4,), (1,)), "storage is described wrongly"),
            (tensor(4, 4, 1), "int"),
            (b"\x80\x02}r\xff\xff\xff\x7f.", "claims more memory"),
            (b"\x80\x02\x82\x01.", "opcode EXT1"),
            (b"\x80\x02(ios\nsystem\n.", "opcode INST"),
            (b"\x80\x02]q\x00.", "holds a list"),
            (b"", "not a readable PyTorch file"),
        ],
    )
    def test_malformed_program(self, tmp_path, program, words):
        path = archive(tmp_path / "hostile.pt", program, {"0": bytes(16)})
        with pytest.raises(ValueError, match=words):
            dit.from_pytorch(path)

    def test_sound_tensor_is_read(self, tmp_path):
        data = np.arange(4, dtype=np.float32).tobytes()
        path = archive(tmp_path / "one.pt", tensor(4, (2, 2), (1, 2)), {"0": data})
        with pt_file.TorchFile(path) as file:
            array = file.array(file.content["w"])
        np.testing.assert_array_equal(array, [[0, 2], [1, 3]])

    def test_compressed_entries_are_refused(self, tmp_path):
        program = tensor(4, (4,), (1,))
        path = archive(tmp_path / "bomb.pt", program, compression=zipfile.ZIP_DEFLATED)
        with pytest.raises(ValueError, match="is compressed"):
            dit.from_pytorch(path)

    def test_archive_that_swells_is_refused_unread(self, tmp_path, monkeypatch):
        path = tmp_path / "bomb.npz"
        # 96 MiB of zeros in a tenth of a MiB.
        np.savez_compressed(path, **{"x_embedder.proj.weight": np.zeros(12 * 2**20)})
        monkeypatch.setattr(np, "load", None)
        with pytest.raises(ValueError, match=r"claims 100,663,\d+ bytes in a file of"):
            dit.from_pytorch(path)

    def test_tensors_that_share_a_storage_are_counted(self, tmp_path, monkeypatch):
        data = np.zeros(2**18, np.float32)
        names = {f"w{index}": index for index in range(80)}
        out = io.BytesIO()
        out.write(b"\x80\x02}")
        for name in names:
            # Each is the same MiB.
            one = tensor(data.size, data.shape, (1,))
            start, end = one.index(b"ctorch._utils"), one.rindex(b"s.")
            out.write(dumps(name)[2:-1] + one[start:end] + b"s")
        out.write(b".")
        path = archive(tmp_path / "shared.pt", out.getvalue(), {"0": data.tobytes()})
        monkeypatch.setattr(pt_file.TorchFile, "array", None)
        with pytest.raises(ValueError, match=r"claims 83,886,080 bytes in a file of"):
            dit.from_pytorch(path)

    def test_legacy_format(self, tmp_path):
        path = tmp_path / "legacy.pt"
        path.write_bytes(
            pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b"\x80\x02M\xe9\x03."
        )
        with pytest.raises(ValueError, match="legacy format"):
            dit.from_pytorch(path)

    @pytest.mark.parametrize("suffix", [".pt", ".npz", ".safetensors"])
    def test_fuzzed_bytes(self, weights, tmp_path, suffix):
        source = tmp_path / f"source{suffix}"
        if suffix == ".pt":
            source = pathlib.Path(TORCH_FILE)
        elif suffix == ".npz":
            np.savez(source, **weights)
        else:
            from safetensors.numpy import save_file

            save_file(weights, source)
        whole = source.read_bytes()
        generator = np.random.default_rng(0)
        path = tmp_path / f"fuzzed{suffix}"
        refused = []
        for round_ in range(150):
            data = bytearray(whole)
            if round_ % 3 == 0:
                del data[int(generator.integers(0, len(data))) :]
            else:
                # Half of the changes in the head, where pickles and headers lie.
                stop = len(data) if round_ % 3 == 1 else 4000
                for place in generator.integers(0, stop, int(generator.integers(1, 9))):
                    data[place] = int(generator.integers(0, 256))
            path.write_bytes(data)
            try:
                params, config = dit.from_pytorch(
                    path, num_heads=1 if suffix == ".pt" else HEADS
                )
            except ValueError as error:
                refused.append(str(error).strip())
            else:
                # A change that only moves values, or lies in padding, can't be seen.
                assert dit.to_pytorch(params, config)
        assert len(refused) > 50
        assert all(refused)

    def test_fuzzed_programs(self, tmp_path):
        with zipfile.ZipFile(TORCH_FILE) as file:
            folder = file.namelist()[0].split("/")[0]
            program = file.read(f"{folder}/data.pkl")
            storages = {
                name.split("/")[-1]: file.read(name)
                for name in file.namelist()
                if "/data/" in name
            }
        # Checksums of the archive would catch these; here they are right again.
        generator = np.random.default_rng(1)
        path = tmp_path / "fuzzed.pt"
        refused = []
        for _ in range(150):
            data = bytearray(program)
            for place in generator.integers(0, len(data), 3):
                data[place] = int(generator.integers(0, 256))
            archive(path, bytes(data), storages)
            try:
                dit.from_pytorch(path, num_heads=1)
            except ValueError as error:
                refused.append(str(error).strip())
        assert len(refused) > 50
        assert all(refused)
