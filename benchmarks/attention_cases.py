"""The attention of real video models, ready to be timed: shapes, arrays, jitted calls."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from timing import Functions, Seconds, interleaved_seconds, spread

from svg_jax import PAPER_PRESETS, SparsityConfig, VideoLayout, classify_heads, sparse_attention
from svg_jax.kernels import BandMask, block_map, block_sparse_attention, dense_attention
from svg_jax.masks import sparse_mask
from svg_jax.token_order import to_frame_major, to_token_major

BLOCK = 128
COPY_ELEMENTS = 2**29
LEAST_SECONDS = 0.03  # of one timing: two calls or more behind one another
DENSE, KERNEL, STEP = "cuDNN dense", "sparse kernel", "whole step"


@dataclass(frozen=True)
class Case:
    """A model's attention: its tokens, its density, and heads enough to fill a GPU.

    Attributes:
        layout: Frames and text.
        config: Sparsity of the paper.
        heads: Heads measured by default.
        all_heads: Heads of the model.
        least_rate: Least rate of the sparse kernel that `--check` lets pass, in kept blocks a
            second relative to cuDNN's: 7 % under that in results/attention.json.
        head_dim: Width of a head.
        target: Most time of a whole step, relative to dense.
        length_is_data: Whether the text's length is given to the kernels at run time.
    """

    layout: VideoLayout
    config: SparsityConfig
    heads: int
    all_heads: int
    least_rate: float = 0.0
    head_dim: int = 128
    target: float | None = None
    length_is_data: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of queries, keys and values."""
        return (1, self.layout.num_tokens, self.heads, self.head_dim)


CASES = {
    "Wan 720p": Case(
        VideoLayout(21, 3600),
        PAPER_PRESETS["wan-t2v-720p"].sparsity,
        heads=8,
        all_heads=40,
        least_rate=0.97,
        target=0.351,
    ),
    "Wan 480p": Case(
        VideoLayout(21, 1560),
        PAPER_PRESETS["wan-i2v-480p"].sparsity,
        heads=12,
        all_heads=12,
        least_rate=0.96,
    ),
    "HunyuanVideo 720p": Case(
        VideoLayout(33, 3600, 256, "last"),
        PAPER_PRESETS["hunyuanvideo-720p"].sparsity,
        heads=6,
        all_heads=24,
        least_rate=0.98,
        target=0.257,
        length_is_data=True,
    ),
    "CogVideoX-1.5": Case(
        VideoLayout(11, 4080, 226, "first"),
        PAPER_PRESETS["cogvideox1.5-i2v"].sparsity,
        heads=12,
        all_heads=48,
        least_rate=0.96,
        head_dim=64,
        target=0.270,
    ),
}


@dataclass(frozen=True)
class Run:
    """What the command line says about how to measure.

    Attributes:
        implementation: The sparse kernel.
        dense: The implementation of `jax.nn.dot_product_attention` to compare with.
        rounds: Timings of each row.
        tiny: Whether to shrink all shapes.
        all_heads: Whether to take the models' own numbers of heads.
    """

    implementation: Any
    dense: Any
    rounds: int
    tiny: bool
    all_heads: bool

    def fit(self, case: Case) -> Case:
        """Give the case the heads and, for a dry run, the size asked for."""
        if self.all_heads:
            case = dataclasses.replace(case, heads=case.all_heads)
        if not self.tiny:
            return case
        layout = case.layout
        text, frames = min(layout.text_tokens, 16), layout.num_frames // 3
        small = VideoLayout(frames, 240, text, layout.text_position)
        return dataclasses.replace(case, layout=small, heads=2)

    def measure(self, functions: Functions, rounds: int | None = None, **options: Any) -> Seconds:
        """Time all in turns, in seconds."""
        options |= {"least_seconds": 0.0 if self.tiny else LEAST_SECONDS, "ahead": DENSE}
        return interleaved_seconds(functions, rounds or self.rounds, **options)

    @property
    def copy_bytes(self) -> int:
        """Read and written by one copy."""
        return 4 * (COPY_ELEMENTS >> (12 if self.tiny else 0))


