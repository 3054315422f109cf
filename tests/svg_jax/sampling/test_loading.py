"""Models in every form: a converted folder, one in diffusers' layout, the hub, and its cache."""

import json
import os
import shutil
import sys
import threading
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from svg_jax import cli, from_pretrained
from svg_jax.convert import convert_pipeline, read_manifest
from svg_jax.convert.sources.hub import is_hub_id
from svg_jax.sampling import cache as converted

BUNDLED = Path(str(files("svg_jax"))) / "assets" / "tiny_cogvideox"
COMMIT = "0123456789" * 4
CALL: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 1, "seed": 3}
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def source(tmp_path):
    """A folder in diffusers' layout."""
    return Path(shutil.copytree(BUNDLED, tmp_path / "tiny"))


@pytest.fixture
def conversions(monkeypatch):
    """The sources that are converted, in order."""
    found = []

    def convert(source, *arguments, **options):
        found.append(Path(source))
        return convert_pipeline(source, *arguments, **options)

    monkeypatch.setattr(converted, "convert_pipeline", convert)
    return found


def sample(pipeline):
    return pipeline("a red three moving left over the flower", **CALL).latents


def test_a_folder_of_diffusers_is_converted_once(source, conversions, tmp_path, monkeypatch):
    monkeypatch.setenv("SVG_JAX_CACHE", str(tmp_path / "cache"))
    progress = []
    pipeline = from_pretrained(source, progress=lambda *step: progress.append(step))
    assert progress[-1][0] == progress[-1][1] > 7e6
    again = from_pretrained(str(source))
    assert conversions == [source]
    (folder,) = (tmp_path / "cache").glob("tiny-*")
    convert_pipeline(source, tmp_path / "out")
    whole = from_pretrained(tmp_path / "out")
    np.testing.assert_array_equal(sample(pipeline), sample(whole))
    np.testing.assert_array_equal(sample(again), sample(whole))
    assert read_manifest(folder).components == read_manifest(tmp_path / "out").components


def test_a_source_that_has_changed_is_converted_again(source, conversions, tmp_path):
    def folders():
        from_pretrained(source, cache_dir=tmp_path / "cache")
        return len(list((tmp_path / "cache" / "svg-jax").glob("tiny-*")))

    assert folders() == folders() == 1
    settings = source / "scheduler/scheduler_config.json"
    settings.write_text(settings.read_text() + " ")
    assert folders() == 2
    os.utime(source / WEIGHTS, ns=(0, 0))
    assert folders() == folders() == 3
    assert len(conversions) == 3


