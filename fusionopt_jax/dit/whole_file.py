"""Files that appear whole or not at all."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import BinaryIO


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
