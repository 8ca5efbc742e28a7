"""Named arrays out of weight files of any known format, none of which is executed."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

from fusionopt_jax.dit.weights.npz_file import read_npz
from fusionopt_jax.dit.weights.pt_file import read_pt
from fusionopt_jax.dit.weights.reader import Reader, Stored
from fusionopt_jax.dit.weights.safetensors_file import read_safetensors

FORMATS: dict[str, Reader] = {
    ".pt": read_pt,
    ".pth": read_pt,
    ".ckpt": read_pt,
    ".bin": read_pt,
    ".safetensors": read_safetensors,
    ".npz": read_npz,
}
"""What reads a file, by its ending; a new format is a module and a line here."""

_ENTRIES = ("ema", "model", "state_dict")
"""Where training checkpoints keep weights, the preferred ones first."""

Progress: TypeAlias = Callable[[int, int], Any]
"""Is told the bytes that have been read, and all that will be."""


class Weights(Mapping[str, Any]):
    """Named arrays of which each is read when it is asked for, at every time anew.

    So the memory that a file takes is that of one array. An array comes as fp32; one
    that holds anything but finite numbers is an error.

    Args:
        stored: The arrays, none of which has been read.

    Example:
        >>> weights = read_weights({"bias": np.zeros(2, np.float16)})
        >>> weights.shapes, weights["bias"]
        ({'bias': (2,)}, array([0., 0.], dtype=float32))
    """

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self._stored = dict(stored)

    def __getitem__(self, name: str) -> np.ndarray:
        """Read one array.

        Raises:
            ValueError: If the file turns out to be damaged, or the values not finite.
        """
        array = np.asarray(self._stored[name].read(), np.float32)
        if not np.all(np.isfinite(array)):
            raise ValueError(
                listed(
                    "these weights can't be used",
                    [f"{name} holds values that are not finite"],
                )
            )
        return array

    def __iter__(self) -> Iterator[str]:
        """The names, as the file has them."""
        return iter(self._stored)

    def __len__(self) -> int:
        """The number of arrays."""
        return len(self._stored)

    def __contains__(self, name: object) -> bool:
        """Whether there is an array of this name, without reading it."""
        return name in self._stored

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every array, without reading any."""
        return {name: one.shape for name, one in self._stored.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays as they are stored."""
        return sum(one.nbytes for one in self._stored.values())

    def renamed(self, names: Mapping[str, Sequence[str]]) -> "Weights":
        """Some of the arrays under other names.

        Args:
            names: From each new name to those here; the arrays of several are laid one
                after another along their first axis. What is not named is left out.

        Returns:
            The weights, still unread.

        Example:
            >>> weights = read_weights({"a": np.zeros(2), "b": np.ones(1)})
            >>> weights.renamed({"ab": ["a", "b"]})["ab"].tolist()
            [0.0, 0.0, 1.0]
        """
        return Weights(
            {
                new: _concatenated([self._stored[name] for name in old])
                for new, old in names.items()
            }
        )

    def reporting(self, progress: Progress | None) -> "Weights":
        """The same weights, which say how far the reading is.

        Args:
            progress: Called after each array with the bytes that have been read and
                the bytes of all arrays, as they are stored; None calls nothing.

        Returns:
            The weights, still unread.

        Example:
            >>> weights = read_weights({"a": np.zeros(2), "b": np.ones(2)})
            >>> told = weights.reporting(lambda done, total: print(done, "of", total))
            >>> _ = told["a"], told["b"]
            16 of 32
            32 of 32
        """
        if progress is None:
            return self
        total, done = self.nbytes, 0

        def read(one: Stored) -> np.ndarray:
            """Read an array, and count it."""
            nonlocal done
            array = one.read()
            done += one.nbytes
            progress(done, total)
            return array

        return Weights(
            {
                name: dataclasses.replace(one, read=functools.partial(read, one))
                for name, one in self._stored.items()
            }
        )


def read_weights(
    source: Mapping[str, Any] | str | os.PathLike[str],
    entry: str | None = None,
    used: Callable[[Mapping[str, Any]], Iterable[str]] = list,
) -> Weights:
    """Find named arrays in a file, or in a dict in memory.

    Args:
        source: A dict from names to arrays (NumPy, JAX or PyTorch), or a file: `.pt`,
            `.pth`, `.ckpt` or `.bin` (what `torch.save` writes), `.safetensors` (needs
            safetensors), or `.npz`.
        entry: Which part of a training checkpoint to take. None takes "ema", else
            "model", else "state_dict", else all of it.
        used: From what is there by name to the names that are wanted; the others are
            left out, whatever they are.

    Returns:
        The arrays, of which each is read when it is asked for.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If safetensors is needed and missing.
        ValueError: If the file is damaged, unfinished or no weight file, if its ending
            is that of another format, if there is no such entry, or if what is wanted
            are no floating-point numbers.

    Example:
        >>> dict(read_weights({"ema": {"bias": np.zeros(2, np.float16)}}))
        {'bias': array([0., 0.], dtype=float32)}
    """
    if isinstance(source, str | os.PathLike):
        content = open_file(pathlib.Path(source), entry)
    else:
        content = _choose_entry(source, entry, "`state_dict`")
    return join([{name: content[name] for name in used(content)}])


def open_file(path: pathlib.Path, entry: str | None = None) -> Mapping[str, Any]:
    """What a weight file holds, by name; no array is read.

    Args:
        path: The file.
        entry: As for :func:`read_weights`.

    Returns:
        A `Stored` for each array, and what else stands beside them.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If safetensors is needed and missing.
        ValueError: As for :func:`read_weights`.

    Example:
        >>> open_file(pathlib.Path("nowhere.bin"))
        Traceback (most recent call last):
        ...
        FileNotFoundError: there is no weight file nowhere.bin.
    """
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder; `from_diffusers` reads those that save_pretrained "
            "wrote."
        )
    if not path.is_file():
        raise FileNotFoundError(f"there is no weight file {path}.")
    read = FORMATS.get(path.suffix.lower())
    if read is None:
        *others, last = FORMATS
        raise ValueError(
            f"{path} must end in {', '.join(others)} or {last}, so that its format is "
            "known."
        )
    _check_content(path)
    return read(path, lambda held: _choose_entry(held, entry, str(path)))


def join(parts: Iterable[Mapping[str, Any]]) -> Weights:
    """The arrays of several files, or of dicts in memory, as one.

    Args:
        parts: Values by name; a `Stored`, or an array of NumPy, JAX or PyTorch.

    Returns:
        The weights, none of which has been read.

    Raises:
        ValueError: If anything is no array of floating-point numbers.

    Example:
        >>> list(join([{"a": np.zeros(2)}, {"b": np.ones(2)}]))
        ['a', 'b']
    """
    stored, wrong = {}, []
    for part in parts:
        for name, value in part.items():
            one = _as_stored(value)
            if one is None or not jnp.issubdtype(one.dtype, jnp.floating):
                kind = type(value).__name__ if one is None else str(np.dtype(one.dtype))
                wrong.append(f"{name} is {kind} instead of floating point")
            else:
                stored[name] = one
    if wrong:
        raise ValueError(listed("these weights can't be used", wrong))
    return Weights(stored)


def _as_stored(value: Any) -> Stored | None:
    """An array of any kind; None if it is none."""
    if isinstance(value, Stored):
        return value
    if hasattr(value, "detach"):
        # A PyTorch tensor: NumPy reads neither bfloat16 nor gradients from one.
        def read_tensor() -> np.ndarray:
            """Its values."""
            return value.detach().float().cpu().numpy()

        return Stored(tuple(value.shape), np.float32, read_tensor)
    if hasattr(value, "dtype"):
        read = functools.partial(np.asarray, value)
        return Stored(np.shape(value), value.dtype, read)
    return None


_POINTER = b"version https://git-lfs.github.com/spec/"


def _check_content(path: pathlib.Path) -> None:
    """Refuse what is no weight file, or one of another format than its name says."""
    with path.open("rb") as stream:
        head = stream.read(64)
    if not head:
        raise ValueError(f"{path} is empty; fetch it again.")
    if head.startswith(_POINTER):
        raise ValueError(
            f"{path} is a pointer of Git LFS in the place of the weights; fetch the "
            'file itself, with "git lfs pull".'
        )
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise ValueError(
            f"{path} is a web page in the place of the weights; fetch the file itself."
        )
    named = path.suffix.lower() == ".safetensors"
    if named and head.startswith(b"PK\x03\x04"):
        raise ValueError(
            f"{path} is a PyTorch or .npz file by its content; rename it to end in "
            ".bin or .npz."
        )
    if not named and head[8:9] == b"{":
        raise ValueError(
            f"{path} is a .safetensors file by its content; rename it to end in "
            ".safetensors."
        )


def _concatenated(parts: list[Stored]) -> Stored:
    """Several arrays of one type as one, along their first axis."""
    first = parts[0]
    if len(parts) == 1:
        return first

    def read() -> np.ndarray:
        """Read all of them."""
        return np.concatenate([part.read() for part in parts])

    length = sum(part.shape[0] for part in parts)
    return Stored((length, *first.shape[1:]), first.dtype, read)


def _choose_entry(content: Any, entry: str | None, source: str) -> Mapping[str, Any]:
    """The state dict inside a checkpoint."""
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{source} holds a {type(content).__name__} instead of a dict of weights; "
            "save model.state_dict()."
        )
    if entry is None:
        nested = [key for key in _ENTRIES if isinstance(content.get(key), Mapping)]
        content = content[nested[0]] if nested else content
    elif isinstance(content.get(entry), Mapping):
        content = content[entry]
    else:
        names = [str(key) for key in content if isinstance(content[key], Mapping)]
        raise ValueError(
            f"{source} has no `entry` {entry!r}; "
            + (
                f"it has {', '.join(names)}."
                if names
                else "it is one plain state dict."
            )
        )
    wrong = [key for key in content if not isinstance(key, str)]
    if wrong:
        raise ValueError(f"{source} has names that are not text, such as {wrong[0]!r}.")
    return content


def listed(title: str, lines: list[str]) -> str:
    """A title and its lines, the first twenty of them.

    Args:
        title: What is wrong.
        lines: Where.

    Returns:
        A text of several lines for an error message.

    Example:
        >>> print(listed("missing", ["pos_embed"]))
        missing:
          pos_embed
    """
    more = [f"and {len(lines) - 20} more"] if len(lines) > 20 else []
    return "\n  ".join([f"{title}:", *lines[:20], *more])
