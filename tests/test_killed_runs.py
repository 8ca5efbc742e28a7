"""A run on eight devices that is killed -9 ends as one that never was, bit for bit."""

import pathlib
import random
import subprocess
import sys
import time

import numpy as np
import pytest

EVERY = 2


def start(folder, steps):
    """The run, going on from what is in the folder."""
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tests._killed_run",
            str(folder),
            str(steps),
            str(EVERY),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=pathlib.Path(__file__).parents[1],
    )


def read_until(process, step):
    """The step that a run starts from, and the one that it reached."""
    first = reached = None
    for line in process.stdout:
        word, number = line.split()
        if word == "from":
            first = reached = int(number)
        else:
            reached = int(number)
        if step is not None and reached >= step:
            break
    return first, reached


def killed_and_not(tmp_path, steps, kills, seed):
    """Kill a run at random moments; what it resumed from, and what was left behind."""
    whole = start(tmp_path / "whole", steps)
    assert read_until(whole, None) == (0, steps)
    whole.stdout.close()
    assert whole.wait() == 0
    rng = random.Random(seed)
    folder = tmp_path / "killed"
    resumed, half_written = [], 0
    last_good = 0
    for moment in sorted(rng.sample(range(1, steps), kills)):
        process = start(folder, steps)
        first, reached = read_until(process, moment)
        # Anywhere in what follows, whose length depends on the machine: a few steps,
        # and in the background one of the writes of a checkpoint.
        time.sleep(rng.random() * 0.1)
        process.kill()
        later = [int(line.split()[1]) for line in process.stdout]
        process.stdout.close()
        assert process.wait() == -9, "the run came to its end before it was killed"
        # It goes on from what was there, and leaves a checkpoint that is at most two
        # intervals old: a `save` waits for the one before it.
        assert first >= last_good, resumed
        reached = max([reached, *later])
        last_good = max(last_good, (reached // EVERY - 1) * EVERY)
        resumed.append(first)
        half_written += any(
            "tmp" in one.name for one in (folder / "checkpoints").iterdir()
        )
    process = start(folder, steps)
    first, reached = read_until(process, None)
    process.stdout.close()
    assert process.wait() == 0
    assert first >= last_good
    assert reached == steps
    wanted = np.load(tmp_path / "whole" / "final.npz")
    got = np.load(folder / "final.npz")
    assert wanted.files == got.files
    for name in wanted.files:
        assert wanted[name].tobytes() == got[name].tobytes(), name
    return [*resumed, first], half_written


@pytest.mark.exhaustive
def test_two_kills_change_nothing(tmp_path):
    killed_and_not(tmp_path, steps=40, kills=2, seed=0)


@pytest.mark.slow
def test_ten_kills_change_nothing(tmp_path, capsys):
    resumed, half_written = killed_and_not(tmp_path, steps=120, kills=10, seed=1)
    with capsys.disabled():
        sys.stdout.write(
            f"\nresumed from {resumed}; {half_written} of 10 kills left a checkpoint "
            "half written\n"
        )
