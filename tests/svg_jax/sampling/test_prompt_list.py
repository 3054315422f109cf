"""Lists of prompts: what is made, in which order things load, what a second call leaves alone."""

import dataclasses
import gc
import json
import os
import signal
import sys
import weakref
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx

import svg_jax
from svg_jax.sampling import CogVideoXPipeline, HunyuanVideoPipeline
from svg_jax.sampling.components import Lazy, loading_once
from svg_jax.sampling.hunyuan_video.prompts import HunyuanVideoEncoders
from svg_jax.sampling.prompt_list import generate_videos, output_paths, plan_videos, read_prompts
from svg_jax.sampling.schedules.config import SchedulerConfig

PROMPTS = [f"a red {digit} moving left over the flower" for digit in ("three", "five", "nine")]
SMALL: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 1, "num_frames": 2}


@pytest.fixture(scope="module")
def model(bundled):
    return bundled


@pytest.fixture
def generate(model, run):
    """Calls `svg-jax generate` for prompts.txt, in an empty folder; gives code, output, error."""
    Path("prompts.txt").write_text("# digits\n\n" + "\n".join(PROMPTS) + "\n", encoding="utf-8")
    Path("out").mkdir()

    def call(*arguments, output="out/{index}.npz"):
        command = ["generate", "--model", model, "--prompts", "prompts.txt", "-o", output]
        command += ["--steps", 3, "--guidance-scale", 1, "--num-frames", 2, *arguments]
        result = run(*command)
        assert len(result.err.splitlines()) <= 1
        return result.code, result.out, result.err

    return call


def latents(path):
    with np.load(path) as file:
        return file["latents"]


@pytest.fixture(scope="module")
def expected(model):
    """The latents of each prompt alone."""
    pipeline = svg_jax.from_pretrained(model)
    sparsity = svg_jax.SparsityConfig()
    return [pipeline(prompt, **SMALL, sparsity=sparsity).latents for prompt in PROMPTS]


def test_each_prompt_gets_the_video_that_it_gets_alone_and_only_once(generate, expected):
    code, out, error = generate()
    assert (code, error) == (0, "")
    made = sorted(path.name for path in Path("out").iterdir())
    assert made == [".0.npz.json", ".1.npz.json", ".2.npz.json", "0.npz", "1.npz", "2.npz"]
    for index, wanted in enumerate(expected):
        np.testing.assert_array_equal(latents(f"out/{index}.npz"), wanted)

    Path("out/1.npz").unlink()
    Path("out/2.npz").write_bytes(b"cut off")
    before = Path("out/0.npz").stat().st_mtime_ns
    code, out, error = generate()
    assert (code, error) == (0, "")
    assert "1 of 3 videos are there already" in out
    assert Path("out/0.npz").stat().st_mtime_ns == before
    for index in (1, 2):
        np.testing.assert_array_equal(latents(f"out/{index}.npz"), expected[index])


def test_a_list_that_was_stopped_goes_on(generate, expected, monkeypatch):
    loop: Any = import_module("svg_jax.sampling.denoising")
    make_step, calls = loop.denoise_step, []

    def stop_at_the_fifth(*arguments):
        calls.append(None)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGTERM)  # as a batch system does; Ctrl-C is SIGINT
        return make_step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "denoise_step", stop_at_the_fifth)
        patch.setattr(os, "_exit", sys.exit)
        code, _, error = generate()
    assert code == 130
    assert error == "svg-jax: out/1.npz: its state is saved; --resume continues from there\n"
    assert {".0.npz.json", "0.npz", ".1.npz.state"} == set(os.listdir("out"))

    code, _, error = generate()
    assert code == 2
    assert "out/.1.npz.state holds a run that was not finished: continue with --resume" in error
    code, out, error = generate("--resume")
    assert (code, out.count("wrote")) == (0, 2)
    assert error == "svg-jax: out/1.npz: continuing after step 1\n"
    for index, wanted in enumerate(expected):
        np.testing.assert_array_equal(latents(f"out/{index}.npz"), wanted)
    assert not Path("out/.1.npz.state").exists()


def test_what_was_made_otherwise_is_not_overwritten(generate):
    Path("out/1.npz").write_bytes(b"of the user")
    code, _, error = generate()
    assert code == 2
    assert "out/1.npz is there and was not made from a list of prompts: remove it" in error
    Path("out/1.npz").unlink()
    assert generate()[0] == 0
    for change, sentence in [
        (["--seed", 1], "had seed 0, this one 1"),
        (["--fps", 12], "had fps 8.0, this one 12.0"),
    ]:
        code, _, error = generate(*change)
        assert code == 2
        assert f"out/0.npz is another run's: the saved one {sentence}" in error
    record = Path("out/.0.npz.json")
    for text in ("{", "[]", '{"sha256": "", "fingerprint": 3}', "[" * 99_999):
        record.write_text(text)
        assert "out/.0.npz.json is damaged: remove it and 0.npz" in generate()[2]
    record.write_text(json.dumps({"sha256": "", "fingerprint": {"k" * 99: "v" * 99}}))
    code, _, error = generate()
    assert (code, len(error) < 500) == (2, True)
    assert error.endswith("more differ (delete the file to start over)\n")
    record.unlink()
    os.mkfifo(record)  # which nobody writes to
    assert "out/.0.npz.json is damaged: remove it and 0.npz" in generate()[2]


