"""LoRAs for the second transformer of Wan 2.2: equal to diffusers' `load_into_transformer_2`.

diffusers reads names of the first transformer for either, and drops those of "transformer_2.".
"""

import json
import re
from typing import Any

import diffusers
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny_lora import (
    FAMILIES,
    WAN_NAMES,
    WEIGHTS,
    Q,
    random_lora,
    renamed,
    save_lora,
    weights_of,
    write_source,
)
from typer.testing import CliRunner

from svg_jax.cli.app import app
from svg_jax.convert import (
    ConversionError,
    convert_pipeline,
    export_pipeline,
    plan_conversion,
    read_manifest,
    verify_pipeline,
)

BOTH = ("transformer", "transformer_2")
MODULES = FAMILIES["Wan"][-1]


@pytest.fixture
def source(tmp_path):
    """A pipeline's folder with two random transformers."""
    folder = write_source(tmp_path / "source")
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer_2"] = index["transformer"]
    (folder / "model_index.json").write_text(json.dumps(index))
    torch.manual_seed(1)
    model = diffusers.WanTransformer3DModel(**FAMILIES["Wan"][2])
    model.save_pretrained(folder / "transformer_2")
    return folder


def weights_file(name):
    return WEIGHTS.replace("transformer", name, 1)


def fuse(source, *loras, scale=1.0):
    """The weights of both that diffusers makes of (file, component) pairs, in float32."""
    models = {
        name: diffusers.WanTransformer3DModel.from_pretrained(
            source / name, torch_dtype=torch.float32
        )
        for name in BOTH
    }
    parts: dict[str, Any] = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    parts.update(models, boundary_ratio=0.875)
    pipe = diffusers.WanPipeline(**parts)
    for number, (file, name) in enumerate(loras):
        second = name == "transformer_2"
        pipe.load_lora_weights(file, adapter_name=str(number), load_into_transformer_2=second)
    pipe.fuse_lora(components=list(BOTH), lora_scale=scale)
    pipe.unload_lora_weights()
    return {name: weights_of(model) for name, model in models.items()}


def merge(source, *loras, **options):
    """The weights of both after conversion, by diffusers' names; verifies it."""
    folder = source.parent
    into = [name for _, name in loras]
    files = [file for file, _ in loras]
    convert_pipeline(source, folder / "out", lora=files, lora_into=into, **options)
    verify_pipeline(folder / "out")
    export_pipeline(folder / "out", folder / "back")
    return {name: load_file(folder / "back" / weights_file(name)) for name in BOTH}


def assert_merged(found, expected, source, changed):
    """As equal as float32 sums are, and changed in as many tensors of each as expected."""
    for name in BOTH:
        base = load_file(source / weights_file(name))
        assert found[name].keys() == expected[name].keys() == base.keys()
        for key, tensor in found[name].items():
            wanted = expected[name][key]
            np.testing.assert_allclose(tensor, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())
        differ = [key for key in base if not np.array_equal(found[name][key], base[key])]
        assert len(differ) == changed[name]


def test_a_file_each_with_its_config(tmp_path, source):
    files = []
    for name, modules, rank in (("high", MODULES, 4), ("low", MODULES[2:], 3)):
        config = {"r": rank, "lora_alpha": 6, "target_modules": list(modules)}
        lora = random_lora(source, modules, ranks=(rank,))
        files.append(save_lora(tmp_path / f"{name}.safetensors", lora, **config))
    first, second = files
    loras = (first, "transformer"), (second, "transformer_2")
    found = merge(source, *loras, lora_scale=0.7)
    count = {"transformer": len(MODULES), "transformer_2": len(MODULES) - 2}
    assert_merged(found, fuse(source, *loras, scale=0.7), source, count)
    recorded = [(lora.source, lora.into) for lora in read_manifest(tmp_path / "out").loras]
    assert recorded == [("high.safetensors", "transformer"), ("low.safetensors", "transformer_2")]


@pytest.mark.parametrize("kohya", [False, True])
def test_names_of_the_first_release(tmp_path, source, kohya):
    names = {a: b.replace(".", "_") if kohya else b for a, b in WAN_NAMES.items()}
    lora = renamed(random_lora(source, names), names)
    lora |= {f"{name}.alpha": np.array(3, np.float32) for name in names.values()}
    prefix = "lora_unet_" if kohya else "diffusion_model."
    file = save_lora(tmp_path / "lora.safetensors", lora, prefix)
    expected = fuse(source, (file, "transformer_2"))
    found = merge(source, (file, "transformer_2"))
    assert_merged(found, expected, source, {"transformer": 0, "transformer_2": len(names)})


def test_one_file_into_both(tmp_path, source):
    file = save_lora(tmp_path / "lora.safetensors", random_lora(source, MODULES))
    loras = [(file, name) for name in BOTH]
    found, expected = merge(source, *loras), fuse(source, *loras)
    assert_merged(found, expected, source, dict.fromkeys(BOTH, len(MODULES)))


