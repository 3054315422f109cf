"""Verifying: whatever is changed in a converted folder is found, and named."""

import json
import shutil
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from svg_jax.convert import (
    ConversionError,
    DamageError,
    convert_pipeline,
    read_manifest,
    verify_pipeline,
)
from svg_jax.convert.tables import t5
from svg_jax.models import T5Config

T5: dict[str, Any] = {"d_model": 8, "d_ff": 16, "d_kv": 4, "num_heads": 2, "num_layers": 2}
T5["vocab_size"] = 12


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A converted folder of an encoder, a scheduler and a tokenizer."""
    folder = tmp_path_factory.mktemp("verify")
    source, random = folder / "source", np.random.default_rng(0)
    for name in ("text_encoder", "scheduler", "tokenizer"):
        (source / name).mkdir(parents=True)
    tensors = {
        rule.source.replace("{layer}", str(layer)): random.normal(size=rule.source_shape)
        for rule in t5.rules(T5Config(**T5))
        for layer in range(rule.layers or 1)
    }
    tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    save_file(tensors, source / "text_encoder/model.safetensors")
    config = {**T5, "model_type": "t5", "feed_forward_proj": "gated-gelu"}
    (source / "text_encoder/config.json").write_text(json.dumps(config))
    (source / "scheduler/scheduler_config.json").write_text("{}")
    (source / "tokenizer/tokenizer.json").write_text("{}")
    index = {
        "_class_name": "WanPipeline",
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
    }
    (source / "model_index.json").write_text(json.dumps(index))
    convert_pipeline(source, folder / "out")
    return folder / "out"


@pytest.fixture
def own_copy(converted, tmp_path):
    shutil.copytree(converted, tmp_path / "out")
    return tmp_path / "out"


def test_a_sound_folder_passes_and_all_is_read_twice(converted):
    calls = []
    verify_pipeline(converted, progress=lambda *call: calls.append(call))
    done, total, _ = calls[-1]
    files = sum(f.stat().st_size for f in converted.rglob("*") if f.is_file())
    files -= (converted / "manifest.json").stat().st_size
    assert done == total == files + read_manifest(converted).tensor_bytes


def test_one_flipped_bit_in_any_file_is_found(own_copy):
    files = sorted(path for path in own_copy.rglob("*") if path.is_file())
    assert len(files) > 30
    random = np.random.default_rng(0)
    for file in files:
        whole = file.read_bytes()
        for _ in range(3):
            harmed = bytearray(whole)
            harmed[random.integers(len(whole))] ^= 1 << random.integers(8)
            file.write_bytes(harmed)
            with pytest.raises(DamageError, match=file.name):
                verify_pipeline(own_copy)
        file.write_bytes(whole)
    verify_pipeline(own_copy)


def test_any_flipped_bit_of_the_manifest_is_found(own_copy):
    file = own_copy / "manifest.json"
    whole = file.read_bytes()
    for at in range(0, len(whole), 37):
        harmed = bytearray(whole)
        harmed[at] ^= 1 << (at % 8)
        file.write_bytes(harmed)
        with pytest.raises(DamageError, match=r"manifest\.json"):
            read_manifest(own_copy)


def test_what_is_missing_or_too_much_is_named(own_copy):
    (own_copy / "tokenizer/spiece.model").touch()
    with pytest.raises(DamageError, match=r"tokenizer/spiece.model is not put there"):
        verify_pipeline(own_copy)
    (own_copy / "tokenizer/spiece.model").unlink()
    (own_copy / "tokenizer/tokenizer.json").unlink()
    (own_copy / "scheduler/scheduler_config.json").unlink()
    message = r"2 files \(scheduler/scheduler_config.json, tokenizer/tokenizer.json\) are missing"
    with pytest.raises(DamageError, match=message):
        verify_pipeline(own_copy)


def test_a_file_that_became_a_folder_or_a_dangling_link_is_found(own_copy):
    file = own_copy / "tokenizer/tokenizer.json"
    file.unlink()
    file.symlink_to(own_copy / "nowhere")
    with pytest.raises(DamageError, match=r"tokenizer.json is not as converted"):
        verify_pipeline(own_copy)
    file.unlink()
    file.mkdir()
    with pytest.raises(DamageError, match=r"tokenizer.json is missing"):
        verify_pipeline(own_copy)


def test_what_is_no_converted_folder_is_no_damage(tmp_path):
    with pytest.raises(ConversionError, match="is no folder") as caught:
        verify_pipeline(tmp_path / "nowhere")
    assert not isinstance(caught.value, DamageError)
