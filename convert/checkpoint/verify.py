"""Check that a converted folder holds what was converted, to the last bit."""

from collections.abc import Sequence
from pathlib import Path

from svg_jax.convert.checkpoint.folder import check_file, open_folder
from svg_jax.convert.checkpoint.manifest import NAME, SMALL_BYTES, Manifest, read_manifest
from svg_jax.convert.checkpoint.staging import standing_folder
from svg_jax.convert.checkpoint.tensors import open_tensors
from svg_jax.convert.errors import DamageError
from svg_jax.convert.formats.digests import file_digest
from svg_jax.convert.formats.show import show_some
from svg_jax.convert.paths import real_path
from svg_jax.convert.progress import Progress, count_bytes


def verify_pipeline(source: str | Path, *, progress: Progress | None = None) -> Manifest:
    """Read all of a converted folder and compare every file and every tensor with its manifest.

    The files show whether anything has changed since the conversion. The tensors, read through
    orbax in the source's layout, show that the conversion itself was right.

    Args:
        source: Converted folder.
        progress: Function called with (bytes done, bytes in all, component or "files"); weights
            are read twice, as files and as tensors.

    Returns:
        The manifest of the folder.

    Raises:
        ConversionError: If it is no converted folder.
        DamageError: If files or tensors are changed, missing or added; names them.
    """
    source = standing_folder(real_path(source))
    manifest = read_manifest(source)
    expected = {**manifest.files, **manifest.weights}
    there = {
        path.relative_to(source).as_posix(): path
        for path in source.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }
    if missing := sorted(name for name in expected if name not in there):
        raise DamageError(f"{source}: {_list(missing)} missing: convert the source again.")
    if extra := sorted(there.keys() - expected.keys() - {NAME}):
        raise DamageError(f"{source}: {_list(extra)} not put there by the conversion: remove it.")
    sizes, changed = {}, []
    most = max(SMALL_BYTES, manifest.tensor_bytes)
    for name in expected:
        try:
            nbytes = check_file(source, name)
        except DamageError:  # a pipe, say, or a link to elsewhere
            changed.append(name)
        else:
            sizes[name] = min(nbytes, most)
    advance = count_bytes(sum(sizes.values()) + manifest.tensor_bytes, progress)
    for name, nbytes in sizes.items():
        # A file larger than all tensors is wrong, and may be a huge sparse one.
        if there[name].stat().st_size > nbytes or file_digest(there[name]) != expected[name]:
            changed.append(name)
        advance(nbytes, "files")
    if changed:
        raise DamageError(
            f"{source}: {_list(changed)} not as converted: the disk or someone changed it; "
            "convert the source again."
        )
    for component, tensors in open_tensors(open_folder(source)).items():
        for tensor in tensors.values():
            tensor.read()
            advance(tensor.record.stored_nbytes, component)
    return manifest


def _list(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"{names[0]} is"
    return f"{len(names)} files ({show_some(names, 3, 80)}) are"
