"""Find the weights of a component: choose among its files, and read their headers."""

import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from svg_jax.convert.errors import ConversionError
from svg_jax.convert.formats.checked_files import check_inside
from svg_jax.convert.formats.json_file import read_json
from svg_jax.convert.formats.safetensors_file import read_header
from svg_jax.convert.formats.show import show, show_some
from svg_jax.convert.formats.stored_tensor import FLOAT8, StoredTensor
from svg_jax.convert.formats.torch_file import read_dicts, read_torch_file
from svg_jax.convert.tables.registry import STEMS

# Names by diffusers and transformers of weights in safetensors and torch.save's format.
_STEMS = tuple(STEMS.values())
_TORCH_STEMS = ("diffusion_pytorch_model", "pytorch_model")
_SAFETENSORS = (".safetensors", ".sft")
_TORCH = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES = (*_SAFETENSORS, *_TORCH)
_INDEX = re.compile(r"(?P<stem>.+)\.(?P<kind>safetensors|bin)\.index(?P<variant>\.\w+)?\.json")
_HUNYUAN_BLOCK = re.compile(r"((?:\w+\.)*?)(?:double|single)_blocks\..+\.weight")
# Shards and variants, which are not read without an index or a variant that asks for them.
_NOT_ALONE = re.compile(rf".*-\d+-of-\d+\..*|({'|'.join({*_STEMS, *_TORCH_STEMS})})\.\w+\.\w+")


def is_weights(file: Path) -> bool:
    """Return whether a file's suffix, in any case, is that of weights."""
    return file.suffix.lower() in SUFFIXES


def is_torch(file: Path) -> bool:
    """Return whether a file's suffix, in any case, is one for torch.save's format."""
    return file.suffix.lower() in _TORCH


def folder_of(place: Path) -> Path:
    """Return the folder of a component, given that folder or a file of weights in it."""
    return place.parent if is_weights(place) and not place.is_dir() else place


def read_file(file: Path, weights_key: str | None = None) -> Mapping[str, StoredTensor]:
    """Find and check the tensors of one file of weights.

    Args:
        file: File to read.
        weights_key: Key of the weights to read; see `ConversionSettings`.

    Returns:
        The tensors by name, prefixed with the keys that lead to them.

    Raises:
        ConversionError: If the file cannot be read; see `read_header` and `read_torch_file`.
    """
    if not is_torch(file):
        return read_header(file).tensors
    tensors = {
        f"{keys}.{name}" if keys else name: tensor
        for keys, tensors in read_dicts(file, weights_key).items()
        for name, tensor in tensors.items()
    }
    return tensors | _scales_beside(file, tensors)


