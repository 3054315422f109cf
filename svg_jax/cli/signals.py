"""What ends a command from outside."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from svg_jax.convert.progress import Terminated


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let Ctrl-C, and SIGTERM by which batch systems end a job, raise `Terminated` in the block.

    What is done is then saved or kept, and a line says so. A signal that somebody else handles, or
    that is ignored, is left to that.
    """
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    if threading.current_thread() is not threading.main_thread():
        usual = {}  # Python refuses handlers there
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
