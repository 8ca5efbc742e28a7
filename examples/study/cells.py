"""Figures as tables and sentences show them."""

import math
import statistics
from collections.abc import Sequence

from study import summary
from study.summary import Estimate, Row

NOT_RUN = "not run yet"
UNSETTLED = " †"
"""Marks a row whose decay is still to be climbed."""


def text(value: Estimate | None, sign: str = "", missing: str = NOT_RUN) -> str:
    """A mean, its standard error in the same digits, and the number of seeds."""
    if value is None:
        return "" if sign else missing
    if not math.isfinite(value.mean):
        return f"diverged ({value.seeds})"
    if not math.isfinite(value.error):
        return f"{value.mean:{sign}.4f} (1)"
    if abs(value.mean) >= 1e5:
        return f"{value.mean:{sign}.1e} ± {value.error:.1e} ({value.seeds})"
    # Two figures of the error say how many of the mean mean anything.
    size = math.floor(math.log10(value.error)) if value.error > 0 else -4
    digits = min(max(1 - size, 1), 4)
    return f"{value.mean:{sign}.{digits}f} ± {value.error:.{digits}f} ({value.seeds})"


def final_text(row: Row) -> str:
    """The loss of a row, marked where its tuning is not through."""
    shown = text(summary.final(row))
    return shown + UNSETTLED if row.runs and not row.settled else shown


def share_text(shares: list[float]) -> str:
    """The median over the seeds, and the range."""
    if not shares:
        return ""
    low, high = min(shares), max(shares)
    shown = [one if math.isfinite(one) else None for one in (low, high)]
    ends = ["never" if one is None else f"{one:.2f}" for one in shown]
    middle = statistics.median(shares)
    first = f"{middle:.2f}" if math.isfinite(middle) else "never"
    return f"{first} ({ends[0]} to {ends[1]})" if len(shares) > 1 else first


def time_text(shares: list[float], cost: float) -> str:
    """The median share of the time, if each step takes so many of AdamW's."""
    middle = statistics.median(shares) * cost
    return f"{middle:.2f}" if math.isfinite(middle) else "never"


def range_text(factors: Sequence[float]) -> str:
    """The smallest and the largest of some factors."""
    return f"{min(factors):.1f} to {max(factors):.1f}"
