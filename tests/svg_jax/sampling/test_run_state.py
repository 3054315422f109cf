"""A run that is saved, killed and gone on with is the run: bit for bit, or it is refused."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import threading
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax
import numpy as np
import PIL.Image
import pytest
from saved_runs import (
    RUNS,
    SPARSITY,
    STATES,
    Killed,
    kill_after,
    normal,
    pipeline_of,
    records_of,
)

import svg_jax
from svg_jax.convert import convert_pipeline, read_manifest
from svg_jax.media.video import enlarge, to_uint8
from svg_jax.sampling import WanPipeline
from svg_jax.sampling import run_state as checkpoint
from svg_jax.sampling.components import Lazy
from svg_jax.sampling.identity import check_same_run, make_fingerprint, weights_digest
from svg_jax.sampling.run_state import (
    load_run,
    open_run_file,
    save_run,
    saving,
)
from svg_jax.sampling.settings import FlowSettings, SettingError

SETTINGS = FlowSettings(prompt="a cat")
KILLS = int(os.environ.get("SVG_JAX_KILLS", "3"))


def saved_in(path, save_every):
    return FlowSettings(prompt="a cat", state_file=path, save_every=save_every)


def assert_same_records(records, expected):
    for record, other in zip(records, expected, strict=True):
        for field in ("step", "timestep", "guidance_scale"):
            assert getattr(record, field) == getattr(other, field)
        assert (record.profile is None) == (other.profile is None)
        if record.profile is not None:
            for field in ("labels", "errors", "density"):
                found, wanted = getattr(record.profile, field), getattr(other.profile, field)
                np.testing.assert_array_equal(found, wanted)
                assert found.dtype == wanted.dtype


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_of_every_family_and_sampler_is_the_run(name, tmp_path):
    pipeline, arguments = pipeline_of(name)
    whole = pipeline(**arguments)
    kept = arguments | {"state_file": tmp_path / "state", "save_every": 2}
    for step in (0, 3):
        with pytest.raises(Killed):
            pipeline(**kept, resume=True, callback_on_step_end=kill_after(step))
        settings = pipeline.settings(**kept)
        saved = load_run(tmp_path / "state", pipeline.fingerprint(settings), settings)
        assert len(saved.records) == step + 1
    computed = []
    video = pipeline(**kept, resume=True, callback_on_step_end=computed.append)
    assert [record.step for record in computed] == [4, 5]
    np.testing.assert_array_equal(video.latents, whole.latents)
    assert_same_records(video.info.steps, whole.info.steps)
    assert list(tmp_path.iterdir()) == []  # the caller has the video


def test_a_finished_run_that_could_not_be_decoded_is_only_decoded(tmp_path, monkeypatch):
    pipeline, arguments = pipeline_of("Wan, UniPC")
    with monkeypatch.context() as patch:
        patch.setattr(WanPipeline, "decode", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pipeline(**arguments, state_file=tmp_path / "state")
    transformer = pipeline.transformer
    not_loaded: Any = pytest.fail
    not_needed: Any = Lazy(transformer.config, transformer.dtype, not_loaded)
    without = dataclasses.replace(pipeline, transformer=not_needed)
    video = without(**arguments, state_file=tmp_path / "state", resume=True)
    np.testing.assert_array_equal(video.latents, pipeline(**arguments).latents)


@pytest.mark.parametrize("name", STATES)
def test_every_state_and_record_comes_back_bit_for_bit(name, tmp_path):
    state, records = STATES[name], records_of(3)
    odd = state.latents.view(np.uint32)
    odd[0, 0] = [0x80000000, 0x00000001, 0x7FC00001]  # minus zero, a subnormal, a NaN
    save_run(tmp_path / "state", state, records, {"seed": 3})
    saved = load_run(tmp_path / "state", {"seed": 3}, SETTINGS)
    back = saved.state_like(jax.tree.map(np.zeros_like, state))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for leaf, expected in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
        assert np.asarray(leaf).tobytes() == expected.tobytes()
    assert_same_records(saved.records, records)
    assert [record.seconds for record in saved.records] == [0.1] * 3


def test_a_state_file_is_a_plain_npz(tmp_path):
    save_run(tmp_path / "state", STATES["DPM"], records_of(1), {"seed": 3})
    with np.load(tmp_path / "state", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["state.latents"], STATES["DPM"].latents)


GRAY = PIL.Image.new("L", (4, 4))
CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"seed": 4}, "had seed 3, this one 4 (delete the file to start over)"),
    ({"seed": 4, "height": 64}, "had height 32 and seed 3, this one 64 and 4"),
    (
        {"prompt": "a dog", "prompt_embeds": None},
        "had prompt none and prompt_embeds float32[1, 2, 16] of digest",
    ),
    ({"prompt": "z" * 99, "prompt_embeds": None}, ", this one " + "z" * 59 + "… and none "),
    (
        {"sparsity": None, "warmup": None},
        "had sparsity.density 0.6 and sparsity.sampled_rows 4 and",
    ),
    ({"warmup": None}, "had warmup.steps 0.3, this one 0.2"),
    (
        {"sparsity": dataclasses.replace(SPARSITY, density=0.5)},
        "had sparsity.density 0.6, this one 0.5",
    ),
    ({"labels": np.ones((2, 1, 2), bool)}, "had labels none, this one bool[2, 1, 2] of digest"),
    ({"prompt_embeds": normal(1, 2, 16)}, "had prompt_embeds float32[1, 2, 16] of digest"),
    ({"scheduler": "euler"}, "had scheduler none, this one euler"),
    ({"image": GRAY}, "had image none, this one ['RGB image uint8[4, 4, 4] of digest"),
]


@pytest.mark.parametrize(("change", "sentence"), CHANGES)
def test_a_state_of_other_settings_is_refused_and_the_difference_is_named(
    change, sentence, tmp_path
):
    pipeline, arguments = pipeline_of("Wan, UniPC")
    arguments |= {"seed": 3}
    save_run(
        tmp_path / "state", STATES["flow"], (), pipeline.fingerprint(pipeline.settings(**arguments))
    )
    with pytest.raises(ValueError, match="state is another run's: the saved one") as error:
        pipeline(**arguments | change, state_file=tmp_path / "state", resume=True)
    assert sentence in str(error.value)


def test_the_same_settings_written_otherwise_are_the_same():
    pipeline, arguments = pipeline_of("Wan, UniPC")
    same = arguments | {"guidance_scale": 1.0, "seed": np.int64(0), "negative_prompt": ""}
    same["prompt_embeds"] = jax.numpy.asarray(arguments["prompt_embeds"])
    assert pipeline.fingerprint(pipeline.settings(**arguments)) == pipeline.fingerprint(
        pipeline.settings(**same)
    )


@pytest.mark.parametrize("name", ["jax", "jaxlib", "svg-jax", "device"])
def test_versions_and_device_belong_to_the_run(name):
    made = make_fingerprint(seed=3)
    with pytest.raises(ValueError, match=f"a is another run's: the saved one had {name} other"):
        check_same_run(Path("a"), made | {name: "other"}, made, SETTINGS)


@pytest.mark.parametrize("name", ["jax", "jaxlib", "device", "dtype"])
def test_what_rounds_otherwise_can_be_allowed(name, caplog):
    made = make_fingerprint(seed=3, dtype="float32")
    with pytest.raises(ValueError, match=r"rounds differently: .* with allow_rounding=True"):
        check_same_run(Path("a"), made | {name: "other"}, made, SETTINGS)
    allowed = dataclasses.replace(SETTINGS, state_file="a", allow_rounding=True)
    check_same_run(Path("a"), made | {name: "other"}, made, allowed)
    assert f"a: continuing with another rounding: the saved run had {name} other" in caplog.text
    for other in ("svg-jax", "weights", "seed"):  # bits: no rounding makes them the same
        with pytest.raises(ValueError, match=r"another run's: .*\(delete the file"):
            check_same_run(Path("a"), made | {name: "x", other: "x"}, made, allowed)


def my_attention(query, key, value, *, layout, text_length, layer, step_state):
    places = {"layout": layout, "text_length": text_length}
    return svg_jax.attend_dense(query, key, value, layer=layer, step_state=step_state, **places)


@pytest.mark.parametrize("name", ["CogVideoX, DPM", "Wan, UniPC"])
def test_an_attend_is_known_again_by_its_name(name, tmp_path):
    pipeline, arguments = pipeline_of(name)
    arguments |= {"sparsity": None, "warmup": None, "attend": my_attention}
    saved = arguments | {"state_file": tmp_path / "state"}
    with pytest.raises(SettingError, match=r"^state_file needs an attend_id"):
        pipeline(**saved)
    with pytest.raises(Killed):
        pipeline(**saved, attend_id="mine, 2", callback_on_step_end=kill_after(1))
    with pytest.raises(ValueError, match="had attend_id mine, 2, this one yours"):
        pipeline(**saved, attend_id="yours", resume=True)
    video = pipeline(**saved, attend_id="mine, 2", resume=True)
    np.testing.assert_array_equal(video.latents, pipeline(**arguments).latents)


def test_a_state_that_is_not_to_be_resumed_is_not_overwritten(tmp_path):
    pipeline, arguments = pipeline_of("Wan, UniPC")
    path = tmp_path / "state"
    with pytest.raises(Killed):
        pipeline(**arguments, state_file=path, callback_on_step_end=kill_after(1))
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="resume=True"):
        pipeline(**arguments, state_file=path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("path", "save_every", "message"),
    [("no/state", 1, "there is no folder"), ("state", -1, "save_every .* at least 0: got -1")],
)
def test_what_cannot_be_saved_is_said_before_the_work(path, save_every, message, tmp_path):
    with pytest.raises((OSError, ValueError), match=message):
        open_run_file(saved_in(tmp_path / path, save_every), {})


@pytest.mark.parametrize("steps", [range(1, 99), range(-1, 1), range(0, 2, 2), range(1, -1, -1)])
def test_steps_are_a_runs_own_and_in_a_row(steps):
    pipeline, arguments = pipeline_of("CogVideoX, DPM")
    run = pipeline.prepare(pipeline.settings(**arguments))
    with pytest.raises(ValueError, match=r"steps must be consecutive, within range\(0, \d+\): got"):
        pipeline.denoise(run, steps=steps)


def test_a_saved_run_is_not_told_which_steps_to_run(tmp_path):
    pipeline, arguments = pipeline_of("Wan, UniPC")
    del arguments["sparsity"], arguments["warmup"]
    file = open_run_file(saved_in(tmp_path / "state", 1), {})
    with pytest.raises(ValueError, match="pass either steps or a file"):
        pipeline.denoise(
            pipeline.prepare(pipeline.settings(**arguments)), steps=range(2), file=file
        )


def test_no_save_leaves_no_file(tmp_path):
    pipeline, arguments = pipeline_of("Wan, UniPC")
    arguments |= {"state_file": tmp_path / "state", "save_every": 0}
    with pytest.raises(Killed):
        pipeline(**arguments, callback_on_step_end=kill_after(2))
    assert list(tmp_path.iterdir()) == []


def test_what_killed_processes_left_is_removed(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / f".cat.{dead.pid}.state").touch()
    for name in (f".cat.{os.getppid()}.state", f".dog.{dead.pid}.state", ".cat.1x.state"):
        (tmp_path / name).touch()
    open_run_file(saved_in(tmp_path / "cat.state", 1), {})
    assert f".cat.{dead.pid}.state" not in os.listdir(tmp_path)
    assert len(os.listdir(tmp_path)) == 3


STATE = jax.tree.map(jax.numpy.asarray, STATES["DPM"])


def test_the_loop_waits_for_no_save_but_the_one_before(tmp_path, monkeypatch):
    disk, saves = threading.Event(), []

    def slow_save(path, state, records, fingerprint):
        assert disk.wait(60)
        saves.append(len(records))

    monkeypatch.setattr(checkpoint, "save_run", slow_save)
    file = open_run_file(saved_in(tmp_path / "state", 2), {})
    records = records_of(3)
    with saving(file) as save:
        save(STATE, records[0])
        save(STATE, records[1])  # starts a save that takes as long as the disk does
        save(STATE, records[2])
        assert saves == []
        disk.set()
    assert saves == [2, 3]  # what ends the run saves the rest


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("the device is gone")]
)
def test_a_save_that_fails_is_a_warning_and_the_run_goes_on(error, tmp_path, monkeypatch):
    def full(*_):
        raise error

    pipeline, arguments = pipeline_of("Wan, UniPC")
    monkeypatch.setattr(checkpoint, "save_run", full)
    with pytest.warns(UserWarning, match=f"state could not be saved: .*{error.args[-1]}"):
        video = pipeline(**arguments, state_file=tmp_path / "state", save_every=3)
    assert len(video.info.steps) == 6


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The bundled tiny model, converted."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    convert_pipeline(Path(str(files("svg_jax"))) / "assets" / "tiny_cogvideox", folder)
    return folder


def test_a_pipeline_knows_the_weights_that_it_was_loaded_from(model):
    manifest = read_manifest(model)
    assert svg_jax.from_pretrained(model).weights == weights_digest(manifest)
    name, tensor = next(iter(manifest.components["transformer"].items()))
    other = {name: dataclasses.replace(tensor, stored_sha256="0" * 64)}
    components = {
        **manifest.components,
        "transformer": dict(manifest.components["transformer"], **other),
    }
    changed = dataclasses.replace(manifest, components=components)
    assert weights_digest(changed) != weights_digest(manifest)


@pytest.mark.slow
def test_kill_9_at_any_moment_changes_nothing_but_the_time(model, tmp_path):
    """Three moments, or as many as SVG_JAX_KILLS says: during a step, or while a state is saved."""
    steps, prompt = 40 + 8 * KILLS, "a red three moving left over the flower"
    arguments = f"--steps {steps} --guidance-scale 1 --num-frames 2 --save-every 1 --seed 3".split()
    command = [sys.executable, "-c", "from svg_jax.cli import main; main()", "generate", "--model"]
    command += [str(model), "--prompt", prompt, *arguments, "-o", "a.mp4", "--resume"]
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    work, rng = tmp_path / "work", random.Random(0)
    work.mkdir()
    state = work / ".a.mp4.state"
    for _ in range(KILLS):
        before = state.stat().st_mtime_ns if state.exists() else 0
        process = subprocess.Popen(command, cwd=work, env=environment, stdout=subprocess.DEVNULL)
        while process.poll() is None and not (
            state.exists() and state.stat().st_mtime_ns != before
        ):
            time.sleep(0.002)
        time.sleep(rng.random() / 5)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
        assert not (work / "a.mp4").exists()
    subprocess.run(command, cwd=work, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert os.listdir(work) == ["a.mp4"]

    pipeline = svg_jax.from_pretrained(model)
    video = pipeline(
        prompt,
        num_inference_steps=steps,
        guidance_scale=1,
        num_frames=2,
        seed=3,
        **pipeline.default_sparsity()._asdict(),
    )
    shown = enlarge(to_uint8(video), pipeline.defaults.enlarge or 1)
    svg_jax.save_video(shown, tmp_path / "whole.mp4", fps=pipeline.default_fps)
    assert (work / "a.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
