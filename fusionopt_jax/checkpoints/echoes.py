"""One error instead of one and the tracebacks of all that was under way with it."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any


class _Filter:
    """An `unraisablehook` that drops what a closed event loop says, and no more."""

    def __init__(self, before: Any) -> None:
        self.before = before

    def __call__(self, unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            self.before(unraisable)


@contextlib.contextmanager
def without_echoes() -> Iterator[None]:
    """Keep quiet about what is in flight when Orbax gives up on something else.

    It closes its event loop at the first error. Each read or write that ends after that
    raises in a thread where nobody catches it, and prints a traceback of its own. When
    the last of them ends nobody knows, so that after an error the filter stays.
    """
    if isinstance(sys.unraisablehook, _Filter):
        yield
        return
    before = sys.unraisablehook
    sys.unraisablehook = _Filter(before)
    yield
    sys.unraisablehook = before
