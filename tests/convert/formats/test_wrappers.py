"""Weights as trainers, compilers and other programs leave them: under keys, behind prefixes."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from tiny_source import ENCODER_FILE, TEXT_ENCODER, random_state, write_json, write_source

from svg_jax.cli import checkpoints
from svg_jax.convert import (
    ConversionError,
    convert_pipeline,
    export_pipeline,
    plan_conversion,
    read_contents,
    read_manifest,
)
from svg_jax.convert.formats.stored_tensor import read_tensor
from svg_jax.convert.formats.wrappers import WRAPPERS

GOLDEN = json.loads((Path(__file__).parents[2] / "data/original/wan_encoders.json").read_text())[
    "umt5"
]
MARK = "blocks.0.pos_embedding.embedding.weight"  # of Wan's text encoder as released
FIRST = "encoder.block.0.layer.0.SelfAttention.q.weight"  # of a T5 as transformers names it


def released(seed=0) -> dict[str, np.ndarray]:
    """Wan's text encoder by its authors' names, which tell all of its config."""
    random = np.random.default_rng(seed)
    return {n: random.normal(size=s).astype(np.float32) for n, s in GOLDEN["shapes"].items()}


def ours() -> dict[str, np.ndarray]:
    """A T5 by transformers' names, which needs a config.json."""
    return random_state("text_encoder", np.float16)


def write(file: Path, held) -> Path:
    """A file of safetensors, or of torch.save, and the config.json of a T5."""
    file.parent.mkdir(exist_ok=True)
    if file.suffix in (".safetensors", ".sft"):
        save_file(held, file)
    else:
        torch.save(as_torch(held), file)
    write_json(file.parent / "config.json", {"architectures": ["T5EncoderModel"], **TEXT_ENCODER})
    return file


def as_torch(held):
    if isinstance(held, dict):
        return {name: as_torch(of) for name, of in held.items()}
    return torch.from_numpy(held) if isinstance(held, np.ndarray) else held


def planned(source, **options) -> dict[str, np.ndarray]:
    """The values that a component's conversion would write, by the names of its class."""
    (component,) = plan_conversion(source, **options).components
    return {name: read_tensor(tensor) for name, tensor in component.tensors.items()}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def plain(tmp_path, tensors):
    return planned(write(tmp_path / "plain/a.safetensors", tensors))


PREFIXES = [
    *("module.", "_orig_mod.", "model.", "diffusion_model.", "model.diffusion_model."),
    *("pipe.dit.", "module._orig_mod.", "_forward_module.module.", "transformer.", "net."),
    *("first_stage_model.", "text_encoders.umt5xxl.transformer.", "generator.model."),
]


