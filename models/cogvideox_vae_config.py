"""The config of CogVideoX's video autoencoder."""

from dataclasses import dataclass

from svg_jax.models.config import ModelConfig, check_blocks, implemented
from svg_jax.models.vae_tiling import Tiling

_DOWN, _UP = "CogVideoXDownBlock3D", "CogVideoXUpBlock3D"


@dataclass(frozen=True)
class CogVideoXVAEConfig(ModelConfig):
    """A released config.json; diffusers' names and defaults (these are 2b's).

    Attributes:
        in_channels: Channels of a video to encode.
        out_channels: Channels of a decoded video.
        down_block_types: "CogVideoXDownBlock3D" for each block.
        up_block_types: "CogVideoXUpBlock3D" for each block.
        block_out_channels: Features of each of the encoder's blocks; all but the last halve height
            and width. The decoder has them in reverse.
        latent_channels: Channels of latents.
        layers_per_block: Residual layers of each of the encoder's blocks; the decoder's have one
            more.
        act_fn: "silu".
        norm_eps: Epsilon of the norms in the encoder's residual layers; it is 1e-6 in all others.
        norm_num_groups: Groups of features that are normalised together.
        temporal_compression_ratio: Video frames of a latent frame, a power of two.
        sample_height: Twice the height of a tile, in pixels.
        sample_width: Twice the width of a tile, in pixels.
        scaling_factor: Factor of latents for a transformer.
        shift_factor: None.
        latents_mean: None.
        latents_std: None.
        force_upcast: Without effect.
        use_quant_conv: False.
        use_post_quant_conv: False.
        invert_scale_latents: Whether an image's latents are divided by scaling_factor (1.5).
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = (_DOWN,) * 4
    up_block_types: tuple[str, ...] = (_UP,) * 4
    block_out_channels: tuple[int, ...] = (128, 256, 256, 512)
    latent_channels: int = 16
    layers_per_block: int = 3
    act_fn: str = implemented("silu")
    norm_eps: float = 1e-6
    norm_num_groups: int = 32
    temporal_compression_ratio: int = 4
    sample_height: int = 480
    sample_width: int = 720
    scaling_factor: float = 1.15258426
    shift_factor: float | None = implemented(None)
    latents_mean: tuple[float, ...] | None = implemented(None)
    latents_std: tuple[float, ...] | None = implemented(None)
    force_upcast: bool = True
    use_quant_conv: bool = implemented(False)
    use_post_quant_conv: bool = implemented(False)
    invert_scale_latents: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        blocks = len(self.block_out_channels)
        check_blocks(self, down_block_types=_DOWN, up_block_types=_UP)
        ratios = [2**level for level in range(blocks)]
        if self.temporal_compression_ratio not in ratios:
            raise ValueError(
                f"temporal_compression_ratio={self.temporal_compression_ratio} must be one of "
                f"{ratios}: each of {blocks} blocks but one can halve the frames."
            )

    @property
    def spatial_compression_ratio(self) -> int:
        """Rows or columns of a video in one of its latents."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def temporal_levels(self) -> int:
        """Number of blocks that halve (or double) the frames: the first of encoder and decoder."""
        return self.temporal_compression_ratio.bit_length() - 1

    @property
    def tiling(self) -> Tiling:
        """Tiles of the released code: half the sample's size, overlapping by a sixth or fifth."""
        height, width = self.sample_height // 2, self.sample_width // 2
        return Tiling(height, width, height * 5 // 6, width * 4 // 5)
