"""Draws the pictures of the method pages, by the programs that stand on them.

A program on a page that saves a picture stands alone, and the page shows the picture
from `docs/images/methods`. After a change to one:

    python docs/draw.py schedule_free polyak

Without names, all of them.
"""

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import matplotlib as mpl

DOCS = Path(__file__).resolve().parent
PROGRAM = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# Grey on nothing reads on a light page and on a dark one.
GREY = "#808080"
STYLE = {
    "axes.edgecolor": GREY,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": GREY,
    "axes.titlecolor": GREY,
    "axes.titlesize": 10,
    "figure.dpi": 120,
    "figure.facecolor": "none",
    "font.size": 9,
    "grid.alpha": 0.3,
    "grid.color": GREY,
    "legend.framealpha": 0.0,
    "legend.labelcolor": GREY,
    "lines.linewidth": 1.5,
    "savefig.facecolor": "none",
    "text.color": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
}


def draw(page: Path) -> None:
    """Run what draws on a page, and keep what it drew."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for program in PROGRAM.findall(page.read_text()):
            if "savefig(" in program:
                exec(compile(program, page.name, "exec"), {"__name__": page.name})
        for picture in Path(folder).glob("*.png"):
            shutil.copy(picture, DOCS / "images" / "methods")
        os.chdir(DOCS)


if __name__ == "__main__":
    mpl.use("agg")
    mpl.rcParams.update(STYLE)
    names = sys.argv[1:] or [page.stem for page in (DOCS / "methods").glob("*.md")]
    for name in sorted(names):
        draw(DOCS / "methods" / f"{name}.md")
