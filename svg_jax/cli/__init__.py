"""The command line: what is asked for, what it shows, and how it ends."""

import sys

from svg_jax.extras import missing_package

__all__ = ["main"]


def main() -> None:
    """Run the command line; without its packages, say what to install and exit with 3."""
    try:
        from svg_jax.cli.app import main as run
    except ModuleNotFoundError as error:
        explained = missing_package(error)
        if explained is error:
            raise
        print(explained, file=sys.stderr)
        sys.exit(3)  # errors.ExitCode.REFUSED, whose module needs the same packages
    run()