def test_one_converts_and_the_others_wait(source, tmp_path, monkeypatch, caplog):
    started = []

    def slowly(source, target, **options):
        started.append(target)
        time.sleep(0.5)
        convert_pipeline(source, target, **options)

    monkeypatch.setattr(converted, "convert_pipeline", slowly)
    arguments = {"cache_dir": tmp_path / "cache", "check": lambda _: None}
    found = []
    threads = [
        threading.Thread(
            target=lambda: found.append(converted.converted_folder(source, **arguments))
        )
        for _ in range(3)
    ]
    with caplog.at_level("INFO", logger="svg_jax"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(started) == 1
    assert found == started * 3
    assert sum("waiting for another" in record.message for record in caplog.records) == 2


def test_half_a_conversion_is_never_used(source, conversions, tmp_path):
    damaged = source / "text_encoder/model.safetensors"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-4] + np.float32(np.nan).tobytes())  # found out while it is read
    stat = damaged.stat()
    for _ in range(2):
        with pytest.raises(ValueError, match="NaN"):
            from_pretrained(source, cache_dir=tmp_path)
    assert list((tmp_path / "svg-jax").glob("tiny-*")) == []
    damaged.write_bytes(whole)
    os.utime(damaged, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert np.isfinite(sample(from_pretrained(source, cache_dir=tmp_path))).all()
    assert len(conversions) == 3


def write_hub_cache(cache, name="models--owner--tiny"):
    """What the hub's client leaves: links in `snapshots` to nameless files in `blobs`."""
    repository = cache / name
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(path for path in BUNDLED.rglob("*") if path.is_file())):
        blob, link = (
            repository / "blobs" / f"{number:040x}",
            repository / "snapshots" / COMMIT / file.relative_to(BUNDLED),
        )
        shutil.copyfile(file, blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return repository / "snapshots" / COMMIT


def test_the_hubs_cache_serves_without_a_network(conversions, tmp_path):
    snapshot = write_hub_cache(tmp_path)
    pipeline = from_pretrained("owner/tiny", cache_dir=tmp_path)
    assert np.isfinite(sample(pipeline)).all()
    from_pretrained("owner/tiny", revision=COMMIT, cache_dir=tmp_path)
    from_pretrained(snapshot, cache_dir=tmp_path)  # the folder itself
    assert conversions == [snapshot]
    with pytest.raises(ConnectionError, match=r"owner/other: is no folder here.*cannot be reached"):
        from_pretrained("owner/other", cache_dir=tmp_path)
    with pytest.raises(ConnectionError, match="cannot be reached"):
        from_pretrained("owner/tiny", revision="v2", cache_dir=tmp_path)


class Hub:
    """Stands in for the hub: a repository's files, and what of them was asked for."""

    def __init__(self, folder):
        self.folder, self.snapshot = folder, None
        self.fetched: set[str] = set()
        self.revisions: list[str | None] = []

    def snapshot_download(self, _hub_id, *, revision, cache_dir, allow_patterns):
        self.revisions.append(revision)
        cache = Path(cache_dir or self.folder.parent / "hub")
        self.snapshot = cache / "models--owner--tiny" / "snapshots" / COMMIT
        names = [str(file.relative_to(self.folder)) for file in self.folder.rglob("*.*")]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            self.fetched.add(name)
            (self.snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / name, self.snapshot / name)
        return str(self.snapshot)


@pytest.fixture
def hub(tmp_path, source, monkeypatch):
    """A repository with more in it than is needed."""
    for name in (
        "README.md",
        "transformer/diffusion_pytorch_model.bin",
        "transformer/diffusion_pytorch_model-00001-of-00002.fp16.safetensors",
        "transformer/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        "text_encoder/pytorch_model.bin",
        "transformer_ema/diffusion_pytorch_model.safetensors",
        "text_encoder/model.fp16.safetensors",
        "onnx/model.onnx",
    ):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"")
    hub = Hub(source)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def test_only_what_is_needed_comes_from_the_hub(hub, tmp_path):
    pipeline = from_pretrained("owner/tiny", revision="v1", cache_dir=tmp_path / "cache")
    assert np.isfinite(sample(pipeline)).all()
    assert hub.fetched == {
        str(path.relative_to(BUNDLED))
        for path in BUNDLED.rglob("*")
        if path.is_file() and path.name != "README.md"
    }
    assert hub.revisions == ["v1", COMMIT]  # the weights are of the index's commit
    shutil.rmtree(hub.snapshot)
    hub.fetched.clear()
    from_pretrained("owner/tiny", cache_dir=tmp_path / "cache")
    assert hub.fetched == {"model_index.json", "svg_jax.json"}  # the conversion is there


def test_convert_takes_a_hub_id_too(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["svg-jax", "convert", "owner/tiny", "out", "--revision=v1"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--components=transformer"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert read_manifest(tmp_path / "out").components.keys() == {"transformer"}
    assert not any(name.startswith("text_encoder") for name in hub.fetched)
    assert hub.revisions == ["v1", COMMIT]


def test_a_variant_where_there_is_one(hub, tmp_path):
    fp16 = hub.folder / "text_encoder" / "model.fp16.safetensors"
    shutil.copyfile(hub.folder / "text_encoder" / "model.safetensors", fp16)
    for broken in hub.folder.glob("transformer/*fp16*"):
        broken.unlink()
    given: dict[str, Any] = {"variant": "fp16", "cache_dir": tmp_path / "cache"}
    pipeline = from_pretrained("owner/tiny", **given)
    weights = {name for name in hub.fetched if name.endswith(".safetensors")}
    assert weights == {"text_encoder/model.fp16.safetensors", WEIGHTS}
    np.testing.assert_array_equal(
        sample(pipeline), sample(from_pretrained(hub.folder, cache_dir=tmp_path / "plain"))
    )
    with pytest.raises(ValueError, match="weights of the variant 'fp32'"):
        from_pretrained("owner/tiny", variant="fp32", cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="weights of the variant 'fp32'"):
        from_pretrained(hub.folder, variant="fp32", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "StableDiffusionPipeline"}, "the pipeline is 'StableDiffusionPipeline'"),
        ({"safety_checker": ["diffusers", "Checker"]}, r"safety_checker \(Checker\) cannot be"),
        ({"boundary_ratio": 0.9}, "a Wan 2.2 of two transformers"),
    ],
)
def test_what_does_not_run_is_refused_before_weights_come(hub, tmp_path, changes, message):
    index = hub.folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        from_pretrained("owner/tiny", cache_dir=tmp_path)
    assert hub.fetched == {"model_index.json", "svg_jax.json"}


def test_a_repository_that_is_no_pipeline(hub, tmp_path):
    (hub.folder / "model_index.json").unlink()
    with pytest.raises(ValueError, match=r"owner/tiny: is no pipeline in diffusers' layout"):
        from_pretrained("owner/tiny", cache_dir=tmp_path)


