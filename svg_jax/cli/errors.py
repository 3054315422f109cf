"""One sentence and an exit code for every exception that ends a command.

There are three kinds:

* **Bad input**: an exception with an exit code of its own (of the converter, of wrong usage), a
  ValueError raised on purpose, and the exceptions of libraries that read files.
* **The system refuses**: OSError, and a lack of memory.
* **An internal error** is any other exception. So is a ValueError from jax or numpy, or from
  compiled code such as `int(text)`: if the input were to blame, this package should have refused it
  earlier. The traceback goes into a file.
"""

import dis
import errno
import os
import re
import shlex
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
    """Exit code of a command."""

    NOT_FINITE = 1  # the run itself gave values that are not finite
    BAD_INPUT = 2  # also wrong usage
    REFUSED = 3  # the disk, a right, a lock, the memory
    DAMAGED = 4  # a converted folder has changed
    INTERNAL = 70
    INTERRUPTED = 130


@dataclass(frozen=True)
class Failure:
    """How a command ends.

    Attributes:
        code: Exit code.
        sentence: Message to print; empty if nothing is left to say.
    """

    code: int
    sentence: str


_BAD_PATHS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)
_BAD_PATH_NUMBERS = {errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}
# Exceptions of libraries that read and write files, by name, so that they need no import here.
_READERS = {
    "PIL.UnidentifiedImageError": ExitCode.BAD_INPUT,
    "PIL.Image.DecompressionBombError": ExitCode.BAD_INPUT,
    "av.error.FFmpegError": ExitCode.BAD_INPUT,
    "httpx.HTTPError": ExitCode.REFUSED,
}
_COMPUTING = {"jax", "jaxlib", "flax", "numpy", "orbax", "tensorstore"}  # see no raw input
_PARSERS = {"json", "ast", "re", "pickle", "zipfile"}  # recurse as deep as their input nests
_ARGUMENT = re.compile(
    r"(?<![\w.-])(?P<name>\w+)=(?P<value>\([^()]*\)|'[^']*'|…|[\w.]*\w)"
    r"|(?<=\bpass )(?P<asked>\w+)\b"
)
_FAR_TOO_LONG = 200  # characters of an internal error's message


def failure_of(error: BaseException, options: Mapping[str, str] | None = None) -> Failure:
    """Choose the exit code and the message for an exception that ended a command.

    Args:
        error: The exception.
        options: Names of the command's options by field; they replace the fields in the message.
    """
    if isinstance(error, KeyboardInterrupt):
        return Failure(ExitCode.INTERRUPTED, "")
    code = _foreseen_code(error)
    if code is None:
        return Failure(ExitCode.INTERNAL, _internal_sentence(error))
    return Failure(code, in_options(_sentence(error, options or {}), options or {}))


def _foreseen_code(error: BaseException) -> int | None:
    """Choose the exit code of an expected exception; None for an internal error."""
    own = getattr(error, "exit_code", None)
    if isinstance(own, int):
        return own
    of_system = isinstance(error, OSError) and error.errno  # a library may pass on the disk's
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
        case ValueError() if _is_deliberate(error):
            return ExitCode.BAD_INPUT
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    """Tell whether Python, XLA or CUDA ran out of memory, by the words that each uses."""
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


def _is_deliberate(error: ValueError) -> bool:
    """Tell whether a `raise` statement refuses the input, rather than compiled code fails."""
    last, package = _last_frame(error), _package_of(error)
    if last is not None and package == __name__.partition(".")[0]:
        return dis.opname[last.tb_frame.f_code.co_code[last.tb_lasti]] == "RAISE_VARARGS"
    return package not in _COMPUTING


def _sentence(error: BaseException, options: Mapping[str, str]) -> str:
    """Describe an expected exception."""
    if reason := getattr(error, "strerror", None):  # OSError and FFmpeg's
        return f"{_paths_of(error)}{reason}"
    match error:
        case ModuleNotFoundError():
            return str(missing_package(error))
        case RecursionError():
            return "the input is nested too deeply to be read"
        case UnicodeError():
            return f"the input, or a path, is not UTF-8: {getattr(error, 'reason', error)}"
        case EOFError() | zipfile.BadZipFile():
            return f"an input file is damaged or cut off: {str(error) or 'it ends early'}"
    if _is_out_of_memory(error):
        whose = "machine" if isinstance(error, MemoryError) else "device"
        return (
            f"the {whose} ran out of memory: make a smaller video (--num-frames, --height, "
            f"--width), or use a {whose} with more memory"
        )
    # Usage errors name their option in format_message, and are empty after the help.
    of_usage = getattr(error, "format_message", None)
    message = of_usage() if of_usage else str(error) or type(error).__name__
    message = message.replace(": Value error, ", ": ")  # pydantic's, by which typer checks choices
    # Errors about a field begin with its name, even if they have no attribute `field`.
    begins = re.match(r"[\w.]+(?=[ =])", message)
    field = getattr(error, "field", begins and begins[0])
    return _with_flags(message, str(field), options) if field in options else message


def _paths_of(error: BaseException) -> str:
    names = [getattr(error, name, None) for name in ("filename", "filename2")]
    texts = [os.fsdecode(name) for name in names if isinstance(name, str | bytes | os.PathLike)]
    return f"{' to '.join(texts)}: " if texts else ""


def in_options(message: str, options: Mapping[str, str]) -> str:
    """Replace the arguments that a message asks for, such as `resume=True`, by their options.

    Args:
        message: Message of the library, which names `argument=value`, or says "pass argument".
        options: Names of the command's options by field.
    """

    def option(found: re.Match[str]) -> str:
        name, value = found["asked"] or found["name"], found["value"]
        if name not in options:
            return found[0]
        if value in (None, "True", "…"):
            return options[name]
        is_tuple = value.startswith("(")
        value = ",".join(re.findall(r"[\w.-]+", value)) if is_tuple else value.strip("'")
        return f"{options[name]} {shlex.quote(value)}"

    return _ARGUMENT.sub(option, message)


def _with_flags(message: str, field: str, options: Mapping[str, str]) -> str:
    """Replace the names of fields by their options', as `num_frames` by `--num-frames`."""
    # A field's name of one word may be plain English, unless the message is about that field.
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
