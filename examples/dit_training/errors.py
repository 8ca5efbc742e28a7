"""The error that ends a run with one readable line."""


class RunError(Exception):
    """What stopped the run and what to do about it, in one sentence each."""
