"""The folders of runs: which to take, one writer each, files that are whole."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from dit_training.errors import RunError

RUNS = Path("runs")
"""Where a run goes that names no folder."""


def write_whole(path: Path, content: str | Callable[[BinaryIO], object]) -> None:
    """Write a file beside the old one and rename it, so that one of them is whole.

    `content` is its text, or what writes bytes into it.
    """
    beside = path.with_name(f".{path.name}.new")
    try:
        with beside.open("wb") as file:
            if isinstance(content, str):
                file.write(content.encode())
            else:
                content(file)
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


def has_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a finished checkpoint."""
    checkpoints = folder / "checkpoints"
    return checkpoints.is_dir() and any(
        entry.name.isdigit() for entry in checkpoints.iterdir()
    )


def newest_run() -> Path:
    """The run under `runs/` that wrote a checkpoint last."""
    found = [folder for folder in RUNS.glob("*") if has_checkpoint(folder)]
    if not found:
        raise RunError(
            f"--resume: no run with a checkpoint under {RUNS}/; name its folder with "
            "--out"
        )
    return max(found, key=lambda folder: (folder / "checkpoints").stat().st_mtime)


def free_folder(optimizer: str) -> Path:
    """The first of runs/dit-fusion, runs/dit-fusion-2, ... that holds no run."""
    folder, number = RUNS / f"dit-{optimizer}", 1
    while has_checkpoint(folder):
        number += 1
        folder = RUNS / f"dit-{optimizer}-{number}"
    return folder
