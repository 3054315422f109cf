"""What tests of whole pipelines share: both libraries' of one checkpoint, and pictures."""

from typing import Any

import numpy as np
import PIL.Image
import torch
from parity import TOLERANCE, relative_error

from svg_jax.convert import convert_pipeline
from svg_jax.sampling import from_pretrained


def both_of_each(tmp_path_factory, write_checkpoint) -> Any:
    """A function that makes both pipelines of a variant and the converted folder, once.

    Args:
        tmp_path_factory: The fixture of pytest.
        write_checkpoint: Writes a variant's checkpoint into a folder, and gives diffusers'
            pipeline of it.
    """
    made = {}

    def make(variant):
        if variant not in made:
            folder = tmp_path_factory.mktemp(variant)
            theirs = write_checkpoint(folder / "source", variant)
            there = [file.parent.name for file in sorted((folder / "source").glob("*/config.json"))]
            convert_pipeline(folder / "source", folder / "out", components=there)
            ours: Any = from_pretrained(folder / "out", dtype="float32")
            made[variant] = theirs, ours, folder / "out"
        return made[variant]

    return make


def run_diffusers(pipe, latents, **arguments) -> tuple[np.ndarray, np.ndarray]:
    """Latents after the last step, and frames, of diffusers' pipeline."""
    pipe.set_progress_bar_config(disable=True)
    tensors = {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in arguments.items()
    }
    found = {}

    def keep(_pipe, _step, _timestep, values):
        found["latents"] = values["latents"].numpy()
        return values

    frames = pipe(
        **tensors,
        latents=torch.from_numpy(latents),
        output_type="np",
        callback_on_step_end=keep,
    ).frames
    return found["latents"], frames


def check_video(video, latents, frames) -> None:
    """Raise AssertionError unless a video is that of diffusers."""
    assert relative_error(video.latents, latents) <= TOLERANCE
    assert frames.std() > 0.05  # neither grey nor all clipped
    assert video.frames is not None
    assert video.frames.shape == frames.shape
    assert np.abs(video.frames - frames).max() <= 3e-5


def picture(seed=7, height=50, width=71, mode="RGB") -> PIL.Image.Image:
    """A picture without edges, which resizing would turn into noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    return PIL.Image.fromarray(coarse).resize((width, height)).convert(mode)
