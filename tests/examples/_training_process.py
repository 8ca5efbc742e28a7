"""`train_dit.py` without what follows the training; started by `test_processes.py`.

    python -m tests.examples._training_process STEP arguments of train_dit.py

kills itself, as the operating system would, before it feeds that step; 0 for never.
"""

import os
import signal
import sys

import train_dit
from dit_training import sampling, training

rows_on_host = training.rows_on_host


def rows_unless_killed(seed, step, *sizes):
    """The rows of a step, counted from 0."""
    if step + 1 == deadly:
        os.kill(os.getpid(), signal.SIGKILL)
    return rows_on_host(seed, step, *sizes)


if __name__ == "__main__":
    deadly = int(sys.argv[1])
    training.rows_on_host = rows_unless_killed
    sampling.measure = lambda *_, **__: {"max_cache_difference": 0.0}
    train_dit.summary_text = lambda *_: "trained"
    sys.exit(train_dit.main(sys.argv[2:]))
