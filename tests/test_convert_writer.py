"""Orbax checkpoints written lazily: what any orbax reads, in little memory."""

import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from svg_jax.convert import ConversionError, writer
from svg_jax.convert.writer import LazyArray, open_leaves, write_tree


def whole(array):
    return LazyArray(array.shape, array.dtype, False, lambda: iter([(..., array)]))


def layer_by_layer(array, alive=None):
    """A stacked leaf that is made a layer at a time; `alive` records how many are asked for."""

    def slabs():
        for layer in range(len(array)):
            if alive is not None:
                alive.append(layer)
            yield slice(layer, layer + 1), array[layer : layer + 1]

    return LazyArray(array.shape, array.dtype, True, slabs)


def arrays():
    random = np.random.default_rng(0)
    return {
        "blocks": {
            "kernel": random.normal(size=(3, 40, 50)).astype(ml_dtypes.bfloat16),
            "bias": random.normal(size=(3, 50)).astype(np.float16),
        },
        "table": random.normal(size=(7,)).astype(np.float32),
        "zeros": np.zeros((2, 2), np.float32),  # equal to what an unwritten chunk reads as
    }


def lazy(tree):
    return jax.tree.map(lambda a: layer_by_layer(a) if a.ndim == 3 else whole(a), tree)


@pytest.mark.parametrize("slab_bytes", [16, 10**9])
@pytest.mark.parametrize("checkpointer", [ocp.StandardCheckpointer, ocp.PyTreeCheckpointer])
def test_plain_orbax_restores_the_same_bits(tmp_path, monkeypatch, slab_bytes, checkpointer):
    monkeypatch.setattr(writer, "SLAB_BYTES", slab_bytes)
    write_tree(tmp_path / "weights", lazy(arrays()))
    with checkpointer() as reader:
        restored = reader.restore(tmp_path / "weights")
    expected, structure = jax.tree.flatten(arrays())
    assert jax.tree.structure(restored) == structure
    for leaf, array in zip(jax.tree.leaves(restored), expected, strict=True):
        assert leaf.dtype == array.dtype
        assert leaf.shape == array.shape
        assert np.asarray(leaf).tobytes() == array.tobytes()


def test_a_large_stacked_leaf_lies_a_layer_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SLAB_BYTES", 3000)
    write_tree(tmp_path / "weights", lazy(arrays()))
    leaves = open_leaves(tmp_path / "weights")
    chunks = {path: leaf.chunk_layout.read_chunk.shape for path, leaf in leaves.items()}
    assert chunks["blocks", "kernel"] == (1, 40, 50)
    assert chunks["blocks", "bias"] == (3, 50)
    np.testing.assert_array_equal(
        leaves["blocks", "kernel"][1].read().result(), arrays()["blocks"]["kernel"][1]
    )


def test_a_large_leaf_of_one_layer_lies_in_chunks_too(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SLAB_BYTES", 3000)
    table = np.random.default_rng(0).normal(size=(60, 50)).astype(np.float32)
    transposed = whole(table.T)
    write_tree(tmp_path / "weights", {"table": whole(table), "transposed": transposed})
    leaves = open_leaves(tmp_path / "weights")
    for leaf in leaves.values():
        rows, columns = leaf.chunk_layout.read_chunk.shape or (0, 0)
        assert 0 < (rows or 0) * (columns or 0) * 4 <= 3000
    np.testing.assert_array_equal(leaves["table",].read().result(), table)
    np.testing.assert_array_equal(leaves["transposed",].read().result(), table.T)


def test_leaves_are_made_one_after_the_other(tmp_path):
    alive = []
    array = np.ones((4, 2), np.float32)
    tree = {str(leaf): layer_by_layer(array, alive) for leaf in range(3)}
    write_tree(tmp_path / "weights", tree)
    assert alive == [0, 1, 2, 3] * 3


def test_what_a_leaf_raises_comes_out_and_orbax_logs_nothing(tmp_path, capfd):
    def slabs():
        yield slice(0, 1), np.ones((1, 2), np.float32)
        raise ConversionError("w: is not finite")

    bad = LazyArray((2, 2), np.dtype(np.float32), True, slabs)
    with pytest.raises(ConversionError, match=r"^w: is not finite$"):
        write_tree(tmp_path / "weights", {"bad": bad, **lazy(arrays())})
    assert capfd.readouterr().err == ""


def test_a_full_disk_is_an_error_of_the_system_and_nothing_else_is_printed(tmp_path):
    code = """
import resource, sys, numpy as np
from pathlib import Path
from svg_jax.convert.writer import LazyArray, write_tree
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
array = np.ones((100, 1000), np.float32)
lazy = lambda: LazyArray(array.shape, array.dtype, False, lambda: iter([(..., array)]))
try:
    write_tree(Path(sys.argv[1]), {"a": lazy(), "b": lazy()})
except OSError as error:
    print(error.strerror)
"""
    arguments = [sys.executable, "-c", code, str(tmp_path / "weights")]
    result = subprocess.run(arguments, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("File too large\n", "")


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ConversionError, match="weights: cannot be read as an orbax checkpoint"):
        open_leaves(tmp_path / "weights")
