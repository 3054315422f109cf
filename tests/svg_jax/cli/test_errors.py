"""How a command ends that an exception ends: exit code, sentence, and what its message may do."""

import errno
import io
import json
import logging
import os
import re
import shutil
import sys
import warnings
import zipfile
from pathlib import Path

import av
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from rich.table import Table

import svg_jax
from svg_jax.bundled import bundled_or
from svg_jax.cli import checkpoints, comparisons, console, videos
from svg_jax.cli.errors import ExitCode, failure_of
from svg_jax.convert import DamageError, RefusedError

COMMANDS = {
    "generate": ["generate", "--model", "tiny", "--prompt", "a", "-o", "a.gif"],
    "compare": ["compare", "--model", "tiny", "--prompt", "a"],
    "demo": ["demo"],
    "convert": ["convert", "a", "b"],
    "export": ["export", "a", "b"],
    "verify": ["verify", "a"],
    "inspect": ["inspect", "a"],
}
SENTENCE = re.compile(r"svg-jax: [^\n]*\n")


def inject(monkeypatch, command, fail):
    """Let a command call `fail` in place of doing its work."""
    homes = {"generate": videos, "compare": comparisons, "demo": comparisons}
    home = homes.get(command, checkpoints)
    name = "inspect_source" if command == "inspect" else command
    monkeypatch.setattr(home, name, lambda *arguments, **options: fail())
    return COMMANDS[command]


def raising(error):
    def fail():
        raise error

    return fail


def of_this_package(source):
    """A function as a module of the package might hold it."""
    names = {"__name__": "svg_jax.somewhere", "np": np, "jnp": jnp}
    exec(f"def fail():\n    {source}", names)
    return names["fail"]


INTERNAL = {
    "AttributeError": of_this_package("None.shape"),
    "KeyError": of_this_package("{}['frames']"),
    "TypeError": of_this_package("len(3)"),
    "IndexError": of_this_package("[][0]"),
    "ZeroDivisionError": of_this_package("1 / 0"),
    "AssertionError": of_this_package("assert False"),
    "RuntimeError": of_this_package("raise RuntimeError('what is this?')"),
    "RecursionError": of_this_package("fail()"),
    "ValueError of a call": of_this_package("int('x')"),
    "ValueError of unpacking": of_this_package("a, b = 1, 2, 3"),
    "ValueError of numpy": of_this_package("np.zeros((2, 3)).reshape(7)"),
    "ValueError of jax": of_this_package("jnp.broadcast_shapes((2, 3), (4, 5))"),
}


