"""What a folder or file holds, converted or not, and its tensors' statistics."""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from svg_jax.convert.checkpoint.folder import ConvertedFolder, open_folder
from svg_jax.convert.checkpoint.manifest import NAME, LoraRecord
from svg_jax.convert.checkpoint.staging import standing_folder
from svg_jax.convert.checkpoint.tensors import open_tensors, read_checked
from svg_jax.convert.components import (
    COPIED,
    PipelineIndex,
    passed_over,
    split_unused,
)
from svg_jax.convert.formats.json_file import read_json
from svg_jax.convert.formats.stored_tensor import DTYPES, StoredTensor, read_tensor
from svg_jax.convert.paths import real_path, usable_path
from svg_jax.convert.progress import Progress, count_bytes
from svg_jax.convert.source import Source, open_source, select_variants
from svg_jax.convert.tables.registry import MODEL_CLASSES

_PIECE = 1 << 22  # elements that are taken at once


@dataclass(frozen=True)
class Statistics:
    """Of the finite elements of a tensor; None where there are none."""

    minimum: float | None
    maximum: float | None
    mean: float | None
    std: float | None
    nonfinite: int


@dataclass(frozen=True)
class TensorContents:
    """One tensor by its name in diffusers' layout.

    Attributes:
        name: Its name.
        shape: Its shape.
        dtype: Its dtype, as stored.
        statistics: If they were asked for.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    statistics: Statistics | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ComponentContents:
    """A component with weights.

    Attributes:
        name: Its name.
        class_name: Its class in model_index.json.
        config: Its config.json.
        tensors: Its tensors.
        release: What it is called if it is in its authors' own layout; names and config are then
            those that its class gives them.
        unused: Names of tensors beside them that the model does without.
        casts: The dtypes that weights are not kept in, each with what it is converted to.
        passed_over: Keys of config.json that say nothing about what the model computes.
    """

    name: str
    class_name: str
    config: Mapping[str, Any]
    tensors: tuple[TensorContents, ...]
    release: str | None = None
    unused: tuple[str, ...] = ()
    casts: Mapping[str, str] = field(default_factory=dict)
    passed_over: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(tensor.size for tensor in self.tensors)

    @property
    def dtypes(self) -> dict[str, int]:
        """Elements of each dtype."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors:
            sizes[tensor.dtype] += tensor.size
        return dict(sizes.most_common())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(size * np.dtype(dtype).itemsize for dtype, size in self.dtypes.items())


@dataclass(frozen=True)
class Contents:
    """A pipeline, or a component alone.

    Attributes:
        pipeline: Its class; None of a component alone.
        converted: Whether it is converted; else it is in diffusers' or an original layout.
        components: Those with weights.
        others: Class of each of the others, by name.
        skipped: Components that were left out when it was converted.
        loras: What was merged into its weights then.
    """

    pipeline: str | None
    converted: bool
    components: tuple[ComponentContents, ...]
    others: Mapping[str, str]
    skipped: tuple[str, ...]
    loras: tuple[LoraRecord, ...] = ()


# A tensor's name, shape and dtype, and what reads it.
_Readable = tuple[str, tuple[int, ...], str, Callable[[], np.ndarray]]


@dataclass(frozen=True)
class _Part:
    config: Mapping[str, Any]
    tensors: Sequence[_Readable]
    release: str | None = None
    unused: tuple[str, ...] = ()
    casts: Mapping[str, str] = field(default_factory=dict)


