"""Orbax folders written and read a slab at a time, so that no model has to fit into memory.

The layout is orbax's standard one (OCDBT, zarr3), which `StandardCheckpointer().restore` reads.
"""

import asyncio
import contextlib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from svg_jax.convert.digests import WrittenDigests
from svg_jax.convert.rules import ConversionError

# Leaves above this many bytes are stored in chunks (stacked ones a layer a chunk) and written some
# chunks at a time.
SLAB_BYTES = 64 * 2**20
_INLINED_BYTES = 1024  # orbax's setting
_BYTES_A_LEAF, _BYTES_A_KEY = 1200, 13  # measured at 10 to 200 leaves


@dataclass(frozen=True)
class LazyArray:
    """An array that is made piece by piece while it is written.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        stacked: Whether the leading axis counts layers.
        slabs: Makes the pieces, each with the part of the leading axis that it fills.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: bool
    slabs: Callable[[], Iterator[tuple[slice | EllipsisType, np.ndarray]]]

    @property
    def size(self) -> int:
        """Number of elements; orbax asks for it."""
        return math.prod(self.shape)


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Writes lazy arrays one after the other, where orbax would take all of them at once."""

    def __init__(self, digests: WrittenDigests) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self._turn = asyncio.Lock()
        self._digests = digests
        self.failure: BaseException | None = None  # ends the writing, and is for the caller

    async def _open_and_write(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, value: LazyArray, tspec: dict[str, Any], ts_context: ts.Context
    ) -> None:
        async with self._turn:
            if self.failure is not None:
                return
            pending = None  # a write that goes on while the next slab is read
            try:
                spec = ts.Spec(tspec)
                array = await ts.open(spec, create=True, open=True, context=ts_context)
                chunk = array.chunk_layout.write_chunk.shape or (1,)
                for part, slab in _row_by_row(value, chunk[0] or 1):
                    if pending is not None:
                        await pending
                    if self.failure is not None:
                        return
                    self._digests.take()
                    pending = array[part].write(slab)
            except Exception as error:  # raised here, orbax would log it from two of its threads
                self.failure = error
            finally:
                try:
                    if pending is not None:
                        await pending
                except Exception as error:
                    self.failure = self.failure or error


def _row_by_row(value: LazyArray, rows: int) -> Iterator[tuple[slice | EllipsisType, np.ndarray]]:
    """The slabs, those that are a whole array cut into rows of chunks: each write takes a copy."""
    for part, slab in value.slabs():
        if part is not ... or slab.ndim == 0:
            yield part, slab
            continue
        for start in range(0, len(slab), rows):
            yield slice(start, min(start + rows, len(slab))), slab[start : start + rows]


def write_tree(folder: Path, tree: Mapping[str, Any]) -> dict[str, str]:
    """Writes a nested dict of `LazyArray`s as an orbax checkpoint.

    Args:
        folder: The checkpoint's folder; it must not exist.
        tree: The arrays. What their `slabs` raise comes out of here.

    Returns:
        Digests (sha256) of all files, by their path from `folder`.

    Raises:
        OSError: If the system refuses to write: no room, no right.
    """
    digests = WrittenDigests(folder)
    arrays = _LazyHandler(digests)
    registry = ocp.type_handlers.create_type_handler_registry(
        (LazyArray, arrays),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # orbax warns without one
    )
    pytree_handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=True, use_zarr3=True, use_compression=False, type_handler_registry=registry
    )
    save_args = jax.tree.map(_save_args, tree)

    def save() -> None:
        with ocp.Checkpointer(pytree_handler) as checkpointer:
            args = ocp.args.PyTreeSave(dict(tree), save_args=save_args)
            checkpointer.save(folder.absolute(), args=args)

    try:
        _run_to_end(save, arrays)
        if arrays.failure is not None:
            raise arrays.failure
        return digests.result()
    except Exception as failure:
        # tensorstore makes ValueErrors of the system's errors
        if code := re.search(r"os_error_code='(\d+)'", str(failure)):
            number = int(code[1])
            raise OSError(number, os.strerror(number), str(folder)) from failure
        raise
    finally:
        digests.close()


def _run_to_end(save: Callable[[], None], arrays: _LazyHandler) -> None:
    """Runs orbax in a thread, because Ctrl-C would leave its own threads writing after the return.

    Raises:
        Exception: What orbax raises, unless it is a consequence of the handler's own failure.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        saving = pool.submit(save)
        try:
            failure = saving.exception()
        except KeyboardInterrupt as interrupt:
            arrays.failure = interrupt
            raise
    if failure is not None and arrays.failure is None:
        raise failure


def _save_args(array: LazyArray) -> ocp.SaveArgs:
    if array.size * array.dtype.itemsize <= SLAB_BYTES:
        return ocp.SaveArgs()
    if array.stacked:
        return ocp.SaveArgs(shard_axes=(0,))
    return ocp.SaveArgs(chunk_byte_size=SLAB_BYTES)


def checkpoint_overhead(leaves: Sequence[int]) -> int:
    """Bytes that a checkpoint takes beside its numbers, to some 20 %.

    Each write (of a leaf's description, and of each slab) adds a node with all keys up to then and
    with the arrays that are small enough to stand in it: in the mean half of them.

    Args:
        leaves: Bytes of each leaf.
    """
    writes = sum(1 + max(1, nbytes // SLAB_BYTES) for nbytes in leaves)
    inlined = sum(nbytes for nbytes in leaves if nbytes <= _INLINED_BYTES)
    node = _BYTES_A_KEY * len(leaves) + inlined // 2
    return writes * node + _BYTES_A_LEAF * len(leaves)


def open_leaves(folder: Path) -> dict[tuple[str, ...], ts.TensorStore]:
    """Opens every leaf of an orbax checkpoint without reading it, by its path in the tree.

    Raises:
        ConversionError: If it cannot be read.
    """
    base = f"file://{folder.absolute()}/"

    def spec(path: tuple[str, ...]) -> dict[str, Any]:
        kvstore = {"driver": "ocdbt", "base": base, "path": ".".join(path) + "/"}
        return {"driver": "zarr3", "kvstore": kvstore}

    with readable(folder), ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(folder.absolute()).item_metadata.tree
        paths = [tuple(key.key for key in path) for path, _ in jax.tree.leaves_with_path(tree)]
        opened = [ts.open(spec(path), open=True, read=True) for path in paths]
        return {path: store.result() for path, store in zip(paths, opened, strict=True)}


@contextlib.contextmanager
def readable(what: Path | str) -> Iterator[None]:
    """Turns whatever orbax and tensorstore raise about a damaged checkpoint into one sentence.

    Raises:
        ConversionError: In place of any other error.
    """
    try:
        yield
    except ConversionError:
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise ConversionError(
            f"{what}: cannot be read as an orbax checkpoint ({reason}): convert the source again."
        ) from error
