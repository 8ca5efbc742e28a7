"""Every program on a page runs as it stands; blocks of one page build on each other."""

import doctest
import re
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
    if "_build" not in page.parts
)
LONG = {
    "docs/dit.md",
    "docs/frameworks.md",
    "docs/methods/normuon.md",
    "docs/methods/stabilisers.md",
    "docs/porting.md",
}
"""Pages whose programs compile for seconds, which are left to the exhaustive run."""
FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PROGRAMS = {"python", "{testsetup}", "{testcode}"}
# What is no program of Python: commands, output (Sphinx's doctest builder compares that
# of a page), and Sphinx's own directives.
OTHER = {"sh", "text", "bibtex", "{testoutput}", "{eval-rst}", "{image}", "{toctree}"}


def blocks(page):
    """Language, code and line of each fenced block, the line that of its first line."""
    text = (ROOT / page).read_text()
    return [
        (found[1], found[2], text.count("\n", 0, found.start(2)) + 1)
        for found in FENCE.finditer(text)
    ]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.exhaustive] if page in LONG else [])
        for page in PAGES
    ],
)
def test_programs_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page}
    # A user has JAX's default, by which a bias may be added to a batch as it is.
    with jax.numpy_rank_promotion("allow"):
        for language, code, line in blocks(page):
            if language in PROGRAMS:
                # Empty lines, so that an error names the line of the page.
                exec(compile("\n" * (line - 1) + code, page, "exec"), names)
            elif language == "{doctest}":
                example = doctest.DocTestParser().get_doctest(
                    code, names, page, page, line - 1
                )
                runner = doctest.DocTestRunner(verbose=False)
                runner.run(example, clear_globs=False)
                assert runner.summarize(verbose=False).failed == 0
                names.update(example.globs)
            else:
                assert language in OTHER, f"{page}:{line}: what is {language!r}?"
    plt.close("all")
    # `docs/draw.py` keeps what a method's page draws where the page shows it.
    for picture in tmp_path.glob("*.png"):
        kept = ROOT / "docs" / "images" / "methods" / picture.name
        assert kept.exists(), f"python docs/draw.py {Path(page).stem}"
        assert f"](../images/methods/{picture.name})" in (ROOT / page).read_text()
