"""The file format of an exported sampler.

The file is a zip of `program.bin`, one `.npy` per array, `signature.json` and
`README.txt`, which shows how to run it with JAX and NumPy alone. JAX reads programs
with the FlatBuffers runtime, which it does not install, so the zip carries that small
package too. Nothing in it is pickled.

`SHA256SUMS` has the digest of every other member, in the form that `sha256sum -c`
reads. A zip's own checksum holds for the bytes that its directory points at, whatever
they are; the digests say that they are the ones that were written.
"""

import hashlib
import io
import json
import os
import struct
import zipfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array

from fusionopt_jax.dit.files import replacing

FORMAT = "fusionopt_jax sampler 2"
"""First entry of `signature.json`; a reader refuses any other."""

DIGESTS = "SHA256SUMS"
"""The member that holds the digests of the others."""

README = """\
A sampler of a diffusion transformer, to be run with JAX and NumPy alone:

import io, json, sys, zipfile
import jax, numpy as np
from jax import export

sys.path.append("sampler.zip")    # the flatbuffers package, if there is none
with zipfile.ZipFile("sampler.zip") as file:
    signature = json.loads(file.read("signature.json"))
    program = export.deserialize(bytearray(file.read("program.bin")))
    arrays = [
        np.load(io.BytesIO(file.read(a["file"]))).view(jax.numpy.dtype(a["dtype"]))
        for a in signature["arrays"]
    ]
noise = np.random.default_rng(0).standard_normal(
    (2, *signature["image_shape"]), dtype=np.float32
)
labels = np.array(signature["labels"][:1] * 2, np.int32)
inputs = [arrays, noise, labels, np.float32(4.0)]    # 4.0: guidance scale
if signature["needs_key"]:
    inputs.append(np.array([0, 1], np.uint32))       # key data
images = np.asarray(jax.jit(program.call)(*inputs))

Only the labels in signature.json can be asked for; any other gives NaN.
To see whether the file is whole, unpack it and run: sha256sum -c SHA256SUMS
As with any program, run only files that you trust.

The folder flatbuffers is the FlatBuffers runtime (https://github.com/google/flatbuffers,
Apache License 2.0), unchanged.
"""


def write_archive(
    path: str | os.PathLike[str],
    signature: Mapping[str, Any],
    program: export.Exported,
    named: Sequence[tuple[str, Array]],
) -> None:
    """Write the file, whole or not at all.

    Args:
        path: Where to.
        signature: What the file says of itself; format and arrays are added.
        program: What `jax.export` returned.
        named: The program's arrays, in the order of its arguments, with names.

    Raises:
        ImportError: If FlatBuffers is not installed.
        OSError: If the file can't be written.

    Example:
        See :func:`read_archive`.
    """
    runtime = _flatbuffers_files()
    entries = [
        {"name": name, "file": f"arrays/{index}.npy", "dtype": array.dtype.name}
        for index, (name, array) in enumerate(named)
    ]
    signature = {"format": FORMAT, **signature, "arrays": entries}
    digests = {}
    with replacing(path) as stream, zipfile.ZipFile(stream, "w") as file:

        def add(name: str, content: bytes) -> None:
            """One member and its digest."""
            digests[name] = hashlib.sha256(content).hexdigest()
            file.writestr(name, content)

        add("README.txt", README.encode())
        add("signature.json", json.dumps(signature, indent=1).encode())
        add("program.bin", bytes(program.serialize()))
        for entry, (_, array) in zip(entries, named, strict=True):
            add(entry["file"], _array_bytes(array))
        for name, content in runtime.items():
            add(name, content)
        lines = [f"{digest}  {name}\n" for name, digest in digests.items()]
        file.writestr(DIGESTS, "".join(lines))


def read_archive(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Any], export.Exported, list[Array]]:
    """Read what :func:`write_archive` wrote.

    Args:
        path: The file.

    Returns:
        Signature, program and arrays.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If FlatBuffers is not installed.
        ValueError: If it is another kind of file, or damaged.

    Example:
        >>> import jax, pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "sampler.zip"
        ...     ones = jnp.ones(2)
        ...     program = export.export(jax.jit(jnp.sum))(ones)
        ...     write_archive(path, {}, program, [("kernel", ones)])
        ...     signature, program, arrays = read_archive(path)
        >>> signature["arrays"]
        [{'name': 'kernel', 'file': 'arrays/0.npy', 'dtype': 'float32'}]
        >>> program.call(*arrays)
        Array(2., dtype=float32)
    """
    _flatbuffers_files()
    with open(path, "rb") as stream:
        try:
            members = _read_members(stream)
            signature = json.loads(members["signature.json"])
            if signature.get("format") != FORMAT:
                raise ValueError(
                    f"its format is {signature.get('format')!r}, not {FORMAT!r}"
                )
        except _DAMAGE as error:
            raise ValueError(
                f"{os.fspath(path)} is not a sampler that this version's "
                f"`export_sampler` wrote, or is damaged: {error}; export it again."
            ) from error
    program = export.deserialize(bytearray(members["program.bin"]))
    arrays = [
        _read_array(members.pop(entry["file"]), entry["dtype"])
        for entry in signature["arrays"]
    ]
    return signature, program, arrays


# What reading a zip raises where bytes are not what a writer would have written, and
# what a signature does that is none.
_DAMAGE = (
    zipfile.BadZipFile,
    RuntimeError,
    EOFError,
    struct.error,
    ValueError,
    KeyError,
    AttributeError,
)


def _read_members(stream: BinaryIO) -> dict[str, bytes]:
    """Every member but the digests, each the one that was written."""
    with zipfile.ZipFile(stream) as file:
        for member in file.infolist():
            # Nothing here is compressed, so nothing can unfold to more than the file.
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{member.filename} is compressed")
        lines = file.read(DIGESTS).decode().splitlines()
        digests = {line[66:]: line[:64] for line in lines}
        if sorted([*digests, DIGESTS]) != sorted(file.namelist()):
            raise ValueError(f"its members are not those that {DIGESTS} lists")
        members = {name: file.read(name) for name in digests}
    for name, content in members.items():
        if hashlib.sha256(content).hexdigest() != digests[name]:
            raise ValueError(f"{name} does not have the digest that {DIGESTS} lists")
    return members


def _flatbuffers_files() -> dict[str, bytes]:
    """The FlatBuffers runtime: Python files and its metadata, by path."""
    try:
        files = metadata.files("flatbuffers") or []
    except metadata.PackageNotFoundError as error:
        raise ImportError(
            "programs are written and read with flatbuffers, which is not installed; "
            'install the extra `dit`: pip install "fusionopt-jax[dit]".'
        ) from error
    kept = [f for f in files if f.suffix == ".py" or f.name == "METADATA"]
    return {f.as_posix(): f.read_binary() for f in kept}


def _array_bytes(array: Array) -> bytes:
    """An array in NumPy's file format; bfloat16, which it lacks, as its bits."""
    host = np.asarray(array)
    if host.dtype.kind not in "fiub" or host.dtype.name == "bfloat16":
        host = host.view(f"u{host.dtype.itemsize}")
    buffer = io.BytesIO()
    np.save(buffer, host, allow_pickle=False)
    return buffer.getvalue()


def _read_array(data: bytes, dtype: str) -> Array:
    """An array back from NumPy's file format."""
    return jnp.asarray(
        np.load(io.BytesIO(data), allow_pickle=False).view(jnp.dtype(dtype))
    )
