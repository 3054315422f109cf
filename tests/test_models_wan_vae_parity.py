"""The Wan VAEs against the released code, on random weights."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from parity import TOLERANCE, ported, randomised, relative_error

from svg_jax.convert import wan_vae
from svg_jax.models.wan_vae import WanVAE
from svg_jax.models.wan_vae_config import WanVAEConfig

WAN_21 = {
    "base_dim": 6,
    "z_dim": 4,
    "dim_mult": [1, 2, 3, 3],
    "num_res_blocks": 2,
    "latents_mean": [-0.5, 0.25, 1.5, 0.1],
    "latents_std": [2.5, 0.5, 1.25, 1.0],
}


@pytest.fixture(autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def pair(variant, seed, dtype=torch.float32):
    reference = randomised(diffusers.AutoencoderKLWan(**variant), seed, dtype)
    config = WanVAEConfig.from_dict(dict(reference.config))
    our_dtype = jnp.dtype(str(dtype).removeprefix("torch."))
    vae = ported(
        lambda: WanVAE(config, dtype=our_dtype, param_dtype=our_dtype, rngs=nnx.Rngs(0)),
        wan_vae.rules(config),
        reference,
    )
    return reference, vae


@nnx.jit
def decode(vae, latents):
    return vae.decode(latents)


@pytest.mark.parametrize("size", [(1, 2, 3), (2, 3, 2), (4, 1, 1)])
def test_decoding(size):
    reference, vae = pair(WAN_21, 0)
    latents = np.random.default_rng(0).standard_normal((2, 4, *size)).astype(np.float32)
    with torch.no_grad():
        theirs = reference.decode(torch.tensor(latents)).sample.numpy()
    ours = decode(vae, latents)
    print(f"{size}: {relative_error(ours, theirs):.2e}, {np.mean(np.abs(theirs) == 1)} clamped")
    assert relative_error(ours, theirs) < TOLERANCE
