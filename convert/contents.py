"""Read what a folder or file holds, converted or not, and the statistics of its tensors."""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from svg_jax.convert.checkpoint.folder import ConvertedFolder, open_folder
from svg_jax.convert.checkpoint.manifest import NAME, LoraRecord
from svg_jax.convert.checkpoint.staging import standing_folder
from svg_jax.convert.checkpoint.tensors import open_tensors
from svg_jax.convert.components import COPIED, passed_over, split_unused
from svg_jax.convert.formats.json_file import read_json
from svg_jax.convert.formats.stored_tensor import DTYPES, StoredTensor, read_tensor
from svg_jax.convert.paths import real_path, usable_path
from svg_jax.convert.progress import Advance, Progress, count_bytes
from svg_jax.convert.source import Source, open_source, select_variants
from svg_jax.convert.tables.registry import MODEL_CLASSES

_PIECE = 1 << 22  # elements that are taken at once


@dataclass(frozen=True)
class Statistics:
    """Statistics of a tensor's finite elements (None if there are none); number of the others."""

    minimum: float | None
    maximum: float | None
    mean: float | None
    std: float | None
    nonfinite: int


@dataclass(frozen=True)
class TensorContents:
    """A tensor as stored, by its name in diffusers' layout; with statistics if asked for."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    statistics: Statistics | None = None


@dataclass(frozen=True)
class ComponentContents:
    """A component with weights.

    Attributes:
        name: Name of the component.
        class_name: Class in model_index.json.
        config: Content of config.json.
        tensors: Tensors that the model needs.
        release: Name of the release if it is in its authors' own layout; `config` and the tensors'
            names are nevertheless those of the class.
        unused: Names of tensors that the model does not need.
        casts: Dtypes that a conversion does not keep, and what it converts each to.
        passed_over: Keys of config.json that do not affect what the model computes.
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
        return sum(self.dtypes.values())

    @property
    def dtypes(self) -> dict[str, int]:
        """Number of elements of each dtype, the most frequent first."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors:
            sizes[tensor.dtype] += math.prod(tensor.shape)
        return dict(sizes.most_common())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(size * np.dtype(dtype).itemsize for dtype, size in self.dtypes.items())


@dataclass(frozen=True)
class Contents:
    """A pipeline, or a component alone.

    Attributes:
        pipeline: Class of the pipeline; None for a component alone.
        converted: Whether it is a converted folder, not one in diffusers' or an original layout.
        components: Components with weights.
        others: Class of each other component, by name.
        skipped: Names of components that were left out of the conversion.
        loras: LoRAs that the conversion merged into the weights.
    """

    pipeline: str | None
    converted: bool
    components: tuple[ComponentContents, ...]
    others: Mapping[str, str]
    skipped: tuple[str, ...]
    loras: tuple[LoraRecord, ...] = ()


_Part = tuple[ComponentContents, list[Callable[[], np.ndarray]]]  # and what reads each tensor


def read_contents(
    source: str | Path,
    *,
    statistics: bool = False,
    variant: str | None = None,
    weights_key: str | None = None,
    progress: Progress | None = None,
) -> Contents:
    """Read what a folder or file holds: only headers, or every tensor for its statistics.

    Args:
        source: Converted folder, or anything that `convert_pipeline` takes; a pipeline may have
            components that are not ported.
        statistics: Whether to read the tensors, one at a time.
        variant: Set of weights to read; see `ConversionSettings`.
        weights_key: Key of the weights to read; see `ConversionSettings`.
        progress: Function called with (bytes done, bytes in all, component) while tensors are read.

    Raises:
        ConversionError: If it is neither, or something in it cannot be read.
    """
    source = usable_path(source)
    converted = os.path.lexists(standing_folder(real_path(source)) / NAME)
    if converted:
        folder = open_folder(source)
        index, skipped, loras = folder.index, folder.manifest.skipped, folder.manifest.loras
        parts = list(_converted_parts(folder))
    else:
        opened = open_source(source, variant, weights_key)
        index, skipped, loras = opened.index, (), ()
        parts = list(_stored_parts(opened, variant))
    components = [component for component, _ in parts]
    if statistics:
        advance = count_bytes(sum(component.nbytes for component in components), progress)
        components = [_measure(component, reads, advance) for component, reads in parts]
    others = index.classes.keys() - {component.name for component in components} - {*skipped}
    return Contents(
        pipeline=index.pipeline,
        converted=converted,
        components=tuple(components),
        others={name: of for name, of in index.classes.items() if name in others},
        skipped=skipped,
        loras=loras,
    )


def _converted_parts(folder: ConvertedFolder) -> Iterator[_Part]:
    for name, tensors in open_tensors(folder).items():
        class_name = folder.index.classes[name]
        config = read_json(folder.path / name / "config.json")
        found = [tensors[name] for name in sorted(tensors)]
        shown = (TensorContents(of.name, of.record.shape, of.record.stored_dtype) for of in found)
        unread = passed_over(class_name, config)
        component = ComponentContents(name, class_name, config, tuple(shown), passed_over=unread)
        yield component, [tensor.read for tensor in found]


def _stored_parts(source: Source, variant: str | None) -> Iterator[_Part]:
    names = sorted(source.index.classes.keys() - {*COPIED})
    for name, chosen in select_variants(source, names, variant).items():
        weights, class_name = source.read(name, chosen), source.index.classes[name]
        tensors, spare, model = weights.tensors, (), MODEL_CLASSES.get(class_name)
        if model is not None:
            rules = model.rules(weights.config)
            tensors, spare = split_unused(tensors, rules, model.unused, source.folder(name))
        found = sorted(tensors.items())
        component = ComponentContents(
            name=name,
            class_name=class_name,
            config=weights.values,
            tensors=tuple(TensorContents(key, of.shape, of.dtype.name) for key, of in found),
            release=weights.release,
            unused=tuple(sorted((*weights.others, *spare))),
            casts={} if model is None else _casts(tensors.values()),
            passed_over=passed_over(class_name, weights.values),
        )
        yield component, [partial(read_tensor, tensor) for _, tensor in found]


def _measure(
    component: ComponentContents, reads: Iterable[Callable[[], np.ndarray]], advance: Advance
) -> ComponentContents:
    measured = []
    for tensor, read in zip(component.tensors, reads, strict=True):
        array = read()
        advance(array.nbytes, component.name)
        measured.append(replace(tensor, statistics=tensor_statistics(array)))
    return replace(component, tensors=tuple(measured))


def _casts(tensors: Iterable[StoredTensor]) -> dict[str, str]:
    found: dict[str, set[str]] = {}
    for tensor in tensors:
        if tensor.dtype not in DTYPES.values():
            found.setdefault(tensor.dtype.name, set()).add(tensor.converted_dtype.name)
    return {dtype: " and ".join(sorted(to)) for dtype, to in sorted(found.items())}


def tensor_statistics(array: np.ndarray) -> Statistics:
    """Measure an array of any float dtype, in float64."""
    count, mean, squares, nonfinite = 0, 0.0, 0.0, 0
    low, high = math.inf, -math.inf
    for start in range(0, array.size, _PIECE):
        piece = array.reshape(-1)[start : start + _PIECE].astype(np.float64)
        finite = piece[np.isfinite(piece)]
        nonfinite += piece.size - finite.size
        if not finite.size:
            continue
        # Merge as in Chan et al., "Algorithms for computing the sample variance" (1983).
        shift, total = float(finite.mean()) - mean, count + finite.size
        squares += float(finite.var()) * finite.size + shift**2 * count * finite.size / total
        mean += shift * finite.size / total
        count = total
        low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    if not count:
        return Statistics(None, None, None, None, nonfinite)
    return Statistics(low, high, mean, math.sqrt(squares / count), nonfinite)
