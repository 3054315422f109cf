"""The command line: what is asked for, what it shows, and how it ends."""

from svg_jax.cli.app import main

__all__ = ["main"]
