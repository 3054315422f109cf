"""Tensors in files, read one piece at a time, and the dtypes of their elements."""

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
FLOAT8 = {"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2)}
# Dtypes that no model computes in, and what they become: bfloat16 holds every float8 exactly.
_WIDENED = {np.dtype(np.float64): DTYPES["F32"], **dict.fromkeys(FLOAT8.values(), DTYPES["BF16"])}
# The bits of infinity in each floating-point type; those of NaN are larger. E4M3 has only NaN.
_INFINITY = {
    DTYPES["F32"]: 0x7F800000,
    DTYPES["F16"]: 0x7C00,
    DTYPES["BF16"]: 0x7F80,
    FLOAT8["F8_E4M3"]: 0x7F,
    FLOAT8["F8_E5M2"]: 0x7C,
    np.dtype(np.float64): 0x7FF0000000000000,
}
_PIECE_BYTES = 4 * 2**20  # read at once: it stays in the processor's cache while it is worked on


@dataclass(frozen=True)
class StoredTensor:
    """The place of a tensor in a file.

    Attributes:
        name: Name in the header.
        file: File of safetensors or of torch.save.
        dtype: Dtype of the stored elements: any float or integer.
        shape: Shape of the tensor.
        start: Offset of the first byte in the file.
        nbytes: Size in bytes.
        strides: Distance, in elements, of neighbours along each axis; None is row-major order.
        crc32: Checksum of the bytes, where the file has one for exactly these.
        parts: Tensors whose rows, one after the other, are this tensor's, if it does not lie at
            `start` as a whole. (Fused weights are split and reordered this way.)
        scale: Factors of the elements in float32, [rows, columns]: one for each of the equal blocks
            of the tensor as a matrix.
        negative: Whether the elements are stored with the opposite sign (torch's negative bit).
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
        """Files that the tensor is read from."""
        return (self.file,) if self.scale is None else (self.file, self.scale.file)

    @property
    def is_plain(self) -> bool:
        """Whether the values are the stored elements, without scale or change of sign."""
        return self.scale is None and not self.negative

    @property
    def converted_dtype(self) -> np.dtype:
        """Dtype that the tensor is converted to if none is asked for: its own, with exceptions.

        float64 is rounded to float32. float8 is widened to bfloat16, exactly; with a scale to
        float32, which rounds the product once.

        Raises:
            ConversionError: If it is no weight: integers, or packed bits.
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
    """Read the values of a tensor, in its stored dtype, or in float32 if it has a scale.

    Raises:
        ConversionError: If the file shrank since it was checked, cannot be read, or does not match
            its checksum.
    """
    dtype = tensor.dtype if tensor.scale is None else DTYPES["F32"]
    flat, at = np.empty(math.prod(tensor.shape), dtype), 0
    for _, piece in read_pieces(tensor):
        flat[at : at + piece.size] = piece
        at += piece.size
    return flat.reshape(tensor.shape)


def read_pieces(tensor: StoredTensor) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Read a tensor as flat pieces in row-major order; yield the stored elements and the values.

    A piece is overwritten when the next one is read: they share their memory.

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
    """Multiply a piece, which begins at element `at` of the tensor, by the scales of its blocks."""
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
    plain = replace(tensor, strides=None, scale=None, negative=False)
    itemsize = tensor.dtype.itemsize
    raw = read_tensor(replace(plain, shape=(reach,), nbytes=reach * itemsize))
    bytes_apart = tuple(stride * itemsize for stride in tensor.strides)
    bits = raw.view(f"u{itemsize}")  # as_strided knows no float8
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
    """Compute the strides, in elements, of an array in row-major order."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def is_float(tensor: StoredTensor) -> bool:
    """Tell whether a tensor holds floating-point numbers, of 8 to 64 bits."""
    return tensor.dtype in _INFINITY


def count_nonfinite(array: np.ndarray) -> int:
    """Count elements that are NaN or infinite, by their bits: much faster than np.isfinite.

    Integers have none.
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
        # Positive ones are the largest bits as signed integers, negative ones as unsigned integers.
        if piece.view(signed).max() >= infinity or piece.max() >= minus_infinity:
            exponent = unsigned.type(infinity)
            count += int(np.count_nonzero((piece & exponent) == exponent))
    return count
