"""Copy a component's tensors from their files into those of the checkpoint, a piece at a time.

Everything that a piece needs (digest, check for NaN, cast) is done while it is in the processor's
cache. Several threads copy a tensor each, in the order of the source's files.
"""

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from svg_jax.convert.checkpoint.manifest import TensorRecord
from svg_jax.convert.checkpoint.orbax_writer import LeafFiles, create_checkpoint
from svg_jax.convert.errors import ConversionError
from svg_jax.convert.formats.checked_files import check_regular
from svg_jax.convert.formats.digests import file_digest, running_digest
from svg_jax.convert.formats.stored_tensor import (
    StoredTensor,
    count_nonfinite,
    read_pieces,
    read_tensor,
)
from svg_jax.convert.lora.change import Change, add_changes
from svg_jax.convert.plan import ComponentPlan
from svg_jax.convert.progress import Advance

_MOST_WORKERS = 8  # more do not read a disk faster
_SYNCED_BYTES = 2**20  # files of at least this size are synced as soon as they are written
_PIECE = 1 << 20  # elements of a changed tensor that are cast at once


@dataclass(frozen=True)
class _Place:
    """Where a tensor goes in the files of a leaf.

    Attributes:
        leaf: Files of the leaf.
        start: First byte of the tensor, counted through all these files.
        nbytes: Bytes of the tensor there.
        is_first: Whether the tensor is written; tied ones are only compared with the first.
    """

    leaf: LeafFiles
    start: int
    nbytes: int
    is_first: bool


def copy_weights(
    component: ComponentPlan, folder: Path, *, allow_nonfinite: bool, advance: Advance
) -> tuple[dict[str, TensorRecord], dict[Path, str], dict[str, str]]:
    """Write the orbax checkpoint of a component.

    Args:
        component: Component to copy.
        folder: Folder of the checkpoint, which must not exist.
        allow_nonfinite: Whether NaN and infinities are allowed.
        advance: Function called with the bytes of each tensor that was read.

    Returns:
        The record of each tensor by its name in the source, the digests (sha256) of the files that
        were read, and those of the checkpoint's files by their path in it.

    Raises:
        ConversionError: If a tensor cannot be read or converted, or tied ones differ.
        OSError: If the system refuses to write.
    """
    create_checkpoint(folder, component.files)
    places = _places(component)
    stopped, memory = threading.Event(), threading.Lock()
    synced: list[Future[None]] = []

    def position(name: str) -> tuple[str, int]:
        stored = component.tensors[name]
        return str(stored.file), (stored.parts[0] if stored.parts else stored).start

    def copy(name: str) -> TensorRecord:
        stored, place = component.tensors[name], places[name]
        changes = component.changes.get(name, ())
        takes_memory = bool(changes) or stored.strides is not None
        with (
            memory if takes_memory else nullcontext(),
            _writing(folder, place, close)
            if place.is_first
            else nullcontext(lambda _: None) as write,
        ):
            return _copy_tensor(
                stored, changes, place.leaf.dtype, write, stopped, allow_nonfinite=allow_nonfinite
            )

    def close(file: int, nbytes: int) -> None:
        if nbytes < _SYNCED_BYTES:
            os.close(file)
        else:  # sync in the background, while other tensors are copied
            synced.append(syncing.submit(_sync_and_close, file))

    workers = min(_MOST_WORKERS, 1 + (os.cpu_count() or 1))
    with (
        ThreadPoolExecutor(1, thread_name_prefix="svg-jax-sync") as syncing,
        ThreadPoolExecutor(workers, thread_name_prefix="svg-jax-copy") as pool,
    ):
        try:
            digests: dict[Path, Future[str]] = {}
            copies: dict[str, Future[TensorRecord]] = {}
            for name in sorted(places, key=position):
                file = component.tensors[name].file
                if file not in digests:  # near its tensors' copies, so that the disk reads it once
                    digests[file] = pool.submit(_source_digest, file)
                copies[name] = pool.submit(copy, name)
            records = {}
            for name, future in copies.items():
                records[name] = future.result()
                advance(component.tensors[name].nbytes, component.name)
            _check_tied(component, records)
            for file in component.states.keys() - digests.keys() - component.digests.keys():
                digests[file] = pool.submit(_source_digest, file)
            known = {
                place.leaf.chunk_file(folder, place.start // place.nbytes): records[name]
                for name, place in places.items()
                if place.is_first and place.nbytes == place.leaf.chunk_nbytes
            }
            others = [file for file in folder.rglob("*") if file.is_file() and file not in known]
            files = {file: record.stored_sha256 for file, record in known.items()}
            files |= dict(zip(others, pool.map(file_digest, others), strict=True))
            for future in synced:
                future.result()
            sources = {
                file: component.digests.get(file) or digests[file].result()
                for file in component.states
            }
            return records, sources, {f.relative_to(folder).as_posix(): files[f] for f in files}
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)


