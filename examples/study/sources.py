"""The source of Python's standard library as bytes, some files held out.

Which files validate follows from their names, so that nearly the same ones do under
another version of Python. The text differs between versions: the digest says so.
"""

import hashlib
import sysconfig
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

PACKAGES = (
    *("asyncio", "collections", "concurrent", "ctypes", "email", "html", "http"),
    *("importlib", "json", "logging", "multiprocessing", "unittest", "urllib", "xml"),
)
"""Packages of the library that are read beside its single modules."""


class Text(NamedTuple):
    """Files one after the other.

    Attributes:
        train: `[N]`, uint8.
        held_out: `[M]`, uint8.
        train_files: names of the files in `train`.
        held_out_files: names of those in `held_out`.
        digest: a hash of all of it.
    """

    train: np.ndarray
    held_out: np.ndarray
    train_files: tuple[str, ...]
    held_out_files: tuple[str, ...]
    digest: str


@lru_cache
def load() -> Text:
    """Read the running Python's own library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [
        # The file of build settings holds what differs between machines.
        *(path for path in root.glob("*.py") if "_sysconfigdata" not in path.name),
        *(path for name in PACKAGES for path in (root / name).rglob("*.py")),
    ]
    found = {path.relative_to(root).as_posix(): path for path in paths}
    names = sorted(name for name in found if "test" not in Path(name).parts[:-1])
    groups = {False: [], True: []}
    for name in names:
        groups[is_held_out(name)].append(name)
    train, held_out = (
        b"\n".join(found[name].read_bytes() for name in groups[which])
        for which in (False, True)
    )
    return Text(
        np.frombuffer(train, np.uint8),
        np.frombuffer(held_out, np.uint8),
        tuple(groups[False]),
        tuple(groups[True]),
        hashlib.sha256(train + held_out).hexdigest()[:16],
    )


def is_held_out(name: str) -> bool:
    """Whether a file validates: every tenth, by a hash of its name."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == 0
