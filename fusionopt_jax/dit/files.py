"""Files that appear whole or not at all, and archives that do not swell when read."""

import contextlib
import io
import os
import pathlib
import tempfile
import zipfile
from collections.abc import Iterator
from typing import BinaryIO

SWELL_FACTOR = 8
"""How many bytes of arrays one byte of a file may stand for.

Weights hardly compress; half-precision ones doubled in a file of fp32 come to four.
"""

SWELL_FREE = 64 * 2**20
"""Bytes that a file of any size may hold: small models can be full of zeros."""


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A stream whose content takes the place of a file once it is complete.

    Args:
        path: The file. What it holds stays as it is until the end, and for good if
            anything fails.

    Yields:
        A binary stream to write to.

    Raises:
        OSError: If the file can't be written.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "a"
        ...     with replacing(path) as stream:
        ...         written = stream.write(b"whole")
        ...     path.read_bytes()
        b'whole'
    """
    path = pathlib.Path(path)
    # In the same folder, since only a rename within one file system is atomic.
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(scratch, path)
    except BaseException:
        pathlib.Path(scratch).unlink(missing_ok=True)
        raise


def check_swelling(declared: int, stored: int) -> None:
    """Refuse what would take far more memory than its file has bytes.

    Args:
        declared: Bytes that the file says it holds, read before any of them.
        stored: Bytes of the file.

    Raises:
        ValueError: If they are more than `SWELL_FACTOR` times those of the file, and
            more than `SWELL_FREE` on top.

    Example:
        >>> check_swelling(3 * 2**30, 2**30)
        >>> check_swelling(3 * 2**30, 2**20)
        Traceback (most recent call last):
        ...
        ValueError: it claims 3,221,225,472 bytes in a file of 1,048,576
    """
    if declared > SWELL_FACTOR * stored + SWELL_FREE:
        raise ValueError(f"it claims {declared:,} bytes in a file of {stored:,}")


def check_archive(stream: io.BufferedIOBase) -> None:
    """Refuse a zip archive whose entries would swell, before any is read.

    Reading stops where an entry has given as many bytes as it declares, so what is
    declared bounds the memory.

    Args:
        stream: The archive, from its start; it is put back there.

    Raises:
        ValueError: If the entries claim far more than the file has.
        zipfile.BadZipFile: If it is no zip archive.

    Example:
        >>> with tempfile.TemporaryFile() as stream:
        ...     with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        ...         archive.writestr("zeros", bytes(2**27))
        ...     check_archive(stream)
        Traceback (most recent call last):
        ...
        ValueError: it claims 134,217,728 bytes in a file of 130,...
    """
    stored = stream.seek(0, os.SEEK_END)
    with zipfile.ZipFile(stream) as archive:
        declared = sum(entry.file_size for entry in archive.infolist())
    check_swelling(declared, stored)
    stream.seek(0)
