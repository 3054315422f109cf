"""A converted folder is believed only as far as it was checked, through every entry point."""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import svg_jax
from svg_jax.convert import (
    ConversionError,
    DamageError,
    convert_pipeline,
    export_pipeline,
    load_component,
    plan_conversion,
    read_contents,
    verify_pipeline,
)
from svg_jax.convert.checkpoint.manifest import read_manifest, write_manifest
from svg_jax.convert.formats.digests import file_digest
from svg_jax.sampling.identity import check_same_run

BUNDLED = Path(svg_jax.__file__).parent / "assets" / "tiny_cogvideox"
LEAF = "transformer/weights/blocks.attention.query.kernel"
ZARR, CHUNK = f"{LEAF}/zarr.json", f"{LEAF}/c/0/0/0"
OTHER_CHUNK = "transformer/weights/blocks.attention.key.kernel/c/0/0/0"
SCHEDULER = "scheduler/scheduler_config.json"
GENERATE = ["--prompt=a red three", "--steps=2", "--num-frames=4", "-o=a.npz"]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder") / "model"
    convert_pipeline(BUNDLED, folder)
    return folder


@pytest.fixture
def own_copy(converted, tmp_path):
    return Path(shutil.copytree(converted, tmp_path / "model"))


def edit(name, change):
    """Change what a JSON file says."""

    def damage(folder):
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(values))

    return damage


def instead(name, make):
    """Put something else in the place of a file or folder."""

    def damage(folder):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make(path)

    return damage


def added(name, make=Path.touch):
    def damage(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        make(folder / name)

    return damage


def link_to(target):
    return lambda path: path.symlink_to(target)


def append(file, text):
    file.write_text(file.read_text() + text)


def copied_elsewhere(path):
    """A link to the very same bytes, outside of the folder."""
    elsewhere = path.parents[2] / "elsewhere"
    elsewhere.write_bytes(b"{}")
    path.symlink_to(elsewhere)


def zarr(*keys, value):
    def change(values):
        for key in keys[:-1]:
            values = values[key]
        values[keys[-1]] = value

    return edit(ZARR, change)


def forged(damage):
    """Damage that the manifest was made to agree with."""

    def both(folder):
        damage(folder)
        manifest = read_manifest(folder)
        digests = {name: file_digest(folder / name) for name in manifest.weights}
        write_manifest(folder, dataclasses.replace(manifest, weights=digests))

    return both


def claimed(change):
    """A manifest with its right digest, of whatever somebody put into it."""

    def damage(folder):
        values = json.loads((folder / "manifest.json").read_text())
        del values["sha256"]
        change(values)
        text = json.dumps(values, indent=1, sort_keys=True)
        values["sha256"] = hashlib.sha256(text.encode()).hexdigest()
        text = json.dumps(values, indent=1, sort_keys=True) + "\n"
        (folder / "manifest.json").write_text(text)

    return damage


def claimed_of_a_tensor(**changes):
    return claimed(lambda v: next(iter(v["components"]["transformer"].values())).update(changes))


GRID = ("chunk_grid", "configuration", "chunk_shape")
DAMAGE = {
    "a scheduler that was edited": (
        edit(SCHEDULER, lambda v: v.update(snr_shift_scale=1.0)),
        SCHEDULER,
    ),
    "a transformer's config that was edited": (
        edit("transformer/config.json", lambda v: v.update(num_layers=3)),
        "transformer/config.json",
    ),
    "an encoder's config with a blank more": (
        lambda folder: append(folder / "text_encoder/config.json", " "),
        "text_encoder/config.json",
    ),
    "another tokenizer": (
        edit("tokenizer/tokenizer.json", lambda v: v["model"]["vocab"].update(dog=1)),
        "tokenizer/tokenizer.json",
    ),
    "another index": (edit("model_index.json", lambda v: v.pop("scheduler")), "model_index.json"),
    "a tokenizer that was added": (added("tokenizer/spiece.model"), "tokenizer/spiece.model"),
    "a component that was added": (
        added("image_processor/preprocessor_config.json"),
        "image_processor/preprocessor_config.json",
    ),
    "defaults that were edited": (
        lambda folder: append(folder / "svg_jax.json", " "),
        "svg_jax.json",
    ),
    "a config that was added": (added("config.json"), "config.json"),
    "a config of endless holes": (
        lambda folder: os.truncate(folder / "tokenizer/tokenizer.json", 2**41),
        "tokenizer/tokenizer.json",
    ),
    "a pipe as a config": (instead("transformer/config.json", os.mkfifo), "config.json"),
    "a pipe as the index": (instead("model_index.json", os.mkfifo), "model_index.json"),
    "a pipe as the manifest": (instead("manifest.json", os.mkfifo), "manifest.json"),
    "a pipe as a chunk": (instead(CHUNK, os.mkfifo), CHUNK.split("weights/")[1]),
    "a pipe as a leaf's layout": (instead(ZARR, os.mkfifo), "zarr.json"),
    "a link to a device": (instead(CHUNK, link_to("/dev/zero")), "query.kernel/c/0/0/0"),
    "a link to elsewhere": (instead(SCHEDULER, copied_elsewhere), SCHEDULER),
    "a link to nothing": (instead(ZARR, link_to("nowhere")), "zarr.json"),
    "weights elsewhere": (instead("transformer/weights", link_to("/etc")), "transformer/weights"),
    "a chunk that is missing": (lambda folder: (folder / CHUNK).unlink(), "query.kernel/c/0/0/0"),
    "a chunk that was cut": (
        lambda folder: os.truncate(folder / CHUNK, 64),
        "query.kernel/c/0/0/0",
    ),
    "a chunk of endless holes": (
        lambda folder: os.truncate(folder / CHUNK, 2**41),
        "query.kernel/c/0/0/0",
    ),
    "chunks of 1e9": (zarr(*GRID, value=[10**9] * 3), "query.kernel"),
    "chunks of 1e9, forged": (forged(zarr(*GRID, value=[10**9] * 3)), "query.kernel"),
    "smaller chunks, forged": (forged(zarr(*GRID, value=[1, 192, 192])), "query.kernel"),
    "another endian": (
        zarr("codecs", 1, "configuration", "endian", value="big"),
        "query.kernel",
    ),
    "another endian, forged": (
        forged(zarr("codecs", 1, "configuration", "endian", value="big")),
        "query.kernel",
    ),
    "no transpose, forged": (forged(edit(ZARR, lambda v: v["codecs"].pop(0))), "query.kernel"),
    "another dtype, forged": (forged(zarr("data_type", value="bfloat16")), "query.kernel"),
    "a list of weights": (claimed(lambda v: v.update(weights=[])), "manifest.json"),
    "sources of a number": (claimed(lambda v: v.update(sources=3)), "manifest.json"),
    "a shape of text": (claimed_of_a_tensor(shape=["3"]), "manifest.json"),
    "a negative shape": (claimed_of_a_tensor(shape=[-3]), "manifest.json"),
    "a digest of a number": (claimed_of_a_tensor(stored_sha256=3), "manifest.json"),
    "another shape, forged": (forged(zarr("shape", value=[6, 96, 384])), "query.kernel"),
}


def damaged(message, call):
    with pytest.raises(DamageError, match=message) as caught:
        call()
    sentence = str(caught.value)
    assert caught.value.exit_code == 4
    assert "\n" not in sentence
    assert len(sentence) <= 500


@pytest.mark.parametrize("damage", DAMAGE)
def test_whatever_is_damaged_is_refused_wherever_the_folder_is_opened(
    own_copy, tmp_path, run, damage
):
    harm, where = DAMAGE[damage]
    harm(own_copy)
    names_the_file = f"{where}|{where.replace('weights/', 'weights: .*')}"
    damaged(names_the_file, lambda: svg_jax.from_pretrained(own_copy))
    damaged(names_the_file, lambda: load_component(own_copy, "transformer"))
    damaged(names_the_file, lambda: export_pipeline(own_copy, tmp_path / "out"))
    damaged(names_the_file, lambda: read_contents(own_copy))
    damaged(names_the_file, lambda: verify_pipeline(own_copy))
    for command in (
        ["generate", "--model", own_copy, *GENERATE],
        ["inspect", own_copy],
    ):
        result = run(*command)
        assert (result.code, result.err.count("\n"), result.out) == (4, 1, "")
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"model", "elsewhere"}


