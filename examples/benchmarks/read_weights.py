"""How much memory and time does it take to read the weights of a published model?

    python examples/benchmarks/read_weights.py
    python examples/benchmarks/read_weights.py --model DiT-S/2 --forms npz

Writes random weights of the model in each form to a temporary folder (2.7 GB for the
default), reads each in a process of its own, and prints the peak of its resident memory
beyond what it had before, as a multiple of the file's size. 1 is the parameters alone.
"""

import argparse
import json
import pickle
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

FORMS = ("safetensors", "pt", "npz")


def arrays(model: str) -> Iterator[tuple[str, np.ndarray]]:
    """Random weights under the published names, one at a time."""
    from fusionopt_jax.dit import CONFIGS
    from fusionopt_jax.dit.network.embeddings import position_embedding
    from fusionopt_jax.dit.weights.published import POSITIONS, expected_shapes

    config = CONFIGS[model]
    generator = np.random.default_rng(0)
    for name, shape in expected_shapes(config).items():
        if name == POSITIONS:
            yield name, position_embedding(config.grid_size, config.hidden_size)[None]
        else:
            yield name, generator.standard_normal(shape, np.float32)


def write_safetensors(path: Path, model: str) -> None:
    """As the safetensors library writes it: a JSON head, then the bytes."""
    head, place = {}, 0
    for name, array in arrays(model):
        end = place + array.nbytes
        head[name] = {
            "dtype": "F32",
            "shape": array.shape,
            "data_offsets": [place, end],
        }
        place = end
    text = json.dumps(head).encode()
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, array in arrays(model):
            stream.write(array.tobytes())


def write_pt(path: Path, model: str) -> None:
    """As `torch.save` writes it: a pickle that describes storages, and their bytes."""

    def plain(value: object) -> bytes:
        """The pickle of a value without its frame."""
        return pickle.dumps(value, 2)[2:-1]

    program = b"\x80\x02}"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for key, (name, array) in enumerate(arrays(model)):
            strides = tuple(step // array.itemsize for step in array.strides)
            storage = b"(" + plain("storage") + b"ctorch\nFloatStorage\n"
            storage += plain(str(key)) + plain("cpu") + plain(array.size) + b"tQ"
            program += plain(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage
            for part in (0, array.shape, strides, False, None):
                program += plain(part)
            program += b"tRs"
            with archive.open(f"weights/data/{key}", "w", force_zip64=True) as stream:
                stream.write(array.tobytes())
        archive.writestr("weights/data.pkl", program + b".")


def write_npz(path: Path, model: str) -> None:
    """As `numpy.savez` writes it."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays(model):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, array)


def peak() -> int:
    """The largest resident memory so far, in bytes."""
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def read(path: Path) -> None:
    """Read a file in this process, and print what it took."""
    import jax
    import jax.numpy as jnp

    from fusionopt_jax import dit

    jnp.zeros(1).block_until_ready()
    before, start = peak(), time.perf_counter()
    told = []
    params, _ = dit.from_pytorch(path, progress=lambda *done: told.append(done))
    jax.block_until_ready(params)
    seconds = time.perf_counter() - start
    done, total = told[-1]
    print(
        json.dumps(
            {
                "seconds": seconds,
                "before": before,
                "peak": peak(),
                "parameters": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
                "told": [len(told), done, total],
            }
        )
    )


def main() -> None:
    """Write, read and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="DiT-XL/2", help="a published size")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--read", type=Path, help="read this file, and nothing else")
    options = parser.parse_args()
    if options.read is not None:
        read(options.read)
        return
    writers = {"safetensors": write_safetensors, "pt": write_pt, "npz": write_npz}
    for form in options.forms:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"weights.{form}"
            writers[form](path, options.model)
            size = path.stat().st_size
            command = [sys.executable, __file__, "--read", str(path)]
            printed = subprocess.run(
                command, check=True, capture_output=True, text=True
            ).stdout
        result = json.loads(printed)
        used = result["peak"] - result["before"]
        print(
            f".{form}: {size / 1e9:.2f} GB, peak {used / 1e9:.2f} GB beyond the "
            f"{result['before'] / 1e9:.2f} GB of JAX, {used / size:.2f} times the "
            f"file; {result['seconds']:.1f} s; progress told "
            f"{result['told'][0]} times",
            flush=True,
        )


if __name__ == "__main__":
    main()
