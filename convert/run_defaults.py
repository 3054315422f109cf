"""The file by which a model's folder may say how the model is best run: svg_jax.json.

All of its keys are optional; what it leaves out is the family's own. It is carried over when the
folder is converted or exported.
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
_LONGEST = 300  # characters of what is wrong
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
"""What the values of each key must be; those of a run's settings of the same name, too."""


@dataclass(frozen=True, kw_only=True)
class RunDefaults:
    """What a model's folder says of a run; None where it says nothing.

    Attributes:
        num_inference_steps: Denoising steps.
        guidance_scale: Strength of guidance.
        guidance_interval: The first and the last share of the steps that guidance is paid for.
        density: Kept share of attention.
        dense_steps: Share of the steps, from the first on, that stay dense.
        dense_layers: Share of the layers, from the first on, that stay dense.
        fps: Frames per second of the video.
        enlarge: Pixels to show each pixel as, each way.
    """

    num_inference_steps: int | None = None
    guidance_scale: float | int | None = None
    guidance_interval: tuple[float | int, float | int] | None = None
    density: float | int | None = None
    dense_steps: float | int | None = None
    dense_layers: float | int | None = None
    fps: float | int | None = None
    enlarge: int | None = None

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> "RunDefaults":
        """Read the dict of svg_jax.json.

        Raises:
            ValueError: At unknown keys and at values without meaning; names all of them.
        """
        problems = []
        if unknown := sorted(entries.keys() - RULES.keys()):
            problems.append(f"there is no {shown(', '.join(unknown))}")
        for key, rule in RULES.items():
            if key in entries and (problem := rule.problem(entries[key])) is not None:
                problems.append(f"{key} {problem}")
        if problems:
            raise ValueError(sentence_of(problems, _LONGEST))
        values = dict(entries)
        if "guidance_interval" in values:
            start, end = values["guidance_interval"]
            values["guidance_interval"] = start, end
        return cls(**values)

    @property
    def sparsity(self) -> dict[str, float | int]:
        """What it says of a `SparsityConfig`."""
        return {} if self.density is None else {"density": self.density}

    @property
    def warmup(self) -> dict[str, float | int]:
        """What it says of a `Warmup`."""
        fields = {"steps": self.dense_steps, "layers": self.dense_layers}
        return {name: value for name, value in fields.items() if value is not None}

    def given(self) -> dict[str, Any]:
        """What it says, without what it leaves out."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if value is not None}


def read_run_defaults(folder: Path) -> RunDefaults:
    """The defaults of a model's folder, converted or not; none if it has no such file.

    Raises:
        ConversionError: If the file is damaged, or holds anything that has no meaning.
    """
    file = folder / FILE
    try:
        return RunDefaults.from_dict(read_json_if_any(file))
    except ConversionError:
        raise
    except ValueError as error:
        raise ConversionError(f"{file}: {error}: correct it.") from error
