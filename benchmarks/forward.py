"""One forward of each full-size transformer, dense and sparse, with random weights in bfloat16.

    python benchmarks/forward.py --cases "Wan 1.3B" --json benchmarks/results/forward.json

Milliseconds, seconds to compile, bytes in use at most, the share of self-attention, and whatever
float32 array as large as the hidden states the compiled program keeps. One entry a case; what other
runs have left in the file stays there.
"""

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from measured import provenance_of
from timing import interleaved_seconds, time_row, write_entry

from svg_jax import PAPER_PRESETS, VideoLayout
from svg_jax.attention import StepState, attend_dense, attend_sparse
from svg_jax.config import Preset
from svg_jax.models import (
    CogVideoXConfig,
    CogVideoXTransformer,
    HunyuanVideoConfig,
    HunyuanVideoTransformer,
    WanConfig,
    WanTransformer,
)

INVENTORIES = Path(__file__).parents[1] / "inventories"
BYTES = 2**30


@dataclass(frozen=True)
class Case:
    """A model at the size that it is released for.

    Attributes:
        inventory: Whose config it has.
        make: The module of a config.
        config: Reads a config.
        latents: Shape of its input.
        text: Text tokens.
        preset: Sparsity and warm-up of the paper.
        layers: Layers that attend.
        more: Further inputs, by name: their shapes.
        real_text: Text tokens that are no padding, where that is data.
    """

    inventory: str
    make: Callable[..., Any]
    config: Callable[..., Any]
    latents: tuple[int, ...]
    text: tuple[int, int]
    preset: Preset
    layers: int
    more: tuple[tuple[str, tuple[int, ...]], ...] = ()
    real_text: int | None = None


CASES = {
    "Wan 1.3B 480p, 81 frames": Case(
        "wan2.1-t2v-1.3b-transformer",
        WanTransformer,
        WanConfig.from_dict,
        (1, 16, 21, 60, 104),
        (512, 4096),
        PAPER_PRESETS["wan-i2v-480p"],
        30,
    ),
    "CogVideoX-1.5 768x1360, 81 frames": Case(
        "cogvideox-1.5-5b-transformer",
        CogVideoXTransformer,
        CogVideoXConfig.from_dict,
        (1, 22, 16, 96, 170),
        (226, 4096),
        PAPER_PRESETS["cogvideox1.5-i2v"],
        42,
    ),
    "Wan 14B 720p, 81 frames": Case(
        "wan2.1-t2v-14b-transformer",
        WanTransformer,
        WanConfig.from_dict,
        (1, 16, 21, 90, 160),
        (512, 4096),
        PAPER_PRESETS["wan-t2v-720p"],
        40,
    ),
    "HunyuanVideo 720p, 129 frames": Case(
        "hunyuanvideo-t2v-transformer",
        HunyuanVideoTransformer,
        HunyuanVideoConfig.from_dict,
        (1, 16, 33, 90, 160),
        (256, 4096),
        PAPER_PRESETS["hunyuanvideo-720p"],
        60,
        more=(("pooled_projections", (1, 768)), ("guidance", (1,))),
        real_text=100,
    ),
}


def random_weights(module: Any) -> Any:
    """Make a state of small random numbers on the device, leaf by leaf; gains are near 1."""
    leaves, tree = jax.tree.flatten_with_path(nnx.state(module))

    @partial(jax.jit, static_argnums=(1, 2, 3))
    def draw(number, shape, dtype, gain):
        noise = jax.random.normal(jax.random.key(number), shape, jnp.bfloat16)
        return (0.02 * noise + gain).astype(dtype)

    return jax.tree.unflatten(
        tree,
        [
            draw(number, leaf.shape, leaf.dtype, float("scale'" in jax.tree_util.keystr(path)))
            for number, (path, leaf) in enumerate(leaves)
        ],
    )


