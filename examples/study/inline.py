"""Figures of the study in the middle of a sentence.

Between `<!-- = less lm mona -->` and `<!-- / -->` a page has what a function of this
module, called by the first word with the others, makes of the files of the runs.
"""

import re
from collections.abc import Callable, Mapping

from study import summary, times
from study.cells import NOT_RUN, range_text, share_text, text
from study.summary import Row
from study.table import ADAMW, BASE, METHODS

Rows = Mapping[tuple[str, str], Row]

MARKS = re.compile(r"<!-- = ([^>]*?) -->.*?<!-- / -->", re.DOTALL)


def filled(page: str, rows: Rows, seconds: times.Seconds) -> str:
    """The page with every figure between marks made anew."""
    if found := re.search(r"^ *<!-- = .*", page, re.MULTILINE):
        raise ValueError(f"Markdown ends a paragraph where a line has {found[0]!r}")

    def figure(found: re.Match[str]) -> str:
        name, *arguments = found[1].split()
        if name == "cost":
            return f"<!-- = {found[1]} -->{cost(seconds, *arguments)}<!-- / -->"
        if name not in FIGURES:
            known = ["cost", *FIGURES]
            raise ValueError(f"no figure {name!r} is known; there are {known}")
        return f"<!-- = {found[1]} -->{FIGURES[name](rows, *arguments)}<!-- / -->"

    return MARKS.sub(figure, page)


def less(rows: Rows, workload: str, method: str, other: str = BASE) -> str:
    """The loss at the end less that of another row, seed by seed."""
    found = summary.difference(rows[workload, method], rows[workload, other])
    return text(found, sign="+") or NOT_RUN


def final(rows: Rows, workload: str, method: str) -> str:
    """The loss at the end."""
    return text(summary.final(rows[workload, method]))


def share(rows: Rows, workload: str, method: str) -> str:
    """The share of AdamW's steps."""
    return share_text(summary.shares(rows[workload, method], rows)) or NOT_RUN


def cost(
    seconds: times.Seconds, workload: str, method: str, other: str = "adamw"
) -> str:
    """How many times another row's processor time a training step takes."""
    found = times.ratio(seconds, workload, method, other)
    return NOT_RUN if found is None else f"{found.middle:.2f}"


def gain(rows: Rows, workload: str, method: str, full: str) -> str:
    """The share, in percent, of another row's gain over the better AdamW."""
    theirs = [
        found.mean
        for name in ADAMW
        if METHODS[name].part == "baselines" and (workload, name) in rows
        if (found := summary.final(rows[workload, name]))
    ]
    own, most = (summary.final(rows[workload, name]) for name in (method, full))
    if not theirs or own is None or most is None:
        return NOT_RUN
    return f"{100 * (min(theirs) - own.mean) / (min(theirs) - most.mean):.0f} %"


def factors(rows: Rows, workload: str, method: str) -> str:
    """The smallest and the largest shared factor of a row's runs."""
    runs = rows[workload, method].runs.values()
    found = [factor for run in runs for factor in run.step_sizes]
    return range_text(found) if found else NOT_RUN


def judged(rows: Rows, workload: str, method: str, name: str) -> str:
    """A figure of the generated images."""
    return text(summary.figure(rows[workload, method], name))


FIGURES: Mapping[str, Callable[..., str]] = {
    function.__name__: function
    for function in (less, final, share, gain, factors, judged)
}
