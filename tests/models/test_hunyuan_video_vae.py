"""What HunyuanVideo's autoencoder promises beside its numbers: joints, gradients, refusals."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from svg_jax.models import FrameTiling, HunyuanVideoVAE, HunyuanVideoVAEConfig, Tiling
from svg_jax.models import hunyuan_video_vae_layers as layers
from svg_jax.models.layers import Kinds

CONFIG = HunyuanVideoVAEConfig(
    latent_channels=2,
    down_block_types=("HunyuanVideoDownBlock3D",) * 3,
    up_block_types=("HunyuanVideoUpBlock3D",) * 3,
    block_out_channels=(4, 4, 8),
    layers_per_block=1,
    norm_num_groups=2,
)


@cache
def make_model(**dtypes):
    """A model with random parameters."""
    rng = np.random.default_rng(0)
    model = nnx.eval_shape(lambda: HunyuanVideoVAE(CONFIG, **dtypes, rngs=nnx.Rngs(0)))

    def random(path, leaf):
        gain = "scale" in jax.tree_util.keystr(path)
        return jnp.asarray(gain + 0.2 * rng.standard_normal(leaf.shape), leaf.dtype)

    nnx.update(model, jax.tree.map_with_path(random, nnx.state(model)))
    return model


def noise(*shape):
    return jax.random.normal(jax.random.key(1), shape)


@pytest.mark.parametrize("strides", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("frames", [1, 7, 8])
def test_a_convolution_too_large_for_cudnn_is_done_by_frames(strides, frames, monkeypatch):
    kinds = Kinds(dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    conv = layers.CausalConv(2, 3, strides, **kinds)
    video = noise(2, frames, 4, 6, 2)
    whole = conv(video)
    of_frame = 2 * (4 + 2) * (6 + 2) * 3
    for frames_that_fit in (1, 3, 4, 5):
        monkeypatch.setattr(layers, "_MOST_ELEMENTS", frames_that_fit * of_frame)
        np.testing.assert_allclose(conv(video), whole, rtol=0, atol=1e-6)
    convolutions = str(jax.make_jaxpr(conv)(video)).count("conv_general_dilated[")
    assert convolutions == -(-whole.shape[1] // (3 if strides[0] == 1 else 2))


def test_parameters_and_results_have_the_dtypes_asked_for():
    model = make_model(dtype=jnp.bfloat16, param_dtype=jnp.float16)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))}
    assert dtypes == {jnp.dtype(jnp.float16)}
    posterior = model.encode(noise(1, 3, 1, 8, 8))
    video = model.decode(posterior.sample(noise(1, 2, 1, 1, 1)))
    assert posterior.log_variance.dtype == video.dtype == jnp.bfloat16
    assert jnp.isfinite(video.astype(jnp.float32)).all()


def test_a_transformers_latents_are_scaled():
    latents = noise(1, 2, 1, 3, 3)
    model = make_model()
    np.testing.assert_allclose(model.normalize(latents), 0.476986 * latents, rtol=1e-6)
    np.testing.assert_allclose(model.denormalize(model.normalize(latents)), latents, rtol=1e-6)


def test_progress_counts_the_tiles_of_space_and_time():
    told = []
    tiling = Tiling(8, 16, 8, 8)
    model = make_model()
    model.decode(
        noise(1, 2, 4, 2, 3),
        tiling=tiling,
        frame_tiling=FrameTiling(4, 4),
        progress=lambda *numbers: told.append(numbers),
    )
    assert told == [(i + 1, 18) for i in range(18)]  # 2 x 3 tiles, of 2, 2 and 2 latent frames
    model.encode(noise(1, 3, 1, 8, 8), progress=lambda *numbers: told.append(numbers))
    assert told[18:] == [(1, 1)]


def test_frames_do_not_depend_on_later_ones_but_through_the_norms(monkeypatch):
    monkeypatch.setattr(nnx.GroupNorm, "__call__", lambda self, x: x.astype(jnp.float32))
    model = make_model()
    latents = noise(1, 2, 4, 2, 2)
    for run, x, first in (
        (model.decoder, jnp.moveaxis(latents, 1, -1), 5),
        (model.encoder, noise(1, 8, 8, 8, 3), 1),
    ):
        later = x.at[:, x.shape[1] // 2 :].add(1.0)
        before, after = jax.jit(run)(x), jax.jit(run)(later)
        np.testing.assert_allclose(before[:, :first], after[:, :first], rtol=1e-5, atol=1e-6)
        assert jnp.abs(before[:, first:] - after[:, first:]).max() > 1e-3


def test_every_parameter_learns():
    graph, state = nnx.split(make_model())

    @jax.jit
    @jax.grad
    def gradient(state, video):
        vae = nnx.merge(graph, state)
        posterior = vae.encode(video)
        out = vae.decode(posterior.sample(jnp.ones_like(posterior.mean)))
        return jnp.mean((out - video) ** 2)

    for path, leaf in jax.tree.leaves_with_path(gradient(state, noise(1, 3, 5, 16, 16))):
        assert jnp.isfinite(leaf).all(), path
        # The softmax does not see a bias that all keys have.
        if "'key'" not in jax.tree_util.keystr(path) or "'bias'" not in jax.tree_util.keystr(path):
            assert jnp.abs(leaf).max() > 1e-9, path


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda vae: vae.encode(noise(1, 3, 1, 12, 8)), "12x8 and both must be multiples of 8"),
        (
            lambda vae: vae.encode(noise(1, 4, 1, 8, 8)),
            "video has 4 channels and the model takes 3",
        ),
        (
            lambda vae: vae.decode(noise(1, 3, 1, 1, 1)),
            "latents has 3 channels and the model takes 2",
        ),
        (
            lambda vae: vae.decode(noise(1, 2, 1, 9, 9), tiling=Tiling(20, 20, 16, 16)),
            "multiple of a latent's 8 pixels",
        ),
        (
            lambda vae: vae.decode(noise(1, 2, 9, 1, 1), frame_tiling=FrameTiling(16, 10)),
            "multiples of a latent's 4 frames",
        ),
    ],
)
def test_sizes_that_it_cannot_take_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(make_model())


def test_the_config_survives_its_json_form():
    values = CONFIG.to_dict()
    assert HunyuanVideoVAEConfig.from_dict({**values, "_class_name": "x"}) == CONFIG


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn='gelu' is not implemented"),
        ({"temporal_compression_ratio": 8}, "temporal_compression_ratio=8 is not implemented"),
        ({"spatial_compression_ratio": 16}, "spatial_compression_ratio=16 is not implemented"),
        ({"latents_mean": [0.0]}, "unknown keys"),
        ({"down_block_types": ["DownBlock3D"] * 4}, "must be 'HunyuanVideoDownBlock3D' for each"),
        ({"up_block_types": ["HunyuanVideoUpBlock3D"] * 3}, "for each of the 4"),
        ({"block_out_channels": [128, 256, 500, 512]}, "must be multiples of norm_num_groups=32"),
        (
            {
                "block_out_channels": [32, 32],
                "down_block_types": ["HunyuanVideoDownBlock3D"] * 2,
                "up_block_types": ["HunyuanVideoUpBlock3D"] * 2,
            },
            "must be three or more",
        ),
        ({"scaling_factor": 0.0}, "scaling_factor must not be 0"),
        ({"norm_num_groups": 0}, "norm_num_groups must be at least 1"),
    ],
)
def test_a_config_of_another_model_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        HunyuanVideoVAEConfig.from_dict(values)
