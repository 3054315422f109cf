"""Options drawn at random: the command line takes what the fields take, and names all else."""

from typing import Any

import hypothesis
import numpy as np
import PIL.Image
import pytest
from drawn_settings import PICTURE, taken
from hypothesis import strategies as st
from tiny_checkpoint import is_one_sentence
from unloaded_pipelines import PIPELINES

from svg_jax.cli import videos
from svg_jax.cli.generated import every_setting, flag_of
from svg_jax.convert.formats.values import Choice, Flag, Number, Shares
from svg_jax.sampling.settings import PlaybackSettings, settings_of
from svg_jax.sampling.settings.fields import is_file, option_of
from svg_jax.sampling.settings.rules import ArrayOf, Images, Prompts

OPTIONS = {name: each for name, each in every_setting().items() if option_of(name, each)}
LINE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
NO_NUMBERS = ["", "six", "nan", "inf", "-inf", "1,5", "0x10", "1e400"]


class Began(BaseException):
    """The first work of a run, which no refusal comes after."""


def began(*arguments, **options):
    raise Began


def words_taken(flag: str, rule: Any) -> Any:
    """Draw how an option is given a value from the range that its field states."""
    match rule:
        case Number():
            return taken(rule).map(lambda number: [f"{flag}={number}"])
        case Flag():
            return st.just([flag])
        case Shares():
            return taken(rule).map(lambda ends: [flag, *map(str, map(float, ends))])
        case Choice():
            return taken(rule).map(lambda name: [f"{flag}={name}"])
        case Prompts():
            return LINE.map(lambda text: [f"{flag}={text}"])
        case ArrayOf():
            return st.just([f"{flag}={len(rule.axes)}.npy"])
        case Images():
            return st.just([f"{flag}=picture.png"])
    raise AssertionError(f"it is not known how a {type(rule).__name__} is given")


def words_refused(flag: str, rule: Any) -> Any:
    """Draw how an option is given what its field does not take."""
    match rule:
        case Number():
            beyond = st.integers(max_value=int(np.ceil(rule.minimum)) - 1)
            if rule.maximum is not None:
                beyond |= st.integers(min_value=int(rule.maximum) + 1) | st.just(10**400)
            odd = st.sampled_from([*NO_NUMBERS, *(["1.5"] if rule.whole else [])])
            return (beyond.map(str) | odd).map(lambda text: [f"{flag}={text}"])
        case Flag():
            return st.just([f"{flag}=yes"])
        case Shares():
            ends = st.sampled_from([["0.5", "0.2"], ["0", "nan"], ["-0.1", "1"], ["0", "x"]])
            return ends.map(lambda pair: [flag, *pair])
        case Choice():
            names = LINE.filter(lambda text: text not in rule.names)
            return names.map(lambda text: [f"{flag}={text}"])
        case ArrayOf():
            files = ["nothing.npy", ".", "picture.png", f"{len(rule.axes) + 2}.npy"]
            return st.sampled_from(files).map(lambda file: [f"{flag}={file}"])
        case Images():
            files = st.sampled_from(["nothing.png", ".", "3.npy"])
            return files.map(lambda file: [f"{flag}={file}"])
        case Prompts():  # any text is one
            return st.nothing()
    raise AssertionError(f"it is not known what a {type(rule).__name__} refuses")


@st.composite
def commands(draw, kind):
    """Draw a command's options, and the one that it refuses; None if they are taken."""
    known = {name: OPTIONS[name] for name in settings_of(kind, PlaybackSettings) if name in OPTIONS}
    rules = {name: each.rule for name, each in known.items()}
    rules |= {"scheduler": Choice(kind.samplers)}
    rules |= {"num_videos_per_prompt": Number(1, 1000, whole=True)}  # each is a file
    chosen = draw(st.sets(st.sampled_from(sorted(known)), max_size=6)) | {"prompt"}
    chosen -= {"prompt" if "prompt_embeds" in chosen else "prompt_embeds"}
    if "negative_prompt_embeds" in chosen:
        chosen -= {"negative_prompt"}
    end = draw(st.sampled_from(["taken", "taken", "taken", "refused", "another family's"]))
    field, refused = None, []
    if end == "refused":
        bad = {name: words_refused(flag_of(name), rule) for name, rule in rules.items()}
        field = draw(st.sampled_from([name for name in bad if not bad[name].is_empty]))
        refused = draw(bad[field])
    elif end != "taken":
        field = draw(st.sampled_from(sorted(OPTIONS.keys() - known.keys())))
        refused = draw(words_taken(flag_of(field), OPTIONS[field].rule))
    words = [draw(words_taken(flag_of(name), rules[name])) for name in sorted(chosen - {field})]
    if field == "prompt_embeds":
        words = [each for each in words if not each[0].startswith("--prompt=")]
    return [word for option in [*words, refused] for word in option], field


@pytest.mark.parametrize("examples", [40, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", PIPELINES)
def test_options_in_range_are_taken_and_all_else_refused_by_flag(
    name, examples, run, monkeypatch, tmp_path
):
    pipeline = PIPELINES[name]
    monkeypatch.setattr(videos, "load_model", lambda model: pipeline)
    for method in ("prepare", "denoise"):
        monkeypatch.setattr(type(pipeline), method, began)
    # A checkpoint narrows the range of sizes: that is tested with checkpoints.
    monkeypatch.setattr(type(pipeline), "video_size", lambda *arguments, **options: (9, 32, 48))
    for axes in range(1, 9):
        np.save(tmp_path / f"{axes}.npy", np.ones((1,) * axes, np.float32))
    PIL.Image.fromarray(PICTURE).save(tmp_path / "picture.png")
    files = sorted(tmp_path.iterdir())
    counts = {True: 0, False: 0}

    @hypothesis.settings(max_examples=examples, database=None, derandomize=True)
    @hypothesis.given(command=commands(pipeline.settings_class))
    def check(command):
        options, field = command
        counts[field is None] += 1
        try:
            result = run("generate", "--model=tiny", "--output=a.npz", *options)
        except Began:
            assert field is None, "it is not refused"
        else:
            assert field is not None, result.err
            assert result.code == 2, result
            assert is_one_sentence(result.err)
            assert len(result.err) <= 520
            file = options[-1].partition("=")[2]  # the one that is refused, if it is one
            assert flag_of(field) in result.err or (is_file(OPTIONS[field]) and file in result.err)
        assert sorted(tmp_path.iterdir()) == files

    check()
    assert counts[True] >= sum(counts.values()) / 3
