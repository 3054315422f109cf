"""Outputs that cannot be written, or would take another file's place, are found before the work."""

import errno
import os
import resource
import signal
import socket
import sys
from pathlib import Path

import numpy as np
import pytest

import svg_jax
from svg_jax.cli import comparisons, videos
from svg_jax.cli.errors import failure_of
from svg_jax.cli.outputs import check_outputs
from svg_jax.convert.files import check_writable, open_regular
from svg_jax.media.video import save_video

PROMPT = "a red three moving left over the flower"
VIDEO = np.zeros((1, 16, 16, 3), np.uint8)


@pytest.fixture(scope="module")
def model(bundled):
    return bundled


@pytest.fixture
def run(model, run):
    """Calls the command line in an empty folder; gives its code, output and error."""

    def call(command, *arguments):
        words = [command]
        if command != "demo":
            words += ["--model", model, "--steps", 2, "--num-frames", 2, "--guidance-scale", 1]
            words += [] if "--prompts" in arguments else ["--prompt", PROMPT]
        result = run(*words, *arguments)
        return result.code, result.out, result.err

    return call


@pytest.fixture
def no_work(monkeypatch):
    """Loading a model fails the test: what is wrong has to be known before."""

    def refuse(*_arguments, **_options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(videos, "load_model", refuse)
    for name in ("load_model", "from_pretrained", "convert_pipeline"):
        monkeypatch.setattr(comparisons, name, refuse)


def no_step(*_arguments):
    raise AssertionError("a run was prepared")


def read_only_folder(tmp_path):
    """A folder in which not even the administrator makes files, if that is who runs the tests."""
    folder = tmp_path / "ro"
    folder.mkdir(mode=0o555)
    return Path("/sys") if os.access(folder, os.W_OK) else folder


@pytest.mark.parametrize(
    ("command", "arguments", "code", "sentence"),
    [
        ("generate", ["-o", "folder.npz"], 2, "there is a folder of that name"),
        ("generate", ["-o", "folder.mp4"], 2, "there is a folder of that name"),
        ("generate", ["-o", "a.npz", "--labels-out", "folder.mp4"], 2, "a folder of that name"),
        ("compare", ["-o", "folder"], 2, "there is a folder of that name"),
        ("compare", ["-o", "a", "--json", "folder.npz"], 2, "there is a folder of that name"),
        ("demo", ["-o", "folder"], 2, "there is a folder of that name"),
        ("demo", ["-o", "none/a"], 2, "there is no folder none"),
        ("compare", ["-o", "."], 2, "--output must name a video"),
        ("compare", ["-o", "folder.npz/.."], 2, "--output must name a video"),
        ("generate", ["-o", "many.gif", "--num-videos", "2"], 2, "there is a folder of that name"),
        ("generate", ["-o", "a.gif", "--num-videos", "1001"], 2, "--num-videos gives a batch of"),
        ("generate", ["-o", "~/.a.npz", "--model", "~"], 2, "there is no folder ~"),
        ("generate", ["-o", "HOME/a.npz", "--model", "~"], 2, "is in the folder HOME that is read"),
        ("generate", ["-o", "null.npz"], 2, "null.npz is no file but a device or a pipe"),
        ("generate", ["-o", "pipe.gif"], 2, "pipe.gif is no file but a device or a pipe"),
        ("generate", ["-o", "a" * 250 + ".mp4"], 2, "name has 25"),
        ("generate", ["-o", "RO/a.npz"], 3, "a.npz: cannot be written: "),
        ("generate", ["-o", "a.npz", "--labels-out", "RO/l.npz"], 3, "l.npz: cannot be written"),
        ("compare", ["-o", "RO/a"], 3, "a.mp4: cannot be written: "),
        ("demo", ["-o", "RO/a"], 3, "a.mp4: cannot be written: "),
        ("generate", ["-o", "a.npz", "--labels-out", "./a.npz"], 2, "is the same file as "),
        ("generate", ["-o", "a.npz", "--labels-out", ".a.npz.state"], 2, "is the same file as "),
        ("compare", ["-o", "a", "--json", "a.gif"], 2, "is the same file as "),
        ("generate", ["-o", "noise.npz", "--latents", "noise.npz"], 2, "that is read as "),
        ("generate", ["-o", "linked.npz", "--prompt-embeds", "noise.npz"], 2, "that is read as "),
        ("generate", ["-o", "photo.png", "--image", "folder.npz/../photo.png"], 2, "is read as "),
        ("compare", ["-o", "a", "--json", "photo.png", "--last-image", "photo.png"], 2, "read as"),
        ("generate", ["-o", "MODEL/a.npz"], 2, "that is read as "),
        ("compare", ["-o", "a", "--json", "MODEL/manifest.json"], 2, "that is read as "),
        ("demo", ["-o", "MODEL/a", "--source", "MODEL"], 2, "that is read as "),
        ("generate", ["-o", "a.npz", "--prompts", "pipe.gif"], 2, "but a device or a pipe"),
        ("generate", ["-o", "a.npz", "--prompts", "/dev/zero"], 2, "but a device or a pipe"),
    ],
)
def test_every_command_finds_it_before_the_work(
    command, arguments, code, sentence, run, no_work, model, tmp_path, monkeypatch
):
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    places = {
        "HOME": str(tmp_path / "home"),
        "RO": str(read_only_folder(tmp_path)),
        "MODEL": str(model),
    }
    for name in ("folder.npz", "folder.mp4", "many-1.gif"):
        Path(name).mkdir()
    Path("null.npz").symlink_to("/dev/null")
    os.mkfifo("pipe.gif")
    Path("noise.npz").write_bytes(b"of the user")
    Path("photo.png").write_bytes(b"of the user")
    os.link("noise.npz", "linked.npz")
    before = sorted(os.listdir())
    for place, path in places.items():
        arguments = [word.replace(place, path) for word in arguments]
        sentence = sentence.replace(place, path)
    found, _, error = run(command, *arguments)
    assert (found, sentence in error) == (code, True), error
    assert len(error.splitlines()) == 1
    assert len(error) < 520
    assert sorted(os.listdir()) == before
    assert Path("noise.npz").read_bytes() == Path("photo.png").read_bytes() == b"of the user"


def test_labels_that_no_step_finds_are_told_before_the_work(run):
    code, _, error = run("generate", "-o", "a.npz", "--labels-out", "l.npz", "--dense-steps", "1")
    assert (code, "leaves none of 2 steps to be sparse" in error) == (2, True), error
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("command", "arguments", "sentence"),
    [
        ("generate", ["-o", "a.mp4", "--enlarge", "60", "--width", "1024"], "of at most "),
        ("generate", ["-o", "a.gif", "--fps", "60"], "at most 50 for a .gif"),
        ("generate", ["-o", "a.gif", "--fps", "0.0001"], "must be a number from 0.01"),
        ("generate", ["-o", "a.gif", "--fps", "0.01", "--num-frames", "9"], "too low for a .gif"),
        ("compare", ["-o", "a", "--enlarge", "60", "--width", "256"], "of at most "),
        ("compare", ["-o", "a", "--fps", "60"], "at most 50 for a .gif"),
    ],
)
def test_what_a_format_cannot_hold_is_told_before_the_steps(
    command, arguments, sentence, run, monkeypatch
):
    monkeypatch.setattr("svg_jax.sampling.prepared_run.make_schedule", no_step)
    code, _, error = run(command, *arguments)
    assert (code, sentence in error) == (2, True), error
    assert os.listdir() == []


