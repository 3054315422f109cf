"""The tensors of an original release under the names that diffusers and transformers gave them.

Their conversions only rename tensors, split fused ones and reorder rows. Here each release has a
table of `Origin`s for this. Applying it reads nothing, because a tensor is a place in a file before
and after.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from svg_jax.convert.errors import ConversionError
from svg_jax.convert.formats.stored_tensor import StoredTensor, row_major

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Layout:
    """The tensors of a component under its authors' names.

    Attributes:
        mark: Name of a tensor that only this layout has.
        config: Function from the tensors' shapes and the caller's values to config.json. It refuses
            if the two do not say enough.
        table: Function from the shapes to the new names; None where the names are diffusers' or
            transformers' own, so that only the lack of a config.json marks a release.
        unused: Pattern of names of tensors that the model does not need.
    """

    mark: str
    config: Callable[[Shapes, Mapping[str, Any]], dict[str, Any]]
    table: "Callable[[Shapes], Sequence[Origin]] | None" = None
    unused: re.Pattern[str] | None = None


@dataclass(frozen=True)
class Origin:
    """One line of a release's table: the new names of a module's tensors.

    Attributes:
        source: Name of a module (for its weight, bias and gamma) or of a tensor; `{}` stands for
            any number.
        targets: New names, each with the indices of the pieces of the rows that it gets, in order;
            `{}` stands for the numbers of the source.
        pieces: Number of equal pieces that the rows (the first axis) are cut into.
        squeeze: Whether axes of a single element are dropped.
    """

    source: str
    targets: tuple[tuple[str, tuple[int, ...]], ...]
    pieces: int = 1
    squeeze: bool = False

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Pattern of the tensors' names; the last group is what follows the module's name."""
        return number_pattern(self.source, r"((?:\.(?:weight|bias|gamma))?)")


def number_pattern(name: str, ending: str = "") -> re.Pattern[str]:
    """Compile a pattern of a name in which `{}` stands for a number, before a regular `ending`."""
    return re.compile(re.escape(name).replace(r"\{\}", r"(\d+)") + ending)


def rename(names: Mapping[str, str], *, squeeze: bool = False) -> list[Origin]:
    """Make the lines of modules or tensors that only get another name."""
    return [Origin(source, ((target, (0,)),), squeeze=squeeze) for source, target in names.items()]


def split_heads(source: str, target: str) -> Origin:
    """Make the line of fused queries, keys and values; "*" stands for q, k and v in `target`."""
    targets = tuple((target.replace("*", part), (piece,)) for piece, part in enumerate("qkv"))
    return Origin(source, targets, len(targets))


def rename_tensors(
    tensors: Mapping[str, StoredTensor], table: Sequence[Origin]
) -> dict[str, StoredTensor]:
    """Give tensors their new names; those that are not in the table keep theirs.

    Raises:
        ConversionError: If rows cannot be cut as the table says, or two tensors get one name.
    """
    renamed: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        for target, moved in _moved(name, tensor, table):
            if target in renamed:
                raise ConversionError(
                    f"{tensor.file}: {name} and another tensor are both {target}: keep one layout."
                )
            renamed[target] = moved
    return renamed


def _moved(
    name: str, tensor: StoredTensor, table: Sequence[Origin]
) -> Iterator[tuple[str, StoredTensor]]:
    for origin in table:
        match = origin.pattern.fullmatch(name)
        if match is None:
            continue
        *numbers, leaf = match.groups()
        for target, pieces in origin.targets:
            new_name = target.format(*numbers) + leaf
            moved = replace(_take(tensor, pieces, origin.pieces), name=new_name)
            yield new_name, _squeeze(moved) if origin.squeeze else moved
        return
    yield name, tensor


def _take(tensor: StoredTensor, pieces: Sequence[int], count: int) -> StoredTensor:
    """Take some of the `count` equal pieces of a tensor's rows, in the given order."""
    if tuple(pieces) == tuple(range(count)):
        return tensor
    if not tensor.shape or tensor.shape[0] % count:
        raise ConversionError(
            f"{tensor.file}: {tensor.name} of shape {list(tensor.shape)} cannot be cut into "
            f"{count} pieces: it is of another model."
        )
    step = tensor.shape[0] // count
    runs: list[list[int]] = []
    for piece in pieces:
        if runs and runs[-1][1] == piece * step:
            runs[-1][1] += step
        else:
            runs.append([piece * step, (piece + 1) * step])
    return take_rows(tensor, runs)


def take_rows(tensor: StoredTensor, runs: Sequence[Sequence[int]]) -> StoredTensor:
    """Take runs of a tensor's rows, one after the other; nothing is read.

    Args:
        tensor: Tensor without parts.
        runs: Runs of rows, [begin, end), at least one.
    """
    parts = tuple(_rows(tensor, *run) for run in runs)
    if len(parts) == 1:
        return parts[0]
    shape = (sum(part.shape[0] for part in parts), *tensor.shape[1:])
    nbytes = sum(part.nbytes for part in parts)
    return replace(parts[0], shape=shape, nbytes=nbytes, strides=None, parts=parts)


def _rows(tensor: StoredTensor, begin: int, end: int) -> StoredTensor:
    shape, scale = (end - begin, *tensor.shape[1:]), tensor.scale
    if scale is not None and scale.shape[0] > 1:
        block = tensor.shape[0] // scale.shape[0]
        if begin % block or end % block:
            raise ConversionError(
                f"{tensor.file}: {tensor.name} cannot be cut between the blocks of its scale: "
                "fetch the unquantised weights."
            )
        scale = _rows(scale, begin // block, end // block)
    itemsize = tensor.dtype.itemsize
    row, nbytes = (tensor.strides or row_major(tensor.shape))[0], math.prod(shape) * itemsize
    start = tensor.start + begin * row * itemsize
    return replace(tensor, shape=shape, start=start, nbytes=nbytes, crc32=None, scale=scale)


def _squeeze(tensor: StoredTensor) -> StoredTensor:
    kept = [axis for axis, size in enumerate(tensor.shape) if size != 1]
    strides = tensor.strides and tuple(tensor.strides[axis] for axis in kept)
    return replace(tensor, shape=tuple(tensor.shape[axis] for axis in kept), strides=strides)


def count_layers(shapes: Shapes, name: str) -> int:
    """Count layers: one more than the highest number that stands for `{}` in a tensor's name."""
    matches = map(number_pattern(name).fullmatch, shapes)
    return max((int(match[1]) + 1 for match in matches if match), default=0)