def _scales_beside(file: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Read the scales of HunyuanVideo's float8 release, which are in a separate file.

    They are named after modules, as in hyvideo/modules/fp8_optimization.py of
    Tencent-Hunyuan/HunyuanVideo.
    """
    named = filter(None, map(_HUNYUAN_BLOCK.match, tensors))
    prefixes = {found[1] for found in named if tensors[found[0]].dtype in FLOAT8.values()}
    if not prefixes or any(name.endswith("scale_weight") for name in tensors):
        return {}
    scales = file.with_name(f"{file.stem}_map{file.suffix}")
    if not os.path.lexists(scales):
        raise ConversionError(
            f"{file}: holds float8 weights of HunyuanVideo without their scales, which its authors "
            f"keep in {scales.name}: put it beside."
        )
    found = read_torch_file(scales)
    return {
        f"{prefix}{name}.scale_weight": scale
        for prefix in prefixes
        for name, scale in found.items()
    }


def read_weights(
    place: Path,
    allowed: Iterable[Path] = (),
    variant: str | None = None,
    weights_key: str | None = None,
) -> Mapping[str, StoredTensor]:
    """Find and check the tensors of a component: of one file, or of shards listed by an index.

    Args:
        place: Folder of the component, or its file of weights.
        allowed: Other folders that symbolic links may lead to, such as `blobs` in the hub's cache.
        variant: Variant of the weights, e.g. "fp16"; None is the one without a name.
        weights_key: Key of the weights to read; see `ConversionSettings`.

    Raises:
        ConversionError: If there are no weights or several sets of them, shards and index do not
            fit exactly, or a file lies outside the folder.
    """
    if folder_of(place) != place:
        return read_file(place, weights_key)
    present = weights_files(place, variant)
    if len(present) > 1:
        names = [path.name for path in present]
        listed = " and ".join(names) if len(named_files(place, variant)) > 1 else show_some(names)
        raise ConversionError(f"{place}: holds {listed}: remove the ones that are not meant.")
    if not present:
        named = "" if variant is None else f".{variant}"
        others = sorted(path.name for path in place.glob("*") if path.suffix != ".json")
        raise ConversionError(
            f"{place}: holds no {_STEMS[0]}{named}.safetensors or {_STEMS[1]}{named}.safetensors, "
            f"nor an index of shards (found: {show_some(others) or 'nothing'}): fetch the "
            "weights, or choose the variant that is there."
        )
    (weights,) = present
    roots = (place, *allowed)
    check_inside(weights, roots)
    if is_weights(weights):
        return read_file(weights, weights_key)
    return _read_shards(weights, roots, weights_key)


def weights_files(place: Path, variant: str | None) -> list[Path]:
    """List the files of weights, or indices of shards, that a component has of a variant.

    Names by diffusers and transformers come first, safetensors before torch.save's format; only
    without these, other names. A component must have exactly one.
    """
    if folder_of(place) != place:
        return [place] if variant is None else []
    if found := named_files(place, variant):
        return found
    if variant is not None or not place.is_dir():
        return []
    others = sorted(
        file for file in place.iterdir() if is_weights(file) and not _NOT_ALONE.fullmatch(file.name)
    )
    return [file for file in others if file.suffix.lower() in _SAFETENSORS] or others


def named_files(folder: Path, variant: str | None) -> list[Path]:
    """List the `weights_files` that have a name by diffusers or transformers."""
    named = "" if variant is None else f".{variant}"
    for stems, kind in ((_STEMS, "safetensors"), (_TORCH_STEMS, "bin")):
        endings = (f"{named}.{kind}", f".{kind}.index{named}.json")
        paths = [folder / f"{stem}{ending}" for stem in stems for ending in endings]
        if found := [path for path in paths if os.path.lexists(path)]:
            return found
    return []


def _read_shards(
    index: Path, roots: Collection[Path], weights_key: str | None
) -> dict[str, StoredTensor]:
    try:
        weight_map = read_json(index)["weight_map"]
    except KeyError as error:
        raise ConversionError(f"{index}: has no weight_map: fetch it again.") from error
    files = weight_map.values() if isinstance(weight_map, dict) else [None]
    if not all(isinstance(file, str) and file.isprintable() for file in files):
        raise ConversionError(f"{index}: its weight_map maps no tensors to files: fetch it again.")
    listed: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        listed.setdefault(shard, set()).add(name)
    _check_shards(index, listed, roots)
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(listed):
        file = index.parent / shard
        if not os.path.lexists(file):
            raise ConversionError(f"{file}: the index lists this shard, it is missing: fetch it.")
        found = read_file(file, weights_key)
        twice = sorted(found.keys() & tensors.keys())
        if twice:
            raise ConversionError(
                f"{file}: {show(twice[0])} is also in {tensors[twice[0]].file.name} ({len(twice)} "
                "tensors are in two shards): fetch the checkpoint again."
            )
        for names, what in (
            (listed[shard] - found.keys(), "lacks tensors that the index says are in it"),
            (found.keys() - listed[shard], "holds tensors that the index does not say are in it"),
        ):
            if names:
                some = show_some(sorted(names))
                raise ConversionError(f"{file}: {what} ({len(names)}: {some}): fetch both again.")
        tensors |= found
    return tensors


def _check_shards(index: Path, listed: Mapping[str, object], roots: Collection[Path]) -> None:
    """Refuse listed shards outside the folder of the index, and unlisted ones in it."""
    folder, parts = index.parent, _INDEX.fullmatch(index.name)
    assert parts is not None  # it is a name by `weights_files`
    for shard in sorted(listed):
        if shard != Path(shard).name or shard in ("", ".."):
            raise ConversionError(
                f"{index}: the shard '{show(shard)}' leads out of its folder: fetch the index "
                "again."
            )
        check_inside(folder / shard, roots, named_by=index)
    # diffusers has two ways to name the shards of a variant.
    stem, kind, variant = (re.escape(part or "") for part in parts.groups())
    pattern = rf"{stem}({variant}-\d+-of-\d+|-\d+-of-\d+{variant})\.{kind}"
    there = {path.name for path in folder.iterdir() if re.fullmatch(pattern, path.name)}
    if stray := there - listed.keys():
        raise ConversionError(
            f"{index}: lists nothing of {show_some(sorted(stray))}: remove the shards that "
            "are not of this checkpoint, or fetch its index."
        )
