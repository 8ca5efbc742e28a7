"""What a compiled program's text says of its collectives."""

import collections
import re

_COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)"
    r"(?:-start)?\("
)
_SHAPE = re.compile(r"f32\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:to_apply|calls|body|condition|true_computation|false_computation)=%([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


def computations(text: str) -> dict[str, str]:
    """The text of each computation of a program, by its name; `ENTRY` is the first."""
    found = {}
    for part in re.split(r"\n(?=%|ENTRY)", text):
        name = re.match(r"(?:%([\w.\-]+)|ENTRY)", part)
        if name:
            found[name[1] or "ENTRY"] = part
    return found


def _called(text: str) -> set[str]:
    """The computations that another one calls."""
    names = set(_CALLED.findall(text))
    for branches in _BRANCHES.findall(text):
        names.update(re.findall(r"%([\w.\-]+)", branches))
    return names


def in_loops(text: str) -> list[str]:
    """The collectives that a program runs inside of a loop, at any depth."""
    known = computations(text)
    waiting = set()
    for part in known.values():
        for line in part.splitlines():
            if " while(" in line:
                waiting |= _called(line)
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        waiting |= _called(known[name]) - seen
    return [match for name in seen for match in _COLLECTIVE.findall(known[name])]


def exchanges(text: str) -> dict[str, int]:
    """The collectives that move stacks of matrices, by their kind.

    A stack has three axes, which an exchange may have split.

    The other collectives of a step add up or fetch vectors and scalars: norms, mean
    squares of neurons, one entry of each leaf for `eval_params`.
    """
    found = []
    for part in computations(text).values():
        for line in part.splitlines():
            kind = _COLLECTIVE.search(line)
            shapes = _SHAPE.findall(line[: kind.start()]) if kind else ()
            axes = [shape.split(",") for shape in shapes]
            if any(len(sizes) > 2 and {*sizes} != {"1"} for sizes in axes):
                found.append(kind[1])
    # One entry of a leaf, from the device that has it.
    return dict(collections.Counter(k for k in found if k != "collective-permute"))