@pytest.mark.parametrize("kind", INTERNAL)
def test_what_nobody_foresaw_is_an_internal_error_whose_traceback_is_kept(
    run, monkeypatch, tmp_path, kind
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for command in ("verify",) if kind != "AttributeError" else COMMANDS:
        result = run(*inject(monkeypatch, command, INTERNAL[kind]))
        assert (result.code, result.out) == (70, "")
        assert SENTENCE.fullmatch(result.err), result.err
        assert result.err.startswith(f"svg-jax: internal error: {kind.partition(' ')[0]}")
        file = Path(result.err.split()[-1])
        assert file.parent == tmp_path
        text = file.read_text()
        assert "Traceback (most recent call last)" in text
        assert "in fail" in text


def test_an_internal_error_without_a_place_for_its_traceback(run, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    result = run(*inject(monkeypatch, "demo", raising(KeyError("\x1b[31m" * 500))))
    assert (result.code, len(result.err) <= 501) == (70, True)
    assert "--debug shows the traceback" in result.err


def cut_off_zip():
    zipfile.ZipFile(io.BytesIO(b"PK\x03\x04"))


def no_image():
    PIL.Image.open(io.BytesIO(b"GIF"))


def no_protocol():
    av.open("ab:c.mp4")


def deep_json():
    json.loads("[" * 200_000)


def no_json():
    json.loads("{")


def no_text():
    b"\xff".decode()


def no_path():
    "bad\udcff".encode()


FORESEEN = [
    (raising(ValueError("a: is wrong")), 2, "a: is wrong"),
    (of_this_package("raise ValueError('a: is wrong')"), 2, "a: is wrong"),
    (raising(FileNotFoundError(2, "No such file", "a")), 2, "a: No such file"),
    (raising(OSError(errno.ENAMETOOLONG, "File name too long", "a")), 2, "a: File name too"),
    (raising(PermissionError(13, "Permission denied", b"a\xff")), 3, "a\\udcff: Permission"),
    (raising(OSError(28, "No space left", "a", None, "b")), 3, "a to b: No space left"),
    (raising(MemoryError()), 3, "the machine ran out of memory"),
    (lambda: np.zeros(2**60, np.uint8), 3, "the machine ran out of memory"),
    (
        raising(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 bytes")),
        3,
        "the device ran out of memory",
    ),
    (raising(RuntimeError("CUDA_ERROR_OUT_OF_MEMORY")), 3, "the device ran out of memory"),
    (raising(RefusedError("a: another run is writing this folder")), 3, "a: another run"),
    (raising(DamageError("a: is damaged")), 4, "a: is damaged"),
    (raising(FloatingPointError("not finite")), 1, "not finite"),
    (raising(PIL.Image.DecompressionBombError("a bomb")), 2, "a bomb"),
    (no_image, 2, "cannot identify image file"),
    (no_protocol, 2, "ab:c.mp4: Protocol not found"),
    (cut_off_zip, 2, "an input file is damaged or cut off: File is not a zip file"),
    (raising(EOFError()), 2, "an input file is damaged or cut off: it ends early"),
    (deep_json, 2, "nested too deeply"),
    (no_json, 2, "Expecting property name"),
    (no_text, 2, "is not UTF-8: invalid start byte"),
    (no_path, 2, "is not UTF-8: surrogates not allowed"),
]


@pytest.mark.parametrize(("fail", "code", "sentence"), FORESEEN)
def test_what_was_foreseen_is_one_sentence(run, monkeypatch, fail, code, sentence):
    result = run(*inject(monkeypatch, "convert", fail))
    assert (result.code, result.out) == (code, "")
    assert SENTENCE.fullmatch(result.err), result.err
    assert sentence in result.err


@pytest.mark.parametrize("place", ["before the command", "behind it"])
@pytest.mark.parametrize(("fail", "code"), [(raising(ValueError("a")), 2), (lambda: [][0], 70)])
def test_debug_shows_the_traceback(run, monkeypatch, place, fail, code):
    words = inject(monkeypatch, "inspect", fail)
    result = run(*(["--debug", *words] if place == "before the command" else [*words, "--debug"]))
    lines = result.err.splitlines()
    assert (result.code, lines[0]) == (code, "Traceback (most recent call last):")
    assert lines[-1].startswith("svg-jax: ")


@pytest.mark.parametrize(
    ("field", "message", "told"),
    [
        ("num_frames", "num_frames must be positive: got 0", "--num-frames must be positive"),
        ("num_inference_steps", "num_inference_steps is 1 to 1000", "--steps is 1 to 1000"),
        ("use_dynamic_cfg", "use_dynamic_cfg is for CogVideoX", "--dynamic-cfg is for"),
        ("height", "must be a multiple of 16", "--height: must be"),
        (
            "prompt",
            "prompt is missing: pass prompt_embeds",
            "--prompt is missing: pass --",
        ),
        ("num_frames", "num_frames needs num_inference_steps", "--num-frames needs --steps"),
        ("save_every", "save_every must be at least 0: got -1", "--save-every must be"),
    ],
)
def test_a_setting_s_error_names_the_option(run, monkeypatch, field, message, told):
    if message.startswith(field):  # then it need not be carried
        result = run(*inject(monkeypatch, "generate", raising(ValueError(message))))
        assert (result.code, result.err.startswith(f"svg-jax: {told}")) == (2, True), result.err
    error = type("SettingError", (ValueError,), {"field": field})(message)
    result = run(*inject(monkeypatch, "generate", raising(error)))
    assert (result.code, result.err.startswith(f"svg-jax: {told}")) == (2, True), result.err


@pytest.mark.parametrize("message", ["source is wrong", "steps: no such file", "a height is odd"])
def test_what_is_no_option_s_field_is_left_as_it_is(run, monkeypatch, message):
    result = run(*inject(monkeypatch, "convert", raising(ValueError(message))))
    assert result.err == f"svg-jax: {message}\n"


@pytest.mark.parametrize(
    ("command", "message", "told"),
    [
        ("convert", "out: is there: pass overwrite=True.", "out: is there: pass --overwrite."),
        ("convert", "a: say which with weights_key=….", "a: say which with --weights-key."),
        ("convert", "a: give weights_key='a.b'.", "a: give --weights-key a.b."),
        ("convert", "a: give weights_key='a b'.", "a: give --weights-key 'a b'."),
        ("convert", "leave it out: components=('vae', 'b').", "leave it out: --components vae,b."),
        ("convert", "not lora_scale=0.5, resume=True", "not --lora-scale 0.5, resume=True"),
        (
            "generate",
            "no text encoder: pass prompt_embeds",
            "no text encoder: pass --prompt-embeds",
        ),
        ("generate", "a: had num_frames 9, pass a seed", "a: had num_frames 9, pass a seed"),
    ],
)
def test_an_argument_that_is_asked_for_is_told_as_its_option(
    run, monkeypatch, command, message, told
):
    result = run(*inject(monkeypatch, command, raising(ValueError(message))))
    assert (result.code, result.err) == (2, f"svg-jax: {told}\n")
    full = raising(OSError(errno.ENOSPC, message, "a.gif"))
    result = run(*inject(monkeypatch, command, full))
    assert (result.code, result.err) == (3, f"svg-jax: a.gif: {told}\n")
    logger = logging.getLogger("svg_jax.somewhere")
    result = run(*inject(monkeypatch, command, lambda: logger.warning(message)))
    assert (result.code, result.err) == (0, f"svg-jax: {told}\n")


HOSTILE = "\x1b]0;title\x07\x1b[31m\r\x00\x9b1m\u202eevil\u2028\udcff and so on " * 60


@pytest.mark.parametrize("way", ["error", "internal error", "warning", "log", "outcome"])
def test_no_message_holds_control_characters_or_is_long(run, monkeypatch, way):
    def fail():
        match way:
            case "error":
                raise ValueError(HOSTILE)
            case "internal error":
                raise KeyError(HOSTILE)
            case "warning":
                warnings.simplefilter("always")
                warnings.warn(HOSTILE, UserWarning, stacklevel=1)
            case "log":
                logging.getLogger("svg_jax.convert").warning("%s", HOSTILE)
            case "outcome":
                checkpoints.say(HOSTILE)

    with warnings.catch_warnings():
        result = run(*inject(monkeypatch, "convert", fail))
    assert result.code == {"error": 2, "internal error": 70}.get(way, 0)
    shown = result.out if way == "outcome" else result.err
    assert "evil" in shown
    assert all(line.isprintable() for line in shown.splitlines())
    assert len(shown.splitlines()) == 1
    assert way == "outcome" or len(shown) <= 501  # with the line feed


def full_disk():
    return open("/dev/full", "w")


def reader_gone():
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


@pytest.mark.parametrize("open_stream", [full_disk, reader_gone, lambda: None])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_finished_run_is_done_though_nobody_can_be_told(run, monkeypatch, name, open_stream):
    def finish():
        videos.say("wrote a.gif\n" * 9000)
        logging.getLogger("svg_jax").warning("and this")

    words = inject(monkeypatch, "generate", finish)
    stream = open_stream()
    monkeypatch.setattr(sys, name, stream)
    assert run(*words).code == 0
    if stream is not None:
        stream.close()  # nothing is left in it that would fail when the interpreter ends


def test_only_what_a_command_is_called_for_must_be_printed(run, monkeypatch):
    with full_disk() as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        result = run("inspect", "tiny", "--json", "-")
    assert result.code == 3
    assert result.err == "svg-jax: standard output: No space left on device\n"
    with reader_gone() as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert run("inspect", "tiny").code == 0


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_the_terminal_s_encoding_lacks_is_escaped(run, monkeypatch, encoding):
    def finish():
        videos.say("wrote 漢字/é.gif")
        raise FileNotFoundError(2, "No such file", "漢字\udce4")

    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert run(*inject(monkeypatch, "generate", finish)).code == 2
    said, told = (stream.buffer.getvalue().decode(encoding) for stream in (out, err))
    kanji = "漢字" if encoding == "utf-8" else "\\u6f22\\u5b57"
    accent = "\\xe9" if encoding == "ascii" else "é"
    assert said == f"wrote {kanji}/{accent}.gif\n"
    assert told == f"svg-jax: {kanji}\\udce4: No such file\n"
    assert (out.errors, err.errors) == ("strict", "strict")  # as they were


def test_brackets_are_no_markup(run, tmp_path, capsys):
    source = shutil.copytree(bundled_or("tiny"), tmp_path / "source")
    config = json.loads((source / "transformer/config.json").read_text())
    config["_diffusers_version"] = "[/bold]"
    (source / "transformer/config.json").write_text(json.dumps(config))
    result = run("inspect", source)
    assert (result.code, "[/bold]" in result.out) == (0, True)
    table = Table("column", title="[/bold]")
    console.add_row(table, "[/red] :smile:")
    console.print_parts(table)
    assert "[/red] :smile:" in capsys.readouterr().out


def test_version_and_public_names(run):
    assert run("--version").out == f"svg-jax {svg_jax.__version__}\n"
    assert re.fullmatch(r"\d+\.\d+\.\d+", svg_jax.__version__)
    names = dir(svg_jax)
    assert {"sparse_attention", "from_pretrained", "save_video", "__version__"} <= set(names)
    assert all(getattr(svg_jax, name) is not None for name in names)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["inspect", "--help"]])
def test_help_says_nothing_on_standard_error(run, arguments):
    result = run(*arguments)
    assert (result.code, result.err, "Usage" in result.out) == (0 if arguments else 2, "", True)


def test_a_missing_package_is_named_with_the_extra_that_has_it():
    failure = failure_of(ModuleNotFoundError("No module named 'av.video'", name="av.video"))
    assert failure.code == ExitCode.REFUSED
    assert failure.sentence.startswith("av is not installed")
    assert failure.sentence.endswith("pip install 'svg-jax[video]'")


def test_a_module_of_this_package_that_is_missing_is_an_internal_error():
    gone = ModuleNotFoundError("No module named 'svg_jax.gone'", name="svg_jax.gone")
    assert failure_of(gone).code == ExitCode.INTERNAL
