"""The video autoencoders against the released code, in several variants, on random weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from parity import TOLERANCE, bfloat16_errors, ported, randomised, relative_error
from sizes import slow_but

from svg_jax.convert import convert_state, restore_state
from svg_jax.convert.tables import cogvideox_vae, hunyuan_video_vae, wan_vae
from svg_jax.models import (
    CogVideoXVAE,
    CogVideoXVAEConfig,
    HunyuanVideoVAE,
    HunyuanVideoVAEConfig,
    Tiling,
    WanVAE,
    WanVAEConfig,
)


def diffusers_blocks(name, *widths):
    ways = (("down", "Down"), ("up", "Up"))
    return {
        "block_out_channels": widths,
        **{f"{way}_block_types": (f"{name}{word}Block3D",) * len(widths) for way, word in ways},
    }


def cogvideox(*widths, **values):
    sizes = {"layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4, "norm_eps": 1e-3}
    return {**diffusers_blocks("CogVideoX", *widths), **sizes, **values}


SMALL = cogvideox(
    8, 12, layers_per_block=2, norm_num_groups=2, temporal_compression_ratio=2, out_channels=5
)
WAN_21 = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2, 3, 3],
    "num_res_blocks": 1,
    "latents_mean": [-0.5, 0.25, 1.5, 0.1],
    "latents_std": [2.5, 0.5, 1.25, 1.0],
}
COGVIDEOX_VARIANTS = {
    "released": cogvideox(8, 12, 12, 16),
    "small": SMALL,
    "still": cogvideox(4, 12, in_channels=2, temporal_compression_ratio=1, latent_channels=3),
    # Tiles of 6 x 5 latents, the least that overlap by a sixth and a fifth.
    "tiled": {**SMALL, "sample_height": 24, "sample_width": 20},
}
HUNYUAN_VIDEO_VARIANTS = {
    # Groups of several channels: those of one are small enough to have next to no variance, and
    # then float32 is 1e-5 away from float64 in both libraries.
    "tiny": {
        **diffusers_blocks("HunyuanVideo", 8, 8, 12),
        "latent_channels": 3,
        "layers_per_block": 1,
        "norm_num_groups": 2,
    },
    "other": {
        **diffusers_blocks("HunyuanVideo", 4, 4, 8, 6),
        "in_channels": 2,
        "out_channels": 4,
        "latent_channels": 2,
        "layers_per_block": 2,
        "norm_num_groups": 2,
        "mid_block_add_attention": False,
    },
}
WAN_VARIANTS = {
    "2.1": WAN_21,
    "2.2": {
        **WAN_21,
        "base_dim": 4,
        "decoder_base_dim": 6,
        "dim_mult": [1, 2, 4, 4],
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
    },
    "other": {  # neither's sizes
        **WAN_21,
        "dim_mult": [2, 1],
        "temperal_downsample": [True],
        "scale_factor_temporal": 2,
        "scale_factor_spatial": 2,
    },
}


@dataclass(frozen=True)
class Family:
    """One family's autoencoder, here and in diffusers.

    Attributes:
        reference: diffusers' class.
        model: Class here.
        config: Class of its config.
        rules: Function that makes the table of names from a config.
        variants: Values of diffusers' config, by name.
    """

    reference: Any
    model: Any
    config: Any
    rules: Callable
    variants: Mapping[str, dict]


FAMILIES = {
    "CogVideoX": Family(
        diffusers.AutoencoderKLCogVideoX,
        CogVideoXVAE,
        CogVideoXVAEConfig,
        cogvideox_vae.rules,
        COGVIDEOX_VARIANTS,
    ),
    "HunyuanVideo": Family(
        diffusers.AutoencoderKLHunyuanVideo,
        HunyuanVideoVAE,
        HunyuanVideoVAEConfig,
        hunyuan_video_vae.rules,
        HUNYUAN_VIDEO_VARIANTS,
    ),
    "Wan": Family(diffusers.AutoencoderKLWan, WanVAE, WanVAEConfig, wan_vae.rules, WAN_VARIANTS),
}


@pytest.fixture(autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def new_pair(name, variant, seed=0, dtype=torch.float32):
    """diffusers' module with random weights, and the one here with the same."""
    family = FAMILIES[name]
    reference = randomised(family.reference(**family.variants[variant]), seed, dtype)
    config = family.config.from_dict(dict(reference.config))
    ours = jnp.dtype(str(dtype).removeprefix("torch."))
    model = ported(
        lambda: family.model(config, dtype=ours, param_dtype=ours, rngs=nnx.Rngs(0)),
        family.rules(config),
        reference,
    )
    return reference, model