def read_contents(
    source: str | Path,
    *,
    statistics: bool = False,
    variant: str | None = None,
    weights_key: str | None = None,
    progress: Progress | None = None,
) -> Contents:
    """Reads what a folder or file holds: headers only, or every tensor for its statistics.

    Args:
        source: A converted folder, or what `convert_pipeline` takes; of a pipeline also components
            that are not ported.
        statistics: Whether to read the tensors, one at a time.
        variant: See `convert_pipeline`.
        weights_key: See `convert_pipeline`.
        progress: Called with (bytes done, bytes in all, component).

    Raises:
        ConversionError: If it is nothing of the kind, or something in it cannot be read.
    """
    source = usable_path(source)
    converted = os.path.lexists(standing_folder(real_path(source)) / NAME)
    if converted:
        folder = open_folder(source)
        index = PipelineIndex(folder.pipeline, folder.classes)
        skipped, loras = folder.manifest.skipped, folder.manifest.loras
        parts = _converted_parts(folder)
    else:
        opened = open_source(source, variant, weights_key)
        index, skipped, loras = opened.index, (), ()
        parts = _stored_parts(opened, variant)
    total = sum(
        math.prod(shape) * np.dtype(dtype).itemsize
        for part in parts.values()
        for _, shape, dtype, _ in part.tensors
    )
    advance = count_bytes(total, progress if statistics else None)

    def measure(component: str, tensor: _Readable) -> TensorContents:
        name, shape, dtype, read = tensor
        if not statistics:
            return TensorContents(name, shape, dtype)
        array = read()
        advance(array.nbytes, component)
        return TensorContents(name, shape, dtype, tensor_statistics(array))

    return Contents(
        pipeline=index.pipeline,
        converted=converted,
        components=tuple(
            ComponentContents(
                name=name,
                class_name=index.classes[name],
                config=part.config,
                tensors=tuple(measure(name, tensor) for tensor in part.tensors),
                release=part.release,
                unused=part.unused,
                casts=part.casts,
                passed_over=passed_over(index.classes[name], part.config),
            )
            for name, part in parts.items()
        ),
        others={
            name: of
            for name, of in index.classes.items()
            if name not in parts and name not in skipped
        },
        skipped=skipped,
        loras=loras,
    )


def _converted_parts(folder: ConvertedFolder) -> dict[str, _Part]:
    return {
        component: _Part(
            read_json(folder.path / component / "config.json"),
            [
                (
                    name,
                    of.record.shape,
                    of.record.stored_dtype,
                    partial(read_checked, component, name, of),
                )
                for name, of in sorted(tensors.items())
            ],
        )
        for component, tensors in open_tensors(folder).items()
    }


def _stored_parts(source: Source, variant: str | None) -> dict[str, _Part]:
    components = sorted(source.index.classes.keys() - {*COPIED})
    found = {}
    for component, chosen in select_variants(source, components, variant).items():
        weights = source.read(component, chosen)
        original, class_name = weights.original, source.index.classes[component]
        tensors, unused = weights.tensors, weights.others
        if original is None and class_name in MODEL_CLASSES:
            folder = source.folder(component)
            rules = MODEL_CLASSES[class_name].rules(weights.config)
            tensors, spare = split_unused(tensors, rules, MODEL_CLASSES[class_name].unused, folder)
            unused = tuple(sorted((*unused, *spare)))
        found[component] = _Part(
            _said(source, component) if original is None else original.config,
            [
                (name, of.shape, of.dtype.name, partial(read_tensor, of))
                for name, of in sorted(tensors.items())
            ],
            None if original is None else original.release,
            unused,
            _casts(tensors.values()) if class_name in MODEL_CLASSES else {},
        )
    return found


def _said(source: Source, component: str) -> Mapping[str, Any]:
    return source.files.json(source.folder(component) / "config.json").values


def _casts(tensors: Iterable[StoredTensor]) -> dict[str, str]:
    found: dict[str, set[str]] = {}
    for tensor in tensors:
        if tensor.dtype not in DTYPES.values():
            found.setdefault(tensor.dtype.name, set()).add(tensor.converted_dtype.name)
    return {dtype: " and ".join(sorted(to)) for dtype, to in sorted(found.items())}


def tensor_statistics(array: np.ndarray) -> Statistics:
    """Statistics of an array of any float dtype, in float64."""
    count, mean, squares, nonfinite = 0, 0.0, 0.0, 0
    low, high = math.inf, -math.inf
    for piece in _pieces(array):
        finite = piece[np.isfinite(piece)]
        nonfinite += piece.size - finite.size
        if not finite.size:
            continue
        # Chan et al., "Algorithms for computing the sample variance" (1983): parts are merged.
        shift, total = float(finite.mean()) - mean, count + finite.size
        squares += float(finite.var()) * finite.size + shift**2 * count * finite.size / total
        mean += shift * finite.size / total
        count = total
        low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    if not count:
        return Statistics(None, None, None, None, nonfinite)
    return Statistics(low, high, mean, math.sqrt(squares / count), nonfinite)


def _pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    flat = array.reshape(-1)
    for start in range(0, flat.size, _PIECE):
        yield flat[start : start + _PIECE].astype(np.float64)
