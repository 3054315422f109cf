"""Folders that diffusers and transformers wrote: converted, loaded, verified, and given back."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file
from tiny_configs import COGVIDEOX, COGVIDEOX_2B, T5

from svg_jax.convert import (
    ConversionError,
    DamageError,
    convert_pipeline,
    convert_state,
    export_pipeline,
    load_text_encoder,
    load_transformer,
    read_manifest,
)
from svg_jax.convert.formats.digests import file_digest
from svg_jax.convert.tables import cogvideox, t5
from svg_jax.models import CogVideoXConfig, T5Config

VARIANTS = {
    "2b": COGVIDEOX_2B,
    "5b-I2V": {**COGVIDEOX, "in_channels": 8, "use_learned_positional_embeddings": True},
    "1.5-5b-I2V": {**COGVIDEOX, "patch_size_t": 2, "patch_bias": False, "ofs_embed_dim": 16},
}


def released(folder: Path, variant: str) -> Path:
    """A pipeline folder as the libraries write it: sharded bfloat16 and whole float16 weights."""
    torch.manual_seed(0)
    transformer = diffusers.CogVideoXTransformer3DModel(**VARIANTS[variant])
    encoder = transformers.T5EncoderModel(transformers.T5Config(**T5))
    for module in (transformer, encoder):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
    transformer.bfloat16().save_pretrained(folder / "transformer", max_shard_size="30KB")
    encoder.half().save_pretrained(folder / "text_encoder")
    diffusers.CogVideoXDDIMScheduler().save_pretrained(folder / "scheduler")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/tokenizer.json").write_text("{}")
    index = {
        "_class_name": "CogVideoXPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "CogVideoXDDIMScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "vae": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request, tmp_path_factory):
    """A released folder of each variant, and what it was converted to."""
    folder = tmp_path_factory.mktemp("variant")
    convert_pipeline(released(folder / "source", request.param), folder / "out")
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The same for one variant only."""
    folder = tmp_path_factory.mktemp("one")
    convert_pipeline(released(folder / "source", "2b"), folder / "out")
    return folder


@pytest.fixture
def own_copy(one, tmp_path):
    """A converted folder for a test to damage."""
    shutil.copytree(one / "out", tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def own_source(one, tmp_path):
    """A released folder for a test to change."""
    shutil.copytree(one / "source", tmp_path / "source")
    return tmp_path / "source"


def change_encoder(source: Path, change) -> dict[str, np.ndarray]:
    """Rewrites the text encoder's tensors as `change(name, tensor)` has them."""
    file = source / "text_encoder/model.safetensors"
    changed = {name: change(name, tensor) for name, tensor in load_file(file).items()}
    save_file(changed, file)
    return changed


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].tobytes() == tensor.tobytes()


def small_files(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*.json")
        if not file.name.endswith(".index.json") or file.name == "model_index.json"
    }


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def edit_manifest(folder: Path, edit) -> None:
    """Changes the manifest and gives it the right digest, as somebody of ill will would."""
    file = folder / "manifest.json"
    values = json.loads(file.read_text())
    edit(values)
    values.pop("sha256")
    body = json.dumps(values, indent=1, sort_keys=True)
    values["sha256"] = hashlib.sha256(body.encode()).hexdigest()
    file.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")


def largest_data_file(weights: Path) -> Path:
    return max(
        (f for f in weights.rglob("c/**/*") if f.is_file()), key=lambda file: file.stat().st_size
    )


class TestExport:
    def test_tensors_and_small_files_come_back_bit_for_bit(self, variant, tmp_path):
        export_pipeline(variant / "out", tmp_path / "back")
        assert (tmp_path / "back/transformer/diffusion_pytorch_model.safetensors").is_file()
        assert (tmp_path / "back/text_encoder/model.safetensors").is_file()
        for component in ("transformer", "text_encoder"):
            expected = tensors_of(variant / "source" / component)
            assert_same_bits(tensors_of(tmp_path / "back" / component), expected)
        assert small_files(tmp_path / "back") == small_files(variant / "source")

    def test_the_libraries_read_what_comes_back(self, one, tmp_path):
        export_pipeline(one / "out", tmp_path / "back", shard_bytes=30_000)
        for component, load in (
            ("transformer", diffusers.CogVideoXTransformer3DModel.from_pretrained),
            ("text_encoder", transformers.T5EncoderModel.from_pretrained),
        ):
            found, expected = (
                load(one_of / component) for one_of in (tmp_path / "back", one / "source")
            )
            assert found.state_dict().keys() == expected.state_dict().keys()
            for name, tensor in expected.state_dict().items():
                assert torch.equal(found.state_dict()[name], tensor)

    def test_shards_convert_to_the_same_as_the_whole(self, one, tmp_path):
        export_pipeline(one / "out", tmp_path / "back", shard_bytes=20_000)
        assert len(list((tmp_path / "back/transformer").glob("*.safetensors"))) > 2
        convert_pipeline(tmp_path / "back", tmp_path / "again")
        assert read_manifest(tmp_path / "again").components == read_manifest(one / "out").components

    def test_tied_weights_come_back_under_every_name(self, own_source, tmp_path):
        file = own_source / "text_encoder/model.safetensors"
        tied = load_file(file)
        tied["encoder.embed_tokens.weight"] = tied["shared.weight"]
        save_file(tied, file)
        convert_pipeline(own_source, tmp_path / "out")
        export_pipeline(tmp_path / "out", tmp_path / "back")
        assert_same_bits(tensors_of(tmp_path / "back/text_encoder"), tied)


