"""How often a conversion opens each of its source's files: once to plan, and to copy."""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from originals import as_released, origins
from safetensors.numpy import load_file, save_file
from tiny_lora import Q, random_lora, save_lora
from tiny_lora import write_source as write_wan
from tiny_source import ENCODER_FILE, TRANSFORMER_FILE, write_json, write_source

from svg_jax.convert import ConversionSettings, LoraSource, make_plan, read_contents, write_plan

# Sizes that a release's tensors tell; its heads always have 128.
WAN: dict[str, Any] = {
    "num_attention_heads": 1,
    "text_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
}
_WATCHED: list[tuple[Path, Counter[str]]] = []


def _note(event: str, arguments) -> None:
    if event == "open" and _WATCHED and isinstance(arguments[0], str | bytes | Path):
        folder, found = _WATCHED[-1]
        file = Path(str(arguments[0]))
        if file.is_relative_to(folder) and not file.is_dir():
            found[file.relative_to(folder).as_posix()] += 1


@pytest.fixture(scope="module", autouse=True)
def _hook() -> None:
    sys.addaudithook(_note)  # which stays, and notes nothing outside of `opens`


@contextmanager
def opens(folder: Path) -> Iterator[Counter[str]]:
    """Count the opens of each file of a folder."""
    found: Counter[str] = Counter()
    _WATCHED.append((folder, found))
    try:
        yield found
    finally:
        _WATCHED.pop()


def counted(source: Path, tmp_path: Path, **settings) -> tuple[Counter[str], Counter[str]]:
    """Opens of the source's folder while a conversion is planned, and while it is written."""
    folder = source if source.is_dir() else source.parent
    made = ConversionSettings(source=source, destination=tmp_path / "out", **settings)
    with opens(folder) as planned:
        plan = make_plan(made)
    with opens(folder) as written:
        write_plan(plan)
    return planned, written


def shard(file: Path) -> list[Path]:
    """Put a file's tensors into two shards and an index."""
    tensors = load_file(file)
    shards = [file.with_name(f"model-0000{number}-of-00002.safetensors") for number in (1, 2)]
    weight_map = {}
    for number, part in enumerate(shards):
        half = {name: tensors[name] for name in sorted(tensors)[number::2]}
        save_file(half, part)
        weight_map |= dict.fromkeys(half, part.name)
    write_json(file.with_name("model.safetensors.index.json"), {"weight_map": weight_map})
    file.unlink()
    return shards


def test_a_folder_of_diffusers_with_shards(tmp_path):
    source = write_source(tmp_path / "source")
    shards = shard(source / ENCODER_FILE)
    index = "text_encoder/model.safetensors.index.json"
    planned, written = counted(source, tmp_path)
    whole = ("model_index.json", "scheduler/scheduler_config.json")
    configs = ("transformer/config.json", "text_encoder/config.json")
    weights = (TRANSFORMER_FILE, *(f"text_encoder/{file.name}" for file in shards))
    assert planned == dict.fromkeys((*whole, *configs, index, *weights), 1)
    tensors = {file: 1 + len(load_file(source / file)) for file in weights}
    small = dict.fromkeys((*whole, "tokenizer/tokenizer.json"), 1)
    assert written == {**small, index: 1, **tensors}
    with opens(source) as inspected:
        read_contents(source)
    assert inspected == dict.fromkeys(("model_index.json", *configs, index, *weights), 1)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_release_in_one_file(tmp_path, suffix):
    torch.manual_seed(0)
    state = diffusers.WanTransformer3DModel(**WAN).state_dict()
    places = origins("wan2.1-t2v-1.3b-transformer")
    released = as_released({name: state[name] for name in places}, places)
    source = tmp_path / "release" / f"wan.{suffix}"
    write_json(source.with_name("config.json"), {"_class_name": "WanModel", "dim": 256})
    tensors = {name: of.contiguous() for name, of in released.items()}
    if suffix == "pth":
        torch.save(tensors, source)
    else:
        save_file({name: of.numpy() for name, of in tensors.items()}, source)
    planned, written = counted(source, tmp_path)
    assert planned == {source.name: 1, "config.json": 1}
    assert written == {source.name: 1 + len(tensors)}


@pytest.mark.parametrize("kind", ["diffusers", "peft"])
def test_a_lora(tmp_path, kind):
    source = write_wan(tmp_path / "source")
    name = "adapter_model" if kind == "peft" else "pytorch_lora_weights"
    folder = tmp_path / "lora"
    if kind == "peft":
        save_lora(folder / f"{name}.safetensors", random_lora(source, [Q]), "base_model.model.")
        (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    else:
        save_lora(folder / f"{name}.safetensors", random_lora(source, [Q]), r=4, lora_alpha=8)
    settings = ConversionSettings(
        source=source, destination=tmp_path / "out", loras=(LoraSource(folder, 0.5),)
    )
    with opens(folder) as planned:
        plan = make_plan(settings)
    with opens(folder) as written:
        write_plan(plan)
    config = {"adapter_config.json": 1} if kind == "peft" else {}
    assert planned == {f"{name}.safetensors": 1, **config}
    # For the manifest's digests, and A and B where they are multiplied.
    assert written == {f"{name}.safetensors": 3, **config}
    (lora,) = plan.loras
    assert {name: len(of) for name, of in lora.changes["transformer"].items()} == {f"{Q}.weight": 1}
    assert np.isclose(lora.changes["transformer"][f"{Q}.weight"][0].scale, 0.5 * 8 / 4)
