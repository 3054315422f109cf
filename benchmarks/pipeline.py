"""The stages of whole pipelines at full size on a GPU, with random weights: encode, step, decode.

    python benchmarks/pipeline.py --rows decode step --json benchmarks/results/pipeline.json

Each row runs in a process of its own, so that its peak of memory is its own: weights, made on the
device, are part of it, and so is what making them takes. Rows that stand in the file are skipped;
`--again` measures them anew. A time is a median of calls behind the first, which is given apart,
for it compiles: that also tries algorithms, of which some take much memory. Run twice with
JAX_COMPILATION_CACHE_DIR set, rows are as in a process that finds its programs compiled. Decoding
counts until the frames are in the host's memory.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from forward import BYTES, INVENTORIES, random_weights
from measured import provenance_of
from timing import write_entry

from svg_jax import PAPER_PRESETS
from svg_jax.config import Preset, dense_step_count
from svg_jax.convert.tables.registry import MODEL_CLASSES
from svg_jax.models import (
    CLIPTextEncoder,
    CLIPVisionEncoder,
    CogVideoXTransformer,
    CogVideoXVAE,
    HunyuanVideoTransformer,
    HunyuanVideoVAE,
    LlamaEncoder,
    T5Encoder,
    WanTransformer,
    WanVAE,
)
from svg_jax.models.vae_tiling import Tiling
from svg_jax.sampling import (
    CogVideoXPipeline,
    HunyuanVideoPipeline,
    VideoPipeline,
    WanPipeline,
    denoise,
)
from svg_jax.sampling.components import run_encoder
from svg_jax.sampling.hunyuan_video.prompts import HunyuanVideoEncoders
from svg_jax.sampling.latents import to_frames
from svg_jax.sampling.run_state import open_run_file, saving
from svg_jax.sampling.schedules.config import SchedulerConfig
from svg_jax.sampling.settings import FlowSettings

Row = dict[str, Any]
BFLOAT16, FLOAT32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
STEPS = 50  # of the schedule; only those around the end of the dense warm-up run


def module_of(make: Callable[..., Any], inventory: str, class_name: str, dtype: Any) -> Any:
    """Make a released model with random weights on the device."""
    values = json.loads((INVENTORIES / f"{inventory}.json").read_text())["config"]
    config = MODEL_CLASSES[class_name].read_config(values)
    module = nnx.eval_shape(lambda: make(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0)))
    return nnx.merge(nnx.split(module)[0], random_weights(module))


def timed(function: Callable[[], Any], repeats: int = 3) -> Row:
    """Seconds of the first call, and of those behind it."""
    seconds = []
    for _ in range(1 + repeats):
        started = time.perf_counter()
        out = jax.block_until_ready(function())
        seconds.append(time.perf_counter() - started)
        finite = all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(out))
        del out
    return {
        "s": round(float(np.median(seconds[1:])), 4),
        "s, first call": round(seconds[0], 2),
        "s, all others": [round(each, 4) for each in seconds[1:]],
        "finite": finite,
    }


def encode_text(
    make: Callable[..., Any],
    inventory: str,
    class_name: str,
    tokens: int,
    *,
    masked: bool = False,
    **options: int,
) -> Row:
    """Time a prompt and a negative one through a text encoder, in bfloat16."""
    encoder = module_of(make, inventory, class_name, BFLOAT16)
    ids = jax.random.randint(jax.random.key(1), (2, tokens), 3, 1000)
    inputs = (ids, jnp.ones_like(ids)) if masked else (ids,)
    return {"input": list(ids.shape), **timed(lambda: run_encoder(encoder, *inputs, **options))}


def encode_image() -> Row:
    """Wan's image through CLIP, in float32 as its pipeline has it."""
    encoder = module_of(CLIPVisionEncoder, "clip-vit-h-vision", "CLIPVisionModel", FLOAT32)
    pixels = jax.random.normal(jax.random.key(1), (1, 3, 224, 224))
    row = timed(lambda: run_encoder(encoder, pixels, hidden_state=-2))
    return {"input": list(pixels.shape), **row}


def encode_video(
    make: Callable[..., Any], inventory: str, class_name: str, dtype: Any, shape: tuple[int, ...]
) -> Row:
    """Time the encoding of a video, or an image, as a whole to the mean of its latents."""
    vae = module_of(make, inventory, class_name, dtype)
    video = jax.random.uniform(jax.random.key(1), (1, 3, *shape), dtype, -1, 1)
    return {"input": list(video.shape), **timed(lambda: vae.encode(video).mean, repeats=2)}


def decode_video(
    make: Callable[..., Any],
    inventory: str,
    class_name: str,
    dtype: Any,
    shape: tuple[int, ...],
    *,
    tiled: bool,
) -> Row:
    """Latents to frames on the host, whole or by the released tiles."""
    vae = module_of(make, inventory, class_name, dtype)
    latents = jax.random.normal(jax.random.key(1), (1, 16, *shape), dtype)
    tiling = None
    if tiled:
        tiling = vae.config.tiling if isinstance(vae, CogVideoXVAE) else Tiling()
    row = timed(lambda: to_frames(vae.decode(latents, tiling=tiling)), repeats=2)
    return {"input": list(latents.shape), **row}


