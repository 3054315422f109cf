"""Make and open orbax checkpoints whose files hold the source's bytes as they are.

The layout is orbax's own (zarr3, one folder per leaf), which `StandardCheckpointer().restore`
reads. Orbax writes its metadata only together with values, so the metadata are written here and
`copying.py` fills in the values. A chunk is one uncompressed file, and zarr's transpose codec
permutes the axes when it is read: nothing has to be transposed or held in memory, and the digest of
a chunk is that of the source's bytes.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from svg_jax.convert.errors import ConversionError, DamageError, RefusedError
from svg_jax.convert.tables.rules import Leaf

# Larger leaves are split into chunks: stacked ones by layer, others by rows. Folders with other
# chunks need another FORMAT_VERSION.
CHUNK_BYTES = 64 * 2**20
_BYTES_A_LEAF, _BYTES_A_CHECKPOINT = 460, 600  # of metadata, about
# The part of zarr.json and of orbax's metadata that is the same for all.
_ZARR = {
    "zarr_format": 3,
    "node_type": "array",
    "fill_value": 0.0,
    "chunk_key_encoding": {"name": "default"},
}
_TREE = {
    "use_ocdbt": False,
    "use_zarr3": True,
    "store_array_data_equal_to_fill_value": True,
    "custom_metadata": None,
}
_CHECKPOINT = {
    "item_handlers": (
        "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
    ),
    "metrics": {},
    "performance_metrics": {},
    "custom_metadata": {},
}
_DICTIONARY_KEY = 2  # orbax's number of this type of key
# Tensorstore's names of errors that are no damage: permissions, memory, open files, a lost disk.
_OF_THE_SYSTEM = ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "CANCELLED")


@dataclass(frozen=True)
class LeafFiles:
    """The layout of a leaf's files: the bytes of its tensors, in order, split into equal chunks.

    Attributes:
        path: Keys from the root of the tree to the leaf.
        shape: Shape of the leaf.
        dtype: Dtype of the leaf.
        order: Axes of the leaf, from the slowest to the fastest varying in the files.
        rows: Size of a chunk along the first of these axes; the last chunk may be padded.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    order: tuple[int, ...]
    rows: int

    @classmethod
    def of(cls, leaf: Leaf, dtype: np.dtype) -> "LeafFiles":
        """Lay out a leaf in the axis order of its source tensors."""
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
        """Shape of a chunk, with the axes of the leaf."""
        shape = list(self.shape)
        if self.order:
            shape[self.order[0]] = self.rows
        return tuple(shape)

    @property
    def chunk_nbytes(self) -> int:
        """Bytes of the file of each chunk."""
        return math.prod(self.chunk_shape) * self.dtype.itemsize

    @property
    def num_chunks(self) -> int:
        """Number of chunks."""
        return -(-self.shape[self.order[0]] // self.rows) if self.order else 1

    def chunk_file(self, folder: Path, chunk: int) -> Path:
        """Return the file of a chunk in the checkpoint `folder`."""
        index = [0] * len(self.shape)
        if self.order:
            index[self.order[0]] = chunk
        return folder.joinpath(".".join(self.path), "c", *map(str, index))

    def files(self, folder: Path) -> Iterator[tuple[Path, int | None]]:
        """Yield the files in the checkpoint `folder` and their bytes; None for the metadata."""
        yield folder / ".".join(self.path) / "zarr.json", None
        for chunk in range(self.num_chunks):
            yield self.chunk_file(folder, chunk), self.chunk_nbytes

    @property
    def metadata(self) -> dict[str, Any]:
        """The content of zarr.json, whose codecs leave the bytes as they are."""
        transpose = {"name": "transpose", "configuration": {"order": self.order}}
        as_they_are = {"name": "bytes", "configuration": {"endian": "little"}}
        return _ZARR | {
            "shape": self.shape,
            "data_type": self.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": self.chunk_shape}},
            "codecs": [transpose, as_they_are] if self.order else [as_they_are],
        }


def create_checkpoint(folder: Path, leaves: Mapping[tuple[str, ...], LeafFiles]) -> None:
    """Make an orbax checkpoint whose chunks have their size but no values yet.

    Args:
        folder: Folder of the checkpoint, a real path, which must not exist.
        leaves: Layout of each leaf, by path.

    Raises:
        OSError: If the system refuses to write.
    """
    begun = time.time_ns()
    folder.mkdir()
    for path, leaf in leaves.items():
        lying = folder / ".".join(path)
        lying.mkdir()
        text = json.dumps(leaf.metadata, separators=(",", ":"), sort_keys=True)
        (lying / "zarr.json").write_text(text, encoding="utf-8")
        for chunk in range(leaf.num_chunks):
            file = leaf.chunk_file(folder, chunk)
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("xb") as stream:
                os.truncate(stream.fileno(), leaf.chunk_nbytes)
    tree = {
        str(path): {
            "key_metadata": [{"key": key, "key_type": _DICTIONARY_KEY} for key in path],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
        for path in sorted(leaves)
    }
    times = {"init_timestamp_nsecs": begun, "commit_timestamp_nsecs": time.time_ns()}
    texts = {
        "_METADATA": json.dumps({"tree_metadata": tree} | _TREE),
        "_CHECKPOINT_METADATA": json.dumps(_CHECKPOINT | times),
        "commit_success.txt": f"Checkpoint commit was successful to {folder.name}",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def checkpoint_nbytes(leaves: Mapping[tuple[str, ...], LeafFiles]) -> int:
    """Return the bytes of a checkpoint, exact up to some hundreds of metadata per leaf."""
    chunks = sum(leaf.num_chunks * leaf.chunk_nbytes for leaf in leaves.values())
    return chunks + _BYTES_A_LEAF * len(leaves) + _BYTES_A_CHECKPOINT


def open_leaves(
    folder: Path, leaves: Mapping[tuple[str, ...], LeafFiles]
) -> dict[tuple[str, ...], ts.TensorStore]:
    """Open the leaves of a checkpoint, by path, without reading their values.

    Args:
        folder: Folder of the checkpoint, a real path: tensorstore takes no `..`.
        leaves: Layout that each leaf must have, whose files were checked to be regular.

    Raises:
        DamageError: If zarr's metadata differ.
        RefusedError: If the system does not let them be read.
    """
    opening, opened = {}, {}
    for path, leaf in leaves.items():
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{folder / '.'.join(path)}/"},
            "metadata": leaf.metadata,  # must be what is on disk
            "fill_missing_data_reads": False,  # a missing chunk would read as zeros
        }
        opening[path] = ts.open(spec, open=True, read=True)
    for path, store in opening.items():
        with readable(folder, path):
            opened[path] = store.result()
    return opened


@contextlib.contextmanager
def readable(folder: Path, path: tuple[str, ...]) -> Iterator[None]:
    """Turn any error of tensorstore about a leaf into one sentence.

    Raises:
        RefusedError: If the system does not let the leaf be read.
        DamageError: If its files are damaged.
    """
    try:
        yield
    except (ConversionError, MemoryError):
        raise
    except Exception as error:
        # After the reason, tensorstore repeats the request and names lines of its own source.
        reason = (str(error) or type(error).__name__).split(" [")[0].splitlines()[0][:200]
        leaf = ".".join(path)
        if isinstance(error, OSError) or reason.startswith(_OF_THE_SYSTEM):
            raise RefusedError(f"{folder / leaf}: cannot be read ({reason}).") from error
        raise unreadable(folder, f"{leaf}: {reason}") from error


def unreadable(folder: Path, fault: str) -> DamageError:
    """Return the error for a checkpoint that is not as it was converted."""
    return DamageError(
        f"{folder}: cannot be read as an orbax checkpoint ({fault}): convert the source again."
    )
