"""The names that trainers give the tensors of a LoRA, as data: prefixes, suffixes, other methods.

A name is a prefix, a module's name and a suffix. Modules have diffusers' names or those of a first
release (convert/lora/targets.py). A run of dots and underscores counts as one separator, since
trainers replace some or all of one by the other. docs/lora.md tells who writes what.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

TRANSFORMER = "transformer"  # the component of names that name none
Kind = Literal["down", "mid", "up", "bias", "difference", "bias difference", "alpha"]

# Prefixes of a module's name, several of which may follow each other, by the component they mean.
_COMPONENTS: Mapping[str, Sequence[str]] = {
    TRANSFORMER: (
        *("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer."),
        *("transformer_1.", "unet.", "pipe.dit.", "lora_unet_", "lora_transformer_", "lycoris_"),
        "Hunyuan_video_I2V_lora_",
    ),
    "transformer_2": ("transformer_2.", "pipe.dit2."),
    "text_encoder": ("text_encoder.", "text_encoders.", "lora_te_", "lora_te1_"),
    "text_encoder_2": ("text_encoder_2.", "lora_te2_"),
}
PREFIXES = {prefix: component for component, some in _COMPONENTS.items() for prefix in some}
PEFT = "base_model.model."
_MOST_PREFIXES = 5
# Another prefix is ignored if all names of a file have it. It must end in a dot, or in a word that
# is no part of a module's name (unlike "transformer_" of "transformer_blocks"), and contain neither
# a component's name nor a number.
_WRAPPER = re.compile(
    r"(?:.*\.)?(?:|\w*?(?:lora|lycoris|unet|dit|net|model|wan|hunyuan|cogvideox?|video|[it]2v)_)",
    re.IGNORECASE,
)
_NO_WRAPPER = re.compile(r"(?:^|\.)(?:\d+|(?:transformer|text_encoder|vae|controlnet)\w*)\.")


@dataclass(frozen=True)
class Suffix:
    """What the end of a tensor's name says about it.

    Attributes:
        kind: Part of a change that the tensor is: "down" is A [rank, in], "up" is B [out, rank],
            "mid" is the core between them [rank, rank, *kernel]; a "bias" is scaled as B A is, a
            difference only by the LoRA's strength.
        within: End of the module's name in the model.
        alpha: Alpha of files that do not contain it; None is the rank.
    """

    kind: Kind
    within: str = ""
    alpha: float | None = None


# {name} is an adapter's name, {n} counts the parts of a fused module.
_KINDS: Mapping[Kind, Sequence[str]] = {
    "down": (
        *(".lora_A.weight", ".lora_A.{name}.weight", ".lora_A", ".lora_down", ".lora_down.weight"),
        *(".lora_linear_layer.down.weight", ".lora_layer.down.weight"),
    ),
    "up": (
        *(".lora_B.weight", ".lora_B.{name}.weight", ".lora_B", ".lora_up", ".lora_up.weight"),
        *(".lora_linear_layer.up.weight", ".lora_layer.up.weight", ".matrix_B.{n}"),
    ),
    "mid": (".lora_mid.weight",),
    "bias": (".lora_B.bias", ".lora_B.{name}.bias"),
    "alpha": (".alpha", ".lora_alpha"),
    "difference": (".diff", ".w_norm"),
    "bias difference": (".diff_b", ".b_norm"),
}
SUFFIXES = {suffix: Suffix(kind) for kind, some in _KINDS.items() for suffix in some} | {
    ".matrix_A.{n}": Suffix("down", alpha=1.0),
    ".diff_m": Suffix("difference", within=".modulation"),
}
# Marks in the names of other methods' parts, which are refused.
_MARKS = {
    "a DoRA": (".dora_scale", ".lora_magnitude_vector", ".magnitude"),
    "a LoKr": (".lokr_",),
    "a LoHa": (".hada_",),
    "a BOFT": (".boft_",),
    "an OFT": (".oft_",),
    "an IA3": (".ia3_", ".on_input"),
    "a VeRA": (".vera_",),
    "a FourierFT": (".fourierft_",),
    "an HRA": (".hra_",),
    "a Bone": (".bone_",),
    "an AdaLoRA": (".lora_E", ".ranknum"),
    "a LoRA of an embedding": (".lora_embedding_",),
    "a LoRA of a weight that it enlarges": (".reshape_weight",),
    "a set of weights that replace others": (".set_weight",),
    "a GLoRA": (".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight"),
}
METHODS = {mark: method for method, marks in _MARKS.items() for mark in marks}
# ComfyUI's names of HunyuanVideo's modules, in the order in which it renames them.
COMFYUI = {
    "t_embedder.mlp.0": "t_embedder.in_layer",
    "t_embedder.mlp.2": "t_embedder.out_layer",
    "c_embedder.linear_1": "c_embedder.in_layer",
    "c_embedder.linear_2": "c_embedder.out_layer",
    "_mod.linear": "_mod.lin",
    ".modulation.linear": ".modulation.lin",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
    "_attn_q_norm": "_attn.norm.query_norm.scale",
    "_attn_k_norm": "_attn.norm.key_norm.scale",
    ".q_norm": ".norm.query_norm.scale",
    ".k_norm": ".norm.key_norm.scale",
    "_in.mlp.0": "_in.in_layer",
    "_in.mlp.2": "_in.out_layer",
}


def _pattern(template: str) -> re.Pattern[str]:
    pattern = re.sub(r"[._]", "[._]", template)
    pattern = pattern.replace("{name}", "[^.]+?").replace("{n}", r"(?P<n>\d{1,3})")
    return re.compile(f"(?P<module>.+?){pattern}")


# Adapters go first: one may be called "lora_up".
_ORDER = sorted(SUFFIXES, key=lambda suffix: "{name}" not in suffix)
_PATTERNS = [(_pattern(suffix), SUFFIXES[suffix]) for suffix in _ORDER]


@dataclass(frozen=True)
class Part:
    """A tensor's name, taken apart.

    Attributes:
        module: Name of the module, with all prefixes.
        suffix: Meaning of the name's end.
        number: Index of the part of a fused module, where the name counts them.
    """

    module: str
    suffix: Suffix
    number: int | None


def read_name(key: str) -> Part | None:
    """Take a tensor's name apart; None if no LoRA that can be merged has such a name."""
    name = re.sub(r"[._]{2,}", "_", key)
    for pattern, suffix in _PATTERNS:
        if match := pattern.fullmatch(name):
            number = match.groupdict().get("n")
            module = match["module"] + suffix.within
            return Part(module, suffix, None if number is None else int(number))
    return None


