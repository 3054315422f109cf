"""Wan-AI's repositories as they are: recognised, and converted to what diffusers' releases give."""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from originals import as_released, clip_places, load, origins, umt5_places
from parity import randomised
from real_tokenizers import real_tokenizer
from safetensors.torch import save_file
from sizes import slow_but
from tiny_pipelines import picture
from tiny_source import write_json

from svg_jax.convert import (
    ConversionError,
    convert_pipeline,
    plan_conversion,
    read_contents,
    read_manifest,
    verify_pipeline,
)
from svg_jax.convert.components import COPIED, read_pipeline_index
from svg_jax.sampling import from_pretrained

TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 128,
    "text_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
}
WITH_IMAGE = TRANSFORMER | {"in_channels": 36, "image_dim": 80, "added_kv_proj_dim": 256}
POSITIONS = {"condition_embedder.image_embedder.pos_embed": ["img_emb.emb_pos"]}
UMT5: dict[str, Any] = {
    "d_model": 16,
    "d_ff": 32,
    "d_kv": 8,
    "num_heads": 2,
    "num_layers": 2,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}
CLIP: dict[str, Any] = {
    "hidden_size": 80,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 1,
    "patch_size": 14,
    "image_size": 224,
    "hidden_act": "gelu",
}
# The repository's name, its task, the shift of its schedule.
RELEASES = [
    ("Wan2.1-T2V-1.3B", "t2v", 3.0),
    ("Wan2.1-T2V-14B", "t2v", 3.0),
    ("Wan2.1-I2V-14B-480P", "i2v", 3.0),
    ("Wan2.1-I2V-14B-720P", "i2v", 5.0),
    ("Wan2.1-FLF2V-14B-720P", "flf2v", 16.0),
]
VAE_FILE = "Wan2.1_VAE.pth"
T5_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
CLIP_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
TOKENIZER = "google/umt5-xxl"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
SHARDS = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
CALL: dict[str, Any] = {
    "prompt": "A cat  &amp; a dog",
    "negative_prompt": "ugly",
    "height": 32,
    "width": 48,
    "num_frames": 5,
    "num_inference_steps": 2,
}


def make_modules(task) -> dict[str, Any]:
    """Random parts of a pipeline."""
    transformer = {"t2v": TRANSFORMER, "i2v": WITH_IMAGE, "flf2v": WITH_IMAGE}[task]
    transformer = transformer | ({"pos_embed_seq_len": 514} if task == "flf2v" else {})
    parts = {
        "transformer": diffusers.WanTransformer3DModel(**transformer),
        "vae": diffusers.AutoencoderKLWan(base_dim=8),
        "text_encoder": transformers.UMT5EncoderModel(transformers.UMT5Config(**UMT5)),
    }
    if task != "t2v":
        vision: Any = transformers.CLIPVisionModel
        parts["image_encoder"] = vision(transformers.CLIPVisionConfig(**CLIP))
    return {name: randomised(part, seed) for seed, (name, part) in enumerate(parts.items())}


def write_diffusers(folder, modules, shift) -> Path:
    """The pipeline as diffusers would have released it."""
    parts: dict[str, Any] = {
        **modules,
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        ),
    }
    if "image_encoder" in modules:
        processor: Any = transformers.CLIPImageProcessorPil
        parts["image_processor"] = processor()
    classes = {name: ["library", type(part).__name__] for name, part in parts.items()}
    if "image_processor" in classes:
        classes["image_processor"] = ["transformers", "CLIPImageProcessor"]
    classes["tokenizer"] = ["transformers", "T5TokenizerFast"]
    images = "ImageToVideo" if "image_encoder" in modules else ""
    write_json(folder / "model_index.json", {"_class_name": f"Wan{images}Pipeline", **classes})
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    shutil.copytree(real_tokenizer("t5-json"), folder / "tokenizer")
    return folder


