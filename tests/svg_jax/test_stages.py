"""The stopwatch of a run's stages."""

import jax
import jax.numpy as jnp
import pytest

from svg_jax import stages
from svg_jax.stages import stage, stopwatch


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when a test says so."""
    now = [0.0]
    monkeypatch.setattr(stages.time, "perf_counter", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


@stage("writing")
def write(clock):
    clock(4)
    raise FloatingPointError


def test_a_stage_does_not_count_those_inside_it(clock):
    @stage("loading", "loading T5")
    def load():
        clock(5)

    shown = []
    with stopwatch() as watch:
        watch.show = shown.append
        clock(1)
        with stage("encoding"):
            clock(2)
            load()
            clock(3)
        with pytest.raises(FloatingPointError):
            write(clock)
        load()
        clock(7)
        assert watch.total == 27
    assert watch.seconds == {"loading": 10, "encoding": 5, "writing": 4}
    assert shown == ["encoding", "loading T5", "encoding", "", "writing", "", "loading T5", ""]
    assert watch.peak_bytes == {} or jax.default_backend() != "cpu"


def test_compilation_is_a_stage_of_its_own():
    with stopwatch() as watch, stage("decoding"):
        jax.jit(lambda x: jnp.sin(x) * 3)(jnp.ones(7)).block_until_ready()
    assert watch.seconds["compiling"] > 0
    assert watch.seconds["decoding"] >= 0
    before = dict(watch.seconds)
    jax.jit(lambda x: jnp.cos(x) * 5)(jnp.ones(7)).block_until_ready()
    with stage("decoding"):  # no stopwatch is running
        pass
    assert watch.seconds == before


def test_memory_is_what_the_device_tells(monkeypatch):
    peaks = iter([5, 9])
    monkeypatch.setattr(stages, "_peak_bytes", lambda: next(peaks))
    with stopwatch() as watch:
        for name in ("encoding", "decoding"):
            with stage(name):
                pass
    assert watch.peak_bytes == {"encoding": 5, "decoding": 9}
