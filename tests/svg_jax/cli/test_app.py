"""The command line on a tiny checkpoint: what it writes, what it prints, and how it fails."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_checkpoint import PROMPT, QUICK, is_one_sentence, write_checkpoint
from typer.testing import CliRunner

from svg_jax import cli
from svg_jax.cli import comparisons, videos
from svg_jax.cli.app import app
from svg_jax.config import SparsityConfig, Warmup
from svg_jax.media.video import save_video


@pytest.fixture(scope="module")
def model_with_vae(tmp_path_factory):
    from svg_jax.convert import convert_pipeline

    folder = tmp_path_factory.mktemp("vae")
    write_checkpoint(folder / "source", ("diffusers", "AutoencoderKLCogVideoX"))
    convert_pipeline(folder / "source", folder / "model", components=["transformer"])
    return folder / "model"


def test_convert_and_export_are_inverse(run, source, tmp_path):
    assert run("convert", source, "out").code == 0
    assert run("export", "out", "back").code == 0
    assert "pass --overwrite." in run("export", "out", "back").err
    assert run("export", "out", "back", "--overwrite").code == 0
    for name in ("transformer", "text_encoder"):
        before = {
            k: v for f in (source / name).glob("*.safetensors") for k, v in load_file(f).items()
        }
        after = {
            k: v
            for f in (tmp_path / "back" / name).glob("*.safetensors")
            for k, v in load_file(f).items()
        }
        assert before.keys() == after.keys()
        assert all(before[k].tobytes() == after[k].tobytes() for k in before)


def test_verify_tells_a_sound_folder_from_a_harmed_one(run, model, tmp_path):
    result = run("verify", model)
    assert (result.code, result.err) == (0, "")
    assert "model is as it was converted: " in result.out
    shutil.copytree(model, tmp_path / "copy")
    (tmp_path / "copy/tokenizer/tokenizer.json").write_text("{}")
    result = run("verify", "copy")
    assert (result.code, is_one_sentence(result.err)) == (4, True)
    assert "tokenizer/tokenizer.json is not as converted" in result.err


def test_convert_only_some_components_in_another_dtype(run, source):
    result = run("convert", source, "out", "--components", "transformer", "--cast", "bfloat16")
    assert result.code == 0
    assert sorted(json.loads(Path("out/manifest.json").read_text())["components"]) == [
        "transformer"
    ]


@pytest.mark.parametrize("suffix", ["mp4", "gif", "png"])
def test_generate_writes_a_video(run, model, suffix, tmp_path):
    result = run("generate", "--model", model, *PROMPT, *QUICK, "-o", f"a.{suffix}")
    assert (result.code, result.err) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == [f"a.{suffix}"]


def test_several_videos_of_a_prompt_are_files_of_their_own(run, model):
    call = ["generate", "--model", model, *PROMPT, *QUICK, "--num-videos", "2"]
    result = run(*call, "-o", "a.png", "--json", "r.json")
    assert (result.code, result.err) == (0, "")
    assert sorted(path.name for path in Path().iterdir()) == ["a-0.png", "a-1.png", "r.json"]
    assert Path("a-0.png").read_bytes() != Path("a-1.png").read_bytes()
    report = json.loads(Path("r.json").read_text())
    (made,) = report["videos"]
    assert (made["files"], made["seed"]) == (["a-0.png", "a-1.png"], 0)
    assert {"dense steps", "sparse steps", "writing"} < report["stage_seconds"].keys()
    assert "\nwriting " in result.out
    result = run(*call, "-o", "b.npz", "--json", "-")
    assert json.loads(result.out)["videos"][0]["files"] == ["b.npz"]
    with np.load("b.npz") as file:
        assert file["latents"].shape == (2, 4, 3, 12, 16)
    result = run(*call, "-o", "r-{index}.png", "--prompts", "r.json")
    assert (result.code, is_one_sentence(result.err)) == (2, True)
    assert "--num-videos" in result.err


def test_what_is_cut_off_a_prompt_is_said_once(run, model):
    prompt = "a red cat a red cat a blue cat"
    result = run("generate", "--model", model, "--prompt", prompt, *QUICK, "-o", "a.png")
    assert (result.code, is_one_sentence(result.err)) == (0, True)
    assert "the prompt is longer than 8 tokens: 'blue cat' was cut off" in result.err


def test_generate_dense_is_the_pipeline_from_python(run, model):
    import svg_jax

    result = run(
        "generate", "--model", model, *PROMPT, *QUICK, "--seed", "3",
        "--attention", "dense", "-o", "a.npz",
    )  # fmt: skip
    assert result.code == 0
    pipeline = svg_jax.from_pretrained(model)
    video = pipeline("a red cat", num_inference_steps=4, guidance_scale=1, seed=3)
    with np.load("a.npz") as file:
        np.testing.assert_array_equal(file["latents"], video.latents)
    assert video.frames is not None
    assert video.frames.shape == (1, 4, 12, 16, 3)
    save_video(video, "a.gif")


def test_what_was_not_asked_for_is_the_default_and_said(run, model):
    call = ["generate", "--model", model, *PROMPT, "--steps", "2", "--guidance-scale", "1"]
    result = run(*call, "--density", "0.6", "-o", "a.gif")
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[0] == (
        "sparsity: density 0.6, dense steps 0.2, dense layers 0, sampled rows 64 "
        "(the general default but for --density)"
    )
    result = run(*call, "--attention", "dense", "-o", "b.gif")
    assert result.out.startswith("wrote b.gif")


def test_generate_from_files_and_write_labels(run, model):
    rng = np.random.default_rng(0)
    np.save("noise.npy", rng.normal(size=(1, 3, 3, 8, 12)).astype(np.float32))
    embeds: dict[str, Any] = {
        name: rng.normal(size=(1, 8, 16)).astype(np.float32)
        for name in ("prompt_embeds", "negative_prompt_embeds")
    }
    np.savez("embeds.npz", **embeds)
    result = run(
        "generate", "--model", model, "--prompt-embeds", "embeds.npz", "--latents", "noise.npy",
        "--num-frames", "3", "--height", "8", "--width", "12", "--steps", "4",
        "--guidance-scale", "2", "--dense-steps", "0.25",
        "--dense-layers", "0.5", "--density", "0.7", "--scheduler", "dpm", "--dtype", "float32",
        "--labels-out", "labels.npz", "-o", "a.gif", "--enlarge", "4", "--fps", "12",
    )  # fmt: skip
    assert (result.code, result.err) == (0, "")
    with np.load("labels.npz") as file:
        assert file["labels"].shape == (3, 2, 2, 2)
        assert file["steps"].tolist() == [1, 2, 3]
        assert (file["density"][:, 0] == 1).all()  # the first layer stays dense
        assert np.isnan(file["errors"][:, 0]).all()
        assert np.isfinite(file["errors"][:, 1]).all()


def test_a_checkpoint_with_a_vae_gives_latents(run, model_with_vae, tmp_path):
    np.save("embeds.npy", np.ones((1, 8, 16), np.float32))
    call = ["generate", "--model", model_with_vae, "--prompt-embeds", "embeds.npy", *QUICK]
    result = run(*call, "-o", "a.mp4")
    assert (result.code, is_one_sentence(result.err)) == (2, True)
    assert "(--output latents.npz)" in result.err
    dense = ["--attention", "dense", "--height", "32", "--width", "32"]
    result = run(*call, *dense, "-o", "latents.npz")
    assert (result.code, result.err) == (0, "")
    with np.load("latents.npz") as file:
        assert file["latents"].shape == (1, 4, 3, 4, 4)
    result = run(*call[:3], *PROMPT, *QUICK, "-o", "a.npz")
    assert "pass --prompt-embeds" in result.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--prompt", "a dog", "-o", "a.gif"], "does not know 'dog'; it knows: a, blue, cat, red"),
        ([*PROMPT, "-o", "a.avi"], "a video is written as .mp4, .gif, .png"),
        ([*PROMPT, "-o", "no/a.gif"], "there is no folder no"),
        (["-o", "a.gif"], "--prompt is missing: pass either a prompt or --prompt-embeds"),
        ([*PROMPT, "-o", "a.gif", "--height", "13"], "height must be a positive multiple of 2"),
        (
            [*PROMPT, "-o", "a.gif", "--num-frames", "0"],
            "--num-frames must be a whole",
        ),
        ([*PROMPT, "-o", "a.gif", "--density", "0.01"], "--density 0.01 leaves nothing"),
        ([*PROMPT, "-o", "a.gif", "--density", "0"], "density"),
        ([*PROMPT, "-o", "a.gif", "--dense-steps", "2"], "--dense-steps is a share"),
        (
            [*PROMPT, "-o", "a.gif", "--guidance-interval", "0", "2"],
            "--guidance-interval is two shares",
        ),
        ([*PROMPT, "-o", "a.gif", "--steps", "0"], "--steps must be a whole number of at least 1"),
        ([*PROMPT, "-o", "a.gif", "--seed", "-1"], "--seed must be a whole number from 0"),
        ([*PROMPT, "-o", "a.gif", "--latents", "none.npy"], "none.npy: No such file"),
        ([*PROMPT, "-o", "a.gif", "--enlarge", "0"], "--enlarge must be a whole number from 1"),
        (
            [*PROMPT, "-o", "a.gif", "--save-every", "-1"],
            "--save-every must be a whole",
        ),
        ([*PROMPT, "-o", "a.gif", "--fps", "0"], "--fps must be a number from 0.01"),
        (
            [*PROMPT, "-o", "a.gif", "--attention", "dense", "--labels-out", "l.npz"],
            "dense attention has no labels",
        ),
    ],
)
def test_errors_are_one_sentence_and_leave_nothing(run, model, arguments, sentence, tmp_path):
    result = run("generate", "--model", model, *QUICK, *arguments)
    assert result.code == 2
    assert is_one_sentence(result.err), result.err
    assert sentence in result.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"not an array", "is no .npy or .npz file"),
        (b"", "is no .npy or .npz file"),
    ],
)
def test_files_that_hold_no_arrays(run, model, content, sentence):
    Path("noise.npy").write_bytes(content)
    result = run("generate", "--model", model, *PROMPT, "--latents", "noise.npy", "-o", "a.gif")
    assert (result.code, is_one_sentence(result.err)) == (2, True)
    assert sentence in result.err


def test_an_archive_without_the_array(run, model):
    np.savez("noise.npz", a=np.zeros(1), b=np.zeros(1))
    result = run("generate", "--model", model, *PROMPT, "--latents", "noise.npz", "-o", "a.gif")
    assert "noise.npz has no array latents: it has a, b" in result.err


def test_weights_that_overflow_stop_with_step_and_layer(run, source, tmp_path):
    broken = tmp_path / "broken"
    subprocess.run(["cp", "-r", source, broken], check=True)
    file = next((broken / "transformer").glob("*.safetensors"))
    tensors = load_file(file)
    tensors["transformer_blocks.1.attn1.to_q.bias"][:2] = 3e38
    save_file(tensors, file)
    result = run("convert", broken, "model")
    assert (result.code, result.err) == (0, "")
    result = run("generate", "--model", "model", *PROMPT, *QUICK, "-o", "a.mp4")
    assert (result.code, is_one_sentence(result.err)) == (1, True)
    assert "not finite after step 0 of 4 (timestep 999)" in result.err
    assert "layer 1 of 2" in result.err
    assert not Path("a.mp4").exists()


@pytest.mark.parametrize(
    "arguments",
    [["dance"], ["generate"], ["generate", "--model", "x", "-o", "a.gif", "--steps", "q"]],
)
def test_wrong_usage_is_one_sentence_and_code_2(run, arguments):
    result = run(*arguments)
    assert (result.code, is_one_sentence(result.err)) == (2, True)


def test_help_is_quick_because_it_imports_neither_jax_nor_numpy():
    probe = "import sys; import svg_jax.cli.app; sys.exit(not {'jax', 'numpy', 'rich.progress'}."
    probe += "isdisjoint(sys.modules))"
    assert subprocess.run([sys.executable, "-c", probe]).returncode == 0


def test_the_bundled_model_knows_the_words_of_the_demo():
    import inspect
    from importlib.resources import files

    from svg_jax.text.tokenizer import load_tokenizer

    prompt = inspect.signature(cli.app.demo).parameters["prompt"].default
    bundled = Path(str(files("svg_jax"))) / "assets" / "tiny_cogvideox" / "tokenizer"
    tokenizer = load_tokenizer(bundled)
    assert tokenizer([prompt], 16).shape == (1, 16)
    with pytest.raises(ValueError, match="does not know 'surfing'"):
        tokenizer(["a cat surfing"], 16)


@pytest.mark.parametrize("command", ["generate", "compare"])
def test_every_field_of_sparsity_and_warm_up_is_an_option(command, monkeypatch):
    seen: dict[str, Any] = {}
    module = videos if command == "generate" else comparisons
    monkeypatch.setattr(module, command, lambda *_, **given: seen.update(given))
    words = [
        "--density",
        "0.5",
        "--sampled-rows",
        "8",
        "--no-first-frame-sink",
        "--band-multiple",
        "4",
    ]
    words += ["--dense-steps", "0.25", "--dense-layers", "0.5"]
    model = ["--model", "tiny", "--prompt", "a", "-o", "a.gif"]
    result = CliRunner().invoke(app, [command, *model, *words])
    assert result.exit_code == 0, result.output
    assert seen["sparsity"].keys() == {field.name for field in dataclasses.fields(SparsityConfig)}
    assert seen["warmup"].keys() == {field.name for field in dataclasses.fields(Warmup)}
    assert SparsityConfig(**seen["sparsity"]) == SparsityConfig(0.5, 8, False, 4)
    assert Warmup(**seen["warmup"]) == Warmup(steps=0.25, layers=0.5)
    CliRunner().invoke(app, [command, *model, "--first-frame-sink"])
    assert (seen["sparsity"], seen["warmup"]) == ({"first_frame_sink": True}, {})