def released(module, places, **shapes) -> dict[str, torch.Tensor]:
    """A module's tensors as its authors have them; `shapes` are those with other axes."""
    state = {name.removeprefix("vision_model."): of for name, of in module.state_dict().items()}
    tensors = as_released({name: state[name] for name in places if name in state}, places)
    assert sum(map(torch.numel, tensors.values())) == sum(map(torch.numel, module.parameters()))
    tensors = {
        name: tensor.reshape(shapes.get(name, tensor.shape)) for name, tensor in tensors.items()
    }
    return tensors


def write_repository(folder, modules, task) -> Path:
    """The same parts as Wan-AI would have released them."""
    name = "wan2.1-t2v-1.3b-transformer" if task == "t2v" else "wan2.1-i2v-14b-transformer"
    transformer = released(modules["transformer"], origins(name) | POSITIONS)
    folder.mkdir(parents=True)
    names = sorted(transformer)
    halves = dict(zip(SHARDS, (names[::2], names[1::2]), strict=True))
    for shard, half in halves.items():
        save_file({name: transformer[name].contiguous() for name in half}, folder / shard)
    weight_map = {name: shard for shard, half in halves.items() for name in half}
    write_json(folder / INDEX, {"metadata": {}, "weight_map": weight_map})
    write_json(folder / "config.json", {"_class_name": "WanModel", "model_type": task, "dim": 256})
    torch.save(released(modules["vae"], origins("wan2.1-vae")), folder / VAE_FILE)
    torch.save(released(modules["text_encoder"], umt5_places(layers=2)), folder / T5_FILE)
    if task != "t2v":
        axes = {"visual.cls_embedding": (1, 1, 80), "visual.pos_embedding": (1, 257, 80)}
        image_encoder = released(modules["image_encoder"], clip_places(layers=3), **axes)
        other_tower = {"textual.token_embedding.weight": torch.ones(2, 2)}
        torch.save(image_encoder | other_tower, folder / CLIP_FILE)
        write_json(folder / "xlm-roberta-large/tokenizer.json", {})
    shutil.copytree(real_tokenizer("t5-json"), folder / TOKENIZER)
    (folder / "README.md").write_text("Wan")
    return folder


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    """Repositories by their names; tests do not change them."""
    made = {}

    def get(name, task) -> tuple[Path, dict[str, Any]]:
        if name not in made:
            modules = make_modules(task)
            folder = tmp_path_factory.mktemp("repository") / name
            made[name] = write_repository(folder, modules, task), modules
        return made[name]

    return get


@pytest.fixture
def repository(releases, tmp_path):
    """One of image to video, to be damaged."""
    source, _ = releases("Wan2.1-I2V-14B-720P", "i2v")
    return Path(shutil.copytree(source, tmp_path / source.name))


@pytest.mark.parametrize(
    ("name", "task", "shift"), slow_but([RELEASES[3]], [RELEASES[0], *RELEASES[3:]])
)
def test_it_makes_the_video_that_diffusers_release_makes(releases, tmp_path, name, task, shift):
    source, modules = releases(name, task)
    theirs = write_diffusers(tmp_path / "theirs", modules, shift)
    images = {"t2v": (), "i2v": ("image",), "flf2v": ("image", "last_image")}[task]
    call = CALL | {image: picture(seed) for seed, image in enumerate(images)}
    found = []
    for number, folder in enumerate((source, theirs)):
        out = tmp_path / f"out{number}"
        convert_pipeline(folder, out)
        verify_pipeline(out)
        pipe: Any = from_pretrained(out, dtype="float32")
        latents = np.asarray(pipe(**call, output_type="latent").latents)
        assert np.isfinite(latents).all()
        manifest = read_manifest(out)
        digests = {  # transformers 5 drops a prefix of CLIP's names
            name: sorted(record.sha256 for record in records.values())
            for name, records in manifest.components.items()
        }
        found.append((latents.tobytes(), digests, read_pipeline_index(out)))
    assert found[0] == found[1]
    read = {f"vae/{VAE_FILE}", f"text_encoder/{T5_FILE}", f"transformer/{SHARDS[1]}"}
    assert read <= read_manifest(tmp_path / "out0").sources.keys()


