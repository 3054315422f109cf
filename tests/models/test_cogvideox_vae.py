"""What CogVideoX's video autoencoder promises beside its numbers."""

import dataclasses
import json
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from svg_jax.models import CogVideoXVAE, CogVideoXVAEConfig, cogvideox_vae_layers
from svg_jax.models.cogvideox_vae_layers import Upsample, causal_conv, conv3d
from svg_jax.models.vae_tiling import Tiling

CONFIG = CogVideoXVAEConfig(
    down_block_types=("CogVideoXDownBlock3D",) * 2,
    up_block_types=("CogVideoXUpBlock3D",) * 2,
    block_out_channels=(8, 16),
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=4,
    temporal_compression_ratio=2,
    sample_height=24,
    sample_width=20,
)


def filled(make):
    """The module with random parameters, without the time that its own initializers compile."""
    graph, state = nnx.split(nnx.eval_shape(make))
    rng = np.random.default_rng(0)
    values = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), state)
    return nnx.merge(graph, values)


@cache
def make_vae(**kinds):
    return filled(lambda: CogVideoXVAE(CONFIG, rngs=nnx.Rngs(0), **kinds))


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def test_frames_do_not_depend_on_later_chunks():
    vae, latents = make_vae(), normal(0, 1, 4, 7, 3, 2)
    video, other = vae.decode(latents), vae.decode(latents.at[:, :, 5:].set(0))
    assert video.shape == (1, 3, 13, 6, 4)
    np.testing.assert_array_equal(video[:, :, :9], other[:, :, :9])
    assert jnp.abs(video - other)[:, :, 9:].max() > 1e-2


def test_longer_videos_take_no_longer_to_compile():
    vae = make_vae()
    for run, short, long in (
        (vae.decode, (1, 4, 5, 3, 2), (1, 4, 21, 3, 2)),
        (vae.encode, (1, 3, 17, 6, 4), (1, 3, 81, 6, 4)),
    ):
        few, many = (
            str(jax.make_jaxpr(run)(jnp.zeros(shape))).count("conv_general_dilated[")
            for shape in (short, long)
        )
        assert few == many > 0


def test_convolutions_of_too_many_elements_are_computed_by_frames(monkeypatch):
    kinds = {"dtype": jnp.float64, "param_dtype": jnp.float64}
    with jax.enable_x64(True):  # where sums of another order round apart by far less than the bound
        x, past = normal(1, 2, 6, 5, 4, 8), normal(2, 2, 2, 5, 4, 8)
        conv = filled(lambda: conv3d(8, 3, **kinds, rngs=nnx.Rngs(0)))
        upsample = filled(lambda: Upsample(8, frames=True, **kinds, rngs=nnx.Rngs(0)))
        whole = (*causal_conv(conv, x, past), upsample(x))
        for frames in (3, 1):  # at once
            monkeypatch.setattr(cogvideox_vae_layers, "_MOST_ELEMENTS", 3 * frames * x[:, 0].size)
            jaxpr = str(jax.make_jaxpr(lambda x: causal_conv(conv, x, past))(x))
            assert "scan" in jaxpr
            parts = (*causal_conv(conv, x, past), upsample(x))
            for ours, expected in zip(parts, whole, strict=True):
                assert ours.dtype == jnp.float64
                np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_gradients_reach_every_parameter():
    graph, params = nnx.split(make_vae(), nnx.Param)
    video = normal(3, 2, 3, 4, 6, 4)

    @jax.jit
    @jax.grad
    def gradient(params):
        vae = nnx.merge(graph, params)
        posterior = vae.encode(video)
        latents = posterior.sample(normal(4, *posterior.mean.shape))
        return jnp.sum(vae.decode(latents) * video)

    for path, leaf in jax.tree.leaves_with_path(gradient(params)):
        assert jnp.isfinite(leaf).all(), path
        assert jnp.abs(leaf).max() > 1e-6, path


def test_results_have_the_dtype_of_the_computation():
    vae = make_vae(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(vae))} == {jnp.dtype(jnp.bfloat16)}
    latents = vae.encode(normal(5, 1, 3, 3, 6, 4)).mean
    assert latents.dtype == jnp.bfloat16
    assert vae.decode(latents.astype(jnp.float32)).dtype == jnp.bfloat16


