"""Read the tensors of a `.pt` file without PyTorch and without running what is in it.

Such a file is a zip archive: a pickle that describes a tree of tensors, and one entry
of raw bytes per storage. A pickle is a program, so an unknown one must not simply be
run. Three fences stand here: the opcodes are scanned first, and unusual ones or memory
claims beyond the file's size are refused; the only names that the pickle can reach are
a handful of stand-ins defined below, which it can't change; and what it builds are
descriptions of tensors, whose bytes are read afterwards, once their sizes have been
checked against the archive.
"""

import functools
import io
import math
import pathlib
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from fusionopt_jax.dit.files import check_swelling
from fusionopt_jax.dit.weights.reader import Choose, Stored

_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

_STORAGES: dict[str, Any] = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}

_OPCODES = frozenset(
    {
        "PROTO",
        "FRAME",
        "STOP",
        "MARK",
        "POP",
        "POP_MARK",
        "NONE",
        "NEWTRUE",
        "NEWFALSE",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG1",
        "BINFLOAT",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "SHORT_BINBYTES",
        "BINBYTES",
        "EMPTY_TUPLE",
        "TUPLE",
        "TUPLE1",
        "TUPLE2",
        "TUPLE3",
        "EMPTY_LIST",
        "APPEND",
        "APPENDS",
        "EMPTY_DICT",
        "SETITEM",
        "SETITEMS",
        "BINPUT",
        "LONG_BINPUT",
        "MEMOIZE",
        "BINGET",
        "LONG_BINGET",
        "GLOBAL",
        "STACK_GLOBAL",
        "REDUCE",
        "NEWOBJ",
        "BUILD",
        "BINPERSID",
    }
)
"""What `torch.save` writes; among others no EXT, which reaches a global registry."""


class _Storage(NamedTuple):
    """Where the bytes of a tensor lie."""

    dtype: Any
    key: str
    size: int


class TensorRecord(NamedTuple):
    """A tensor as the pickle describes it; its bytes are not read yet."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _StorageKind(NamedTuple):
    """Stands for a storage class; not callable, so a pickle can't build one."""

    dtype: Any