@pytest.mark.parametrize(("name", "task", "shift"), RELEASES)
def test_it_says_what_diffusers_release_says(releases, name, task, shift):
    plan = plan_conversion(releases(name, task)[0])
    texts = {file: json.loads(text) for file, text in plan.source.texts.items()}
    index = texts.pop("model_index.json")
    pipeline = getattr(diffusers, index.pop("_class_name"))
    parameters = inspect.signature(pipeline.__init__).parameters
    needed = {key for key, of in parameters.items() if of.default is of.empty} - {"self"}
    assert needed <= index.keys() <= parameters.keys()
    assert {"transformer", *(["image_encoder"] if task != "t2v" else [])} <= index.keys()
    for library, class_name in index.values():
        assert hasattr({"diffusers": diffusers, "transformers": transformers}[library], class_name)
    assert {*plan.files} >= {"tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"}

    scheduler: Any = diffusers.UniPCMultistepScheduler
    expected = scheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    found = scheduler.from_config(texts.pop("scheduler/scheduler_config.json"))
    found, expected = (
        {key: value for key, value in of.config.items() if not key.startswith("_")}
        for of in (found, expected)
    )
    assert found == expected
    if task != "t2v":
        processor: Any = transformers.CLIPImageProcessorPil
        said = texts.pop("image_processor/preprocessor_config.json")
        assert processor(**said).to_dict() == processor().to_dict()
    assert texts == {}


def test_the_name_counts_where_the_hubs_cache_has_it(repository, tmp_path):
    cache = tmp_path / "models--Wan-AI--Wan2.1-I2V-14B-720P"
    snapshot = cache / "snapshots" / ("0123456789" * 4)
    files = [file for file in repository.rglob("*") if file.is_file()]
    (cache / "blobs").mkdir(parents=True)
    for number, file in enumerate(files):
        link = snapshot / file.relative_to(repository)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file.rename(cache / "blobs" / str(number)))
    texts = plan_conversion(snapshot).source.texts
    assert json.loads(texts["scheduler/scheduler_config.json"])["flow_shift"] == 5
    elsewhere = Path(shutil.move(snapshot.parent, tmp_path / "x")) / snapshot.name
    with pytest.raises(ConversionError, match="leads out of the checkpoint's folder"):
        plan_conversion(elsewhere)


def remove(*names):
    def damage(folder):
        for name in names:
            shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()

    return damage


def put(old, new):
    return lambda folder: shutil.copyfile(folder / old, folder / new)


def link(name, target):
    def damage(folder):
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return damage


LACKING = {
    "no VAE": (remove(VAE_FILE), rf"{VAE_FILE}: is missing, the vae of this release: fetch it"),
    "no text encoder": (remove(T5_FILE), rf"{T5_FILE}: is missing, the text_encoder of this"),
    "no image encoder": (remove(CLIP_FILE), rf"{CLIP_FILE}: is missing, the image_encoder of"),
    "no tokenizer": (remove(TOKENIZER), "umt5-xxl: the tokenizer of this pipeline is missing"),
    "no second shard": (remove(SHARDS[1]), f"{SHARDS[1]}: the index lists this shard, it is miss"),
    "no index": (remove(INDEX), r"holds no diffusion_pytorch_model\.safetensors .* nor an index"),
    "no transformer": (remove(INDEX, *SHARDS), r"holds no diffusion_pytorch_model\.safetensors"),
    "a VAE elsewhere": (link(VAE_FILE, "/etc/hostname"), f"{VAE_FILE} leads out of the check"),
    "another VAE": (
        put(T5_FILE, VAE_FILE),
        f"{VAE_FILE}: is Wan's text encoder, a UMT5EncoderModel, and in .* a AutoencoderKLWan: put",
    ),
}


@pytest.mark.parametrize("case", LACKING)
def test_what_is_missing_is_named_in_one_sentence(repository, tmp_path, case):
    damage, message = LACKING[case]
    damage(repository)
    with pytest.raises(ConversionError, match=message) as found:
        convert_pipeline(repository, tmp_path / "out")
    assert str(repository) in str(found.value)
    assert "\n" not in str(found.value)
    assert not (tmp_path / "out").exists()


