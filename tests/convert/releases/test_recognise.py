"""Original releases: recognised, renamed as the libraries' own conversions do it, and converted."""

import json
import math
import re
import zlib
from dataclasses import replace
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils
from flax import nnx
from originals import CONVERSIONS, DATA, converted, expand, load
from safetensors.numpy import load_file, save_file

from svg_jax.convert import (
    ConversionError,
    convert_pipeline,
    convert_state,
    export_pipeline,
    load_transformer,
    verify_pipeline,
)
from svg_jax.convert.formats.safetensors_file import read_header
from svg_jax.convert.formats.stored_tensor import StoredTensor, read_tensor
from svg_jax.convert.releases.recognise import RELEASES, find_original, read_original, recognise
from svg_jax.convert.releases.renaming import rename_tensors
from svg_jax.convert.tables.registry import MODEL_CLASSES
from svg_jax.models import CLIPVisionEncoder, T5Encoder

TASK = {"image_condition_type": None}
SCALE = {"scaling_factor": 0.7}
# What must be said of a release beside its weights.
GIVEN = {
    "hunyuanvideo-t2v-transformer": TASK,
    "cogvideox-5b-vae": SCALE,
}
NAMES = sorted(file.stem for file in (DATA / "original").glob("*-*.json"))


def places(shapes) -> dict[str, StoredTensor]:
    """Tensors that are nowhere: their bytes would lie one after the other."""
    tensors, start = {}, 0
    for name, shape in shapes.items():
        nbytes = 4 * math.prod(shape)
        tensors[name] = StoredTensor(
            name, Path("nowhere"), np.dtype(np.float32), shape, start, nbytes
        )
        start += nbytes
    return tensors


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_of_a_release_has_its_place_and_the_shapes_tell_the_config(name):
    original, inventory = load("original", name), load("inventory", name)
    shapes = expand(original["tensors"])
    assert len(shapes) == original["num_tensors"]
    assert sum(map(math.prod, shapes.values())) == original["num_params"]
    found = recognise(places(shapes), Path("x"), config=GIVEN.get(name))
    assert found.class_name == inventory["class"]
    model_class = MODEL_CLASSES[found.class_name]
    assert model_class.read_config(found.config) == model_class.read_config(inventory["config"])
    expected = expand(inventory["tensors"])
    assert {name: tensor.shape for name, tensor in found.tensors.items()} == expected


def test_the_vae_of_hunyuan_video_has_the_names_of_diffusers_with_or_without_a_prefix():
    inventory = load("inventory", "hunyuanvideo-vae")
    shapes = expand(inventory["tensors"])
    for prefix in ("", "vae."):
        stored = places({prefix + name: shape for name, shape in shapes.items()})
        found = recognise(stored, Path("x"))
        assert {name: tensor.shape for name, tensor in found.tensors.items()} == shapes
        model_class = MODEL_CLASSES[found.class_name]
        assert model_class.read_config(found.config) == model_class.read_config(inventory["config"])


def narrow(name, layers=2) -> dict[str, torch.Tensor]:
    """Random tensors under a release's names, two layers of each kind, a few columns wide.

    The rows are as many as in the release: they are what conversions cut.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for key, shape in expand(load("original", name)["tensors"]).items():
        numbers = re.findall(r"blocks\.(\d+)\.", key)
        if all(int(number) < layers for number in numbers):
            few = (shape[0], *(min(size, 3) for size in shape[1:]))
            tensors[key] = torch.randn(few, generator=generator)
    return tensors


def renamed(name, stored):
    """A release's tensors under their new names, whatever their shapes."""
    of = load("original", name)["class"]
    layouts = [release.layout for release in RELEASES if release.class_name == of]
    (table,) = {layout.table for layout in layouts if layout.mark in stored}
    assert table is not None
    return rename_tensors(stored, table({key: tensor.shape for key, tensor in stored.items()}))


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_release_is_renamed_and_cut_as_by_diffusers_bit_for_bit(tmp_path, name):
    tensors = narrow(name)
    expected = getattr(single_file_utils, CONVERSIONS[name])(dict(tensors))
    file = tmp_path / "a.safetensors"
    save_file({key: tensor.numpy() for key, tensor in tensors.items()}, file)
    found = renamed(name, read_header(file).tensors)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].name == key
        assert found[key].shape == tuple(tensor.shape)
        np.testing.assert_array_equal(read_tensor(found[key]), tensor.numpy())