def name_method(key: str) -> str | None:
    """Name the other method that a tensor is part of, such as "a LoKr"; None if there is none."""
    for mark, method in METHODS.items():
        tail = "" if mark.endswith("_") else r"(?:\.|$)"
        if re.search(re.escape(mark) + tail, key):
            return method
    return None


def normal_name(module: str) -> str:
    """Bring a module's name into the form that all ways of writing it have in common."""
    name = re.sub(r"[._]+", "_", module).strip("_")
    name = name.removeprefix("text_model_")  # of CLIP's, which transformers drops since version 5
    return name.replace("_processor_", "_")  # diffusers' attention, until 2023


def readings(
    module: str, components: Collection[str], most: int = _MOST_PREFIXES
) -> Iterator[tuple[str, str]]:
    """Yield each component and name that a module's name may mean: the whole name, then less.

    Args:
        module: Name of the module, with prefixes.
        components: Components that a name may begin with, besides those in `PREFIXES`.
        most: Largest number of prefixes that follow each other.
    """
    yield TRANSFORMER, module
    prefixes = {f"{component}.": component for component in components} | PREFIXES if most else {}
    for prefix, component in prefixes.items():
        if module.startswith(prefix):
            for within, rest in readings(module.removeprefix(prefix), components, most - 1):
                yield (component if within == TRANSFORMER else within), rest


def is_wrapper(prefix: str) -> bool:
    """Return whether an unknown prefix may be ignored."""
    return _WRAPPER.fullmatch(prefix) is not None and _NO_WRAPPER.search(prefix) is None
