"""When, how and where a figure was measured."""

import datetime
import sys
from typing import Any

from svg_jax.provenance import device_name, versions


def provenance_of(script: str) -> dict[str, Any]:
    """Collect date, command, device and versions of a measurement.

    Args:
        script: Path of the running script, from the top of the tree.
    """
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": " ".join(["python", script, *sys.argv[1:]]),
        "device": device_name(),
        "versions": versions(),
    }
