"""The parts of `train_dit.py`, one subject per file, to read and to fork."""
