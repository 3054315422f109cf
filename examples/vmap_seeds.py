"""Several seeds of the bundled model in one program: the whole sampler under jit and vmap.

    python examples/vmap_seeds.py

writes seed_0.gif, seed_1.gif, … into the working folder.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from svg_jax import SparsityConfig, save_video
from svg_jax.sampling import from_pretrained, sample

PROMPT = "a red seven moving right"
SEEDS = range(3)


def main() -> None:
    """Sample all seeds at once, and write a video of each."""
    pipe: Any = from_pretrained("tiny")
    settings = [
        pipe.settings(
            PROMPT, seed=seed, num_inference_steps=6, sparsity=SparsityConfig(density=0.5)
        )
        for seed in SEEDS
    ]
    runs = [pipe.prepare(each) for each in settings]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *runs)
    finish = jax.jit(jax.vmap(partial(sample, pipe.transformer.load())))
    finished = finish(stacked)
    for index, seed in enumerate(SEEDS):
        run = jax.tree.map(lambda leaf, at=index: leaf[at], finished)
        pixels = pipe.decode_latents(pipe.finished_latents(run))
        frames = np.clip(np.moveaxis(np.asarray(pixels[0]), 0, -1) / 2 + 0.5, 0, 1)
        save_video(frames, f"seed_{seed}.gif", fps=pipe.default_fps)


if __name__ == "__main__":
    main()
