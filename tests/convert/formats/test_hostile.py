"""Sources and destinations that are wrong on purpose: one sentence each, nothing left, no hang."""

import contextlib
import datetime
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tiny_source import ENCODER_FILE, TRANSFORMER_FILE, write_json, write_source

from svg_jax.convert import ConversionError, convert_pipeline, plan_conversion
from svg_jax.convert.formats.stored_tensor import read_tensor

SHARDS = ["text_encoder/model-00001-of-00002.safetensors"]
SHARDS.append("text_encoder/model-00002-of-00002.safetensors")
INDEX = "text_encoder/model.safetensors.index.json"
CONFIG = "text_encoder/config.json"


def write_sharded(folder: Path) -> Path:
    """The small pipeline, its encoder in two shards."""
    write_source(folder)
    tensors = load_file(folder / ENCODER_FILE)
    (folder / ENCODER_FILE).unlink()
    names = sorted(tensors)
    parts = dict(zip(SHARDS, (names[:8], names[8:]), strict=True))
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: Path(file).name for file, part in parts.items() for name in part}
    write_json(folder / INDEX, {"weight_map": weight_map})
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return write_sharded(tmp_path_factory.mktemp("hostile") / "source")


@pytest.fixture
def source(sharded, tmp_path):
    shutil.copytree(sharded, tmp_path / "source")
    return tmp_path / "source"


def instead(name, make):
    """Puts something else in the place of a file."""

    def damage(source):
        (source / name).unlink()
        make(source / name)

    return damage


def dangling(file):
    file.symlink_to(file.with_name("nowhere"))


def outside(file):
    file.symlink_to("/etc/hostname")


def sparse(size):
    return lambda file: (file.touch(), os.truncate(file, size))


def edit(name, **changes):
    def damage(source):
        write_json(source / name, json.loads((source / name).read_text()) | changes)

    return damage


def remap(old, new):
    """Gives a shard another name in the index."""

    def damage(source):
        weight_map = json.loads((source / INDEX).read_text())["weight_map"]
        old_name = Path(old).name
        weight_map = {k: new if v == old_name else v for k, v in weight_map.items()}
        write_json(source / INDEX, {"weight_map": weight_map})

    return damage


def rename_a_tensor(name):
    def damage(source):
        tensors = load_file(source / TRANSFORMER_FILE)
        tensors[name] = tensors.pop("proj_out.bias")
        save_file(tensors, source / TRANSFORMER_FILE)

    return damage


def same_shard_twice(source):
    weight_map = json.loads((source / INDEX).read_text())["weight_map"]
    name = next(iter(weight_map))
    write_json(source / INDEX, {"weight_map": weight_map | {name: f"./{weight_map[name]}"}})


