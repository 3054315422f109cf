"""Signals that end a command."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from svg_jax.convert.progress import Terminated


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Raise `Terminated` in the block on Ctrl-C and on SIGTERM, by which batch systems end a job.

    Work that is done can then be saved. A signal that is ignored or has another handler is left
    alone.
    """
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    if threading.current_thread() is not threading.main_thread():
        usual = {}  # only the main thread may set handlers
    ours = [number for number, handler in usual.items() if signal.getsignal(number) is handler]
    for number in ours:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, usual[number])


def _end(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise Terminated
