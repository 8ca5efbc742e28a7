"""Two checkouts that take turns in one benchmark."""

import json
import shutil
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"

# Two rounds of candidates: one that sleeps, one that only this checkout has.
SCRIPT = """
import sys
import time
import _measure as measure

print("arguments", sys.argv[1:])
for number in range(2):
    times = measure.interleave(
        {f"sleep {number}": lambda: time.sleep(SECONDS), "OWN": lambda: None}, rounds=99
    )
    assert len(times) == 2
if "--fail" in sys.argv:
    raise SystemExit(7)
"""


@pytest.fixture(scope="module")
def script(benchmark_script):
    return benchmark_script("old_and_new")


@pytest.fixture
def checkouts(tmp_path):
    """Two checkouts, the new one four times as slow."""
    made = []
    for name, seconds in (("old", 0.01), ("new", 0.04)):
        folder = tmp_path / name / "examples" / "benchmarks"
        folder.mkdir(parents=True)
        shutil.copy(BENCHMARKS / "_measure.py", folder)
        text = SCRIPT.replace("SECONDS", str(seconds)).replace("OWN", f"{name} only")
        (folder / "some.py").write_text(text)
        made.append(tmp_path / name)
    return made


def test_the_checkouts_take_turns(script, checkouts, tmp_path, capfd):
    old, new = map(str, checkouts)
    out = tmp_path / "rows.json"
    given = ["--old", old, "--new", new, "--rounds", "3", "--out", str(out)]
    assert script.main([*given, "some.py", "--separate"]) == 0
    rows = json.loads(out.read_text())
    assert [row["candidate"] for row in rows] == ["sleep 0", "sleep 1"]
    for row in rows:
        # A sleep is never shorter than asked, whatever else the machine does.
        assert row["old ms"] >= 10
        assert row["new ms"] >= 40
        assert row["low"] <= row["new over old"] <= row["high"]
    said = capfd.readouterr()
    assert "sleep 1" in said.out
    # What the scripts print is shown, and is no answer.
    assert said.err.count("arguments ['--separate']") == 2
    assert "only in the old one: old only" in said.err


def test_a_script_that_fails_says_so(script, checkouts):
    old, new = map(str, checkouts)
    with pytest.raises(SystemExit, match=r"some.py of .*old failed \(7\)"):
        script.main(["--old", old, "--new", new, "--rounds", "1", "some.py", "--fail"])


def test_refuses_a_folder_that_is_no_checkout(script, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main(["--old", str(tmp_path), "optimizer_step.py"])
    assert "has no examples/benchmarks/optimizer_step.py" in capsys.readouterr().err


def test_the_pairs_make_the_ratio(script):
    # A round that was slow for both is no reason to call the new one slower.
    row = script.Pair([1.0, 10.0, 1.0], [0.5, 5.0, 0.5]).row("any")
    assert (row["new over old"], row["low"], row["high"]) == (0.5, 0.5, 0.5)
    assert (row["old ms"], row["new ms"]) == (1000, 500)
