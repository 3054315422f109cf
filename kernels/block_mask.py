"""The mask of sparse video attention in closed form, and the blocks that a kernel must visit.

One mask serves spatial and temporal heads (Sparse VideoGen, section 4.1): a band around the
diagonal, text that sees and is seen by everything, and a sink of first keys that everything sees.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


@dataclass(frozen=True)
class BandMask:
    """Which keys a query keeps, exact for every pair of tokens; static and hashable.

    Positions are positions in the sequence as laid out. A query q keeps a key k when both are real
    and one of these holds: |q - k| < band_width, q is text, k is text, k < sink_tokens. Text beyond
    its real length is padding: neither query nor key.

    Attributes:
        num_tokens: Length of the sequence, S.
        band_width: Tokens on either side of the diagonal, itself included; S or more keeps all.
        text_start: Position of the first text token; text stands first or last in the sequence.
        text_tokens: Text tokens, padding included.
        sink_tokens: Keys at the front that every query keeps.
    """

    num_tokens: int
    band_width: int
    text_start: int = 0
    text_tokens: int = 0
    sink_tokens: int = 0

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"a mask needs at least one token, but num_tokens={self.num_tokens}")
        if self.band_width < 1:
            raise ValueError(
                f"band_width={self.band_width} keeps not even a query's own key: give 1 or more"
            )
        if not 0 <= self.text_tokens <= self.num_tokens:
            raise ValueError(
                f"text_tokens={self.text_tokens} does not fit into num_tokens={self.num_tokens}"
            )
        if self.text_tokens and self.text_start not in (0, self.num_tokens - self.text_tokens):
            raise ValueError(
                f"text stands first or last: for text_tokens={self.text_tokens} of "
                f"num_tokens={self.num_tokens} text_start is 0 or "
                f"{self.num_tokens - self.text_tokens}, not {self.text_start}"
            )
        if not 0 <= self.sink_tokens <= self.num_tokens:
            raise ValueError(
                f"sink_tokens={self.sink_tokens} does not fit into num_tokens={self.num_tokens}"
            )

    @property
    def text_stop(self) -> int:
        """Position behind the last text token."""
        return self.text_start + self.text_tokens

    @property
    def video_tokens(self) -> int:
        """Tokens that are not text."""
        return self.num_tokens - self.text_tokens

    @property
    def video_start(self) -> int:
        """Position of the first token that is not text."""
        return self.text_tokens if self.text_start == 0 else 0

    @property
    def video_sink_tokens(self) -> int:
        """Sink keys that are not text."""
        return min(max(self.sink_tokens - self.video_start, 0), self.video_tokens)

    def is_text(self, position: Any) -> Any:
        """Whether positions (numpy or jax integers) hold text, padding included."""
        return (position >= self.text_start) & (position < self.text_stop)

    def is_real(self, position: Any, text_length: Any = None) -> Any:
        """Whether positions hold video or real text; `text_length` None means all text is real."""
        length = self.text_tokens if text_length is None else text_length
        return ~self.is_text(position) | (position < self.text_start + length)

    def keep(self, query_position: Any, key_position: Any, text_length: Any = None) -> Any:
        """Whether each query keeps each key.

        Args:
            query_position: Signed integers in [0, num_tokens), numpy or jax, any shape.
            key_position: Signed integers that broadcast against `query_position`.
            text_length: Real text tokens, broadcasting against both; None means all.

        Returns:
            Booleans of the broadcast shape.
        """
        kept = (
            (abs(query_position - key_position) < self.band_width)
            | self.is_text(query_position)
            | self.is_text(key_position)
            | (key_position < self.sink_tokens)
        )
        return (
            kept
            & self.is_real(query_position, text_length)
            & self.is_real(key_position, text_length)
        )


def kept_pairs(
    mask: BandMask, text_length: Int[Array, "*batch"] | None = None
) -> int | Float[Array, "*batch"]:
    """Count the (query, key) pairs that a mask keeps, in closed form.

    Args:
        mask: The mask.
        text_length: Real text tokens, may be traced; None means all.

    Returns:
        The exact count as a Python int where `text_length` is None, else float32 of its shape: the
        count passes 2³¹ at 46,341 tokens, and float32 holds it to a few parts in 10⁷.
    """
    num_video, band = mask.video_tokens, min(mask.band_width, mask.video_tokens)
    in_band = num_video * (2 * band - 1) - band * (band - 1)
    sink_keys = np.arange(mask.video_sink_tokens, dtype=np.int64)
    sink_in_band = np.minimum(sink_keys + band, num_video) - np.maximum(sink_keys - band + 1, 0)
    of_video = in_band + int(np.sum(num_video - sink_in_band))
    if text_length is None:
        return of_video + mask.text_tokens * (2 * num_video + mask.text_tokens)
    text = jnp.clip(text_length, 0, mask.text_tokens).astype(jnp.float32)
    return float(of_video) + text * (2.0 * num_video + text)


@dataclass(frozen=True, eq=False)
class BlockMap:
    """The blocks of a mask that hold anything, for each block of queries.

    Attributes:
        block_q: Queries in a block; the last block may be partial.
        block_kv: Keys in a block; the last block may be partial.
        counts: Kept KV blocks of each query block.
        indices: Their numbers, ascending; padded behind `counts` by repeating the last.
        full: Whether such a block is kept whole and needs no test; False in the padding.
    """

    block_q: int
    block_kv: int
    counts: Int[np.ndarray, " q_blocks"]
    indices: Int[np.ndarray, "q_blocks most_kept"]
    full: Bool[np.ndarray, "q_blocks most_kept"]


@lru_cache(maxsize=256)
def block_map(mask: BandMask, block_q: int, block_kv: int, *, padded_text: bool = True) -> BlockMap:
    """List the blocks that a kernel must visit, from the closed form and never from an S×S array.

    The map depends on the static mask only, so no prompt's length makes another: with `padded_text`
    every block whose keys touch text is visited and tested. A partial last KV block is tested too.
    Padding among the queries is not a matter of blocks: a kernel blanks those rows in the end.

    Args:
        mask: The mask.
        block_q: Queries in a block.
        block_kv: Keys in a block.
        padded_text: Whether some text may be padding; False where `text_length` is None.
    """
    if block_q < 1 or block_kv < 1:
        raise ValueError(f"blocks hold at least one token: block_q={block_q}, block_kv={block_kv}")
    q_start, q_stop = _block_bounds(mask.num_tokens, block_q)
    k_start, k_stop = _block_bounds(mask.num_tokens, block_kv)
    q_start, q_stop = q_start[:, None], q_stop[:, None]

    q_text = (q_start < mask.text_stop) & (q_stop > mask.text_start)
    k_text = (k_start < mask.text_stop) & (k_stop > mask.text_start)
    nearest = np.maximum(np.maximum(k_start - (q_stop - 1), q_start - (k_stop - 1)), 0)
    kept = (nearest < mask.band_width) | q_text | k_text | (k_start < mask.sink_tokens)

    # What remains of a block without the tokens that keep everything (and of the keys, the sink)
    # must lie in the band. Text stands first or last, so it is an interval, perhaps an empty one.
    q_first, q_last = _without_text(mask, q_start, q_stop)
    k_first, k_last = _without_text(mask, k_start, k_stop)
    k_first = np.maximum(k_first, mask.sink_tokens)
    farthest = np.maximum(k_last - q_first, q_last - k_first)
    full = (farthest < mask.band_width) | (q_last < q_first) | (k_last < k_first)
    full &= k_stop - k_start == block_kv
    if padded_text:
        full &= ~k_text

    counts = kept.sum(axis=1, dtype=np.int32)
    order = np.argsort(~kept, axis=1, kind="stable")[:, : counts.max()]
    listed = np.arange(order.shape[1]) < counts[:, None]
    last = np.take_along_axis(order, counts[:, None] - 1, axis=1)
    result = BlockMap(
        block_q=block_q,
        block_kv=block_kv,
        counts=counts,
        indices=np.where(listed, order, last).astype(np.int32),
        full=np.take_along_axis(full, order, axis=1) & listed,
    )
    for array in (result.counts, result.indices, result.full):
        array.setflags(write=False)  # the cache hands the same arrays to everyone
    return result


def _block_bounds(num_tokens: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    start = np.arange(0, num_tokens, block)
    return start, np.minimum(start + block, num_tokens)


def _without_text(
    mask: BandMask, start: np.ndarray, stop: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """First and last position of blocks that is not text; last < first where there is none."""
    video_stop = mask.video_start + mask.video_tokens
    return np.maximum(start, mask.video_start), np.minimum(stop, video_stop) - 1
