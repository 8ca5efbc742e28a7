"""Labels as people type them: numbers, and names where the weights come with names."""

import difflib
import re
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

_COMMA = re.compile(r',(?=(?:[^"]*"[^"]*")*[^"]*$)')
"""A comma outside quotation marks."""


def read_labels(
    text: str, names: Mapping[int, str], absence: str
) -> Int[np.ndarray, " labels"]:
    """The classes of a comma-separated list of numbers and names.

    A whole number is the number of a class, anything else a name, whatever its case. A
    name may hold commas, as a list of synonyms does: the longest run of parts that is a
    name counts as one. A part in quotation marks is a name even if it is a number.

    Args:
        text: Such as "207, tench, great white shark".
        names: Of the classes by their numbers; synonyms have commas between.
        absence: Why there are no names, for the error where `names` is empty.

    Returns:
        int32, [labels], in the order of the text.

    Raises:
        ValueError: If a part is no number and no name, or the name of several classes.

    Example:
        >>> names = {0: "tench, Tinca tinca", 207: "golden retriever"}
        >>> read_labels("Golden Retriever, 7, tench, Tinca tinca", names, "").tolist()
        [207, 7, 0]
    """
    table = _by_name(names)
    parts = [part.strip() for part in _COMMA.split(text)]
    labels: list[int] = []
    while parts:
        if parts[0].isdecimal():
            labels.append(_number(parts[0]))
            taken = 1
        else:
            label, taken = _named(parts, table, names, absence)
            labels.append(label)
        parts = parts[taken:]
    return np.array(labels, np.int32)


def _number(text: str) -> int:
    """A class by its number."""
    if len(text) > 9:
        raise ValueError(f"`--labels` has {text}, which is no number of a class.")
    return int(text)


def _by_name(names: Mapping[int, str]) -> dict[str, list[int]]:
    """The classes that each name, or synonym, stands for."""
    table: dict[str, list[int]] = {}
    for label, name in names.items():
        synonyms = [part.strip() for part in name.split(",")]
        for known in dict.fromkeys((_folded(", ".join(synonyms)), *synonyms)):
            classes = table.setdefault(_folded(known), [])
            if label not in classes:
                classes.append(label)
    return table


def _folded(name: str) -> str:
    """A name without its case and with single spaces."""
    return " ".join(name.casefold().split())


def _named(
    parts: list[str],
    table: Mapping[str, list[int]],
    names: Mapping[int, str],
    absence: str,
) -> tuple[int, int]:
    """The class that the first parts name, and how many of them."""
    first = parts[0].strip('"')
    if not names:
        raise ValueError(
            f"`--labels` has {parts[0]!r}, which is no number, and {absence}; give "
            "whole numbers with commas between."
        )
    for count in range(len(parts), 0, -1):
        name = first if count == 1 else ", ".join(parts[:count])
        classes = table.get(_folded(name), [])
        if len(classes) == 1:
            return classes[0], count
        if classes:
            which = " and ".join(f"{label} ({names[label]})" for label in classes)
            raise ValueError(
                f"`--labels` has {name!r}, which names the classes {which}; give the "
                "number of the one that you mean."
            )
    wanted = _folded(first)
    # A part of a name is nearer to it than any other spelling.
    near = [name for name in table if wanted and wanted in name]
    near += difflib.get_close_matches(wanted, table, n=3)
    shown = ", ".join(dict.fromkeys(near[:5]))
    raise ValueError(
        f"`--labels` has {first!r}, which names no class here"
        + (f"; the nearest names are: {shown}." if near else "; give its number.")
    )
