"""What the folder of a diffusers pipeline says beside its weights."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

from fusionopt_jax.dit.cache.size import size_text
from fusionopt_jax.dit.sampling.sampler import Sampler
from fusionopt_jax.dit.weights.files import FORMATS
from fusionopt_jax.dit.weights.folder import CONFIG_NAME, read_json

INDEX = "model_index.json"

_TRAINED = {
    "prediction_type": "epsilon",
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
}
"""What a scheduler says of a model that was trained as the published DiT was, the only
kind that the samplers of noise here know."""


class LabelNames(NamedTuple):
    """Names of the classes.

    Attributes:
        by_label: Names by the numbers of the classes; synonyms have commas between.
        absence: Why there are none, as a clause of an error.
    """

    by_label: dict[int, str]
    absence: str = ""


def label_names(source: pathlib.Path) -> LabelNames:
    """The names of classes that lie beside weights.

    Args:
        source: A file of weights, or a folder.

    Returns:
        The `id2label` of the folder's `model_index.json`; none of a file.

    Raises:
        ValueError: If the file is no JSON, or `id2label` is no table of names.

    Example:
        >>> label_names(pathlib.Path("model.pt")).absence
        'names are read from the model_index.json of a folder, which model.pt is not'
    """
    if not source.is_dir():
        return LabelNames(
            {}, f"names are read from the {INDEX} of a folder, which {source} is not"
        )
    path = source / INDEX
    if not path.is_file():
        return LabelNames({}, f"there is no {path} with names")
    table = read_json(path).get("id2label")
    if table is None:
        return LabelNames({}, f"{path} has no `id2label` with names")
    if not isinstance(table, dict) or not all(
        key.isdecimal() and isinstance(name, str) for key, name in table.items()
    ):
        raise ValueError(
            f'`id2label` of {path} must give each class a name, as {{"0": "tench"}} '
            "does; mend it, or take it out and give numbers."
        )
    return LabelNames({int(key): name for key, name in table.items()})


def class_count(source: pathlib.Path) -> int | None:
    """How many classes a model has, as the `config.json` beside its weights says.

    Args:
        source: A file of weights, or the folder of a pipeline or of its transformer.

    Returns:
        The number, without the null label; None of a file, and where it is not said.

    Raises:
        ValueError: If the file is no JSON.

    Example:
        >>> class_count(pathlib.Path("model.pt"))
    """
    for path in (source / "transformer" / CONFIG_NAME, source / CONFIG_NAME):
        if path.is_file():
            count = read_json(path).get("num_embeds_ada_norm")
            return count if type(count) is int else None
    return None


def class_name(source: pathlib.Path) -> str | None:
    """The model that a part's folder is of, as its `config.json` has it.

    Args:
        source: A file of weights, or a folder.

    Returns:
        Such as "DiTTransformer2DModel"; None of a file, and of a pipeline's folder.
    """
    path = source / CONFIG_NAME
    return read_json(path).get("_class_name") if path.is_file() else None


def describe_source(source: pathlib.Path) -> str:
    """What weights lie in a file or a folder, and what is said beside them.

    Args:
        source: The file or folder.

    Returns:
        A text of several lines, one for each file.
    """
    if source.is_file():
        return f"{source}: a file of {size_text(source.stat().st_size)}\n"
    index = source / INDEX
    held = read_json(index) if index.is_file() else {}
    kind = held.get("_class_name") or class_name(source) or "no pipeline"
    lines = [f"{source}: a folder of diffusers, {kind}"]
    names = label_names(source).by_label
    if names:
        lines.append(f"  {INDEX} names {len(names)} classes")
    files = sorted(path for path in source.rglob("*") if path.suffix in FORMATS)
    lines += [
        f"  {path.relative_to(source)}: {size_text(path.stat().st_size)}"
        for path in files
    ]
    return "\n".join(lines) + "\n"


def check_scheduler(
    folder: pathlib.Path, sampler: Sampler, *, flow: bool, clip: bool | None = None
) -> None:
    """Refuse a sampler that a pipeline's own scheduler contradicts.

    Args:
        folder: Of the pipeline; nothing is checked if it has no scheduler.
        sampler: The walk.
        flow: Whether it expects a velocity rather than the noise.
        clip: Whether predictions are to be cut, if that was said.

    Raises:
        ValueError: If the model was trained for another kind of sampler, or with other
            noise, or if the scheduler cuts predictions and the sampler does not, though
            nobody said so.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return
    held = read_json(path)
    if flow:
        predicted = held.get("prediction_type")
        if predicted is not None:
            raise ValueError(
                f"{path} says that the model predicts {predicted!r}, and "
                f"{sampler.method} needs a model that predicts a velocity; use "
                "`--sampler ddim`."
            )
        return
    for name, value in _TRAINED.items():
        if held.get(name, value) != value:
            raise ValueError(
                f"{path} says {name}={held[name]!r}, and {sampler.method} is for "
                f"models trained with {name}={value!r}, as the published DiT was."
            )
    if held.get("clip_sample") and clip is None:
        raise ValueError(
            f"{path} says clip_sample=True, which cuts predictions to [-1, 1]: give "
            "`--clip` to do so, or `--no-clip`, which is right for latents."
        )


@contextlib.contextmanager
def naming(source: pathlib.Path) -> Iterator[None]:
    """Let an error about weights say which they are.

    Args:
        source: The file or folder that is read meanwhile.

    Raises:
        ValueError: The one that was raised inside, with the path before it if it had
            none.

    Example:
        >>> with naming(pathlib.Path("model.pt")):
        ...     raise ValueError("the bias is missing.")
        Traceback (most recent call last):
        ...
        ValueError: model.pt: the bias is missing.
    """
    try:
        yield
    except ValueError as error:
        if str(source) in str(error):
            raise
        raise ValueError(f"{source}: {error}") from error