def swap_chunks(folder):
    first, second = (folder / CHUNK).read_bytes(), (folder / OTHER_CHUNK).read_bytes()
    (folder / CHUNK).write_bytes(second)
    (folder / OTHER_CHUNK).write_bytes(first)


def flip_a_bit(folder):
    content = bytearray((folder / CHUNK).read_bytes())
    content[99] ^= 1
    (folder / CHUNK).write_bytes(content)


def turn_bytes(folder):
    np.fromfile(folder / CHUNK, np.uint16).byteswap().tofile(folder / CHUNK)


@pytest.mark.parametrize("harm", [swap_chunks, flip_a_bit, turn_bytes])
def test_numbers_are_compared_on_request(own_copy, tmp_path, run, harm):
    harm(own_copy)
    load_component(own_copy, "transformer")  # the layout is right, and no number was looked at
    calls = []
    where = rf"({CHUNK}|{OTHER_CHUNK})"

    def watch(*call):
        calls.append(call)

    damaged(where, lambda: load_component(own_copy, "transformer", verify=True))
    damaged(where, lambda: svg_jax.from_pretrained(own_copy, verify=True, progress=watch))
    damaged(where, lambda: verify_pipeline(own_copy))
    damaged("transformer", lambda: export_pipeline(own_copy, tmp_path / "out"))
    load_component(own_copy, "text_encoder", verify=True)  # another component's are not its matter
    assert calls
    assert calls[-1][0] < calls[-1][1]
    result = run("generate", "--model", own_copy, "--verify", *GENERATE)
    assert (result.code, result.err.count("\n"), result.out) == (4, 1, "")


