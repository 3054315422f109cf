"""A run's state on disk, from which a run that was killed continues bit for bit.

A state file is an .npz as numpy reads it: the arrays of the sampler's state and of its steps'
findings, and `header`, which is JSON: the run's fingerprint and the rest of the steps' records.
The archive's comment, the last bytes of the file, is the sha256 of all bytes before it.

What follows from the settings (schedule, guidance, noise, encoded prompts) is not stored but made
again: the encoders take a minute or less, the steps an hour.
"""

import dataclasses
import io
import json
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from svg_jax.attention import SparseAttentionInfo
from svg_jax.convert.files import check_writable, open_regular, remove_leftovers, written_atomically
from svg_jax.convert.formats.digests import bytes_digest
from svg_jax.sampling.identity import Fingerprint, check_same_run
from svg_jax.sampling.records import StepRecord
from svg_jax.sampling.schedules.steps import SamplerState
from svg_jax.sampling.settings import RunSettings

FORMAT_VERSION = 2
_DIGEST_BYTES = 64  # sha256 in hexadecimal
_MOST_BYTES = 2**31  # of a state file; HunyuanVideo's in 720p has 0.1 GB
_PROFILE = tuple(field.name for field in dataclasses.fields(SparseAttentionInfo))


@dataclass(frozen=True, eq=False)
class RunFile:
    """The file of a run's state, and what was found there.

    Attributes:
        path: Path of the file.
        fingerprint: Fingerprint of the run.
        save_every: Number of steps from one save to the next; 0 saves nothing.
        arrays: Arrays of the saved sampler's state, by their place in it; None starts at the first
            step.
        records: Records of the steps that were done when the file was opened.
    """

    path: Path
    fingerprint: Fingerprint
    save_every: int
    arrays: Mapping[str, np.ndarray] | None = None
    records: tuple[StepRecord, ...] = ()

    def state_like(self, state: SamplerState) -> SamplerState:
        """Give the saved state the structure of another one of the same run, the first if none is.

        Raises:
            ValueError: If names, shapes or dtypes of its arrays differ.
        """
        if self.arrays is None:
            return state
        leaves, structure = _named_leaves(state), jax.tree.structure(state)
        if _kinds(self.arrays) != _kinds(leaves):
            raise damaged(self.path)
        return jax.tree.unflatten(structure, [jnp.asarray(self.arrays[name]) for name in leaves])

    def remove(self) -> None:
        """Remove the file, when the outcome is safe elsewhere."""
        self.path.unlink(missing_ok=True)


def open_run_file(settings: RunSettings, fingerprint: Fingerprint) -> RunFile:
    """Read a run's state file before the work, if there is one.

    Args:
        settings: Settings of the run, with a `state_file`.
        fingerprint: Fingerprint of the run that is to be saved there or continued.

    Raises:
        FileExistsError: If there is a state and `resume` is not set: it would be lost.
        FileNotFoundError: If the folder does not exist.
        ValueError: If the state is another run's or damaged.
    """
    assert settings.state_file is not None
    path = Path(settings.state_file)
    check_writable(path)
    remove_leftovers(path)
    if path.exists() and not settings.resume:
        raise FileExistsError(
            f"{path} holds a run that was not finished: continue with resume=True, or delete the "
            "file to start over"
        )
    if path.exists():
        return load_run(path, fingerprint, settings)
    return RunFile(path, fingerprint, settings.save_every)


@contextmanager
def saving(file: RunFile) -> Iterator[Callable[[SamplerState, StepRecord], None]]:
    """Give the function to call after each step, which saves the run every so many steps.

    The copy from the device starts after the step; another thread waits for it and writes it. The
    loop waits for a save only if the one before is still being written. Whatever ends the run, its
    last state is saved. A save that fails is a warning: the run may outlive a full disk.
    """
    records, unsaved = list(file.records), 0
    latest: SamplerState | None = None
    pending: Future[None] | None = None

    def finish_save() -> None:
        nonlocal pending
        if pending is None:
            return
        try:
            pending.result()
        except (OSError, RuntimeError) as error:  # RuntimeError: a device that failed
            warnings.warn(f"the run's state could not be saved: {error}", stacklevel=3)
        pending = None

    def start_save() -> None:
        nonlocal pending, unsaved
        finish_save()
        with suppress(RuntimeError):  # the thread says it
            for array in jax.tree.leaves(latest):
                array.copy_to_host_async()
        pending = thread.submit(save_run, file.path, latest, tuple(records), file.fingerprint)
        unsaved = 0

    def save(state: SamplerState, record: StepRecord) -> None:
        nonlocal latest, unsaved
        records.append(record)
        latest, unsaved = state, unsaved + 1
        if unsaved == file.save_every:
            start_save()

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="svg-jax-save") as thread:
        try:
            yield save
        finally:
            if unsaved and file.save_every:
                start_save()
            finish_save()


