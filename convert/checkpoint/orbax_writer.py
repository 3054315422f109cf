"""Orbax folders whose files hold the source's bytes as they are, and how they are opened.

The layout is orbax's own (zarr3, a folder a leaf), which `StandardCheckpointer().restore` reads; so
are the files beside the leaves, which orbax would only write with the numbers. These are put into
the leaves' files by `copying.py`. A chunk is one file without compression, and zarr's transpose
codec turns a kernel's axes when it is read: so nothing has to be transposed or held in memory, and
a digest of a chunk is one of the source's tensor.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from svg_jax.convert.errors import ConversionError, DamageError, RefusedError
from svg_jax.convert.tables.rules import Leaf

# Leaves above this many bytes lie in several chunks: stacked ones a layer a chunk, others by rows.
# A folder of other chunks is one of another FORMAT_VERSION.
CHUNK_BYTES = 64 * 2**20
_BYTES_A_LEAF, _BYTES_A_CHECKPOINT = 460, 600  # of orbax's and zarr's metadata
# What zarr.json says of every leaf; what orbax's file says of every checkpoint; and how orbax
# numbers a key of a dictionary.
_ZARR = {
    "zarr_format": 3,
    "node_type": "array",
    "fill_value": 0.0,
    "chunk_key_encoding": {"name": "default"},
}
_CHECKPOINT = {
    "item_handlers": (
        "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
    ),
    "metrics": {},
    "performance_metrics": {},
    "custom_metadata": {},
}
_DICTIONARY_KEY = 2
# How tensorstore names what is no damage: a right, memory, open files, a disk that is away.
_OF_THE_SYSTEM = ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "CANCELLED")


@dataclass(frozen=True)
class LeafFiles:
    """How a leaf lies in its files: its tensors' bytes, one after the other, in equal chunks.

    Attributes:
        path: Keys from the root of the tree.
        shape: The leaf's shape.
        dtype: Its dtype.
        order: Its axes in the order in which they lie in the files.
        rows: How much of the first of these a chunk holds; the last chunk may be filled up.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    order: tuple[int, ...]
    rows: int

    @classmethod
    def of(cls, leaf: Leaf, dtype: np.dtype) -> "LeafFiles":
        """A leaf's files, in the order of its source tensors."""
        order, rows = leaf.rule.inverse_axes, 1
        if leaf.rule.stacked:
            order = (0, *(1 + axis for axis in order))
        if order:
            length, nbytes = leaf.shape[order[0]], math.prod(leaf.shape) * dtype.itemsize
            if nbytes <= CHUNK_BYTES:
                rows = length
            elif not leaf.rule.stacked:
                rows = max(1, CHUNK_BYTES * length // nbytes)
        return cls(leaf.path, leaf.shape, dtype, order, rows)

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """Shape of a chunk, its axes in the leaf's order."""
        shape = list(self.shape)
        if self.order:
            shape[self.order[0]] = self.rows
        return tuple(shape)

    @property
    def chunk_nbytes(self) -> int:
        """Bytes of each chunk's file."""
        return math.prod(self.chunk_shape) * self.dtype.itemsize

    @property
    def num_chunks(self) -> int:
        """How many files the leaf lies in."""
        return -(-self.shape[self.order[0]] // self.rows) if self.order else 1

    @property
    def nbytes(self) -> int:
        """Bytes of all its files."""
        return self.num_chunks * self.chunk_nbytes

    def chunk_file(self, folder: Path, chunk: int) -> Path:
        """The file of a chunk in the checkpoint `folder`."""
        index = [0] * len(self.shape)
        if self.order:
            index[self.order[0]] = chunk
        return folder.joinpath(".".join(self.path), "c", *map(str, index))

    def files(self, folder: Path) -> Iterator[tuple[Path, int | None]]:
        """Its files in the checkpoint `folder`, and their bytes; None for what says how it lies."""
        yield folder / ".".join(self.path) / "zarr.json", None
        for chunk in range(self.num_chunks):
            yield self.chunk_file(folder, chunk), self.chunk_nbytes

    @property
    def metadata(self) -> dict[str, Any]:
        """What zarr has to know about it: the codecs say that the bytes lie there as they are."""
        transpose = {"name": "transpose", "configuration": {"order": self.order}}
        as_they_are = {"name": "bytes", "configuration": {"endian": "little"}}
        grid = {"name": "regular", "configuration": {"chunk_shape": self.chunk_shape}}
        return {
            "shape": self.shape,
            "data_type": self.dtype.name,
            "chunk_grid": grid,
            "codecs": [transpose, as_they_are] if self.order else [as_they_are],
        }


def create_checkpoint(folder: Path, leaves: Mapping[tuple[str, ...], LeafFiles]) -> None:
    """Make an orbax checkpoint whose chunks are there and are to be filled.

    Args:
        folder: The checkpoint's folder, a real path; it must not exist.
        leaves: Its leaves by their path.

    Raises:
        OSError: If the system refuses to write: no room, no right.
    """
    begun = time.time_ns()
    folder.mkdir()
    for path, leaf in leaves.items():
        lying = folder / ".".join(path)
        lying.mkdir()
        text = json.dumps(_ZARR | leaf.metadata, separators=(",", ":"), sort_keys=True)
        (lying / "zarr.json").write_text(text, encoding="utf-8")
    for leaf in leaves.values():
        for chunk in range(leaf.num_chunks):
            file = leaf.chunk_file(folder, chunk)
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("xb") as stream:
                os.truncate(stream.fileno(), leaf.chunk_nbytes)
    times = {"init_timestamp_nsecs": begun, "commit_timestamp_nsecs": time.time_ns()}
    texts = {
        "_METADATA": json.dumps(_tree_metadata(leaves)),
        "_CHECKPOINT_METADATA": json.dumps(_CHECKPOINT | times),
        "commit_success.txt": f"Checkpoint commit was successful to {folder.name}",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def _tree_metadata(leaves: Iterable[tuple[str, ...]]) -> dict[str, Any]:
    """What orbax has to know of a tree of nested dictionaries, of which the leaves are arrays."""
    value = {"value_type": "np.ndarray", "skip_deserialize": False}
    tree = {
        str(path): {
            "key_metadata": [{"key": key, "key_type": _DICTIONARY_KEY} for key in path],
            "value_metadata": value,
        }
        for path in sorted(leaves)
    }
    return {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def checkpoint_nbytes(leaves: Mapping[tuple[str, ...], LeafFiles]) -> int:
    """Bytes that a checkpoint takes: exactly, but for the hundreds of each leaf's metadata."""
    numbers = sum(leaf.nbytes for leaf in leaves.values())
    return numbers + _BYTES_A_LEAF * len(leaves) + _BYTES_A_CHECKPOINT


def open_leaves(
    folder: Path, leaves: Mapping[tuple[str, ...], LeafFiles]
) -> dict[tuple[str, ...], ts.TensorStore]:
    """Open the leaves of a checkpoint without reading their numbers, by their path in the tree.

    Args:
        folder: The checkpoint's folder, a real path: tensorstore takes no `..`.
        leaves: How each leaf must lie there; its files were seen to be regular ones.

    Raises:
        DamageError: If zarr's metadata do not say so.
        RefusedError: If the system does not let them be read.
    """

    def open_leaf(path: tuple[str, ...], leaf: LeafFiles) -> Any:
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{folder / '.'.join(path)}/"},
            # What is on disk must say the same, or it is not opened.
            "metadata": _ZARR | leaf.metadata,
            "fill_missing_data_reads": False,  # a chunk that is not there would read as zeros
        }
        return ts.open(spec, open=True, read=True)

    opening = {path: open_leaf(path, leaf) for path, leaf in leaves.items()}
    opened = {}
    for path, store in opening.items():
        with readable(folder, path):
            opened[path] = store.result()
    return opened


@contextlib.contextmanager
def readable(folder: Path, path: tuple[str, ...]) -> Iterator[None]:
    """Turn whatever tensorstore raises about a leaf whose files were checked into one sentence.

    Raises:
        RefusedError: In place of an error of the system.
        DamageError: In place of any other.
    """
    try:
        yield
    except (ConversionError, MemoryError):
        raise
    except Exception as error:
        # Behind the reason tensorstore repeats the request and names lines of its own source.
        reason = (str(error) or type(error).__name__).split(" [")[0].splitlines()[0][:200]
        leaf = ".".join(path)
        if isinstance(error, OSError) or reason.startswith(_OF_THE_SYSTEM):
            raise RefusedError(f"{folder / leaf}: cannot be read ({reason}).") from error
        raise unreadable(folder, f"{leaf}: {reason}") from error


def unreadable(folder: Path, fault: str) -> DamageError:
    """The error of a checkpoint that is not what was converted."""
    return DamageError(
        f"{folder}: cannot be read as an orbax checkpoint ({fault}): convert the source again."
    )
