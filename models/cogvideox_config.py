"""The config of a CogVideoX transformer, and the videos that it can take."""

from dataclasses import dataclass

from svg_jax.models.config import ModelConfig, implemented
from svg_jax.models.layout import VideoLayout
from svg_jax.models.patches import token_grid


@dataclass(frozen=True)
class CogVideoXConfig(ModelConfig):
    """A released config.json; diffusers' names and defaults (these are 2b's).

    Attributes:
        num_attention_heads: Heads of a layer; times attention_head_dim, they are the width.
        attention_head_dim: Features of a head.
        in_channels: Latent channels of the input, those of an image condition included.
        out_channels: Latent channels of the output.
        flip_sin_to_cos: True.
        freq_shift: 0.
        time_embed_dim: Features of the time embedding.
        ofs_embed_dim: Features of the `ofs` embedding (1.5-5b-I2V), or None.
        text_embed_dim: Features of the text encoder.
        num_layers: Layers.
        dropout: Share of features that training leaves out; without effect.
        attention_bias: True.
        sample_width: Latent width that the model was trained at.
        sample_height: Latent height that the model was trained at.
        sample_frames: Frames of a training video, in pixel space.
        patch_size: Latent rows and columns of a token.
        patch_size_t: Latent frames of a token; None (1.0) means one, and 1.5 has two.
        temporal_compression_ratio: Video frames of a latent frame.
        max_text_seq_length: Text tokens, padding included.
        activation_fn: "gelu-approximate".
        timestep_activation_fn: "silu".
        norm_elementwise_affine: True.
        norm_eps: Epsilon of the layer norms, except those of query and key.
        spatial_interpolation_scale: Divisor of rows and columns in the sin-cos embedding.
        temporal_interpolation_scale: Divisor of frames in the sin-cos embedding.
        use_rotary_positional_embeddings: Whether layers have a rotary embedding; if not (2b), a
            sin-cos embedding is added to the first hidden state.
        use_learned_positional_embeddings: Whether a learned embedding is added, too (5b-I2V).
        patch_bias: Whether a convolutional patch embedding has a bias: True. Without meaning if
            patch_size_t is given: the embedding then always has one.
    """

    num_attention_heads: int = 30
    attention_head_dim: int = 64
    in_channels: int = 16
    out_channels: int = 16
    flip_sin_to_cos: bool = implemented(True)
    freq_shift: int = implemented(0)
    time_embed_dim: int = 512
    ofs_embed_dim: int | None = None
    text_embed_dim: int = 4096
    num_layers: int = 30
    dropout: float = 0.0
    attention_bias: bool = implemented(True)
    sample_width: int = 90
    sample_height: int = 60
    sample_frames: int = 49
    patch_size: int = 2
    patch_size_t: int | None = None
    temporal_compression_ratio: int = 4
    max_text_seq_length: int = 226
    activation_fn: str = implemented("gelu-approximate")
    timestep_activation_fn: str = implemented("silu")
    norm_elementwise_affine: bool = implemented(True)
    norm_eps: float = 1e-5
    spatial_interpolation_scale: float = 1.875
    temporal_interpolation_scale: float = 1.0
    use_rotary_positional_embeddings: bool = False
    use_learned_positional_embeddings: bool = False
    patch_bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        rotary, learned = (
            self.use_rotary_positional_embeddings,
            self.use_learned_positional_embeddings,
        )
        if learned and not rotary:
            raise ValueError("learned positional embeddings without rotary ones: no such model.")
        if self.patch_size_t is not None and (learned or not rotary):
            raise ValueError("patch_size_t goes with rotary positional embeddings alone.")
        if self.patch_size_t is None and not self.patch_bias:
            raise ValueError(
                "patch_bias=False is not implemented for a patch without patch_size_t."
            )
        if rotary and self.attention_head_dim % 16:
            raise ValueError(
                "rotary positional embeddings need an attention_head_dim that 16 divides, not "
                f"{self.attention_head_dim}."
            )
        if (learned or not rotary) and self.width % 16:
            raise ValueError(
                "sin-cos positional embeddings need a width (heads * head_dim) that 16 divides, "
                f"not {self.width}."
            )
        if learned and (self.sample_frames - 1) % self.temporal_compression_ratio:
            raise ValueError(
                f"learned positional embeddings of sample_frames={self.sample_frames} end within a "
                f"latent frame of {self.temporal_compression_ratio} frames."
            )
        if self.width % 2:
            raise ValueError(f"the width (heads * head_dim) must be even, not {self.width}.")
        if self.ofs_embed_dim not in (None, self.time_embed_dim):
            raise ValueError(
                f"ofs_embed_dim={self.ofs_embed_dim} must be time_embed_dim={self.time_embed_dim}: "
                "the two embeddings are added."
            )

    @property
    def num_attention_layers(self) -> int:
        """Number of layers that call `attend`."""
        return self.num_layers

    @property
    def width(self) -> int:
        """Features of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patch_shape(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns of a token."""
        return (self.patch_size_t or 1, self.patch_size, self.patch_size)

    @property
    def sample_grid(self) -> tuple[int, int, int]:
        """Frames, rows and columns of tokens that the model was trained at."""
        latent_frames = (self.sample_frames - 1) // self.temporal_compression_ratio + 1
        return (
            -(-latent_frames // self.patch_shape[0]),
            self.sample_height // self.patch_size,
            self.sample_width // self.patch_size,
        )

    def layout(self, num_frames: int, height: int, width: int, text_tokens: int) -> VideoLayout:
        """See `CogVideoXTransformer.layout`."""
        frames, rows, columns = token_grid(num_frames, height, width, self.patch_shape)
        if not 1 <= text_tokens <= self.max_text_seq_length:
            raise ValueError(
                f"text_tokens={text_tokens} must lie between 1 and "
                f"max_text_seq_length={self.max_text_seq_length}."
            )
        sample = (self.sample_height, self.sample_width)
        if self.use_learned_positional_embeddings:
            if (height, width) != sample:
                raise ValueError(
                    f"the learned positions of this model fit latents of {sample[0]}x{sample[1]} "
                    f"(height x width) alone, not {height}x{width}."
                )
            if text_tokens != self.max_text_seq_length:
                raise ValueError(
                    f"the learned positions of this model fit {self.max_text_seq_length} text "
                    f"tokens, not {text_tokens}: pad the prompt."
                )
        if self.patch_size_t is not None and (height > sample[0] or width > sample[1]):
            raise ValueError(
                f"latents of {height}x{width} (height x width) exceed the largest that this model "
                f"has positions for, {sample[0]}x{sample[1]}."
            )
        return VideoLayout(
            num_frames=frames,
            tokens_per_frame=rows * columns,
            text_tokens=text_tokens,
            text_position="first",
            band_rounding="down",
            first_frame_sink=False,
        )
