"""A pipeline's folder of each family, whose transformer alone is converted, loaded and exported."""

import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file

from svg_jax import from_pretrained
from svg_jax.convert import (
    ConversionError,
    convert_pipeline,
    convert_state,
    export_pipeline,
    load_transformer,
)
from svg_jax.convert.tables import hunyuan_video, wan
from svg_jax.models import HunyuanVideoConfig, WanConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"
FAMILIES = {
    "WanPipeline": (
        diffusers.WanTransformer3DModel,
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 32,
            "ffn_dim": 48,
            "num_layers": 3,
        },
        lambda config: wan.rules(WanConfig.from_dict(config)),
    ),
    "HunyuanVideoPipeline": (
        diffusers.HunyuanVideoTransformer3DModel,
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "num_single_layers": 3,
            "num_refiner_layers": 2,
            "text_embed_dim": 16,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (4, 6, 6),
        },
        lambda config: hunyuan_video.rules(HunyuanVideoConfig.from_dict(config)),
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path):
    """A released-looking folder with a transformer and a VAE that is not ported."""
    make, config, rules = FAMILIES[request.param]
    torch.manual_seed(0)
    source = tmp_path / "source"
    make(**config).save_pretrained(source / "transformer")
    (source / "vae").mkdir()
    index = {
        "_class_name": request.param,
        "transformer": ["diffusers", make.__name__],
        "vae": ["diffusers", "AnotherVAE"],
    }
    (source / "model_index.json").write_text(json.dumps(index))
    return source, rules(json.loads((source / "transformer/config.json").read_text()))


def test_a_transformer_converts_loads_and_comes_back_bit_by_bit(family, tmp_path):
    source, rules = family
    with pytest.raises(ConversionError, match=r"vae .AnotherVAE. cannot be converted yet"):
        convert_pipeline(source, tmp_path / "out")
    convert_pipeline(source, tmp_path / "out", components=["transformer"])
    stored = load_file(source / "transformer" / WEIGHTS)
    expected = convert_state(stored, rules)
    found = nnx.to_pure_dict(nnx.state(load_transformer(tmp_path / "out")))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    export_pipeline(tmp_path / "out", tmp_path / "back")
    back = load_file(tmp_path / "back/transformer" / WEIGHTS)
    assert back.keys() == stored.keys()
    for name, tensor in stored.items():
        assert back[name].tobytes() == tensor.tobytes()


def test_a_cast_spares_what_the_model_keeps_in_float32(family, tmp_path):
    source, _ = family
    convert_pipeline(source, tmp_path / "out", components=["transformer"])
    model = load_transformer(tmp_path / "out", dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    made = nnx.eval_shape(
        lambda: type(model)(
            model.config,  # pyright: ignore[reportArgumentType]
            dtype=jnp.bfloat16,
            param_dtype=jnp.bfloat16,
            rngs=nnx.Rngs(0),
        )
    )
    wanted = jax.tree.map(lambda leaf: leaf.dtype, nnx.to_pure_dict(nnx.state(made)))
    assert jax.tree.map(lambda leaf: leaf.dtype, nnx.to_pure_dict(nnx.state(model))) == wanted
    assert jnp.bfloat16 in jax.tree.leaves(wanted)


def test_a_pipeline_without_its_scheduler_says_so(family, tmp_path):
    source, _ = family
    convert_pipeline(source, tmp_path / "out", components=["transformer"])
    with pytest.raises(ValueError, match=r"scheduler_config\.json: cannot be read"):
        from_pretrained(tmp_path / "out")
