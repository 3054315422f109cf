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
from svg_jax.convert.components import COPIED, PipelineIndex, passed_over, split_unused
from svg_jax.convert.formats.json_file import read_json
from svg_jax.convert.formats.stored_tensor import DTYPES, StoredTensor, read_tensor
from svg_jax.convert.paths import real_path, usable_path
from svg_jax.convert.progress import Progress, count_bytes
from svg_jax.convert.source import Source, open_source, select_variants
from svg_jax.convert.tables.registry import MODEL_CLASSES

_PIECE = 1 << 22  # elements that are taken at once


@dataclass(frozen=True)
class Statistics:
    """Statistics of the finite elements of a tensor; None if it has none.

    Attributes:
        minimum: Smallest element.
        maximum: Largest element.
        mean: Mean of the elements.
        std: Standard deviation of the elements.
        nonfinite: Number of the other elements: NaN and infinities.
    """

    minimum: float | None
    maximum: float | None
    mean: float | None
    std: float | None
    nonfinite: int


@dataclass(frozen=True)
class TensorContents:
    """One tensor.

    Attributes:
        name: Name in diffusers' layout.
        shape: Shape.
        dtype: Dtype as stored.
        statistics: Statistics of the elements, if they were asked for.
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
        return sum(tensor.size for tensor in self.tensors)

    @property
    def dtypes(self) -> dict[str, int]:
        """Number of elements of each dtype, the most frequent first."""
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
        index = PipelineIndex(folder.pipeline, folder.classes)
        skipped, loras = folder.manifest.skipped, folder.manifest.loras
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
        class_name = folder.classes[name]
        config = read_json(folder.path / name / "config.json")
        found = [tensors[name] for name in sorted(tensors)]
        shown = (TensorContents(of.name, of.record.shape, of.record.stored_dtype) for of in found)
        component = ComponentContents(
            name=name,
            class_name=class_name,
            config=config,
            tensors=tuple(shown),
            passed_over=passed_over(class_name, config),
        )
        yield component, [tensor.read for tensor in found]


def _stored_parts(source: Source, variant: str | None) -> Iterator[_Part]:
    names = sorted(source.index.classes.keys() - {*COPIED})
    for name, chosen in select_variants(source, names, variant).items():
        weights, class_name = source.read(name, chosen), source.index.classes[name]
        tensors, unused, original = weights.tensors, weights.others, weights.original
        model, folder = MODEL_CLASSES.get(class_name), source.folder(name)
        if original is None and model is not None:
            rules = model.rules(weights.config)
            tensors, spare = split_unused(tensors, rules, model.unused, folder)
            unused = tuple(sorted((*unused, *spare)))
        if original is None:
            config = source.files.json(folder / "config.json").values
        else:
            config = original.config
        found = sorted(tensors.items())
        component = ComponentContents(
            name=name,
            class_name=class_name,
            config=config,
            tensors=tuple(TensorContents(key, of.shape, of.dtype.name) for key, of in found),
            release=None if original is None else original.release,
            unused=unused,
            casts={} if model is None else _casts(tensors.values()),
            passed_over=passed_over(class_name, config),
        )
        yield component, [partial(read_tensor, tensor) for _, tensor in found]


def _measure(
    component: ComponentContents,
    reads: Iterable[Callable[[], np.ndarray]],
    advance: Callable[[int, str], None],
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
    for piece in _pieces(array):
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


def _pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    flat = array.reshape(-1)
    for start in range(0, flat.size, _PIECE):
        yield flat[start : start + _PIECE].astype(np.float64)
