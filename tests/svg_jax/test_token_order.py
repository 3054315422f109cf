"""The layout transformation is a permutation of the video tokens, for temporal heads alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svg_jax.models import VideoLayout
from svg_jax.token_order import to_frame_major, to_token_major, token_major_position

LAYOUTS = [
    VideoLayout(num_frames=3, tokens_per_frame=5),
    VideoLayout(num_frames=4, tokens_per_frame=7, text_tokens=3, text_position="first"),
    VideoLayout(num_frames=1, tokens_per_frame=6, text_tokens=2),
    VideoLayout(num_frames=5, tokens_per_frame=1, text_tokens=4),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_go_where_the_closed_form_says(layout):
    heads = jnp.array([[False, True], [True, False]])
    position = jnp.arange(layout.num_tokens, dtype=jnp.int32)
    x = jnp.broadcast_to(position[None, :, None, None], (2, layout.num_tokens, 2, 3))
    moved = np.asarray(to_token_major(x, layout=layout, temporal=heads)[0])
    for batch, head in np.ndindex(2, 2):
        order = np.arange(layout.num_tokens)
        expected = order.copy()
        if heads[batch, head]:
            expected[token_major_position(order, layout)] = order
        np.testing.assert_array_equal(moved[batch, :, head, 0], expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_text_stays_and_places_become_neighbours(layout):
    position = np.arange(layout.num_tokens)
    moved = token_major_position(position, layout)
    text = slice(layout.text_start, layout.text_start + layout.text_tokens)
    np.testing.assert_array_equal(moved[text], position[text])
    frame, place = 0, layout.tokens_per_frame - 1
    first = layout.video_start + frame * layout.tokens_per_frame + place
    same_place = moved[first :: layout.tokens_per_frame][: layout.num_frames]
    np.testing.assert_array_equal(np.diff(same_place), 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_restoring_undoes_the_transformation(layout):
    x = jax.random.normal(jax.random.key(0), (2, layout.num_tokens, 3, 4))
    heads = jax.random.bernoulli(jax.random.key(1), 0.5, (2, 3))
    moved = to_token_major(x, x, layout=layout, temporal=heads, num_tokens=layout.num_tokens + 5)
    for back in to_frame_major(*moved, layout=layout, temporal=heads):
        np.testing.assert_array_equal(back, x)


def test_a_layout_without_frames_is_refused():
    with pytest.raises(ValueError, match="at least one frame"):
        VideoLayout(num_frames=0, tokens_per_frame=4)
