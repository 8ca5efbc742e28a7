"""One error instead of one and the tracebacks of all that was under way with it."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def without_echoes() -> Iterator[None]:
    """Keep quiet about what is in flight when Orbax gives up on something else.

    It closes its event loop at the first error. Each read or write that ends after that
    raises in a thread where nobody catches it, and prints a traceback of its own.
    """
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    except Exception:
        # They come within milliseconds of the error.
        time.sleep(0.1)
        raise
    finally:
        sys.unraisablehook = before
