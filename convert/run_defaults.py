"""svg_jax.json: a model folder's own defaults for running the model.

All keys are optional; others keep the default of the family. The file is copied when the folder is
converted or exported.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svg_jax.convert.errors import ConversionError
from svg_jax.convert.formats.json_file import read_json_if_any
from svg_jax.convert.formats.values import Number, Rule, Shares, sentence_of, shown

FILE = "svg_jax.json"
_LONGEST = 300  # characters of the problems in an error
RULES: Mapping[str, Rule] = {
    "num_inference_steps": Number(1, 1000, whole=True),
    "guidance_scale": Number(0, 1000),
    "guidance_interval": Shares(),
    "density": Number(1e-6, 1),
    "dense_steps": Number(0, 1),
    "dense_layers": Number(0, 1),
    "fps": Number(0.01, 1000),
    "enlarge": Number(1, 64, whole=True),
}
"""Rules for the values of each key, which are also those of the run settings of that name."""


@dataclass(frozen=True, kw_only=True)
class RunDefaults:
    """The content of svg_jax.json; None for keys that it leaves out.

    Attributes:
        num_inference_steps: Number of denoising steps.
        guidance_scale: Strength of guidance.
        guidance_interval: Start and end of the guided steps, as shares of all steps.
        density: Share of attention that is computed.
        dense_steps: Share of the steps, from the first, that stay dense.
        dense_layers: Share of the layers, from the first, that stay dense.
        fps: Frames per second of the video.
        enlarge: Factor by which the video's width and height are enlarged.
    """

    num_inference_steps: int | None = None
    guidance_scale: float | int | None = None
    guidance_interval: tuple[float | int, float | int] | None = None
    density: float | int | None = None
    dense_steps: float | int | None = None
    dense_layers: float | int | None = None
    fps: float | int | None = None
    enlarge: int | None = None

    @property
    def sparsity(self) -> dict[str, float | int]:
        """Fields of `SparsityConfig` that it gives."""
        return {} if self.density is None else {"density": self.density}

    @property
    def warmup(self) -> dict[str, float | int]:
        """Fields of `Warmup` that it gives."""
        fields = {"steps": self.dense_steps, "layers": self.dense_layers}
        return {name: value for name, value in fields.items() if value is not None}

    def given(self) -> dict[str, Any]:
        """Return the keys that are not left out, with their values."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if value is not None}


def read_run_defaults(folder: Path) -> RunDefaults:
    """Read the defaults of a model's folder, converted or not; empty ones if it has no such file.

    Raises:
        ConversionError: If the file is damaged, or has unknown keys or invalid values; names all.
    """
    file = folder / FILE
    values, problems = read_json_if_any(file), []
    if unknown := sorted(values.keys() - RULES.keys()):
        problems.append(f"there is no {shown(', '.join(unknown))}")
    for key, rule in RULES.items():
        if key in values and (problem := rule.problem(values[key])) is not None:
            problems.append(f"{key} {problem}")
    if problems:
        raise ConversionError(f"{file}: {sentence_of(problems, _LONGEST)}: correct it.")
    if "guidance_interval" in values:
        values["guidance_interval"] = tuple(values["guidance_interval"])
    return RunDefaults(**values)
