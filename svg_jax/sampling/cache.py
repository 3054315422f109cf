"""From a model in any form to a converted folder; conversions are made once, into a cache.

The cache has a folder for each state of each source. Any of them may be deleted while no pipeline
of it is in use, and so may a conversion's source in the hub's cache.
"""

import json
import logging
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from svg_jax.bundled import bundled_or
from svg_jax.convert import convert_pipeline
from svg_jax.convert.checkpoint.manifest import FORMAT_VERSION, NAME
from svg_jax.convert.checkpoint.staging import standing_folder
from svg_jax.convert.components import read_pipeline_index
from svg_jax.convert.formats.digests import bytes_digest, file_digest
from svg_jax.convert.paths import real_path, usable_path
from svg_jax.convert.progress import Progress
from svg_jax.convert.run_defaults import FILE as RUN_DEFAULTS
from svg_jax.convert.sources.hub import download_components, download_index, is_hub_id

_LOGGER = logging.getLogger(__name__)
_READ_WHOLE = 2**20  # bytes; larger files are known by size and time


def converted_folder(
    model: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | Path | None = None,
    check: Callable[[Path], None],
    progress: Progress | None = None,
) -> Path:
    """Find the converted folder of a model, which is downloaded and converted if need be.

    Args:
        model: See `from_pretrained`.
        revision: See `from_pretrained`.
        variant: See `from_pretrained`.
        cache_dir: See `from_pretrained`.
        check: Function that is called with the folder of model_index.json before anything large is
            done.
        progress: See `convert_pipeline`.

    Raises:
        ValueError: If it is no model, cannot be converted, or an argument does not fit.
        OSError: If the hub or the disk refuses.
    """
    model = bundled_or(model)
    folder, fetch = standing_folder(usable_path(model)), None
    if not folder.exists() and isinstance(model, str) and is_hub_id(model):
        folder = download_index(model, revision=revision, cache_dir=cache_dir)
        fetch = partial(download_components, model, folder, variant=variant, cache_dir=cache_dir)
    elif revision is not None:
        raise ValueError(f"{model}: revision={revision!r} goes with a hub id alone.")
    elif folder.exists() and not folder.is_dir():
        raise ValueError(
            f"{model}: is a file, and a pipeline is a folder: give one that is converted, or in "
            "diffusers' layout."
        )
    elif not folder.is_dir():
        raise ValueError(
            f"{model}: is no folder, and no hub id (owner/name) either: check the path."
        )
    elif os.path.lexists(folder / NAME):
        if variant is not None:
            raise ValueError(f"{model}: is converted, so that variant={variant!r} has no meaning.")
        return folder
    elif not (folder / "model_index.json").is_file():
        raise ValueError(
            f"{model}: is no pipeline: it holds neither {NAME} (a converted one) nor "
            "model_index.json (one in diffusers' layout)."
        )
    check(folder)
    target = cache_folder(cache_dir) / f"{_name(folder)}-{_fingerprint(folder, variant)}"
    if not (target / NAME).is_file():  # a conversion appears as a whole
        _convert_once(folder, target, variant, progress, fetch)
    return target


def _convert_once(
    source: Path,
    target: Path,
    variant: str | None,
    progress: Progress | None,
    fetch: Callable[[], None] | None,
) -> None:
    """Fetch and convert in one process, for which others that want the same wait."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"conversions cannot be kept there ({error.strerror}): set SVG_JAX_CACHE"
        raise OSError(error.errno, reason, str(target.parent)) from error
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _LOGGER.info("waiting for another process that converts %s", source)
        lock.acquire()
    try:
        if not (target / NAME).is_file():
            if fetch is not None:
                fetch()
            _LOGGER.info("converting %s, once, into %s", source, target)
            convert_pipeline(source, target, variant=variant, progress=progress)
    finally:
        lock.release()


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Choose the folder of what is kept between runs: `cache_dir`, $SVG_JAX_CACHE or ~/.cache."""
    if cache_dir is not None:
        return real_path(cache_dir) / "svg-jax"
    if named := os.environ.get("SVG_JAX_CACHE"):
        return real_path(named)
    return real_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "svg-jax"


def _commit(source: Path) -> tuple[str, str] | None:
    """Read repository and commit of a snapshot in the hub's cache, whose files never change."""
    snapshots = source.parent
    repository = snapshots.parent.name
    if snapshots.name != "snapshots" or not repository.startswith("models--"):
        return None
    return (repository, source.name) if re.fullmatch("[0-9a-f]{40}", source.name) else None


def _name(source: Path) -> str:
    source = source.resolve()
    commit = _commit(source)
    return source.name if commit is None else commit[0].rpartition("--")[2]


def _fingerprint(source: Path, variant: str | None) -> str:
    """Digest the state of a source.

    A commit determines it; that of another folder is its path, its small files' contents, and its
    large files' sizes and times.
    """
    source = source.resolve()
    state: Any = _commit(source)
    if state is None:
        parts = sorted(read_pipeline_index(source).classes)
        files = [source / "model_index.json", source / RUN_DEFAULTS]
        files += [file for part in parts for file in sorted((source / part).glob("*"))]
        state = [str(source), [_state(file, source) for file in files if file.is_file()]]
    text = json.dumps([FORMAT_VERSION, variant, state])
    return bytes_digest(text.encode())[:16]


def _state(file: Path, source: Path) -> list[Any]:
    stat = file.stat()
    small = stat.st_size <= _READ_WHOLE and file.suffix != ".safetensors"
    content = file_digest(file) if small else stat.st_mtime_ns
    return [file.relative_to(source).as_posix(), stat.st_size, content]
