"""The shape of a token sequence that holds a video, and the place of its text."""

from dataclasses import dataclass
from numbers import Integral
from typing import Literal


@dataclass(frozen=True)
class VideoLayout:
    """A sequence of video tokens, frame by frame, with text before or behind them.

    Static and hashable: functions that take it as a jit-static argument compile once per layout.

    Attributes:
        num_frames: Latent frames after patching, N.
        tokens_per_frame: Tokens of one such frame, L.
        text_tokens: Text tokens in the same sequence, C, padding included; 0 where text enters by
            cross-attention.
        text_position: Whether text stands before ("first") or behind ("last") the video.
        band_rounding: Rounding of a band's width w in sparse attention: "down", which keeps tokens
            less than w away (CogVideoX, HunyuanVideo), or "up", which keeps those at most w away
            (Wan). Default: "down" if there is text, else "up"; a model's layout says which.
        first_frame_sink: Whether, in sparse attention, all tokens attend to the whole first frame
            (Wan). Default: only if there is no text; a model's layout says which.
    """

    num_frames: int
    tokens_per_frame: int
    text_tokens: int = 0
    text_position: Literal["first", "last"] = "last"
    band_rounding: Literal["down", "up"] | None = None
    first_frame_sink: bool | None = None

    def __post_init__(self) -> None:
        for name in ("num_frames", "tokens_per_frame", "text_tokens"):
            count = getattr(self, name)
            if isinstance(count, bool) or not isinstance(count, Integral):
                raise ValueError(f"{name} is a whole number: got {count!r:.60}")
        if self.num_frames < 1 or self.tokens_per_frame < 1 or self.text_tokens < 0:
            raise ValueError(
                f"a video has at least one frame of one token and no negative text: got {self}"
            )
        if self.text_position not in ("first", "last"):
            raise ValueError(f"text_position is 'first' or 'last', not {self.text_position!r}")
        if self.band_rounding not in ("down", "up", None):
            raise ValueError(f"band_rounding is 'down' or 'up': got {self.band_rounding!r:.60}")
        if not isinstance(self.first_frame_sink, bool | None):
            raise ValueError(
                f"first_frame_sink is True or False: got {self.first_frame_sink!r:.60}"
            )
        # Filled in here because the defaults depend on another field: a layout then equals one that
        # was given these values.
        if self.band_rounding is None:
            object.__setattr__(self, "band_rounding", "down" if self.text_tokens else "up")
        if self.first_frame_sink is None:
            object.__setattr__(self, "first_frame_sink", not self.text_tokens)

    @property
    def video_tokens(self) -> int:
        """Number of video tokens, N·L."""
        return self.num_frames * self.tokens_per_frame

    @property
    def num_tokens(self) -> int:
        """Length of the whole sequence, S = C + N·L."""
        return self.text_tokens + self.video_tokens

    @property
    def video_start(self) -> int:
        """Position of the first video token."""
        return self.text_tokens if self.text_position == "first" else 0

    @property
    def text_start(self) -> int:
        """Position of the first text token."""
        return 0 if self.text_position == "first" else self.video_tokens
