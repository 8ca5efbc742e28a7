"""How far a command is, on the terminal of whoever waits for it."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def progress_bar(
    title: str, unit: str = "step", total: int = 0
) -> Iterator[Callable[[int, int], Any] | None]:
    """A bar on standard error, if that is a terminal.

    Args:
        title: What is going on, such as "sampling".
        unit: What is counted; "B" for bytes, which are shown in thousands.
        total: How many there are, if that is known before the first is done.

    Yields:
        A callback for the number of things done and the number of all of them, which
        may be called out of order; None where nobody would see it.

    Raises:
        ImportError: If there is a terminal and tqdm is not installed.

    Example:
        >>> with progress_bar("sampling") as tell:
        ...     print(tell)
        None
    """
    if not sys.stderr.isatty():
        yield None
        return
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            "the progress bar needs tqdm, which is not installed; install the extra "
            '`dit`: pip install "fusionopt-jax[dit]".'
        ) from error
    # Drawn at once: what comes first, such as a compilation, takes longest.
    with tqdm(
        desc=title, unit=unit, unit_scale=unit == "B", file=sys.stderr, total=total
    ) as bar:

        def tell(done: int, whole: int) -> None:
            """Move the bar on; never back."""
            if bar.total != whole:
                bar.total = whole
                bar.refresh()
            bar.update(max(done - bar.n, 0))

        yield tell
