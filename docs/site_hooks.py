"""What the site needs beside MkDocs: one package to read, tables of settings, plain fences."""

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority

from svg_jax.sampling.cogvideox.settings import CogVideoXSettings
from svg_jax.sampling.hunyuan_video.settings import HunyuanVideoSettings
from svg_jax.sampling.settings.fields import defaults_of, help_of, option_of, settings_of
from svg_jax.sampling.settings.run import RunSettings
from svg_jax.sampling.wan.settings import WanSettings

ROOT = Path(__file__).parents[1]
FOLDERS = ("models", "kernels", "convert")  # which install under svg_jax
SETTINGS = (RunSettings, CogVideoXSettings, HunyuanVideoSettings, WanSettings)
_TREE = tempfile.TemporaryDirectory(prefix="svg-jax-docs-")


@event_priority(100)  # before mkdocstrings reads its configuration
def on_config(config: Any) -> Any:
    """Lay out the four folders as the one package that they are installed as."""
    package = Path(_TREE.name) / "svg_jax"
    skipped = shutil.ignore_patterns("__pycache__", "assets")
    for name in ("svg_jax", *FOLDERS):
        place = package if name == "svg_jax" else package / name
        shutil.copytree(ROOT / name, place, ignore=skipped, dirs_exist_ok=True)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_TREE.name]
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put in the tables of settings, and drop what fences tell the tests ("sh hub")."""
    for kind in SETTINGS:
        markdown = markdown.replace(f"<!-- settings: {kind.__name__} -->", settings_table(kind))
    return re.sub(r"^```(\w+) (?:gpu|hub)$", r"```\1", markdown, flags=re.MULTILINE)


def settings_table(kind: type) -> str:
    """Make the table of a family's settings, or of all runs' settings, from their fields."""
    shared = settings_of(RunSettings) if kind is not RunSettings else {}
    lines = ["| setting | option | meaning |", "|---|---|---|"]
    for name, setting in settings_of(kind).items():
        if name not in shared:
            option = option_of(name, setting)
            meaning = help_of(setting, defaults_of(kind)[name]).replace("|", "\\|")
            lines.append(f"| `{name}` | {f'`{option}`' if option else ''} | {meaning} |")
    return "\n".join(lines)
