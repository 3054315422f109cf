"""HunyuanVideo's video autoencoder against the released code, on random weights."""

from functools import cache

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
from svg_jax.convert.tables import hunyuan_video_vae
from svg_jax.models import HunyuanVideoVAE, HunyuanVideoVAEConfig, Tiling

# Groups of several channels: those of one are small enough to have next to no variance, and then
# float32 is 1e-5 away from float64 in both libraries.
TINY = {
    "latent_channels": 3,
    "block_out_channels": (8, 8, 12),
    "down_block_types": ("HunyuanVideoDownBlock3D",) * 3,
    "up_block_types": ("HunyuanVideoUpBlock3D",) * 3,
    "layers_per_block": 1,
    "norm_num_groups": 2,
}
OTHER = {
    "in_channels": 2,
    "out_channels": 4,
    "latent_channels": 2,
    "block_out_channels": (4, 4, 8, 6),
    "layers_per_block": 2,
    "norm_num_groups": 2,
    "mid_block_add_attention": False,
}
TILING = Tiling(tile_height=32, tile_width=40, stride_height=24, stride_width=24)


@pytest.fixture(autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


@cache
def pair(other=False, seed=0, dtype=torch.float32):
    reference = randomised(
        diffusers.AutoencoderKLHunyuanVideo(**(OTHER if other else TINY)), seed, dtype
    )
    config = HunyuanVideoVAEConfig.from_dict(dict(reference.config))
    our_dtype = jnp.dtype(str(dtype).removeprefix("torch."))
    model = ported(
        lambda: HunyuanVideoVAE(config, dtype=our_dtype, param_dtype=our_dtype, rngs=nnx.Rngs(0)),
        hunyuan_video_vae.rules(config),
        reference,
    )
    return reference, model


def set_tiling(reference, tiled, whole=False):
    reference.use_framewise_encoding = reference.use_framewise_decoding = not whole
    reference.use_tiling = tiled
    if tiled:
        reference.enable_tiling(
            TILING.tile_height,
            TILING.tile_width,
            tile_sample_stride_height=TILING.stride_height,
            tile_sample_stride_width=TILING.stride_width,
        )


def encode_both(reference, model, video, **tiling):
    """Means and logarithms of variances, ours and the reference's."""
    with torch.no_grad():
        theirs = reference.encode(torch.tensor(video, dtype=reference.dtype)).latent_dist
    ours = model.encode(jnp.asarray(video), **tiling)
    return [
        [np.asarray(x, np.float32) for x in (ours.mean, ours.log_variance)],
        [x.float().numpy() for x in (theirs.mean, theirs.logvar)],
    ]


def decode_both(reference, model, latents, **tiling):
    with torch.no_grad():
        theirs = reference.decode(torch.tensor(latents, dtype=reference.dtype)).sample
    ours = model.decode(jnp.asarray(latents), **tiling)
    return np.asarray(ours, np.float32), theirs.float().numpy()


def noise(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


# Less than a tile, and tiles the last of which has one, two, three or four latent frames.
@pytest.mark.parametrize("frames", slow_but([4, 33], [1, 4, 20, 28, 33]))
def test_encoding_equals_diffusers(frames):
    reference, model = pair()
    set_tiling(reference, tiled=False)
    pairs = zip(*encode_both(reference, model, noise(2, 3, frames, 16, 24)), strict=True)
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape
        error = relative_error(ours, theirs)
        print(f"{frames}: {error:.2e}")
        assert error < TOLERANCE


@pytest.mark.parametrize("frames", slow_but([1, 9], [1, 4, 5, 7, 9]))
def test_decoding_equals_diffusers(frames):
    reference, model = pair()
    set_tiling(reference, tiled=False)
    ours, theirs = decode_both(reference, model, noise(2, 3, frames, 2, 3))
    assert ours.shape == theirs.shape
    error = relative_error(ours, theirs)
    print(f"{frames}: {error:.2e}")
    assert error < TOLERANCE


def test_tiles_in_space_and_time_equal_those_of_diffusers():
    reference, model = pair()
    set_tiling(reference, tiled=True)
    (ours, _), (theirs, _) = encode_both(reference, model, noise(1, 3, 20, 56, 24), tiling=TILING)
    pixels, their_pixels = decode_both(reference, model, noise(1, 3, 5, 7, 5), tiling=TILING)
    assert pixels.shape == (1, 3, 17, 56, 40)
    errors = relative_error(ours, theirs), relative_error(pixels, their_pixels)
    print(f"{errors[0]:.2e}, {errors[1]:.2e}")
    assert max(errors) < TOLERANCE


def test_without_tiles_in_time_it_equals_diffusers_without_them():
    reference, model = pair()
    set_tiling(reference, tiled=False, whole=True)
    (ours, _), (theirs, _) = encode_both(
        reference, model, noise(1, 3, 33, 16, 24), frame_tiling=None
    )
    assert relative_error(ours, theirs) < TOLERANCE
    ours, theirs = decode_both(reference, model, theirs, frame_tiling=None)
    assert relative_error(ours, theirs) < TOLERANCE
    tiled, _ = decode_both(reference, model, noise(1, 3, 9, 2, 3))
    assert relative_error(tiled, theirs) > 0.1


def test_another_config_equals_diffusers():
    reference, model = pair(other=True)
    (ours, _), (theirs, _) = encode_both(reference, model, noise(2, 2, 9, 16, 24))
    assert relative_error(ours, theirs) < TOLERANCE
    ours, theirs = decode_both(reference, model, theirs)
    assert ours.shape == (2, 4, 9, 16, 24)
    assert relative_error(ours, theirs) < TOLERANCE


def test_in_bfloat16_it_is_as_near_to_float32_as_diffusers():
    def make_inputs(seed):
        return (np.asarray(jnp.bfloat16(noise(1, 3, 3, 2, 3, seed=seed)), np.float32),)

    def run_reference(reference, latents):
        with torch.no_grad():
            sample = reference.decode(torch.tensor(latents, dtype=reference.dtype)).sample
        return sample.float().numpy()

    def run_ours(model, latents):
        video = model.decode(jnp.asarray(latents))
        assert video.dtype == jnp.bfloat16
        return np.asarray(video, np.float32)

    ours, theirs = bfloat16_errors(
        lambda seed: pair(seed=seed, dtype=torch.bfloat16), make_inputs, run_reference, run_ours
    )
    print(f"ours {ours:.3e}, diffusers {theirs:.3e}, ratio {ours / theirs:.3f}")
    assert ours < 1.1 * theirs


def test_the_way_back_gives_every_tensor_bit_for_bit():
    for other in (False, True):
        reference, _ = pair(other)
        tensors = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
        table = hunyuan_video_vae.rules(HunyuanVideoVAEConfig.from_dict(dict(reference.config)))
        restored = restore_state(convert_state(tensors, table), table)
        assert restored.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert restored[name].tobytes() == tensor.tobytes(), name
            assert restored[name].shape == tensor.shape
