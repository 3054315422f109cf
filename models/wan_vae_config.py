"""The config of a Wan VAE, and the videos that it can take."""

from dataclasses import dataclass

from svg_jax.models.config import ModelConfig, implemented


@dataclass(frozen=True)
class WanVAEConfig(ModelConfig):
    """A released config.json; diffusers' names and defaults (these are those of Wan 2.1).

    Attributes:
        base_dim: Features of the encoder at full size.
        decoder_base_dim: Features of the decoder at full size; None means base_dim.
        z_dim: Latent channels.
        dim_mult: Factor of the features at each size, from full size down.
        num_res_blocks: Residual blocks of the encoder at each size; the decoder has one more.
        attn_scales: Empty tuple.
        temperal_downsample: Whether a step from one size to the next also halves the frames.
        dropout: Share of features that training leaves out; without effect.
        latents_mean: Mean of each latent channel, for `WanVAE.normalize`.
        latents_std: Standard deviation of each latent channel.
        is_residual: Whether blocks pass their input around their residual blocks (2.2).
        in_channels: Channels of the video, times patch_size² where there is one.
        out_channels: Channels of the decoded video, times patch_size² where there is one.
        patch_size: Rows, and columns, of pixels that become channels (2.2), or None.
        scale_factor_temporal: Frames per latent frame.
        scale_factor_spatial: Rows of pixels per latent row, and columns per latent column.
    """

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = implemented(())
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    dropout: float = 0.0
    latents_mean: tuple[float, ...] = (
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    )
    latents_std: tuple[float, ...] = (
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916),
    )
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_temporal: int = 4
    scale_factor_spatial: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise ValueError(
                f"temperal_downsample has {len(self.temperal_downsample)} steps and the "
                f"{len(self.dim_mult)} sizes of dim_mult have {len(self.dim_mult) - 1}."
            )
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) != self.z_dim:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} values for {self.z_dim} channels."
                )
        for name, factor in (
            ("scale_factor_temporal", 2 ** sum(self.temperal_downsample)),
            ("scale_factor_spatial", 2 ** len(self.temperal_downsample) * self.patch),
        ):
            if getattr(self, name) != factor:
                raise ValueError(
                    f"{name}={getattr(self, name)} and the layers of this config make it {factor}."
                )
        for name in ("in_channels", "out_channels"):
            if getattr(self, name) % self.patch**2:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be a multiple of patch_size² = "
                    f"{self.patch**2}."
                )

    @property
    def patch(self) -> int:
        """Rows, and columns, of pixels that become channels; 1 without a patch_size."""
        return self.patch_size or 1

    @property
    def encoder_widths(self) -> tuple[int, ...]:
        """Features at each size, from full size down."""
        return tuple(self.base_dim * factor for factor in self.dim_mult)

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Features at each size, from the smallest up."""
        base = self.decoder_base_dim or self.base_dim
        return tuple(base * factor for factor in reversed(self.dim_mult))

    def check_video(self, channels: int, num_frames: int, height: int, width: int) -> None:
        """Refuse a video that the encoder cannot take.

        Raises:
            ValueError: On a number of frames other than 1 + 4k, of which the released encoder would
                silently drop the last ones; on a size below a latent's; in 2.2 also on one that is
                not a multiple of it.
        """
        if channels * self.patch**2 != self.in_channels:
            raise ValueError(
                f"the video has {channels} channels and the model takes "
                f"{self.in_channels // self.patch**2}."
            )
        frames, size = self.scale_factor_temporal, self.scale_factor_spatial
        if num_frames < 1 or (num_frames - 1) % frames:
            raise ValueError(
                f"num_frames={num_frames} must be one more than a multiple of {frames}."
            )
        step = size if self.is_residual else self.patch
        for name, value in (("height", height), ("width", width)):
            if value < size or value % step:
                raise ValueError(
                    f"{name}={value} must be at least {size} and a multiple of {step}."
                )
