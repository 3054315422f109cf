"""Arrays that users give as files: read as they are, or refused in a sentence and little memory."""

import io
import os
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from svg_jax import cli
from svg_jax.array_files import read_arrays

LATENTS = np.random.default_rng(0).normal(size=(1, 2, 3, 4, 5)).astype(np.float32)
FEATURES = np.random.default_rng(1).normal(size=(1, 6, 8)).astype(np.float32)


def npy(array: Any = LATENTS, **changes):
    """The bytes of an .npy file, or of one whose header says something else."""
    file = io.BytesIO()
    if changes:
        header = {"descr": "<f4", "fortran_order": False, "shape": array.shape} | changes
        np.lib.format.write_array_header_1_0(file, header)
        file.write(array.tobytes())
    else:
        np.save(file, array, allow_pickle=True)
    return file.getvalue()


def archive(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as out:
        for name, content in members.items():
            out.writestr(f"{name}.npy", content)
    return file.getvalue()


def bomb():
    """A quarter of a gigabyte of zeros, and some, in a megabyte."""
    file = io.BytesIO()
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as out,
        out.open("a.npy", "w") as member,
    ):
        header = {"descr": "<f4", "fortran_order": False, "shape": (1, 1, 1, 17, 2**22)}
        np.lib.format.write_array_header_1_0(member, header)
        zeros = bytes(2**24)
        for _ in range(17):
            member.write(zeros)
    return file.getvalue()


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("form", ["npy", "npz", "other name"])
def test_arrays_are_read_as_they_are(dtype, order, form, tmp_path):
    array = np.asarray(LATENTS, dtype, order=order)
    path = tmp_path / "a"  # the content tells the format
    wrapped = {
        "npz": lambda x: archive(latents=x, other=npy()),
        "other name": lambda x: archive(a=x),
    }
    path.write_bytes(wrapped.get(form, lambda x: x)(npy(array)))
    found = read_arrays({"latents": path, "image_latents": None})
    assert found.keys() == {"latents"}
    assert found["latents"].dtype == np.dtype(dtype).newbyteorder("=")
    np.testing.assert_array_equal(found["latents"], array)


def test_embeddings_come_with_what_goes_with_them(tmp_path):
    mask = np.ones((1, 6), np.int64)
    members = {
        "prompt_embeds": FEATURES,
        "negative_prompt_embeds": -FEATURES,
        "pooled_prompt_embeds": FEATURES[:, 0],
        "prompt_attention_mask": mask,
    }
    np.savez(tmp_path / "a.npz", **members, else_=mask)  # pyright: ignore[reportArgumentType]
    found = read_arrays({"prompt_embeds": tmp_path / "a.npz"})
    assert found.keys() == members.keys()
    for name, array in members.items():
        np.testing.assert_array_equal(found[name], array)


def flipped(content):
    """An archive with a damaged byte in the first member's data."""
    at = len(content) // 3
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


HOSTILE = {
    "nothing": (b"", "is no .npy or .npz file"),
    "text": (b"\x1b[31mred\x07 and more", "is no .npy or .npz file"),
    "a zip of nothing": (archive(), "has no array latents: it has none"),
    "a cut-off zip": (archive(a=npy())[:-30], "is no .npy or .npz file, or damaged"),
    "a damaged zip": (flipped(archive(a=npy())), "is no .npy or .npz file, or damaged"),
    "a zip of text": (archive(a=b"text"), "is no .npy or .npz file, or damaged"),
    "names": (
        archive(**{"\x1b[31m": npy(), "b" * 500: npy(), **{f"c{i}": npy() for i in range(99)}}),
        r"has no array latents: it has \x1b[31m, bbb",
    ),
    "a bomb": (bomb(), "is too large: latents of the shape (1, 1, 1, 17, 4194304)"),
    "terabytes": (npy(shape=(1, 2, 3, 4, 10**12)), "has 96,000,000,000,000 bytes, and there are "),
    "terabytes in a zip": (archive(a=npy(shape=(1, 2, 3, 4, 10**12))), "is cut off or damaged"),
    "too few bytes": (npy()[:-1], "is cut off or damaged: latents of the shape (1, 2, 3, 4, 5)"),
    "too many bytes": (npy() + b"\0", "is cut off or damaged"),
    "negative sizes": (npy(shape=(1, 2, 3, -4, -5)), "got the shape (1, 2, 3, -4, -5)"),
    "an empty batch": (npy(LATENTS[:0]), "got the shape (0, 2, 3, 4, 5)"),
    "another rank": (npy(LATENTS[0]), "must hold latents [batch, channels or frames, "),
    "a number": (npy(np.float32(7)), "got the shape ()"),
    "very many axes": (npy(shape=(1,) * 60), "got the shape of 60 axes"),
    "objects": (npy(np.array([{"a": 1}], object)), "must hold latents in floating point: got obj"),
    "integers": (npy(LATENTS.astype(int)), "must hold latents in floating point: got int64"),
    "complex": (npy(LATENTS.astype(complex)), "got complex128"),
    "text as an array": (npy(LATENTS.astype(str)), "got <U"),
    "large text": (npy(descr=f"<U{2**28}"), "got <U268435456"),
    "bfloat16": (npy(LATENTS.astype(ml_dtypes.bfloat16)), "NumPy knows no bfloat16: save it as"),
    "fields": (npy(descr=[("a", "<f4")]), "must hold latents in floating point"),
    "NaN": (npy(np.where(LATENTS > 1, np.nan, LATENTS)), "values that are not finite"),
    "infinity in a zip": (
        archive(latents=npy(np.where(LATENTS > 1, -np.inf, LATENTS))),
        "that are not finite",
    ),
    "a deep header": (b"\x93NUMPY\x01\x00\x70\x17" + b"[" * 6000, "is no .npy or .npz file"),
    "another argument's array": (
        archive(negative_prompt_embeds=npy()),
        "has no array latents: it has negative_prompt_embeds, which is another argument's",
    ),
    "another version": (b"\x93NUMPY\x09\x01" + npy()[8:], "is in version 9.1 of the format .npy"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_other_files_are_one_sentence_and_little_memory(name, tmp_path):
    content, sentence = HOSTILE[name]
    path = tmp_path / "noise.npy"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the sentence is looked for below
            read_arrays({"latents": path})
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert sentence in message
    assert message.startswith(str(path))
    assert len(message.removeprefix(str(path))) < 400
    assert message.isprintable()


def test_a_sparse_file_of_terabytes_is_not_read(tmp_path):
    path = tmp_path / "noise.npy"
    path.write_bytes(npy(shape=(1, 1, 1, 1, 2**38)))
    os.truncate(path, len(npy(shape=(1, 1, 1, 1, 2**38))) - LATENTS.nbytes + 2**40)
    with pytest.raises(ValueError, match="is too large: latents"):
        read_arrays({"latents": path})


@pytest.mark.parametrize("option", ["--latents", "--prompt-embeds", "--image-latents", "--image"])
def test_the_command_line_finds_it_before_a_model_is_looked_for(
    option, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("zeros").write_bytes(bytes(99))
    Path("folder").mkdir()
    for name, code in [("pipe", 2), ("zeros", 2), ("folder", 2), ("/dev/zero", 2), ("none", 2)]:
        words = ["generate", "--model", "no/such/model", option, name, "-o", "a.npz"]
        monkeypatch.setattr(sys, "argv", ["svg-jax", *words])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        error = capsys.readouterr().err
        assert exit.value.code == code
        assert error.startswith(f"svg-jax: {name}")
        assert len(error.splitlines()) == 1
