"""Folders as `save_pretrained` of diffusers writes them: a config beside weights."""

import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from fusionopt_jax.dit.weights.files import Weights, join, listed, open_file

STEM = "diffusion_pytorch_model"
"""How the names of weight files begin."""

CONFIG_NAME = "config.json"

_SINGLE = re.compile(rf"{STEM}(?:\.(?P<variant>[^.]+))?\.(?P<format>safetensors|bin)")
_INDEX = re.compile(
    rf"{STEM}(?:\.(?P<front>[^.]+))?\.(?P<format>safetensors|bin)"
    r"(?:\.(?P<middle>[^.]+))?\.index(?:\.(?P<back>[^.]+))?\.json"
)
_UNFINISHED = (".incomplete", ".part", ".crdownload", ".download", ".tmp")


def read_folder(
    source: str | os.PathLike[str], part: str
) -> tuple[Weights, dict[str, Any]]:
    """Find the weights and the config of a part of a pipeline; no array is read yet.

    Args:
        source: The folder of a pipeline, with a folder of the part in it, or the part's
            own, which holds a `config.json` and one of these: a file
            `diffusion_pytorch_model.safetensors` or `.bin`; several of them with an
            index (`diffusion_pytorch_model.safetensors.index.json`); a variant of
            either, such as `diffusion_pytorch_model.fp16.safetensors`. Of several,
            `.safetensors` comes before `.bin`, and a variant is taken where there is
            nothing else.
        part: Its name, such as "transformer" or "vae".

    Returns:
        The arrays by name, each of which is read when it is asked for and comes as
        finite fp32, and what `config.json` says.

    Raises:
        FileNotFoundError: If there is no such folder, or if the config or the weights
            are missing from it, or some of the files that an index names.
        ImportError: If safetensors is needed and missing.
        ValueError: If anything is damaged, unfinished, or another kind of file than its
            name says, or if there are several variants to choose from.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from safetensors.numpy import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     vae = pathlib.Path(folder) / "vae"
        ...     vae.mkdir()
        ...     _ = (vae / "config.json").write_text('{"sample_size": 8}')
        ...     path = vae / "diffusion_pytorch_model.safetensors"
        ...     save_file({"bias": np.zeros(2, np.float32)}, path)
        ...     weights, config = read_folder(folder, "vae")
        ...     weights["bias"], config
        (array([0., 0.], dtype=float32), {'sample_size': 8})
    """
    folder = _part_folder(pathlib.Path(source), part)
    config = read_json(folder / CONFIG_NAME)
    chosen = _choose_file(folder)
    if chosen.suffix != ".json":
        return join([open_file(chosen)]), config
    return _read_shards(chosen), config


def _part_folder(source: pathlib.Path, part: str) -> pathlib.Path:
    """The folder of the part, which has a config."""
    if source.is_file():
        raise ValueError(
            f"{source} is a file; give the folder that holds it and its {CONFIG_NAME}."
        )
    if not source.is_dir():
        raise FileNotFoundError(f"there is no folder {source}.")
    inner = source / part
    if inner.is_dir():
        if not (inner / CONFIG_NAME).is_file():
            raise FileNotFoundError(
                f"{inner} has no {CONFIG_NAME}; fetch it too: it says how large the "
                "model is."
            )
        return inner
    if (source / CONFIG_NAME).is_file():
        return source
    held = ", ".join(sorted(path.name for path in source.iterdir())[:8])
    raise FileNotFoundError(
        f"{source} has neither a folder {part!r} nor a {CONFIG_NAME}; give the folder "
        f"of a pipeline as save_pretrained writes it, or that of its {part} (it holds "
        f"{held or 'nothing'})."
    )


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON file that holds one object.

    Args:
        path: The file.

    Returns:
        What is in it.

    Raises:
        ValueError: If it is damaged, or holds something other than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); fetch it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, no settings.")
    return content


def _choose_file(folder: pathlib.Path) -> pathlib.Path:
    """The weight file, or the index of several."""
    found: dict[str, dict[tuple[bool, bool], pathlib.Path]] = {}
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    for name in names:
        single, index = _SINGLE.fullmatch(name), _INDEX.fullmatch(name)
        match = single or index
        # A file of a set is named by the index alone.
        if match is None or (single and re.search(r"-\d+-of-\d+", name)):
            continue
        groups = match.groupdict()
        kinds = ("variant", "front", "middle", "back")
        variant = next((groups[kind] for kind in kinds if groups.get(kind)), "")
        order = (match["format"] != "safetensors", single is None)
        found.setdefault(variant, {})[order] = folder / name
    if not found:
        raise FileNotFoundError(_nothing_found(folder, names))
    if "" not in found and len(found) > 1:
        raise ValueError(
            f"{folder} has several variants of its weights and no plain one: "
            f"{', '.join(found)}; leave one of them in it."
        )
    of_variant = found.get("") or next(iter(found.values()))
    return of_variant[min(of_variant)]


def _nothing_found(folder: pathlib.Path, names: list[str]) -> str:
    """What to say where no weight file has a usual name."""
    text = f"{folder} has no {STEM}.safetensors or {STEM}.bin"
    parts = [name for name in names if re.search(r"-\d+-of-\d+", name)]
    unfinished = [name for name in names if name.endswith(_UNFINISHED)]
    if parts:
        return f"{text}.index.json, which says what is in {parts[0]}; fetch it too."
    if unfinished:
        return f"{text}, but the unfinished {unfinished[0]}; fetch it to its end."
    return f"{text} (it holds {', '.join(names[:8]) or 'no file'}); fetch it too."


def _read_shards(index: pathlib.Path) -> Weights:
    """The arrays of all files that an index names."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, Mapping) or not where:
        raise ValueError(f"{index} has no `weight_map`; fetch it again.")
    files: dict[str, list[str]] = {}
    for name, file in where.items():
        if not isinstance(file, str) or pathlib.PurePath(file).name != file:
            raise ValueError(f"{index} sends {name} to {file!r}, which is no file.")
        files.setdefault(file, []).append(name)
    missing = [file for file in files if not (index.parent / file).is_file()]
    if missing:
        raise FileNotFoundError(
            listed(
                f"{index.parent} lacks {len(missing)} of the {len(files)} files that "
                f"{index.name} names; fetch them too",
                missing,
            )
        )
    parts = []
    for file, names in files.items():
        held = open_file(index.parent / file)
        lost = [f"{name} is missing" for name in names if name not in held]
        if lost:
            raise ValueError(
                listed(
                    f"{index.parent / file} is not the file that {index.name} means; "
                    "fetch both again",
                    lost,
                )
            )
        parts.append({name: held[name] for name in names})
    return join(parts)
