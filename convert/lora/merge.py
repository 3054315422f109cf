"""The parts of one module of a LoRA, checked against the model and turned into changes."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from svg_jax.convert.errors import ConversionError
from svg_jax.convert.formats.stored_tensor import StoredTensor, is_float
from svg_jax.convert.lora.change import Change
from svg_jax.convert.lora.config import LoraConfig
from svg_jax.convert.lora.files import read_alpha
from svg_jax.convert.lora.targets import Shapes, Targets, tensor_names
from svg_jax.convert.releases.renaming import take_rows
from svg_jax.convert.tables.lora_names import Kind

_ROUNDING = 2**-8  # of an alpha in bfloat16


@dataclass
class Group:
    """The parts of one module.

    Attributes:
        module: Name of the module in the file, without a prefix.
        alpha: Alpha if the file does not contain it; None is the rank.
        parts: Tensors of the module.
    """

    module: str
    alpha: float | None = None
    parts: dict[Kind, StoredTensor] = field(default_factory=dict)


def group_changes(
    targets: Targets, group: Group, scale: float, config: LoraConfig | None, shapes: Shapes
) -> Iterator[tuple[str, Change]]:
    """Yield the names of the tensors that a module of a LoRA changes, and their changes.

    Args:
        targets: Modules of the model that are changed.
        group: Parts of the LoRA's module.
        scale: Strength of the LoRA.
        config: Config of the LoRA, if it has one.
        shapes: Shapes of the model's tensors.

    Raises:
        ConversionError: If a part is missing or does not fit.
    """
    parts = group.parts
    for part in parts.values():
        if not is_float(part) and part is not parts.get("alpha"):
            raise ConversionError(
                f"{part.file}: {part.name} is {part.dtype}, and must be of a floating-point type: "
                "fetch the LoRA again."
            )
    if difference := parts.get("difference"):
        yield from _differences(difference, targets, scale, shapes, 0)
    if difference := parts.get("bias difference"):
        yield from _differences(difference, targets, scale, shapes, 1)
    if parts.keys() <= {"difference", "bias difference", "alpha"} and parts.keys() != {"alpha"}:
        return
    down, up, rank = _matrices(parts)
    factor = scale * _strength(group, config, rank)
    _check_width(down, parts.get("mid"), targets, shapes)
    names = [tensor_names(target.module, shapes)[0] for target in targets]
    if up.shape[0] != (rows := sum(target.rows for target in targets)):
        raise _misfit(up, names, shapes, rows)
    for target, name in zip(targets, names, strict=True):
        yield name, Change(take_rows(up, target.runs), factor, down, parts.get("mid"))
    if bias := parts.get("bias"):
        yield from _differences(bias, targets, factor, shapes, 1)


def _matrices(parts: Mapping[Kind, StoredTensor]) -> tuple[StoredTensor, StoredTensor, int]:
    """Check that A and B exist and have one rank; return A, B and the rank."""
    some = next(iter(parts.values()))
    down, up, mid = parts.get("down"), parts.get("up"), parts.get("mid")
    if down is None or up is None:
        raise ConversionError(
            f"{some.file}: {some.name} has no {'A (down)' if down is None else 'B (up)'} beside "
            "it: the LoRA is not whole; fetch it again."
        )
    rank = down.shape[0] if down.shape else 0
    inner = (rank, rank) if mid is None else mid.shape[:2]
    fits = len(inner) == 2 and inner[1] == rank and up.shape[1:2] == (inner[0],)
    if rank == 0 or not fits or math.prod(up.shape[2:]) != 1:
        with_mid = "" if mid is None else f", {mid.name} is {list(mid.shape)}"
        raise ConversionError(
            f"{down.file}: {down.name} is {list(down.shape)}{with_mid} and {up.name} is "
            f"{list(up.shape)}: they have no rank in common; fetch the LoRA again."
        )
    return down, up, rank


def _strength(group: Group, config: LoraConfig | None, rank: int) -> float:
    """Compute the factor of B A, without the LoRA's own scale."""
    stored = group.parts.get("alpha")
    if stored is not None:
        strength = read_alpha(stored) / rank
    else:
        strength = 1.0 if group.alpha is None else group.alpha / rank
    if config is None:
        return strength
    said = config.scaling(group.module, rank)
    if stored is not None and not math.isclose(strength, said, rel_tol=_ROUNDING):
        raise ConversionError(
            f"{stored.file}: {stored.name} and {config.where.name} both say its scale, and not the "
            "same: remove one."
        )
    return said


def _check_width(
    down: StoredTensor, mid: StoredTensor | None, targets: Targets, shapes: Shapes
) -> None:
    """Compare the input features of A with those of the weights that it changes.

    A may be a matrix over whole patches for a convolution, and a 1 x 1 convolution for a matrix.
    """
    width = math.prod(down.shape[1:]) * (1 if mid is None else math.prod(mid.shape[2:]))
    for target in targets:
        name, _ = tensor_names(target.module, shapes)
        shape = shapes.get(name, ())
        if len(shape) < 2 or math.prod(shape[1:]) != width:
            fits = f"is {list(shape)}" if len(shape) > 1 else "is none that a LoRA can change"
            raise ConversionError(
                f"{down.file}: {down.name} is {list(down.shape)} and {name} {fits}: the LoRA is of "
                "another model."
            )


def _differences(
    stored: StoredTensor, targets: Targets, scale: float, shapes: Shapes, which: int
) -> Iterator[tuple[str, Change]]:
    """Yield differences of weights (`which` is 0) or biases (1), which are added as they are."""
    names = [tensor_names(target.module, shapes)[which] for target in targets]
    rows = sum(target.rows for target in targets)
    is_whole = len(targets) == len(targets[0].runs) == 1  # then axes of one element may be missing
    fits = is_whole or stored.shape[:1] == (rows,)
    for name in names:
        shape = shapes.get(name, (0,))
        fits &= _squeezed(stored.shape) == _squeezed((rows, *shape[1:]))
    if not fits:
        raise _misfit(stored, names, shapes, rows)
    for target, name in zip(targets, names, strict=True):
        yield name, Change(stored if is_whole else take_rows(stored, target.runs), scale)


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _misfit(stored: StoredTensor, names: list[str], shapes: Shapes, rows: int) -> ConversionError:
    """Make the error for a part whose shape is not that of the tensors that it changes."""
    name = next((name for name in names if name not in shapes), names[0])
    found = str(list(shapes[name])) if name in shapes else "which the model does not have"
    if name in shapes and len(names) > 1:
        found += f" and {len(names) - 1} more, {rows} rows in all"
    return ConversionError(
        f"{stored.file}: {stored.name} is {list(stored.shape)} and does not fit {name}, {found}: "
        "the LoRA is of another model."
    )
