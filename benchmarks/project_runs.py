"""Project the minutes and the memory of whole runs on one H100 from measured stages.

    python benchmarks/project_runs.py

Nothing is measured here. A run is put together from benchmarks/results: its steps are forwards of
forward.json (two in a guided step), with the time that compiling both kinds takes; prompts and
frames are first calls of pipeline.json, which compile, too. Reading weights from the disk is left
out. The memory is that of the stage that needs most. A stage at another size than the run's is an
upper bound. The disk holds the folder that `svg-jax convert --dtype bfloat16` writes, with a VAE in
float32; parameters are counted in inventories/.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svg_jax import PAPER_PRESETS
from svg_jax.config import dense_step_count

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Run:
    """A run and the measured stages that it consists of.

    Attributes:
        forward: Name of the transformer's row in forward.json.
        stages: Names of rows of pipeline.json: encoders, one step, and decoding.
        preset: Name of its sparsity in PAPER_PRESETS.
        parts: Names of its parts in inventories/, the VAE last.
        guided: Whether a step takes two forwards.
        steps: Number of denoising steps.
    """

    forward: str
    stages: tuple[str, ...]
    preset: str
    parts: tuple[str, ...]
    guided: bool
    steps: int = 50


RUNS = {
    "CogVideoX 1.5, 768 × 1360, 81 frames": Run(
        forward="CogVideoX-1.5 768x1360, 81 frames",
        stages=(
            "encode: CogVideoX, T5 XXL",
            "step: CogVideoX-1.5 768 x 1360 x 81",
            "decode: CogVideoX-1.5 768 x 1360 x 81, bfloat16, tiles",
        ),
        preset="cogvideox1.5-i2v",
        parts=("cogvideox-1.5-5b-transformer", "t5-v1_1-xxl-encoder", "cogvideox1.5-5b-vae"),
        guided=True,
    ),
    "HunyuanVideo, 720p, 129 frames": Run(
        forward="HunyuanVideo 720p, 129 frames",
        stages=(
            "encode: HunyuanVideo, LLaMA 3",
            "encode: HunyuanVideo, CLIP",
            "step: HunyuanVideo 720p x 129",
            "decode: HunyuanVideo 720p x 129, bfloat16, tiles",
        ),
        preset="hunyuanvideo-720p",
        parts=(
            "hunyuanvideo-t2v-transformer",
            "llama3-8b-encoder",
            "clip-l-text",
            "hunyuanvideo-vae",
        ),
        guided=False,
    ),
    "Wan 2.1 1.3B, 480p, 81 frames": Run(
        forward="Wan 1.3B 480p, 81 frames",
        stages=(
            "encode: Wan, UMT5 XXL",
            "step: Wan 1.3B 480p x 81",
            "decode: Wan 720p x 81, float32",  # larger than 480p
        ),
        preset="wan-t2v-720p",
        parts=("wan2.1-t2v-1.3b-transformer", "umt5-xxl-encoder", "wan2.1-vae"),
        guided=True,
    ),
    "Wan 2.1 14B, 720p, 81 frames": Run(
        forward="Wan 14B 720p, 81 frames",
        stages=(
            "encode: Wan, UMT5 XXL",
            "step: Wan 14B 720p x 81",
            "decode: Wan 720p x 81, float32",
        ),
        preset="wan-t2v-720p",
        parts=("wan2.1-t2v-14b-transformer", "umt5-xxl-encoder", "wan2.1-vae"),
        guided=True,
    ),
}


def read(file: str) -> dict[str, Any]:
    """Read a JSON file of this repository."""
    return json.loads((ROOT / file).read_text())


def projected(run: Run) -> dict[str, float]:
    """Project a run.

    Returns:
        Minutes with sparse and with dense attention, GiB of the device, and GB of the disk.
    """
    forward = read("benchmarks/results/forward.json")["forward"][run.forward]["rows"]
    stages = read("benchmarks/results/pipeline.json")["pipeline"]
    forwards = 2 if run.guided else 1
    once = sum(stages[name].get("s, first call", 0) for name in run.stages)

    def seconds(kind: str, steps: int) -> float:
        row = forward[kind]
        return row["compile, s"] + steps * forwards * row["ms"] / 1000 if steps else 0

    dense_steps = dense_step_count(PAPER_PRESETS[run.preset].warmup, run.steps)
    sparse = seconds("dense", dense_steps) + seconds("sparse", run.steps - dense_steps)
    *weights, vae = (read(f"inventories/{part}.json")["num_params"] for part in run.parts)
    return {
        "minutes": (once + sparse) / 60,
        "minutes, dense": (once + seconds("dense", run.steps)) / 60,
        "GiB": max(stages[name]["GiB, in use at most"] for name in run.stages),
        "GB on disk": (2 * sum(weights) + 4 * vae) / 1e9,
    }


def rounded(run: Run) -> list[int]:
    """Round a projection up: minutes, minutes with dense attention, GiB, GB on disk."""
    return [math.ceil(value) for value in projected(run).values()]


def table() -> str:
    """Put the projections into a table in Markdown."""
    lines = [
        "| run | minutes | dense | GiB of the GPU | GB on disk |",
        "|---|---|---|---|---|",
    ]
    for name, run in RUNS.items():
        lines.append(f"| {name} | {' | '.join(map(str, rounded(run)))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