@pytest.mark.parametrize("tensors", [released(), ours()], ids=["released", "ours"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_one_prefix_before_all_names_is_taken_off(tmp_path, tensors, suffix):
    expected = plain(tmp_path, tensors)
    for prefix in PREFIXES:
        wrapped = {prefix + name: array for name, array in tensors.items()}
        same(planned(write(tmp_path / f"a{suffix}", wrapped)), expected)


@pytest.mark.parametrize("inner", ["_orig_mod", "_checkpoint_wrapped_module"])
def test_compilers_modules_around_layers_are_taken_off(tmp_path, inner):
    for tensors in (released(), ours()):
        wrapped = {}
        for name, array in tensors.items():
            for block in ("blocks.0.", "block.0."):
                name = (
                    name.replace(block, f"{block}{inner}.") if f".{block}" in f".{name}" else name
                )
            wrapped[f"module.{name}"] = array
        assert any(inner in name for name in wrapped)
        same(planned(write(tmp_path / "a.ckpt", wrapped)), plain(tmp_path, tensors))


KEYS = [
    *(["module"], ["state_dict"], ["model"], ["model_state_dict"], ["ema"], ["generator_ema"]),
    *(["generator"], ["dit"], ["net"], ["params_ema"], ["state_dict", "model"]),
    ["model", "ema", "module"],
]


@pytest.mark.parametrize("tensors", [released(), ours()], ids=["released", "ours"])
def test_keys_lead_to_weights_with_whatever_a_trainer_saved_beside(tmp_path, tensors):
    expected = plain(tmp_path, tensors)
    beside = {"step": 3, "epoch": 1.5, "name": "run", "done": True, "none": None}
    beside |= {"optimizer": {"state": {0: np.ones(2)}}, "global_step": np.int64(3)}
    for keys in KEYS:
        held = {f"model.{name}": array for name, array in tensors.items()}
        for key in reversed(keys):
            held = {key: held, **beside}
        same(planned(write(tmp_path / "a.pth", held)), expected)
    same(planned(write(tmp_path / "a.bin", {**tensors, **beside})), expected)


CHOICES = {
    "keys of torch.save": lambda a, b: {"model": a, "ema": b, "step": 2},
    "keys under a key": lambda a, b: {"state_dict": {"model": a, "ema": b}},
    "prefixes": lambda a, b: {
        **{f"model.{name}": array for name, array in a.items()},
        **{f"ema.{name}": array for name, array in b.items()},
    },
    "none and a prefix": lambda a, b: a | {f"ema.{name}": array for name, array in b.items()},
}


@pytest.mark.parametrize("case", CHOICES)
def test_where_weights_are_there_twice_whoever_converts_is_asked_by_name(tmp_path, capsys, case):
    trained, averaged = released(0), released(1)
    file = write(tmp_path / "a.pt", CHOICES[case](trained, averaged))
    with pytest.raises(ConversionError, match=r"holds weights as .* and as .*: say which") as found:
        plan_conversion(file)
    assert re.search(r"as (\w+\.)?ema\b.* with weights_key=…", str(found.value))
    assert str(file) in str(found.value)
    same(planned(file, weights_key="ema"), plain(tmp_path, averaged))
    other = {"none and a prefix": "."}.get(case, "model")
    same(planned(file, weights_key=other), plain(tmp_path, trained))
    with pytest.raises(ConversionError, match=r"no weights under weights_key='raw', but under"):
        plan_conversion(file, weights_key="raw")
    checkpoints.inspect_source(file, statistics=True, weights_key="ema", json_file=Path("-"))
    (part,) = json.loads(capsys.readouterr().out)["components"]
    (found,) = (of for of in part["tensors"] if of["name"] == "shared.weight")
    assert found["statistics"]["maximum"] == averaged["token_embedding.weight"].max()


def test_an_unknown_key_is_taken_if_it_is_given(tmp_path):
    file = write(tmp_path / "a.pt", {"mine": released()})
    with pytest.raises(ConversionError, match=r"mine is no tensor but a 'dict'.*weights_key"):
        plan_conversion(file)
    same(planned(file, weights_key="mine"), plain(tmp_path, released()))


@pytest.mark.parametrize("suffix", ["bin", "ckpt", "PTH", "Pt", "sft", "SAFETENSORS"])
@pytest.mark.parametrize("given", ["the file", "its folder", "a link", "a folder with a link"])
def test_a_file_is_known_by_its_suffix_in_any_case(tmp_path, suffix, given):
    folder = tmp_path / "of_a_trainer"
    write(folder / ("a.safetensors" if suffix[0] in "sS" else "a.pt"), ours())
    (file,) = (file for file in folder.iterdir() if file.stem == "a")
    file = file.rename(folder / f"umt5-xxl_bf16.{suffix}")
    source = file if given == "the file" else folder
    if "link" in given:
        away = file.rename(tmp_path / "elsewhere")
        file.symlink_to(os.path.relpath(away, folder) if given == "a link" else away)
        source = file if given == "a link" else folder
    same(planned(source), plain(tmp_path, ours()))


def test_several_files_of_unknown_names_are_not_chosen_from(tmp_path):
    write(tmp_path / "one.safetensors", ours())
    write(tmp_path / "two.sft", ours())
    with pytest.raises(ConversionError, match=r"holds one\.safetensors, two\.sft: remove the ones"):
        plan_conversion(tmp_path)
    (tmp_path / "two.sft").rename(tmp_path / "two.ckpt")  # safetensors come first
    same(planned(tmp_path), plain(tmp_path, ours()))


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_transformers_shards_of_torch_save_are_read(tmp_path, variant):
    tensors, mark = ours(), "" if variant is None else f".{variant}"
    names = sorted(tensors)
    weight_map = {}
    for number, held in enumerate((names[:9], names[9:]), 1):
        shard = f"pytorch_model{mark}-0000{number}-of-00002.bin"
        write(tmp_path / shard, {name: tensors[name] for name in held})
        weight_map |= dict.fromkeys(held, shard)
    write_json(tmp_path / f"pytorch_model.bin.index{mark}.json", {"weight_map": weight_map})
    same(planned(tmp_path, variant=variant), plain(tmp_path, tensors))
    (tmp_path / f"pytorch_model{mark}-00003-of-00003.bin").touch()
    with pytest.raises(ConversionError, match="lists nothing of pytorch_model"):
        plan_conversion(tmp_path, variant=variant)


def test_a_pipeline_of_wrapped_components_converts_as_one_of_bare_ones(tmp_path):
    source = write_source(tmp_path / "bare")
    convert_pipeline(source, tmp_path / "expected")
    wrapped = write_source(tmp_path / "wrapped")
    (wrapped / ENCODER_FILE).unlink()
    state = {"state_dict": {f"module.{name}": array for name, array in ours().items()}, "step": 1}
    torch.save(as_torch(state), wrapped / "text_encoder/pytorch_model.bin")
    convert_pipeline(wrapped, tmp_path / "out")
    expected, found = (read_manifest(tmp_path / name) for name in ("expected", "out"))
    assert found.components == expected.components
    export_pipeline(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / ENCODER_FILE).is_file()


def test_what_is_outside_the_prefix_is_named(tmp_path):
    held = {f"model.diffusion_model.{name}": array for name, array in released().items()}
    held |= {"first_stage_model.x": np.ones(2, np.float32), "cond.step": np.arange(3)}
    file = write(tmp_path / "a.safetensors", held)
    same(planned(file), plain(tmp_path, released()))
    (part,) = read_contents(file).components
    assert part.unused == ("cond.step", "first_stage_model.x")
    (part,) = plan_conversion(file).components
    assert part.unused == ("cond.step", "first_stage_model.x")


def test_a_prefix_that_nobody_knows_is_refused(tmp_path):
    for tensors in (ours(), released()):
        held = {f"a.b.{name}": array for name, array in tensors.items()}
        file = write(tmp_path / "a.safetensors", held)
        if tensors.keys() == released().keys():
            (tmp_path / "config.json").unlink()
        with pytest.raises(
            ConversionError, match=r"names begin with 'a\.b', .* weights_key='a\.b'"
        ):
            plan_conversion(file)
        for key in ("a.b", "a.b."):
            same(planned(file, weights_key=key), plain(tmp_path, tensors))


@pytest.mark.parametrize("stem", ["model", "pytorch_model", "diffusion_pytorch_model"])
@pytest.mark.parametrize("suffix", ["SAFETENSORS", "sft", "pt", "BIN", "ckpt"])
def test_a_librarys_name_with_another_suffix_is_no_variant(tmp_path, stem, suffix):
    kind = "safetensors" if suffix[0] in "sS" else "pt"
    file = write(tmp_path / f"a.{kind}", ours()).rename(tmp_path / f"{stem}.{suffix}")
    same(planned(tmp_path), plain(tmp_path, ours()))
    file.rename(tmp_path / f"{stem}.fp16.{suffix}")
    with pytest.raises(ConversionError, match=r"choose the variant"):
        plan_conversion(tmp_path)


@pytest.mark.parametrize("beside", [{}, {"model": 3}, {"critic": {"x.weight": np.ones(2)}}])
def test_the_same_weights_under_a_key_that_nobody_knows_are_a_choice_too(tmp_path, beside):
    trained, averaged = released(0), released(1)
    held = {"generator": trained, "averaged_2": averaged, "teacher": averaged, **beside}
    file = write(tmp_path / "a.pt", held)
    with pytest.raises(ConversionError, match="as generator and as averaged_2: say which"):
        plan_conversion(file)
    for key, expected in (("generator", trained), ("averaged_2", averaged), ("teacher", averaged)):
        same(planned(file, weights_key=key), plain(tmp_path, expected))


def test_keys_may_lead_as_deep_as_they_are_given(tmp_path):
    file = write(tmp_path / "a.pt", {"a": {"b": {"c": {"d": released()}}}})
    same(planned(file, weights_key="a.b.c.d"), plain(tmp_path, released()))


def test_a_dict_in_itself_is_not_followed_for_ever(tmp_path):
    held: dict = {"w": 1}
    held |= dict.fromkeys(sorted(WRAPPERS), held)
    torch.save(held, tmp_path / "a.pt")
    with pytest.raises(ConversionError, match="nests more than 1000 dicts"):
        plan_conversion(tmp_path / "a.pt")
