"""What convert takes beside a pipeline's folder: a component's folder, or one file of weights."""

import inspect
import json
import os
import shutil
import typing
from pathlib import Path
from typing import Any

import diffusers
import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file
from tiny_configs import T5
from tiny_lora import WEIGHTS, Q, random_lora, save_lora
from tiny_lora import write_source as write_pipeline
from tiny_source import write_json

from svg_jax import from_pretrained
from svg_jax.convert import (
    ConversionError,
    convert_pipeline,
    convert_state,
    export_pipeline,
    load_component,
    load_text_encoder,
    load_transformer,
    load_vae,
    plan_conversion,
    read_contents,
    read_manifest,
    read_original,
    verify_pipeline,
)
from svg_jax.convert.formats.stored_tensor import read_tensor
from svg_jax.convert.paths import name_of
from svg_jax.convert.tables.registry import MODEL_CLASSES, PIPELINES

GOLDENS = json.loads((Path(__file__).parents[1] / "data/original/wan_encoders.json").read_text())
WAN = "WanTransformer3DModel"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A pipeline's folder with Wan's transformer; tests do not change it."""
    return write_pipeline(tmp_path_factory.mktemp("pipeline") / "source")


@pytest.fixture
def component(pipeline, tmp_path):
    return Path(shutil.copytree(pipeline / "transformer", tmp_path / "anything"))


def weights_file(component):
    return component / Path(WEIGHTS).name


@pytest.mark.parametrize("name", PIPELINES)
def test_a_class_has_the_role_that_it_has_in_diffusers_pipelines(name):
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    found = 0
    for role, parameter in parameters.items():
        for kind in typing.get_args(parameter.annotation) or (parameter.annotation,):
            if getattr(kind, "__name__", None) in MODEL_CLASSES and role != "transformer_2":
                assert MODEL_CLASSES[kind.__name__].role == role
                found += 1
    assert found >= 3
    for class_name, model_class in MODEL_CLASSES.items():
        assert hasattr(
            {"diffusers": diffusers, "transformers": transformers}[model_class.library], class_name
        )


@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_component_converts_as_in_its_pipeline(pipeline, component, tmp_path, what):
    source = component if what == "folder" else weights_file(component)
    convert_pipeline(pipeline, tmp_path / "whole")
    convert_pipeline(source, tmp_path / "out")
    verify_pipeline(tmp_path / "out")
    whole, manifest = (read_manifest(tmp_path / name) for name in ("whole", "out"))
    assert manifest.components == whole.components
    assert (manifest.source, manifest.pipeline) == (source.name, None)
    assert manifest.sources == whole.sources
    states = [
        nnx.to_pure_dict(nnx.state(load_transformer(tmp_path / name))) for name in ("whole", "out")
    ]
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_its_export_loads_in_diffusers_and_converts_again(component, tmp_path):
    convert_pipeline(component, tmp_path / "out")
    export_pipeline(tmp_path / "out", tmp_path / "back")
    theirs = diffusers.WanTransformer3DModel.from_pretrained(
        tmp_path / "back", subfolder="transformer"
    )
    stored = load_file(weights_file(component))
    for name, tensor in theirs.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), stored[name])
    convert_pipeline(tmp_path / "back", tmp_path / "again")
    assert (
        read_manifest(tmp_path / "again").components == read_manifest(tmp_path / "out").components
    )
    (part,) = read_contents(tmp_path / "again").components
    assert (part.name, part.class_name) == ("transformer", WAN)


def test_an_encoder_of_transformers_says_its_class_in_a_list(tmp_path):
    torch.manual_seed(0)
    transformers.T5EncoderModel(transformers.T5Config(**T5)).save_pretrained(tmp_path / "t5")
    convert_pipeline(tmp_path / "t5", tmp_path / "out", dtype="bfloat16")
    encoder = load_text_encoder(tmp_path / "out")
    assert encoder.config.d_model == T5["d_model"]
    assert read_manifest(tmp_path / "out").dtype == "bfloat16"


def test_a_lora_is_merged_and_a_variant_taken(pipeline, component, tmp_path):
    lora = save_lora(tmp_path / "lora/a.safetensors", random_lora(pipeline, [Q]))
    convert_pipeline(weights_file(component), tmp_path / "file", lora=lora, lora_scale=0.5)
    variant = weights_file(component).with_suffix(".fp16.safetensors")
    weights_file(component).rename(variant)
    options = {"variant": "fp16", "components": ["transformer"]}
    convert_pipeline(component, tmp_path / "folder", lora=lora, lora_scale=0.5, **options)
    file, folder = (read_manifest(tmp_path / name) for name in ("file", "folder"))
    assert file.components == folder.components
    changed = [n for n, r in file.components["transformer"].items() if r.sha256 != r.stored_sha256]
    assert changed == [f"{Q}.weight"]
    with pytest.raises(ConversionError, match=r"has no vae; its components are transformer"):
        plan_conversion(component, components=["vae"], variant="fp16")
    with pytest.raises(ConversionError, match="no component has weights of the variant 'bf16'"):
        plan_conversion(component, variant="bf16")
    with pytest.raises(ConversionError, match="for which variant='fp16' says nothing"):
        plan_conversion(variant, variant="fp16")


def random_weights(shapes):
    random = np.random.default_rng(0)
    made = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return {name: torch.from_numpy(array) for name, array in made.items()}


@pytest.mark.parametrize(
    ("golden", "role", "class_name"),
    [("umt5", "text_encoder", "UMT5EncoderModel"), ("clip", "image_encoder", "CLIPVisionModel")],
)
@pytest.mark.parametrize("beside", [None, {"_class_name": "WanModel", "dim": 5120}])
def test_an_original_file_may_tell_its_whole_config(tmp_path, golden, role, class_name, beside):
    file = tmp_path / "models.pth"
    torch.save(random_weights(GOLDENS[golden]["shapes"]), file)
    if beside is not None:  # of another model, as in Wan-AI's repositories
        write_json(tmp_path / "config.json", beside)
    (tmp_path / "another.safetensors").write_bytes(b"")
    convert_pipeline(file, tmp_path / "out")
    verify_pipeline(tmp_path / "out")
    original = read_original(file)
    tensors = {name: read_tensor(tensor) for name, tensor in original.tensors.items()}
    module = load_component(tmp_path / "out", role)
    expected = convert_state(tensors, MODEL_CLASSES[class_name].rules(module.config))
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(module)), expected)
    manifest = read_manifest(tmp_path / "out")
    assert set(manifest.sources) >= {f"{role}/models.pth"}
    assert not any("another" in name for name in manifest.sources)


def test_an_error_says_where_to_put_what_the_tensors_do_not_tell(tmp_path):
    shapes = {
        "img_in.proj.weight": (8, 16, 1, 2, 2),
        "double_blocks.0.img_attn_qkv.weight": (24, 8),
        "double_blocks.0.img_attn_q_norm.weight": (8,),
        "final_layer.linear.weight": (64, 8),
    }
    file = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": random_weights(shapes)}, file)
    with pytest.raises(
        ConversionError, match=r"give image_condition_type.*in config\.json, beside"
    ):
        plan_conversion(file)
    said = {"_class_name": "HunyuanVideoTransformer3DModel", "image_condition_type": None}
    write_json(tmp_path / "config.json", said)
    with pytest.raises(ConversionError, match="HunyuanVideo's transformer, but not whole"):
        plan_conversion(file)


@pytest.mark.parametrize("beside", ["its own", "the authors'", "none"])
def test_the_vae_of_hunyuan_video_has_the_same_names_in_both_worlds(tmp_path, beside):
    torch.manual_seed(0)
    small: dict[str, Any] = {
        "latent_channels": 4,
        "block_out_channels": (32,) * 4,
        "down_block_types": ("HunyuanVideoDownBlock3D",) * 4,
        "up_block_types": ("HunyuanVideoUpBlock3D",) * 4,
        "layers_per_block": 1,
    }
    vae = diffusers.AutoencoderKLHunyuanVideo(**small)
    vae.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    saved = json.loads(config.read_text())
    if beside == "the authors'":
        write_json(config, {"_class_name": "AutoencoderKLCausal3D", "sample_size": 256})
    elif beside == "none":
        config.unlink()
    convert_pipeline(tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "out")
    read_config = MODEL_CLASSES["AutoencoderKLHunyuanVideo"].read_config
    written = json.loads((tmp_path / "out/vae/config.json").read_text())
    assert read_config(written) == read_config(saved)
    assert (written == saved) == (beside == "its own")
    assert load_vae(tmp_path / "out").config == read_config(saved)


def test_links_lead_where_the_hubs_cache_keeps_its_files(component, tmp_path):
    blobs = tmp_path / "models--owner--wan" / "blobs"
    blobs.mkdir(parents=True)
    snapshot = blobs.parent / "snapshots" / ("0123456789" * 4) / "transformer"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(component.iterdir()):
        shutil.copyfile(file, blobs / str(number))
        (snapshot / file.name).symlink_to(blobs / str(number))
    folder, file = plan_conversion(snapshot), plan_conversion(weights_file(snapshot))
    assert name_of(file.source.path) == Path(WEIGHTS).name
    assert folder.components[0].tensors == file.components[0].tensors
    elsewhere = Path(shutil.move(tmp_path / "models--owner--wan" / "snapshots", tmp_path / "x"))
    for source in (
        elsewhere / snapshot.parent.name / "transformer",
        *elsewhere.rglob("*.safetensors"),
    ):
        with pytest.raises(
            ConversionError, match=r"config.json leads out of the checkpoint's folder"
        ):
            plan_conversion(source)


def test_no_pipeline_is_made_of_it(component, tmp_path):
    convert_pipeline(component, tmp_path / "out")
    export_pipeline(tmp_path / "out", tmp_path / "back")
    for folder in ("out", "back"):
        with pytest.raises(ValueError, match=r"holds a component alone \(transformer\)") as found:
            from_pretrained(tmp_path / folder, cache_dir=tmp_path / "cache")
        assert "\n" not in str(found.value)
    with pytest.raises(ValueError, match=r"is a file, and a pipeline is a folder"):
        from_pretrained(weights_file(component))
    with pytest.raises(ValueError, match=r"is no pipeline: it holds neither"):
        from_pretrained(component)
    assert not (tmp_path / "cache").exists()


def put(name, make):
    """Makes something else of a file in the component's folder, and gives its path."""

    def damage(component):
        (component / name).unlink()
        make(component / name)
        return component / name

    return damage