class TestDtypes:
    def test_a_cast_is_made_where_it_is_asked_for(self, own_source, tmp_path):
        convert_pipeline(own_source, tmp_path / "out", dtype=jnp.bfloat16)
        export_pipeline(tmp_path / "out", tmp_path / "back")
        stored = tensors_of(own_source / "text_encoder")
        expected = {name: tensor.astype(jnp.bfloat16) for name, tensor in stored.items()}
        assert_same_bits(tensors_of(tmp_path / "back/text_encoder"), expected)
        before, after = (
            json.loads((folder / "text_encoder/config.json").read_text())
            for folder in (own_source, tmp_path / "back")
        )
        assert after == before | {"dtype": "bfloat16"}
        record = read_manifest(tmp_path / "out").components["text_encoder"]["shared.weight"]
        assert (record.dtype, record.stored_dtype) == ("float16", "bfloat16")
        assert record.sha256 != record.stored_sha256

    def test_one_weight_may_differ_from_another(self, own_source, tmp_path):
        def widen(name, tensor):  # what transformers does to keep T5 from overflowing
            return tensor.astype(np.float32) if "DenseReluDense.wo" in name else tensor

        expected = change_encoder(own_source, widen)
        convert_pipeline(own_source, tmp_path / "out")
        feed_forward = load_text_encoder(tmp_path / "out").blocks.feed_forward
        assert feed_forward.output.kernel.dtype == jnp.float32
        assert feed_forward.input.kernel.dtype == jnp.float16
        export_pipeline(tmp_path / "out", tmp_path / "back")
        assert_same_bits(tensors_of(tmp_path / "back/text_encoder"), expected)

    def test_the_layers_of_one_weight_may_not_unless_they_are_cast(self, own_source, tmp_path):
        def widen(name, tensor):
            return tensor.astype(np.float32) if "block.1.layer.1.DenseRe" in name else tensor

        change_encoder(own_source, widen)
        with pytest.raises(ConversionError, match=r"wi_0.weight mix float16 and float32"):
            convert_pipeline(own_source, tmp_path / "out")
        convert_pipeline(own_source, tmp_path / "out", dtype="float32")
        feed_forward = load_text_encoder(tmp_path / "out").blocks.feed_forward
        assert feed_forward.input.kernel.dtype == jnp.float32

    def test_a_cast_that_overflows_is_refused(self, own_source, tmp_path):
        change_encoder(own_source, lambda name, tensor: tensor.astype(np.float32) + 1e5)
        with pytest.raises(ConversionError, match="values that float16 cannot hold"):
            convert_pipeline(own_source, tmp_path / "out", dtype="float16")

    @pytest.mark.parametrize("dtype", ["int8", "float64", "nonsense"])
    def test_other_dtypes_are_refused(self, one, tmp_path, dtype):
        with pytest.raises(ConversionError, match="must be float32, float16 or bfloat16"):
            convert_pipeline(one / "source", tmp_path / "out", dtype=dtype)


class TestExportOfDamage:
    def test_a_flipped_bit_is_found_on_the_way(self, own_copy, tmp_path):
        flip_a_bit(largest_data_file(own_copy / "transformer/weights"))
        with pytest.raises(DamageError, match=r"transformer: .* is not what was converted"):
            export_pipeline(own_copy, tmp_path / "back")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_a_changed_small_file_is_found(self, own_copy, tmp_path):
        (own_copy / "tokenizer/tokenizer.json").write_text("{ }")
        with pytest.raises(DamageError, match=r"tokenizer.json: is not the file"):
            export_pipeline(own_copy, tmp_path / "back")


