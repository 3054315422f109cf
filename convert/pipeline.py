"""A pipeline folder in diffusers' layout to a converted one, a tensor at a time."""

import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from svg_jax.convert.components import (
    COPIED,
    component_leaves,
    read_pipeline_index,
    select_components,
)
from svg_jax.convert.manifest import (
    NAME,
    Manifest,
    TensorRecord,
    digest,
    file_digest,
    library_versions,
    write_manifest,
)
from svg_jax.convert.progress import Progress, count_bytes
from svg_jax.convert.reader import (
    DTYPES,
    StoredTensor,
    all_finite,
    check_inside,
    read_json,
    read_tensor,
    read_weights,
    weights_in,
)
from svg_jax.convert.rules import ConversionError, Leaf
from svg_jax.convert.staging import check_destination, staged_folder
from svg_jax.convert.writer import SLAB_BYTES, LazyArray, write_tree

_COPY_LIMIT = 100 * 2**20  # bytes; nothing in COPIED's folders comes near it


@dataclass(frozen=True)
class _Component:
    """A component that was checked and can be written."""

    name: str
    folder: Path
    tensors: Mapping[str, StoredTensor]
    leaves: tuple[Leaf, ...]
    dtype: np.dtype | None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def convert_pipeline(
    source: str | Path,
    destination: str | Path,
    *,
    components: Collection[str] | None = None,
    dtype: DTypeLike | None = None,
    variant: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Converts a pipeline folder in diffusers' layout into orbax checkpoints.

    The result holds `model_index.json`, `manifest.json`, the files of scheduler, tokenizers and
    image processor, and per component `config.json` and `weights/`, an orbax checkpoint of the
    module's pure dict. It appears whole or not at all. At no time more than a few tensors are in
    memory. Tensors that nothing needs (Wan I2V's `norm_added_q`, LLaVA's `lm_head`) are left out.

    Args:
        source: Folder with model_index.json. Weights are safetensors, one file or shards.
        destination: Folder to be made.
        components: Components to convert, e.g. ("transformer", "text_encoder"); the others are
            left out and named in the manifest. None takes all and refuses those not ported yet.
        dtype: float32, float16 or bfloat16 to cast every weight to. None keeps what is stored,
            tensor by tensor: a component may mix dtypes (T5's `wo` in float32 among float16), the
            layers of one stacked weight may not.
        variant: Which weights to convert where a component has them, e.g. "fp16".
        overwrite: Whether to replace a checkpoint folder that is at `destination`.
        progress: Called with (bytes done, bytes in all, component).

    Raises:
        ConversionError: One sentence that says what is wrong with the source or the destination,
            where, and what to do. At `destination` is then what was there before, or nothing.
    """
    source, destination = Path(source), Path(destination)
    if (source / NAME).is_file():
        raise ConversionError(f"{source}: is converted already: use it as it is.")
    cast = None if dtype is None else _weight_dtype(dtype)
    index = read_pipeline_index(source)
    chosen = select_components(index, components, source)
    allowed = _link_targets(source)
    if variant is not None and not any(weights_in(source / name, variant) for name in chosen):
        raise ConversionError(f"{source}: holds no weights of the variant {variant!r}: omit it.")
    plan = [_check_component(source / c, index.classes[c], cast, allowed, variant) for c in chosen]
    files = _small_files(source, [name for name in COPIED if name in index.classes], allowed)

    total = sum(component.nbytes for component in plan)
    largest_growth = 1 if cast is None else cast.itemsize / min(d.itemsize for d in DTYPES.values())
    check_destination(destination, source, int(total * largest_growth), overwrite)
    advance = count_bytes(total, progress)
    records = {}
    with staged_folder(destination, overwrite=overwrite) as staging:
        for name, file in files.items():
            (staging / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, staging / name)
        for component in plan:
            records[component.name] = _write_component(component, staging, advance)
        copied = sorted(files) + [f"{component.name}/config.json" for component in plan]
        manifest = Manifest(
            source=source.resolve().name,
            pipeline=index.pipeline,
            components=records,
            skipped=tuple(sorted(index.classes.keys() - set(COPIED) - set(chosen))),
            files={name: file_digest(staging / name) for name in copied},
            versions=library_versions(),
        )
        write_manifest(staging, manifest)


def _weight_dtype(dtype: DTypeLike) -> np.dtype:
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found not in DTYPES.values():
        raise ConversionError(f"dtype={dtype!r}: must be float32, float16 or bfloat16.")
    return found


def _link_targets(source: Path) -> tuple[Path, ...]:
    """Where links in the source may lead: the hub's cache keeps a snapshot's files in `blobs`."""
    cached = source.resolve().parent.name == "snapshots"
    return (source, source.resolve().parent.parent / "blobs") if cached else (source,)


def _small_files(source: Path, folders: list[str], allowed: tuple[Path, ...]) -> dict[str, Path]:
    """The files that are carried as they are, by their path in the folder."""
    files = {"model_index.json": source / "model_index.json"}
    for name in folders:
        found = sorted(file for file in (source / name).glob("*") if file.is_file())
        if not found:
            raise ConversionError(f"{source / name}: model_index.json lists it and it is missing.")
        for file in found:
            check_inside(file, allowed)
            if file.stat().st_size > _COPY_LIMIT:
                raise ConversionError(f"{file}: is too large for a {name}: remove it.")
            files[f"{name}/{file.name}"] = file
    return files


def _check_component(
    folder: Path,
    class_name: str,
    dtype: np.dtype | None,
    allowed: tuple[Path, ...],
    variant: str | None,
) -> _Component:
    tensors = read_weights(folder, allowed, variant)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    leaves = component_leaves(folder, class_name, shapes)
    used = [name for leaf in leaves for names in leaf.names for name in names]
    tensors = {name: tensors[name] for name in used}
    for leaf in leaves:
        found = {tensors[name].dtype.name for names in leaf.names for name in names}
        if dtype is None and len(found) > 1:
            raise ConversionError(
                f"{folder}: the layers of {leaf.rule.source} mix {' and '.join(sorted(found))}: "
                "choose one dtype to cast the weights to."
            )
    return _Component(folder.name, folder, tensors, leaves, dtype)


def _write_component(
    component: _Component, staging: Path, advance: Callable[[int, str], None]
) -> dict[str, TensorRecord]:
    records: dict[str, TensorRecord] = {}

    def part(leaf: Leaf, layer: int) -> np.ndarray:
        """One layer of a leaf; records the tensors that it was made of."""
        arrays = []
        for name in leaf.names[layer]:
            stored = component.tensors[name]
            tensor = read_tensor(stored)
            cast = tensor if component.dtype is None else _cast(tensor, component.dtype, stored)
            sha256 = digest(tensor)
            records[name] = TensorRecord(
                shape=stored.shape,
                dtype=tensor.dtype.name,
                sha256=sha256,
                stored_dtype=cast.dtype.name,
                stored_sha256=sha256 if cast.dtype == tensor.dtype else digest(cast),
            )
            if records[name].sha256 != records[leaf.names[layer][0]].sha256:
                raise ConversionError(
                    f"{stored.file}: {name} and {leaf.names[layer][0]} are one weight of the "
                    "model and differ: remove the wrong one."
                )
            arrays.append(cast)
            advance(stored.nbytes, component.name)
        return leaf.rule.forward(arrays[0])

    tree: dict[str, Any] = {}
    for leaf in component.leaves:
        node = tree
        for key in leaf.path[:-1]:
            node = node.setdefault(key, {})
        node[leaf.path[-1]] = _lazy_leaf(leaf, component, part)
    (staging / component.name).mkdir()
    _copy_config(component, staging)
    write_tree(staging / component.name / "weights", tree)
    return records


def _lazy_leaf(
    leaf: Leaf, component: _Component, part: Callable[[Leaf, int], np.ndarray]
) -> LazyArray:
    stored = component.tensors[leaf.names[0][0]]
    dtype = component.dtype or stored.dtype
    rows = max(1, SLAB_BYTES // stored.nbytes)

    def slabs() -> Iterator[tuple[Any, np.ndarray]]:
        if not leaf.rule.stacked:
            yield ..., part(leaf, 0)
            return
        for start in range(0, leaf.shape[0], rows):
            layers = range(start, min(start + rows, leaf.shape[0]))
            yield slice(start, layers.stop), np.stack([part(leaf, layer) for layer in layers])

    return LazyArray(leaf.shape, dtype, leaf.rule.stacked, slabs)


def _cast(tensor: np.ndarray, dtype: np.dtype, stored: StoredTensor) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = tensor.astype(dtype)
    if not all_finite(cast):
        raise ConversionError(
            f"{stored.file}: {stored.name} has values that {dtype.name} cannot hold: choose "
            "another dtype."
        )
    return cast


def _copy_config(component: _Component, staging: Path) -> None:
    """Carries config.json over as it is; only a dtype that it names follows a cast."""
    config = component.folder / "config.json"
    target = staging / component.name / "config.json"
    values = read_json(config)
    named = [key for key in ("dtype", "torch_dtype") if key in values]
    if component.dtype is None or not named:
        shutil.copyfile(config, target)
        return
    values |= dict.fromkeys(named, component.dtype.name)
    target.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
