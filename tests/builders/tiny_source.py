"""A small pipeline's folder in diffusers' layout, for tests of the converter to change."""

import hashlib
import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file
from tiny_configs import COGVIDEOX, T5

from svg_jax.convert.tables import cogvideox, t5
from svg_jax.models import CogVideoXConfig, T5Config

TRANSFORMER = {"_class_name": "CogVideoXTransformer3DModel", **COGVIDEOX}
TEXT_ENCODER = {"model_type": "t5", "dtype": "float16", **T5}
INDEX = {
    "_class_name": "CogVideoXPipeline",
    "scheduler": ["diffusers", "CogVideoXDDIMScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
    "vae": [None, None],
}
WITH_VAE = {"vae": ["diffusers", "AnotherVAE"]}
TRANSFORMER_FILE = "transformer/diffusion_pytorch_model.safetensors"
ENCODER_FILE = "text_encoder/model.safetensors"
RULES = {
    "transformer": cogvideox.rules(CogVideoXConfig.from_dict(TRANSFORMER)),
    "text_encoder": t5.rules(T5Config.from_dict(TEXT_ENCODER)),
}


def random_state(component, dtype):
    """What the component's table asks for, of two layers, by the sources' names."""
    random = np.random.default_rng(0)
    shapes = {
        rule.source.replace("{layer}", str(layer)): rule.source_shape
        for rule in RULES[component]
        for layer in range(2 if rule.stacked else 1)
    }
    return {name: random.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def write_json(file: Path, values: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values, indent=2))


def write_source(folder: Path) -> Path:
    write_json(folder / "model_index.json", INDEX)
    write_json(folder / "transformer/config.json", TRANSFORMER)
    write_json(folder / "text_encoder/config.json", TEXT_ENCODER)
    scheduler = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    write_json(folder / "scheduler/scheduler_config.json", scheduler)
    write_json(folder / "tokenizer/tokenizer.json", {})
    save_file(random_state("transformer", ml_dtypes.bfloat16), folder / TRANSFORMER_FILE)
    save_file(random_state("text_encoder", np.float16), folder / ENCODER_FILE)
    return folder


def change_tensors(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }
