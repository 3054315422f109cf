"""The one kind of digest: sha256 in hexadecimal."""

import hashlib
from pathlib import Path

import numpy as np


def file_digest(file: Path) -> str:
    """Digest a file, in little memory."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def bytes_digest(content: bytes | memoryview) -> str:
    """Digest bytes."""
    return hashlib.sha256(content).hexdigest()


def array_digest(array: np.ndarray) -> str:
    """Digest an array's bytes in C order."""
    return bytes_digest(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def running_digest():
    """Start a digest of bytes that come in pieces: `update` it, then call `hexdigest()`."""
    return hashlib.sha256()
