"""A conversion that is killed at any moment is taken up again; two at once keep apart."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_source import ENCODER_FILE, TRANSFORMER_FILE, change_tensors, write_source

from svg_jax.convert import (
    ConversionError,
    RefusedError,
    convert_pipeline,
    export_pipeline,
    pipeline,
    read_manifest,
    verify_pipeline,
)

PARTIAL = ".out.partial"
KILLED_BETWEEN = """
import os, signal, sys
from svg_jax.convert import convert_pipeline, pipeline
def kill(component, *arguments):
    if component.name == "transformer":
        os.kill(os.getpid(), signal.SIGKILL)
    return write(component, *arguments)
write, pipeline._write_component = pipeline._write_component, kill
convert_pipeline(sys.argv[1], sys.argv[2])
"""
KILLED_AFTER = """
import sys, threading, os, signal
from svg_jax.convert import convert_pipeline, pipeline, plan  # imports are not timed
from svg_jax.convert.checkpoint import load
print("ready", flush=True)
sys.stdin.readline()
convert_pipeline(sys.argv[1], sys.argv[2])
"""


@pytest.fixture
def source(tmp_path):
    return write_source(tmp_path / "source")


@pytest.fixture
def half(source, tmp_path):
    """What a run leaves that was killed when the encoder was written, the transformer not."""
    arguments = [sys.executable, "-c", KILLED_BETWEEN, str(source), str(tmp_path / "out")]
    assert subprocess.run(arguments, cwd=tmp_path).returncode == -signal.SIGKILL
    return tmp_path / PARTIAL


def weights_of(folder: Path) -> dict[Path, tuple[int, int]]:
    """What the encoder's files keep if they are not written again."""
    weights = folder / "text_encoder/weights"
    files = {file: file.stat() for file in weights.rglob("*") if file.is_file()}
    return {
        file.relative_to(weights): (stat.st_ino, stat.st_mtime_ns) for file, stat in files.items()
    }


def test_a_finished_component_is_kept_and_the_rest_is_written(source, half, tmp_path):
    before, calls = weights_of(half), []
    convert_pipeline(source, tmp_path / "out", progress=lambda *call: calls.append(call))
    assert weights_of(tmp_path / "out") == before
    assert calls[0][0] == sum(t.nbytes for t in encoder_tensors(source))
    assert calls[-1][0] == calls[-1][1]
    verify_pipeline(tmp_path / "out")
    assert not half.exists()
    assert not (tmp_path / "out/manifest.partial.json").exists()


def encoder_tensors(source):
    from safetensors.numpy import load_file

    return load_file(source / ENCODER_FILE).values()


def test_being_killed_again_loses_nothing_either(source, half, tmp_path):
    before = weights_of(half)
    arguments = [sys.executable, "-c", KILLED_BETWEEN, str(source), str(tmp_path / "out")]
    assert subprocess.run(arguments, cwd=tmp_path).returncode == -signal.SIGKILL
    convert_pipeline(source, tmp_path / "out")
    assert weights_of(tmp_path / "out") == before


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def change_source(tensors):
    tensors["shared.weight"] += np.float16(1)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda half, source: flip_a_bit(chunk_of(half / "text_encoder")),
        lambda half, source: flip_a_bit(half / "manifest.partial.json"),
        lambda half, source: (half / "manifest.partial.json").unlink(),
        lambda half, source: (half / "text_encoder/weights/more").touch(),
        lambda half, source: change_tensors(source / ENCODER_FILE, change_source),
    ],
    ids=["flipped bit", "damaged manifest", "no manifest", "another file", "another source"],
)
def test_what_is_not_proven_is_written_again(source, half, tmp_path, spoil):
    spoil(half, source)
    before = weights_of(half)
    convert_pipeline(source, tmp_path / "out")
    assert weights_of(tmp_path / "out") != before
    verify_pipeline(tmp_path / "out")
    convert_pipeline(source, tmp_path / "fresh")
    same_conversion(tmp_path / "out", tmp_path / "fresh")


def chunk_of(component: Path) -> Path:
    """The largest of a component's files of weights."""
    files = (file for file in component.rglob("c/**/*") if file.is_file())
    return max(files, key=lambda file: file.stat().st_size)


def same_conversion(one: Path, other: Path) -> None:
    found, expected = read_manifest(one), read_manifest(other)
    assert found.components == expected.components
    assert (found.sources, found.files) == (expected.sources, expected.files)


def test_another_dtype_begins_anew(source, half, tmp_path):
    convert_pipeline(source, tmp_path / "out", dtype="float32")
    verify_pipeline(tmp_path / "out")
    record = read_manifest(tmp_path / "out").components["text_encoder"]["shared.weight"]
    assert record.stored_dtype == "float32"


