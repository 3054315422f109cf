"""The files that a command writes: checked before any work; the figures of --json."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from svg_jax.cli.console import check_printed
from svg_jax.convert.files import check_writable, written_atomically

STANDARD_OUTPUT = Path("-")


@contextlib.contextmanager
def json_report(path: Path | None) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Take a command's figures for --json.

    Args:
        path: File to write; `-` for standard output, where all other output of the block then goes
            to standard error; None drops the figures.

    Yields:
        Function to call with the figures, which may not contain NaN or infinity.
    """

    def write(values: Mapping[str, Any]) -> None:
        text = json.dumps(values, indent=2, allow_nan=False) + "\n"
        if path == STANDARD_OUTPUT:
            stdout.write(text)
        elif path is not None:
            with written_atomically(path) as temporary:
                temporary.write_text(text, encoding="utf-8")

    stdout = sys.stdout
    elsewhere = path == STANDARD_OUTPUT
    with contextlib.redirect_stdout(sys.stderr) if elsewhere else contextlib.nullcontext():
        yield write
    if elsewhere:
        check_printed()


def check_outputs(
    outputs: Sequence[tuple[str, Path]], inputs: Mapping[str, str | Path | None]
) -> None:
    """Check that every output can be written and replaces no input and no other output.

    Args:
        outputs: Name of the option and path of each file that will be written.
        inputs: Files and folders that are read, by the name of their option; None and paths that do
            not exist (a hub id, say) are skipped.

    Raises:
        ValueError: If an output is a device or a pipe, is the same file as another output or an
            input, or lies in a folder that is an input.
        OSError: If one cannot be written; see `check_writable`.
    """
    given = {name: os.path.expanduser(path) for name, path in inputs.items() if path is not None}
    read = {name: Path(path) for name, path in given.items() if os.path.exists(path)}
    taken: dict[tuple[int | str, ...], str] = {}
    for name, path in outputs:
        if name == "--json" and path == STANDARD_OUTPUT:
            continue
        check_writable(path)
        identity = _identity(path)
        if identity in taken:
            raise ValueError(
                f"{name} is the same file as {taken[identity]}, {path}: give it another name"
            )
        taken[identity] = name
        for other, source in read.items():
            if source.is_dir():
                if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(source)):
                    raise ValueError(
                        f"{name} is in the folder {source} that is read as {other}: write {path} "
                        "elsewhere"
                    )
            elif _identity(source) == identity:
                raise ValueError(
                    f"{name} is the file that is read as {other}, {path}: give it another name"
                )


def _identity(path: Path) -> tuple[int | str, ...]:
    """Identify a file, also one that does not exist yet, whatever its path is spelled like."""
    try:
        found = path.stat()
    except FileNotFoundError:
        parent = path.parent.stat()
        return parent.st_dev, parent.st_ino, path.name
    return found.st_dev, found.st_ino
