"""How good the bundled tiny model is, and how close Sparse VideoGen stays to its dense videos.

    python benchmarks/tiny_quality.py --output benchmarks/results/tiny_quality.json \
        --sheet docs/images/tiny_model.jpg

1. A judge is trained on real videos (examples/tiny_judge.py) and tried on held-out ones.
2. 128 captions, of a seed fixed before the model was trained: does each video, dense and SVG, show
   the digit, colour, motion and place that its caption names?
3. 16 captions x 2 seeds: PSNR and SSIM of SVG, of all heads spatial, of all heads temporal and of
   random labels against the dense video of the same noise. All share the dense warm-up.

Everything runs at the demo's defaults, in float32. A few minutes on a GPU; not for a CPU.
"""

import argparse
import dataclasses
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from measured import provenance_of
from PIL import Image, ImageDraw
from safetensors.numpy import load_file

from svg_jax.config import SparsityConfig, Warmup, dense_step_count
from svg_jax.convert.scheduler_config import COGVIDEOX
from svg_jax.convert.tables import cogvideox, t5
from svg_jax.convert.tables.rules import convert_state
from svg_jax.media.metrics import psnr, ssim
from svg_jax.models.cogvideox import CogVideoXConfig, CogVideoXTransformer
from svg_jax.models.t5 import T5Config, T5Encoder
from svg_jax.sampling.cogvideox.pipeline import CogVideoXPipeline
from svg_jax.sampling.prepared_run import PreparedRun
from svg_jax.sampling.records import SamplingInfo
from svg_jax.sampling.schedules.config import SchedulerConfig
from svg_jax.text.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "examples"))
from tiny_data import (  # noqa: E402
    NUM_ANSWERS,
    balanced_attributes,
    caption,
    draw_attributes,
    load_assets,
    make_videos,
)
from tiny_judge import Judge, judge_videos, train_judge  # noqa: E402

NUM_STEPS = 20
SPARSITY = SparsityConfig(density=0.25)
WARMUP = Warmup(steps=0.3)
GUIDANCE_SCALE, GUIDANCE_STEPS = 4.0, 0.3
CAPTION_SEED, FIDELITY_SEED = 128, 16  # fixed before training
ALTERNATIVES = ("svg", "spatial only", "temporal only", "random labels")

Videos = dict[str, np.ndarray]  # by method, float32 [videos, frames, 3, height, width] in -1..1


def load_pipeline(folder: Path) -> CogVideoXPipeline:
    """Convert a small pipeline in diffusers' layout in memory, its weights float32."""

    def component(name: str, stem: str, config: Any, rules: Any, module: Any) -> Any:
        config = config.from_dict(json.loads((folder / name / "config.json").read_text()))
        tensors = load_file(folder / name / f"{stem}.safetensors")
        wide = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
        graph, state = nnx.split(nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0))))
        tree = convert_state(wide, rules(config))
        nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, tree))
        return nnx.merge(graph, state)

    stem, scheduler = "diffusion_pytorch_model", folder / "scheduler/scheduler_config.json"
    return CogVideoXPipeline(
        transformer=component(
            "transformer", stem, CogVideoXConfig, cogvideox.rules, CogVideoXTransformer
        ),
        scheduler=SchedulerConfig.from_dict(json.loads(scheduler.read_text()), COGVIDEOX),
        text_encoder=component("text_encoder", "model", T5Config, t5.rules, T5Encoder),
        tokenizer=load_tokenizer(folder / "tokenizer"),
        has_vae=False,
    )


def sample(
    pipe: CogVideoXPipeline, prompts: list[str], methods: tuple[str, ...], seed: int
) -> tuple[Videos, SamplingInfo | None]:
    """Videos of the same noise by several methods, whose dense warm-up is computed once.

    Returns:
        The videos of each method, and what SVG's profiling found if it is among them.
    """
    run = pipe.prepare(
        pipe.settings(
            prompts,
            num_inference_steps=NUM_STEPS,
            guidance_scale=GUIDANCE_SCALE,
            guidance_interval=(0, GUIDANCE_STEPS),
            seed=seed,
            sparsity=SPARSITY,
            warmup=WARMUP,
        )
    )
    warm_up = dense_step_count(WARMUP, NUM_STEPS)
    run, _ = pipe.denoise(run, steps=range(warm_up))
    shape = (NUM_STEPS, pipe.transformer.config.num_layers, len(prompts))
    heads = pipe.transformer.config.num_attention_heads
    coins = np.random.default_rng(seed).random((*shape, heads)) < 0.5
    labels = {
        "spatial only": np.zeros((*shape, heads), bool),
        "temporal only": np.ones((*shape, heads), bool),
        "random labels": coins,
    }
    videos: Videos = {}
    info = None
    for method in methods:
        sparse = dataclasses.replace(run, labels=labels.get(method))
        start = run.dense() if method == "dense" else sparse
        end, steps = pipe.denoise(start, steps=range(warm_up, NUM_STEPS))
        videos[method] = _pixels(pipe, end)
        if method == "svg":
            info = SamplingInfo(steps)
    return videos, info


