"""A destination folder appears whole or not at all, whatever happens on the way."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections import namedtuple
from pathlib import Path

import pytest

from svg_jax.convert import ConversionError, RefusedError
from svg_jax.convert.checkpoint import staging
from svg_jax.convert.checkpoint.staging import check_destination, staged_folder, standing_folder
from svg_jax.convert.progress import Terminated


def make(destination, text="new", **options):
    """Writes a one-file folder the way that conversions write theirs."""
    with staged_folder(destination, **options) as staging:
        assert not destination.exists() or options.get("overwrite")
        (staging / "manifest.json").write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def in_another_process(code, *arguments):
    source = "import os, signal, sys\nfrom pathlib import Path\n" + textwrap.dedent(code)
    # -B: bytecode that a limit on files cuts short would break later imports.
    arguments = [sys.executable, "-B", "-c", source, *map(str, arguments)]
    return subprocess.run(arguments, capture_output=True, text=True)


KILLED = """
    from svg_jax.convert.checkpoint.staging import staged_folder
    with staged_folder(Path(sys.argv[1])) as staging:
        (staging / "manifest.json").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_folder_is_there_at_the_end_and_alone(tmp_path):
    make(tmp_path / "parents" / "are" / "made")
    assert names(tmp_path / "parents" / "are") == ["made"]
    assert names(tmp_path / "parents" / "are" / "made") == ["manifest.json"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_or_ctrl_c_leaves_nothing(tmp_path, error):
    def interrupted():
        with staged_folder(tmp_path / "out") as staging:
            (staging / "half").touch()
            raise error

    with pytest.raises(error):
        interrupted()
    assert names(tmp_path) == []


def test_a_killed_run_leaves_nothing_under_the_name_and_the_next_run_cleans_up(tmp_path):
    killed = in_another_process(KILLED, tmp_path / "out")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert names(tmp_path) == [".out.partial", ".out.partial.lock"]
    make(tmp_path / "other")  # a run for another destination does not touch them
    assert names(tmp_path) == [".out.partial", ".out.partial.lock", "other"]
    make(tmp_path / "out")
    assert names(tmp_path) == ["other", "out"]
    assert names(tmp_path / "out") == ["manifest.json"]
    assert (tmp_path / "out" / "manifest.json").read_text() == "new"


def test_a_run_may_take_over_what_a_killed_one_left(tmp_path):
    in_another_process(KILLED, tmp_path / "out")
    with staged_folder(tmp_path / "out", take_over=True) as staging:
        assert (staging / "manifest.json").read_text() == "half"


def test_a_second_run_for_the_same_folder_is_refused_and_harms_nothing(tmp_path):
    destination = tmp_path / "out"
    with staged_folder(destination) as staging:
        (staging / "manifest.json").write_text("first")
        with pytest.raises(RefusedError, match=r"out: another run is writing this folder"):
            make(destination, "second")
    assert (destination / "manifest.json").read_text() == "first"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_stands_in_the_place_of_the_hidden_folder_is_left_alone(tmp_path, kind):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "precious").touch()
    if kind == "link":
        (tmp_path / ".out.partial").symlink_to(theirs)
    else:
        (tmp_path / ".out.partial").touch()
    with pytest.raises(ConversionError, match=r"\.out\.partial: is no folder"):
        make(tmp_path / "out")
    assert names(theirs) == ["precious"]
    assert names(tmp_path) == [".out.partial", "theirs"]


def test_what_somebody_else_puts_there_meanwhile_is_left_alone(tmp_path):
    destination = tmp_path / "out"

    def first():
        with staged_folder(destination) as staging:
            (staging / "manifest.json").write_text("first")
            destination.mkdir()
            (destination / "theirs").touch()

    with pytest.raises(RefusedError, match=r"out: cannot be written \(Directory not empty\)"):
        first()
    assert names(destination) == ["theirs"]
    assert names(tmp_path) == ["out"]


def test_overwriting_replaces_the_whole_folder(tmp_path):
    make(tmp_path / "out")
    (tmp_path / "out" / "old").touch()
    make(tmp_path / "out", "newer", overwrite=True)
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["manifest.json"]


def test_overwriting_that_fails_leaves_the_old_folder(tmp_path):
    make(tmp_path / "out", "old")
    with pytest.raises(RuntimeError), staged_folder(tmp_path / "out", overwrite=True):
        raise RuntimeError
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "manifest.json").read_text() == "old"


