"""The names that trainers give the tensors of a LoRA, as data: prefixes, suffixes, other methods.

A name is a prefix, a module's name and a suffix. Modules have diffusers' names or those of a first
release (convert/lora/targets.py). Dots and underscores are read alike, as many as there are, since
trainers turn some or all of one into the other. docs/lora.md says who writes what.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

TRANSFORMER = "transformer"  # what names without a component's belong to
Kind = Literal["down", "mid", "up", "bias", "difference", "bias difference", "alpha"]

# What may stand before a module's name, several of them one after the other, and the component
# that it means.
PREFIXES = {
    "base_model.model.": TRANSFORMER,
    "model.diffusion_model.": TRANSFORMER,
    "diffusion_model.": TRANSFORMER,
    "transformer.": TRANSFORMER,
    "transformer_1.": TRANSFORMER,
    "transformer_2.": "transformer_2",
    "unet.": TRANSFORMER,
    "pipe.dit.": TRANSFORMER,
    "pipe.dit2.": "transformer_2",
    "lora_unet_": TRANSFORMER,
    "lora_transformer_": TRANSFORMER,
    "lycoris_": TRANSFORMER,
    "Hunyuan_video_I2V_lora_": TRANSFORMER,
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoders.": "text_encoder",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
PEFT = "base_model.model."
_MOST_PREFIXES = 5
# Another prefix is passed over if all names of a file have it. It must end in a dot, or in a word
# that is no part of a module's name (as "transformer_" of "transformer_blocks" is), and name
# neither a component nor a number.
_WRAPPER = re.compile(
    r"(?:.*\.)?(?:|\w*?(?:lora|lycoris|unet|dit|net|model|wan|hunyuan|cogvideox?|video|[it]2v)_)",
    re.IGNORECASE,
)
_NO_WRAPPER = re.compile(r"(?:^|\.)(?:\d+|(?:transformer|text_encoder|vae|controlnet)\w*)\.")


@dataclass(frozen=True)
class Suffix:
    """What the end of a tensor's name says of it.

    Attributes:
        kind: Which part of a change it is. "down" is A [rank, in], "up" is B [out, rank], "mid" the
            core between them [rank, rank, *kernel]; a "bias" is scaled as B A is, a difference
            by the strength alone.
        within: What follows the module's name in the model.
        alpha: Alpha where the file does not tell it; None is the rank.
    """

    kind: Kind
    within: str = ""
    alpha: float | None = None


# {name} is an adapter's name, {n} counts the parts of a fused module.
SUFFIXES = {
    ".lora_A.weight": Suffix("down"),
    ".lora_B.weight": Suffix("up"),
    ".lora_B.bias": Suffix("bias"),
    ".lora_A.{name}.weight": Suffix("down"),
    ".lora_B.{name}.weight": Suffix("up"),
    ".lora_B.{name}.bias": Suffix("bias"),
    ".lora_A": Suffix("down"),
    ".lora_B": Suffix("up"),
    ".lora_down": Suffix("down"),
    ".lora_up": Suffix("up"),
    ".lora_down.weight": Suffix("down"),
    ".lora_mid.weight": Suffix("mid"),
    ".lora_up.weight": Suffix("up"),
    ".lora_linear_layer.down.weight": Suffix("down"),
    ".lora_linear_layer.up.weight": Suffix("up"),
    ".lora_layer.down.weight": Suffix("down"),
    ".lora_layer.up.weight": Suffix("up"),
    ".matrix_A.{n}": Suffix("down", alpha=1.0),
    ".matrix_B.{n}": Suffix("up"),
    ".alpha": Suffix("alpha"),
    ".lora_alpha": Suffix("alpha"),
    ".diff": Suffix("difference"),
    ".w_norm": Suffix("difference"),
    ".diff_b": Suffix("bias difference"),
    ".b_norm": Suffix("bias difference"),
    ".diff_m": Suffix("difference", within=".modulation"),
}
# What a name holds that is part of another method, which is told by its name and refused.
METHODS = {
    ".dora_scale": "a DoRA",
    ".lora_magnitude_vector": "a DoRA",
    ".magnitude": "a DoRA",
    ".lokr_": "a LoKr",
    ".hada_": "a LoHa",
    ".boft_": "a BOFT",
    ".oft_": "an OFT",
    ".ia3_": "an IA3",
    ".on_input": "an IA3",
    ".vera_": "a VeRA",
    ".fourierft_": "a FourierFT",
    ".hra_": "an HRA",
    ".bone_": "a Bone",
    ".lora_E": "an AdaLoRA",
    ".ranknum": "an AdaLoRA",
    ".lora_embedding_": "a LoRA of an embedding",
    ".reshape_weight": "a LoRA of a weight that it enlarges",
    ".set_weight": "a set of weights that replace others",
    ".a1.weight": "a GLoRA",
    ".a2.weight": "a GLoRA",
    ".b1.weight": "a GLoRA",
    ".b2.weight": "a GLoRA",
}
# What ComfyUI calls the modules of HunyuanVideo, in the order in which it renames them.
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


@dataclass(frozen=True)
class Part:
    """What a name says of its tensor.

    Attributes:
        module: The module's name, prefix and all.
        suffix: What the end of the name says.
        number: Which part of a fused module, where the name counts them.
    """

    module: str
    suffix: Suffix
    number: int | None


def read_name(key: str) -> Part | None:
    """Take a tensor's name apart; None if no LoRA that can be merged has such a name."""
    name = re.sub(r"[._]{2,}", "_", key)
    for pattern, suffix in _patterns():
        if match := pattern.fullmatch(name):
            number = match.groupdict().get("n")
            module = match["module"] + suffix.within
            return Part(module, suffix, None if number is None else int(number))
    return None


