"""Where the time and memory of a run go: loading, encoding, compiling, steps, decoding, writing.

`stage` marks the stages where they happen, which costs nothing unless a `stopwatch` is running.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

COMPILING = "compiling"
_COMPILATION_EVENTS = {
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
}


class Stopwatch:
    """Time and memory of the stages so far.

    Attributes:
        seconds: Wall time of each stage, without that of stages inside it, in the order in which
            they first ended. Compilation is a stage of its own, whatever is compiled.
        peak_bytes: Largest memory in use on the default device by the end of each stage; empty if
            the backend does not tell.
        show: Function to call with what is being done whenever that changes; "" for no stage.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.peak_bytes: dict[str, int] = {}
        self.show: Callable[[str], None] = lambda doing: None
        self._started = self._last = time.perf_counter()
        self._inside: list[tuple[str, str]] = []

    @property
    def total(self) -> float:
        """Seconds since the stopwatch was started."""
        return time.perf_counter() - self._started

    def _begin(self, name: str, doing: str) -> None:
        self._count()
        self._inside.append((name, doing))
        self.show(doing)

    def _end(self) -> None:
        self._count()
        name, _ = self._inside.pop()
        if (peak := _peak_bytes()) is not None:
            self.peak_bytes[name] = peak
        self.show(self._inside[-1][1] if self._inside else "")

    def _count(self) -> None:
        """Add the time since the last change to the stage that it was spent in."""
        now = time.perf_counter()
        if self._inside:
            self.seconds[self._inside[-1][0]] += now - self._last
        self._last = now

    def _hear(self, event: str, duration_secs: float, **context: Any) -> None:
        """Move the time of a compilation from the stage that it was part of."""
        del context
        if event in _COMPILATION_EVENTS and _RUNNING.get() is self:
            self.seconds[COMPILING] += duration_secs
            if self._inside:
                self.seconds[self._inside[-1][0]] -= duration_secs


_RUNNING: ContextVar[Stopwatch | None] = ContextVar("stopwatch", default=None)


@contextmanager
def stopwatch() -> Iterator[Stopwatch]:
    """Count the time of the stages inside the block, in this thread."""
    from jax import monitoring

    watch = Stopwatch()
    before = _RUNNING.set(watch)
    monitoring.register_event_duration_secs_listener(watch._hear)
    try:
        yield watch
    finally:
        monitoring.unregister_event_duration_listener(watch._hear)
        _RUNNING.reset(before)


@contextmanager
def stage(name: str, doing: str | None = None) -> Iterator[None]:
    """Count the time of the block, or of each call of a function that this decorates, to a stage.

    Args:
        name: Name of the stage.
        doing: What the block does, to be shown. Default: the name.
    """
    watch = _RUNNING.get()
    if watch is None:
        yield
        return
    watch._begin(name, doing or name)
    try:
        yield
    finally:
        watch._end()


def _peak_bytes() -> int | None:
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