def save_run(
    path: Path,
    state: SamplerState | None,
    records: tuple[StepRecord, ...],
    fingerprint: Fingerprint,
) -> None:
    """Write a state file, whole or not at all, and wait for the disk.

    Raises:
        OSError: If it cannot be written.
    """
    arrays: dict[str, Any] = {name: np.asarray(leaf) for name, leaf in _named_leaves(state).items()}
    steps = []
    for record in records:
        values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
        steps.append(values | {"profile": record.profile is not None})
        if record.profile is not None:
            profile = {name: getattr(record.profile, name) for name in _PROFILE}
            arrays |= {f"steps.{record.step}.{name}": profile[name] for name in _PROFILE}
    header = {"format_version": FORMAT_VERSION, "fingerprint": dict(fingerprint), "steps": steps}
    file = io.BytesIO()
    np.savez(file, header=np.array(json.dumps(header)), **arrays)
    with zipfile.ZipFile(file, "a") as archive:
        archive.comment = bytes(_DIGEST_BYTES)
    content = file.getbuffer()[:-_DIGEST_BYTES]
    with written_atomically(path) as temporary, temporary.open("wb") as out:
        out.write(content)
        out.write(bytes_digest(content).encode())
        out.flush()
        os.fsync(out.fileno())


def load_run(path: Path, fingerprint: Fingerprint, settings: RunSettings) -> RunFile:
    """Read a state file.

    Args:
        path: Path of the file.
        fingerprint: Fingerprint of the run that is to be continued.
        settings: Settings of that run.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is damaged, or another run's; names the differences.
    """
    arrays, header = _read_file(path)
    check_same_run(path, header["fingerprint"], fingerprint, settings)
    try:
        records = tuple(_read_record(values, arrays) for values in header["steps"])
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(path) from error
    if [record.step for record in records] != list(range(len(records))):
        raise damaged(path)
    return RunFile(path, fingerprint, settings.save_every, arrays, records)


def _read_record(values: Mapping[str, Any], arrays: dict[str, np.ndarray]) -> StepRecord:
    """Read a step's record, and take its arrays out of the file's."""
    profile = None
    if values["profile"]:
        profile = SparseAttentionInfo(
            *(arrays.pop(f"steps.{values['step']}.{name}") for name in _PROFILE)
        )
        layers, entries, heads = profile.labels.shape
        shapes = profile.errors.shape, profile.density.shape
        if profile.labels.dtype != np.bool_ or shapes != ((layers, entries, heads, 2), (layers,)):
            raise ValueError(f"the profile of step {values['step']} has other shapes")
    return StepRecord(**{**values, "profile": profile})


def saved_fingerprint(path: str | Path) -> Fingerprint:
    """Read the fingerprint in a state file; empty if there is no file. Errors: see `load_run`."""
    path = Path(path)
    return _read_file(path)[1]["fingerprint"] if path.exists() else {}


def _read_file(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read the arrays and the header of a state file; see `load_run`."""
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > _MOST_BYTES:
            raise damaged(path)
        content = memoryview(file.read())
    body, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    if bytes_digest(body).encode() != digest:
        raise damaged(path)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = dict(file)
        header = dict(json.loads(arrays.pop("header").item()))
        version = header["format_version"]
        header |= {"fingerprint": dict(header["fingerprint"]), "steps": list(header["steps"])}
    except Exception as error:  # anybody can write a file with its right digest
        raise damaged(path) from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} is of another version of svg-jax: remove it to start anew")
    return arrays, header


def damaged(path: Path) -> ValueError:
    """Make the error for a file that `save_run` did not write."""
    return ValueError(f"{path} is damaged or no run's state: remove it to start anew")


def _named_leaves(state: SamplerState | None) -> dict[str, Any]:
    leaves = jax.tree.leaves_with_path(state)
    return {"state" + jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _kinds(arrays: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Give shape and dtype of each array."""
    return {name: (array.shape, array.dtype) for name, array in arrays.items()}