def name_method(key: str) -> str | None:
    """Name the other method that a tensor is part of, from "a LoKr" to "a GLoRA"; None if none."""
    for mark, method in METHODS.items():
        tail = "" if mark.endswith("_") else r"(?:\.|$)"
        if re.search(re.escape(mark) + tail, key):
            return method
    return None


def normal_name(module: str) -> str:
    """Bring a module's name into the form in which all ways of writing it are the same."""
    name = re.sub(r"[._]+", "_", module).strip("_")
    name = name.removeprefix("text_model_")  # of CLIP's, which transformers drops since version 5
    return name.replace("_processor_", "_")  # diffusers' attention, until 2023


def readings(
    module: str, components: Collection[str], most: int = _MOST_PREFIXES
) -> Iterator[tuple[str, str]]:
    """Give each component and name that a module's name may mean: the whole name, then less.

    Args:
        module: The module's name, with prefixes.
        components: Components that a name may begin with, besides those in `PREFIXES`.
        most: How many prefixes may follow each other.
    """
    yield TRANSFORMER, module
    prefixes = {f"{component}.": component for component in components} | PREFIXES if most else {}
    for prefix, component in prefixes.items():
        if module.startswith(prefix):
            for within, rest in readings(module.removeprefix(prefix), components, most - 1):
                yield (component if within == TRANSFORMER else within), rest


def is_wrapper(prefix: str) -> bool:
    """Return whether a prefix that is not known can be one."""
    return _WRAPPER.fullmatch(prefix) is not None and _NO_WRAPPER.search(prefix) is None


@cache
def _patterns() -> tuple[tuple[re.Pattern[str], Suffix], ...]:
    return tuple((_pattern(template), suffix) for template, suffix in SUFFIXES.items())


def _pattern(template: str) -> re.Pattern[str]:
    pattern = re.sub(r"[._]", "[._]", template)
    pattern = pattern.replace("{name}", "[^.]+?").replace("{n}", r"(?P<n>\d{1,3})")
    return re.compile(f"(?P<module>.+?){pattern}")
