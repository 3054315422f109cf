"""Orbax checkpoints whose files hold the source's bytes: what any orbax reads."""

import json
import math
import subprocess
import sys
import time

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import orbax.checkpoint.experimental.v1 as ocp_v1
import pytest

from svg_jax.convert import DamageError
from svg_jax.convert.checkpoint import orbax_writer as writer
from svg_jax.convert.checkpoint.orbax_writer import (
    LeafFiles,
    checkpoint_nbytes,
    create_checkpoint,
    open_leaves,
)
from svg_jax.convert.tables.rules import LAYER, Leaf, Rule

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
RULES = {
    Rule("a", "kernel", "transpose", (50, 40)): BFLOAT16,
    Rule(f"{LAYER}.a", "blocks.kernel", "transpose", (50, 40), layers=3): BFLOAT16,
    Rule(f"{LAYER}.b", "blocks.bias", "none", (50,), layers=3): np.dtype(np.float16),
    Rule("c", "conv", "conv", (4, 5, 1, 2, 3)): np.dtype(np.float32),
    Rule(f"{LAYER}.c", "blocks.conv", "conv", (4, 5, 2, 3), layers=2): np.dtype(np.float32),
    Rule("p", "patch", "patch", (4, 5, 1, 2, 2)): np.dtype(np.float32),
    Rule("t", "table", "none", (61, 50)): np.dtype(np.float32),
    Rule("f", "flat", "flatten", (5, 1, 1)): np.dtype(np.float32),
    Rule("s", "scalar", "none", ()): np.dtype(np.float32),
    Rule("z", "zeros", "none", (2, 2)): np.dtype(np.float32),
}


def write(folder):
    """A checkpoint of random numbers; returns its leaves and what must be read from it."""
    random = np.random.default_rng(0)
    leaves, expected = {}, {}
    for rule, dtype in RULES.items():
        stack = () if rule.layers is None else (rule.layers,)
        leaf = Leaf(rule, (), (*stack, *rule.target_shape))
        layers = [
            np.array(random.normal(size=rule.source_shape) * (rule.source != "z")).astype(dtype)
            for _ in range(rule.layers or 1)
        ]
        parts = [rule.forward(layer) for layer in layers]
        leaves[leaf.path] = LeafFiles.of(leaf, dtype)
        expected[leaf.path] = np.stack(parts) if rule.stacked else parts[0]
    create_checkpoint(folder, leaves)
    for rule in RULES:
        files = leaves[tuple(rule.target.split("."))]
        lying = expected[files.path].transpose(files.order).tobytes()
        for chunk in range(files.num_chunks):
            part = lying[chunk * files.chunk_nbytes : (chunk + 1) * files.chunk_nbytes]
            with files.chunk_file(folder, chunk).open("r+b") as stream:
                stream.write(part)
    return leaves, expected


def nested(leaves):
    tree = {path[-1]: array for path, array in leaves.items() if len(path) == 1}
    return tree | {"blocks": {path[1]: array for path, array in leaves.items() if len(path) == 2}}


def old(folder):
    with ocp.StandardCheckpointer() as reader:
        return reader.restore(folder)


@pytest.mark.parametrize("chunk_bytes", [16, 3000, 10**9])
@pytest.mark.parametrize("restore", [old, ocp_v1.load])
def test_plain_orbax_restores_the_same_bits(tmp_path, monkeypatch, chunk_bytes, restore):
    monkeypatch.setattr(writer, "CHUNK_BYTES", chunk_bytes)
    _, expected = write(tmp_path / "weights")
    restored = restore(tmp_path / "weights")
    wanted, structure = jax.tree.flatten(nested(expected))
    assert jax.tree.structure(restored) == structure
    for leaf, array in zip(jax.tree.leaves(restored), wanted, strict=True):
        assert leaf.dtype == array.dtype
        assert leaf.shape == array.shape
        assert np.asarray(leaf).tobytes() == array.tobytes()


def test_beside_the_leaves_stands_what_orbax_itself_writes(tmp_path):
    """Its format is written here without it: another orbax that writes another fails this."""
    _, expected = write(tmp_path / "ours")
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "theirs", args=ocp.args.PyTreeSave(nested(expected)))
    found = []
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        tree, checkpoint = (
            json.loads((folder / name).read_text())
            for name in ("_METADATA", "_CHECKPOINT_METADATA")
        )
        begun, done = (checkpoint.pop(f"{when}_timestamp_nsecs") for when in ("init", "commit"))
        assert 0 < begun <= done < time.time_ns()
        found.append((tree, checkpoint, sorted(path.name for path in folder.iterdir())))
    assert found[0] == found[1]


