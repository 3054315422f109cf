"""Digests of files."""

import hashlib
from pathlib import Path


def file_digest(file: Path) -> str:
    """sha256 of a file, in little memory."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