def test_parts_may_be_chosen_and_one_part_is_a_component_alone(repository, tmp_path):
    remove(T5_FILE)(repository)
    chosen = ["transformer", "vae"]
    convert_pipeline(repository, tmp_path / "out", components=chosen, dtype="bfloat16")
    manifest = read_manifest(tmp_path / "out")
    assert sorted(manifest.components) == chosen
    assert manifest.skipped == ("image_encoder", "text_encoder")
    with pytest.raises(ConversionError, match="no component has weights of the variant 'fp16'"):
        plan_conversion(repository, variant="fp16")
    remove(VAE_FILE, CLIP_FILE, "google")(repository)
    plan = plan_conversion(repository)
    assert [part.name for part in plan.components] == ["transformer"]
    assert plan.source.index.pipeline is None


def test_inspect_shows_it(releases):
    contents = read_contents(releases("Wan2.1-I2V-14B-720P", "i2v")[0])
    assert (contents.pipeline, contents.converted) == ("WanImageToVideoPipeline", False)
    assert [part.release for part in contents.components] == [
        "Wan's image encoder",
        "Wan's text encoder",
        "Wan's transformer",
        "Wan 2.1's VAE",
    ]
    assert contents.others.keys() == {*COPIED} - {"tokenizer_2"}


@pytest.mark.parametrize(("task", "boundary"), [("t2v", 0.875), ("i2v", 0.9)])
def test_wan_22_has_two_transformers(releases, tmp_path, task, boundary):
    source, _ = releases("Wan2.1-T2V-1.3B", "t2v")
    folder = Path(shutil.copytree(source, tmp_path / "Wan2.2-A14B"))
    channels: dict[str, Any] = {"in_channels": 36} if task == "i2v" else {}
    places = origins("wan2.1-t2v-1.3b-transformer")
    remove(INDEX, "config.json", *SHARDS)(folder)
    for seed, name in enumerate(("high_noise_model", "low_noise_model")):
        (folder / name).mkdir()
        module = randomised(diffusers.WanTransformer3DModel(**TRANSFORMER, **channels), seed)
        save_file(released(module, places), folder / name / "diffusion_pytorch_model.safetensors")
    convert_pipeline(folder, tmp_path / "out")
    index = json.loads((tmp_path / "out/model_index.json").read_text())
    assert index["boundary_ratio"] == boundary
    assert index["_class_name"] == f"Wan{'ImageToVideo' if task == 'i2v' else ''}Pipeline"
    parts = read_manifest(tmp_path / "out").components
    assert sorted(parts) == ["text_encoder", "transformer", "transformer_2", "vae"]
    assert parts["transformer"] != parts["transformer_2"]
    with pytest.raises(ValueError, match=r"is a Wan 2\.2 of two transformers"):
        from_pretrained(tmp_path / "out")
    remove("low_noise_model")(folder)
    with pytest.raises(ConversionError, match="low_noise_model: is missing, the transformer_2 of"):
        plan_conversion(folder)


def test_wan_22_has_another_vae_and_times_by_token(releases, tmp_path):
    source, _ = releases("Wan2.1-T2V-1.3B", "t2v")
    folder = Path(shutil.copytree(source, tmp_path / "Wan2.2-TI2V-5B"))
    remove(VAE_FILE)(folder)
    config = load("inventory", "wan2.2-ti2v-5b-vae")["config"]
    vae = diffusers.AutoencoderKLWan(**config | {"base_dim": 4, "decoder_base_dim": 6})
    places = load("original", "wan22_vae_renames")["targets"]
    torch.save(released(randomised(vae, 0), places), folder / "Wan2.2_VAE.pth")
    plan = plan_conversion(folder)
    texts = {name: json.loads(text) for name, text in plan.source.texts.items()}
    assert texts["model_index.json"]["expand_timesteps"] is True
    assert texts["model_index.json"]["_class_name"] == "WanPipeline"
    assert texts["scheduler/scheduler_config.json"]["flow_shift"] == 5
    (part,) = (part for part in plan.components if part.name == "vae")
    assert json.loads(part.config_text)["is_residual"] is True