def wan(inventory: str) -> VideoPipeline:
    """Wan 2.1, text to video."""
    transformer = module_of(WanTransformer, inventory, "WanTransformer3DModel", BFLOAT16)
    return WanPipeline(
        transformer=transformer, scheduler=SchedulerConfig(sampler="unipc", shift=5.0)
    )


def hunyuan_video() -> VideoPipeline:
    """HunyuanVideo, text to video."""
    inventory, class_name = "hunyuanvideo-t2v-transformer", "HunyuanVideoTransformer3DModel"
    return HunyuanVideoPipeline(
        transformer=module_of(HunyuanVideoTransformer, inventory, class_name, BFLOAT16),
        scheduler=SchedulerConfig(sampler="euler", shift=7.0),
        encoders=HunyuanVideoEncoders(),
    )


def cogvideox() -> VideoPipeline:
    """CogVideoX-1.5, text to video."""
    inventory, class_name = "cogvideox-1.5-5b-transformer", "CogVideoXTransformer3DModel"
    return CogVideoXPipeline(
        transformer=module_of(CogVideoXTransformer, inventory, class_name, BFLOAT16),
        scheduler=SchedulerConfig(sampler="dpm", snr_shift_scale=1.0),
    )


def run_steps(
    make: Callable[[], VideoPipeline],
    preset: Preset,
    text: Mapping[str, tuple[int, ...]],
    *,
    traced: bool = False,
    **arguments: Any,
) -> Row:
    """Two dense steps and two sparse ones, those around the end of the warm-up, as a run has them.

    The first of each kind compiles; the second counts. Then, where a step is short, all four again,
    saved and traced.
    """
    pipeline = make()
    numbers = {
        name: jnp.ones(shape) if "mask" in name else jax.random.normal(jax.random.key(1), shape)
        for name, shape in text.items()
    }
    arguments |= {"sparsity": preset.sparsity, "warmup": preset.warmup}
    settings = pipeline.settings(num_inference_steps=STEPS, **numbers, **arguments)
    run = pipeline.prepare(settings)
    first = dense_step_count(preset.warmup, STEPS) - 2
    steps = partial(denoise, pipeline.transformer, run, steps=range(first, first + 4))
    after, records = steps()
    profile = records[-1].profile
    assert profile is not None
    return {
        "latents": list(run.state.latents.shape),
        "tokens": run.layout.num_tokens,
        "guided": records[0].guidance_scale != 1,
        "s, dense step": round(records[1].seconds, 3),
        "s, sparse step": round(records[3].seconds, 3),
        "s, first dense step": round(records[0].seconds, 1),
        "s, first sparse step": round(records[2].seconds, 1),
        "density": round(float(profile.density.mean()), 4),
        "finite": bool(jnp.isfinite(after.state.latents).all()),
        **(loop_overhead(steps) if traced else {}),
    }


