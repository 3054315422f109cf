"""HunyuanVideo's video autoencoder (arXiv 2412.03603): videos to latents and back.

Source of the architecture as released: diffusers `AutoencoderKLHunyuanVideo`. It takes a long video
in overlapping tiles of frames, which changes the result and is part of the model.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Unpack

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from svg_jax.models.hunyuan_video_vae_config import HunyuanVideoVAEConfig
from svg_jax.models.hunyuan_video_vae_layers import Block, CausalConv, MiddleBlock, Upsample
from svg_jax.models.inputs import check_channels
from svg_jax.models.layers import Kinds, group_norm, silu
from svg_jax.models.vae import Frames, Posterior, compiled
from svg_jax.models.vae_tiling import (
    FrameTiling,
    Progress,
    Tiling,
    blend_frames,
    decode_tiles,
    encode_tiles,
)

RELEASED_FRAME_TILING = FrameTiling(tile_frames=16, stride_frames=12)


class Encoder(nnx.Module):
    """Encoder of pixels as means and logarithms of variances of latents."""

    def __init__(self, config: HunyuanVideoVAEConfig, **kinds: Unpack[Kinds]):
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.dtype = kinds["dtype"]
        self.input = CausalConv(config.in_channels, widths[0], **kinds)
        self.blocks = nnx.List()
        for pair, factor in zip(pairwise((widths[0], *widths)), config.factors, strict=True):
            resize = factor and CausalConv(pair[1], pair[1], factor, **kinds)
            self.blocks.append(Block(*pair, config.layers_per_block, groups, resize, **kinds))
        attention = config.mid_block_add_attention
        self.middle = MiddleBlock(widths[-1], groups, attention=attention, **kinds)
        self.norm = group_norm(widths[-1], groups, **kinds)
        self.output = CausalConv(widths[-1], 2 * config.latent_channels, **kinds)
        self.moments = nnx.Linear(2 * config.latent_channels, 2 * config.latent_channels, **kinds)

    def __call__(self, video: Frames) -> Frames:
        """Encode a tile."""
        hidden = self.input(video.astype(self.dtype))
        for block in self.blocks:
            hidden = block(hidden)
        hidden = silu(self.norm(self.middle(hidden))).astype(self.dtype)
        return self.moments(self.output(hidden))


class Decoder(nnx.Module):
    """Decoder of latents to pixels."""

    def __init__(self, config: HunyuanVideoVAEConfig, **kinds: Unpack[Kinds]):
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.dtype = kinds["dtype"]
        self.latents = nnx.Linear(config.latent_channels, config.latent_channels, **kinds)
        self.input = CausalConv(config.latent_channels, widths[0], **kinds)
        attention = config.mid_block_add_attention
        self.middle = MiddleBlock(widths[0], groups, attention=attention, **kinds)
        self.blocks = nnx.List()
        for pair, factor in zip(pairwise((widths[0], *widths)), config.factors, strict=True):
            resize = factor and Upsample(pair[1], factor, **kinds)
            self.blocks.append(Block(*pair, config.layers_per_block + 1, groups, resize, **kinds))
        self.norm = group_norm(widths[-1], groups, **kinds)
        self.output = CausalConv(widths[-1], config.out_channels, **kinds)

    def __call__(self, latents: Frames) -> Frames:
        """Decode a tile."""
        hidden = self.middle(self.input(self.latents(latents.astype(self.dtype))))
        for block in self.blocks:
            hidden = block(hidden)
        return self.output(silu(self.norm(hidden)).astype(self.dtype))


class HunyuanVideoVAE(nnx.Module):
    """Encodes videos as a distribution of latents, and decodes latents.

    Both loop over tiles from the host and compile once for each shape of a tile; call them outside
    of `jax.jit`.

    Attributes:
        config: Architecture.
    """

    def __init__(
        self,
        config: HunyuanVideoVAEConfig,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Make a model with random weights (under `nnx.eval_shape`: without any).

        Args:
            config: Architecture.
            dtype: Dtype of convolutions, attention and the result; norms are float32.
            param_dtype: Dtype of the parameters.
            rngs: Source of random weights.
        """
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.config = config
        self.encoder = Encoder(config, **kinds)
        self.decoder = Decoder(config, **kinds)

    def normalize(self, latents: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Scale latents from `encode` for a transformer."""
        return latents * self.config.scaling_factor

    def denormalize(self, latents: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Scale a transformer's latents for `decode`."""
        return latents / self.config.scaling_factor

    def encode(
        self,
        video: Float[Array, "batch channels frames height width"],
        *,
        tiling: Tiling | None = None,
        frame_tiling: FrameTiling | None = RELEASED_FRAME_TILING,
        progress: Progress | None = None,
    ) -> Posterior:
        """Encode a video.

        Args:
            video: Pixels from -1 to 1.
            tiling: Sizes of tiles in space, for videos larger than one tile; None for no tiles.
            frame_tiling: Sizes of tiles in time, for videos longer than one tile; None for no
                tiles.
            progress: Function that is called after each tile with the tiles done and their number.

        Returns:
            The distribution of latents: a latent frame for the first frame and for every four
            frames after it, of which the last ones may be fewer.

        Raises:
            ValueError: On sizes that this model cannot take.
        """
        config = self.config
        ratio, frame_ratio = config.spatial_compression_ratio, config.temporal_compression_ratio
        check_channels("video", video, config.in_channels)
        height, width = video.shape[-2:]
        if height % ratio or width % ratio:
            raise ValueError(
                f"video is {height}x{width} and both must be multiples of {ratio}: a latent has "
                f"{ratio}x{ratio} pixels."
            )
        encode = compiled(Encoder.__call__, self.encoder)
        moments = _map_frames(
            lambda video, progress: encode_tiles(encode, video, tiling, ratio, progress),
            video,
            frame_tiling,
            frame_tiling and frame_tiling.in_latents(frame_ratio),
            latent_frame=frame_ratio,
            tiles=tiling.count(height, width) if tiling else 1,
            progress=progress,
        )
        return Posterior.from_moments(moments)

    def decode(
        self,
        latents: Float[Array, "batch latent_channels latent_frames rows columns"],
        *,
        tiling: Tiling | None = None,
        frame_tiling: FrameTiling | None = RELEASED_FRAME_TILING,
        progress: Progress | None = None,
    ) -> Float[Array, "batch channels frames height width"]:
        """Decode latents.

        Args:
            latents: Latents from `encode`, or a transformer's after `denormalize`.
            tiling: See `encode`.
            frame_tiling: See `encode`.
            progress: See `encode`.

        Returns:
            A video from about -1 to 1: one frame for the first latent frame, four for every other.

        Raises:
            ValueError: On sizes that this model cannot take.
        """
        config = self.config
        ratio, frame_ratio = config.spatial_compression_ratio, config.temporal_compression_ratio
        check_channels("latents", latents, config.latent_channels)
        height, width = (ratio * size for size in latents.shape[-2:])
        decode = compiled(Decoder.__call__, self.decoder)
        return _map_frames(
            lambda latents, progress: decode_tiles(decode, latents, tiling, ratio, progress),
            latents,
            frame_tiling and frame_tiling.in_latents(frame_ratio),
            frame_tiling,
            latent_frame=1,
            tiles=tiling.count(height, width) if tiling else 1,
            progress=progress,
        )


def _map_frames(
    function: Callable[[Array, Progress | None], Array],
    x: Array,
    tiles_in: FrameTiling | None,
    tiles_out: FrameTiling | None,
    *,
    latent_frame: int,
    tiles: int,
    progress: Progress | None,
) -> Array:
    """Apply a function to tiles in time, each with the frame in front of it, and join them.

    Args:
        function: Function of a tile and of the progress through its tiles in space.
        x: Whole video or latents.
        tiles_in: Sizes of the tiles in frames of `x`.
        tiles_out: Sizes of the tiles in frames of the result.
        latent_frame: Frames of `x` in a latent frame.
        tiles: Number of tiles in space in each tile in time.
        progress: Function that is called after each tile in space.
    """
    frames = x.shape[2]
    if tiles_in is None or tiles_out is None or frames <= tiles_in.tile_frames:
        return function(x, progress)
    # A last tile that would give only the latent of the frame in front of it is left out.
    starts = range(0, max(frames - latent_frame, 1), tiles_in.stride_frames)
    outs = []
    for index, start in enumerate(starts):

        def advance(done: int, _: int, before: int = index * tiles) -> None:
            assert progress is not None
            progress(before + done, len(starts) * tiles)

        tile = x[:, :, start : start + tiles_in.tile_frames + 1]
        out = function(tile, advance if progress else None)
        outs.append(out if start == 0 else out[:, :, 1:])
    return blend_frames(outs, tiles_out)
