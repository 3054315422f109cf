"""The config of a Wan transformer, and the videos that it can take."""

from dataclasses import dataclass

from svg_jax.models.config import ModelConfig, implemented
from svg_jax.models.layout import VideoLayout
from svg_jax.models.patches import token_grid


@dataclass(frozen=True)
class WanConfig(ModelConfig):
    """A released config.json; diffusers' names and defaults (these are 14B's, text to video).

    Attributes:
        patch_size: Latent frames, rows and columns of a token.
        num_attention_heads: Heads of a layer; times attention_head_dim, they are the width.
        attention_head_dim: Features of a head.
        in_channels: Latent channels of the input, those of an image condition included.
        out_channels: Latent channels of the output.
        text_dim: Features of the text encoder.
        freq_dim: Features of the sinusoids of a time.
        ffn_dim: Features inside a feed-forward layer.
        num_layers: Layers.
        cross_attn_norm: True.
        qk_norm: "rms_norm_across_heads".
        eps: Epsilon of all norms except the image embedding's.
        image_dim: Features of the image encoder (2.1 I2V, FLF2V), or None.
        added_kv_proj_dim: Width of the model if there is an image_dim, else None.
        rope_max_seq_len: Largest number of frames, rows or columns of tokens.
        pos_embed_seq_len: Image tokens with a learned position, those of both images together
            (FLF2V), or None.
    """

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = implemented(True)
    qk_norm: str | None = implemented("rms_norm_across_heads")
    eps: float = 1e-6
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None
    rope_max_seq_len: int = 1024
    pos_embed_seq_len: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("attention_head_dim", "freq_dim"):
            if getattr(self, name) % 2:
                raise ValueError(f"{name} must be even, not {getattr(self, name)}.")
        if self.added_kv_proj_dim != (None if self.image_dim is None else self.width):
            raise ValueError(
                f"added_kv_proj_dim={self.added_kv_proj_dim} must be the width (heads * head_dim) "
                f"of {self.width} where there is an image_dim, and null where there is none."
            )
        if self.pos_embed_seq_len is not None and self.image_dim is None:
            raise ValueError("pos_embed_seq_len without image_dim: no such model.")

    @property
    def num_attention_layers(self) -> int:
        """Number of layers that call `attend`."""
        return self.num_layers

    @property
    def width(self) -> int:
        """Features of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def rotary_features(self) -> tuple[int, int, int]:
        """Features of a head that turn with the frame, with the row and with the column."""
        third = 2 * (self.attention_head_dim // 6)
        return (self.attention_head_dim - 2 * third, third, third)

    def layout(self, num_frames: int, height: int, width: int) -> VideoLayout:
        """See `WanTransformer.layout`."""
        grid = token_grid(num_frames, height, width, self.patch_size)
        if max(grid) > self.rope_max_seq_len:
            raise ValueError(
                f"{grid[0]}x{grid[1]}x{grid[2]} tokens (frames x rows x columns) exceed the "
                f"{self.rope_max_seq_len} that this model has positions for on each axis."
            )
        return VideoLayout(
            num_frames=grid[0],
            tokens_per_frame=grid[1] * grid[2],
            band_rounding="up",
            first_frame_sink=True,
        )
