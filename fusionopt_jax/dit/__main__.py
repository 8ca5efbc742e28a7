"""Sample a diffusion transformer, or look into one, from the command line.

python -m fusionopt_jax.dit sample --weights model.pt --labels 207,360 --out grid.png
python -m fusionopt_jax.dit inspect --weights model.pt
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from fusionopt_jax import __version__
from fusionopt_jax.dit.commands import inspect, sample


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What follows `python -m fusionopt_jax.dit`; None reads `sys.argv`.

    Returns:
        The exit code: 0; 2 if what is asked for can't be done, which shows before
        anything is sampled; 1 if it failed while it was done; 130 if it was stopped
        then from the keyboard. The reason goes to standard error.

    Example:
        >>> main(["inspect", "--model", "DiT-S/9"])
        2
    """
    options = _parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.showwarning = _say_warning
        try:
            run = options.prepare(options)
        except (ValueError, TypeError, OSError, ImportError) as error:
            sys.stderr.write(f"error: {_one_line(error)}\n")
            return 2
        try:
            run()
        except (ValueError, OSError) as error:
            sys.stderr.write(f"error: {_one_line(error)}\n")
            return 1
        except KeyboardInterrupt:
            sys.stderr.write("stopped, and nothing was written\n")
            # What a shell reports of a program that SIGINT ended.
            return 130
    return 0


def _one_line(error: Exception) -> str:
    """What an error says; of a list the first entry."""
    title, *entries = str(error).split("\n")
    if not entries:
        return title
    return f"{title} {entries[0].strip()}" + (" (and more)" if entries[1:] else "")


def _say_warning(message: Warning | str, *_: Any) -> None:
    """Print a warning as a user reads it, without the line of code it comes from."""
    sys.stderr.write(f"warning: {message}\n")


def _parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(
        prog="python -m fusionopt_jax.dit",
        description="Sample a diffusion transformer, or look into one.",
    )
    parser.add_argument(
        "--version", action="version", version=f"fusionopt_jax {__version__}"
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    sample.add_options(commands.add_parser("sample", help="pictures of given labels"))
    inspect.add_options(
        commands.add_parser("inspect", help="sizes of a model and of its cache")
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
