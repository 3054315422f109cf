"""How the portable kernel cuts a band into row blocks of static size, each with one window of keys.

XLA needs static shapes, and on a CPU a few large products beat many small ones. So a row block takes
all its keys as one contiguous window: far from the edges the window moves along with the rows; near an
edge it is cut off there and stands still for a few row blocks.
"""

from dataclasses import dataclass, replace

# Standing windows at either edge: more of them waste fewer keys but take longer to compile. Measured
# at S=8192, band 1097, blocks of 256 rows: 1, 2, 4 windows an edge visit 6, 3, 2 % too many pairs.
EDGE_WINDOWS = 4


@dataclass(frozen=True)
class Window:
    """A run of equal row blocks and the keys of each.

    Block b holds rows first_row + b*block_rows … and sees, from key first_key + b*key_step on, `left`
    keys that need the band's test, `full` that every row keeps, and `right` that need the test.

    Attributes:
        first_row: First row of the first block.
        block_rows: Rows in a block.
        num_blocks: Blocks in the run.
        first_key: First key of the first block.
        key_step: Keys that the window moves by from block to block.
        left: Boundary keys before the full ones.
        full: Keys that every row of the block keeps.
        right: Boundary keys behind the full ones.
    """

    first_row: int
    block_rows: int
    num_blocks: int
    first_key: int
    key_step: int
    left: int
    full: int
    right: int

    @property
    def stop_row(self) -> int:
        """Row behind the last block."""
        return self.first_row + self.num_blocks * self.block_rows


def band_windows(
    num_tokens: int, band_width: int, first_key: int, block_rows: int
) -> tuple[Window, ...]:
    """Cover the band |row - key| < band_width over keys [first_key, num_tokens) with windows.

    Args:
        num_tokens: Rows, and end of the keys.
        band_width: Keys on either side of the diagonal, itself included.
        first_key: Start of the keys; those before are seen by every row and handled apart.
        block_rows: Rows of a block far from the edges; blocks at the edges have at most as many.

    Returns:
        Windows in order of rows, which together hold every row once.
    """
    if band_width >= num_tokens:
        return even_windows(num_tokens, first_key, num_tokens - first_key, block_rows)
    # The moving window has a boundary of block_rows on both sides, one key more than it needs: even
    # sizes are faster.
    first_inner = min(first_key + band_width, num_tokens)
    inner_blocks = max(num_tokens - band_width - first_inner, 0) // block_rows
    stop_inner = first_inner + inner_blocks * block_rows
    inner = Window(
        first_row=first_inner,
        block_rows=block_rows,
        num_blocks=inner_blocks,
        first_key=first_inner - band_width,
        key_step=block_rows,
        left=block_rows,
        full=2 * band_width - block_rows,
        right=block_rows,
    )
    if inner.full <= 0:
        inner = replace(inner, left=2 * band_width + block_rows, full=0, right=0)
    return (
        *_edge_windows(0, first_inner, num_tokens, band_width, first_key, block_rows),
        *([inner] if inner_blocks else []),
        *_edge_windows(stop_inner, num_tokens, num_tokens, band_width, first_key, block_rows),
    )


def even_windows(
    num_rows: int, first_key: int, num_keys: int, block_rows: int
) -> tuple[Window, ...]:
    """Cover rows that all keep the same keys, with blocks of equal size and one smaller at the end."""
    blocks, rest = divmod(num_rows, block_rows)
    windows = []
    if blocks:
        windows.append(Window(0, block_rows, blocks, first_key, 0, 0, num_keys, 0))
    if rest:
        windows.append(Window(blocks * block_rows, rest, 1, first_key, 0, 0, num_keys, 0))
    return tuple(windows)


def _edge_windows(
    start: int, stop: int, num_tokens: int, band_width: int, first_key: int, block_rows: int
) -> list[Window]:
    """Cut rows [start, stop) into about EDGE_WINDOWS standing windows."""
    if start == stop:
        return []
    num_blocks = -(-(stop - start) // block_rows)
    blocks_a_window = -(-num_blocks // EDGE_WINDOWS)
    even_rows = -(-(stop - start) // num_blocks)
    rows = min(block_rows, -(-even_rows // 8) * 8)  # whole vectors are faster
    windows = []
    row = start
    while row < stop:
        blocks = min(blocks_a_window, (stop - row) // rows)
        if not blocks:
            blocks, rows = 1, stop - row
        last = row + blocks * rows - 1
        low = max(first_key, row - band_width + 1)
        high = max(low, min(num_tokens, last + band_width))
        full_low, full_high = max(low, last - band_width + 1), min(high, row + band_width)
        if full_low >= full_high:
            full_low = full_high = high
        windows.append(
            Window(
                first_row=row,
                block_rows=rows,
                num_blocks=blocks,
                first_key=low,
                key_step=0,
                left=full_low - low,
                full=full_high - full_low,
                right=high - full_high,
            )
        )
        row = last + 1
    return windows