def source_of(tensor: StoredTensor, stored) -> list:
    """A tensor's name in the release, and the runs of its rows if it is not the whole."""
    parts = tensor.parts or (tensor,)
    (whole,) = (
        old for old in stored.values() if 0 <= parts[0].start - old.start < max(1, old.nbytes)
    )
    if tensor.nbytes == whole.nbytes:
        return [whole.name]
    row = whole.nbytes // whole.shape[0]
    runs = [(part.start - whole.start, part.start - whole.start + part.nbytes) for part in parts]
    return [whole.name, *([begin // row, end // row] for begin, end in runs)]


COGVIDEOX = load("original", "cogvideox_renames")["targets"]


@pytest.mark.parametrize("name", COGVIDEOX)
def test_cogvideox_is_renamed_and_cut_as_by_its_authors(name):
    stored = places(expand(load("original", name)["tensors"]))
    found = renamed(name, stored)
    assert {key: source_of(found[key], stored) for key in COGVIDEOX[name]} == COGVIDEOX[name]


def test_the_vae_of_wan_22_is_renamed_as_by_diffusers():
    stored = places(expand(load("original", "wan2.2-ti2v-5b-vae")["tensors"]))
    found = renamed("wan2.2-ti2v-5b-vae", stored)
    names = {key: source_of(tensor, stored) for key, tensor in found.items()}
    assert names == load("original", "wan22_vae_renames")["targets"]


def weights(shapes) -> dict[str, torch.Tensor]:
    """Numbers that every generator of goldens makes alike: seeded by the tensors' names."""
    made = {}
    for name, shape in shapes.items():
        values = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
        if len(shape) > 1:
            values *= math.prod(shape[1:]) ** -0.5
        else:
            values = 0.3 * values + ("norm" in name and name.endswith("weight"))
        made[name] = torch.tensor(values, dtype=torch.float32)
    return made


GOLDENS = json.loads((DATA / "original" / "wan_encoders.json").read_text())


def test_the_text_encoder_of_wan_computes_what_the_original_does(tmp_path):
    golden = GOLDENS["umt5"]
    torch.save(weights(golden["shapes"]), tmp_path / "models_t5.pth")
    encoder = converted(tmp_path / "models_t5.pth", T5Encoder)
    features = encoder(jnp.asarray(golden["ids"]), jnp.asarray(golden["mask"]))
    for (entry, token), expected in zip(golden["places"], golden["output"], strict=True):
        np.testing.assert_allclose(features[entry, token], expected, atol=1e-5)


def test_the_image_encoder_of_wan_computes_what_the_original_does(tmp_path):
    golden = GOLDENS["clip"]
    others = {"textual.token_embedding.weight": torch.ones(2, 2), "log_scale": torch.tensor(1.0)}
    torch.save(weights(golden["shapes"]) | others, tmp_path / "models_clip.pth")
    encoder = converted(tmp_path / "models_clip.pth", CLIPVisionEncoder)
    image = np.random.default_rng(5).normal(size=(1, 3, 28, 28)).astype(np.float32)
    features = encoder(jnp.asarray(image), hidden_state=-2)
    for (entry, token), expected in zip(golden["places"], golden["output"], strict=True):
        np.testing.assert_allclose(features[entry, token], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("hunyuanvideo-t2v-transformer", None, "do not tell text to video .*'token_replace'"),
        ("hunyuanvideo-t2v-transformer", {**TASK, "rope_axes_dim": [2]}, "HunyuanVideo's .*rope"),
        ("hunyuanvideo-t2v-transformer", {**TASK, "nonsense": 1}, "unknown keys .'nonsense'"),
        ("cogvideox-5b-vae", None, r"give scaling_factor, 1\.15258426 for 2B"),
    ],
)
def test_what_the_weights_do_not_tell_must_be_given(name, config, message):
    stored = places(expand(load("original", name)["tensors"]))
    with pytest.raises(ConversionError, match=message) as caught:
        recognise(stored, Path("the/file"), config=config)
    assert "the/file" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("patch_embedding.weight", r"not whole .*'patch_embedding.weight'"),
        ("blocks.7.cross_attn.k.bias", r"1 missing \(blocks.7.attn2.to_k.bias\)"),
        ("blocks.0.self_attn.q.weight", "of no original release that is known: HunyuanVideo's"),
    ],
)
def test_a_release_that_is_not_whole_is_refused(lost, message):
    shapes = expand(load("original", "wan2.1-t2v-1.3b-transformer")["tensors"])
    shapes.pop(lost)
    with pytest.raises(ConversionError, match=message):
        recognise(places(shapes), Path("x"))