def _places(component: ComponentPlan) -> dict[str, _Place]:
    places = {}
    for leaf in component.leaves:
        files = component.files[leaf.path]
        nbytes = math.prod(leaf.rule.source_shape) * files.dtype.itemsize
        for layer, names in enumerate(leaf.names):
            for name in names:
                places[name] = _Place(files, layer * nbytes, nbytes, name == names[0])
    return places


def _source_digest(file: Path) -> str:
    check_regular(file)  # opening a pipe would wait forever
    try:
        return file_digest(file)
    except OSError as error:
        raise ConversionError(f"{file}: cannot be read: {error.strerror}.") from error


def _sync_and_close(file: int) -> None:
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextmanager
def _writing(
    folder: Path, place: _Place, close: Callable[[int, int], None]
) -> Iterator[Callable[[np.ndarray], None]]:
    """Give a function that writes a tensor's pieces, in order, into the files of its chunks.

    Args:
        folder: Folder of the checkpoint.
        place: Place of the tensor.
        close: Function called with the descriptor of each finished file, and the bytes written.
    """
    at, chunk, file, begun = place.start, -1, -1, 0

    def write(piece: np.ndarray) -> None:
        nonlocal at, chunk, file, begun
        left = piece.view(np.uint8).data
        while left:
            wanted, offset = divmod(at, place.leaf.chunk_nbytes)
            if wanted != chunk:
                finish()
                file = os.open(place.leaf.chunk_file(folder, wanted), os.O_WRONLY)
                chunk, begun = wanted, at
            count = os.pwrite(file, left[: place.leaf.chunk_nbytes - offset], offset)
            at, left = at + count, left[count:]

    def finish() -> None:
        if file >= 0:
            close(file, at - begun)

    try:
        yield write
    finally:
        finish()


def _copy_tensor(
    stored: StoredTensor,
    changes: Sequence[Change],
    dtype: np.dtype,
    write: Callable[[np.ndarray], None],
    stopped: threading.Event,
    *,
    allow_nonfinite: bool,
) -> TensorRecord:
    """Read a tensor, apply changes, write it as `dtype`, and return its record."""
    read, written = running_digest(), running_digest()
    is_kept = not changes and stored.is_plain and stored.dtype == dtype
    nonfinite = 0

    def write_cast(piece: np.ndarray, nonfinite: int) -> None:
        with np.errstate(over="ignore"):
            cast = piece.astype(dtype)
        if count_nonfinite(cast) > nonfinite:
            raise ConversionError(
                f"{stored.file}: {stored.name} has values that {dtype.name} cannot hold: choose "
                "another dtype."
            )
        written.update(cast.view(np.uint8).data)
        write(cast)

    for elements, piece in read_pieces(stored):
        if stopped.is_set():
            raise ConversionError(f"{stored.file}: {stored.name} was not read to its end.")
        read.update(elements.view(np.uint8).data)
        found = count_nonfinite(piece)
        nonfinite += found
        if is_kept:
            write(piece)
        elif not changes:
            write_cast(piece, found)
    if nonfinite and not allow_nonfinite:
        raise ConversionError(
            f"{stored.file}: {stored.name} holds NaN or infinities ({nonfinite} of "
            f"{math.prod(stored.shape)}): these weights cannot be used, unless you allow them."
        )
    if changes:
        changed = add_changes(read_tensor(stored), changes).reshape(-1)
        for piece in np.split(changed, range(_PIECE, changed.size, _PIECE)):
            write_cast(piece, count_nonfinite(piece))
    return TensorRecord(
        shape=stored.shape,
        dtype=stored.dtype.name,
        sha256=read.hexdigest(),
        stored_dtype=dtype.name,
        stored_sha256=(read if is_kept else written).hexdigest(),
        nonfinite=nonfinite,
    )


def _check_tied(component: ComponentPlan, records: Mapping[str, TensorRecord]) -> None:
    for leaf in component.leaves:
        for first, *tied in leaf.names:
            for name in tied:
                one, other = records[name], records[first]
                if (one.sha256, one.stored_sha256) != (other.sha256, other.stored_sha256):
                    raise ConversionError(
                        f"{component.tensors[name].file}: {name} and {first} are one weight of the "
                        "model and differ: remove the wrong one."
                    )
