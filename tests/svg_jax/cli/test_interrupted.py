"""Runs that are stopped, and what goes on from where they were."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time

import jax
import pytest
from tiny_checkpoint import PROMPT, QUICK, is_one_sentence

from svg_jax.cli import given
from svg_jax.sampling import CogVideoXPipeline


def test_ctrl_c_ends_with_130_and_leaves_what_the_run_goes_on_from(run, model, tmp_path):
    # A shell starts what runs in its background with Ctrl-C ignored, these tests too.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from svg_jax.cli import main; main()"
    command = ["generate", "--model", model, *PROMPT, "--steps", "1000", "-o", "a.mp4"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, command)], cwd=tmp_path, stderr=subprocess.PIPE
    )
    state = tmp_path / ".a.mp4.state"
    while process.poll() is None and not state.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == b"svg-jax: a.mp4: its state is saved; --resume continues from there\n"
    assert [path.name for path in tmp_path.iterdir()] == [state.name]

    before = state.read_bytes()
    refused = [
        ([], "holds a run that was not finished: continue with --resume, or delete"),
        (["--resume", "--seed", "4"], "the saved one had seed 0, this one 4"),
    ]
    for arguments, sentence in refused:
        result = run(*command, *arguments)
        assert (result.code, is_one_sentence(result.err)) == (2, True)
        assert sentence in result.err
    assert state.read_bytes() == before


def test_ctrl_c_before_the_first_step_leaves_nothing(run, model, monkeypatch, tmp_path):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(
        CogVideoXPipeline, "prepare", functools.wraps(CogVideoXPipeline.prepare)(interrupt)
    )
    monkeypatch.setattr(os, "_exit", sys.exit)
    result = run("generate", "--model", model, *PROMPT, "-o", "a.mp4")
    assert (result.code, result.err) == (130, "")
    assert list(tmp_path.iterdir()) == []


def test_resume_starts_where_there_is_nothing_to_resume(run, model, tmp_path):
    result = run("generate", "--model", model, *PROMPT, *QUICK, "-o", "a.npz", "--resume")
    assert (result.code, result.err) == (0, "")
    assert "no run of a.npz was saved: it starts at the first step" in result.out
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.parametrize(
    ("backend", "named", "kept"),
    [("gpu", None, "cache/xla"), ("gpu", "own", "own"), ("cpu", None, None)],
)
def test_a_gpu_s_programs_are_kept_for_runs_that_are_resumed(
    monkeypatch, tmp_path, backend, named, kept
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setenv("SVG_JAX_CACHE", str(tmp_path / "cache"))
    with (
        _config("jax_compilation_cache_dir", named and str(tmp_path / named)),
        _config("jax_persistent_cache_min_compile_time_secs", 1.0),
    ):
        given.keep_programs()
        assert jax.config.values["jax_compilation_cache_dir"] == (kept and str(tmp_path / kept))


@contextlib.contextmanager
def _config(name, value):
    before = jax.config.values[name]
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)