def test_tensors_that_a_release_does_not_have_are_refused():
    shapes = expand(load("original", "wan2.1-t2v-1.3b-transformer")["tensors"])
    vace = shapes | {"vace_blocks.0.before_proj.weight": (2, 2)}
    with pytest.raises(ConversionError, match=r"1 unexpected \(vace_blocks.0.before_proj.weight"):
        recognise(places(vace), Path("x"))
    both = shapes | {"blocks.0.attn1.to_q.weight": (1536, 1536)}
    with pytest.raises(ConversionError, match=r"both blocks\.0\.attn1\.to_q\.weight"):
        recognise(places(both), Path("x"))
    odd = expand(load("original", "hunyuanvideo-t2v-transformer")["tensors"])
    odd["double_blocks.3.img_attn_qkv.bias"] = (9217,)
    with pytest.raises(ConversionError, match=r"cannot be cut into 3 pieces"):
        recognise(places(odd), Path("x"), config=TASK)


def test_weights_of_another_dtype_are_refused():
    stored = places(expand(load("original", "umt5-xxl-encoder")["tensors"]))
    stored["norm.weight"] = replace(stored["norm.weight"], dtype=np.dtype(np.int64))
    with pytest.raises(ConversionError, match=r"final_layer_norm.weight is int64"):
        recognise(stored, Path("x"))


def test_shards_with_an_index_and_a_single_file_are_read_alike(tmp_path):
    shapes = {
        name: tuple(8 if size == 1536 else min(size, 8) for size in shape)
        for name, shape in expand(load("original", "umt5-xxl-encoder")["tensors"]).items()
    }
    tensors = {name: tensor.numpy() for name, tensor in weights(shapes).items()}
    save_file(tensors, tmp_path / "a.safetensors")
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[:100], "model-2.safetensors": names[100:]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, tmp_path / shard)
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    whole, sharded = read_original(tmp_path / "a.safetensors"), read_original(tmp_path)
    assert whole.config == sharded.config
    for name, tensor in whole.tensors.items():
        np.testing.assert_array_equal(read_tensor(tensor), read_tensor(sharded.tensors[name]))


def small_hunyuan_video() -> dict[str, torch.Tensor]:
    """HunyuanVideo's transformer with two layers of each kind and one head."""
    sizes = {3072 * n: 128 * n for n in range(1, 8)} | {4096: 8, 768: 8}
    shapes = {
        name: tuple(sizes.get(size, size) for size in shape)
        for name, shape in expand(
            load("original", "hunyuanvideo-t2v-transformer")["tensors"]
        ).items()
        if all(int(number) < 2 for number in re.findall(r"blocks\.(\d+)\.", name))
    }
    return {name: tensor.bfloat16() for name, tensor in weights(shapes).items()}