def loop_overhead(steps: Callable[..., Any]) -> Row:
    """Tell from a profiler's trace what the host adds to four compiled steps that are saved."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = options.host_tracer_level = 0  # they slow the host down
    with tempfile.TemporaryDirectory() as folder:
        file = open_run_file(
            FlowSettings(prompt="a cat", state_file=Path(folder) / "state", save_every=1), {}
        )
        with saving(file) as save:
            steps(save=save)  # imports and threads of the first save
        with saving(file) as save, jax.profiler.trace(folder, profiler_options=options):
            started = time.perf_counter()
            steps(save=save)
            wall = time.perf_counter() - started
        (trace,) = Path(folder).glob("**/*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(trace))
    spans = sorted(
        (event.start_ns, event.start_ns + event.duration_ns)
        for plane in data.planes
        if "GPU" in plane.name
        for line in plane.lines
        if "Stream" in line.name
        for event in line.events
    )
    busy, until = 0.0, 0.0
    for start, end in spans:  # streams overlap
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return {
        "s, four saved steps": round(wall, 3),
        "s, of these on the device": round(1e-9 * busy, 3),
        "share that the host adds": round(1 - 1e-9 * busy / wall, 4),
    }


_T5 = partial(encode_text, T5Encoder)
_WAN_VAE = (WanVAE, "wan2.1-vae", "AutoencoderKLWan")
_COGVIDEOX_VAE = (CogVideoXVAE, "cogvideox1.5-5b-vae", "AutoencoderKLCogVideoX")
_HUNYUAN_VIDEO_VAE = (HunyuanVideoVAE, "hunyuanvideo-vae", "AutoencoderKLHunyuanVideo")
_LLAMA = (LlamaEncoder, "llama3-8b-encoder", "LlamaModel", 95 + 256)
_WAN_TEXT = {"prompt_embeds": (1, 512, 4096), "negative_prompt_embeds": (1, 512, 4096)}
_COGVIDEOX_TEXT = {"prompt_embeds": (1, 226, 4096), "negative_prompt_embeds": (1, 226, 4096)}
_HUNYUAN_VIDEO_TEXT = {
    "prompt_embeds": (1, 256, 4096),
    "pooled_prompt_embeds": (1, 768),
    "prompt_attention_mask": (1, 256),
}

ROWS: Mapping[str, Callable[[], Row]] = {
    "encode: CogVideoX, T5 XXL": partial(_T5, "t5-v1_1-xxl-encoder", "T5EncoderModel", 226),
    "encode: Wan, UMT5 XXL": partial(_T5, "umt5-xxl-encoder", "UMT5EncoderModel", 512, masked=True),
    "encode: HunyuanVideo, LLaMA 3": partial(encode_text, *_LLAMA, masked=True, hidden_state=-3),
    "encode: HunyuanVideo, CLIP": partial(
        encode_text, CLIPTextEncoder, "clip-l-text", "CLIPTextModel", 77
    ),
    "encode: Wan image, CLIP float32": encode_image,
    "encode: Wan image, VAE 720p x 81 float32": partial(
        encode_video, *_WAN_VAE, FLOAT32, (81, 720, 1280)
    ),
    "encode: CogVideoX-1.5 image, VAE 768 x 1360 bfloat16": partial(
        encode_video, *_COGVIDEOX_VAE, BFLOAT16, (1, 768, 1360)
    ),
    "decode: HunyuanVideo 720p x 129, bfloat16, tiles": partial(
        decode_video, *_HUNYUAN_VIDEO_VAE, BFLOAT16, (33, 90, 160), tiled=True
    ),
    "decode: Wan 720p x 81, bfloat16": partial(
        decode_video, *_WAN_VAE, BFLOAT16, (21, 90, 160), tiled=False
    ),
    "decode: Wan 720p x 81, float32": partial(
        decode_video, *_WAN_VAE, FLOAT32, (21, 90, 160), tiled=False
    ),
    "decode: Wan 720p x 81, float32, tiles": partial(
        decode_video, *_WAN_VAE, FLOAT32, (21, 90, 160), tiled=True
    ),
    "decode: CogVideoX-1.5 768 x 1360 x 81, bfloat16": partial(
        decode_video, *_COGVIDEOX_VAE, BFLOAT16, (21, 96, 170), tiled=False
    ),
    "decode: CogVideoX-1.5 768 x 1360 x 81, bfloat16, tiles": partial(
        decode_video, *_COGVIDEOX_VAE, BFLOAT16, (21, 96, 170), tiled=True
    ),
    "step: Wan 1.3B 480p x 81": partial(
        run_steps,
        partial(wan, "wan2.1-t2v-1.3b-transformer"),
        PAPER_PRESETS["wan-i2v-480p"],
        _WAN_TEXT,
        traced=True,
        height=480,
        width=832,
    ),
    "step: CogVideoX-1.5 768 x 1360 x 81": partial(
        run_steps, cogvideox, PAPER_PRESETS["cogvideox1.5-i2v"], _COGVIDEOX_TEXT, traced=True
    ),
    "step: Wan 14B 720p x 81": partial(
        run_steps,
        partial(wan, "wan2.1-t2v-14b-transformer"),
        PAPER_PRESETS["wan-t2v-720p"],
        _WAN_TEXT,
    ),
    "step: HunyuanVideo 720p x 129": partial(
        run_steps, hunyuan_video, PAPER_PRESETS["hunyuanvideo-720p"], _HUNYUAN_VIDEO_TEXT
    ),
}


def measure(name: str) -> Row:
    """Measure a row in a process that has measured no other."""
    row = ROWS[name]()
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    return {**row, "GiB, in use at most": round(peak / BYTES, 2)}


def main() -> int:
    """Parse the command line and measure; 1 if a row failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="+", default=[""], help="parts of names of rows to measure")
    parser.add_argument("--json", type=Path, help="file to put the rows into")
    parser.add_argument("--again", action="store_true", help="measure what the file has, too")
    parser.add_argument("--in-this-process", metavar="ROW", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if name := args.in_this_process:
        row = {"measured": provenance_of("benchmarks/pipeline.py"), **measure(name)}
        kept = "JAX_COMPILATION_CACHE_DIR=… " if "JAX_COMPILATION_CACHE_DIR" in os.environ else ""
        row["measured"]["command"] = f"{kept}python benchmarks/pipeline.py --rows {name!r}"
        write_entry(args.json, "pipeline", name, row)
        print(f"{name}\n{json.dumps(row, indent=1)}", flush=True)
        return 0
    names = [n for n in ROWS if any(part.lower() in n.lower() for part in args.rows)]
    if not names:
        parser.error(f"no row has {args.rows!r} in its name; there are {', '.join(ROWS)}")
    if args.json and args.json.exists() and not args.again:
        there = json.loads(args.json.read_text()).get("pipeline", {})
        names = [name for name in names if name not in there]
    failed = []
    for name in names:
        into = ["--json", str(args.json)] if args.json else []
        command = [sys.executable, __file__, "--in-this-process", name, *into]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
