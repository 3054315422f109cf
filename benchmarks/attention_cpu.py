"""Sparse attention against the fastest dense attention on a CPU, interleaved, medians.

    python benchmarks/attention_cpu.py --json benchmarks/results/attention_cpu.json

Dense attention goes block of query rows by block of query rows; the fastest of blocks of 64, 128,
256 and 512 rows is the baseline. Two cases: the demo's shape, with the kernel alone, the whole
`sparse_attention` call (profile, lay out, attend, restore) and whole forwards of a transformer of
the demo's size; and a longer sequence, kernel and call. Random data, float32.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from measured import provenance_of
from timing import Seconds, interleaved_seconds, time_row

from svg_jax import kernels
from svg_jax.attention import StepState, attend_dense, attend_sparse, sparse_attention
from svg_jax.config import SparsityConfig
from svg_jax.kernels import xla
from svg_jax.masks import realised_density, sparse_mask
from svg_jax.models import CogVideoXConfig, CogVideoXTransformer, VideoLayout

DENSE_ROWS = (64, 128, 256, 512)
CONFIG = SparsityConfig(density=0.25)
DEMO = VideoLayout(num_frames=16, tokens_per_frame=192, text_tokens=16, text_position="first")
LONG = VideoLayout(num_frames=16, tokens_per_frame=512)
LONG_CONFIG = SparsityConfig(density=0.25, first_frame_sink=False)


def attention_functions(
    layout: VideoLayout, config: SparsityConfig, heads: int, head_dim: int
) -> dict[str, Callable[[], Any]]:
    """Dense attention by each block of rows, and the kernel; "sparse call" is the whole method."""
    shape = (3, 1, layout.num_tokens, heads, head_dim)
    query, key, value = jax.random.normal(jax.random.key(0), shape)
    dense = partial(xla.dense_attention, query_seq_lengths=None, key_value_seq_lengths=None)
    functions: dict[str, Callable[[], Any]] = {
        f"dense by {rows} rows": partial(
            dense, query, key, value, scale=head_dim**-0.5, block_rows=rows
        )
        for rows in DENSE_ROWS
    }
    kernel = jax.jit(partial(kernels.block_sparse_attention, masks=sparse_mask(layout, config)))
    functions["sparse kernel"] = partial(kernel, query, key, value)
    functions["sparse call"] = partial(
        sparse_attention, query, key, value, layout=layout, config=config, rng=jax.random.key(1)
    )
    return functions


def forward_functions(heads: int, head_dim: int, layers: int) -> dict[str, Callable[[], Any]]:
    """Make a dense and a sparse forward of a transformer of the demo's size, random weights."""
    config = CogVideoXConfig(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_layers=layers,
        in_channels=3,
        out_channels=3,
        patch_size=4,
        sample_width=64,
        sample_height=48,
        sample_frames=16,
        temporal_compression_ratio=1,
        time_embed_dim=64,
        text_embed_dim=64,
        max_text_seq_length=16,
        use_rotary_positional_embeddings=True,
    )
    graph, weights = nnx.split(CogVideoXTransformer(config, rngs=nnx.Rngs(0)))
    latents = jax.random.normal(jax.random.key(0), (1, 16, 3, 48, 64))
    text, timestep = jax.random.normal(jax.random.key(1), (1, 16, 64)), jnp.array([500.0])

    @partial(jax.jit, static_argnums=0)
    def forward(attend, step_state):
        model = nnx.merge(graph, weights)
        return model(latents, text, timestep, attend=attend, step_state=step_state)[0]

    return {
        "dense forward": partial(forward, attend_dense, None),
        "sparse forward": partial(
            forward, attend_sparse(CONFIG, layers), StepState(rng=jax.random.key(2))
        ),
    }


def report(name: str, seconds: Seconds) -> dict[str, Any]:
    """Medians and quartiles in milliseconds, and how many times faster each sparse row is."""
    rows = {what: time_row(seconds, what) for what in seconds}
    baseline = min(row["ms"] for what, row in rows.items() if what.startswith("dense by"))
    for what, row in rows.items():
        if what.startswith("sparse"):
            forward = what == "sparse forward"
            row["speed-up"] = round(
                (rows["dense forward"]["ms"] if forward else baseline) / row["ms"], 2
            )
    print(f"\n{name}")
    for what, row in rows.items():
        low, high = row["quartiles"]
        gain = f"   {row['speed-up']:.2f} times faster" if "speed-up" in row else ""
        print(f"  {what:18} {row['ms']:9.1f} ms   ({low:.1f} to {high:.1f}){gain}")
    return rows


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    demo = attention_functions(DEMO, CONFIG, heads=6, head_dim=32)
    seconds = interleaved_seconds(demo, args.repeats)
    seconds |= interleaved_seconds(forward_functions(6, 32, layers=6), max(3, args.repeats // 2))
    long = attention_functions(LONG, LONG_CONFIG, heads=4, head_dim=64)
    results = {
        **provenance_of("benchmarks/attention_cpu.py"),
        "repeats": args.repeats,
        "demo: S = 3088, 6 heads x 32": report("demo: S = 3088, 6 heads x 32", seconds),
        "long: S = 8192, 4 heads x 64": report(
            "long: S = 8192, 4 heads x 64", interleaved_seconds(long, args.repeats)
        ),
        "density computed": {
            "demo": float(realised_density(sparse_mask(DEMO, CONFIG))),
            "long": float(realised_density(sparse_mask(LONG, LONG_CONFIG))),
        },
    }
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