def test_a_large_stacked_leaf_lies_a_layer_a_chunk_and_others_by_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "CHUNK_BYTES", 3000)
    files, expected = write(tmp_path / "weights")
    leaves = open_leaves(tmp_path / "weights", files)
    chunks = {path: leaf.chunk_layout.read_chunk.shape for path, leaf in leaves.items()}
    assert chunks["blocks", "kernel"] == (1, 40, 50)
    assert chunks["blocks", "bias"] == (3, 50)
    assert chunks["kernel",] == (40, 37)  # rows of the source are columns of the leaf
    assert chunks["table",] == (15, 50)
    assert files["table",].num_chunks == 5
    part = leaves["blocks", "kernel"][1].read().result()
    np.testing.assert_array_equal(part, expected["blocks", "kernel"][1])


@pytest.mark.parametrize("chunk_bytes", [3000, 10**9])
def test_the_bytes_of_a_checkpoint_are_known_before(tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(writer, "CHUNK_BYTES", chunk_bytes)
    leaves, expected = write(tmp_path / "weights")
    found = sum(file.stat().st_size for file in (tmp_path / "weights").rglob("*") if file.is_file())
    numbers = sum(math.prod(array.shape) * array.itemsize for array in expected.values())
    assert abs(checkpoint_nbytes(leaves) - found) < 0.2 * (found - numbers)


def test_a_chunk_that_is_missing_is_an_error_and_not_zeros(tmp_path):
    leaves, _ = write(tmp_path / "weights")
    leaves["table",].chunk_file(tmp_path / "weights", 0).unlink()
    with pytest.raises(ValueError, match="missing"):
        open_leaves(tmp_path / "weights", leaves)["table",].read().result()


def test_a_full_disk_is_an_error_of_the_system_and_nothing_else_is_printed(tmp_path):
    code = """
import resource, sys, numpy as np
from pathlib import Path
from svg_jax.convert.checkpoint.orbax_writer import LeafFiles, create_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
leaf = LeafFiles(("a",), (100, 1000), np.dtype(np.float32), (0, 1), 100)
try:
    create_checkpoint(Path(sys.argv[1]), {("a",): leaf})
except OSError as error:
    print(error.strerror)
"""
    arguments = [sys.executable, "-B", "-c", code, str(tmp_path / "weights")]  # no cut bytecode
    result = subprocess.run(arguments, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("File too large\n", "")


def test_what_is_no_checkpoint_is_refused(tmp_path):
    leaf = LeafFiles(("a",), (2, 3), np.dtype(np.float32), (0, 1), 2)
    with pytest.raises(DamageError, match="weights: cannot be read as an orbax checkpoint"):
        open_leaves(tmp_path / "weights", {("a",): leaf})


def set_in(values, keys, value):
    for key in keys[:-1]:
        values = values[key]
    values[keys[-1]] = value


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("shape",), [61, 51]),
        (("data_type",), "bfloat16"),
        (("chunk_grid", "configuration", "chunk_shape"), [10**9, 10**9]),
        (("chunk_grid", "configuration", "chunk_shape"), [61, 25]),
        (("codecs", 0, "configuration", "order"), [1, 0]),
        (("codecs", 1, "configuration", "endian"), "big"),
        (("codecs",), [{"name": "bytes", "configuration": {"endian": "little"}}]),
        (("fill_value",), 1.0),
        (("chunk_key_encoding",), {"name": "v2"}),
    ],
)
def test_metadata_that_say_otherwise_are_not_believed(tmp_path, keys, value):
    files, _ = write(tmp_path / "weights")
    file, _ = next(files["table",].files(tmp_path / "weights"))
    values = json.loads(file.read_text())
    set_in(values, keys, value)
    file.write_text(json.dumps(values))
    with pytest.raises(DamageError, match=r"weights: cannot be read .*\(table: ") as caught:
        open_leaves(tmp_path / "weights", files)
    assert len(str(caught.value)) <= 500