WRONG = {
    "a pipe as weights": (instead(TRANSFORMER_FILE, os.mkfifo), "a folder, a pipe or a device"),
    "a pipe as a shard": (instead(SHARDS[0], os.mkfifo), "a folder, a pipe or a device"),
    "a pipe as the index": (instead(INDEX, os.mkfifo), "a folder, a pipe or a device"),
    "a pipe as a config": (instead(CONFIG, os.mkfifo), "a folder, a pipe or a device"),
    "a pipe as model_index": (
        instead("model_index.json", os.mkfifo),
        "holds no model_index.json",
    ),
    "a pipe in the tokenizer": (
        lambda source: os.mkfifo(source / "tokenizer/spiece.model"),
        "spiece.model: is no file but a folder, a pipe",
    ),
    "a folder as weights": (instead(TRANSFORMER_FILE, Path.mkdir), "is no file but a folder"),
    "a folder as a shard": (instead(SHARDS[1], Path.mkdir), "is no file but a folder"),
    "a folder as the index": (instead(INDEX, Path.mkdir), "is no file but a folder"),
    "a folder as a config": (instead(CONFIG, Path.mkdir), "is no file but a folder"),
    "a dangling link as weights": (instead(TRANSFORMER_FILE, dangling), "is a link to nothing"),
    "a dangling link as a shard": (instead(SHARDS[0], dangling), "is a link to nothing"),
    "a dangling link as the index": (instead(INDEX, dangling), "is a link to nothing"),
    "a dangling link as a config": (instead(CONFIG, dangling), "is a link to nothing"),
    "a dangling link in the tokenizer": (
        lambda source: dangling(source / "tokenizer/spiece.model"),
        "spiece.model: is a link to nothing",
    ),
    "a link out as weights": (instead(TRANSFORMER_FILE, outside), "leads out of"),
    "a link out as a shard": (instead(SHARDS[0], outside), "leads out of"),
    "a link out as the index": (instead(INDEX, outside), "leads out of"),
    "a link out as a config": (instead(CONFIG, outside), "leads out of"),
    "a link to itself": (
        instead(TRANSFORMER_FILE, lambda file: file.symlink_to(file.name)),
        "is a link to nothing",
    ),
    "an index of a terabyte": (instead(INDEX, sparse(2**40)), "is larger than"),
    "a config of a terabyte": (instead(CONFIG, sparse(2**40)), "is larger than"),
    "a tokenizer of a terabyte": (
        lambda source: sparse(2**40)(source / "tokenizer/spiece.model"),
        "is too large for a tokenizer",
    ),
    "weights of nothing but zeros": (
        instead(TRANSFORMER_FILE, sparse(2**40)),
        "claims a header of 0 bytes",
    ),
    "a shard that is climbed to": (remap(SHARDS[0], "../model.safetensors"), "leads out of"),
    "a shard with a path of its own": (remap(SHARDS[0], "/etc/passwd"), "leads out of"),
    "a shard named nothing": (remap(SHARDS[0], ""), "the shard .* leads out of"),
    "a shard named dot": (remap(SHARDS[0], "."), "the shard .* leads out of"),
    "a shard with a zero byte": (remap(SHARDS[0], "a\0b"), "maps no tensors to files"),
    "a shard with half a character": (remap(SHARDS[0], "\ud800"), "no whole JSON"),
    "a shard with an endless name": (remap(SHARDS[0], "a" * 5000), "lists nothing|missing"),
    "a shard that the index names twice": (
        same_shard_twice,
        "the shard .* leads out of",
    ),
    "one shard for all": (
        remap(SHARDS[0], Path(SHARDS[1]).name),
        "lists nothing of model-00001",
    ),
    "a tensor with a line break in its name": (rename_a_tensor("a\nb"), "is no name of a tensor"),
    "a tensor with an endless name": (rename_a_tensor("a" * 501), "is no name of a tensor"),
    "a config with a billion layers": (
        edit(CONFIG, num_layers=10**9),
        "has 1000000000 layers and there are only",
    ),
    "a config with a layer too many": (edit(CONFIG, num_layers=3), "9 missing"),
    "a config with a layer too few": (edit(CONFIG, num_layers=1), "9 unexpected"),
    "a config with no layers": (edit(CONFIG, num_layers=0), "config.json|unexpected"),
    "a config with minus one layers": (edit(CONFIG, num_layers=-1), "config.json"),
    "a config with half a layer": (edit(CONFIG, num_layers=1.5), "config.json"),
    "a config with layers in words": (edit(CONFIG, num_layers="two"), "config.json"),
    "a config with layers in a list": (edit(CONFIG, num_layers=[2]), "config.json"),
    "a config with another width": (edit(CONFIG, d_model=17), "misshapen"),
    "a config with an endless width": (edit(CONFIG, d_model=10**30), "misshapen|config.json"),
    "a config of another model": (edit(CONFIG, model_type="bert"), "config.json: .*bert"),
    "a config that is deep": (
        instead(CONFIG, lambda file: file.write_text('{"a":' + "[" * 200_000)),
        "is no whole JSON",
    ),
    "a config of one endless number": (
        instead(CONFIG, lambda file: file.write_text('{"num_layers": ' + "9" * 100_000 + "}")),
        "is no whole JSON",
    ),
    "a config that is not UTF-8": (
        instead(CONFIG, lambda file: file.write_bytes(b'{"a": "\xff"}')),
        "is no whole JSON",
    ),
    "a model_index that says a key twice": (
        instead("model_index.json", lambda file: file.write_text('{"vae": 1, "vae": 2}')),
        "'vae' occurs twice",
    ),
    "a component of a number for a class": (
        edit("model_index.json", transformer=["diffusers", 3]),
        "is not .library, class.",
    ),
    "a component with a path for a name": (
        edit("model_index.json", **{"a/b": ["diffusers", "T5EncoderModel"]}),
        "is no name of a component",
    ),
    "a component that is not there": (
        edit("model_index.json", text_encoder_2=["transformers", "T5EncoderModel"]),
        "text_encoder_2: holds no|text_encoder_2",
    ),
}


def refused(source: Path, destination: Path, message: str) -> None:
    with pytest.raises(ConversionError, match=message) as caught:
        convert_pipeline(source, destination)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert len(sentence) < 1000
    assert not destination.exists()


@pytest.mark.parametrize("wrong", WRONG)
def test_a_hostile_source_is_refused_in_one_sentence(source, tmp_path, wrong):
    damage, message = WRONG[wrong]
    damage(source)
    refused(source, tmp_path / "out", message)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


