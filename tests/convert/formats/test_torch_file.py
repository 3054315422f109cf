"""Files of torch.save: read as torch reads them, and never executed, whatever they hold."""

import io
import os
import pickle
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._utils import _rebuild_tensor_v2

from svg_jax.convert import ConversionError
from svg_jax.convert.formats.stored_tensor import read_tensor
from svg_jax.convert.formats.torch_file import read_torch_file
from svg_jax.convert.formats.torch_pickle import DEPTH_LIMIT, OPERATION_LIMIT, SIZE_LIMIT, unpickle

DTYPES = [
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    *(torch.uint16, torch.uint32, torch.uint64),
]


def read(file: Path) -> dict[str, np.ndarray]:
    return {name: read_tensor(tensor) for name, tensor in read_torch_file(file).items()}


def refused(file: Path, message: str) -> None:
    """Reading the file gives one sentence that names it and, by `message`, says what is wrong."""
    with pytest.raises(ConversionError, match=message) as caught:
        read(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(file))


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_read_bit_for_bit(tmp_path, dtype, protocol):
    torch.manual_seed(0)
    written = {
        "matrix": (100 * torch.rand(3, 5)).to(dtype),
        "scalar": torch.tensor(1).to(dtype),
        "empty": torch.zeros(0, 4).to(dtype),
    }
    torch.save(written, tmp_path / "a.pt", pickle_protocol=protocol)
    found = read(tmp_path / "a.pt")
    assert list(found) == list(written)
    for name, tensor in written.items():
        assert found[name].dtype.name == str(dtype).removeprefix("torch.")
        assert found[name].shape == tuple(tensor.shape)
        assert found[name].tobytes() == bits(tensor)


