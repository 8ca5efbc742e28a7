"""What is said of files that are not as they were written."""


class DamagedCheckpointError(Exception):
    """No checkpoint can be restored: files are missing, or hold something else."""


class DamagedCheckpointWarning(UserWarning):
    """A checkpoint newer than the one that was restored is damaged."""