class _Weights(dict[Any, Any]):
    """Stands for `collections.OrderedDict`, whose attributes are of no interest."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """Ignore the attributes, so that none can hide a method."""


class _Settings:
    """Stands for `argparse.Namespace`, which training scripts save beside weights."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """Ignore the attributes."""


class _Function(NamedTuple):
    """A function that a pickle can call but not change."""

    run: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        """Call it."""
        return self.run(*args)


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, *_: Any
) -> TensorRecord:
    """Describe a tensor, if its description is sound."""
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or len(shape) != len(strides):
        raise ValueError("a tensor has no storage, or a shape without strides")
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError("a tensor has sizes that are not non-negative integers")
    count = math.prod(shape)
    reach = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    # A view that repeats elements could claim far more memory than the file has bytes.
    if count > storage.size or (count and reach >= storage.size):
        raise ValueError("a tensor reaches beyond its storage")
    return TensorRecord(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    """A parameter is its tensor."""
    return tensor


_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Weights,
    ("argparse", "Namespace"): _Settings,
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Function(_rebuild_parameter),
    **{("torch", name): _StorageKind(dtype) for name, dtype in _STORAGES.items()},
}


class _Reader(pickle.Unpickler):
    """An unpickler that knows the names in `_NAMES` and no others."""

    def find_class(self, module: str, name: str, /) -> Any:
        """A stand-in; an error for every other name."""
        if (module, name) not in _NAMES:
            raise ValueError(
                f"it asks for {module}.{name}, which is no part of a tensor file"
            )
        return _NAMES[module, name]

    def persistent_load(self, pid: Any, /) -> _Storage:
        """Describe a storage; its bytes stay in the archive."""
        tag, kind, key, _, size = pid
        sound = isinstance(kind, _StorageKind) and isinstance(key, str)
        if tag != "storage" or not sound or type(size) is not int or size < 0:
            raise ValueError("a storage is described wrongly")
        return _Storage(kind.dtype, key, size)


def _scan(program: bytes) -> None:
    """Refuse unusual opcodes, and memo indices that claim memory out of nothing."""
    for opcode, argument, _ in pickletools.genops(program):
        if opcode.name not in _OPCODES:
            raise ValueError(f"it uses the pickle opcode {opcode.name}")
        claims_memory = opcode.name in ("BINPUT", "LONG_BINPUT")
        if claims_memory and (argument or 0) > len(program):
            raise ValueError("it claims more memory than it could use")


class TorchFile:
    """An open `.pt` archive.

    Args:
        path: The file.

    Attributes:
        content: What the file holds: usually a dict, with a `TensorRecord` in the place
            of every tensor.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no such archive, is damaged, or holds anything but tensors,
            numbers, text, lists, dicts and saved arguments.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        with path.open("rb") as stream:
            head = stream.read(len(_LEGACY_MAGIC))
        if head == _LEGACY_MAGIC:
            raise ValueError(
                f"{path} is in PyTorch's legacy format (before version 1.6); load it "
                "in PyTorch and save it again with torch.save, or as .safetensors."
            )
        try:
            self._archive = zipfile.ZipFile(path)
            self._folder = self._find_folder()
            self._order = self._byte_order()
            program = self._read(f"{self._folder}/data.pkl")
            _scan(program)
            self.content = _Reader(io.BytesIO(program)).load()
        except Exception as error:
            # Hostile or damaged bytes can fail anywhere: zip, struct, Unicode, pickle.
            self.close()
            damage = isinstance(error, zipfile.BadZipFile)
            remedy = "; it may be cut off, so fetch it again" if damage else ""
            raise ValueError(
                f"{path} is not a readable PyTorch file: {error}{remedy}."
            ) from error

    def close(self) -> None:
        """Close the archive."""
        archive = getattr(self, "_archive", None)
        if archive is not None:
            archive.close()

    def __enter__(self) -> "TorchFile":
        """The file itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the archive."""
        self.close()

    def check_size(self, values: Iterable[Any]) -> None:
        """Refuse tensors whose bytes are missing, or that take far more than there are.

        Many tensors can share one storage, and each becomes an array of its own.

        Args:
            values: What will be read; anything but a `TensorRecord` takes nothing.

        Raises:
            ValueError: If one claims other bytes than its storage has, or all of them
                far more than the file.
        """
        records = [value for value in values if isinstance(value, TensorRecord)]
        # Read as fp32; before that, the whole storage of one at a time.
        declared = sum(
            math.prod(record.shape) * np.dtype(np.float32).itemsize
            for record in records
        )
        try:
            for record in records:
                self._check_storage(record.storage)
            check_swelling(declared, self._path.stat().st_size)
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{self._path} is not a readable PyTorch file: {error}."
            ) from error

    def array(self, record: TensorRecord) -> np.ndarray:
        """The values of a tensor."""
        storage = record.storage
        try:
            self._check_storage(storage)
            data = self._read(f"{self._folder}/data/{storage.key}")
        except Exception as error:
            raise ValueError(
                f"{self._path} is not a readable PyTorch file: {error}."
            ) from error
        dtype = np.dtype(storage.dtype)
        values = np.frombuffer(data, dtype.newbyteorder(self._order))
        strides = tuple(step * dtype.itemsize for step in record.strides)
        return np.lib.stride_tricks.as_strided(
            values[record.offset :], record.shape, strides, writeable=False
        )

    def _check_storage(self, storage: _Storage) -> None:
        """Require the bytes that a storage claims, without reading them."""
        held = self._archive.getinfo(f"{self._folder}/data/{storage.key}").file_size
        claimed = storage.size * np.dtype(storage.dtype).itemsize
        if held != claimed:
            raise ValueError(
                f"storage {storage.key!r} has {held} bytes instead of {claimed}"
            )

    def _find_folder(self) -> str:
        """The archive's only top folder."""
        names = [name for name in self._archive.namelist() if name.count("/") == 1]
        folders = [
            name.removesuffix("/data.pkl")
            for name in names
            if name.endswith("/data.pkl")
        ]
        if len(folders) != 1:
            raise ValueError("the archive has no data.pkl, or several")
        return folders[0]

    def _byte_order(self) -> Any:
        """Byte order of the storages; files before PyTorch 2.1 do not name it."""
        name = f"{self._folder}/byteorder"
        if name not in self._archive.namelist():
            return "<"
        order = self._read(name)
        if order not in (b"little", b"big"):
            raise ValueError(f"unknown byte order {order!r}")
        return "<" if order == b"little" else ">"

    def _read(self, name: str) -> bytes:
        """One entry; PyTorch stores them uncompressed, so none can swell."""
        entry = self._archive.getinfo(name)
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"entry {name!r} is compressed")
        return self._archive.read(entry)


def read_pt(path: pathlib.Path, choose: Choose) -> Mapping[str, Any]:
    """The arrays of a `.pt` file, or of one that `torch.save` wrote as `.bin`.

    Args:
        path: The file.
        choose: What to take of it.

    Returns:
        A `Stored` by name, and what else stands beside them.

    Raises:
        ValueError: As :class:`TorchFile` does.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "weights.pt"
        ...     with zipfile.ZipFile(path, "w") as file:
        ...         file.writestr("weights/data.pkl", pickle.dumps({"step": 3}, 2))
        ...     read_pt(path, lambda content: content)
        {'step': 3}
    """
    # Closed with the last of the arrays that it gives.
    file = TorchFile(path)
    chosen = choose(file.content)
    file.check_size(chosen.values())
    return {
        name: Stored(
            value.shape, value.storage.dtype, functools.partial(file.array, value)
        )
        if isinstance(value, TensorRecord)
        else value
        for name, value in chosen.items()
    }
