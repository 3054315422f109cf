"""Encoders as transformers saves them: converted from a folder, and back bit by bit."""

import json
from typing import Any

import pytest
import torch
import transformers
from safetensors.numpy import load_file

from svg_jax.convert import convert_pipeline, export_pipeline, read_manifest

T5: dict[str, Any] = {
    "d_model": 16,
    "d_ff": 24,
    "d_kv": 4,
    "num_heads": 2,
    "num_layers": 2,
    "vocab_size": 30,
}
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
LLAMA = transformers.LlamaConfig(**SIZES, vocab_size=30)
VISION = transformers.CLIPVisionConfig(**SIZES, image_size=28, patch_size=14, projection_dim=8)
ENCODERS = {
    "UMT5EncoderModel": transformers.UMT5Config(**T5),
    "CLIPTextModel": transformers.CLIPTextConfig(
        **SIZES, vocab_size=30, bos_token_id=0, eos_token_id=2
    ),
    "CLIPVisionModel": VISION,
    "CLIPVisionModelWithProjection": VISION,
    "LlamaModel": LLAMA,
    "LlavaForConditionalGeneration": transformers.LlavaConfig(
        text_config=LLAMA, vision_config=VISION, image_token_index=29
    ),
}
UNUSED = {
    "CLIPVisionModelWithProjection": {"visual_projection.weight"},
    "LlavaForConditionalGeneration": {"language_model.lm_head.weight"},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A pipeline's folder of nothing but encoders, each named by its class."""
    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    for name, config in ENCODERS.items():
        getattr(transformers, name)(config).save_pretrained(folder / name)
    index = {name: ["transformers", name] for name in ENCODERS}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", **index}))
    return folder


def test_every_tensor_that_is_used_converts_and_comes_back(source, tmp_path):
    convert_pipeline(source, tmp_path / "out")
    export_pipeline(tmp_path / "out", tmp_path / "back")
    records = read_manifest(tmp_path / "out").components
    for name in ENCODERS:
        stored = load_file(source / name / "model.safetensors")
        unused = UNUSED.get(name, set())
        assert unused <= stored.keys()
        back = load_file(tmp_path / "back" / name / "model.safetensors")
        assert back.keys() == records[name].keys() == stored.keys() - unused
        for tensor, values in back.items():
            assert values.tobytes() == stored[tensor].tobytes(), (name, tensor)
