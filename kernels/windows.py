"""How the portable kernel cuts a band into row blocks of static size, each with one window of keys.

XLA needs static shapes, and on a CPU a few large products beat many small ones. So a row block
takes its keys as one contiguous window: far from the edges the window moves along with the rows;
near an edge it is cut off there and stands still for a few row blocks.
"""

from dataclasses import dataclass

# Standing windows at either edge: more of them waste fewer keys but take longer to compile.
EDGE_WINDOWS = 2
# Sizes are multiples of whole cache lines wherever there is room: the softmax runs 8 % faster.
ALIGNMENT = 16


@dataclass(frozen=True)
class Window:
    """A run of equal row blocks and the keys of each.

    Block b holds rows first_row + b*block_rows … and sees `num_keys` keys from
    first_key + b*key_step on.

    Attributes:
        first_row: First row of the first block.
        block_rows: Rows in a block.
        num_blocks: Blocks in the run.
        first_key: First key of the first block.
        key_step: Keys that the window moves by from block to block.
        num_keys: Keys that a block sees.
        is_full: Whether every row keeps every key that its block sees.
    """

    first_row: int
    block_rows: int
    num_blocks: int
    first_key: int
    key_step: int
    num_keys: int
    is_full: bool

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
        block_rows: Most rows of a block.

    Returns:
        Windows in order of rows, which together hold every row once.
    """
    if band_width >= num_tokens:  # every row keeps every key
        whole, rest = divmod(num_tokens, block_rows)
        runs = [(0, block_rows, whole), (whole * block_rows, rest, 1)]
        return tuple(
            Window(row, rows, blocks, first_key, 0, num_tokens - first_key, is_full=True)
            for row, rows, blocks in runs
            if rows * blocks
        )
    reach = _round_up(band_width - 1)
    first_inner = min(first_key + reach, num_tokens)
    inner_blocks = max(num_tokens - reach - first_inner, 0) // block_rows
    stop_inner = first_inner + inner_blocks * block_rows
    windows = _edge_windows(0, first_inner, num_tokens, band_width, first_key, block_rows)
    if inner_blocks:
        windows.append(
            Window(
                first_row=first_inner,
                block_rows=block_rows,
                num_blocks=inner_blocks,
                first_key=first_inner - reach,
                key_step=block_rows,
                num_keys=2 * reach + block_rows,
                is_full=False,
            )
        )
    windows += _edge_windows(stop_inner, num_tokens, num_tokens, band_width, first_key, block_rows)
    return tuple(windows)


def _edge_windows(
    start: int, stop: int, num_tokens: int, band_width: int, first_key: int, block_rows: int
) -> list[Window]:
    """Cut rows [start, stop) into about EDGE_WINDOWS standing windows, of whole blocks first."""
    if start == stop:
        return []
    num_blocks = -(-(stop - start) // block_rows)
    blocks_a_window = -(-num_blocks // EDGE_WINDOWS)
    rows = min(block_rows, stop - start)
    windows = []
    row = start
    while row < stop:
        blocks = min(blocks_a_window, (stop - row) // rows)
        if not blocks:
            blocks, rows = 1, stop - row
        last = row + blocks * rows - 1
        low = max(first_key, row - band_width + 1)
        high = max(low, min(num_tokens, last + band_width))
        high = min(num_tokens, low + _round_up(high - low))
        low = max(first_key, high - _round_up(high - low))
        is_full = last < low + band_width and high - band_width <= row
        windows.append(Window(row, rows, blocks, low, 0, high - low, is_full))
        row = last + 1
    return windows


def _round_up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
