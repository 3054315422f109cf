r"""Random cases of block-sparse attention against float64, on a GPU.

    OPENBLAS_NUM_THREADS=1 python benchmarks/fuzz_attention.py \
        --output benchmarks/results/fuzz_attention.jsonl

A shape is compiled once and serves many cases: data, labels, text lengths. A case fails if
the largest error passes twice that of a float64 reference whose weights and outputs are rounded to
the inputs' dtype, if the log-sum-exp is off by more than 1e-5 of itself, if anything is not finite,
if a padding row is not 0 (-inf in the log-sum-exp) or if a second run gives other bits. Padding
holds NaN. Some shapes are run by cuDNN too, densely, and its error is printed beside.

One JSON row a shape is appended; shapes that are there already are skipped, so a run that is cut
short goes on where it stopped. The end is a summary of all rows, and an error if a case failed.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from measured import provenance_of

from svg_jax.kernels import BandMask, block_sparse_attention, dense_attention
from svg_jax.provenance import device_name, versions

DTYPES: dict[str, Any] = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
LARGEST_RATIO = 2.0
PAIRS = 6e6  # of queries and keys in a case: what bounds the reference's time
SHAPES_AT_ONCE = 4  # one compiles while others run


@dataclass(frozen=True)
class Shape:
    """What one program is compiled for."""

    masks: tuple[BandMask, ...]
    head_dim: int
    batch: int
    heads: int
    padded: bool
    dtype: str

    @property
    def tokens(self) -> int:
        """Length of the sequence."""
        return self.masks[0].num_tokens


def draw_shape(rng: np.random.Generator, longest: int) -> Shape:
    """Short sequences are as likely as long ones, and text may stand first, last or nowhere."""
    tokens = int(rng.integers(1, longest + 1) if rng.random() < 0.7 else rng.integers(1, 300))
    where = rng.choice(["first", "last", "nowhere"])
    text = 0 if where == "nowhere" else int(rng.integers(1, min(tokens, 300) + 1))
    masks = tuple(
        BandMask(
            tokens,
            int(rng.choice([1, tokens, *rng.integers(1, tokens + 1, size=2).tolist()])),
            tokens - text if where == "last" else 0,
            text,
            int(rng.integers(tokens + 1)) if rng.random() < 0.5 else 0,
        )
        for _ in range(int(rng.choice([1, 1, 2, 3])))
    )
    batch, heads = int(rng.integers(1, 4)), int(rng.integers(1, 5))
    while batch * heads > 1 and batch * heads * tokens**2 > PAIRS:
        batch, heads = max(1, batch - 1), max(1, heads - 1)
    return Shape(
        masks=masks,
        head_dim=int(rng.choice([16, 24, 32, 40, 48, 64, 64, 128, 128, 128])),
        batch=batch,
        heads=heads,
        padded=text > 0 and rng.random() < 0.7,
        dtype=str(rng.choice(["bfloat16", "bfloat16", "bfloat16", "float16"])),
    )


@dataclass(frozen=True)
class Case:
    """One call's inputs, and which pairs and rows are real."""

    qkv: np.ndarray
    poisoned: np.ndarray
    of_head: np.ndarray
    lengths: np.ndarray | None
    keep: np.ndarray
    real: np.ndarray


def draw_case(shape: Shape, rng: np.random.Generator) -> Case:
    """Draw data of a random spread: from nearly uniform weights to nearly one key a row."""
    spread = rng.choice([0.1, 1.0, 1.5, 3.0])
    size = (3, shape.batch, shape.tokens, shape.heads, shape.head_dim)
    qkv = (spread * rng.standard_normal(size, np.float32)).astype(DTYPES[shape.dtype])
    of_head = rng.integers(len(shape.masks), size=(shape.batch, shape.heads)).astype(np.int32)
    position = np.arange(shape.tokens)
    lengths, real = None, np.ones((shape.batch, shape.tokens), bool)
    if shape.padded:
        text = shape.masks[0].text_tokens
        lengths = rng.integers(text + 1, size=shape.batch).astype(np.int32)
        lengths[0] = rng.choice([0, text, int(lengths[0])])
        real = shape.masks[0].is_real(position, lengths[:, None])
    keep = np.empty((shape.batch, shape.heads, shape.tokens, shape.tokens), bool)
    for batch, head in np.ndindex(of_head.shape):
        length = None if lengths is None else lengths[batch]
        mask = shape.masks[of_head[batch, head]]
        keep[batch, head] = mask.keep(position[:, None], position, length)
    poisoned = np.where(real[:, :, None, None], qkv, np.array(np.nan, qkv.dtype))
    return Case(qkv, poisoned, of_head, lengths, keep, real)


