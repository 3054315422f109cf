"""Checks of the files that a command will write, before any work."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from svg_jax.convert.files import check_writable


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
