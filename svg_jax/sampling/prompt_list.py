"""The videos of one prompt or of a list of prompts, each in a file of its own.

Beside an output `cat.mp4` stands `.cat.mp4.state` while it is made (see `run_state`) and, for a
list of prompts, `.cat.mp4.json` afterwards: the settings that it was made by, and its digest.
"""

import dataclasses
import json
import logging
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from svg_jax.convert.files import open_regular, remove_leftovers, written_atomically
from svg_jax.convert.formats.digests import file_digest
from svg_jax.convert.formats.json_file import parse_json
from svg_jax.sampling import VideoOutput, VideoPipeline
from svg_jax.sampling.components import loading_once
from svg_jax.sampling.identity import check_same_run
from svg_jax.sampling.prepared_run import PreparedRun
from svg_jax.sampling.records import SamplingInfo, StepRecord
from svg_jax.sampling.run_state import RunFile
from svg_jax.sampling.settings import RunSettings, with_values

_PROMPTS_AT_ONCE = 16  # encoded together: Wan's 720p waits with 0.1 GB of host memory for each
_PROMPTS_BYTES = 2**24
_RECORD_BYTES = 2**20
_FIELD = re.compile(r"0?[0-9]{0,2}d?")  # what may stand behind {index:
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class VideoJob:
    """A video to make.

    Attributes:
        settings: Settings of its run.
        output: Path of the file to write.
        fingerprint: Identity of the run and of the written file.
        file: State to continue from and to save.
    """

    settings: RunSettings
    output: Path
    fingerprint: Mapping[str, Any]
    file: RunFile


