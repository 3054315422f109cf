"""The config of a HunyuanVideo transformer, and the videos that it can take."""

from dataclasses import dataclass

from svg_jax.models.config import ModelConfig, implemented
from svg_jax.models.layout import VideoLayout
from svg_jax.models.patches import token_grid


@dataclass(frozen=True)
class HunyuanVideoConfig(ModelConfig):
    """A released config.json; diffusers' names and defaults (those of text to video).

    Attributes:
        in_channels: Latent channels of the input, those of an image condition included.
        out_channels: Latent channels of the output.
        num_attention_heads: Heads of a layer; times attention_head_dim, they are the width.
        attention_head_dim: Features of a head.
        num_layers: Double-stream layers, in which video and text have weights of their own.
        num_single_layers: Single-stream layers, which come after them.
        num_refiner_layers: Layers of the text's refiner.
        mlp_ratio: Features inside a feed-forward layer, as a multiple of the width; those of the
            refiner always have four times the width.
        patch_size: Latent rows and columns of a token.
        patch_size_t: Latent frames of a token.
        qk_norm: "rms_norm".
        guidance_embeds: Whether the model takes the guidance scale as an input.
        text_embed_dim: Features of the text encoder's tokens.
        pooled_projection_dim: Features of the text encoder that describes the text as a whole.
        rope_theta: Base of the frequencies of the rotary embedding.
        rope_axes_dim: Features of a head that turn with the frame, the row and the column.
        image_condition_type: None, "latent_concat" (an image in the input's channels) or
            "token_replace" (an image instead of the first frame, which has no noise).
    """

    in_channels: int = 16
    out_channels: int = 16
    num_attention_heads: int = 24
    attention_head_dim: int = 128
    num_layers: int = 20
    num_single_layers: int = 40
    num_refiner_layers: int = 2
    mlp_ratio: float = 4.0
    patch_size: int = 2
    patch_size_t: int = 1
    qk_norm: str = implemented("rms_norm")
    guidance_embeds: bool = True
    text_embed_dim: int = 4096
    pooled_projection_dim: int = 768
    rope_theta: float = 256.0
    rope_axes_dim: tuple[int, int, int] = (16, 56, 56)
    image_condition_type: str | None = implemented(None, "latent_concat", "token_replace")

    def __post_init__(self) -> None:
        super().__post_init__()
        axes = self.rope_axes_dim
        if sum(axes) != self.attention_head_dim or any(features % 2 for features in axes):
            raise ValueError(
                f"rope_axes_dim={axes} must be even numbers that sum to the attention_head_dim of "
                f"{self.attention_head_dim}."
            )
        if self.mlp_width < 1 or self.rope_theta <= 0:
            raise ValueError(
                f"mlp_ratio={self.mlp_ratio} and rope_theta={self.rope_theta} must be positive."
            )

    @property
    def num_attention_layers(self) -> int:
        """Number of layers that call `attend`."""
        return self.num_layers + self.num_single_layers

    @property
    def width(self) -> int:
        """Features of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_width(self) -> int:
        """Features inside a feed-forward layer."""
        return int(self.width * self.mlp_ratio)

    @property
    def patch_shape(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns of a token."""
        return (self.patch_size_t, self.patch_size, self.patch_size)

    def layout(self, num_frames: int, height: int, width: int, text_tokens: int) -> VideoLayout:
        """See `HunyuanVideoTransformer.layout`."""
        frames, rows, columns = token_grid(num_frames, height, width, self.patch_shape)
        if text_tokens < 1:
            raise ValueError(f"text_tokens={text_tokens} must be at least 1.")
        return VideoLayout(
            num_frames=frames,
            tokens_per_frame=rows * columns,
            text_tokens=text_tokens,
            text_position="last",
            band_rounding="down",
            first_frame_sink=False,
        )
