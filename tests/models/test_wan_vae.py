"""What the Wan VAEs promise beside their numbers: causality, cost, gradients, refusals."""

import dataclasses
import json
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from svg_jax.models import WanVAE, WanVAEConfig
from svg_jax.models.vae_tiling import Tiling

WAN_21 = WanVAEConfig(
    base_dim=4,
    z_dim=2,
    dim_mult=(1, 1, 2, 2),
    num_res_blocks=1,
    latents_mean=(0.5, -1.0),
    latents_std=(2.0, 0.25),
)
WAN_22 = dataclasses.replace(
    WAN_21,
    decoder_base_dim=6,
    is_residual=True,
    in_channels=12,
    out_channels=12,
    patch_size=2,
    scale_factor_spatial=16,
)


@cache
def make_vae(config=WAN_21, **dtypes):
    """A model with random parameters."""
    rng = np.random.default_rng(0)
    vae = nnx.eval_shape(lambda: WanVAE(config, **dtypes, rngs=nnx.Rngs(0)))

    def random(path, leaf):
        gain = "scale" in jax.tree_util.keystr(path)
        width = 0.3 if leaf.ndim == 1 else np.prod(leaf.shape[:-1]) ** -0.5
        return jnp.asarray(gain + width * rng.standard_normal(leaf.shape), leaf.dtype)

    nnx.update(vae, jax.tree.map_with_path(random, nnx.state(vae)))
    return vae


def normal(*shape):
    return jax.random.normal(jax.random.key(1), shape)


def test_a_frame_changes_itself_and_later_ones_alone():
    vae, video, latents = make_vae(), normal(1, 3, 9, 8, 8), normal(1, 2, 3, 1, 1)
    mean, changed = (vae.encode(x).mean for x in (video, video.at[:, :, 5].add(1)))
    np.testing.assert_array_equal(changed[:, :, :2], mean[:, :, :2])
    assert jnp.abs(changed - mean)[:, :, 2].max() > 1e-3
    decoded, changed = (vae.decode(x) for x in (latents, latents.at[:, :, 1].add(1)))
    np.testing.assert_array_equal(changed[:, :, :1], decoded[:, :, :1])
    assert (jnp.abs(changed - decoded)[:, :, 1:].max((0, 1, 3, 4)) > 1e-3).all()


def test_what_is_compiled_does_not_grow_with_the_video():
    vae = make_vae()

    def equations(frames):
        decoder = jax.make_jaxpr(vae.decode)(jnp.zeros((1, 2, 1 + frames, 1, 1)))
        encoder = jax.make_jaxpr(vae.encode)(jnp.zeros((1, 3, 1 + 4 * frames, 8, 8)))
        return str(decoder).count("\n"), str(encoder).count("\n")

    assert equations(2) == equations(20)


def test_gradients_reach_every_parameter():
    sizes = {"dim_mult": (2, 2), "temperal_downsample": (True,)}
    factors = {"scale_factor_temporal": 2, "scale_factor_spatial": 4}
    config = dataclasses.replace(WAN_22, **sizes, **factors)
    graph, params = nnx.split(make_vae(config), nnx.Param)
    video = normal(1, 3, 3, 8, 8)

    def loss(params):
        vae = nnx.merge(graph, params)
        posterior = vae.encode(video)
        decoded = vae.decode(posterior.sample(jnp.ones_like(posterior.mean)))
        return jnp.mean((decoded - video) ** 2)

    for path, leaf in jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(params)):
        assert jnp.isfinite(leaf).all(), path
        assert jnp.abs(leaf).max() > 0, path


def test_black_pixels_of_an_encoder_without_biases_give_no_nan():
    vae = nnx.clone(make_vae())
    state = nnx.state(vae.encoder)
    nnx.update(vae.encoder, jax.tree.map(lambda x: x if x.ndim > 1 else jnp.zeros_like(x), state))
    assert jnp.isfinite(vae.encode(jnp.zeros((1, 3, 5, 8, 8))).mean).all()


def test_one_tile_is_the_whole():
    vae, video, latents = make_vae(), normal(1, 3, 1, 16, 26), normal(1, 2, 1, 2, 3)
    calls, tiling = [], Tiling(32, 32, 24, 24)
    tiled = vae.encode(video, tiling=tiling, progress=lambda *done: calls.append(done))
    np.testing.assert_array_equal(tiled.mean, vae.encode(video).mean)
    np.testing.assert_array_equal(vae.decode(latents, tiling=tiling), vae.decode(latents))
    assert calls == [(1, 1)]