def test_a_component_of_a_pipeline_may_hold_an_original_file(tmp_path):
    tensors = small_hunyuan_video()
    torch.save({"module": tensors}, tmp_path / "mp_rank_00_model_states.pt")
    (tmp_path / "config.json").write_text('{"_class_name": "HunyuanVideoTransformer3DModel"}')
    class_name = "HunyuanVideoTransformer3DModel"
    with pytest.raises(ConversionError, match="do not tell text to video"):
        find_original(tmp_path, class_name)
    said = {"_class_name": class_name, "image_condition_type": "token_replace"}
    (tmp_path / "config.json").write_text(json.dumps(said))
    found = find_original(tmp_path, class_name)
    assert found == find_original(tmp_path / "mp_rank_00_model_states.pt", None)
    assert found is not None
    assert found.config["num_layers"] == found.config["num_single_layers"] == 2
    assert found.config["image_condition_type"] == "token_replace"
    fused = tensors["single_blocks.1.linear1.weight"]
    name = "single_transformer_blocks.1.proj_mlp.weight"
    read = read_tensor(found.tensors[name]).astype(np.float32)
    np.testing.assert_array_equal(read, fused[3 * 128 :].float().numpy())
    swapped = read_tensor(found.tensors["norm_out.linear.bias"]).astype(np.float32)
    shift, scale = tensors["final_layer.adaLN_modulation.1.bias"].float().numpy().reshape(2, -1)
    np.testing.assert_array_equal(swapped, [*scale, *shift])
    with pytest.raises(ConversionError, match="a HunyuanVideoTransformer3DModel, and"):
        find_original(tmp_path, "WanTransformer3DModel")


def test_a_component_of_diffusers_is_no_original(tmp_path):
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({"blocks.0.attn1.to_q.weight": np.ones((2, 2), np.float32)}, file)
    assert find_original(tmp_path, "WanTransformer3DModel") is None
    torch.save({"w": torch.ones(1)}, tmp_path / "other.pt")
    assert find_original(tmp_path, "WanTransformer3DModel") is None
    file.unlink()
    with pytest.raises(ConversionError, match="of no original release"):
        find_original(tmp_path, "WanTransformer3DModel")
    torch.save({"w": torch.ones(1)}, tmp_path / "another.pth")
    with pytest.raises(ConversionError, match=r"another\.pth, other\.pt.*remove the ones"):
        find_original(tmp_path, "WanTransformer3DModel")


def test_original_shards_have_the_names_of_diffusers_files(tmp_path):
    shapes = expand(load("original", "umt5-xxl-encoder")["tensors"])
    small = {name: tuple(min(size, 8) for size in shape) for name, shape in shapes.items()}
    tensors = {name: tensor.numpy() for name, tensor in weights(small).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    found = find_original(tmp_path, "UMT5EncoderModel")
    assert found is not None
    assert found.config["num_layers"] == 24


def test_a_pipeline_with_an_original_file_converts_and_is_exported_as_diffusers(tmp_path):
    source, class_name = tmp_path / "source", "HunyuanVideoTransformer3DModel"
    (source / "transformer").mkdir(parents=True)
    index = {
        "_class_name": "HunyuanVideoPipeline",
        "transformer": ["diffusers", class_name],
    }
    (source / "model_index.json").write_text(json.dumps(index))
    said = {"_class_name": class_name, **TASK}
    (source / "transformer/config.json").write_text(json.dumps(said))
    torch.save({"module": small_hunyuan_video()}, source / "transformer/mp_rank_00.pt")
    convert_pipeline(source, tmp_path / "out")
    verify_pipeline(tmp_path / "out")
    found = find_original(source / "transformer", class_name)
    assert found is not None
    tensors = {name: read_tensor(tensor) for name, tensor in found.tensors.items()}
    model = load_transformer(tmp_path / "out", dtype=jnp.bfloat16)
    expected = convert_state(tensors, MODEL_CLASSES[class_name].rules(model.config))
    loaded = nnx.to_pure_dict(nnx.state(model))
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)
    export_pipeline(tmp_path / "out", tmp_path / "back")
    exported = load_file(tmp_path / "back/transformer/diffusion_pytorch_model.safetensors")
    assert exported.keys() == tensors.keys()
    assert all(exported[name].tobytes() == tensor.tobytes() for name, tensor in tensors.items())
    diffusers.HunyuanVideoTransformer3DModel.from_pretrained(tmp_path / "back/transformer")