def test_what_a_killed_conversion_left_is_no_part_of_an_export(source, half, tmp_path):
    convert_pipeline(source, tmp_path / "other")
    export_pipeline(tmp_path / "other", tmp_path / "out")
    assert not list((tmp_path / "out").rglob("weights"))


def kill_at_a_random_moment(source: Path, destination: Path, most: float) -> int:
    arguments = [sys.executable, "-c", KILLED_AFTER, str(source), str(destination)]
    pipe = subprocess.PIPE
    with subprocess.Popen(arguments, cwd=source.parent, stdin=pipe, stdout=pipe) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.stdin.write(b"go\n")
        process.stdin.flush()
        time.sleep(random.uniform(0, most))
        process.kill()
    return process.returncode


@pytest.mark.parametrize("kills", [5, pytest.param(25, marks=pytest.mark.slow)])
def test_killed_at_random_moments_the_folder_is_absent_or_whole(source, tmp_path, kills):
    start = time.perf_counter()
    convert_pipeline(source, tmp_path / "expected")
    most = time.perf_counter() - start
    destination = tmp_path / "out"
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    random.seed(seed)
    for _ in range(kills):
        kill_at_a_random_moment(source, destination, most)
        if destination.exists():
            verify_pipeline(destination)
        else:
            convert_pipeline(source, destination)
        same_conversion(destination, tmp_path / "expected")
        verify_pipeline(destination)
        destination.rename(tmp_path / "done")
        subprocess.run(["rm", "-r", tmp_path / "done"], check=True)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "expected"}


def test_a_second_conversion_at_once_is_refused_and_the_first_ends_well(source, tmp_path):
    tried = []

    def second(*_):
        if not tried:
            with pytest.raises(RefusedError, match="another run is writing") as refusal:
                convert_pipeline(source, tmp_path / "out")
            tried.append(refusal)

    convert_pipeline(source, tmp_path / "out", progress=second)
    assert tried
    verify_pipeline(tmp_path / "out")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_is_told_to_end_says_what_stands_and_goes_on(
    source, tmp_path, run, monkeypatch, number
):
    monkeypatch.setattr(os, "_exit", sys.exit)
    write = pipeline._write_component

    def end(at):
        def writing(component, staging, *arguments):
            if component.name == at:
                (staging / at).mkdir()
                signal.raise_signal(number)
            return write(component, staging, *arguments)

        return writing

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        monkeypatch.setattr(pipeline, "_write_component", end("text_encoder"))
        early = run("convert", source, "out")
        monkeypatch.setattr(pipeline, "_write_component", end("transformer"))
        late = run("convert", source, "out")
    finally:
        signal.signal(signal.SIGINT, before)
    out, partial = tmp_path / "out", tmp_path / PARTIAL
    assert (early.code, late.code) == (130, 130)
    assert early.err == (
        f"svg-jax: stopped: {out} was not made, and nothing else was left; convert again\n"
    )
    assert late.err == (
        f"svg-jax: stopped: {out} was not made; the components that are done are kept in "
        f"{partial}, from which the same command goes on\n"
    )
    assert {path.name for path in partial.iterdir()} == {
        "manifest.partial.json",
        "text_encoder",
    }
    kept = weights_of(partial)
    monkeypatch.setattr(pipeline, "_write_component", write)
    assert run("convert", source, "out").code == 0
    assert weights_of(out) == kept
    verify_pipeline(out)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


def test_the_lock_goes_with_its_process(source, half, tmp_path):
    convert_pipeline(source, tmp_path / "out")  # half's process had the lock when it was killed


def touch(file):
    os.utime(file, ns=(0, 0))


def replace(file):
    copy = file.with_name("copy")
    copy.write_bytes(file.read_bytes())
    stat = file.stat()
    os.utime(copy, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(copy, file)


def grow(file):
    with file.open("ab") as stream:
        stream.write(b"\0")


@pytest.mark.parametrize("change", [touch, replace, grow, Path.unlink])
@pytest.mark.parametrize("name", [TRANSFORMER_FILE, "text_encoder/config.json"])
def test_a_source_that_changes_while_it_is_read_is_refused(source, tmp_path, change, name):
    changed = []

    def during(*_):
        if not changed:
            change(source / name)
            changed.append(name)

    message = "was changed while it was read|cannot be read|cut off"
    with pytest.raises(ConversionError, match=message):
        convert_pipeline(source, tmp_path / "out", progress=during)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_complete_folder_that_was_not_renamed_yet_is_taken_over(source, tmp_path):
    convert_pipeline(source, tmp_path / "out")
    before = weights_of(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / PARTIAL)
    convert_pipeline(source, tmp_path / "out")
    assert weights_of(tmp_path / "out") == before
    index = json.loads((tmp_path / "out/model_index.json").read_text())
    assert index == json.loads((source / "model_index.json").read_text())
