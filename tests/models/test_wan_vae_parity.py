"""The Wan VAEs against the released code, on random weights."""

from functools import cache

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from parity import TOLERANCE, bfloat16_errors, ported, randomised, relative_error

from svg_jax.convert import convert_state, restore_state
from svg_jax.convert.tables import wan_vae
from svg_jax.models import WanVAE, WanVAEConfig
from svg_jax.models.vae_tiling import Tiling

WAN_21 = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2, 3, 3],
    "num_res_blocks": 1,
    "latents_mean": [-0.5, 0.25, 1.5, 0.1],
    "latents_std": [2.5, 0.5, 1.25, 1.0],
}
WAN_22 = {
    **WAN_21,
    "base_dim": 4,
    "decoder_base_dim": 6,
    "dim_mult": [1, 2, 4, 4],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}
OTHER = {  # neither's sizes
    **WAN_21,
    "dim_mult": [2, 1],
    "temperal_downsample": [True],
    "scale_factor_temporal": 2,
    "scale_factor_spatial": 2,
}
RELEASED = {"2.1": WAN_21, "2.2": WAN_22}
VARIANTS = {**RELEASED, "other": OTHER}


@pytest.fixture(autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


@cache
def pair(name, seed=0, dtype=torch.float32):
    reference = randomised(diffusers.AutoencoderKLWan(**VARIANTS[name]), seed, dtype)
    config = WanVAEConfig.from_dict(dict(reference.config))
    our_dtype = jnp.dtype(str(dtype).removeprefix("torch."))
    vae = ported(
        lambda: WanVAE(config, dtype=our_dtype, param_dtype=our_dtype, rngs=nnx.Rngs(0)),
        wan_vae.rules(config),
        reference,
    )
    return reference, vae


def normal(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@torch.no_grad()
def reference_decode(reference, latents):
    dtype = reference.dtype
    return reference.decode(torch.tensor(latents, dtype=dtype)).sample.float().numpy()


@torch.no_grad()
def reference_encode(reference, video):
    posterior = reference.encode(torch.tensor(video, dtype=reference.dtype)).latent_dist
    return posterior.mean.float().numpy(), posterior.logvar.float().numpy()


@pytest.mark.parametrize(
    ("name", "frames"),
    [
        pytest.param("2.1", 1, marks=pytest.mark.slow),
        ("2.1", 4),
        ("2.2", 1),
        pytest.param("2.2", 4, marks=pytest.mark.slow),
        ("other", 3),
    ],
)
def test_decoding_equals_diffusers(name, frames):
    reference, vae = pair(name)
    latents = normal(2, 4, frames, 2, 3)
    theirs = reference_decode(reference, latents)
    ours = vae.decode(jnp.asarray(latents))
    error = relative_error(ours, theirs)
    print(f"{name}, {frames} latent frames: {error:.2e}")
    assert np.mean(np.abs(theirs) == 1) < 0.5
    assert error < TOLERANCE


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("2.1", (1, 8, 13)),
        ("2.1", (13, 19, 31)),
        ("2.2", (9, 16, 48)),
        ("other", (5, 2, 3)),
    ],
)
def test_encoding_equals_diffusers(name, size):
    reference, vae = pair(name)
    video = normal(2, 3, *size)
    theirs = reference_encode(reference, video)
    ours = vae.encode(jnp.asarray(video))
    assert ours.mean.shape == theirs[0].shape
    for a, b in zip(ours, theirs, strict=True):
        error = relative_error(a, b)
        print(f"{name}, {size}: {error:.2e}")
        assert error < TOLERANCE


# Few tiles of unlike sizes. Those of 2.2's encoder have twice as many pixels as they say: one would
# be enough here, but the released one cuts whatever has more than they say.
@pytest.mark.parametrize(
    ("name", "size", "tiles"), [("2.1", (5, 43, 19), (32, 24)), ("2.2", (5, 80, 32), (48, 32))]
)
def test_tiles_equal_those_of_diffusers(name, size, tiles):
    reference, vae = pair(name)
    tile, stride = tiles
    tiling = Tiling(tile, tile, stride, stride)
    reference.enable_tiling(tile, tile, stride, stride)
    video = normal(1, 3, *size)
    theirs = reference_encode(reference, video)
    ours = vae.encode(jnp.asarray(video), tiling=tiling)
    for a, b in zip(ours, theirs, strict=True):
        error = relative_error(a, b)
        print(f"{name}, {size} encoded: {error:.2e}")
        assert error < TOLERANCE
    latents = normal(*theirs[0].shape)
    theirs = reference_decode(reference, latents)
    error = relative_error(vae.decode(jnp.asarray(latents), tiling=tiling), theirs)
    reference.use_tiling = False
    print(f"{name}, {size} decoded: {error:.2e}")
    assert error < TOLERANCE


@pytest.mark.parametrize(
    ("name", "way"), [pytest.param("2.1", "encode", marks=pytest.mark.slow), ("2.2", "decode")]
)
def test_in_bfloat16_it_is_as_near_to_float32_as_diffusers(name, way):
    def make_inputs(seed):
        x = (
            normal(1, 3, 5, 32, 32, seed=seed)
            if way == "encode"
            else normal(1, 4, 2, 2, 3, seed=seed)
        )
        return (np.asarray(jnp.bfloat16(x), np.float32),)

    def run_reference(reference, x):
        return (
            reference_encode(reference, x)[0] if way == "encode" else reference_decode(reference, x)
        )

    def run_ours(vae, x):
        out = getattr(vae, way)(jnp.asarray(x))
        out = out.mean if way == "encode" else out
        assert out.dtype == jnp.bfloat16
        return np.asarray(out.astype(jnp.float32))

    ours, theirs = bfloat16_errors(
        lambda seed: pair.__wrapped__(name, seed, torch.bfloat16),
        make_inputs,
        run_reference,
        run_ours,
    )
    print(f"{name} {way}: ours {ours:.3e}, diffusers {theirs:.3e}, ratio {ours / theirs:.3f}")
    assert ours < 1.1 * theirs


@pytest.mark.parametrize("name", RELEASED)
def test_the_way_back_gives_every_tensor_bit_for_bit(name):
    reference, vae = pair(name)
    tensors = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    table = wan_vae.rules(vae.config)
    restored = restore_state(convert_state(tensors, table), table)
    assert restored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert restored[name].tobytes() == tensor.tobytes(), name
        assert restored[name].shape == tensor.shape
