"""Tensors in files, read a piece at a time, and what their elements are."""

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np

from svg_jax.convert.errors import ConversionError

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
FLOAT8 = {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
# What weights become that no model computes in: bfloat16 holds every float8 exactly.
_WIDENED = {np.dtype(np.float64): DTYPES["F32"], **dict.fromkeys(FLOAT8.values(), DTYPES["BF16"])}
# The bits of infinity in each type; those of NaN are larger. E4M3 has a NaN alone.
_INFINITY = {
    DTYPES["F32"]: 0x7F800000,
    DTYPES["F16"]: 0x7C00,
    DTYPES["BF16"]: 0x7F80,
    FLOAT8["F8_E4M3"]: 0x7F,
    FLOAT8["F8_E5M2"]: 0x7C,
    np.dtype(np.float64): 0x7FF0000000000000,
}
_PIECE_BYTES = 4 * 2**20  # read at once: stays in the processor's cache for all that is done to it


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        name: Its name in the header.
        file: The safetensors file, or one of torch.save.
        dtype: What its elements are stored in: any float or integer.
        shape: Its shape.
        start: Offset of its first byte in the file.
        nbytes: Its size in bytes.
        strides: Distance, in elements, of neighbours along each axis; None is row-major order.
        crc32: Checksum of its bytes, where the file has one of just these.
        parts: The tensors whose rows it is made of, one after the other, instead of lying at
            `start`. (Fused weights are taken apart so, and put together in another order.)
        scale: What its elements are multiplied with in float32, [rows, columns]: of the tensor as a
            matrix, each equal block of rows and columns has one.
        negative: Whether its elements are stored with the other sign (torch's negative bit).
    """

    name: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int
    strides: tuple[int, ...] | None = None
    crc32: int | None = None
    parts: tuple["StoredTensor", ...] = ()
    scale: "StoredTensor | None" = None
    negative: bool = False

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that it is read from."""
        return (self.file,) if self.scale is None else (self.file, self.scale.file)

    @property
    def is_plain(self) -> bool:
        """Whether its values are its elements."""
        return self.scale is None and not self.negative

    @property
    def converted_dtype(self) -> np.dtype:
        """What it is converted to where no dtype is asked for: its own, but for three kinds.

        float64 is rounded to float32. float8 is widened to bfloat16, exactly; with a scale to
        float32, which rounds the product once.

        Raises:
            ConversionError: If it is no weight: integers, or bits that stand for something.
        """
        if self.scale is not None:
            return DTYPES["F32"]
        dtype = _WIDENED.get(self.dtype, self.dtype)
        if dtype not in DTYPES.values():
            raise ConversionError(
                f"{self.file}: {self.name} is {self.dtype}, and a weight must be float32, float16, "
                "bfloat16, float64 or float8: fetch or save the unquantised weights."
            )
        return dtype


def read_tensor(tensor: StoredTensor) -> np.ndarray:
    """Read one tensor's values: in the dtype that is stored, or in float32 if it has a scale.

    Raises:
        ConversionError: If the file has shrunk since it was checked, cannot be read, or fails its
            checksum.
    """
    dtype = tensor.dtype if tensor.scale is None else DTYPES["F32"]
    flat, at = np.empty(math.prod(tensor.shape), dtype), 0
    for _, piece in read_pieces(tensor):
        flat[at : at + piece.size] = piece
        at += piece.size
    return flat.reshape(tensor.shape)


def read_pieces(tensor: StoredTensor) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Read one tensor as flat pieces in row-major order: its elements as stored, and its values.

    Each piece is gone when the next is asked for: they share their memory.

    Raises:
        ConversionError: See `read_tensor`.
    """
    if tensor.parts:
        for part in tensor.parts:
            yield from read_pieces(part)
        return
    scale = None if tensor.scale is None else read_tensor(tensor.scale).astype(np.float32)
    at = 0
    for stored in _read_strided(tensor) if tensor.strides else _read_row_major(tensor):
        values = stored if scale is None else _scaled(stored, scale, tensor.shape, at)
        yield stored, -values if tensor.negative else values
        at += stored.size


def _scaled(stored: np.ndarray, scale: np.ndarray, shape: Sequence[int], at: int) -> np.ndarray:
    """Multiply a piece, which begins at the element `at`, with the scales of its blocks."""
    columns = math.prod(shape[1:])
    first, last = at // columns, -(-(at + stored.size) // columns)
    rows = np.arange(first, last) // (shape[0] // len(scale))
    factors = scale[rows]
    if factors.shape[1] > 1:
        factors = np.repeat(factors, columns // factors.shape[1], axis=1)
    elsewhere = at - first * columns
    factors = np.broadcast_to(factors, (len(rows), columns)).reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        return stored.astype(np.float32) * factors[elsewhere : elsewhere + stored.size]


def _read_strided(tensor: StoredTensor) -> Iterator[np.ndarray]:
    assert tensor.strides is not None
    steps = zip(tensor.shape, tensor.strides, strict=True)
    reach = 1 + sum((size - 1) * stride for size, stride in steps)
    raw = replace(
        tensor,
        shape=(reach,),
        nbytes=reach * tensor.dtype.itemsize,
        strides=None,
        scale=None,
        negative=False,
    )
    bytes_apart = tuple(stride * tensor.dtype.itemsize for stride in tensor.strides)
    bits = read_tensor(raw).view(f"u{tensor.dtype.itemsize}")  # as_strided knows no float8
    view = np.lib.stride_tricks.as_strided(bits, tensor.shape, bytes_apart)
    yield np.ascontiguousarray(view).reshape(-1).view(tensor.dtype)


def _read_row_major(tensor: StoredTensor) -> Iterator[np.ndarray]:
    buffer = np.empty(min(_PIECE_BYTES, tensor.nbytes), np.uint8)
    crc32 = 0
    try:
        with tensor.file.open("rb", buffering=0) as stream:
            stream.seek(tensor.start)
            for at in range(0, tensor.nbytes, _PIECE_BYTES):
                piece = buffer[: tensor.nbytes - at]
                filled = 0
                while filled < piece.nbytes:
                    if not (count := stream.readinto(piece[filled:].data)):
                        raise ConversionError(f"{tensor.file}: was cut off while it was read.")
                    filled += count
                if tensor.crc32 is not None:
                    crc32 = zlib.crc32(piece.data, crc32)
                yield piece.view(tensor.dtype)
    except OSError as error:
        raise ConversionError(f"{tensor.file}: cannot be read: {error.strerror}.") from error
    if tensor.crc32 is not None and crc32 != tensor.crc32:
        raise ConversionError(
            f"{tensor.file}: {tensor.name} fails its checksum, the file is damaged: fetch it again."
        )


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of an array in row-major order."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def count_nonfinite(array: np.ndarray) -> int:
    """How many elements are NaN or infinite: by the bits, many times faster than np.isfinite.

    Of integers, none is.
    """
    infinity = _INFINITY.get(array.dtype)
    if infinity is None:
        return 0
    width = array.dtype.itemsize
    unsigned, signed = np.dtype(f"u{width}"), np.dtype(f"i{width}")
    minus_infinity = infinity | 1 << (8 * width - 1)
    bits = np.ascontiguousarray(array).reshape(-1).view(unsigned)
    count = 0
    for at in range(0, bits.size, _PIECE_BYTES // width):  # bounds the memory
        piece = bits[at : at + _PIECE_BYTES // width]
        # As signed numbers those with a plus are the largest, as unsigned those with a minus.
        if piece.view(signed).max() >= infinity or piece.max() >= minus_infinity:
            exponent = unsigned.type(infinity)
            count += int(np.count_nonzero((piece & exponent) == exponent))
    return count
