"""The files of a run: whole or not there, and written by one process at a time."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from dit_training.errors import RunError


def write_whole(path: Path, text: str) -> None:
    """Write a file beside the old one and rename it, so that one of them is whole."""
    beside = path.with_name(f".{path.name}.new")
    try:
        with beside.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise RunError(
            f"{path} cannot be written ({error.strerror}), and is as it was; make room "
            "or correct its permissions, and repeat the command"
        ) from error


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder, which is made if it isn't there.

    The lock is the operating system's: it ends with the process, however that ends.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("w")
    except OSError as error:
        raise RunError(
            f"--out {folder}: cannot be made or written to ({error.strerror}); give "
            "another folder"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(
                f"--out {folder}: another run is writing to it; wait until it has "
                "ended, or give another folder"
            ) from error
        yield
