"""The config of HunyuanVideo's video autoencoder."""

from dataclasses import dataclass

from svg_jax.models.config import ModelConfig, check_blocks, implemented

_DOWN, _UP = "HunyuanVideoDownBlock3D", "HunyuanVideoUpBlock3D"


@dataclass(frozen=True)
class HunyuanVideoVAEConfig(ModelConfig):
    """A released config.json; diffusers' names and defaults.

    Attributes:
        in_channels: Channels of a video to encode.
        out_channels: Channels of a decoded video.
        latent_channels: Channels of latents.
        down_block_types: "HunyuanVideoDownBlock3D" for each block.
        up_block_types: "HunyuanVideoUpBlock3D" for each block.
        block_out_channels: Features of each of the encoder's blocks; the decoder has them in
            reverse.
        layers_per_block: Residual layers of each of the encoder's blocks; the decoder's have one
            more.
        act_fn: "silu".
        norm_num_groups: Groups of features that are normalised together.
        scaling_factor: Factor of latents for a transformer.
        spatial_compression_ratio: 8 rows, and 8 columns, of pixels to a latent.
        temporal_compression_ratio: 4 frames to a latent frame, except the first, which is one.
        mid_block_add_attention: Whether the middle block has attention.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    down_block_types: tuple[str, ...] = (_DOWN,) * 4
    up_block_types: tuple[str, ...] = (_UP,) * 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    act_fn: str = implemented("silu")
    norm_num_groups: int = 32
    scaling_factor: float = 0.476986
    spatial_compression_ratio: int = implemented(8)
    temporal_compression_ratio: int = implemented(4)
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        blocks = len(self.block_out_channels)
        check_blocks(self, down_block_types=_DOWN, up_block_types=_UP)
        if blocks < 3:
            raise ValueError(
                f"block_out_channels={self.block_out_channels} must be three or more: three blocks "
                "halve rows and columns."
            )

    @property
    def factors(self) -> tuple[tuple[int, int, int] | None, ...]:
        """Divisors of frames, rows and columns in each block, which are factors in the decoder.

        None for a block that keeps all sizes. The first three blocks change rows and columns; the
        two before the last change frames.
        """
        blocks = len(self.block_out_channels)
        spatial = [2 if block < 3 else 1 for block in range(blocks)]
        temporal = [2 if blocks - 3 <= block < blocks - 1 else 1 for block in range(blocks)]
        return tuple(
            (frames, size, size) if frames * size > 1 else None
            for frames, size in zip(temporal, spatial, strict=True)
        )