@partial(jax.jit, static_argnums=0)
def random_arrays(shape: tuple[int, ...]):
    """Make queries, keys, values and an output, on the device."""
    rngs = jax.random.split(jax.random.key(0), 4)
    return tuple(jax.random.normal(rng, shape, jnp.bfloat16) for rng in rngs)


def pad_to_eights(*arrays: Array) -> tuple[Array, ...]:
    """Arrays as the layout hands them to the sparse kernel: with a multiple of eight tokens."""
    missing = -arrays[0].shape[1] % 8
    return tuple(jnp.pad(x, [(0, 0), (0, missing), (0, 0), (0, 0)]) for x in arrays)


def dense_call(run: Run, query, key, value) -> Callable[[], Any]:
    """Make a call of the baseline."""
    dense = jax.jit(partial(jax.nn.dot_product_attention, implementation=run.dense))
    return partial(dense, query, key, value)


def kernel_call(
    run: Run, mask: BandMask, query, key, value, text_length=None, implementation: Any = None
) -> Callable[[], Any]:
    """Make a call of the sparse kernel alone."""
    chosen = implementation or run.implementation

    @jax.jit
    def kernel(query, key, value, text_length):
        return block_sparse_attention(
            query, key, value, masks=mask, text_length=text_length, implementation=chosen
        )

    return partial(kernel, query, key, value, text_length)


def kept_blocks(mask: BandMask, heads: int) -> int:
    """Blocks of 128 × 128 that hold a kept pair, over all heads."""
    return int(block_map(mask, BLOCK, BLOCK).counts.sum()) * heads


def relative_rate(seconds: Seconds, name: str, mask: BandMask, heads: int) -> float:
    """Kept blocks a second relative to those of cuDNN's dense attention."""
    work = kept_blocks(mask, heads) * BLOCK**2 / (heads * mask.num_tokens**2)
    return spread(work * np.array(seconds[DENSE]) / np.array(seconds[name]))[1]


def case_functions(run: Run, case: Case) -> dict[str, Callable[[], Any]]:
    """All rows of a case."""
    layout, config = case.layout, case.config
    query, key, value, out = random_arrays(case.shape)
    in_eights = pad_to_eights(query, key, value, out)
    mask = sparse_mask(layout, config)
    length = jnp.array([layout.text_tokens], jnp.int32) if case.length_is_data else None
    labels = jnp.arange(case.heads)[None] % 2 == 1
    options: Any = {"layout": layout, "config": config}

    @jax.jit
    def own_dense(query, key, value, length):
        real = None if length is None else layout.video_tokens + length
        return dense_attention(query, key, value, key_value_seq_lengths=real)

    @jax.jit
    def profile(query, key, value, rng, length):
        return classify_heads(query, key, value, rng=rng, text_length=length, **options)

    @jax.jit
    def lay_out(query, key, value, out, labels):
        there = to_token_major(
            query, key, value, layout=layout, temporal=labels, num_tokens=out.shape[1]
        )
        return there, to_frame_major(out, layout=layout, temporal=labels)

    @jax.jit
    def step(query, key, value, rng, labels, length):
        found = classify_heads(query, key, value, rng=rng, text_length=length, **options)
        out, _ = sparse_attention(
            query,
            key,
            value,
            labels=labels,
            text_length=length,
            implementation=run.implementation,
            **options,
        )
        return out, found

    rng = jax.random.key(1)
    copied = jnp.ones(run.copy_bytes // 4, jnp.bfloat16)
    return {
        DENSE: dense_call(run, query, key, value),
        "own dense": partial(own_dense, query, key, value, length),
        KERNEL: kernel_call(run, mask, *in_eights[:3], text_length=length),
        "profile": partial(profile, query, key, value, rng, length),
        "layout": partial(lay_out, query, key, value, in_eights[3], labels),
        STEP: partial(step, query, key, value, rng, labels, length),
        "copy": partial(jax.jit(jnp.negative), copied),
    }
