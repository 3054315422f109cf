"""What the benchmarks share: times measured in turns, medians with quartiles, files of results."""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

Functions = Mapping[str, Callable[[], Any]]
Seconds = dict[str, list[float]]
MOST_CALLS, MOST_QUEUED = 20, 50


def interleaved_seconds(
    functions: Functions,
    repeats: int,
    *,
    least_seconds: float = 0.0,
    ahead: str | None = None,
    wait: Callable[[Any], Any] = jax.block_until_ready,
) -> Seconds:
    """Seconds that one call of each function takes: all once, then all again: drift hits all alike.

    Args:
        functions: What to call; each has been called once before it counts.
        repeats: Rounds.
        least_seconds: A timing is so many calls behind one another that it lasts about this long,
            up to `MOST_CALLS`, and two of them at least: what a single call waits for is not the
            device's time. 0: one call.
        ahead: Name of a long function. Those that take less than a tenth of its time are queued
            while the device is at work on it, and its time in the same round is taken off: what is
            left is the device's time, as in the middle of a model, and not the host's to launch
            many small programs.
        wait: Returns when the device has done what its argument depends on.
    """
    calls: dict[str, int] = {}
    queued: dict[str, int] = {}  # calls that can be queued before the device is done with `ahead`
    once = {}
    for name, function in functions.items():
        wait(function())
        once[name] = _timed([function], wait)
        wanted = math.ceil(least_seconds / once[name]) if least_seconds else 1
        calls[name] = min(max(wanted, 2 if least_seconds else 1), MOST_CALLS)
    first = None if ahead is None else functions.get(ahead)
    if ahead is not None and first is not None:
        times = {name: once[ahead] / seconds for name, seconds in once.items()}
        queued = {name: min(int(n), MOST_QUEUED) for name, n in times.items() if n > 10}
    seconds: Seconds = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            if first is not None and (n := queued.get(name)):
                alone = _timed([first], wait)
                seconds[name].append((_timed([first, *[function] * n], wait) - alone) / n)
            else:
                seconds[name].append(_timed([function] * calls[name], wait) / calls[name])
    return seconds


def _timed(functions: Sequence[Callable[[], Any]], wait: Callable[[Any], Any]) -> float:
    """Seconds of calls behind one another."""
    started = time.perf_counter()
    for function in functions[:-1]:
        function()
    wait(functions[-1]())
    return time.perf_counter() - started


def runnable(
    functions: Functions, wait: Callable[[Any], Any] = jax.block_until_ready
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Compile each function by a first call: those that run, and why each of the others does not.

    One that fails must not cost the measurements of the others.
    """
    works, failures = {}, {}
    for name, function in functions.items():
        started = time.perf_counter()
        try:
            wait(function())
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            print(f"  {name}: FAILED: {error}", file=sys.stderr, flush=True)
        else:
            works[name] = function
            print(f"  {name}: ready in {time.perf_counter() - started:.1f} s", flush=True)
    return works, failures


def spread(values: Any, digits: int = 3) -> list[float]:
    """Lower quartile, median and upper quartile."""
    return [round(float(value), digits) for value in np.percentile(values, [25, 50, 75])]


def time_row(seconds: Seconds, name: str, baseline: str | None = None) -> dict[str, Any]:
    """Median and quartiles in milliseconds, and relative to the baseline of the same round."""
    low, median, high = spread(1e3 * np.array(seconds[name]))
    row: dict[str, Any] = {"ms": median, "quartiles": [low, high]}
    if baseline is not None and name != baseline:
        low, median, high = spread(np.array(seconds[name]) / np.array(seconds[baseline]), 4)
        row |= {"to dense": median, "to dense, quartiles": [low, high]}
    return row


def write_entry(path: Path | None, section: str, name: str, entry: dict[str, Any]) -> None:
    """Put an entry into a section of a JSON file, beside what other runs have left there."""
    if path is None:
        return
    document = json.loads(path.read_text()) if path.exists() else {}
    document.setdefault(section, {})[name] = entry
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