@pytest.mark.parametrize(
    ("destination", "code", "message"),
    [
        ("/proc/out", 3, "cannot be written|the disk has"),
        ("/dev/null/out", 2, "is no folder"),
        ("source/out", 2, "lies inside the source"),
        ("source", 2, "lies inside the source"),
        ("taken", 2, "is there already"),
    ],
)
def test_a_destination_that_cannot_be_is_refused(source, tmp_path, destination, code, message):
    (tmp_path / "taken").mkdir()
    with pytest.raises(ConversionError, match=message) as caught:
        convert_pipeline(source, tmp_path / destination)
    assert caught.value.exit_code == code
    assert {path.name for path in tmp_path.iterdir()} == {"source", "taken"}


def test_a_disk_that_fills_up_ends_with_code_3_and_nothing_left(source, tmp_path):
    code = """
import resource
from svg_jax.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))
main()
"""
    # -B: bytecode that the limit cuts short would break later imports, for Python keeps it.
    arguments = [sys.executable, "-B", "-c", code, "convert", "source", "out"]
    result = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (3, "")
    assert result.stderr.startswith("svg-jax: ")
    assert "out: cannot be written (File too large)" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


class TestFuzz:
    """Headers, indexes and configs with anything in them give clean errors or the right numbers."""

    values: Any = st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**70), 2**70)
        | st.integers(0, 64)
        | st.floats()
        | st.text(max_size=5)
        | st.sampled_from(["F32", "BF16", "F16", "../x", Path(SHARDS[0]).name, "T5EncoderModel"]),
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        ),
        max_leaves=5,
    )
    targets = ("model_index.json", CONFIG, INDEX, *SHARDS)

    def check(self, sharded: Path, work: Path, data: st.DataObject) -> None:
        source = work / "source"
        shutil.copytree(sharded, source, dirs_exist_ok=True)
        name = data.draw(st.sampled_from(self.targets))
        whole = (sharded / name).read_bytes()
        length = 8 + int.from_bytes(whole[:8], "little") if name in SHARDS else len(whole)
        if data.draw(st.booleans()):
            harmed = self.harm_bytes(whole, length, data)
        else:
            harmed = self.harm_values(whole, length, name in SHARDS, data)
        (source / name).write_bytes(harmed)
        with contextlib.suppress(ConversionError):
            (part,) = plan_conversion(source, components=["text_encoder"]).components
            expected = {k: v for file in SHARDS for k, v in load_file(source / file).items()}
            for tensor, stored in part.tensors.items():
                found = read_tensor(stored)
                assert found.dtype == expected[tensor].dtype
                assert found.tobytes() == expected[tensor].tobytes()

    def harm_bytes(self, whole: bytes, length: int, data: st.DataObject) -> bytes:
        start = data.draw(st.integers(0, length - 1))
        stop = data.draw(st.integers(start, min(start + 8, len(whole))))
        return whole[:start] + data.draw(st.binary(max_size=8)) + whole[stop:]

    def harm_values(self, whole: bytes, length: int, shard: bool, data: st.DataObject) -> bytes:
        """Puts another value, or another key, somewhere into the JSON."""
        parsed = json.loads(whole[8:length] if shard else whole)
        node = parsed
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = data.draw(st.sampled_from(keys))
            inner = node[key]
            if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
                break
            node = inner
        if isinstance(node, dict) and data.draw(st.booleans()):
            node[data.draw(st.text(max_size=8) | st.sampled_from(keys))] = node.pop(key)
        else:
            node[key] = data.draw(self.values)
        text = json.dumps(parsed).encode()
        return len(text).to_bytes(8, "little") + text + whole[length:] if shard else text

    quick = settings(
        max_examples=300,
        deadline=datetime.timedelta(seconds=5),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )

    @quick
    @given(data=st.data())
    def test_few(self, sharded, tmp_path, data):
        self.check(sharded, tmp_path, data)

    @pytest.mark.slow
    @settings(quick, max_examples=3000)
    @given(data=st.data())
    def test_many(self, sharded, tmp_path, data):
        self.check(sharded, tmp_path, data)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_refused_with_their_count(source, tmp_path, bad):
    tensors = load_file(source / SHARDS[0])
    name = next(name for name, tensor in tensors.items() if tensor.shape == (16, 16))
    tensors[name] = tensors[name].copy()
    tensors[name][3, 4:6] = bad
    save_file(tensors, source / SHARDS[0])
    refused(source, tmp_path / "out", rf"{name} holds NaN or infinities \(2 of 256\)")
