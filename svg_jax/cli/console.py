"""Sentences, tables and progress bars on the terminal.

No output can end a command or harm a terminal: control characters and characters that the
terminal's encoding lacks are escaped, and output that cannot be written (the disk is full, the
reader left) is dropped.
"""

import errno
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from svg_jax.stages import Stopwatch

if TYPE_CHECKING:  # imported where it is used: it would slow `svg-jax --help` down
    from rich.progress import Progress
    from rich.table import Table

LONGEST_SENTENCE = 500  # characters, with the program's name
_LONGEST_WAIT = 60.0  # seconds from one line about steps or bytes to the next
_SOON = 2.0  # seconds from the begin of a stage to a line about it
_NAME = "svg-jax: "


class ForgivingStream:
    """Text stream that drops what it cannot write.

    Attributes:
        error: First error at which text was dropped, unless its reader left (`| head`).
    """

    def __init__(self, stream: Any):
        self.error: OSError | None = None
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text, or drop it."""
        with self._forgiven():
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write buffered text, or drop it."""
        with self._forgiven():
            self._stream.flush()

    @contextmanager
    def _forgiven(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno != errno.EPIPE:
                self.error = self.error or error
            # The buffered rest would fail again when the interpreter ends.
            with suppress(OSError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def forgiving_streams() -> Iterator[None]:
    """Make standard output and error forgiving inside the block."""
    _open_standard_files()
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:  # for streams that the shell closed
        streams = [stream or nowhere for stream in before]
        policies = [_escaping(stream, "backslashreplace") for stream in streams]
        sys.stdout, sys.stderr = map(ForgivingStream, streams)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = before
            for stream, policy in zip(streams, policies, strict=True):
                _escaping(stream, policy)


def _escaping(stream: Any, policy: str | None) -> str | None:
    """Set how a stream handles characters that its encoding lacks; return the old policy."""
    before = getattr(stream, "errors", None)
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors=policy)
    return before


def _open_standard_files() -> None:
    """Open those that the shell closed, or the next file opened would receive the messages."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def printable(text: str) -> str:
    r"""Escape the control characters, lone surrogates and line breaks of a text."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def say(text: str) -> None:
    """Print a line of a command's result."""
    print(printable(text), flush=True)


def tell(text: str) -> None:
    """Print a warning or an error on standard error, as one sentence."""
    line = _NAME + printable(" ".join(text.split()))
    print(shortened(line, LONGEST_SENTENCE), file=sys.stderr, flush=True)


def tell_lines(lines: Iterable[str]) -> None:
    """Print a traceback on standard error, whole."""
    for line in "".join(lines).splitlines():
        print(printable(line), file=sys.stderr)


def shortened(text: str, length: int) -> str:
    """Shorten a text to a number of characters: keep its beginning and its end."""
    if len(text) <= length:
        return text
    end = length // 3
    return f"{text[: length - end - 3]} … {text[-end:]}"


def print_parts(*parts: Any) -> None:
    """Print tables and lines."""
    from rich.console import Console

    # Where there is no terminal, a table is as wide as it needs to be. Markup is off: names and
    # prompts may contain [brackets].
    width = None if sys.stdout.isatty() else 10_000
    console = Console(width=width, markup=False, emoji=False, highlight=False)
    for part in parts:
        is_line = isinstance(part, str)
        console.print(printable(part) if is_line else part, soft_wrap=is_line)


def add_row(table: "Table", *cells: str) -> None:
    """Add a row of printable text to a table."""
    table.add_row(*map(printable, cells))


def check_printed() -> None:
    """Raise OSError if output was dropped, for commands whose result is what they print."""
    sys.stdout.flush()
    error = getattr(sys.stdout, "error", None)
    if error is not None:
        raise OSError(error.errno, error.strerror, "standard output")


@contextmanager
def _bar(*columns: str) -> "Iterator[Progress]":
    """Show a progress bar if standard error is a terminal.

    Args:
        *columns: Names of the columns, of rich's classes, between the bar and the elapsed time.
    """
    from rich import progress as rich_progress
    from rich.console import Console

    console = Console(stderr=True)
    text = rich_progress.TextColumn("{task.description:18}", markup=False)
    bars = [getattr(rich_progress, name)() for name in ("BarColumn", *columns, "TimeElapsedColumn")]
    hidden = not console.is_terminal
    with rich_progress.Progress(text, *bars, console=console, disable=hidden) as progress:
        yield progress


@contextmanager
def steps_bar(total: int, watch: Stopwatch) -> Iterator[Callable[[str], None]]:
    """Show denoising steps, and the stages around them.

    On a terminal this is a bar. Otherwise it is a line from time to time, and a line for each kind
    of stage that takes more than two seconds.

    Args:
        total: Number of steps of all runs together.
        watch: Stopwatch that tells the stages.

    Yields:
        Function to call after each step, with the name of the step's kind.
    """
    with _bar("MofNCompleteColumn") as progress:
        task, is_due, done = progress.add_task("", total=total), _pacer(), 0

        def advance(what: str) -> None:
            nonlocal done
            done += 1
            progress.update(task, advance=1)
            if progress.disable and done < total and (seconds := is_due()):
                say(f"{what}: step {done} of {total}, {seconds:.0f} s")

        def describe(doing: str) -> None:
            progress.update(task, description=doing)

        watch.show = _announcer() if progress.disable else describe
        yield advance


@contextmanager
def bytes_bar(*, visible: bool = True) -> Iterator[Callable[[int, int, str], None]]:
    """Show bytes: on a terminal as a bar, otherwise as a line from time to time.

    Args:
        visible: Whether to show the bar before the first bytes are done.

    Yields:
        Function to call with the bytes done, the bytes in all, and the component's name.
    """
    with _bar("DownloadColumn", "TransferSpeedColumn") as progress:
        task, is_due = progress.add_task("checking", total=None, visible=visible), _pacer()

        def show(done: int, total: int, what: str) -> None:
            text = printable(what)
            progress.update(task, completed=done, total=total, description=text, visible=True)
            if progress.disable and done < total and (seconds := is_due()):
                say(f"{what}: {done / 1e9:.2f} of {total / 1e9:.2f} GB, {seconds:.0f} s")

        yield show


def _pacer() -> Callable[[], float | None]:
    """Make a function that gives the seconds so far if a line about them is due, else None."""
    start = last = time.monotonic()
    wait = 5.0

    def is_due() -> float | None:
        nonlocal last, wait
        now = time.monotonic()
        if now - last < wait:
            return None
        last, wait = now, min(2 * wait, _LONGEST_WAIT)
        return now - start

    return is_due


def _announcer() -> Callable[[str], None]:
    """Make a function that prints what is being done after two seconds of it, each thing once."""
    timer, told = threading.Timer(0, say), set()

    def announce(doing: str) -> None:
        told.add(doing)
        say(doing)

    def show(doing: str) -> None:
        nonlocal timer
        timer.cancel()
        if doing and doing not in told:
            timer = threading.Timer(_SOON, announce, [doing])
            timer.daemon = True
            timer.start()

    return show
