"""What the names of a LoRA's tensors mean: which modules they change, and how.

Trainers write diffusers' names (of several ages), PEFT's, or those of the models' first releases.
diffusers 0.42.1, loaders/lora_conversion_utils.py and utils/state_dict_utils.py, reads the same.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

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


def read_name(key: str, components: Collection[str]) -> Part | None:
    """Reads the name of one tensor; None if no LoRA that can be merged has such a name.

    Args:
        key: The name.
        components: Components that a name may begin with; others belong to the transformer.
    """
    key = _OLD_PROCESSOR.sub(_new_processor, key)
    suffix = next((suffix for suffix in _KINDS if key.endswith(suffix)), None)
    if suffix is None:
        return None
    module, kind = key.removesuffix(suffix), _KINDS[suffix]
    if module.startswith(_KOHYA):
        modules = _released_modules(module.removeprefix(_KOHYA), "_")
        return Part("transformer", modules, kind) if modules else None
    component, _, rest = module.partition(".")
    if component in components:
        module = rest
    else:
        component = "transformer"
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


def _wan_names() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Of Wan-Video/Wan2.1, wan/modules/model.py."""
    embedder = "condition_embedder"
    for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        for a, b in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")):
            yield f"blocks.{{}}.{theirs}.{a}", (f"blocks.{{}}.{ours}.{b}",)
    for a in "kv":
        yield f"blocks.{{}}.cross_attn.{a}_img", (f"blocks.{{}}.attn2.add_{a}_proj",)
    yield "blocks.{}.ffn.0", ("blocks.{}.ffn.net.0.proj",)
    yield "blocks.{}.ffn.2", ("blocks.{}.ffn.net.2",)
    for part in ("time", "text"):
        for a, b in ((0, 1), (2, 2)):
            yield f"{part}_embedding.{a}", (f"{embedder}.{part}_embedder.linear_{b}",)
    yield "time_projection.1", (f"{embedder}.time_proj",)
    yield "img_emb.proj.1", (f"{embedder}.image_embedder.ff.net.0.proj",)
    yield "img_emb.proj.3", (f"{embedder}.image_embedder.ff.net.2",)
    yield "head.head", ("proj_out",)


def _hunyuan_video_names() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Of Tencent-Hunyuan/HunyuanVideo, hyvideo/modules/models.py.

    Left out, and so refused: what diffusers takes apart along the rank by mistake (the last
    modulation, the refiner's attention).
    """
    double, single = "transformer_blocks.{}", "single_transformer_blocks.{}"
    for stream, queries, to_out, norm, block in (
        ("img", "attn.to_{}", "to_out.0", "norm1", "ff"),
        ("txt", "attn.add_{}_proj", "to_add_out", "norm1_context", "ff_context"),
    ):
        source = f"double_blocks.{{}}.{stream}"
        yield f"{source}_attn_qkv", tuple(f"{double}.{queries.replace('{}', n)}" for n in "qkv")
        yield f"{source}_attn_proj", (f"{double}.attn.{to_out}",)
        yield f"{source}_mod.linear", (f"{double}.{norm}.linear",)
        yield f"{source}_mlp.fc1", (f"{double}.{block}.net.0.proj",)
        yield f"{source}_mlp.fc2", (f"{double}.{block}.net.2",)
    fused = (*(f"{single}.attn.to_{n}" for n in "qkv"), f"{single}.proj_mlp")
    yield "single_blocks.{}.linear1", fused
    yield "single_blocks.{}.linear2", (f"{single}.proj_out",)
    yield "single_blocks.{}.modulation.linear", (f"{single}.norm.linear",)
    for a, b in (("time_in", "timestep"), ("guidance_in", "guidance")):
        for layer in (0, 2):
            target = f"time_text_embed.{b}_embedder.linear_{layer // 2 + 1}"
            yield f"{a}.mlp.{layer}", (target,)
    yield "vector_in.in_layer", ("time_text_embed.text_embedder.linear_1",)
    yield "vector_in.out_layer", ("time_text_embed.text_embedder.linear_2",)
    yield "img_in.proj", ("x_embedder.proj",)
    yield "final_layer.linear", ("proj_out",)


_RELEASED_NAMES = dict([*_wan_names(), *_hunyuan_video_names()])