def test_a_sound_folder_passes_every_check(own_copy):
    (own_copy / "README.md").write_text("of the user")  # which no reader looks for
    (own_copy / "tokenizer/.DS_Store").touch()
    calls = []
    svg_jax.from_pretrained(own_copy, verify=True, progress=lambda *call: calls.append(call))
    assert calls[-1][0] == calls[-1][1] > 0


def test_a_saved_run_is_of_the_scheduler_that_the_pipeline_has(converted, tmp_path):
    """The folder's cannot be edited, and one that was put in by hand is told from it."""
    pipeline: Any = svg_jax.from_pretrained(converted)
    other = dataclasses.replace(pipeline.scheduler, snr_shift_scale=1.5)
    settings = pipeline.settings("a red three", seed=0)
    saved, current = (
        pipe.fingerprint(settings)
        for pipe in (pipeline, dataclasses.replace(pipeline, scheduler=other))
    )
    with pytest.raises(ValueError, match=r"scheduler\.snr_shift_scale .*, this one 1\.5"):
        check_same_run(tmp_path / "state", saved, current, settings)


def test_a_folder_in_the_hubs_cache_has_its_files_in_blobs(converted, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    shutil.copytree(converted, snapshot)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for number, file in enumerate(f for f in sorted(snapshot.rglob("*")) if f.is_file()):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))
    load_component(snapshot, "transformer", verify=True)
    verify_pipeline(snapshot)


class TestPaths:
    """`.`, `..`, `//`, links, `~`, a relative cache: as the kernel and the shell have them."""

    @pytest.fixture
    def place(self, converted, tmp_path, monkeypatch):
        """A folder with the model behind many paths."""
        inner = tmp_path / "real" / "inner"
        inner.mkdir(parents=True)
        shutil.copytree(converted, tmp_path / "real" / "model")
        (tmp_path / "link").symlink_to(inner)
        (tmp_path / "model link").symlink_to(tmp_path / "real" / "model")
        (tmp_path / "other").mkdir()
        monkeypatch.setenv("HOME", str(tmp_path / "real"))
        return tmp_path

    PATHS = (
        "..//real/./inner/../model/",
        "../link/../model",  # not ../model, which normalising the text would give
        "../model link",
        "../real/inner/../../model link/.",
        "~/model",
    )

    @pytest.mark.parametrize("path", PATHS)
    def test_of_a_converted_folder(self, place, run, monkeypatch, path):
        monkeypatch.chdir(place / "other")
        verify_pipeline(path)
        assert read_contents(path).converted
        load_component(path, "text_encoder", verify=True)
        svg_jax.from_pretrained(path)
        export_pipeline(path, "../link/../back")
        assert (place / "real" / "back" / "model_index.json").is_file()
        assert run("verify", path).code == 0

    @pytest.mark.parametrize("path", ["../link/../new", "./a//../new/", "~/new"])
    def test_of_a_destination(self, place, run, monkeypatch, path):
        monkeypatch.chdir(place / "other")
        (place / "other" / "a").mkdir()
        convert_pipeline(BUNDLED, path, components=["text_encoder"])
        made = place / ("other" if path.startswith("./") else "real") / "new"
        verify_pipeline(made)
        again = run("convert", BUNDLED, path, "--components=text_encoder", "--overwrite")
        assert again.code == 0
        assert f"will delete {made} (" in again.err  # before it does
        assert "manifest.json, model_index.json" in again.err
        verify_pipeline(made)
        assert not list(made.parent.glob(".new*"))

    @pytest.mark.parametrize("cache", ["../link/../cache", "~/cache"])
    def test_of_the_cache(self, place, monkeypatch, cache):
        monkeypatch.chdir(place / "other")
        monkeypatch.setenv("SVG_JAX_CACHE", cache)
        pipeline: Any = svg_jax.from_pretrained(BUNDLED)
        monkeypatch.chdir("/")  # weights are read later, from where they were found
        pipeline.text_encoder.load()

    @pytest.mark.parametrize("path", ["bad\udcff", "漢\udce5字/model", "a\0b", ""])
    def test_that_are_none_are_refused_before_anything_is_written(
        self, converted, tmp_path, monkeypatch, path
    ):
        monkeypatch.chdir(tmp_path)
        for call in (
            lambda: convert_pipeline(BUNDLED, path),
            lambda: convert_pipeline(path, "out"),
            lambda: plan_conversion(path),
            lambda: export_pipeline(converted, path),
            lambda: export_pipeline(path, "out"),
            lambda: verify_pipeline(path),
            lambda: read_contents(path),
            lambda: load_component(path, "vae"),
            lambda: svg_jax.from_pretrained(path),
            lambda: svg_jax.from_pretrained(BUNDLED, cache_dir=path),
        ):
            with pytest.raises(ConversionError, match="is no path") as caught:
                call()
            assert caught.value.exit_code == 2
            str(caught.value).encode()  # can be printed
        assert list(tmp_path.iterdir()) == []

    def test_of_any_name_in_utf8(self, tmp_path, run):
        name = "-漢字 ü%20#?🎞"
        convert_pipeline(BUNDLED, tmp_path / name / "m", components=["text_encoder"])
        assert run("verify", f"./{name}/m").code == 0
        load_component(tmp_path / name / "m", "text_encoder")