def test_latents_are_scaled_as_the_pipelines_do():
    vae, latents = make_vae(), normal(6, 2, 4, 1, 3, 3)
    np.testing.assert_allclose(vae.normalize(latents), latents * 1.15258426, rtol=1e-6)
    np.testing.assert_allclose(vae.denormalize(latents), latents / 1.15258426, rtol=1e-6)
    np.testing.assert_array_equal(vae.normalize_image(latents), vae.normalize(latents))
    config = dataclasses.replace(CONFIG, scaling_factor=0.7, invert_scale_latents=True)
    newer = nnx.eval_shape(lambda: CogVideoXVAE(config, rngs=nnx.Rngs(0)))
    np.testing.assert_allclose(newer.normalize(latents), latents * 0.7, rtol=1e-6)
    np.testing.assert_allclose(newer.normalize_image(latents), latents / 0.7, rtol=1e-6)
    rounded = newer.denormalize(latents.astype(jnp.bfloat16))  # once: 0.7 is no bfloat16
    expected = latents.astype(jnp.bfloat16).astype(jnp.float32) / 0.7
    np.testing.assert_array_equal(rounded, expected.astype(jnp.bfloat16))


def test_tiles_are_those_of_the_released_code():
    assert CogVideoXVAEConfig().tiling == Tiling(240, 360, 200, 288)
    told, latents = [], normal(7, 1, 4, 1, 7, 4)
    video = make_vae().decode(
        latents, tiling=CONFIG.tiling, progress=lambda *done: told.append(done)
    )
    assert video.shape == (1, 3, 1, 14, 8)
    assert jnp.abs(video - make_vae().decode(latents)).max() > 1e-2
    assert told == [(1, 2), (2, 2)]


@pytest.mark.parametrize("sample", [{"sample_height": 32}, {"sample_width": 24}])
def test_tiles_that_overlap_by_parts_of_latents_are_refused(sample):
    tiling = dataclasses.replace(CONFIG, **sample).tiling
    with pytest.raises(ValueError, match="every size must be a multiple of a latent's 2 pixels"):
        make_vae().decode(jnp.zeros((1, 4, 1, 9, 9)), tiling=tiling)


@pytest.mark.parametrize(
    ("way", "shape", "message"),
    [
        ("encode", (1, 4, 5, 6, 4), "video has 4 channels and the model takes 3"),
        ("encode", (1, 3, 5, 7, 4), "height=7 must be a multiple of a latent's 2 pixels"),
        ("encode", (1, 3, 5, 6, 3), "width=3 must be a multiple"),
        ("encode", (1, 3, 0, 6, 4), "video is empty"),
        ("decode", (1, 3, 5, 6, 4), "latents has 3 channels and the model takes 4"),
        ("decode", (1, 4, 5, 0, 4), r"latents is empty: its shape is \[1, 4, 5, 0, 4\]"),
    ],
)
def test_what_the_model_cannot_take_is_refused(way, shape, message):
    with pytest.raises(ValueError, match=message):
        getattr(make_vae(), way)(jnp.zeros(shape))


def test_a_config_survives_the_way_to_json_and_back():
    text = json.dumps({**CONFIG.to_dict(), "_class_name": "AutoencoderKLCogVideoX"})
    assert CogVideoXVAEConfig.from_dict(json.loads(text)) == CONFIG


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sample_size": 256}, r"unknown keys \['sample_size'\]"),
        ({"block_out_channels": 128}, "block_out_channels cannot be 128"),
        ({"norm_num_groups": 0}, "norm_num_groups must be at least 1"),
        ({"act_fn": "gelu"}, "act_fn='gelu' is not implemented"),
        ({"use_quant_conv": True}, "use_quant_conv=True is not implemented"),
        ({"shift_factor": 0.1}, "shift_factor=0.1 is not implemented"),
        ({"block_out_channels": [128, 256]}, "down_block_types must be .* of the 2 block_out"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 4}, "up_block_types must be"),
        ({"norm_num_groups": 48}, "multiples of norm_num_groups=48"),
        ({"temporal_compression_ratio": 3}, r"must be one of \[1, 2, 4, 8\]"),
        ({"temporal_compression_ratio": 16}, "each of 4 blocks but one"),
        ({"scaling_factor": 0}, "scaling_factor must not be 0"),
    ],
)
def test_a_config_of_another_model_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        CogVideoXVAEConfig.from_dict(values)
