"""The sum that merges LoRAs into a tensor: scale · alpha / rank · B A is added, in float32."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from svg_jax.convert.errors import ConversionError
from svg_jax.convert.formats.stored_tensor import StoredTensor, count_nonfinite, read_tensor

_ROWS = 1024  # rows of a weight that are changed at once, to bound the memory


@dataclass(frozen=True)
class Change:
    """An addition to one tensor of a component.

    Attributes:
        up: Matrix B, [rows, rank, 1, ...]; or the whole addition, of the tensor's size.
        scale: Factor of the addition.
        down: Matrix A, [rank, in, *kernel] or [rank, in * kernel]; None if `up` itself is added.
        mid: Core of a convolution's LoRA, [rank, rank, *kernel], if A is [rank, in, 1, ...].
    """

    up: StoredTensor
    scale: float
    down: StoredTensor | None = None
    mid: StoredTensor | None = None


def add_changes(tensor: np.ndarray, changes: Sequence[Change]) -> np.ndarray:
    """Add changes to a tensor in float32, one after the other; without changes, return it as it is.

    Raises:
        ConversionError: If a change or the sum is not finite.
    """
    if not changes:
        return tensor
    total = tensor.astype(np.float32)
    rows = total.reshape(len(total), -1)  # a view
    for change in changes:
        up = _read_finite(change.up).reshape(len(total), -1)
        down = _read_down(change)
        with np.errstate(over="ignore", invalid="ignore"):
            for at in range(0, len(total), _ROWS):
                part = up[at : at + _ROWS]
                part = part if down is None else part @ down
                rows[at : at + _ROWS] += part * np.float32(change.scale)
        if count_nonfinite(total) > count_nonfinite(tensor):
            raise ConversionError(
                f"{change.up.file}: {change.up.name} makes values that float32 cannot hold: choose "
                "a smaller scale."
            )
    return total


def _read_down(change: Change) -> np.ndarray | None:
    """Read A as a matrix, [rank, in * kernel], with the core multiplied in."""
    if change.down is None:
        return None
    down = _read_finite(change.down).reshape(change.down.shape[0], -1)
    if change.mid is None:
        return down
    mid = _read_finite(change.mid).reshape(*change.mid.shape[:2], -1)
    return np.einsum("abk,bi->aik", mid, down).reshape(len(mid), -1)


def _read_finite(stored: StoredTensor) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        tensor = read_tensor(stored).astype(np.float32)
    if count := count_nonfinite(tensor):
        raise ConversionError(
            f"{stored.file}: {stored.name} holds NaN or infinities ({count} of {tensor.size}): "
            "this LoRA cannot be used."
        )
    return tensor
