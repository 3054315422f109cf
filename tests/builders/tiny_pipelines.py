"""What tests of whole pipelines share: both libraries' of one checkpoint, and pictures."""

from typing import Any

import numpy as np
import PIL.Image

from svg_jax.convert import convert_pipeline
from svg_jax.sampling import from_pretrained


def both_of_each(tmp_path_factory, write_checkpoint) -> Any:
    """A function that makes both pipelines of a variant and the converted folder, once.

    Args:
        tmp_path_factory: Of pytest.
        write_checkpoint: Writes a variant's checkpoint into a folder, and gives diffusers'
            pipeline of it.
    """
    made = {}

    def make(variant):
        if variant not in made:
            folder = tmp_path_factory.mktemp(variant)
            theirs = write_checkpoint(folder / "source", variant)
            convert_pipeline(folder / "source", folder / "out")
            ours: Any = from_pretrained(folder / "out", dtype="float32")
            made[variant] = theirs, ours, folder / "out"
        return made[variant]

    return make


def picture(seed=7, height=50, width=71, mode="RGB") -> PIL.Image.Image:
    """A picture without edges, which resizing would turn into noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    return PIL.Image.fromarray(coarse).resize((width, height)).convert(mode)
