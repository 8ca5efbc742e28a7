"""Agreement among the processes of a run about what each of them has met.

One process may find a file damaged that the others don't read. Were it alone to take an
older checkpoint, the others would wait for it, or train on with other weights.
"""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from fusionopt_jax.checkpoints.errors import DamagedCheckpointError


def gathered(value: Any) -> list[Any]:
    """What each process gives, in the order of their numbers, as JSON has it.

    Every process must call it, as often and in the same order.
    """
    if jax.process_count() == 1:
        return [value]
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(content.size))
    # Powers of two: a program is compiled for each length.
    padded = np.zeros(1 << int(np.max(sizes) - 1).bit_length(), np.uint8)
    padded[: content.size] = content
    rows = multihost_utils.process_allgather(padded)
    return [
        json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)
    ]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Let what fails in one process fail in all of them.

    Damage anywhere is damage everywhere. Another error is raised where it arose, and
    the other processes say whose it is. A process that fails leaves the block early, so
    that none may wait for another inside.
    """
    if jax.process_count() == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    damaged = isinstance(error, DamagedCheckpointError)
    said = str(error) if damaged else f"{type(error).__name__}: {error}"
    verdicts = gathered([None if error is None else said, damaged])
    for number, (text, damage) in enumerate(verdicts):
        if text is not None and not damage:
            if error is not None and not damaged:
                raise error
            raise RuntimeError(
                f"Process {number} of {len(verdicts)} can't go on ({text}), so this "
                "one doesn't either."
            ) from error
    for number, (text, damage) in enumerate(verdicts):
        if damage:
            raise DamagedCheckpointError(f"{text} (process {number})") from error