pair = cache(new_pair)


def normal(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def channels_of(model):
    """Channels of pixels and of latents."""
    config = model.config
    if isinstance(config, WanVAEConfig):
        return config.in_channels // config.patch**2, config.z_dim
    return config.in_channels, config.latent_channels


@torch.no_grad()
def reference_moments(reference, video):
    """diffusers' means and logarithms of variances."""
    posterior = reference.encode(torch.tensor(video, dtype=reference.dtype)).latent_dist
    return np.stack([posterior.mean.float().numpy(), posterior.logvar.float().numpy()])


@torch.no_grad()
def reference_video(reference, latents):
    return reference.decode(torch.tensor(latents, dtype=reference.dtype)).sample.float().numpy()


def our_moments(model, video, **tiling):
    posterior = model.encode(jnp.asarray(video), **tiling)
    assert {moment.dtype for moment in posterior} == {jnp.dtype(model_dtype(model))}
    return np.stack([np.asarray(moment, np.float32) for moment in posterior])


def our_video(model, latents, **tiling):
    video = model.decode(jnp.asarray(latents), **tiling)
    assert video.dtype == model_dtype(model)
    return np.asarray(video, np.float32)


def model_dtype(model):
    return jax.tree.leaves(nnx.state(model, nnx.Param))[0].dtype


def check(what, ours, theirs):
    """Each of the arrays, alone, is as near as it must be."""
    assert ours.shape == theirs.shape
    errors = [relative_error(*arrays) for arrays in zip(ours, theirs, strict=True)]
    print(f"{what}: {errors}")
    assert max(errors) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "variant", "size"),
    [
        ("CogVideoX", "released", (1, 3, 2)),
        pytest.param("CogVideoX", "released", (5, 2, 3), marks=pytest.mark.slow),
        pytest.param("CogVideoX", "small", (2, 3, 5), marks=pytest.mark.slow),
        pytest.param("CogVideoX", "small", (3, 1, 4), marks=pytest.mark.slow),
        ("CogVideoX", "small", (6, 4, 2)),
        ("CogVideoX", "still", (5, 2, 3)),
        *slow_but(
            [("HunyuanVideo", "tiny", (frames, 2, 3)) for frames in (1, 9)],
            [("HunyuanVideo", "tiny", (frames, 2, 3)) for frames in (1, 4, 5, 7, 9)],
        ),
        ("HunyuanVideo", "other", (3, 2, 3)),
        pytest.param("Wan", "2.1", (1, 2, 3), marks=pytest.mark.slow),
        ("Wan", "2.1", (4, 2, 3)),
        ("Wan", "2.2", (1, 2, 3)),
        pytest.param("Wan", "2.2", (4, 2, 3), marks=pytest.mark.slow),
        ("Wan", "other", (3, 2, 3)),
    ],
)
def test_it_decodes_as_diffusers(name, variant, size):
    reference, model = pair(name, variant)
    latents = normal(2, channels_of(model)[1], *size)
    theirs = reference_video(reference, latents)
    assert np.mean(np.abs(theirs) == 1) < 0.5  # where the video is clipped, all is equal
    check(f"{name} {variant}, {size}", our_video(model, latents)[None], theirs[None])


@pytest.mark.parametrize(
    ("name", "variant", "size"),
    [
        ("CogVideoX", "released", (1, 24, 16)),
        pytest.param("CogVideoX", "released", (17, 16, 24), marks=pytest.mark.slow),
        pytest.param("CogVideoX", "small", (2, 6, 10), marks=pytest.mark.slow),
        pytest.param("CogVideoX", "small", (8, 2, 8), marks=pytest.mark.slow),
        pytest.param("CogVideoX", "small", (13, 4, 6), marks=pytest.mark.slow),
        ("CogVideoX", "small", (22, 6, 4)),
        ("CogVideoX", "still", (9, 4, 6)),
        # Less than a tile, and tiles the last of which has one, two, three or four latent frames.
        *slow_but(
            [("HunyuanVideo", "tiny", (frames, 16, 24)) for frames in (4, 33)],
            [("HunyuanVideo", "tiny", (frames, 16, 24)) for frames in (1, 4, 20, 28, 33)],
        ),
        ("HunyuanVideo", "other", (9, 16, 24)),
        ("Wan", "2.1", (1, 8, 13)),
        ("Wan", "2.1", (13, 19, 31)),
        ("Wan", "2.2", (9, 16, 48)),
        ("Wan", "other", (5, 2, 3)),
    ],
)
def test_it_encodes_as_diffusers(name, variant, size):
    reference, model = pair(name, variant)
    video = normal(2, channels_of(model)[0], *size)
    theirs = reference_moments(reference, video)
    check(f"{name} {variant}, {size}", our_moments(model, video), theirs)