def test_a_folder_gets_numbered_videos(generate):
    assert generate(output="out")[0] == 0
    assert {"000.mp4", "001.mp4", "002.mp4"} < set(os.listdir("out"))


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        (b"a cat\n", ["a cat"]),
        (b"\xef\xbb\xbfa cat\r\n\r\n  # not this\r\n  a dog  ", ["a cat", "a dog"]),
        ("ein Bär # und mehr\n".encode(), ["ein Bär # und mehr"]),
    ],
)
def test_a_prompt_a_line(content, prompts, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(content)
    assert read_prompts(tmp_path / "prompts.txt") == prompts


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "prompts.txt holds no prompt: write one a line"),
        (b"# a cat\n\n", "prompts.txt holds no prompt"),
        (b"a cat\na d\xf6g", "prompts.txt is not UTF-8 in line 2: save it as UTF-8"),
        (None, "prompts.txt: No such file or directory"),
    ],
)
def test_a_bad_file_is_one_sentence(content, sentence, generate):
    Path("prompts.txt").unlink()
    if content is not None:
        Path("prompts.txt").write_bytes(content)
    code, _, error = generate()
    assert (code, sentence in error) == (2, True), error
    assert os.listdir("out") == []


@pytest.mark.parametrize(
    ("arguments", "output", "sentence"),
    [
        (["--prompt", "a cat"], "out", "--prompts stands in place of --prompt"),
        (["--labels-out", "l.npz"], "out", "takes no --labels-out"),
        ([], "a.mp4", "--output must be a folder for several prompts, or a pattern such as"),
        (
            [],
            "out/{name}.mp4",
            "like out/{index:03d}.mp4: got out/{name}.mp4",
        ),
        ([], "out/{index.mp4", "--output must have a pattern like"),
        ([], "out/{index:q}.mp4", "--output must have a pattern like"),
        ([], "out/{index[0]}.mp4", "--output must have a pattern like"),
        ([], "out/{index.real}.mp4", "--output must have a pattern like"),
        ([], "out/{index!r}.mp4", "--output must have a pattern like"),
        ([], "out/{index:999999999999}.mp4", "must have a pattern like"),  # fills the memory
        ([], "out/{index:{index}}.mp4", "--output must have a pattern like"),
        ([], "out/{{index}}.mp4", "--output gives two prompts one file"),
        ([], "out/{index}.avi", "a video is written as .mp4, .gif, .png"),
        ([], "none/{index}.mp4", "there is no folder none"),
        ([], "none", "there is no folder none"),
    ],
)
def test_bad_arguments_are_one_sentence(arguments, output, sentence, generate):
    code, _, error = generate(*arguments, output=output)
    assert (code, sentence in error) == (2, True), error
    assert os.listdir("out") == []


def test_a_pattern_counts_from_zero():
    assert output_paths(Path("a/{index:02d}.gif"), 2) == [Path("a/00.gif"), Path("a/01.gif")]


def watched(pipeline, events):
    """The pipeline with components that say when they are loaded and when they are gone."""

    def watch(name, component) -> Any:
        def load():
            module = component.load()
            events.append(f"{name} loaded")
            weakref.finalize(module, events.append, f"{name} gone")
            return module

        return dataclasses.replace(component, load=load)

    return dataclasses.replace(
        pipeline,
        transformer=watch("transformer", pipeline.transformer),
        text_encoder=watch("text encoder", pipeline.text_encoder),
    )


def generate_all(pipeline, tmp_path, events):
    outputs: Any = {tmp_path / f"{index}.npz": text for index, text in enumerate(PROMPTS)}
    settings = pipeline.settings(PROMPTS, **SMALL, save_every=1)
    jobs = plan_videos(pipeline, outputs, settings, written_as={})

    def write(video, path):
        gc.collect()
        path.touch()
        events.append(f"wrote {path.name}")

    generate_videos(pipeline, jobs, write=write, keep_record=True)


def test_a_stage_is_loaded_once_and_gone_before_the_next_is_loaded(model, tmp_path):
    events: list[str] = []
    generate_all(watched(svg_jax.from_pretrained(model), events), tmp_path, events)
    assert events == [
        "text encoder loaded",
        "text encoder gone",
        "transformer loaded",
        "wrote 0.npz",
        "wrote 1.npz",
        "transformer gone",
        "wrote 2.npz",
    ]


def test_components_of_components_are_loaded_once_too():
    loads: Any = [lambda: nnx.Module(), lambda: nnx.Module()]
    parts = [Lazy(None, None, load) for load in loads]
    pipeline: Any = HunyuanVideoPipeline(
        transformer=parts[0],
        scheduler=SchedulerConfig("euler"),
        encoders=HunyuanVideoEncoders(text_encoder=parts[1]),
    )
    copy = loading_once(pipeline)
    assert copy.encoders.text_encoder.load() is copy.encoders.text_encoder.load()
    assert copy.transformer.load() is not loading_once(pipeline).transformer.load()
    assert pipeline.encoders.text_encoder is parts[1]


def test_videos_wait_for_the_room_that_decoding_takes(model, tmp_path, monkeypatch):
    events: list[str] = []
    decode = CogVideoXPipeline.decode

    def decode_in_little_memory(*arguments, **options):
        if "transformer gone" not in events:
            events.append("no room")
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return decode(*arguments, **options)

    monkeypatch.setattr(CogVideoXPipeline, "decode", decode_in_little_memory)
    generate_all(watched(svg_jax.from_pretrained(model), events), tmp_path, events)
    written = ["wrote 0.npz", "wrote 1.npz", "wrote 2.npz"]
    assert events[2:] == ["transformer loaded", "no room", "transformer gone", *written]
    record = json.loads((tmp_path / ".2.npz.json").read_text())
    assert record["fingerprint"]["prompt"] == PROMPTS[2]
