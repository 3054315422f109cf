"""Tiles and their seams against the loops of the released VAEs, and the posterior."""

import itertools
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from svg_jax.models.vae import Posterior
from svg_jax.models.vae_tiling import FrameTiling, Tiling, blend_frames, decode_tiles, encode_tiles

RATIO = 4
# Sizes in latents: less than a tile, a tile, a last tile smaller than the overlap, and many tiles.
SIZES = [(3, 4), (4, 6), (5, 7), (8, 5), (11, 17), (13, 2)]
TILING = Tiling(tile_height=16, tile_width=24, stride_height=12, stride_width=16)
TINY: Any = {"latent_channels": 2, "block_out_channels": (4,) * 4, "norm_num_groups": 2}


def shrink(x) -> Any:
    """Stands for an encoder that sees its whole tile: the sum of each latent's pixels, normed."""
    batch, channels, frames, height, width = x.shape
    blocks = x.reshape(batch, channels, frames, height // RATIO, RATIO, width // RATIO, RATIO)
    out = blocks.sum((4, 6))
    return out - out.mean((3, 4))[..., None, None]


def grow(x) -> Any:
    """Stands for a decoder: unlike pixels of each latent, normed."""
    batch, channels, frames, height, width = x.shape
    pixels = 1 + np.arange(RATIO * RATIO, dtype=np.float32).reshape(1, 1, 1, 1, RATIO, 1, RATIO)
    pixels = torch.tensor(pixels) if isinstance(x, torch.Tensor) else pixels
    out = x[:, :, :, :, None, :, None] * pixels
    out = out.reshape(batch, channels, frames, height * RATIO, width * RATIO)
    return out - out.mean((3, 4))[..., None, None]


def reference_vae(kind) -> Any:
    """One of the released VAEs with our functions for networks, and our tiles."""
    vae: Any = None
    if kind == "HunyuanVideo":
        vae = diffusers.AutoencoderKLHunyuanVideo(**TINY)
        vae.enable_tiling(16, 24, 16, 12, 16, 12)
        vae.spatial_compression_ratio = RATIO
        vae.quant_conv, vae.post_quant_conv = torch.nn.Identity(), torch.nn.Identity()
    else:  # its tiles follow from the blocks
        blocks = {
            f"{way}_block_types": (f"CogVideoX{way.title()}Block3D",) * 3 for way in ("down", "up")
        }
        sizes = {"sample_height": 32, "sample_width": 48, "norm_num_groups": 2}
        vae = diffusers.AutoencoderKLCogVideoX(block_out_channels=(4,) * 3, **blocks, **sizes)  # pyright: ignore[reportArgumentType]
        vae.tile_overlap_factor_height, vae.tile_overlap_factor_width = 1 / 4, 1 / 3
    cached = kind == "CogVideoX"
    for network, function in ((vae.encoder, shrink), (vae.decoder, grow)):
        network.forward = lambda x, conv_cache=None, f=function: (f(x), None) if cached else f(x)
    return vae


@pytest.mark.parametrize("kind", ["HunyuanVideo", "CogVideoX"])
@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_cut_and_blended_as_in_diffusers(kind, size):
    vae = reference_vae(kind)
    rng = np.random.default_rng(0)
    video = rng.standard_normal((2, 3, 3, *(RATIO * axis for axis in size)), np.float32)
    latents = rng.standard_normal((2, 3, 2, *size), np.float32)
    pairs = [
        (encode_tiles(shrink, jnp.asarray(video), TILING, RATIO), vae._encode, video),
        (decode_tiles(grow, jnp.asarray(latents), TILING, RATIO), vae._decode, latents),
    ]
    vae.use_tiling = True
    for ours, reference, x in pairs:
        theirs = reference(torch.tensor(x))
        theirs = getattr(theirs, "sample", theirs).numpy()
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * np.abs(theirs).max())


@pytest.mark.parametrize("lengths", [(17,), (17, 16, 9), (17, 16, 2), (17, 3), (17, 12, 0)])
def test_frames_are_blended_as_in_diffusers(lengths):
    rng = np.random.default_rng(0)
    tiles = [rng.standard_normal((2, 3, frames, 4, 6), np.float32) for frames in lengths]
    vae = diffusers.AutoencoderKLHunyuanVideo(**TINY)
    row = [torch.tensor(tile) for tile in tiles]
    expected = [row[0][:, :, :13]]
    for before, tile in itertools.pairwise(row):
        expected.append(vae.blend_t(before, tile, 4)[:, :, :12])
    ours = blend_frames([jnp.asarray(tile) for tile in tiles], FrameTiling())
    np.testing.assert_allclose(ours, torch.cat(expected, dim=2).numpy(), atol=1e-6)


def test_equal_tiles_share_one_compilation_and_all_are_reported():
    traced, told = [], []

    @jax.jit
    def decode(x):
        traced.append(x.shape[-2:])
        return grow(x)

    latents = jnp.ones((1, 2, 1, 11, 17))
    decode_tiles(decode, latents, TILING, RATIO, lambda *numbers: told.append(numbers))
    assert sorted(traced) == [(2, 1), (2, 5), (2, 6), (4, 1), (4, 5), (4, 6)]
    assert told == [(i + 1, 20) for i in range(20)]
    assert TILING.count(44, 68) == 20
    decode_tiles(decode, latents[..., :4, :6], TILING, RATIO, lambda *n: told.append(n))
    assert told[20:] == [(1, 1)]


def test_seams_of_narrow_dtypes_are_rounded_once():
    latents = jnp.asarray(np.random.default_rng(1).standard_normal((1, 2, 1, 7, 9)), jnp.bfloat16)
    out = decode_tiles(lambda x: x, latents, Tiling(4, 4, 3, 3), 1)
    exact = decode_tiles(lambda x: x, latents.astype(jnp.float32), Tiling(4, 4, 3, 3), 1)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out.astype(jnp.float32), exact.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Tiling(16, 16, 17, 8), "stride_height must be from 1 to the tile's 16, not 17"),
        (lambda: Tiling(16, 16, 8, 0), "stride_width must be from 1"),
        (lambda: Tiling(16, 16, 12, 12).in_latents(8), "multiple of a latent's 8 pixels"),
        (lambda: FrameTiling(4, 8), "stride_frames must be from 1 to the tile's 4, not 8"),
        (lambda: FrameTiling(16, 10).in_latents(4), "multiples of a latent's 4 frames"),
    ],
)
def test_tiles_that_leave_gaps_or_cut_latents_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_posterior_is_that_of_diffusers():
    rng = np.random.default_rng(2)
    moments = (20 * rng.standard_normal((2, 6, 2, 3, 4))).astype(np.float32)
    noise = rng.standard_normal((2, 3, 2, 3, 4)).astype(np.float32)
    theirs = DiagonalGaussianDistribution(torch.tensor(moments))
    ours = jax.jit(Posterior.from_moments)(jnp.asarray(moments))
    np.testing.assert_array_equal(ours.mean, theirs.mode().numpy())
    np.testing.assert_array_equal(ours.log_variance, theirs.logvar.numpy())
    expected = theirs.mean + theirs.std * torch.tensor(noise)
    np.testing.assert_allclose(ours.sample(jnp.asarray(noise)), expected.numpy(), rtol=1e-6)