RESPONSE = httpx2.Response(403, request=httpx2.Request("GET", "https://huggingface.co"))


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            errors.GatedRepoError("no\naccess", response=RESPONSE),
            PermissionError,
            r"owner/name: is gated: accept its licence on https://huggingface\.co/owner/name",
        ),
        (
            errors.RepositoryNotFoundError("404", response=RESPONSE),
            ValueError,
            "is no folder here and no repository on the hub",
        ),
        (
            errors.RevisionNotFoundError("404", response=RESPONSE),
            ValueError,
            "owner/name: has no revision 'v9' on the hub",
        ),
        (errors.LocalEntryNotFoundError("offline"), ConnectionError, "cannot be reached"),
        (errors.HfHubHTTPError("500", response=RESPONSE), ConnectionError, "cannot be reached"),
        (httpx2.ConnectError("broken off"), ConnectionError, "cannot be reached"),
    ],
)
def test_the_hubs_errors_are_one_sentence(monkeypatch, error, kind, message):
    def refuse(*_arguments, **_options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(kind, match=message) as found:
        from_pretrained("owner/name", revision="v9")
    assert "\n" not in str(found.value)


def test_what_is_no_model(source, tmp_path):
    convert_pipeline(source, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    for model, options, message in [
        ("nothing", {}, r"nothing: is no folder, and no hub id \(owner/name\) either"),
        (Path("owner/name"), {}, "is no folder"),
        ("a/b/c", {}, "no hub id"),
        ("../name", {}, "no hub id"),
        (tmp_path / "empty", {}, "holds neither manifest.json .* nor model_index.json"),
        (source, {"revision": "v1"}, "revision='v1' goes with a hub id alone"),
        (tmp_path / "out", {"variant": "fp16"}, "variant='fp16' has no meaning"),
    ]:
        with pytest.raises(ValueError, match=message):
            from_pretrained(model, **options)
    assert is_hub_id("THUDM/CogVideoX1.5-5B")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Calls the command line in an empty folder, with a cache of its own."""
    monkeypatch.setenv("SVG_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def call(model, *options, command="generate"):
        arguments = ["svg-jax", command, f"--model={model}", "--prompt=a red three", *options]
        arguments += ["--steps=1", "--guidance-scale=1", "-o=a.gif"]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code or 0, capsys.readouterr().err

    return call


@pytest.mark.parametrize("is_converted", [False, True])
def test_a_pipeline_without_a_scheduler(source, conversions, tmp_path, is_converted, run):
    shutil.rmtree(source / "scheduler")
    index = source / "model_index.json"
    entries = json.loads(index.read_text())
    del entries["scheduler"]
    index.write_text(json.dumps(entries))
    model = source
    if is_converted:
        model = tmp_path / "out"
        convert_pipeline(source, model)
    with pytest.raises(ValueError, match="the folder holds no scheduler"):
        from_pretrained(model, cache_dir=tmp_path / "cache")
    code, message = run(model)
    assert code == 2
    assert f"{model.name}/scheduler/scheduler_config.json: cannot be read: the folder" in message
    assert not conversions


def test_the_command_line_takes_what_python_takes(source, run):
    code, said = run("tiny")
    assert code == 0
    note, converting = said.splitlines()  # the folder here goes before the bundled model
    assert note == "svg-jax: ./tiny is taken for the model, not the bundled one of that name"
    assert converting.startswith("svg-jax: converting tiny, once, into ")
    assert run("tiny") == (0, note + "\n")
    code, said = run("owner/name")
    assert code == 3
    assert said.startswith("svg-jax: owner/name: is no folder here")
    assert len(said.splitlines()) == 1


def test_the_command_line_takes_a_revision_and_a_variant(hub, tmp_path, run):
    fp16 = hub.folder / "text_encoder" / "model.fp16.safetensors"
    shutil.copyfile(hub.folder / "text_encoder" / "model.safetensors", fp16)
    for broken in hub.folder.glob("transformer/*fp16*"):
        broken.unlink()
    assert run("owner/tiny", "--revision=v1", "--variant=fp16")[0] == 0
    assert hub.revisions[0] == "v1"
    (folder,) = (tmp_path / "cache").glob("tiny-*")
    assert read_manifest(folder).variant == "fp16"


@pytest.mark.parametrize("command", ["generate", "compare"])
def test_a_revision_or_a_variant_where_it_has_no_meaning(source, run, tmp_path, command):
    convert_pipeline(source, tmp_path / "out")
    for model, option, message in [
        ("./tiny", "--revision=v1", "tiny: --revision v1 goes with a hub id alone"),
        ("out", "--variant=fp16", "out: is converted, so that --variant fp16 has no meaning"),
    ]:
        code, said = run(model, option, command=command)
        assert (code, said.count("\n")) == (2, 1)
        assert message in said
