"""Sample a diffusion transformer, or look into one, from the command line.

python -m fusionopt_jax.dit sample --weights model.pt --labels 207,360 --out grid.png
python -m fusionopt_jax.dit inspect --weights model.pt
"""

import argparse
import sys
from collections.abc import Sequence

from fusionopt_jax import __version__
from fusionopt_jax.dit.commands import inspect, sample


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What follows `python -m fusionopt_jax.dit`; None reads `sys.argv`.

    Returns:
        The exit code: 0; 2 if what is asked for can't be done, which shows before
        anything is sampled; 1 if it failed while it was done. The reason goes to
        standard error.

    Example:
        >>> main(["inspect", "--model", "DiT-S/9"])
        2
    """
    options = _parser().parse_args(arguments)
    try:
        run = options.prepare(options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    try:
        run()
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


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