def read_prompts(path: Path) -> list[str]:
    """Read one prompt a line, in UTF-8; skip blank lines and those that begin with #.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no regular file, is not UTF-8, or holds no prompt.
    """
    with open_regular(path) as file:
        content = file.read(_PROMPTS_BYTES + 1)
    if len(content) > _PROMPTS_BYTES:
        raise ValueError(f"{path} is no list of prompts: it has over {_PROMPTS_BYTES:,} bytes")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{path} is not UTF-8 in line {line}: save it as UTF-8") from error
    lines = [line.strip() for line in text.splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ValueError(f"{path} holds no prompt: write one a line")
    return prompts


def output_paths(output: Path, count: int) -> list[Path]:
    """Name the file of each prompt by a pattern such as out/{index:03d}.gif, or in a folder.

    Raises:
        ValueError: If the output is neither, or the pattern gives two prompts one name.
    """
    if "{" not in str(output):
        if output.suffix and not output.is_dir():
            raise ValueError(
                f"output must be a folder for several prompts, or a pattern such as "
                f"{output.stem}-{{index:03d}}{output.suffix}: got {output}"
            )
        output = output / "{index:03d}.mp4"
    if not _is_pattern(str(output)):
        raise ValueError(f"output must have a pattern like out/{{index:03d}}.mp4: got {output}")
    paths = [Path(str(output).format(index=index)) for index in range(count)]
    if len(set(paths)) != count:
        raise ValueError(f"output gives two prompts one file: put {{index}} into {output}")
    return paths


def _is_pattern(text: str) -> bool:
    """Tell whether the only fields of a format are {index}, of at most 99 digits."""
    try:
        fields = [part[1:] for part in string.Formatter().parse(text) if part[1] is not None]
    except ValueError:
        return False
    return all(
        name == "index" and _FIELD.fullmatch(form or "") and conversion is None
        for name, form, conversion in fields
    )


def plan_videos(
    pipeline: VideoPipeline,
    prompts: Mapping[Path, str | None],
    settings: RunSettings,
    *,
    written_as: Mapping[str, Any] | None,
) -> list[VideoJob]:
    """List the videos that are left to make, in order.

    Args:
        pipeline: Pipeline that generates.
        prompts: Prompt of each video by its output; None where embeddings were given.
        settings: Settings of all videos but for the prompt; each is saved beside its output.
        written_as: Settings of the files themselves, such as frames per second: outputs that were
            made by the same settings are left out. None makes every output.

    Raises:
        FileExistsError: If work would be lost: a state that is not to be resumed or, where
            `written_as` is given, an output of unknown origin.
        ValueError: If a state or an output is of other settings; see also `open_run_file`.
    """
    jobs = []
    for output, prompt in prompts.items():
        own = with_values(settings, prompt=prompt, state_file=state_path(output))
        fingerprint = pipeline.fingerprint(own) | dict(written_as or {})
        remove_leftovers(output)
        if written_as is not None and _is_done(output, fingerprint, own):
            continue
        file = pipeline.open_run_file(own)
        is_foreign = output.exists() and not _record_path(output).exists()
        if written_as is not None and is_foreign and file.arrays is None:
            raise FileExistsError(
                f"{output} is there and was not made from a list of prompts: remove it, or choose "
                "another output"
            )
        jobs.append(VideoJob(own, output, fingerprint, file))
        if file.arrays is not None:
            done = len(file.records)
            _LOGGER.warning("%s: continuing after step %d", output, done)
    return jobs


def generate_videos(
    pipeline: VideoPipeline,
    jobs: Sequence[VideoJob],
    *,
    write: Callable[[VideoOutput, Path], None],
    keep_record: bool,
    callback_on_step_end: Callable[[StepRecord], None] | None = None,
) -> None:
    """Make the planned videos.

    The weights of a stage are loaded once for up to 16 prompts, and freed before the next stage
    loads. Each of several videos is decoded while the transformer stays in memory if there is room
    for both, else at the end.

    Args:
        pipeline: Pipeline that generates.
        jobs: Jobs from `plan_videos`.
        write: Function that writes an outcome to a file.
        keep_record: Whether to write the settings of each output beside it.
        callback_on_step_end: Function that is called with the record of each computed step.
    """

    def finish(decoder: VideoPipeline, job: VideoJob, run: PreparedRun, info: SamplingInfo) -> None:
        tiling = job.settings.vae_tiling
        video = decoder.decode(_moved(run, jax.device_put), info, vae_tiling=tiling)
        try:
            write(video, job.output)
        except OSError as error:
            if not job.file.path.exists():
                raise
            raise OSError(
                error.errno,
                f"cannot be written ({error.strerror}): the run is saved; resume=True continues "
                "from there",
                error.filename or str(job.output),
            ) from error
        if keep_record:
            record = {"sha256": file_digest(job.output), "fingerprint": dict(job.fingerprint)}
            with written_atomically(_record_path(job.output)) as temporary:
                temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        job.file.remove()

    def make(some: Sequence[VideoJob]) -> None:
        encoder = loading_once(pipeline) if len(some) > 1 else pipeline
        runs = [_moved(encoder.prepare(job.settings), jax.device_get) for job in some]
        del encoder
        denoiser, waiting, has_room = loading_once(pipeline), [], True
        for job, run in zip(some, runs, strict=True):
            after, steps = denoiser.denoise(
                _moved(run, jax.device_put),
                file=job.file,
                callback_on_step_end=callback_on_step_end,
            )
            outcome = job, _moved(after, jax.device_get), SamplingInfo(steps)
            del after
            if has_room and job is not some[-1]:
                has_room = _fits(lambda outcome=outcome: finish(denoiser, *outcome))
            if not has_room or job is some[-1]:
                waiting.append(outcome)
        del denoiser
        decoder = loading_once(pipeline)
        for outcome in waiting:
            finish(decoder, *outcome)

    try:
        for start in range(0, len(jobs), _PROMPTS_AT_ONCE):
            make(jobs[start : start + _PROMPTS_AT_ONCE])
    except KeyboardInterrupt:
        for job in jobs:
            if job.file.path.exists():
                _LOGGER.warning(
                    "%s: its state is saved; resume=True continues from there", job.output
                )
        raise


def _moved(run: PreparedRun, move: Callable[[Any], Any]) -> PreparedRun:
    return dataclasses.replace(run, state=move(run.state), conditions=move(run.conditions))


def _fits(call: Callable[[], None]) -> bool:
    """Call a function, and tell whether the device had the memory for it."""
    try:
        call()
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return False
    return True


def state_path(output: Path) -> Path:
    """Name the file of a run's state, beside its output."""
    return output.with_name(f".{output.name}.state")


def _record_path(output: Path) -> Path:
    return output.with_name(f".{output.name}.json")


def _is_done(output: Path, fingerprint: Mapping[str, Any], settings: RunSettings) -> bool:
    """Tell whether an output is there, whole and by these settings; refuse one by others."""
    file = _record_path(output)
    if not (output.exists() and file.exists()):
        return False
    try:
        with open_regular(file) as content:
            record = parse_json(content.read(_RECORD_BYTES), file)
        saved, digest = dict(record["fingerprint"]), record["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: remove it and {output.name} to start anew") from error
    check_same_run(output, saved, fingerprint, settings)
    return digest == file_digest(output)