def test_views_of_shared_storages_are_read_as_what_they_show(tmp_path):
    base = torch.randn(6, 8)
    written = {
        "whole": base,
        "transposed": base.t(),
        "rows": base[2:4],
        "sparse": base[1:6:2, 2:7:3],
        "last": base[5, 7],
        "permuted": torch.randn(2, 3, 4, dtype=torch.bfloat16).permute(2, 0, 1),
        "tied": torch.nn.Parameter(base),
    }
    torch.save(written, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size < 4096  # the storage is there once
    for name, array in read(tmp_path / "a.pt").items():
        assert array.tobytes() == bits(written[name])
        assert array.shape == tuple(written[name].shape)


COMPLEX = torch.complex(torch.arange(6.0).reshape(2, 3), torch.arange(6.0, 12).reshape(2, 3))
VIEWS = {
    "a negative imaginary part": COMPLEX.conj().imag,
    "one of double": COMPLEX.to(torch.complex128).conj().imag,
    "one that is transposed": COMPLEX.conj().imag.t(),
    "one of one element": COMPLEX.conj().imag[1, 2],
    "one with an offset": COMPLEX.conj().imag[1:, ::2],
    "one as a parameter": torch.nn.Parameter(COMPLEX.conj().imag),
    "twice negative": torch._neg_view(COMPLEX.conj().imag),
    "a real part": COMPLEX.conj().real,
    "repeated within its storage": torch.arange(9.0)[:2, None].expand(2, 3),
    "overlapping": torch.arange(4.0).as_strided((2, 2), (1, 1)),
    "empty, with strides": torch.ones(3, 4)[:, :0],
}


@pytest.mark.parametrize("kind", VIEWS)
@pytest.mark.parametrize("protocol", [2, 4])
def test_odd_views_have_the_values_that_torch_gives(tmp_path, kind, protocol):
    torch.save({"w": VIEWS[kind]}, tmp_path / "a.pt", pickle_protocol=protocol)
    expected = torch.load(tmp_path / "a.pt", weights_only=False)["w"].detach().resolve_neg()
    found = read(tmp_path / "a.pt")["w"]
    np.testing.assert_array_equal(found, expected.numpy())
    assert found.dtype.name == str(expected.dtype).removeprefix("torch.")


def test_a_parameter_with_attributes_is_read(tmp_path):
    parameter = torch.nn.Parameter(torch.arange(3.0))
    parameter.mark = True  # pyright: ignore[reportAttributeAccessIssue] as trainers mark theirs
    torch.save({"w": parameter}, tmp_path / "a.pt")
    assert read(tmp_path / "a.pt")["w"].tolist() == [0, 1, 2]


class Subclass(torch.Tensor):
    """A tensor that may compute in its own way."""


def test_a_buffer_and_a_tensor_with_attributes_are_read(tmp_path):
    marked = COMPLEX.conj().imag
    marked.mark = True  # pyright: ignore[reportAttributeAccessIssue]
    buffer = torch.nn.Buffer(torch.arange(6.0).reshape(2, 3).t())
    torch.save({"w": marked, "b": buffer}, tmp_path / "a.pt")
    found = read(tmp_path / "a.pt")
    np.testing.assert_array_equal(found["w"], marked.resolve_neg().numpy())
    np.testing.assert_array_equal(found["b"], buffer.numpy())
    torch.save({"w": torch.ones(2).as_subclass(Subclass)}, tmp_path / "b.pt")
    refused(tmp_path / "b.pt", "w is no tensor but a '.*_rebuild_from_type_v2'")


@pytest.mark.parametrize(
    "bits", [{"conj": True}, {"neg": True, "other": 1}, {"neg": 1}, "neg", [("neg", True)]]
)
def test_a_tensor_with_bits_that_are_not_known_is_refused(tmp_path, bits):
    (tmp_path / "a.pt").write_bytes(archive(pickled({"w": tensor(bits=bits)})))
    refused(tmp_path / "a.pt", "bits or notes that are not known")


@pytest.mark.parametrize("subtree", [None, "module", "state_dict", "model"])
def test_the_weights_are_found_among_whatever_a_trainer_saved_with_them(tmp_path, subtree):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    state = model.state_dict()  # an OrderedDict with an attribute
    others = {"optimizer": {0: [torch.ones(2), {3}, frozenset([(1, 2)]), b"x"]}, "args": model}
    torch.save(state if subtree is None else {subtree: state, **others}, tmp_path / "a.pt")
    found = read(tmp_path / "a.pt")
    assert list(found) == list(state)
    assert all(found[name].tobytes() == bits(tensor) for name, tensor in state.items())


def test_a_file_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read(tmp_path / "a.pt")["w"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (torch.ones(2), "holds a 'tensor' where a state dict"),
        ([torch.ones(2)], "holds a 'list' where a state dict"),
        ({}, "holds an empty dict where"),
        (torch.nn.Linear(2, 2), "holds a 'torch.nn.modules.linear.Linear' where a state dict"),
        ({"w": torch.ones(2), "step": slice(3)}, "step is no tensor but a '.*slice'"),
        ({"w": {"x": torch.ones(2)}}, "w is no tensor but a 'dict'"),
        ({"module": {"w": torch.ones(2), "args": slice(1)}}, "module: args is no .*'.*slice'"),
        ({"model": {"a": torch.ones(1)}, "module": {"a": torch.ones(1)}}, "as module and as model"),
        ({"w": torch.ones(2, 2).to_sparse()}, "w is no tensor but a '.*sparse_tensor'"),
        ({3: torch.ones(2)}, "a key that is no name"),
        ({"a\nb": torch.ones(2)}, "a key that is no name"),
        ({"w": torch.ones(2).to(torch.float8_e4m3fnuz)}, "w is of 'torch.float8_e4m3fnuz'"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "w is of 'torch.ComplexFloatStorage'"),
        ({"w": torch.ones(3, 1).expand(3, 4)}, "w repeats the elements"),
    ],
)
def test_what_is_no_dict_of_weights_is_refused(tmp_path, held, message):
    torch.save(held, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", message)


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def storage(size=2, key="0", kind="FloatStorage", what="storage"):
    return (what, getattr(torch, kind, kind), key, "cpu", size)


def tensor(offset=0, shape=(2,), strides=(1,), bits=None, **of):
    """A tensor as torch pickles it, right or wrong."""
    hooks = OrderedDict()
    arguments = (Storage(storage(**of)), offset, shape, strides, False, hooks)
    arguments += () if bits is None else (bits,)
    return Call(_rebuild_tensor_v2, *arguments)


class Storage(tuple):
    """Pickles as a persistent id."""


class Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        return tuple(obj) if isinstance(obj, Storage) else None


def pickled(held, protocol=2) -> bytes:
    stream = io.BytesIO()
    Pickler(stream, protocol).dump(held)
    return stream.getvalue()


def archive(data=None, *, storage=bytes(8), members=(), compression=zipfile.ZIP_STORED) -> bytes:
    """A file as torch.save would have written it for the pickle `data`."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as file:
        file.writestr("a/data.pkl", pickled({"w": tensor()}) if data is None else data)
        file.writestr("a/version", "3\n")
        file.writestr("a/data/0", storage)
        for name, content in members:
            file.writestr(name, content)
    return stream.getvalue()


def test_the_archives_of_these_tests_are_read(tmp_path):
    (tmp_path / "a.pt").write_bytes(archive(members=[("a/byteorder", "little")]))
    assert read(tmp_path / "a.pt")["w"].tolist() == [0, 0]
    assert torch.load(tmp_path / "a.pt")["w"].tolist() == [0, 0]


def changed(content: bytes, old: bytes, new: bytes) -> bytes:
    assert old in content
    return content.replace(old, new)


def twice(name: str) -> bytes:
    other = archive(members=[("a/data/1", bytes(8))])
    return changed(other, b"a/data/1", name.encode())


def legacy(held) -> bytes:
    stream = io.BytesIO()
    torch.save(held, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def overlapping() -> bytes:
    """A member of which another's data holds the header and the data."""
    whole = archive(members=[("a/data/1", bytes(8))])
    with zipfile.ZipFile(io.BytesIO(whole)) as file:
        second = file.getinfo("a/data/1").header_offset
    inner = whole[second : second + 30 + len("a/data/1") + 8]
    outer = bytearray(archive(storage=inner, members=[("a/data/1", bytes(8))]))
    entry = outer.rindex(b"a/data/1") - 4
    struct.pack_into("<I", outer, entry, outer.index(inner))
    return bytes(outer)


WHOLE = archive()
ONES = b"\0\0\x80?\0\0\x80?"
ARCHIVES = {
    "empty": (b"", "no zip archive"),
    "text": (b"hello", "no zip archive"),
    "Git-LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "before PyTorch 1.6": (legacy({"w": torch.ones(2)}), "before 1.6"),
    "tar": (b"sys_info".ljust(257, b"\0") + b"ustar" + bytes(250), "before 1.6"),
    "bare pickle": (pickle.dumps({"w": 1}), "bare pickle"),
    "cut in the middle": (WHOLE[: len(WHOLE) // 2], "truncated or damaged"),
    "cut at the end": (WHOLE[:-1], "truncated or damaged"),
    "cut at the start": (b"PK\x03\x04" + WHOLE[-22:], "truncated or damaged"),
    "compressed": (archive(compression=zipfile.ZIP_DEFLATED), "data.pkl' is compressed"),
    "zip bomb": (
        archive(storage=bytes(2**27), compression=zipfile.ZIP_DEFLATED),
        r"is compressed",
    ),
    "size declared larger": (
        changed(WHOLE, struct.pack("<II", 8, 8), struct.pack("<II", 2**31, 2**31)),
        "overlap",
    ),
    "sizes declared differently": (
        changed(WHOLE, struct.pack("<II", 8, 8), struct.pack("<II", 8, 2**31)),
        r"compressed \(8 bytes for 2147483648\)",
    ),
    "directory of 1 GiB": (
        WHOLE[:-10] + struct.pack("<I", 2**30) + WHOLE[-6:],
        "truncated or damaged",
    ),
    "directory elsewhere": (
        WHOLE[:-6] + struct.pack("<I", 2**30) + WHOLE[-2:],
        "cannot be read",
    ),
    "encrypted": (
        changed(WHOLE, b"PK\x01\x02\x14\x03\x14\0\0\0", b"PK\x01\x02\x14\x03\x14\0\1\0"),
        "encrypted",
    ),
    "name that climbs": (archive(members=[("../evil", "")]), "leads out of the archive"),
    "name that climbs within": (archive(members=[("a/../../evil", "")]), "leads out"),
    "absolute name": (archive(members=[("/etc/evil", "")]), "leads out of the archive"),
    "name with a drive": (archive(members=[("c:evil", "")]), "leads out of the archive"),
    "name with a backslash": (twice("a\\..\\b/1"[:8]), "leads out of the archive"),
    "member twice": (twice("a/data/0"), "'a/data/0' occurs twice"),
    "names differ from the directory's": (
        WHOLE[:-100] + changed(WHOLE[-100:], b"a/data/0", b"a/data/1"),
        "no member at the offset of 'a/data/1'",
    ),
    "members overlap": (overlapping(), "overlap"),
    "no pickle": (changed(WHOLE, b"a/data.pkl", b"a/data.pcl"), "has 0 data.pkl"),
    "two pickles": (archive(members=[("b/data.pkl", "")]), "has 2 data.pkl"),
    "TorchScript": (archive(members=[("a/constants.pkl", "")]), "TorchScript"),
    "big-endian": (archive(members=[("a/byteorder", "big")]), "byte order is b'big'"),
    "flipped bit in the pickle": (changed(WHOLE, b"FloatStorage", b"FloatStorahe"), "checksum"),
    "flipped bit in a tensor": (
        changed(
            archive(storage=b"\0\0\x80?\0\0\x80?"), b"\0\0\x80?\0\0\x80?", b"\0\0\x80?\0\0\x80>"
        ),
        "w fails its checksum",
    ),
    "storage missing": (archive(pickled({"w": tensor(key="1")})), "in '1', which is missing"),
    "storage key that climbs": (
        archive(pickled({"w": tensor(key="../data.pkl")})),
        r"in '../data.pkl', which is missing",
    ),
    "storage smaller than said": (archive(pickled({"w": tensor(size=3)})), "has 3 elements"),
    "storage of a huge size": (archive(pickled({"w": tensor(size=2**62)})), "has 8 bytes"),
    "view out of its storage": (archive(pickled({"w": tensor(offset=1)})), "reaches out of"),
    "strides out of the storage": (
        archive(pickled({"w": tensor(shape=(2, 1), strides=(2, 1))})),
        "reaches out of",
    ),
    "negative offset": (archive(pickled({"w": tensor(offset=-1)})), "an offset that is no size"),
    "negative stride": (archive(pickled({"w": tensor(strides=(-1,))})), "a stride or an offset"),
    "shape that overflows": (
        archive(pickled({"w": tensor(shape=(2**62, 2**62), strides=(0, 0))})),
        "repeats the elements",
    ),
    "shape that is no size": (archive(pickled({"w": tensor(shape=(2.0,))})), "no size"),
    "shape and strides differ": (archive(pickled({"w": tensor(shape=(2, 1))})), "is damaged"),
    "storage that is a module": (
        archive(pickled({"w": tensor(what="module")})),
        r"is damaged \(TypeError\)",
    ),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_damaged_and_hostile_archives_are_refused(tmp_path, case):
    content, message = ARCHIVES[case]
    (tmp_path / "a.pt").write_bytes(content)
    tracemalloc.start()
    try:
        refused(tmp_path / "a.pt", message)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_a_directory_with_more_than_its_limit_is_not_read(tmp_path):
    with (tmp_path / "a.pt").open("wb") as stream:
        stream.write(WHOLE)
        stream.truncate(2**28)
        stream.seek(0, io.SEEK_END)
        stream.write(WHOLE[-22:-10] + struct.pack("<II", 2**27, 2**27) + b"\0\0")
    tracemalloc.start()
    try:
        refused(tmp_path / "a.pt", "a directory of 134217728 bytes")
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


CALLS = {
    "os.system": Call(os.system, "touch executed"),
    "builtins.eval": Call(eval, "open('executed', 'w')"),
    "builtins.exec": Call(exec, "open('executed', 'w')"),
    "subprocess": Call(subprocess.check_call, ["touch", "executed"]),
    "open": Call(open, "executed", "w"),
    "getattr": Call(getattr, OrderedDict, "fromkeys"),
    "an import": Call(__import__, "executed_by_import"),
    "torch.load": Call(torch.load, "other.pt"),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("beside", [False, True])
def test_a_call_in_the_pickle_is_not_made(tmp_path, monkeypatch, name, beside):
    monkeypatch.chdir(tmp_path)
    call = CALLS[name]
    held = {"module": {"w": tensor()}, "args": call} if beside else {"w": call}
    Path("a.pt").write_bytes(archive(pickled(held)))
    if beside:  # it is passed over
        assert read(tmp_path / "a.pt")["w"].tolist() == [0, 0]
    else:
        refused(tmp_path / "a.pt", f"w is no tensor but a '.*{call.call[0].__name__}'")
    assert os.listdir() == ["a.pt"]


def proto(*operations: bytes) -> bytes:
    return b"\x80\x02" + b"".join(operations) + b"."


SYSTEM, EVAL = b"cos\nsystem\n", b"c__builtin__\neval\n"
STATE = b"X\x0e\0\0\0touch executed"
PROGRAMS = {
    "a call of a name on the stack": proto(STATE, b"\x85cos\nsystem\nq\0h\0\x93"),
    "BUILD of a global": proto(SYSTEM, b"}U\x08__call__", STATE, b"sb"),
    "BUILD of a tensor function": proto(b"ctorch._utils\n_rebuild_tensor_v2\n}b"),
    "BUILD with slots": proto(SYSTEM, b"N}", STATE, b"K\1s\x86b"),
    "INST": proto(b"(", STATE, b"ios\nsystem\n"),
    "OBJ": proto(b"(", SYSTEM, STATE, b"o"),
    "NEWOBJ": proto(SYSTEM, STATE, b"\x85\x81"),
    "NEWOBJ_EX": b"\x80\x04" + SYSTEM + STATE + b"\x85}\x92.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93" + STATE + b"\x85R.",
    "EXT1": proto(b"\x82\x01", STATE, b"\x85R"),
    "a module that does not exist": proto(b"cexecuted_by_import\nx\n)R"),
    "REDUCE of a result": proto(SYSTEM, STATE, b"\x85R", STATE, b"\x85R"),
    "_rebuild_parameter of a call": proto(
        b"ctorch._utils\n_rebuild_parameter\n", SYSTEM, STATE, b"\x85R\x88N\x87R"
    ),
    "_rebuild_tensor of a call": proto(
        b"ctorch._utils\n_rebuild_tensor_v2\n(", SYSTEM, b"K\0))\x89}tR"
    ),
    "a method of a container": proto(b"ccollections\nOrderedDict.fromkeys\n", STATE, b"\x85R"),
    "an OrderedDict of pairs": proto(b"ccollections\nOrderedDict\n]\x85R"),
    "PERSID": proto(b"Pevil\n"),
    "nothing": proto(),
    "two objects": proto(b"}}"),
    "an open mark": proto(b"(}"),
    "a mark that is not there": proto(b"t"),
    "an item below the mark": proto(b"}(K\1s"),
    "a memo that is not there": proto(b"h\7"),
    "an item of a number": proto(b"K\1K\2a"),
    "an odd number of items": proto(b"}(K\1u"),
    "a key twice": proto(b"}(", STATE, b"N", STATE, b"Nu"),
    "no end": proto(b"}")[:-1],
    "more behind the end": proto(b"}") + b"cos\nsystem\n",
    "an unknown operation": proto(b"\xff"),
    "text that is no UTF-8": proto(b"X\1\0\0\0\xff"),
    "text longer than the pickle": proto(b"X\xff\xff\xff\x7fab"),
    "bytes longer than memory": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b".",
    "a number longer than the pickle": proto(b"\x8b\xff\xff\xff\x7f"),
    "a memo of 2^32": proto(b"}r\xff\xff\xff\xff"),
    "a number in digits": proto(b"L" + b"9" * 10_000 + b"L\n"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_program_is_executed_or_takes_memory(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("a.pt").write_bytes(archive(PROGRAMS[name]))
    tracemalloc.start()
    try:
        refused(tmp_path / "a.pt", "holds a|holds an empty dict|its pickle")
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
    assert os.listdir() == ["a.pt"]
    assert "executed_by_import" not in sys.modules


def doubled(times: int) -> bytes:
    """A tuple of two of a tuple of two of …, each made once and referred to twice."""
    return b")q\0" + b"0h\0h\0\x86q\0" * times


def colliding(number: int) -> bytes:
    """A dict's key, of the same hash for every number, and its value."""
    return b"\x8a\x0a" + (number * (2**61 - 1)).to_bytes(10, "little") + b"N"


BOMBS = {
    "tuples of tuples": (proto(doubled(5000)), "holds a 'tuple'"),
    "a key that takes for ever to hash": (proto(b"}", doubled(100), b"Ns"), "a key that is no"),
    "a set that takes for ever to hash": (
        b"\x80\x04\x8f(" + doubled(100) + b"\x90.",
        "holds a 'list'",
    ),
    "a call with a tree": (proto(SYSTEM, doubled(5000), b"\x85R"), "holds a 'os.system'"),
    "keys that collide": (proto(b"}(", *map(colliding, range(50_000)), b"u"), "a key that is no"),
    "deep tuples": (proto(b")", b"\x85" * 300_000), "holds a 'tuple'"),
    "deep lists": (proto(b"]" * 200_000, b"a" * 199_999), "holds a 'list'"),
    "deep marks": (proto(b"(" * (DEPTH_LIMIT + 1)), "nests deeper than"),
    "too many operations": (proto(b"]" * (OPERATION_LIMIT + 1)), "operations"),
    "too long": (proto(b"0" * SIZE_LIMIT), "has 335.* are allowed"),
    "long text": (proto(b"X", struct.pack("<I", 2**24), b"x" * 2**24, b"\x85" * 100), "'tuple'"),
    "a name that is long": (proto(b"c", b"x" * 2**22, b"\ny\n"), "holds a 'xxx"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_costs_no_more_than_it_weighs(tmp_path, name):
    content, message = BOMBS[name]
    (tmp_path / "a.pt").write_bytes(archive(content))
    start = time.process_time()
    refused(tmp_path / "a.pt", message)
    assert time.process_time() - start < 5


def test_the_most_that_a_pickle_can_make_fits_into_memory():
    most = proto(b"(" + b"}" * (OPERATION_LIMIT - 10) + b"t")
    tracemalloc.start()
    try:
        assert len(unpickle(most)) == OPERATION_LIMIT - 10
        assert tracemalloc.get_traced_memory()[1] < 2**27
    finally:
        tracemalloc.stop()


REAL = io.BytesIO()
torch.save({"module": {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2).half()}}, REAL)


@given(at=st.integers(0, len(REAL.getvalue()) - 1), flip=st.integers(1, 255), cut=st.booleans())
def test_a_file_with_a_byte_changed_is_read_alike_or_refused(tmp_path_factory, at, flip, cut):
    file = tmp_path_factory.mktemp("weights") / "a.pt"
    file.write_bytes(REAL.getvalue())
    expected = {name: array.tobytes() for name, array in read(file).items()}
    harmed = bytearray(REAL.getvalue())
    harmed[at] ^= flip
    file.write_bytes(REAL.getvalue()[:at] if cut else bytes(harmed))
    try:
        found = read(file)
    except ConversionError:
        return
    assert {name: array.tobytes() for name, array in found.items()} == expected