def references(qkv: np.ndarray, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Float64 attention, the same with rounded weights and outputs, and the log-sum-exp.

    One head at a time: scores stay small, and numpy lets other threads run meanwhile.
    """
    _, batch, tokens, heads, head_dim = qkv.shape
    exact = np.zeros((batch, tokens, heads, head_dim))
    rounded, lse = np.zeros_like(exact), np.empty((batch, heads, tokens))
    for b, h in np.ndindex(batch, heads):
        query, key, value = qkv[:, b, :, h].astype(np.float64)
        logits = query @ key.T
        logits *= head_dim**-0.5
        logits[~keep[b, h]] = -np.inf
        top = np.maximum(logits.max(-1, keepdims=True), -1e300)
        weights = np.exp(logits - top, out=logits)
        total = weights.sum(-1, keepdims=True)
        inverse = 1 / np.where(total > 0, total, 1)
        exact[b, :, h] = weights @ value * inverse
        narrow = weights.astype(np.float32).astype(qkv.dtype).astype(np.float64)
        rounded[b, :, h] = (narrow @ value * inverse).astype(qkv.dtype)
        with np.errstate(divide="ignore"):
            lse[b, h] = (top + np.log(total))[:, 0]
    return exact, rounded, lse


def ratio_of_errors(out: np.ndarray, exact: np.ndarray, rounded: np.ndarray) -> float:
    """Give the largest error in units of the rounded reference's; float32's own where that is 0."""
    floor = 1e-6 * np.abs(exact).max()
    allowed = np.abs(rounded - exact).max() + floor
    error = np.abs(out.astype(np.float64) - exact).max()
    return float(error / allowed) if allowed else float(error > 0)


def judge(
    case: Case, out: np.ndarray, lse: np.ndarray, same: bool, cudnn: np.ndarray | None
) -> dict[str, Any]:
    """Describe one case; `faults` is empty if all is well."""
    exact, rounded, expected_lse = references(case.qkv, case.keep)
    ratio = ratio_of_errors(out, exact, rounded)
    empty = np.isneginf(expected_lse)
    faults = []
    if not ratio <= LARGEST_RATIO:  # NaN too
        faults.append(f"error {ratio:.3f} times that of rounding")
    if not np.isfinite(out.astype(np.float32)).all() or np.isnan(lse).any():
        faults.append("not finite")
    if out[~case.real].astype(np.float32).any():
        faults.append("padding rows are not 0")
    if not np.array_equal(np.isneginf(lse), empty):
        faults.append("log-sum-exp is -inf elsewhere")
    gap = np.abs(np.where(empty, 0, lse) - np.where(empty, 0, expected_lse))
    lse_error = float((gap / (1 + np.abs(np.where(empty, 0, expected_lse)))).max())
    if not lse_error <= 1e-5:
        faults.append(f"log-sum-exp is off by {lse_error:.2e}")
    if not same:
        faults.append("a second run gave other bits")
    of_cudnn = None
    if cudnn is not None:
        dense = references(case.qkv, np.ones_like(case.keep))
        of_cudnn = ratio_of_errors(cudnn, *dense[:2])
    return {"ratio": ratio, "lse_error": lse_error, "cudnn": of_cudnn, "faults": faults}


def run_shape(
    number: int, shape: Shape, cases: int, seed: int, attend: Callable, pool: ThreadPoolExecutor
) -> dict[str, Any]:
    """Compile once, run all cases; references are computed in other threads meanwhile."""
    started = time.perf_counter()
    program = jax.jit(partial(attend, masks=shape.masks, return_lse=True))
    dense = None
    with_cudnn = number % 2 == 0 and shape.head_dim in (64, 128) and shape.tokens >= 64
    if with_cudnn and jax.default_backend() == "gpu":
        dense = jax.jit(partial(dense_attention, implementation="cudnn"))
    verdicts: list[Future] = []

    def one_case(index: int) -> dict[str, Any]:
        case = draw_case(shape, np.random.default_rng((seed, number, index)))
        arrays = [jnp.asarray(x) for x in case.poisoned]
        lengths = None if case.lengths is None else jnp.asarray(case.lengths)
        of_head = jnp.asarray(case.of_head)
        first, second = (
            [np.asarray(x) for x in program(*arrays, mask_of_head=of_head, text_length=lengths)]
            for _ in range(2)
        )
        same = all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))
        cudnn = None
        if dense is not None and index < 3:
            cudnn = np.asarray(dense(*(jnp.asarray(x) for x in case.qkv)))
        out, lse = first
        return judge(case, out, lse, same, cudnn)

    verdicts = [pool.submit(one_case, 0)]
    verdicts[0].result()  # it compiles, once
    verdicts += [pool.submit(one_case, index) for index in range(1, cases)]
    results = [verdict.result() for verdict in verdicts]
    of_cudnn = [each["cudnn"] for each in results if each["cudnn"] is not None]
    return {
        "seed": seed,
        "shape": number,
        **dataclasses.asdict(shape),
        "cases": cases,
        "ratio": round(max(each["ratio"] for each in results), 4),
        "cudnn_ratio": round(max(of_cudnn), 4) if of_cudnn else None,
        "lse_error": max(each["lse_error"] for each in results),
        "faults": [
            f"case {i}: {fault}" for i, each in enumerate(results) for fault in each["faults"]
        ],
        "seconds": round(time.perf_counter() - started, 2),
    }


def read_rows(output: Path | None) -> list[dict[str, Any]]:
    """Rows of earlier calls."""
    if output is None or not output.exists():
        return []
    return [json.loads(line) for line in output.read_text().splitlines()]


def print_row(row: dict[str, Any]) -> None:
    """One line, and one more for each fault."""
    cudnn = "" if row["cudnn_ratio"] is None else f"   cuDNN {row['cudnn_ratio']:.3f}"
    print(
        f"{row['shape']:3}: {row['batch']} x {row['masks'][0]['num_tokens']:4} x {row['heads']} x "
        f"{row['head_dim']:3} {row['dtype']:8} {len(row['masks'])} masks   "
        f"error {row['ratio']:.3f} of rounding{cudnn}   {row['seconds']:.1f} s",
        *row["faults"],
        sep="\n     ",
        flush=True,
    )


def main() -> None:
    """Parse the command line, run what is missing, print and append."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON lines; rows are appended")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shapes-limit", type=int, default=64)
    parser.add_argument("--cases", type=int, default=35, help="of each shape")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no shape after")
    parser.add_argument("--longest", type=int, default=2000, help="tokens")
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--implementation", default="mosaic_gpu")
    args = parser.parse_args()
    print(f"seed {args.seed}, {args.shapes_limit} shapes of {args.cases} cases, {device_name()}")
    attend = partial(block_sparse_attention, implementation=args.implementation)
    settings = {
        "implementation": args.implementation,
        "longest": args.longest,
        "device": device_name(),
        "versions": versions(),
    }
    rows = [
        row
        for row in read_rows(args.output)
        if row["seed"] == args.seed and all(row[name] == settings[name] for name in settings)
    ]
    done = {row["shape"] for row in rows}
    started = time.perf_counter()

    with ThreadPoolExecutor(args.threads) as pool, ThreadPoolExecutor(SHAPES_AT_ONCE) as shapes:

        def one_shape(number: int) -> dict[str, Any] | None:
            if time.perf_counter() - started > args.seconds:
                return None
            shape = draw_shape(np.random.default_rng((args.seed, number)), args.longest)
            return run_shape(number, shape, args.cases, args.seed, attend, pool)

        missing = [number for number in range(args.shapes_limit) if number not in done]
        for row in shapes.map(one_shape, missing):
            if row is None:
                continue
            row |= provenance_of("benchmarks/fuzz_attention.py") | settings
            rows.append(row)
            if args.output is not None:
                with args.output.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            print_row(row)
    if not rows:
        sys.exit("no shape was run: give more --seconds or --shapes-limit")
    of_cudnn = [row["cudnn_ratio"] for row in rows if row["cudnn_ratio"] is not None]
    failed = sum(len(row["faults"]) > 0 for row in rows)
    print(
        f"\n{sum(row['cases'] for row in rows)} cases of {len(rows)} shapes: error at most "
        f"{max(row['ratio'] for row in rows):.3f} times that of rounding"
        + (f", cuDNN's {max(of_cudnn):.3f}" if of_cudnn else "")
        + f"; log-sum-exp within {max(row['lse_error'] for row in rows):.1e}; "
        f"{failed} shapes failed"
    )
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
