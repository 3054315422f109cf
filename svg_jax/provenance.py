"""The circumstances of a figure or a run: versions and device."""

import contextlib
import os
import platform
from pathlib import Path

import jax

from svg_jax.convert.versions import package_versions

_PACKAGES = ("svg-jax", "jax", "jaxlib", "flax", "numpy")
_OF_A_RUN = ("svg-jax", "jax", "jaxlib")


def versions() -> dict[str, str]:
    """Read the versions of Python and of the packages that compute."""
    return {"python": platform.python_version(), **package_versions(_PACKAGES)}


def device_name() -> str:
    """Name the accelerator, or the processor and the number of its cores that may be used."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # only Linux has it
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores"


def run_environment() -> dict[str, str]:
    """Collect what may change a run's bits beside its settings: versions and kind of device."""
    return package_versions(_OF_A_RUN) | {"device": jax.devices()[0].device_kind}
