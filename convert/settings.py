"""Settings of a conversion, as one value."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from svg_jax.convert.errors import ConversionError
from svg_jax.convert.formats.values import is_number, shown
from svg_jax.convert.tables.lora_names import TRANSFORMER

_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class LoraSource:
    """A LoRA to merge into the weights.

    W becomes W + scale · alpha / rank · B A, computed in float32 and cast back to W's dtype, as
    diffusers' `fuse_lora` does.

    Attributes:
        path: File in the format of safetensors or torch.save, by any of the trainers in
            docs/lora.md; a folder with one; or the hub's "owner/name" or
            "owner/name/file.safetensors".
        scale: Strength of the LoRA.
        into: Component that receives the LoRA's layers of a "transformer", such as Wan 2.2's
            "transformer_2"; diffusers has `load_into_transformer_2` for that.

    Raises:
        ConversionError: If a value has the wrong type, or the scale is not finite.
    """

    path: str | Path
    scale: float = 1.0
    into: str = TRANSFORMER

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | Path):
            raise ConversionError(f"lora={shown(self.path)}: must be a path, or a list of paths.")
        if not is_number(self.scale) or not -_LARGEST <= self.scale <= _LARGEST:
            raise ConversionError(
                f"{self.path}: its scale is {shown(self.scale)} and must be a finite number of "
                "float32."
            )
        object.__setattr__(self, "scale", float(self.scale))
        if not isinstance(self.into, str):
            raise ConversionError(f"lora_into={shown(self.into)}: must be a component's name.")


def list_loras(
    lora: str | Path | Sequence[str | Path] | None,
    lora_scale: float | Sequence[float] = 1.0,
    lora_into: str | Sequence[str] = TRANSFORMER,
) -> tuple[LoraSource, ...]:
    """Combine separate lists of paths, scales and components into a value per LoRA.

    Args:
        lora: Path of a LoRA, or a list of them; None means no LoRA.
        lora_scale: Strength of all LoRAs, or one for each.
        lora_into: Component of all LoRAs, or one for each; see `LoraSource`.

    Raises:
        ConversionError: If the lists differ in length, or a value is wrong; see `LoraSource`.
    """
    paths, scales, names = _listed(lora), _listed(lora_scale), _listed(lora_into)
    if not paths and (scales not in ([], [1.0]) or names not in ([], [TRANSFORMER])):
        raise ConversionError(
            f"lora_scale={shown(scales)}, lora_into={shown(names)}: say nothing without a LoRA: "
            "give one."
        )
    for what, given in (("scales", scales), ("components", names)):
        if len(given) == 1:
            given *= len(paths)
        if len(given) != len(paths):
            raise ConversionError(
                f"{len(given)} {what} for {len(paths)} LoRAs: give one for all, or one for each."
            )
    return tuple(map(LoraSource, paths, scales, names))


def _listed(given: Any) -> list[Any]:
    """Make a list of one value, or of a list, a tuple or an array; an empty one of None."""
    if isinstance(given, np.ndarray):
        given = list(np.atleast_1d(given))
    if isinstance(given, list | tuple):
        return list(given)
    return [] if given is None else [given]


@dataclass(frozen=True, kw_only=True)
class ConversionSettings:
    """What to convert, how, and where to.

    Attributes:
        source: Folder of a pipeline with model_index.json, or as Wan-AI released it; or folder of a
            component with config.json, or file of its weights with config.json beside it. A
            component is converted alone, under the name of its role ("transformer", "vae", …).
            Weights are safetensors, in one file or in shards, or those of an original release,
            whose config.json only has to give what the tensors do not tell.
        destination: Folder to write; None for a plan that is not to be written.
        revision: Branch, tag or commit of a source that is an id of the hub.
        components: Names of components to convert, e.g. ("transformer", "text_encoder"); the others
            are left out and named in the manifest. None converts all and refuses those that are not
            ported yet.
        dtype: Dtype to cast weights to (float32, float16 or bfloat16), except those that the model
            keeps in float32: Wan's time embedding, modulation and norms; T5's `wo` in float16. None
            keeps each tensor's; the layers of one stacked weight then must not differ.
        variant: Variant of the weights, e.g. "fp16" for
            `diffusion_pytorch_model.fp16.safetensors`; components that lack it give the plain ones.
        weights_key: Key or prefix of the weights to read where a file holds several sets, such as a
            trainer's weights and their moving average: "ema", "state_dict.ema". An error lists the
            keys that there are.
        loras: LoRAs to merge into the weights, in this order.
        strict: Whether parts of a LoRA whose layers the model lacks (image layers, if the model is
            text to video) are an error; otherwise they are skipped, and named in the log and the
            manifest.
        allow_nonfinite: Whether to accept weights that are NaN or infinite, and count them in the
            manifest; otherwise they are an error.
        overwrite: Whether to replace a checkpoint folder that is at `destination`.
    """

    source: str | Path
    destination: str | Path | None = None
    revision: str | None = None
    components: Collection[str] | None = None
    dtype: DTypeLike | None = None
    variant: str | None = None
    weights_key: str | None = None
    loras: tuple[LoraSource, ...] = ()
    strict: bool = False
    allow_nonfinite: bool = False
    overwrite: bool = False
