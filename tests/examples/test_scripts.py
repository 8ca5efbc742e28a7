"""The numbered examples run as they stand, in seconds, and say what they promise."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("script", "promise"),
    [
        ("01_compose.py", "parameters apart by 0"),
        ("02_route.py", "9 x (128, 128)"),
    ],
)
def test_runs(script: str, promise: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    assert promise in capsys.readouterr().out
