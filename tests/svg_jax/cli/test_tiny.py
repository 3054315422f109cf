"""The bundled model by its name, run as its folder says, on the command line and in Python."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest

import svg_jax
from svg_jax.bundled import FOLDER, bundled_or
from svg_jax.cli import comparisons, console, videos
from svg_jax.stages import Stopwatch

PROMPT = "a red three moving left over the flower"
FEW_FRAMES = ["--num-frames", "2"]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "tiny_cache"
    monkeypatch.setenv("SVG_JAX_CACHE", str(folder))


def test_tiny_is_the_bundled_model_unless_a_folder_has_that_name(monkeypatch, tmp_path, caplog):
    monkeypatch.chdir(tmp_path)
    assert bundled_or("tiny") == FOLDER
    assert (bundled_or("./tiny"), bundled_or("owner/tiny")) == ("./tiny", "owner/tiny")
    (tmp_path / "tiny").mkdir()
    with caplog.at_level("INFO"):
        assert bundled_or("tiny") == "tiny"
    assert "./tiny is taken for the model, not the bundled one" in caplog.text
    with pytest.raises(ValueError, match=r"tiny: is no pipeline"):
        svg_jax.from_pretrained("tiny")


def test_every_command_for_checkpoints_knows_its_name(run, tmp_path):
    assert "CogVideoXPipeline, not converted" in run("inspect", "tiny").out
    assert "would write" in run("convert", "tiny", "a", "--dry-run").out
    assert run("convert", "tiny", "a").code == 0
    assert json.loads((tmp_path / "a" / "svg_jax.json").read_text())["density"] == 0.25
    for command in (["verify", "tiny"], ["export", "tiny", "b"]):
        result = run(*command)
        assert (result.code, "was not converted" in result.err) == (2, True)
    shutil.move("a", "tiny")  # and now it is this one
    assert run("verify", "tiny").code == 0


def test_compare_runs_it_as_its_folder_says(run, tmp_path):
    result = run("compare", "--model", "tiny", "--prompt", PROMPT, *FEW_FRAMES, "--json", "r.json")
    assert result.code == 0, result.err
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["num_inference_steps"], report["requested_density"]) == (20, 0.25)
    assert (report["dense_steps"], report["guided_steps"]) == (6, 6)
    with PIL.Image.open("compare.gif") as video:
        assert video.size == (2 * 64 * 6 + 12, 48 * 6 + 22)
        video.seek(1)  # the second of two frames
        with pytest.raises(EOFError):
            video.seek(2)
    assert "(the model's own)" in result.out
    assert "PSNR to dense" in result.out


def test_generate_takes_what_is_given_before_what_its_folder_says(run):
    given = ["--steps", "3", "--guidance-interval", "0", "1", "--enlarge", "2", "--density", "0.5"]
    words = ["generate", "--model", "tiny", "--prompt", PROMPT, *FEW_FRAMES, *given]
    result = run(*words, "-o", "a.png", "--guidance-scale", "4")
    assert result.code == 0, result.err
    assert "sparsity: density 0.5, dense steps 0.3" in result.out
    assert "(the model's own but for --density)" in result.out
    with PIL.Image.open("a.png") as sheet:
        assert sheet.size == (2 * 64 * 2, 48 * 2)
    assert "\nsparse attention by xla in float32, on " in result.out

    pipe = svg_jax.from_pretrained("tiny")
    video = pipe(
        PROMPT,
        num_frames=2,
        num_inference_steps=3,
        guidance_interval=(0, 1),
        sparsity=svg_jax.SparsityConfig(density=0.5),
        warmup=svg_jax.Warmup(steps=0.3),
    )
    assert video.frames is not None
    shown = np.concatenate(np.round(video.frames[0] * 255).astype(np.uint8), axis=1)
    with PIL.Image.open("a.png") as sheet:
        np.testing.assert_array_equal(np.asarray(sheet)[::2, ::2], shown)

    result = run(*words, "-o", "a.png", "--attention", "dense", "--dtype", "bfloat16")
    assert "\ndense attention in bfloat16, on " in result.out


def test_demo_takes_density_and_steps_and_ends_with_what_to_try(run, monkeypatch, tmp_path):
    seen = []
    before = comparisons._compare

    def compare(pipeline, settings, *arguments, **options):
        seen.append(settings)
        settings = dataclasses.replace(settings, num_frames=2)
        return before(pipeline, settings, *arguments, **options)

    monkeypatch.setattr(comparisons, "_compare", compare)
    result = run("demo", "--density", "0.4", "--steps", "3", "--seed", "5")
    assert (result.code, result.err) == (0, "")
    (settings,) = seen
    assert (settings.num_inference_steps, settings.seed) == (3, 5)
    assert (settings.sparsity.density, settings.warmup.steps) == (0.4, 0.3)
    assert result.out.splitlines()[-1] == (
        f"next: svg-jax generate --model tiny --prompt '{PROMPT}' --output video.gif"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.gif", "demo.mp4"]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_run_without_a_terminal_prints_a_line_now_and_then(monkeypatch, capsys, is_terminal):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setenv("FORCE_COLOR" if is_terminal else "NO_COLOR", "1")
    with console.steps_bar(50, Stopwatch()) as advance:
        for _ in range(50):
            clock.now += 4
            advance("denoising")
    steps = [] if is_terminal else [2, 5, 10, 20, 35]  # at last once a minute
    lines = [f"denoising: step {step} of 50, {4 * step} s" for step in steps]
    assert capsys.readouterr().out.splitlines() == lines


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--density", "nan"], ["--seed", "-1"]])
def test_demo_checks_what_is_given_before_it_converts(run, monkeypatch, arguments):
    monkeypatch.setattr(comparisons, "convert_pipeline", lambda *_, **__: pytest.fail("converted"))
    result = run("demo", *arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"svg-jax: {arguments[0]} ")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--steps", "0"], "--steps must be"),
        (["--num-frames", "0"], "--num-frames must be"),
        (["--seed", "-1"], "--seed must be"),
        (["--guidance-scale", "nan"], "--guidance-scale must be"),
        (["--fps", "0"], "--fps must be"),
        (["--enlarge", "0"], "--enlarge must be"),
        (["--density", "inf"], "--density"),
        (["--density", "0.001"], "--density 0.001 leaves nothing"),
        (["--true-cfg-scale", "2"], "this model takes no --true-cfg-scale"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "compare"])
def test_what_no_run_can_be_names_its_option(run, tmp_path, command, arguments, sentence):
    output = ["-o", "a.gif"] if command == "generate" else []
    result = run(command, "--model", "tiny", "--prompt", PROMPT, *output, *arguments)
    assert (result.code, list(tmp_path.iterdir())) == (2, [])
    assert sentence in result.err


@pytest.mark.parametrize(
    ("pays", "options", "is_sparse"),
    [
        (False, [], False),
        (False, ["--attention", "svg"], True),
        (False, ["--density", "0.5"], True),
        (False, ["--dense-steps", "0.5"], True),
        (True, [], True),
        (True, ["--attention", "dense"], False),
    ],
)
def test_attention_is_dense_where_sparse_does_not_pay_unless_it_is_asked_for(
    pays, options, is_sparse, run, monkeypatch
):
    made = []
    monkeypatch.setattr("svg_jax.cli.given.sparse_attention_pays", lambda *_: pays)
    monkeypatch.setattr(videos, "_generate", lambda _, jobs, *__, **___: made.extend(jobs) or {})
    result = run("generate", "--model", "tiny", "--prompt", PROMPT, "-o", "a.gif", *options)
    assert result.code == 0, result.err
    assert [job.settings.sparsity is not None for job in made] == [is_sparse]
    said = "it is faster than sparse attention" in result.out + result.err
    assert said == (not pays and not options)