def test_an_old_folder_that_a_kill_left_aside_stays_until_a_new_one_is_there(tmp_path):
    (tmp_path / ".out.replaced").mkdir()
    with pytest.raises(RuntimeError), staged_folder(tmp_path / "out"):
        raise RuntimeError
    assert names(tmp_path) == [".out.replaced"]
    make(tmp_path / "out")
    make(tmp_path / "out", overwrite=True)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_while_a_folder_is_replaced_one_of_the_two_is_found_at_every_moment(
    tmp_path, monkeypatch, can_exchange
):
    """On Linux by one step; elsewhere a run that is killed between two leaves both, whole."""
    found = []
    rename = Path.rename

    def watched(path, target):
        found.append((standing_folder(tmp_path / "out") / "manifest.json").read_text())
        moved = rename(path, target)
        found.append((standing_folder(tmp_path / "out") / "manifest.json").read_text())
        return moved

    make(tmp_path / "out", "old")
    if not can_exchange:
        monkeypatch.setattr(staging, "_exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", watched)
    make(tmp_path / "out", "new", overwrite=True)
    assert found == (["new", "new"] if can_exchange else ["old", "old", "old", "new"])
    assert names(tmp_path) == ["out"]


def test_a_run_that_was_killed_between_the_two_renames_is_mended_by_the_next(tmp_path, monkeypatch):
    def killed(path, target):
        rename(path, target)
        raise SystemExit

    rename = Path.rename
    make(tmp_path / "out", "old")
    with monkeypatch.context() as patch:
        patch.setattr(staging, "_exchange", lambda one, other: False)
        patch.setattr(Path, "rename", killed)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a killed process cleans nothing
        with pytest.raises(SystemExit):
            make(tmp_path / "out", "new", overwrite=True)
    assert names(tmp_path) == [".out.partial", ".out.replaced"]
    assert (standing_folder(tmp_path / "out") / "manifest.json").read_text() == "old"
    make(tmp_path / "out", "newer", overwrite=True)
    assert names(tmp_path) == ["out"]
    assert (standing_folder(tmp_path / "out") / "manifest.json").read_text() == "newer"


def test_what_is_terminated_stays_for_the_next_run_where_it_may(tmp_path):
    def terminated(**options):
        with staged_folder(tmp_path / "out", **options) as staging:
            (staging / "done").touch()
            raise Terminated

    with pytest.raises(KeyboardInterrupt):
        terminated(take_over=True)
    assert names(tmp_path) == [".out.partial"]
    with pytest.raises(KeyboardInterrupt):
        terminated()
    assert names(tmp_path) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConversionError, match="file: is no folder"):
        make(tmp_path / "file" / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_place_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RefusedError, match=r"out: cannot be written \(Permission denied"):
        make(tmp_path / "out")


def test_a_disk_that_fills_up_leaves_nothing(tmp_path):
    full = """
        import resource
        from svg_jax.convert.checkpoint.staging import staged_folder
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with staged_folder(Path(sys.argv[1])) as staging:
            (staging / "weights").write_bytes(bytes(10_000))
    """
    result = in_another_process(full, tmp_path / "out")
    assert "out: cannot be written (File too large)" in result.stderr
    assert names(tmp_path) == []


class TestCheckDestination:
    @pytest.fixture
    def source(self, tmp_path):
        (tmp_path / "source").mkdir()
        return tmp_path / "source"

    def refused(self, message, *arguments, error=ConversionError):
        with pytest.raises(error, match=message):
            check_destination(*arguments)

    def test_a_new_place_is_fine(self, tmp_path, source):
        check_destination(tmp_path / "a" / "b", source, 1000, False)

    @pytest.mark.parametrize("where", ["source", "source/inside", "."])
    def test_source_and_destination_must_lie_apart(self, tmp_path, source, where):
        self.refused("lies inside the source", tmp_path / where, source, 0, True)

    def test_a_link_into_the_source_is_seen_through(self, tmp_path, source):
        (tmp_path / "link").symlink_to(source)
        self.refused("lies inside the source", tmp_path / "link" / "x", source, 0, False)

    def test_what_is_there_is_not_overwritten_unasked(self, tmp_path, source):
        make(tmp_path / "out")
        self.refused("is there already", tmp_path / "out", source, 0, False)
        check_destination(tmp_path / "out", source, 0, True)

    def test_what_is_no_checkpoint_is_never_overwritten(self, tmp_path, source):
        make(tmp_path / "out")
        (tmp_path / "home").mkdir()
        (tmp_path / "file").touch()
        (tmp_path / "link").symlink_to(tmp_path / "out")
        for name in ("home", "file", "link"):
            self.refused("not overwritten", tmp_path / name, source, 0, True)

    def test_too_little_room_is_told_before_the_start(self, tmp_path, source, monkeypatch):
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**10, 0, 2 * 10**9))
        check_destination(tmp_path / "out", source, 2 * 10**9, False)
        message = r"needs 3\.00 GB and the disk has 2\.00 GB free"
        self.refused(message, tmp_path / "out", source, 3 * 10**9, False, error=RefusedError)
