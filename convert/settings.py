"""What a user asks of a conversion, as one value."""

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

    W becomes W + scale · alpha / rank · B A in float32, and then has its dtype again, as after
    diffusers' `fuse_lora`.

    Attributes:
        path: File of safetensors or torch.save, as any of the trainers in docs/lora.md writes it;
            a folder with one; or the hub's "owner/name" or "owner/name/file.safetensors".
        scale: Strength.
        into: Component that the LoRA means by the transformer. Wan 2.2 has a "transformer_2", for
            which diffusers has `load_into_transformer_2`.

    Raises:
        ConversionError: If one of them is not what it must be.
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
    """Make a value of each LoRA from what stands in separate lists.

    Args:
        lora: Path of a LoRA, or a list of them; None is none.
        lora_scale: Strength of all, or one for each.
        lora_into: Component that all of them are for, or one for each.

    Raises:
        ConversionError: If the lists do not fit each other; see `LoraSource`.
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
    """Make a list of one thing, or of a list, a tuple or an array of them; None is none."""
    if isinstance(given, list | tuple | np.ndarray):
        return list(np.atleast_1d(given)) if isinstance(given, np.ndarray) else list(given)
    return [] if given is None else [given]


@dataclass(frozen=True, kw_only=True)
class ConversionSettings:
    """What to convert, how, and to where.

    Attributes:
        source: Folder with model_index.json; or one as Wan-AI released it; or a component's with
            config.json, or a file of its weights with config.json beside it: the result then has
            that component alone, under the name of its role ("transformer", "vae", …), and makes no
            pipeline. Weights are safetensors, one file or shards, or those of an original release,
            of which config.json only has to say what they do not tell.
        destination: Folder to be made; None plans a conversion that cannot be written.
        revision: Branch, tag or commit, where the source is an id of the hub, which
            `hub.fetch_source` brings here.
        components: Components to convert, e.g. ("transformer", "text_encoder"); the others are left
            out and named in the manifest. None takes all and refuses those not ported yet.
        dtype: float32, float16 or bfloat16 to cast weights to, but those that the model keeps in
            float32 (Wan's time embedding, modulation and norms; T5's `wo` among float16). None
            keeps what is stored, tensor by tensor: a component may mix dtypes, the layers of one
            stacked weight may not.
        variant: Set of weights to take where a component has several, e.g. "fp16" for
            `diffusion_pytorch_model.fp16.safetensors`; a component without it gives its only set.
        weights_key: Which weights are meant where a file holds several, such as a trainer's and
            their moving average: the key that leads to them, or what stands before their names;
            "ema", "state_dict.ema". An error names those that there are.
        loras: LoRAs to merge into the weights, in this order.
        strict: Whether parts of a LoRA for layers that the model lacks (the image layers of one for
            image to video, on text to video) are an error; otherwise they are skipped, and named in
            the log and the manifest.
        allow_nonfinite: Whether to take weights that are NaN or infinite, and to count them in the
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
