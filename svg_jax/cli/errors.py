"""Every exception that ends a command, as one sentence and an exit code.

Three kinds are told apart:

* **Bad input**: an exception that knows its own exit code (the converter's, those of wrong usage),
  a ValueError that somebody meant to raise, and what readers of files raise.
* **The system refuses**: OSError, and memory that ran out.
* **An internal error** is everything else: nobody foresaw it, and nothing that the user gave is
  known to be wrong. So is a ValueError from within jax or numpy, or from a call of compiled code
  such as `int(text)`: were it about the input, this package should have said so first.
  The traceback goes into a file.
"""

import dis
import errno
import os
import re
import tempfile
import traceback
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from types import TracebackType

from svg_jax.cli.console import shortened
from svg_jax.extras import missing_package


class ExitCode(IntEnum):
    """What a command ends with."""

    NOT_FINITE = 1  # the run itself gave values that are not finite
    BAD_INPUT = 2  # wrong usage, or what was given is not what it must be
    REFUSED = 3  # the disk, a right, a lock, the memory
    DAMAGED = 4  # a folder is not what was converted
    INTERNAL = 70
    INTERRUPTED = 130


@dataclass(frozen=True)
class Failure:
    """How a command ends.

    Attributes:
        code: Exit code.
        sentence: What is printed; empty if all is said.
    """

    code: int
    sentence: str


_BAD_PATHS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)
_BAD_PATH_NUMBERS = {errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}
# Readers and writers of files, which are named so that no command has to import them.
_READERS = {
    "PIL.UnidentifiedImageError": ExitCode.BAD_INPUT,
    "PIL.Image.DecompressionBombError": ExitCode.BAD_INPUT,
    "av.error.FFmpegError": ExitCode.BAD_INPUT,
    "httpx.HTTPError": ExitCode.REFUSED,
}
_COMPUTING = {"jax", "jaxlib", "flax", "numpy", "orbax", "tensorstore"}  # know of no input
_PARSERS = {"json", "ast", "re", "pickle", "zipfile"}  # modules that go as deep as what they read
_FAR_TOO_LONG = 200  # characters of an internal error's message


def failure_of(error: BaseException, options: Mapping[str, str] | None = None) -> Failure:
    """Tell how a command ends that raised an exception.

    Args:
        error: The exception.
        options: Options of the command by the names of what they give, which are told as options.
    """
    if isinstance(error, KeyboardInterrupt):
        return Failure(ExitCode.INTERRUPTED, "")
    code = _foreseen_code(error)
    if code is None:
        return Failure(ExitCode.INTERNAL, _internal_sentence(error))
    return Failure(code, _sentence(error, options or {}))


def _foreseen_code(error: BaseException) -> int | None:
    """Give the exit code of a foreseen exception; None if nobody foresaw it."""
    own = getattr(error, "exit_code", None)
    if isinstance(own, int):
        return own
    of_system = isinstance(error, OSError) and error.errno  # a reader may pass on the disk's
    for kind in () if of_system else type(error).__mro__:
        if (named := _READERS.get(f"{kind.__module__}.{kind.__qualname__}")) is not None:
            return named
    match error:
        case OSError():
            is_of_path = isinstance(error, _BAD_PATHS) or error.errno in _BAD_PATH_NUMBERS
            return ExitCode.BAD_INPUT if is_of_path else ExitCode.REFUSED
        case MemoryError():
            return ExitCode.REFUSED
        case ModuleNotFoundError() if missing_package(error) is not error:
            return ExitCode.REFUSED
        case RuntimeError() if _is_out_of_memory(error):
            return ExitCode.REFUSED
        case FloatingPointError():
            return ExitCode.NOT_FINITE
        case UnicodeError() | EOFError() | zipfile.BadZipFile():
            return ExitCode.BAD_INPUT
        case RecursionError() if _package_of(error) in _PARSERS:
            return ExitCode.BAD_INPUT
        case ValueError() if _is_meant(error):
            return ExitCode.BAD_INPUT
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    """Tell whether Python, XLA or CUDA ran out of memory, each of which says so in its way."""
    words = "RESOURCE_EXHAUSTED", "OUT_OF_MEMORY", "out of memory"
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def _last_frame(error: BaseException) -> TracebackType | None:
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame


def _package_of(error: BaseException) -> str:
    """Name the top package of the code that ran last."""
    last = _last_frame(error)
    return "" if last is None else last.tb_frame.f_globals.get("__name__", "").partition(".")[0]


def _is_meant(error: ValueError) -> bool:
    """Tell whether somebody raised it about the input: not compiled code, not what computes."""
    last, package = _last_frame(error), _package_of(error)
    if last is not None and package == __name__.partition(".")[0]:
        return dis.opname[last.tb_frame.f_code.co_code[last.tb_lasti]] == "RAISE_VARARGS"
    return package not in _COMPUTING


def _sentence(error: BaseException, options: Mapping[str, str]) -> str:
    """Say in words what a foreseen exception is about."""
    if reason := getattr(error, "strerror", None):  # OSError and FFmpeg's
        return f"{_paths_of(error)}{reason}"
    match error:
        case ModuleNotFoundError():
            return str(missing_package(error))
        case RecursionError():
            return "what was given is nested too deeply to be read"
        case UnicodeError():
            return f"what was given, or a path, is not UTF-8: {_without_bytes(error)}"
        case EOFError() | zipfile.BadZipFile():
            return f"a file that was given is damaged or cut off: {str(error) or 'it ends early'}"
    if _is_out_of_memory(error):
        whose = "machine" if isinstance(error, MemoryError) else "device"
        return (
            f"the {whose} ran out of memory: ask for a smaller video (--num-frames, --height, "
            "--width), or use one with more"
        )
    # Usage errors say by format_message which option they are about, or nothing after the help.
    of_usage = getattr(error, "format_message", None)
    message = of_usage() if of_usage else str(error) or type(error).__name__
    # Errors about a field begin with its name, whether or not they carry it.
    begins = re.match(r"[\w.]+(?=[ =])", message)
    field = getattr(error, "field", begins and begins[0])
    return _with_flags(message, str(field), options) if field in options else message


def _paths_of(error: BaseException) -> str:
    names = [getattr(error, name, None) for name in ("filename", "filename2")]
    texts = [os.fsdecode(name) for name in names if isinstance(name, str | bytes | os.PathLike)]
    return f"{' to '.join(texts)}: " if texts else ""


def _without_bytes(error: UnicodeError) -> str:
    return getattr(error, "reason", None) or str(error)


def _with_flags(message: str, field: str, options: Mapping[str, str]) -> str:
    """Put the names of options for those of fields, as `--num-frames` for `num_frames`."""
    # Fields of one word are English, too: only the one that it is about is surely a field.
    for name in (field, *(other for other in options if "_" in other)):
        if options[name] not in message:
            message = re.sub(rf"(?<![\w-]){re.escape(name)}\b", options[name], message, count=1)
    return message if options[field] in message else f"{options[field]}: {message}"


def _internal_sentence(error: BaseException) -> str:
    what = f"internal error: {type(error).__name__}"
    if message := " ".join(str(error).split()):
        what += f": {shortened(message, _FAR_TOO_LONG)}"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="svg-jax-", suffix=".txt", delete=False,
            encoding="utf-8", errors="backslashreplace",
        ) as file:  # fmt: skip
            file.writelines(traceback.format_exception(error))
    except OSError:
        return f"{what}; the same command with --debug shows the traceback"
    return f"{what}; please report it with its traceback, which is in {file.name}"
