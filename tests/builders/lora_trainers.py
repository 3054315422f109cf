"""LoRAs of whole tiny models, by the rules that the trainers' own code has (see docs/lora.md).

What each rule gives is compared with base + scale · alpha / rank · B A, computed here in float32
on the weights as a release has them; diffusers' conversion of the release says where each row is.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import ml_dtypes
import numpy as np
import torch
from originals import as_released, origins
from safetensors.numpy import load_file, save_file
from tiny_lora import FAMILIES, WEIGHTS, write_source

from svg_jax.convert import plan_conversion
from svg_jax.convert.lora.change import add_changes

RELEASES = {"Wan": "wan2.1-i2v-14b-transformer", "HunyuanVideo": "hunyuanvideo-t2v-transformer"}
WAN_BLOCKS = r"blocks\.\d+\.(self_attn\.[qkvo]|cross_attn\.([qkvo]|[kv]_img)|ffn\.[02])"
HUNYUAN_BLOCKS = r"(double|single)_blocks\..*(attn_qkv|attn_proj|fc[12]|linear[12])"
BLOCKS = r".*blocks\.\d+\.(?!.*norm).*"  # of diffusers
ATTENTION = r".*(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
LINEAR = r".*"
# ComfyUI's names of HunyuanVideo, from its supported_models.py.
COMFYUI = (
    (r"(img|txt)_mod\.linear", r"\1_mod.lin"),
    (r"(img|txt|self)_attn_(qkv|proj)", r"\1_attn.\2"),
    (r"mlp\.fc1", "mlp.0"),
    (r"mlp\.fc2", "mlp.2"),
    (r"\.modulation\.linear", ".modulation.lin"),
    (r"(time_in|guidance_in)\.mlp\.0", r"\1.in_layer"),
    (r"(time_in|guidance_in)\.mlp\.2", r"\1.out_layer"),
    (r"t_embedder\.mlp\.0", "t_embedder.in_layer"),
    (r"t_embedder\.mlp\.2", "t_embedder.out_layer"),
    (r"c_embedder\.linear_1", "c_embedder.in_layer"),
    (r"c_embedder\.linear_2", "c_embedder.out_layer"),
)


def flat(prefix: str) -> Callable[[str], str]:
    """Names with underscores alone."""
    return lambda module: prefix + module.replace(".", "_")


def dotted(prefix: str) -> Callable[[str], str]:
    """Names as they are."""
    return lambda module: prefix + module


def comfyui(module: str) -> str:
    """A released name of HunyuanVideo as ComfyUI has it."""
    for pattern, new in COMFYUI:
        module = re.sub(pattern, new, module)
    return "diffusion_model." + module


def sat(module: str) -> str:
    """A name of CogVideoX's attention in SAT."""
    _, block, _, part, *_ = module.split(".")
    place = {"to_q": "query_key_value.{}.0", "to_k": "query_key_value.{}.1"}
    place |= {"to_v": "query_key_value.{}.2", "to_out": "dense.{}.0"}
    return f"model.diffusion_model.transformer.layers.{block}.attention.{place[part]}"


@dataclass(frozen=True)
class Trainer:
    """How a trainer writes a LoRA.

    Attributes:
        family: The model.
        trains: Pattern of the modules with a matrix that it changes.
        name: What it calls a module; `{}` in it stands for `down` or `up`.
        down: What follows the name for A.
        up: What follows the name for B.
        alpha: What it stores as alpha.
        assumed: Alpha where that is not stored; None is the rank.
        dtype: Dtype of the matrices.
        released: Whether modules have the names of the first release.
        differences: Whether all else is stored as differences, as LightX2V does.
        core: Whether a convolution has a core of its own, as LyCORIS' Tucker decomposition has.
        config: What PEFT's adapter_config.json beside it says.
        file: The file's name.
    """

    family: str
    trains: str
    name: Callable[[str], str]
    down: str = ".lora_A.weight"
    up: str = ".lora_B.weight"
    alpha: Any = None
    assumed: float | None = None
    dtype: Any = np.float32
    released: bool = False
    differences: bool = False
    core: bool = False
    config: Mapping | None = None
    file: str = "lora.safetensors"