def say(**config):
    """Lets config.json say something else."""

    def damage(component):
        write_json(component / "config.json", config)
        return weights_file(component)

    return damage


def config_is(make):
    def damage(component):
        put("config.json", make)(component)
        return weights_file(component)

    return damage


def named(name):
    """The weights under another name."""

    def damage(component):
        return weights_file(component).rename(component / name)

    return damage


def link_to(target):
    return lambda file: file.symlink_to(target)


FILE = Path(WEIGHTS).name
WRONG = {
    "nothing": (lambda component: component / "nowhere.safetensors", "is no folder and no file"),
    "a pipe": (put(FILE, os.mkfifo), "is no file but a folder, a pipe"),
    "an empty folder": (put(FILE, Path.mkdir), "holds no model_index.json, and neither"),
    "a dangling link": (put(FILE, link_to("nowhere")), "is a link to nothing"),
    "a link to itself": (put(FILE, link_to(FILE)), "is a link to nothing"),
    "a device": (put(FILE, link_to("/dev/zero")), "is no file but a folder, a pipe"),
    "an empty file": (put(FILE, Path.touch), "has only 0 bytes"),
    "a text": (put(FILE, lambda file: file.write_text("weights " * 9)), "no safetensors file"),
    "another suffix": (named("model.onnx"), "is no file of weights: give the folder of"),
    "a config": (lambda component: component / "config.json", "is no file of weights: give"),
    "a text for torch": (named("model.pth"), "no file of torch.save"),
    "one shard": (named("model-00001-of-00002.safetensors"), "one of several files of weights"),
    "no config": (config_is(lambda file: None), "so that .*/config.json must say what they are"),
    "a pipe as config": (config_is(os.mkfifo), "config.json: is no file but a folder, a pipe"),
    "a dangling config": (config_is(link_to("nowhere")), "config.json: is a link to nothing"),
    "a config outside": (config_is(link_to("/etc/hostname")), "config.json leads out of"),
    "a class that is not known": (say(_class_name="UNet2D"), "config of a UNet2D, and only Auto"),
    "a list of classes": (say(architectures=["BertModel"]), "config of a BertModel, and only"),
    "no class": (say(num_layers=2), "names no class"),
    "nonsense for a class": (say(_class_name={"a": 1}), r"config of a \{'a': 1\}, and only"),
    "another class": (say(_class_name="CogVideoXTransformer3DModel"), "do not fit the config"),
    "no weights": (
        lambda component: put(FILE, lambda file: None)(component).parent,
        "holds no diff",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_component_is_refused_in_one_sentence(component, tmp_path, case):
    damage, message = WRONG[case]
    source = damage(component)
    for read in (plan_conversion, lambda source: convert_pipeline(source, tmp_path / "out")):
        with pytest.raises(ConversionError, match=message) as found:
            read(source)
        assert str(source.parent) in str(found.value)
        assert "\n" not in str(found.value)
    assert not (tmp_path / "out").exists()


def test_a_component_folder_may_be_named_like_a_file(component, tmp_path):
    convert_pipeline(component.rename(tmp_path / "x.safetensors"), tmp_path / "out")
    assert read_manifest(tmp_path / "out").source == "x.safetensors"
    with pytest.raises(ConversionError, match="is converted already"):
        plan_conversion(tmp_path / "out")
    with pytest.raises(ConversionError, match=r"holds no diffusion_pytorch_model.*found: weights"):
        plan_conversion(tmp_path / "out/transformer")
