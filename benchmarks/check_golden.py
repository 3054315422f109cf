"""Checks a checkpoint's conversion, sampling and SVG against goldens made with diffusers.

    python benchmarks/check_golden.py FOLDER

FOLDER is a pipeline folder in diffusers' layout with a `golden.npz`: prompts, their input_ids and
prompt_embeds, initial noise, the video that diffusers' own classes make of it (DDIM, no guidance,
dense), and the same run with SVG, with the errors that its labels come from. Runs on the CPU in
float32, some minutes; prints every figure, and exits with 1 if one is over its limit.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import numpy as np

from svg_jax import SparsityConfig, Warmup, from_pretrained
from svg_jax.convert import convert_pipeline
from svg_jax.media.metrics import psnr
from svg_jax.sampling import CogVideoXPipeline


def main() -> int:
    """Run all checks."""
    parser = argparse.ArgumentParser(description="Checks a checkpoint against its goldens.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    with np.load(folder / "golden.npz") as file:
        golden = dict(file)
    prompts = [str(prompt) for prompt in golden["prompts"]]
    num_steps, dense_steps = len(golden["timesteps"]), int(golden["svg_dense_steps"])
    sparsity = SparsityConfig(density=float(golden["svg_density"]))
    warmup = Warmup(steps=dense_steps / num_steps)
    labels = golden["svg_errors"][..., 1] < golden["svg_errors"][..., 0]

    failures = []

    def check(name: str, value: float, limit: float) -> None:
        failures.extend([name] if not value <= limit else [])
        verdict = "ok" if value <= limit else "TOO MUCH"
        print(f"{name:58} {value:10.3g}  limit {limit:g}  {verdict}", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        convert_pipeline(folder, Path(scratch) / "converted")
        pipeline = from_pretrained(Path(scratch) / "converted", dtype="float32")
        assert isinstance(pipeline, CogVideoXPipeline)
        assert pipeline.tokenizer is not None
        input_ids = pipeline.tokenizer(prompts, golden["input_ids"].shape[1])
        check("input_ids that differ", int((input_ids != golden["input_ids"]).sum()), 0)
        embeds = np.asarray(pipeline.encode_prompts(prompts))
        check("max |T5 features - theirs|", np.abs(embeds - golden["prompt_embeds"]).max(), 1e-5)

        def sample(**arguments) -> np.ndarray:
            started = time.perf_counter()
            video = pipeline(
                latents=golden["noise"],
                num_inference_steps=num_steps,
                guidance_scale=1,
                **arguments,
            )
            print(f"  {num_steps} steps, {time.perf_counter() - started:.0f} s", flush=True)
            timesteps = [step.timestep for step in video.info.steps]
            check("timesteps that differ", int((timesteps != golden["timesteps"]).sum()), 0)
            return video.latents

        dense = sample(prompt_embeds=golden["prompt_embeds"])
        check("dense: max |video - theirs|", np.abs(dense - golden["video"]).max(), 1e-3)
        dense = sample(prompt=prompts)
        check("dense, from the prompts", np.abs(dense - golden["video"]).max(), 1e-3)

        given = {"prompt_embeds": golden["prompt_embeds"], "sparsity": sparsity, "warmup": warmup}
        sparse = sample(labels=labels, **given)
        check("SVG, the golden's labels", np.abs(sparse - golden["svg_video"]).max(), 1e-2)
        for theirs, ours, reference in zip(
            golden["svg_video"], sparse, golden["video"], strict=True
        ):
            print(f"  PSNR to dense: theirs {psnr(theirs, reference):.2f} dB", end=", ")
            print(f"ours {psnr(ours, reference):.2f} dB")
    if failures:
        print(f"{len(failures)} of the figures are over their limits", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
