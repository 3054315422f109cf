"""The layout transformation: frame-major ↔ token-major, head by head (paper, section 4.2).

Frame-major: video token f·L + p stands for place p of frame f. Token-major: it stands at p·N + f,
so that one place's tokens of all frames are neighbours. Text tokens never move.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Shaped

from svg_jax.models import VideoLayout


def token_major_position(position, layout: VideoLayout):
    """Where a token of the frame-major sequence stands in the token-major one.

    Args:
        position: Integers of any shape, numpy or jax: positions in the whole sequence.
        layout: The sequence's layout.

    Returns:
        Positions of the same shape and dtype; text keeps its place.
    """
    video = position - layout.video_start
    frame, place = video // layout.tokens_per_frame, video % layout.tokens_per_frame
    moved = layout.video_start + place * layout.num_frames + frame
    is_video = (video >= 0) & (video < layout.video_tokens)
    # Arithmetic instead of `where`, so that one line serves numpy and jax alike.
    return position + is_video.astype(position.dtype) * (moved - position)


def to_token_major(
    x: Shaped[Array, "batch tokens heads head_dim"],
    layout: VideoLayout,
    temporal: Bool[Array, "batch heads"],
) -> Shaped[Array, "batch tokens heads head_dim"]:
    """Lay the temporal heads' video tokens out token-major; leave the others."""
    return _transpose_video(x, layout, (layout.num_frames, layout.tokens_per_frame), temporal)


def to_frame_major(
    x: Shaped[Array, "batch tokens heads head_dim"],
    layout: VideoLayout,
    temporal: Bool[Array, "batch heads"],
) -> Shaped[Array, "batch tokens heads head_dim"]:
    """Undo `to_token_major`."""
    return _transpose_video(x, layout, (layout.tokens_per_frame, layout.num_frames), temporal)


def _transpose_video(x, layout: VideoLayout, outer_inner: tuple[int, int], temporal):
    start, stop = layout.video_start, layout.video_start + layout.video_tokens
    before, video, after = x[:, :start], x[:, start:stop], x[:, stop:]
    batch, _, heads, head_dim = x.shape
    moved = video.reshape(batch, *outer_inner, heads, head_dim).swapaxes(1, 2).reshape(video.shape)
    video = jnp.where(temporal[:, None, :, None], moved, video)
    return jnp.concatenate([before, video, after], axis=1)
