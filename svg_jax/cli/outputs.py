"""The files that a command is going to write, checked before its work."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from svg_jax.convert.files import check_writable


def check_outputs(
    outputs: Sequence[tuple[str, Path]], inputs: Mapping[str, str | Path | None]
) -> None:
    """Check that every file can be written, and that none of them takes another one's place.

    Args:
        outputs: All files that are going to be written, with the name of the option of each.
        inputs: Files and folders that are read, by the name of their option; what is not there (an
            id of the hub, say) and None are no files.

    Raises:
        ValueError: If two outputs are one file, one is an input or lies in a folder that is one,
            or is a device or a pipe.
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
    """What tells a file from all others, there or not yet."""
    try:
        found = path.stat()
    except FileNotFoundError:
        parent = path.parent.stat()
        return parent.st_dev, parent.st_ino, path.name
    return found.st_dev, found.st_ino
