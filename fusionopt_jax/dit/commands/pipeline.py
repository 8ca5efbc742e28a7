"""What the folder of a diffusers pipeline says beside its weights."""

import json
import pathlib
from typing import Any, NamedTuple

from fusionopt_jax.dit.sampling.sampler import Sampler

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


def check_scheduler(folder: pathlib.Path, sampler: Sampler, *, flow: bool) -> None:
    """Refuse a sampler that a pipeline's own scheduler contradicts.

    Args:
        folder: Of the pipeline; nothing is checked if it has no scheduler.
        sampler: The walk.
        flow: Whether it expects a velocity rather than the noise.

    Raises:
        ValueError: If the model was trained for another kind of sampler, or with other
            noise.
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


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object out of a file.

    Args:
        path: The file.

    Returns:
        What is in it.

    Raises:
        ValueError: If it is damaged, or something other than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is no readable JSON ({error}); download it again."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object; download it again.")
    return content