KOHYA: dict[str, Any] = {"down": ".lora_down.weight", "up": ".lora_up.weight"}
DEFAULT: dict[str, Any] = {"down": ".lora_A.default.weight", "up": ".lora_B.default.weight"}
PEFT: dict[str, Any] = {"file": "adapter_model.safetensors", "config": {"r": 4, "lora_alpha": 4}}
TRAINERS = {
    "diffusers, CogVideoX": Trainer("CogVideoX", ATTENTION, dotted("transformer.")),
    "diffusers, HunyuanVideo": Trainer("HunyuanVideo", ATTENTION, dotted("transformer.")),
    "diffusers, Wan": Trainer("Wan", ATTENTION, dotted("transformer.")),
    "musubi-tuner, Wan": Trainer(
        "Wan", WAN_BLOCKS, flat("lora_unet_"), alpha=np.array(2), released=True, **KOHYA
    ),
    "musubi-tuner, HunyuanVideo": Trainer(
        "HunyuanVideo",
        HUNYUAN_BLOCKS,
        flat("lora_unet_"),
        alpha=np.array(1.0),
        released=True,
        **KOHYA,
    ),
    "musubi-tuner, FramePack": Trainer(
        "HunyuanVideo", BLOCKS, flat("lora_unet_"), alpha=np.array(4, np.int32), **KOHYA
    ),
    "diffusion-pipe, Wan": Trainer(
        "Wan", WAN_BLOCKS, dotted("diffusion_model."), released=True, **PEFT
    ),
    "diffusion-pipe, HunyuanVideo": Trainer(
        "HunyuanVideo", r"(double|single)_.*", dotted("transformer."), released=True, **PEFT
    ),
    "ai-toolkit, Wan": Trainer("Wan", WAN_BLOCKS, dotted("diffusion_model."), released=True),
    "DiffSynth-Studio": Trainer("Wan", WAN_BLOCKS, dotted(""), released=True, **DEFAULT),
    "DiffSynth-Studio, with its prefix": Trainer(
        "Wan", WAN_BLOCKS, dotted("pipe.dit."), released=True, **DEFAULT
    ),
    "VideoX-Fun, Wan": Trainer(
        "Wan", LINEAR, flat("lora_unet__"), alpha=np.array(2, np.float16), released=True, **KOHYA
    ),
    "VideoX-Fun, CogVideoX": Trainer(
        "CogVideoX", LINEAR, flat("lora_unet__"), alpha=np.array(2, ml_dtypes.bfloat16), **KOHYA
    ),
    "HunyuanVideo-I2V": Trainer(
        "HunyuanVideo",
        r".*(\.linear|fc1|fc2|attn_qkv|attn_proj|linear1|linear2)",
        flat("Hunyuan_video_I2V_lora_"),
        alpha=np.array(4, ml_dtypes.bfloat16),
        dtype=ml_dtypes.bfloat16,
        released=True,
        **KOHYA,
    ),
    "LightX2V": Trainer(
        "Wan", LINEAR, dotted("diffusion_model."), released=True, differences=True, **KOHYA
    ),
    "SAT": Trainer(
        "CogVideoX",
        r".*attn1\.(to_[qkv]|to_out\.0)",
        sat,
        down="matrix_A",
        up="matrix_B",
        assumed=1.0,
        file="mp_rank_00_model_states.pt",
    ),
    "ComfyUI, HunyuanVideo": Trainer(
        "HunyuanVideo", LINEAR, comfyui, dtype=np.float16, released=True, **KOHYA
    ),
    "LyCORIS": Trainer("Wan", LINEAR, flat("lycoris_"), alpha=np.array(2.0), core=True, **KOHYA),
    "OneTrainer": Trainer(
        "HunyuanVideo", BLOCKS, flat("lora_transformer_"), alpha=np.array(1.0), **KOHYA
    ),
    "SimpleTuner, for ComfyUI": Trainer(
        "CogVideoX", ATTENTION, dotted("diffusion_model."), alpha=np.array(8.0, np.float32)
    ),
}


@dataclass(frozen=True)
class Written:
    """A file, and what each weight of the model is changed by at a strength of 1."""

    path: Path
    tensors: dict[str, np.ndarray]
    changes: dict[str, np.ndarray]


