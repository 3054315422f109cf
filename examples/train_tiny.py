"""Train the tiny model by the clock, in as many calls as it takes.

    python examples/train_tiny.py --state STATE --minutes 9 --until 0.5
    python examples/train_tiny.py --state STATE --minutes 9 --until 1.0      # goes on where it was

About 20 minutes on one H100 or H200 from scratch; `--weights FOLDER --begin 0.3` goes on from an
exported model instead, as if 0.3 of the training were done. `--until` says how far along the whole
training this call gets (the phase and the learning rate follow it); STATE is read if it is there,
and written every two minutes and at the end. Then:

    python examples/export_tiny.py STATE svg_jax/assets/tiny_cogvideox
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tiny_data import load_assets
from tiny_model import TEXT_ENCODER, TRANSFORMER
from tiny_training import COARSE_UNTIL, TinyTrainer, load_state, load_weights, save_state


def main() -> None:
    """Parse the command line and train."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--state", type=Path, required=True, help="folder of the training state")
    parser.add_argument("--minutes", type=float, required=True, help="of this call, in all")
    parser.add_argument("--until", type=float, default=1.0, help="progress at its end, 0..1")
    parser.add_argument("--weights", type=Path, help="exported model to start from")
    parser.add_argument("--begin", type=float, default=0.0, help="progress of a new state, 0..1")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps-per-call", type=int, default=50)
    parser.add_argument("--layers", type=int, default=TRANSFORMER["num_layers"])
    parser.add_argument("--float32", action="store_true", help="compute in float32 (CPU)")
    args = parser.parse_args()

    transformer = {**TRANSFORMER, "num_layers": args.layers}
    dtype = jnp.float32 if args.float32 else jnp.bfloat16
    trainer = TinyTrainer(
        load_assets(), transformer, TEXT_ENCODER, batch=args.batch, dtype=dtype, seed=args.seed
    )
    weights = None if args.weights is None else load_weights(args.weights)
    state = trainer.initial_state(weights)
    record = {
        "progress": args.begin,
        "seconds": 0.0,
        "seed": args.seed,
        "batch": args.batch,
        "log": [],
    }
    if (args.state / "record.json").exists():
        state, record = load_state(args.state, state)
    record["device"] = jax.devices()[0].device_kind
    record["jax"] = jax.__version__

    @cache
    def compiled(coarse: bool) -> Callable:
        chunk = jnp.zeros(args.steps_per_call)
        return TinyTrainer.train.lower(trainer, state, chunk, coarse=coarse).compile()

    compiled(record["progress"] < COARSE_UNTIL)
    print(f"compiled after {time.monotonic() - started:.1f} s", flush=True)
    deadline = started + 60 * args.minutes
    first, begun, saved = record["progress"], time.monotonic(), time.monotonic()
    pace = 0.0  # seconds of a chunk
    last_validation = begun
    while (now := time.monotonic()) < deadline:
        begin, end = (min(1.0, (t - begun) / (deadline - begun)) for t in (now, now + pace))
        progress = first + (args.until - first) * np.linspace(begin, end, args.steps_per_call)
        train = compiled(progress[0] < COARSE_UNTIL)
        state, losses = train(state, jnp.asarray(progress, jnp.float32))
        loss = float(losses.mean())
        pace = time.monotonic() - now
        record["progress"] = float(progress[-1])
        record["seconds"] += pace
        if not np.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} by step {int(state.step)}")
        if time.monotonic() - last_validation > 45 or time.monotonic() >= deadline:
            last_validation = time.monotonic()
            validation = np.asarray(trainer.validate(state.average, batch=args.batch))
            entry = {"step": int(state.step), "progress": round(float(progress[-1]), 4)}
            entry |= {"seconds": round(record["seconds"], 1), "loss": round(loss, 5)}
            entry |= {"steps_per_second": round(args.steps_per_call / pace, 2)}
            entry |= {"validation": [round(loss, 5) for loss in validation.tolist()]}
            record["log"].append(entry)
            print(json.dumps(entry), flush=True)
        if time.monotonic() - saved > 120:
            save_state(args.state, state, record)
            saved = time.monotonic()
    save_state(args.state, state, record)
    print(f"step {int(state.step)}, progress {record['progress']:.4f}, saved in {args.state}")


if __name__ == "__main__":
    main()
