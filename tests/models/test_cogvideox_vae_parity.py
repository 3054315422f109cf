"""CogVideoX's video autoencoder against the released code, on random weights."""

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
from svg_jax.convert.tables import cogvideox_vae
from svg_jax.models import CogVideoXVAE, CogVideoXVAEConfig


def variant(*widths, **values):
    blocks = {
        f"{way}_block_types": (f"CogVideoX{way.title()}Block3D",) * len(widths)
        for way in ("down", "up")
    }
    return {
        "block_out_channels": widths,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "norm_eps": 1e-3,
        **blocks,
        **values,
    }


RELEASED = variant(8, 12, 12, 16)
SMALL = variant(
    8, 12, layers_per_block=2, norm_num_groups=2, temporal_compression_ratio=2, out_channels=5
)
STILL = variant(4, 12, in_channels=2, temporal_compression_ratio=1, latent_channels=3)
# Tiles of 6 x 5 latents, the least that overlap by a sixth and a fifth.
TILED = {**SMALL, "sample_height": 24, "sample_width": 20}


@pytest.fixture(autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def pair(values, seed, dtype=torch.float32):
    reference = randomised(diffusers.AutoencoderKLCogVideoX(**values), seed, dtype)
    config = CogVideoXVAEConfig.from_dict(dict(reference.config))
    our_dtype = jnp.dtype(str(dtype).removeprefix("torch."))
    model = ported(
        lambda: CogVideoXVAE(config, dtype=our_dtype, param_dtype=our_dtype, rngs=nnx.Rngs(0)),
        cogvideox_vae.rules(config),
        reference,
    )
    return reference, model


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def reference_moments(reference, video):
    with torch.no_grad():
        posterior = reference.encode(torch.tensor(video, dtype=reference.dtype)).latent_dist
    return posterior.mean.float().numpy(), posterior.logvar.float().numpy()


def reference_video(reference, latents):
    with torch.no_grad():
        return reference.decode(torch.tensor(latents, dtype=reference.dtype)).sample.float().numpy()


def as_float32(x):
    return np.asarray(x.astype(jnp.float32))


@pytest.mark.parametrize(
    ("values", "size"),
    [
        (RELEASED, (1, 3, 2)),
        pytest.param(RELEASED, (5, 2, 3), marks=pytest.mark.slow),
        pytest.param(SMALL, (2, 3, 5), marks=pytest.mark.slow),
        pytest.param(SMALL, (3, 1, 4), marks=pytest.mark.slow),
        (SMALL, (6, 4, 2)),
        (STILL, (5, 2, 3)),
    ],
)
def test_it_decodes_as_diffusers(values, size):
    reference, model = pair(values, seed=0)
    latents = normal(1, 2, model.config.latent_channels, *size)
    theirs = reference_video(reference, latents)
    ours = model.decode(jnp.asarray(latents))
    assert ours.shape == theirs.shape
    error = relative_error(as_float32(ours), theirs)
    print(f"decode {size}: {error:.2e}")
    assert error < TOLERANCE


@pytest.mark.parametrize(
    ("values", "size"),
    [
        (RELEASED, (1, 24, 16)),
        pytest.param(RELEASED, (17, 16, 24), marks=pytest.mark.slow),
        pytest.param(SMALL, (2, 6, 10), marks=pytest.mark.slow),
        pytest.param(SMALL, (8, 2, 8), marks=pytest.mark.slow),
        pytest.param(SMALL, (13, 4, 6), marks=pytest.mark.slow),
        (SMALL, (22, 6, 4)),
        (STILL, (9, 4, 6)),
    ],
)
def test_it_encodes_as_diffusers(values, size):
    reference, model = pair(values, seed=2)
    video = normal(3, 2, model.config.in_channels, *size)
    ours = model.encode(jnp.asarray(video))
    for our_moment, their_moment in zip(ours, reference_moments(reference, video), strict=True):
        assert our_moment.shape == their_moment.shape
        error = relative_error(as_float32(our_moment), their_moment)
        print(f"encode {size}: {error:.2e}")
        assert error < TOLERANCE


def test_in_tiles_it_equals_diffusers():
    reference, model = pair(TILED, seed=4)
    reference.enable_tiling()
    tiling = model.config.tiling
    video = normal(5, 2, 3, 3, 10, 16)  # two tiles side by side
    theirs, _ = reference_moments(reference, video)
    ours = model.encode(jnp.asarray(video), tiling=tiling)
    errors = [relative_error(as_float32(ours.mean), theirs)]

    latents = normal(6, 2, 4, 3, 7, 4)  # and one upon the other
    ours = model.decode(jnp.asarray(latents), tiling=tiling)
    errors.append(relative_error(as_float32(ours), reference_video(reference, latents)))
    print(f"tiled: {errors}")
    assert max(errors) < TOLERANCE


@pytest.mark.parametrize("way", slow_but(["decode"], ["encode", "decode"]))
def test_in_bfloat16_it_is_as_near_to_float32_as_diffusers(way):
    def run_reference(reference, x):
        return reference_video(reference, x) if way == "decode" else np.concatenate(
            reference_moments(reference, x)
        )  # fmt: skip

    def run_ours(model, x):
        out = getattr(model, way)(jnp.asarray(x))
        return as_float32(out if way == "decode" else jnp.concatenate(out))

    shape = (2, 4, 3, 3, 5) if way == "decode" else (2, 3, 9, 6, 10)
    ours, theirs = bfloat16_errors(
        lambda seed: pair(SMALL, seed, torch.bfloat16),
        lambda seed: (np.asarray(jnp.bfloat16(normal(seed, *shape)), np.float32),),
        run_reference,
        run_ours,
    )
    print(f"{way}: ours {ours:.3e}, diffusers {theirs:.3e}, ratio {ours / theirs:.3f}")
    assert ours < 1.1 * theirs


def test_the_way_back_gives_every_tensor_bit_for_bit():
    reference = randomised(diffusers.AutoencoderKLCogVideoX(**SMALL), seed=0)
    rules = cogvideox_vae.rules(CogVideoXVAEConfig.from_dict(dict(reference.config)))
    stored = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    back = restore_state(convert_state(stored, rules), rules)
    assert back.keys() == stored.keys()
    for name, tensor in stored.items():
        np.testing.assert_array_equal(back[name], tensor)
