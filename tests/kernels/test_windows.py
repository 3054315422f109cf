"""The portable kernel's windows against the band that they must cover."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from svg_jax.kernels.windows import EDGE_WINDOWS, band_windows


@settings(deadline=None, max_examples=300)
@given(
    num_tokens=st.integers(1, 300),
    band=st.floats(0, 1.05),
    sink=st.floats(0, 1),
    block_rows=st.sampled_from([1, 5, 16, 32, 64, 500]),
)
def test_windows_cover_the_band_once_and_full_ones_lie_in_it(num_tokens, band, sink, block_rows):
    band_width, first_key = 1 + int(band * num_tokens), int(sink * num_tokens)
    position = np.arange(num_tokens)
    in_band = abs(position[:, None] - position) < band_width
    visits = np.zeros((num_tokens, num_tokens), int)
    next_row = 0
    for window in band_windows(num_tokens, band_width, first_key, block_rows):
        assert window.first_row == next_row
        assert window.block_rows <= block_rows
        for block in range(window.num_blocks):
            start = window.first_row + block * window.block_rows
            rows = slice(start, start + window.block_rows)
            key = window.first_key + block * window.key_step
            stop = key + window.num_keys
            assert first_key <= key <= stop <= num_tokens
            assert in_band[rows, key:stop].all() or not window.is_full
            visits[rows, key:stop] += 1
        next_row = window.stop_row
    assert next_row == num_tokens
    assert visits.max() <= 1
    assert (visits[in_band & (position >= first_key)] == 1).all()


def test_work_is_near_the_band_and_the_number_of_windows_does_not_grow():
    for num_tokens in (8192, 32_760, 119_056):
        band_width = round(num_tokens * 0.134)  # density .25
        windows = band_windows(num_tokens, band_width, 0, 256)
        visited = sum(w.num_blocks * w.block_rows * w.num_keys for w in windows)
        kept = num_tokens * (2 * band_width - 1) - band_width * (band_width - 1)
        assert visited <= 1.15 * kept
        assert len(windows) <= 2 * (EDGE_WINDOWS + 1) + 1