# Few tiles of unlike sizes. Those of 2.2's encoder have twice as many pixels as they say: one would
# be enough here, but the released one cuts whatever has more than they say. HunyuanVideo's are
# tiles in time as well.
@pytest.mark.parametrize(
    ("name", "variant", "video_size", "latents_size", "tiling"),
    [
        ("CogVideoX", "tiled", (3, 10, 16), (3, 7, 4), None),  # side by side, one upon the other
        ("HunyuanVideo", "tiny", (20, 56, 24), (5, 7, 5), Tiling(32, 40, 24, 24)),
        ("Wan", "2.1", (5, 43, 19), (2, 5, 2), Tiling(32, 32, 24, 24)),
        ("Wan", "2.2", (5, 80, 32), (2, 5, 2), Tiling(48, 48, 32, 32)),
    ],
)
def test_in_tiles_it_equals_diffusers(name, variant, video_size, latents_size, tiling):
    reference, model = pair(name, variant)
    if tiling is None:
        tiling = model.config.tiling
        reference.enable_tiling()
    else:
        reference.enable_tiling(
            tile_sample_min_height=tiling.tile_height,
            tile_sample_min_width=tiling.tile_width,
            tile_sample_stride_height=tiling.stride_height,
            tile_sample_stride_width=tiling.stride_width,
        )
    in_channels, latent_channels = channels_of(model)
    video, latents = normal(1, in_channels, *video_size), normal(1, latent_channels, *latents_size)
    moments, pixels = reference_moments(reference, video), reference_video(reference, latents)
    reference.use_tiling = False
    check(f"{name} {variant} encoded", our_moments(model, video, tiling=tiling), moments)
    ours = our_video(model, latents, tiling=tiling)
    check(f"{name} {variant} decoded", ours[None], pixels[None])


def test_without_tiles_in_time_it_equals_diffusers_without_them():
    reference, model = pair("HunyuanVideo", "tiny")
    reference.use_framewise_encoding = reference.use_framewise_decoding = False
    video = normal(1, 3, 33, 16, 24)
    moments = reference_moments(reference, video)
    pixels = reference_video(reference, moments[0])
    reference.use_framewise_encoding = reference.use_framewise_decoding = True
    check("encoded", our_moments(model, video, frame_tiling=None), moments)
    check("decoded", our_video(model, moments[0], frame_tiling=None)[None], pixels[None])
    assert relative_error(our_video(model, moments[0]), pixels) > 0.1


@pytest.mark.parametrize(
    ("name", "variant", "way", "shape"),
    [
        pytest.param("CogVideoX", "small", "encode", (2, 3, 9, 6, 10), marks=pytest.mark.slow),
        ("CogVideoX", "small", "decode", (2, 4, 3, 3, 5)),
        ("HunyuanVideo", "tiny", "decode", (1, 3, 3, 2, 3)),
        pytest.param("Wan", "2.1", "encode", (1, 3, 5, 32, 32), marks=pytest.mark.slow),
        ("Wan", "2.2", "decode", (1, 4, 2, 2, 3)),
    ],
)
def test_in_bfloat16_it_is_as_near_to_float32_as_diffusers(name, variant, way, shape):
    ours, theirs = bfloat16_errors(
        lambda seed: new_pair(name, variant, seed, torch.bfloat16),
        lambda seed: (np.asarray(jnp.bfloat16(normal(*shape, seed=seed)), np.float32),),
        reference_video if way == "decode" else reference_moments,
        our_video if way == "decode" else our_moments,
    )
    print(f"{name} {way}: ours {ours:.3e}, diffusers {theirs:.3e}, ratio {ours / theirs:.3f}")
    assert ours < 1.1 * theirs


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("CogVideoX", "small"),
        ("HunyuanVideo", "tiny"),
        ("HunyuanVideo", "other"),
        ("Wan", "2.1"),
        ("Wan", "2.2"),
    ],
)
def test_the_way_back_gives_every_tensor_bit_for_bit(name, variant):
    reference, model = pair(name, variant)
    tensors = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    table = FAMILIES[name].rules(model.config)
    restored = restore_state(convert_state(tensors, table), table)
    assert restored.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert restored[key].tobytes() == tensor.tobytes(), key
        assert restored[key].shape == tensor.shape
