"""The layout transformation: frame-major ↔ token-major, head by head (paper, section 4.2).

Frame-major: video token f·L + p stands for place p of frame f. Token-major: it stands at p·N + f,
so that one place's tokens of all frames are neighbours. Text tokens never move.
"""

from jaxtyping import Array, Bool, Shaped

from svg_jax.kernels import transpose_tokens
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
    *arrays: Shaped[Array, "batch _ heads head_dim"],
    layout: VideoLayout,
    temporal: Bool[Array, "batch heads"],
    num_tokens: int | None = None,
) -> tuple[Shaped[Array, "batch _ heads head_dim"], ...]:
    """Lay the temporal heads' video tokens out token-major; leave the others.

    Args:
        arrays: Queries, keys, values: all that is to be laid out, in one pass.
        layout: The sequence's layout.
        temporal: True where a head is temporal.
        num_tokens: Tokens of the results; zeros fill what the sequence lacks. None: none.
    """
    return transpose_tokens(
        arrays,
        temporal,
        start=layout.video_start,
        rows=layout.num_frames,
        columns=layout.tokens_per_frame,
        num_tokens=num_tokens,
    )


def to_frame_major(
    *arrays: Shaped[Array, "batch _ heads head_dim"],
    layout: VideoLayout,
    temporal: Bool[Array, "batch heads"],
) -> tuple[Shaped[Array, "batch _ heads head_dim"], ...]:
    """Undo `to_token_major`; tokens that it added are cut off."""
    return transpose_tokens(
        arrays,
        temporal,
        start=layout.video_start,
        rows=layout.tokens_per_frame,
        columns=layout.num_frames,
        num_tokens=layout.num_tokens,
    )
