"""One error instead of one and the tracebacks of all that was under way with it."""

import contextlib
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

# A read or write that ends after its event loop was closed, and one that never began.
_CLOSED = "Event loop is closed"
_NEVER_BEGAN = (
    r"coroutine '(\w*serialize\w*\.<locals>\.\w+|Store\._get_array_metadatas)'"
    " was never awaited"
)


class _Filter:
    """An `unraisablehook` that drops what a closed event loop says, and no more."""

    def __init__(self, before: Any) -> None:
        self.before = before

    def __call__(self, unraisable: Any) -> None:
        said = str(unraisable.exc_value)
        if said != _CLOSED and not re.match(_NEVER_BEGAN, said):
            self.before(unraisable)


@contextlib.contextmanager
def without_echoes() -> Iterator[None]:
    """Keep quiet about what is in flight when Orbax gives up on something else.

    It closes its event loop at the first error. Each read or write that ends after that
    raises in a thread where nobody catches it, and prints a traceback of its own; one
    that had not begun warns when it is collected, which is an error under
    ``-W error``. When the last of them is gone nobody knows, so that after an error
    both filters stay.
    """
    if isinstance(sys.unraisablehook, _Filter):
        yield
        return
    before = sys.unraisablehook
    sys.unraisablehook = _Filter(before)
    try:
        yield
    except BaseException:
        warnings.filterwarnings("ignore", _NEVER_BEGAN, RuntimeWarning)
        raise
    sys.unraisablehook = before
