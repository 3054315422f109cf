"""A saved run that is damaged, made by hand, or no file at all, is one sentence."""

import hashlib
import io
import json
import os
import random
import zipfile
from typing import Any

import numpy as np
import pytest
from saved_runs import STATES, kill_after, pipeline_of, records_of

from svg_jax.sampling import run_state as checkpoint
from svg_jax.sampling.run_state import load_run, save_run, saved_fingerprint
from svg_jax.sampling.settings import FlowSettings

SETTINGS = FlowSettings(prompt="a cat")


def test_a_damaged_file_is_refused_wherever_the_damage_is(tmp_path):
    path = tmp_path / "state"
    save_run(path, STATES["flow"], records_of(2), {"seed": 3})
    whole = path.read_bytes()
    rng = random.Random(0)
    damaged = [whole[:length] for length in (0, 1, 63, 64, 65, len(whole) // 2, len(whole) - 1)]
    for _ in range(200):
        byte, bit = rng.randrange(len(whole)), rng.randrange(8)
        flipped = bytearray(whole)
        flipped[byte] ^= 1 << bit
        damaged.append(bytes(flipped))
    for content in (*damaged, b"not a state", whole + b"\0"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"state is damaged or no run's state: remove it"):
            load_run(path, {"seed": 3}, SETTINGS)


def signed(arrays):
    """A file with its right digest, of whatever somebody put into it."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    with zipfile.ZipFile(file, "a") as archive:
        archive.comment = bytes(64)
    body = file.getvalue()[:-64]
    return body + hashlib.sha256(body).hexdigest().encode()


def in_header(change):
    def harm(arrays):
        header = json.loads(str(arrays["header"]))
        change(header)
        return {"header": np.array(json.dumps(header))}

    return harm


FORGED: dict[str, Any] = {
    "no header": lambda a: {"header": None},
    "a header of a number": lambda a: {"header": np.array(3)},
    "a header of a list": lambda a: {"header": np.array("[]")},
    "a header that nests": lambda a: {"header": np.array("[" * 99_999)},
    "no version": in_header(lambda h: h.pop("format_version")),
    "a fingerprint of a number": in_header(lambda h: h.update(fingerprint=3)),
    "steps of a number": in_header(lambda h: h.update(steps=3)),
    "a step without a number": in_header(lambda h: h["steps"][1].pop("step")),
    "a step with something more": in_header(lambda h: h["steps"][1].update(more=1)),
    "a step twice": in_header(lambda h: h.update(steps=h["steps"] * 2)),
    "a step's profile that is not there": in_header(lambda h: h["steps"][0].update(profile=True)),
    "labels of numbers": lambda a: {"steps.1.labels": a["steps.1.labels"].astype(int)},
    "errors of other heads": lambda a: {"steps.1.errors": a["steps.1.errors"][..., :1, :]},
    "latents that are missing": lambda a: {"state.latents": None},
    "latents of another shape": lambda a: {"state.latents": a["state.latents"][:, :1]},
    "latents of another dtype": lambda a: {"state.latents": a["state.latents"].astype(float)},
    "latents of text": lambda a: {"state.latents": np.array("a")},
    "an array too much": lambda a: {"state.other": a["state.latents"]},
    "more steps than there are": in_header(
        lambda h: h.update(steps=[{**h["steps"][0], "step": step} for step in range(9)])
    ),
}


@pytest.mark.parametrize("forgery", FORGED)
def test_a_file_that_was_made_by_hand_is_refused(forgery, tmp_path):
    pipeline, arguments = pipeline_of("CogVideoX, DDIM, guided")
    path = tmp_path / "state"
    begun = pipeline.prepare(
        pipeline.settings(**{k: v for k, v in arguments.items() if k not in ("sparsity", "warmup")})
    ).state
    save_run(path, begun, records_of(2), pipeline.fingerprint(pipeline.settings(**arguments)))
    with np.load(path) as file:
        arrays = dict(file)
    arrays |= FORGED[forgery](arrays)
    path.write_bytes(signed({name: array for name, array in arrays.items() if array is not None}))
    with pytest.raises(ValueError, match=r"state is damaged or no run's state: remove it"):
        pipeline(**arguments, state_file=path, resume=True, callback_on_step_end=kill_after(2))


def test_what_is_too_large_or_a_pipe_is_not_read(tmp_path):
    path = tmp_path / "state"
    path.touch()
    os.truncate(path, 2**40)
    with pytest.raises(ValueError, match="is damaged or no run's state"):
        load_run(path, {}, SETTINGS)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="is no file but a device or a pipe"):
        saved_fingerprint(path)


def test_a_state_of_another_format_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT_VERSION", checkpoint.FORMAT_VERSION + 1)
        save_run(tmp_path / "state", STATES["DDIM"], (), {})
    with pytest.raises(ValueError, match="another version of svg-jax"):
        load_run(tmp_path / "state", {}, SETTINGS)