@pytest.mark.parametrize("name", ["12:30.mp4", "cat: a story.MP4", "-%d é.GIF", "a.NPZ"])
def test_any_name_and_any_case_of_a_suffix_is_an_output(name, run):
    code, out, error = run("generate", f"--output={name}")
    assert (code, error) == (0, "")
    assert os.listdir() == [name]
    assert f"wrote {name}" in out


def test_a_video_that_cannot_be_written_is_not_lost(run, monkeypatch):
    """As on a disk that filled up while the video was made."""

    def full(*_arguments, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(videos, "save_video", full)
        code, _, error = run("generate", "-o", "a.gif")
    assert code == 3
    assert error == (
        "svg-jax: a.gif: cannot be written (No space left on device): the run is saved; "
        "--resume continues from there\n"
    )
    assert os.listdir() == [".a.gif.state"]
    monkeypatch.setattr("svg_jax.sampling.pipeline.denoise", None)  # no step is left
    code, _, error = run("generate", "-o", "a.gif", "--resume")
    assert (code, os.listdir()) == (0, ["a.gif"]), error


def test_what_fills_the_disk_is_named_and_is_not_the_users_fault(tmp_path, run, monkeypatch):
    """A stream knows no name, and FFmpeg gives its own; nothing is half there."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3)).astype(np.uint8)
    ours = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # the limit would cut it short
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**13, limits[1]))
    try:
        for name in ("a.mp4", "a.gif", "a.png"):
            with pytest.raises(OSError, match="File too large") as caught:
                svg_jax.save_video(noise, tmp_path / name)
            assert caught.value.filename == str(tmp_path / name)
            assert failure_of(caught.value).code == 3
        code, _, error = run("generate", "-o", "a.npz", "--save-every", 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ours)
    assert (code, error) == (3, "svg-jax: a.npz: File too large\n")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_found_by_writing(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, before[1]))
    try:
        with pytest.raises(OSError, match=r"a\.mp4") as caught:
            check_writable(tmp_path / "a.mp4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot be written: File too large" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_python_finds_the_same(tmp_path):
    (tmp_path / "a.mp4").mkdir()
    with pytest.raises(IsADirectoryError, match="there is a folder of that name"):
        save_video(VIDEO, tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="is no name of a file"):
        save_video(VIDEO, tmp_path / "a\0.mp4")
    (tmp_path / "b.mp4").symlink_to("/dev/null")
    with pytest.raises(ValueError, match="is no file but a device or a pipe"):
        save_video(VIDEO, tmp_path / "b.mp4")
    names = [("first", tmp_path / "c"), ("second", tmp_path / ".." / tmp_path.name / "c")]
    with pytest.raises(ValueError, match="second is the same file as first"):
        check_outputs(names, {})
    check_outputs([*names[1:], ("third", tmp_path / "d")], {"first": None, "x": "a/hub-id"})


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "socket"))
    for path in (tmp_path / "pipe", tmp_path / "socket", tmp_path, "/dev/zero", tmp_path / "a\0"):
        with pytest.raises(ValueError, match=r"is no (file but|name of a file)"):
            open_regular(path)
    server.close()
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"content")
    with open_regular(tmp_path / "link") as file:
        assert file.read() == b"content"