def test_one_file_that_names_both(tmp_path, source):
    parts = {}
    for number, name in enumerate(BOTH):
        modules = MODULES[number:]
        config = {"r": 4, "lora_alpha": 2 + number, "target_modules": list(modules)}
        lora = random_lora(source, modules)
        parts[name] = save_lora(tmp_path / f"{name}.safetensors", lora, **config)
    expected = fuse(source, *((file, name) for name, file in parts.items()))
    tensors, config = {}, {}
    for number, (name, file) in enumerate(parts.items()):
        config |= {f"{name}.r": 4, f"{name}.lora_alpha": 2 + number}
        for key, tensor in load_file(file).items():
            tensors[key.replace("transformer", name, 1)] = tensor
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    save_file(tensors, tmp_path / "both.safetensors", metadata)
    found = merge(source, (tmp_path / "both.safetensors", "transformer"))
    count = {"transformer": len(MODULES), "transformer_2": len(MODULES) - 1}
    assert_merged(found, expected, source, count)


def test_what_a_killed_run_merged_into_the_other_is_not_kept(tmp_path, source):
    file = save_lora(tmp_path / "lora.safetensors", random_lora(source, MODULES))
    convert_pipeline(source, tmp_path / "out", lora=file)
    (tmp_path / "out").rename(tmp_path / ".out.partial")
    found = merge(source, (file, "transformer_2"))
    expected = fuse(source, (file, "transformer_2"))
    assert_merged(found, expected, source, {"transformer": 0, "transformer_2": len(MODULES)})


def test_the_second_alone(tmp_path, source):
    file = save_lora(tmp_path / "lora.safetensors", random_lora(source, [Q]))
    options = {"lora": file, "components": ("transformer_2",)}
    plan = plan_conversion(source, lora_into="transformer_2", **options)
    assert plan.loras[0].changes["transformer_2"].keys() == {f"{Q}.weight"}
    with pytest.raises(
        ConversionError, match=r"is for the transformer, and .* is transformer_2: choose"
    ):
        plan_conversion(source, **options)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("diffusion_model.transformer_1.", "diffusion_model.transformer_2."),
        ("pipe.dit.", "pipe.dit2."),
    ],
)
def test_trainers_names_of_both(tmp_path, source, first, second):
    lora = random_lora(source, [Q, "proj_out"])
    tensors = {f"{first}{name}": tensor for name, tensor in lora.items() if Q in name}
    tensors |= {f"{second}{name}": tensor for name, tensor in lora.items() if Q not in name}
    save_file(tensors, tmp_path / "both.safetensors")
    (plan,) = plan_conversion(source, lora=tmp_path / "both.safetensors", strict=True).loras
    found = {name: set(changes) for name, changes in plan.changes.items()}
    assert found == {"transformer": {f"{Q}.weight"}, "transformer_2": {"proj_out.weight"}}
    # A pipeline with one transformer takes what is for it, and says what is not.
    (plan,) = plan_conversion(
        source, lora=tmp_path / "both.safetensors", components=["transformer"]
    ).loras
    assert plan.changes.keys() == {"transformer"}
    assert plan.skipped == ("transformer_2.proj_out",)


def test_the_command_line_says_which(tmp_path, source):
    files = [tmp_path / f"{name}.safetensors" for name in BOTH]
    arguments = ["convert", str(source), str(tmp_path / "out"), "--dry-run"]
    for file, name in zip(files, BOTH, strict=True):
        save_lora(file, random_lora(source, [Q]))
        arguments += ["--lora", str(file), "--lora-into", name]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    merged = re.findall(r"merges \S+/(\w+).safetensors .* into 1 tensors of (\w+)", result.output)
    assert merged == [(name, name) for name in BOTH]


@pytest.mark.parametrize(
    ("names", "into", "message"),
    [
        ("transformer.", "transformer_3", "meant for the component 'transformer_3' .* are "),
        ("transformer.", BOTH, "2 components for 1 LoRAs"),
        ("transformer_2.blocks.9.", "transformer", r"no transformer_2.blocks.\*.blocks.\*.attn1"),
        ("transformer_3.", "transformer_2", r"no transformer_3.blocks.\*.attn1.to_q: .* another m"),
    ],
)
def test_what_fits_nothing_is_refused(tmp_path, source, names, into, message):
    file = save_lora(tmp_path / "lora.safetensors", random_lora(source, [Q]), names)
    with pytest.raises(ConversionError, match=message) as caught:
        convert_pipeline(source, tmp_path / "out", lora=file, lora_into=into)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_pipeline_with_one_transformer_refuses_the_other_ones(tmp_path):
    source = write_source(tmp_path / "single", dtype=ml_dtypes.bfloat16)
    lora = random_lora(source, [Q])
    file = save_lora(tmp_path / "lora.safetensors", lora, "transformer_2.")
    with pytest.raises(ConversionError, match=r"nothing .* no transformer_2.blocks.\*.attn1"):
        plan_conversion(source, lora=file)
    file = save_lora(tmp_path / "lora.safetensors", lora)
    with pytest.raises(
        ConversionError, match=r"'transformer_2' and those that are .* transformer:"
    ):
        plan_conversion(source, lora=file, lora_into="transformer_2")
