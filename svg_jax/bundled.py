"""The model that comes with the package, by the name "tiny"."""

import logging
from importlib.resources import files
from pathlib import Path

NAME = "tiny"
FOLDER = Path(str(files("svg_jax"))) / "assets" / "tiny_cogvideox"  # in diffusers' layout
_LOGGER = logging.getLogger(__name__)


def bundled_or(model: str | Path) -> str | Path:
    """Turn "tiny" into the bundled model's folder; return everything else unchanged.

    A folder of that name in the working directory goes first, which is logged.

    Args:
        model: Name, path or hub id of a model.
    """
    if str(model) != NAME:
        return model
    if Path(NAME).exists():
        _LOGGER.info("./%s is taken for the model, not the bundled one of that name", NAME)
        return model
    return FOLDER
