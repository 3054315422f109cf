"""The memory that a run needs at least, checked before the work."""

import math
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from svg_jax.models import VideoLayout
from svg_jax.sampling.settings import SettingError

_GB = 10**9


def check_memory(
    transformer: Any,
    layout: VideoLayout,
    latents: tuple[int, ...],
    *,
    guided: bool,
    video: tuple[int, int, int] | None,
) -> None:
    """Check that a run's memory can be there.

    Counts only what is certainly needed at one time, without weights and scratch: what fits always
    passes, and what passes may still be too large.

    Args:
        transformer: Denoiser, loaded or not.
        layout: Layout of the transformer's sequence.
        latents: Shape of the latents, the batch first.
        guided: Whether a step runs the model on two entries for each video.
        video: Frames, height and width in pixels; None if latents are not decoded.

    Raises:
        SettingError: If there is less memory than that.
    """
    config, dtype = transformer.config, transformer.dtype
    width = config.num_attention_heads * config.attention_head_dim
    hidden = latents[0] * (1 + guided) * layout.num_tokens * width * np.dtype(dtype).itemsize
    needed = 4 * math.prod(latents) + 4 * hidden  # hidden states, and query, key, value of them
    pixels = 0 if video is None else 3 * latents[0] * math.prod(video)
    for what, nbytes, limit in (
        (jax.devices()[0].device_kind, needed, _device_bytes()),
        ("this machine", 4 * pixels, _host_bytes()),  # float32 frames
    ):
        if limit is not None and nbytes > limit:
            size = "" if video is None else " of {} frames, {} × {} pixels".format(*video)
            raise SettingError(
                "num_frames",
                f"(or height, width, the number of videos) is too large: {latents[0]} video(s)"
                f"{size} take at least {nbytes / _GB:,.0f} GB, and {what} has {limit / _GB:,.0f}",
            )


def _device_bytes() -> int | None:
    device = jax.devices()[0]
    if device.platform == "cpu":
        return _host_bytes()
    return (device.memory_stats() or {}).get("bytes_limit")


def _host_bytes() -> int | None:
    """Count the bytes of memory that this process may use; None if the system does not tell."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
    try:  # of a container
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # none, or "max"
        return total