def large_float32(program: str, elements: int) -> list[str]:
    """Shapes of float32 arrays of so many elements or more that a compiled program stores.

    What a fusion computes on its way is in registers and does not count.
    """
    found, inside_fusion = set(), False
    for line in program.splitlines():
        if line.endswith("{"):
            inside_fusion = "fused_" in line or "fusion" in line.split("(")[0]
        elif not inside_fusion:
            result = line.split("=", 1)[-1].split("(", 1)[0]
            for dims in re.findall(r"f32\[([\d,]+)\]", result):
                if math.prod(int(size) for size in dims.split(",")) >= elements:
                    found.add(f"f32[{dims}]")
    return sorted(found)


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Compile, time and weigh a dense and a sparse forward."""
    config = case.config(json.loads((INVENTORIES / f"{case.inventory}.json").read_text())["config"])
    module = nnx.eval_shape(
        lambda: case.make(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    )
    graph, _ = nnx.split(module)
    weights = random_weights(module)
    weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    latents = jax.random.normal(jax.random.key(1), case.latents, jnp.bfloat16)
    text = jax.random.normal(jax.random.key(2), (1, *case.text), jnp.bfloat16)
    inputs: dict[str, Any] = {name: jnp.full(shape, 1.0) for name, shape in case.more}
    if case.real_text is not None:
        inputs["text_length"] = jnp.array([case.real_text], jnp.int32)
    state = StepState(rng=jax.random.key(3))

    layouts: list[VideoLayout] = []
    shapes: list[tuple[int, ...]] = []

    def watched(query, key, value, *, layout, **rest):
        layouts.append(layout)
        shapes.append(query.shape)
        return attend_dense(query, key, value, layout=layout, **rest)

    def forward(attend, weights, latents, text, inputs, state):
        model = nnx.merge(graph, weights)
        out, info = model(
            latents, text, jnp.array([500.0]), attend=attend, step_state=state, **inputs
        )
        return out, None if info is None else info.density

    arguments = (weights, latents, text, inputs, state)
    entry: dict[str, Any] = {
        "measured": provenance_of("benchmarks/forward.py"),
        "GiB, weights": 0.0,
        "rows": {},
    }
    entry["GiB, weights"] = round(weight_bytes / BYTES, 2)
    functions = {}
    config, warmup = case.preset
    sparse = attend_sparse(config, case.layers, warmup=warmup)
    for name, attend in (("dense", watched), ("sparse", sparse)):
        started = time.perf_counter()
        compiled = jax.jit(partial(forward, attend)).lower(*arguments).compile()
        seconds = time.perf_counter() - started
        memory, program = compiled.memory_analysis(), compiled.as_text()
        if memory is None or program is None:
            raise RuntimeError("this version of XLA does not show the program that it made")
        hidden = layouts[0].num_tokens * shapes[0][2] * shapes[0][3]
        entry["rows"][name] = {
            "compile, s": round(seconds, 1),
            "GiB, temporary": round(memory.temp_size_in_bytes / BYTES, 2),
            "float32 as large as the hidden states": large_float32(program, hidden),
        }
        functions[name] = partial(compiled, *arguments)
    times = interleaved_seconds(functions, rounds)
    for name, function in functions.items():
        out, density = function()
        entry["rows"][name] |= time_row(times, name, "dense")
        entry["rows"][name]["finite"] = bool(jnp.isfinite(out).all())
        if density is not None:
            entry["rows"][name]["density"] = round(float(density.mean()), 4)

    arrays = [jax.random.normal(jax.random.key(n), shapes[0], jnp.bfloat16) for n in range(3)]
    attentions = {
        name: partial(
            jax.jit(partial(attend, layout=layouts[0])),
            *arrays,
            text_length=inputs.get("text_length"),
            layer=jnp.int32(case.layers - 1),
            step_state=state,
        )
        for name, attend in (("dense", attend_dense), ("sparse", attend_sparse(config, 1)))
        if name == "dense" or warmup.layers < 1
    }
    alone = interleaved_seconds(attentions, rounds)
    for name in attentions:
        row = entry["rows"][name]
        row["ms, one layer's attention"] = time_row(alone, name)["ms"]
        row["share of attention"] = round(
            case.layers * row["ms, one layer's attention"] / row["ms"], 3
        )
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    entry |= {
        "tokens": layouts[0].num_tokens,
        "layers": case.layers,
        "GiB, in use at most": round(peak / BYTES, 2),
    }
    return entry


def main() -> int:
    """Parse the command line, measure, print and write; 1 if a program keeps a large float32."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", default="", help="parts of names of the cases to run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file to put the entries into")
    args = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error(f"needs an NVIDIA GPU, not {jax.default_backend()}")
    names = [n for n in CASES if any(p.lower() in n.lower() for p in args.cases.split(","))]
    if not names:
        parser.error(f"no case has {args.cases!r} in its name; there are {', '.join(CASES)}")
    lean = True
    for name in names:
        entry = measure(CASES[name], args.rounds)
        lean &= not any(
            row["float32 as large as the hidden states"] for row in entry["rows"].values()
        )
        print(f"{name}\n{json.dumps(entry, indent=1)}", flush=True)
        write_entry(args.json, "forward", name, entry)
    return int(not lean)


if __name__ == "__main__":
    sys.exit(main())