def _pixels(pipe: CogVideoXPipeline, run: PreparedRun) -> np.ndarray:
    latents = pipe.decode(run, SamplingInfo(()), output_type="latent").latents
    return np.clip(np.asarray(latents), -1, 1)


def judge_report(judge: Judge, number: int, batch: int) -> dict[str, Any]:
    """Accuracies of the judge on held-out real videos, with their captions and with others'."""
    make = jax.jit(make_videos)
    pixels, attributes = [], []
    for rng in jax.random.split(jax.random.key(20_000), number // batch):
        drawn = draw_attributes(jax.random.fold_in(rng, 0), batch)
        pixels.append(np.asarray(make(jax.random.fold_in(rng, 1), load_assets(), drawn).pixels))
        attributes.append(np.asarray(drawn))
    pixels, attributes = np.concatenate(pixels), np.concatenate(attributes)
    shuffled = np.random.default_rng(0).permutation(attributes)
    return {
        "videos": len(pixels),
        "real": judge_videos(judge, pixels, attributes).as_dict(),
        "shuffled captions": judge_videos(judge, pixels, shuffled).as_dict(),
        "chance": [1 / number for number in NUM_ANSWERS],
    }


def obedience_report(
    pipe: CogVideoXPipeline, judge: Judge, number: int, batch: int
) -> dict[str, Any]:
    """Share of generated videos that show what their captions say, dense and SVG."""
    attributes = balanced_attributes(CAPTION_SEED, number)
    parts = []
    for start in range(0, number, batch):
        prompts = [caption(row) for row in attributes[start : start + batch]]
        parts.append(sample(pipe, prompts, ("dense", "svg"), seed=1000 + start)[0])
    report: dict[str, Any] = {"captions": number, "seed": CAPTION_SEED}
    for method in ("dense", "svg"):
        videos = np.concatenate([part[method] for part in parts])
        report[method] = judge_videos(judge, videos, attributes).as_dict()
    return report


def fidelity_report(
    pipe: CogVideoXPipeline, number: int, seeds: int
) -> tuple[dict[str, Any], list[str], Videos]:
    """PSNR and SSIM against dense, and the prompts and videos of the first seed."""
    prompts = [caption(row) for row in balanced_attributes(FIDELITY_SEED, number)]
    runs = [sample(pipe, prompts, ("dense", *ALTERNATIVES), seed=seed) for seed in range(seeds)]
    report: dict[str, Any] = {"captions": number, "seeds": seeds, "prompts": prompts}
    decibels = {}
    for method in ALTERNATIVES:
        pairs = [
            (_channels_last(video), _channels_last(reference))
            for videos, _ in runs
            for video, reference in zip(videos[method], videos["dense"], strict=True)
        ]
        decibels[method] = np.array([psnr(*pair) for pair in pairs])
        report[method] = {
            "psnr": _mean_and_error(decibels[method]),
            "ssim": _mean_and_error(np.array([ssim(*pair) for pair in pairs])),
            "psnr of each video": decibels[method].round(2).tolist(),
        }
    for method in ALTERNATIVES[1:]:
        report[method]["svg is better by"] = _mean_and_error(decibels["svg"] - decibels[method])
    infos = [info for _, info in runs if info is not None]
    report["density computed"] = float(np.mean([info.density for info in infos]))
    spatial = np.mean([info.spatial_share for info in infos], axis=0)  # pyright: ignore
    report["spatial share of each layer"] = spatial.round(3).tolist()
    report["heads"] = head_report(infos)
    return report, prompts, runs[0][0]


def head_report(infos: list[SamplingInfo]) -> dict[str, float]:
    """How specialised the heads are, over all sparse steps and videos."""
    labels = np.stack([[profile.labels for profile in info.profiles] for info in infos])
    errors = np.stack([[profile.errors for profile in info.profiles] for info in infos])
    share = labels.mean(axis=(0, 1, 3))  # [layers, heads]
    worse, better = errors.max(axis=-1), errors.min(axis=-1)
    return {
        "temporal share": float(labels.mean()),
        "always spatial": int((share < 0.01).sum()),
        "always temporal": int((share > 0.99).sum()),
        "worse error over twice the better": float((worse > 2 * better).mean()),
        "labels that stay from step to step": float((labels[:, 1:] == labels[:, :-1]).mean()),
    }


def _channels_last(video: np.ndarray) -> np.ndarray:
    return np.moveaxis(video, 1, -1)


def _mean_and_error(values: np.ndarray) -> dict[str, float]:
    error = values.std(ddof=1) / np.sqrt(len(values))
    return {"mean": round(float(values.mean()), 4), "standard error": round(float(error), 4)}


def contact_sheet(prompts: list[str], videos: Videos, number: int, enlarge: int = 2) -> Image.Image:
    """Every second frame of the first videos: the methods of each one above the other."""
    methods = [method for method in videos if method != "random labels"]
    frames, _, height, width = videos["dense"].shape[1:]
    shown, gap, title = range(0, frames, 2), 2, 13
    row = height * enlarge + title
    column = width * enlarge + gap
    sheet = Image.new("RGB", (len(shown) * column - gap, number * len(methods) * row))
    draw = ImageDraw.Draw(sheet)
    for line, (video, method) in enumerate((v, m) for v in range(number) for m in methods):
        draw.text((2, line * row), f"{method}: {prompts[video]}", fill=(255, 235, 90))
        for place, frame in enumerate(shown):
            pixels = np.moveaxis(videos[method][video, frame], 0, -1)
            picture = Image.fromarray(((pixels + 1) * 127.5).round().astype(np.uint8))
            large = picture.resize((width * enlarge, height * enlarge), Image.Resampling.NEAREST)
            sheet.paste(large, (place * column, line * row + title))
    return sheet


def main() -> None:
    """Parse the command line, evaluate, and write the report and the sheet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "svg_jax/assets/tiny_cogvideox")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--sheet", type=Path, required=True)
    parser.add_argument("--captions", type=int, default=128)
    parser.add_argument("--fidelity-captions", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--judge-seconds", type=float, default=30.0)
    args = parser.parse_args()
    started = time.perf_counter()
    args.output.parent.mkdir(parents=True, exist_ok=True)

    def say(what: str, value: Any) -> None:
        print(f"{time.perf_counter() - started:6.1f} s  {what}: {json.dumps(value)}", flush=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n")

    report: dict[str, Any] = {
        "what": "quality of the bundled tiny model",
        **provenance_of("benchmarks/tiny_quality.py"),
        "settings": {
            "steps": NUM_STEPS,
            "guidance_scale": GUIDANCE_SCALE,
            "guidance_interval": (0, GUIDANCE_STEPS),
            "sparsity": dataclasses.asdict(SPARSITY),
            "warmup": dataclasses.asdict(WARMUP),
            "dtype": "float32",
        },
    }
    assets = load_assets()
    with ThreadPoolExecutor(1) as beside:  # most of a short run is compiling
        rng = jax.random.key(10_000)
        training = beside.submit(train_judge, rng, assets, seconds=args.judge_seconds)
        pipe = load_pipeline(args.model)
        with jax.default_matmul_precision("highest"):
            fidelity, prompts, videos = fidelity_report(pipe, args.fidelity_captions, args.seeds)
        report["fidelity to dense"] = fidelity
        say("fidelity to dense", {m: fidelity[m]["psnr"] for m in ALTERNATIVES} | fidelity["heads"])
        args.sheet.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(prompts, videos, number=min(3, len(prompts))).save(args.sheet, quality=88)
        judge, steps = training.result()
    with jax.default_matmul_precision("highest"):
        report["obedience"] = obedience_report(pipe, judge, args.captions, args.batch)
    say("obedience", report["obedience"])
    report["judge"] = {"training steps": steps, **judge_report(judge, 1024, 64)}
    say("judge", report["judge"])


if __name__ == "__main__":
    main()