class TestLoad:
    def test_parameters_are_the_released_ones_as_stored(self, variant):
        config = json.loads((variant / "source/transformer/config.json").read_text())
        for component, module, rules in (
            (
                "transformer",
                load_transformer(variant / "out"),
                cogvideox.rules(CogVideoXConfig.from_dict(config)),
            ),
            ("text_encoder", load_text_encoder(variant / "out"), t5.rules(T5Config(**T5))),
        ):
            expected = convert_state(tensors_of(variant / "source" / component), rules)
            found = nnx.to_pure_dict(nnx.state(module))
            assert jax.tree.structure(found) == jax.tree.structure(expected)
            for leaf, array in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
                assert leaf.dtype == array.dtype
                assert np.asarray(leaf).tobytes() == array.tobytes()
                assert leaf.devices() == {jax.devices()[0]}

    def test_parameters_are_cast_and_computed_in_what_is_asked_for(self, one):
        encoder = load_text_encoder(one / "out", dtype=jnp.bfloat16, param_dtype=jnp.float32)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(encoder))} == {"float32"}
        assert encoder(jnp.zeros((1, 4), jnp.int32)).dtype == jnp.bfloat16
        transformer = load_transformer(one / "out", dtype=jnp.bfloat16, param_dtype=jnp.float16)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(transformer))} == {"float16"}

    def test_what_was_not_converted_is_told(self, one, tmp_path):
        with pytest.raises(ConversionError, match="is no folder"):
            load_transformer(tmp_path / "nowhere")
        with pytest.raises(ConversionError, match="run `svg-jax convert` on it"):
            load_transformer(one / "source")
        with pytest.raises(ConversionError, match=r"no converted pipeline \(it has no manifest"):
            load_transformer(tmp_path)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "no whole JSON"),
            ("{}", "is damaged"),
            ('{"format_version": 1}', "is of format 1 and this version reads 3"),
        ],
    )
    def test_a_damaged_manifest_is_told(self, own_copy, content, message):
        (own_copy / "manifest.json").write_text(content)
        with pytest.raises(ConversionError, match=f"manifest.json: .*{message}"):
            load_transformer(own_copy)

    @pytest.mark.parametrize(
        "change",
        [
            {"files": {"../outside": "0"}},
            {"files": {"/etc/hostname": "0"}},
            {"weights": {"../outside": "0"}},
            {"components": {"../outside": {}}},
            {"components": {"transformer": {"w": {"shape": [1], "dtype": "float32"}}}},
            {"unknown": 1},
        ],
    )
    def test_a_manifest_of_somebody_elses_making_is_refused(self, own_copy, change):
        edit_manifest(own_copy, lambda values: values.update(change))
        with pytest.raises(DamageError, match=r"manifest.json: is damaged"):
            load_transformer(own_copy)

    def test_a_manifest_of_another_format_is_told(self, own_copy):
        edit_manifest(own_copy, lambda values: values.update(format_version=4))
        with pytest.raises(ConversionError, match=r"is of format 4 and this version reads 3"):
            load_transformer(own_copy)

    def test_a_manifest_with_a_dtype_of_its_own_is_refused(self, own_copy):
        def change(values):
            values["components"]["text_encoder"]["shared.weight"]["stored_dtype"] = "int32"

        edit_manifest(own_copy, change)
        with pytest.raises(DamageError, match=r"manifest.json: .*shared.weight is int32"):
            load_transformer(own_copy)

    def test_weights_of_another_config_are_refused(self, own_copy):
        config = own_copy / "transformer/config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 3}))
        with pytest.raises(DamageError, match=r"config\.json: is not the file that was converted"):
            load_transformer(own_copy)
        forged = {"transformer/config.json": file_digest(config)}
        edit_manifest(own_copy, lambda values: values["files"].update(forged))
        with pytest.raises(DamageError, match=r"transformer: .*24 missing"):
            load_transformer(own_copy)

    def test_weights_that_are_cut_or_gone_are_told(self, own_copy):
        message = "weights: cannot be read as an orbax checkpoint"
        file = largest_data_file(own_copy / "transformer/weights")
        os.truncate(file, file.stat().st_size // 2)
        with pytest.raises(ConversionError, match=message):
            load_transformer(own_copy)
        shutil.rmtree(own_copy / "text_encoder/weights")
        with pytest.raises(ConversionError, match=message):
            load_text_encoder(own_copy)
