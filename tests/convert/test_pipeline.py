"""Whole pipeline folders: converted, or refused in one sentence where something is off."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tiny_source import (
    ENCODER_FILE,
    INDEX,
    RULES,
    TRANSFORMER_FILE,
    WITH_VAE,
    change_tensors,
    files_of,
    random_state,
    sha256,
    write_json,
    write_source,
)

from svg_jax.convert import (
    ConversionError,
    convert_pipeline,
    convert_state,
    export_pipeline,
    load_text_encoder,
    load_transformer,
    read_manifest,
    verify_pipeline,
)


@pytest.fixture
def source(tmp_path):
    return write_source(tmp_path / "source")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """One converted folder for the tests that only read it."""
    folder = tmp_path_factory.mktemp("converted")
    convert_pipeline(write_source(folder / "source"), folder / "out")
    return folder / "out"


class TestConvert:
    def test_plain_orbax_reads_the_stacked_tree(self, converted):
        for component, dtype in (("transformer", ml_dtypes.bfloat16), ("text_encoder", np.float16)):
            expected = convert_state(random_state(component, dtype), RULES[component])
            with ocp.StandardCheckpointer() as checkpointer:
                restored = checkpointer.restore(converted / component / "weights")
            same = jax.tree.map(
                lambda a, b: a.dtype == b.dtype and a.tobytes() == b.tobytes(), expected, restored
            )
            assert all(jax.tree.leaves(same))

    def test_small_files_are_carried_as_they_are(self, converted):
        source = converted.parent / "source"
        carried = [*read_manifest(converted).files]
        assert {file.split("/")[0] for file in carried} == {*INDEX} - {"_class_name", "vae"} | {
            "model_index.json"
        }
        for file in carried:
            assert (converted / file).read_bytes() == (source / file).read_bytes()

    def test_the_manifest_tells_what_it_was_made_of(self, converted):
        manifest = read_manifest(converted)
        assert (manifest.source, manifest.pipeline) == ("source", "CogVideoXPipeline")
        assert manifest.skipped == ()
        record = manifest.components["text_encoder"]["shared.weight"]
        assert (record.shape, record.dtype, record.stored_dtype) == ((20, 16), "float16", "float16")
        assert str(converted.parent) not in (converted / "manifest.json").read_text()

    def test_the_same_source_gives_the_same_manifest_but_for_orbaxs_own_names(
        self, converted, tmp_path
    ):
        convert_pipeline(converted.parent / "source", tmp_path / "again")
        again, before = (
            dataclasses.replace(read_manifest(folder), weights={})
            for folder in (tmp_path / "again", converted)
        )
        assert again == before

    def test_the_manifest_has_the_digest_of_every_file_that_was_read_and_written(self, converted):
        manifest, source = read_manifest(converted), converted.parent / "source"
        digests = {name: sha256(content) for name, content in files_of(converted).items()}
        assert {**manifest.files, **manifest.weights} == {
            name: found for name, found in digests.items() if name != "manifest.json"
        }
        read = [TRANSFORMER_FILE, ENCODER_FILE, "transformer/config.json"]
        read.append("text_encoder/config.json")
        assert manifest.sources == {name: sha256((source / name).read_bytes()) for name in read}

    def test_progress_counts_every_byte(self, source, tmp_path):
        calls = []
        convert_pipeline(source, tmp_path / "out", progress=lambda *call: calls.append(call))
        done, totals, what = zip(*calls, strict=True)
        weights = [
            random_state("transformer", np.float16),
            random_state("text_encoder", np.float16),
        ]
        total = sum(tensor.nbytes for state in weights for tensor in state.values())
        assert sorted(done) == list(done)
        assert done[-1] == total
        assert set(totals) == {total}
        assert set(what) == {"transformer", "text_encoder"}

    def test_a_hub_cache_with_its_links_is_a_source(self, source, tmp_path):
        snapshot, blobs = tmp_path / "hub/snapshots/0123", tmp_path / "hub/blobs"
        blobs.mkdir(parents=True)
        for number, name in enumerate(files_of(source)):
            shutil.copyfile(source / name, blobs / str(number))
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            os.symlink(f"{'../' * (2 + name.count('/'))}blobs/{number}", snapshot / name)
        convert_pipeline(snapshot, tmp_path / "out")
        assert read_manifest(tmp_path / "out").source == "0123"


class TestComponents:
    def test_one_that_is_not_ported_is_named_with_the_way_out(self, source, tmp_path):
        write_json(source / "model_index.json", INDEX | WITH_VAE)
        message = (
            "vae (AnotherVAE) cannot be converted yet: leave it out with "
            "components=('text_encoder', 'transformer')."
        )
        with pytest.raises(ConversionError, match=re.escape(message)):
            convert_pipeline(source, tmp_path / "out")

    def test_what_is_left_out_is_in_the_manifest_and_null_in_the_export(self, source, tmp_path):
        write_json(source / "model_index.json", INDEX | WITH_VAE)
        convert_pipeline(source, tmp_path / "out", components=("transformer",))
        manifest = read_manifest(tmp_path / "out")
        assert list(manifest.components) == ["transformer"]
        assert manifest.skipped == ("text_encoder", "vae")
        assert (tmp_path / "out/tokenizer/tokenizer.json").is_file()
        with pytest.raises(
            ConversionError, match=r"holds no text_encoder .*\(it holds transformer"
        ):
            load_text_encoder(tmp_path / "out")
        export_pipeline(tmp_path / "out", tmp_path / "back")
        index = json.loads((tmp_path / "back/model_index.json").read_text())
        assert index == INDEX | {"vae": [None, None], "text_encoder": [None, None]}

    @pytest.mark.parametrize(
        ("components", "message"),
        [
            (("transformer", "unet"), "has no unet; its components are text_encoder, transformer"),
            (("vae",), "has no vae"),
            ((), "no component to convert"),
        ],
    )
    def test_what_is_not_there_cannot_be_asked_for(self, source, tmp_path, components, message):
        with pytest.raises(ConversionError, match=message):
            convert_pipeline(source, tmp_path / "out", components=components)


def edit_json(file, **changes):
    return lambda source: write_json(
        source / file, json.loads((source / file).read_text()) | changes
    )


def edit_tensors(file, change):
    return lambda source: change_tensors(source / file, change)


def poison(tensors):
    tensors["transformer_blocks.1.ff.net.2.bias"][3] = np.nan


def widen_one_layer(tensors):
    name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    tensors[name] = tensors[name].astype(np.float32)


def untie(tensors):
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"] + np.float16(1)


WRONG = {
    "no such folder": (shutil.rmtree, "source: is no folder"),
    "no index": (lambda source: (source / "model_index.json").unlink(), "no model_index.json"),
    "damaged index": (
        lambda source: (source / "model_index.json").write_text("{"),
        "model_index.json: is no whole JSON",
    ),
    "another pipeline": (
        edit_json("model_index.json", _class_name="StableDiffusionPipeline"),
        "pipeline is 'StableDiffusionPipeline' and only",
    ),
    "a component elsewhere": (
        edit_json("model_index.json", **{"../x": ["transformers", "T5EncoderModel"]}),
        "'../x' is no name of a component",
    ),
    "odd index entry": (edit_json("model_index.json", vae=[1]), r"vae is not \[library, class\]"),
    "no config": (
        lambda source: (source / "transformer/config.json").unlink(),
        "transformer/config.json: cannot be read",
    ),
    "another class's config": (
        edit_json("transformer/config.json", _class_name="WanTransformer3DModel"),
        "is the config of a WanTransformer3DModel",
    ),
    "unknown config key": (
        edit_json("transformer/config.json", num_experts=4),
        r"transformer/config.json: .*num_experts",
    ),
    "another size's config": (
        edit_json("transformer/config.json", num_layers=3),
        r"transformer: the tensors do not fit the config: 24 missing",
    ),
    "missing tensor": (
        edit_tensors(TRANSFORMER_FILE, lambda tensors: tensors.pop("proj_out.bias")),
        r"1 missing \(proj_out.bias\)",
    ),
    "extra tensor": (
        edit_tensors(ENCODER_FILE, lambda tensors: tensors.update(lm_head=np.ones(2, np.float16))),
        r"1 unexpected \(lm_head\)",
    ),
    "misshapen tensor": (
        edit_tensors(
            TRANSFORMER_FILE,
            lambda tensors: tensors.update(
                {"proj_out.bias": tensors["proj_out.bias"].reshape(2, -1)}
            ),
        ),
        r"proj_out.bias is \[2, 8\] and must be \[16\]",
    ),
    "NaN": (
        edit_tensors(TRANSFORMER_FILE, poison),
        r"transformer_blocks.1.ff.net.2.bias holds NaN",
    ),
    "layers of two dtypes": (
        edit_tensors(ENCODER_FILE, widen_one_layer),
        "DenseReluDense.wo.weight mix float16 and float32",
    ),
    "tied weights that differ": (
        edit_tensors(ENCODER_FILE, untie),
        "encoder.embed_tokens.weight and shared.weight are one weight of the model and differ",
    ),
    "no weights": (lambda source: (source / ENCODER_FILE).unlink(), "text_encoder: holds no"),
    "no tokenizer": (lambda source: shutil.rmtree(source / "tokenizer"), "tokenizer: .* missing"),
    "a link to elsewhere": (
        lambda source: os.symlink("/etc/hostname", source / "tokenizer/spiece.model"),
        "spiece.model leads out of",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_source_that_is_off_is_refused_in_one_sentence(source, tmp_path, capfd, wrong):
    damage, message = WRONG[wrong]
    damage(source)
    with pytest.raises(ConversionError, match=message) as caught:
        convert_pipeline(source, tmp_path / "out")
    assert str(source) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"source"}
    assert capfd.readouterr().err == ""


def test_source_and_destination_cannot_be_confused(converted, source, tmp_path):
    with pytest.raises(ConversionError, match="is converted already"):
        convert_pipeline(converted, tmp_path / "out")
    with pytest.raises(ConversionError, match="lies inside the source"):
        convert_pipeline(source, source / "out")
    with pytest.raises(ConversionError, match="is there already"):
        convert_pipeline(converted.parent / "source", converted)


def test_ctrl_c_leaves_nothing_and_prints_nothing_of_its_own(source, tmp_path):
    code = """
