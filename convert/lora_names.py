"""What the names of a LoRA's tensors mean: which modules they change, and how.

Trainers write diffusers' names (of several ages), PEFT's, or those of the models' first releases.
diffusers 0.42.1, loaders/lora_conversion_utils.py and utils/state_dict_utils.py, reads the same.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from svg_jax.convert import original_hunyuan_video, original_wan

TRANSFORMER = "transformer"  # what names without a component's belong to
Kind = Literal["down", "up", "bias", "plain bias", "alpha"]

# "down" is A [rank, in], "up" is B [out, rank]. A "plain bias" is not scaled by alpha.
_KINDS: dict[str, Kind] = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_B.bias": "bias",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".diff_b": "plain bias",
    ".alpha": "alpha",
}
_OLD_PROCESSOR = re.compile(r"\.(?:processor\.)?to_(q|k|v|out)_lora\.(up|down)\.weight$")
_PEFT, _KOHYA, _RELEASED = "base_model.model.", "lora_unet_", "diffusion_model."


@dataclass(frozen=True)
class Part:
    """What one tensor of a LoRA is.

    Attributes:
        component: The component that it changes.
        modules: The modules, by diffusers' names; several are one module in the first releases,
            and share the rows of "up" in this order.
        kind: Which part of the change.
    """

    component: str
    modules: tuple[str, ...]
    kind: Kind


def read_name(key: str, components: Collection[str], into: str = TRANSFORMER) -> Part | None:
    """Reads the name of one tensor; None if no LoRA that can be merged has such a name.

    Args:
        key: The name.
        components: Components that a name may begin with; others belong to the transformer.
        into: The component that is meant by the transformer.
    """
    key = _OLD_PROCESSOR.sub(_new_processor, key)
    suffix = next((suffix for suffix in _KINDS if key.endswith(suffix)), None)
    if suffix is None:
        return None
    module, kind = key.removesuffix(suffix), _KINDS[suffix]
    if module.startswith(_KOHYA):
        modules = _released_modules(module.removeprefix(_KOHYA), "_")
        return Part(into, modules, kind) if modules else None
    component, _, rest = module.partition(".")
    if component == TRANSFORMER:
        component, module = into, rest
    elif component in components:
        module = rest
    else:
        component = into
        module = module.removeprefix(_RELEASED).removeprefix(_PEFT)
    return Part(component, _released_modules(module, ".") or (module,), kind)


def is_peft_name(key: str) -> bool:
    """Whether PEFT wrote the name, whose scale stands in another file."""
    return key.startswith(_PEFT)


def _new_processor(match: re.Match[str]) -> str:
    layer = "out.0" if match[1] == "out" else match[1]
    return f".to_{layer}.lora.{match[2]}.weight"


def _released_modules(name: str, separator: str) -> tuple[str, ...]:
    for source, targets in _RELEASED_NAMES.items():
        pattern = re.escape(source.replace(".", separator)).replace(r"\{\}", r"(\d+)")
        if match := re.fullmatch(pattern, name):
            return tuple(target.format(*match.groups()) for target in targets)
    return ()


# Left out, and so refused: what diffusers takes apart along the rank by mistake, which is
# HunyuanVideo's last modulation and its refiner's attention.
_RELEASED_NAMES = {
    line.source: tuple(name for name, _ in line.targets)
    for line in (*original_wan.transformer_table({}), *original_hunyuan_video.block_table())
}
