"""Safetensors files: read as the reference reads them, and refused when damaged."""

import json
import os
import re
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import load_file, save, save_file

from svg_jax.convert import ConversionError
from svg_jax.convert.formats.safetensors_file import read_header
from svg_jax.convert.formats.stored_tensor import count_nonfinite, read_tensor
from svg_jax.convert.sources.weights import read_weights

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]
ONE = np.arange(6, dtype=np.float32).reshape(2, 3)
SINGLE = "diffusion_pytorch_model.safetensors"
INDEX = SINGLE + ".index.json"


def safetensors(entries: object, data: bytes, length: int | None = None) -> bytes:
    """A file as its header's parts are given, right or wrong."""
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(dtype: object = "F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def refused(folder: Path, message: str) -> None:
    """Reading the folder gives one sentence that says where and, by `message`, what."""
    with pytest.raises(ConversionError, match=message) as caught:
        [read_tensor(tensor) for tensor in read_weights(folder).values()]
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@given(
    shapes=st.lists(st.lists(st.integers(1, 4), max_size=4), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_the_reference_writes_is_read_bit_for_bit(tmp_path_factory, shapes, dtype, seed):
    random = np.random.default_rng(seed)
    written = {str(i): random.normal(size=shape).astype(dtype) for i, shape in enumerate(shapes)}
    file = tmp_path_factory.mktemp("weights") / "a.safetensors"
    save_file(written, file, metadata={"format": "pt"})
    read = {name: read_tensor(tensor) for name, tensor in read_header(file).tensors.items()}
    assert read.keys() == written.keys()
    for name, tensor in written.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape
        assert read[name].tobytes() == tensor.tobytes()


WHOLE = save({"w": ONE})
DAMAGE = {
    "empty": (b"", "has only 0 bytes"),
    "under 8 bytes": (WHOLE[:7], "has only 7 bytes"),
    "header of 2^63 bytes": (safetensors({}, b"", length=2**63), "claims a header of"),
    "header of 2^64-1 bytes": (b"\xff" * 64, "claims a header of"),
    "no header": (safetensors(b"", b""), "claims a header of 0"),
    "header longer than the file": (WHOLE[:40], "claims a header of"),
    "not UTF-8": (safetensors(b"\xff\xfe{}", b""), "no whole JSON"),
    "not JSON": (safetensors(b"hello", b""), "no whole JSON"),
    "JSON of another kind": (safetensors([1], b""), "not an object"),
    "deep JSON": (safetensors(b"[" * 100_000, b""), "no whole JSON"),
    "duplicate key": (
        safetensors(
            b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            b'"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            bytes(4),
        ),
        "the key 'w' occurs twice",
    ),
    "truncated": (WHOLE[:-1], "is truncated"),
    "trailing bytes": (WHOLE + b"\0", "bytes that belong to no tensor"),
    "overlap": (
        safetensors({"a": entry(), "b": entry(begin=4, end=12)}, bytes(12)),
        "b overlaps the tensor before it",
    ),
    "hole": (
        safetensors({"a": entry(), "b": entry(begin=12, end=20)}, bytes(20)),
        "b leaves a hole",
    ),
    "hole at the start": (safetensors({"a": entry(begin=4, end=12)}, bytes(12)), "a leaves a hole"),
    "reversed offsets": (safetensors({"a": entry(begin=8, end=0)}, bytes(8)), "offsets give -8"),
    "negative offset": (safetensors({"a": entry(begin=-8, end=0)}, bytes(8)), "damaged header"),
    "shape overflow": (
        safetensors({"a": entry(shape=(2**62, 2**62))}, bytes(8)),
        "offsets give 8",
    ),
    "shape and bytes differ": (safetensors({"a": entry(shape=(3,))}, bytes(8)), "takes 12 bytes"),
    "shape is no list of sizes": (safetensors({"a": entry(shape=(True,))}, b""), "damaged header"),
    "entry lacks its offsets": (safetensors({"a": {"dtype": "F32"}}, b""), "damaged header"),
    "unknown dtype": (safetensors({"a": entry("F99")}, bytes(8)), "a is 'F99'"),
    "dtype is no word": (safetensors({"a": entry(["F32"])}, bytes(8)), r"a is \['F32'\]"),
    "FP4": (safetensors({"a": entry("F4", (16,))}, bytes(8)), "a is 'F4'"),
    "complex": (safetensors({"a": entry("C64", (1,))}, bytes(8)), "a is 'C64'"),
    "a shape of a million axes": (
        safetensors({"a": entry(shape=(2**62,) * 10**5)}, bytes(8)),
        "damaged header",
    ),
    "Git-LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "git lfs pull",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused(tmp_path, damage):
    content, message = DAMAGE[damage]
    (tmp_path / SINGLE).write_bytes(content)
    refused(tmp_path, message)


@given(cut=st.integers(0, len(WHOLE) - 1), flip=st.integers(0, 255))
def test_whatever_the_reference_refuses_is_refused(tmp_path_factory, cut, flip):
    file = tmp_path_factory.mktemp("weights") / "a.safetensors"
    harmed = bytearray(WHOLE)
    harmed[cut] ^= flip
    for content in (bytes(harmed), WHOLE[:cut]):
        file.write_bytes(content)
        try:
            expected = load_file(file)
        except (SafetensorError, KeyError, AttributeError, UnicodeDecodeError):
            with pytest.raises(ConversionError):
                read_header(file)
        else:  # ours is stricter, but what it takes it must read alike
            try:
                read = {
                    name: read_tensor(tensor) for name, tensor in read_header(file).tensors.items()
                }
            except ConversionError:
                continue
            assert {k: v.tobytes() for k, v in read.items()} == {
                k: v.tobytes() for k, v in expected.items()
            }


@given(bits=st.binary(min_size=4, max_size=64), dtype=st.sampled_from(DTYPES))
def test_count_nonfinite_is_numpys_isfinite(bits, dtype):
    array = np.frombuffer(bits[: len(bits) // 4 * 4], dtype)
    assert count_nonfinite(array) == (~np.isfinite(array.astype(np.float32))).sum()


def test_a_missing_folder_or_weights_in_another_format_are_refused(tmp_path):
    refused(tmp_path / "nowhere", "found: nothing")
    (tmp_path / "diffusion_pytorch_model.bin").touch()
    refused(tmp_path, "no file of torch.save")
    (tmp_path / "diffusion_pytorch_model.bin").rename(tmp_path / "model.onnx")
    refused(tmp_path, r"holds no .* \(found: model.onnx\)")


def write_shards(folder: Path) -> dict:
    """Two shards with an index; returns the index for a test to change."""
    for number in (1, 2):
        save_file({f"w{number}": ONE}, folder / shard(number))
    index = {"metadata": {"total_size": 48}, "weight_map": {"w1": shard(1), "w2": shard(2)}}
    (folder / INDEX).write_text(json.dumps(index))
    return index


def shard(number: int) -> str:
    return f"diffusion_pytorch_model-{number:05}-of-00002.safetensors"


def test_shards_are_read_as_one(tmp_path):
    write_shards(tmp_path)
    tensors = read_weights(tmp_path)
    assert {name: tensor.file.name for name, tensor in tensors.items()} == {
        "w1": shard(1),
        "w2": shard(2),
    }
    np.testing.assert_array_equal(read_tensor(tensors["w2"]), ONE)


@pytest.mark.parametrize("name", ["{stem}.fp16-{of}.safetensors", "{stem}-{of}.fp16.safetensors"])
def test_shards_of_a_variant_beside_the_plain_ones(tmp_path, name):
    write_shards(tmp_path)
    name = name.format(stem="diffusion_pytorch_model", of="00001-of-00001")
    save_file({"w1": 2 * ONE, "w2": ONE}, tmp_path / name)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.fp16.json"
    index.write_text(json.dumps({"weight_map": {"w1": name, "w2": name}}))
    found = read_weights(tmp_path, variant="fp16")
    np.testing.assert_array_equal(read_tensor(found["w1"]), 2 * ONE)
    assert read_weights(tmp_path)["w1"].file.name == shard(1)
    with pytest.raises(ConversionError, match="choose the variant that is there"):
        read_weights(tmp_path, variant="ema")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"w1": shard(1), "w2": "model-3.safetensors"}, "lists nothing of .*00002-of"),
        ({"w1": shard(1)}, "lists nothing of .*00002-of"),
        ({"w1": shard(1), "w2": shard(2), "w3": shard(2)}, r"lacks tensors .*\(1: w3\)"),
        ({"w1": shard(1), "w3": shard(2)}, r"lacks tensors .*\(1: w3\)"),
        ({"w1": shard(2), "w2": shard(2), "x": shard(1)}, r"lacks tensors .*\(1: x\)"),
        ({"w1": shard(1), "w2": shard(2), "w3": "../x.safetensors"}, "leads out of"),
        ({"w1": shard(1), "w2": shard(2), "w3": "/etc/passwd"}, "leads out of"),
        ({"w1": shard(1), "w2": shard(2), "w3": 3}, "maps no tensors to files"),
        (["w1"], "maps no tensors to files"),
        (None, "maps no tensors to files"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path, weight_map, message):
    index = write_shards(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps(index | {"weight_map": weight_map}))
    refused(tmp_path, message)


def test_an_index_without_a_weight_map_or_with_a_key_twice_is_refused(tmp_path):
    write_shards(tmp_path)
    (tmp_path / INDEX).write_text("{}")
    refused(tmp_path, "no weight_map")
    (tmp_path / INDEX).write_text('{"weight_map": {"w1": "a", "w1": "b"}}')
    refused(tmp_path, "'w1' occurs twice")
    (tmp_path / INDEX).write_text('{"weight_map": {"w1": ')
    refused(tmp_path, "no whole JSON")


def test_a_missing_shard_is_named(tmp_path):
    write_shards(tmp_path)
    (tmp_path / shard(2)).unlink()
    refused(tmp_path, re.escape(shard(2)) + ": .*missing")


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    write_shards(tmp_path)
    save_file({"w1": ONE, "w2": ONE}, tmp_path / shard(2))
    refused(tmp_path, f"w1 is also in {shard(1)}")


def test_a_tensor_that_the_index_does_not_name_is_refused(tmp_path):
    write_shards(tmp_path)
    save_file({"w2": ONE, "w3": ONE}, tmp_path / shard(2))
    refused(tmp_path, r"holds tensors that the index does not .*\(1: w3\)")


def test_two_sets_of_weights_are_refused(tmp_path):
    write_shards(tmp_path)
    save_file({"w": ONE}, tmp_path / SINGLE)
    refused(tmp_path, f"holds {SINGLE} and {INDEX}")


def test_a_link_out_of_the_folder_is_followed_only_where_that_is_allowed(tmp_path):
    folder, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    folder.mkdir()
    blobs.mkdir()
    save_file({"w": ONE}, blobs / "1234")
    os.symlink(blobs / "1234", folder / SINGLE)
    refused(folder, "leads out of the checkpoint's folder")
    assert list(read_weights(folder, allowed=[blobs])) == ["w"]


def test_a_file_that_shrinks_after_it_was_checked_is_refused(tmp_path):
    (tmp_path / SINGLE).write_bytes(WHOLE)
    (tensor,) = read_weights(tmp_path).values()
    (tmp_path / SINGLE).write_bytes(WHOLE[:-4])
    with pytest.raises(ConversionError, match="cut off while it was read"):
        read_tensor(tensor)