def test_normalized_latents_have_mean_0_and_deviation_1():
    vae = make_vae()
    latents = normal(2, 2, 30, 10, 10) * jnp.array([2.0, 0.25]).reshape(1, 2, 1, 1, 1)
    latents += jnp.array([0.5, -1.0]).reshape(1, 2, 1, 1, 1)
    normalized = vae.normalize(latents)
    np.testing.assert_allclose(normalized.mean((0, 2, 3, 4)), 0, atol=0.05)
    np.testing.assert_allclose(normalized.std((0, 2, 3, 4)), 1, atol=0.05)
    np.testing.assert_allclose(vae.denormalize(normalized), latents, atol=1e-6)


def test_stored_and_computed_dtypes_may_differ():
    vae = make_vae(dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(vae))} == {jnp.dtype(jnp.float32)}
    posterior = jax.eval_shape(vae.encode, normal(1, 3, 5, 8, 8))
    assert posterior.mean.dtype == posterior.log_variance.dtype == jnp.bfloat16
    assert jax.eval_shape(vae.decode, normal(1, 2, 2, 1, 1)).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("config", "size", "message"),
    [
        (WAN_21, (3, 0, 8, 8), "num_frames=0 must be one more than a multiple of 4"),
        (WAN_21, (3, 4, 8, 8), "num_frames=4"),
        (WAN_21, (3, 7, 8, 8), "num_frames=7"),
        (WAN_21, (3, 5, 7, 8), "height=7 must be at least 8"),
        (WAN_21, (3, 5, 8, 1), "width=1"),
        (WAN_21, (1, 5, 8, 8), "1 channels and the model takes 3"),
        (WAN_22, (3, 5, 24, 16), "height=24 must be at least 16 and a multiple of 16"),
        (WAN_22, (12, 5, 16, 16), "12 channels and the model takes 3"),
    ],
)
def test_videos_that_it_cannot_take_are_refused(config, size, message):
    with pytest.raises(ValueError, match=message):
        make_vae(config).encode(jnp.zeros((1, *size)))


@pytest.mark.parametrize("size", [(3, 1, 1, 1), (2, 0, 1, 1), (2, 1, 1, 0)])
def test_latents_of_another_model_are_refused(size):
    with pytest.raises(ValueError, match=r"latents are \[1, .* must be \[batch, 2, latent frames"):
        make_vae().decode(jnp.zeros((1, *size)))


@pytest.mark.parametrize(
    ("size", "tiling", "message"),
    [
        ((53, 32), Tiling(32, 32, 24, 24), "53x32 video leaves 5 pixels .* needs 8"),
        ((64, 64), Tiling(32, 36, 24, 24), "must be a multiple of a latent's 8 pixels"),
    ],
)
def test_tiles_that_it_cannot_take_are_refused(size, tiling, message):
    with pytest.raises(ValueError, match=message):
        make_vae().encode(jnp.zeros((1, 3, 1, *size)), tiling=tiling)


def test_a_config_survives_the_way_to_json_and_back():
    text = json.dumps({**WAN_22.to_dict(), "_class_name": "AutoencoderKLWan"})
    assert WanVAEConfig.from_dict(json.loads(text)) == WAN_22


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"clip_output": True}, r"unknown keys \['clip_output'\]"),
        ({"z_dim": 16.5}, "z_dim cannot be 16.5"),
        ({"dim_mult": [1, 2, 0, 4]}, "dim_mult must be at least 1"),
        ({"attn_scales": [0.5]}, r"attn_scales=\(0.5,\) is not implemented"),
        ({"temperal_downsample": [True, True]}, "has 2 steps and the 4 sizes of dim_mult have 3"),
        ({"z_dim": 8}, "latents_mean has 16 values for 8 channels"),
        ({"latents_std": [1.0]}, "latents_std has 1 values for 16 channels"),
        ({"scale_factor_temporal": 8}, "scale_factor_temporal=8 .* make it 4"),
        ({"scale_factor_spatial": 16}, "scale_factor_spatial=16 .* make it 8"),
        ({"patch_size": 2, "scale_factor_spatial": 16}, "in_channels=3 must be a multiple"),
    ],
)
def test_a_config_of_another_model_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        WanVAEConfig.from_dict(values)


def test_shortcuts_between_widths_that_do_not_fit_are_refused():
    config = dataclasses.replace(WAN_22, dim_mult=(1, 3, 5, 7))
    with pytest.raises(ValueError, match="shortcut of 12 to 32 features"):
        nnx.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0)))