import os, signal, sys, time
from svg_jax.convert import convert_pipeline
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
presses = [signal.SIGINT]
def interrupt(done, total, what):
    if done > total / 2 and presses:
        os.kill(os.getpid(), presses.pop())
        time.sleep(0.1)
try:
    convert_pipeline(sys.argv[1], sys.argv[2], progress=interrupt)
except KeyboardInterrupt:
    print("interrupted", end="")
"""
    arguments = [sys.executable, "-c", code, str(source), str(tmp_path / "out")]
    result = subprocess.run(arguments, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("interrupted", "")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_conversion_that_is_killed_leaves_no_checkpoint_and_can_be_run_again(source, tmp_path):
    code = """
import os, signal, sys
from svg_jax.convert import convert_pipeline
def kill(done, total, what):
    if done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)
convert_pipeline(sys.argv[1], sys.argv[2], progress=kill)
"""
    arguments = [sys.executable, "-c", code, str(source), str(tmp_path / "out")]
    assert subprocess.run(arguments).returncode == -signal.SIGKILL
    left = {path.name for path in tmp_path.iterdir() if path != source}
    half = tmp_path / ".out.partial"
    assert left == {half.name, f"{half.name}.lock"}
    with pytest.raises(ConversionError, match=r"cut off|not converted"):
        load_transformer(half)
    convert_pipeline(source, tmp_path / "out")
    verify_pipeline(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}