def write(trainer: Trainer, source, folder, rank=4) -> Written:
    """Write a LoRA of all the modules that a trainer changes.

    Args:
        trainer: The trainer.
        source: Folder of the pipeline.
        folder: Folder that is made.
        rank: Rank of all its matrices.
    """
    random = np.random.default_rng(7)
    base = load_file(source / WEIGHTS)
    shapes: dict[str, Any] = {name: tensor.shape for name, tensor in base.items()}
    if trainer.released:
        state = {name: torch.from_numpy(tensor) for name, tensor in base.items()}
        shapes = {n: tuple(t.shape) for n, t in as_released(state, places(trainer.family)).items()}
    tensors, changes = {}, {}

    def draw(*shape):
        return (0.3 * random.normal(size=shape)).astype(trainer.dtype)

    for tensor, shape in shapes.items():
        module, _, leaf = tensor.rpartition(".")
        is_matrix = leaf == "weight" and len(shape) > 1
        is_conv = len(shape) > 2
        if is_matrix and re.fullmatch(trainer.trains, module) and (not is_conv or trainer.core):
            name = trainer.name(module)
            up = draw(shape[0], rank, *[1] * (len(shape) - 2))
            down = draw(rank, shape[1], *([1] * len(shape[2:]) if trainer.core else shape[2:]))
            inner = down.astype(np.float32).reshape(rank, -1)
            if is_conv:
                tensors[f"{name}.lora_mid.weight"] = core = draw(rank, rank, *shape[2:])
                inner = np.einsum("ab...,bi->ai...", core.astype(np.float32), inner)
            product = up.astype(np.float32).reshape(-1, rank) @ inner.reshape(rank, -1)
            alpha = trainer.alpha if trainer.alpha is not None else trainer.assumed
            alpha = (trainer.config or {}).get("lora_alpha", rank if alpha is None else alpha)
            changes[tensor] = (float(alpha) / rank * product).reshape(shape).astype(np.float32)
            numbered = "{}" in name
            tensors[name.format(trainer.down) if numbered else name + trainer.down] = down
            tensors[name.format(trainer.up) if numbered else name + trainer.up] = up
            if trainer.alpha is not None:
                tensors[f"{name}.alpha"] = trainer.alpha
        elif trainer.differences or (trainer.core and "norm" in module):
            suffixes = {"weight": ".diff", "bias": ".diff_b", "modulation": ".diff_m"}
            if trainer.core:
                suffixes = {"weight": ".w_norm", "bias": ".b_norm"}
            tensors[trainer.name(module) + suffixes[leaf]] = change = draw(*shape)
            changes[tensor] = change.astype(np.float32)
    if trainer.released:
        changes = by_diffusers_names(changes, base, trainer.family)
    folder.mkdir()
    path = folder / trainer.file
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"module": {n: torch.from_numpy(t) for n, t in tensors.items()}}, path)
    if trainer.config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(trainer.config))
        path = folder
    return Written(path, tensors, changes)


@cache
def places(family):
    """Where diffusers' tensors lie in a release."""
    return origins(RELEASES[family])


def by_diffusers_names(changes, base, family):
    """What is given on the weights of a release, on diffusers'."""
    labels, count = {}, 0
    for name, tensor in base.items():
        labels[name] = torch.arange(count, count + len(tensor))
        count += len(tensor)
    rows: dict[int, np.ndarray] = {}
    for name, of in as_released(labels, places(family)).items():
        if name in changes:
            rows |= dict(zip(of.tolist(), changes[name], strict=True))
    found = {}
    for name, label in labels.items():
        if int(label[0]) in rows:
            found[name] = np.stack([rows[int(row)] for row in label]).reshape(base[name].shape)
    return found


def write_sources(folder):
    """Write a pipeline's folder of each family, and one of Wan without image layers."""
    found = {family: write_source(folder / family, family) for family in FAMILIES}
    found["text to video"] = write_source(folder / "text", "Wan")
    absent = ("image_dim", "added_kv_proj_dim")
    config = {key: value for key, value in FAMILIES["Wan"][2].items() if key not in absent}
    torch.manual_seed(0)
    diffusers.WanTransformer3DModel(**config).save_pretrained(folder / "text/transformer")
    return found


def merged(source, lora, **options):
    """The weights that a LoRA changes, by diffusers' names, and what it is planned as."""
    plan = plan_conversion(source, lora=lora, **options)
    (found,) = plan.loras
    base = load_file(source / WEIGHTS)
    changes = found.changes["transformer"]
    return {name: add_changes(base[name], of) for name, of in changes.items()}, found


def assert_merged(found, changes, source, scale=1.0):
    """Whether just these weights are changed, by just so much."""
    base = load_file(source / WEIGHTS)
    assert found.keys() == changes.keys()
    for name, tensor in found.items():
        wanted = base[name] + np.float32(scale) * changes[name]
        assert not np.array_equal(wanted, base[name])
        np.testing.assert_allclose(tensor, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


def save(folder, lora, suffix):
    """A file of safetensors or torch.save."""
    file = folder / f"lora.{suffix}"
    if suffix.lower() == "safetensors":
        save_file(lora, file)
    else:
        state = {n: torch_tensor(t) for n, t in lora.items()}
        torch.save(state, file)
    return file


def torch_tensor(array):
    """A torch tensor of numpy's, also of types that torch alone has a name for."""
    if array.dtype.name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        width = {1: np.uint8, 2: np.int16}[array.dtype.itemsize]
        return torch.from_numpy(array.view(width).copy()).view(getattr(torch, array.dtype.name))
    return torch.from_numpy(array)
