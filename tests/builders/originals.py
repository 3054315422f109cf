"""What tests of original releases share: their tensors' names and shapes, and where each goes."""

import itertools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import torch
from diffusers.loaders import single_file_utils
from flax import nnx

from svg_jax.convert import convert_state
from svg_jax.convert.formats.stored_tensor import read_tensor
from svg_jax.convert.releases.recognise import read_original
from svg_jax.convert.tables.registry import MODEL_CLASSES

DATA = Path(__file__).parents[1] / "data"
HOMES = {"inventory": Path(__file__).parents[2] / "inventories", "original": DATA / "original"}
# What diffusers makes of a release, where its wheel has that.
CONVERSIONS = {
    "hunyuanvideo-t2v-transformer": "convert_hunyuan_video_transformer_to_diffusers",
    "hunyuanvideo-i2v-33ch-transformer": "convert_hunyuan_video_transformer_to_diffusers",
    "wan2.1-t2v-1.3b-transformer": "convert_wan_transformer_to_diffusers",
    "wan2.1-i2v-14b-transformer": "convert_wan_transformer_to_diffusers",
    "wan2.1-vae": "convert_wan_vae_to_diffusers",
}


def expand(tensors) -> dict[str, tuple[int, ...]]:
    """Shapes by name; {a..b} in a name stands for every number from a to b."""
    shapes = {}
    for pattern, shape in tensors.items():
        ranges = [range(int(a), int(b) + 1) for a, b in re.findall(r"\{(\d+)\.\.(\d+)\}", pattern)]
        for numbers in itertools.product(*ranges):
            filled = iter(numbers)
            name = re.sub(r"\{.*?\}", lambda _, filled=filled: str(next(filled)), pattern)
            shapes[name] = tuple(shape)
    return shapes


def load(kind, name):
    return json.loads((HOMES[kind] / f"{name}.json").read_text())


def converted(file: Path, make, config=None):
    """Our module with the weights of an original file; `config` is what they do not tell."""
    component = read_original(file, config=config)
    model_class = MODEL_CLASSES[component.class_name]
    made = model_class.read_config(component.config)
    tensors = {name: read_tensor(tensor) for name, tensor in component.tensors.items()}
    graph, state = nnx.split(nnx.eval_shape(lambda: make(made, rngs=nnx.Rngs(0))))
    tree = jax.tree.map(jnp.asarray, convert_state(tensors, model_class.rules(made)))
    nnx.replace_by_pure_dict(state, tree)
    return nnx.merge(graph, state)


def origins(name, layers=2) -> dict[str, list]:
    """Where diffusers' tensors lie in a release: the tensor, and the runs of its rows if not whole.

    diffusers' own conversion tells, of tensors that are filled with their own numbers and rows.
    """
    shapes = {
        key: shape
        for key, shape in expand(load("original", name)["tensors"]).items()
        if all(int(number) < layers for number in re.findall(r"blocks\.(\d+)\.", key))
    }
    labelled = {
        key: torch.stack([torch.full(shape[:1], number), torch.arange(shape[0])], 1)
        for number, (key, shape) in enumerate(shapes.items())
    }
    names, found = list(shapes), {}
    for new, labels in getattr(single_file_utils, CONVERSIONS[name])(labelled).items():
        number, rows = int(labels[0, 0]), labels[:, 1]
        assert (labels[:, 0] == number).all()
        ends = [*(torch.nonzero(rows.diff() != 1).flatten() + 1).tolist(), len(rows)]
        runs = [[int(rows[a]), int(rows[b - 1]) + 1] for a, b in itertools.pairwise([0, *ends])]
        whole = runs == [[0, shapes[names[number]][0]]]
        found[new] = [names[number], *([] if whole else runs)]
    return found


def umt5_places(layers) -> dict[str, list]:
    """As `origins`, of transformers' UMT5 encoder in Wan-AI's file (wan/modules/t5.py there)."""
    places = {"shared": "token_embedding", "encoder.final_layer_norm": "norm"}
    for layer in range(layers):
        new, old = f"encoder.block.{layer}.layer", f"blocks.{layer}"
        places |= {f"{new}.0.SelfAttention.{name}": f"{old}.attn.{name}" for name in "qkvo"}
        places |= {
            f"{new}.0.SelfAttention.relative_attention_bias": f"{old}.pos_embedding.embedding",
            f"{new}.0.layer_norm": f"{old}.norm1",
            f"{new}.1.layer_norm": f"{old}.norm2",
            f"{new}.1.DenseReluDense.wi_0": f"{old}.ffn.gate.0",
            f"{new}.1.DenseReluDense.wi_1": f"{old}.ffn.fc1",
            f"{new}.1.DenseReluDense.wo": f"{old}.ffn.fc2",
        }
    return {f"{new}.weight": [f"{old}.weight"] for new, old in places.items()}


def clip_places(layers) -> dict[str, list]:
    """The same of CLIP's tower of images, without transformers' prefix (wan/modules/clip.py)."""
    modules: dict[str, list] = {
        "pre_layrnorm": ["visual.pre_norm"],
        "post_layernorm": ["visual.post_norm"],
    }
    for layer in range(layers):
        new, old = f"encoder.layers.{layer}", f"visual.transformer.{layer}"
        for third, part in enumerate("qkv"):
            modules[f"{new}.self_attn.{part}_proj"] = [f"{old}.attn.to_qkv", [third, third + 1]]
        modules[f"{new}.self_attn.out_proj"] = [f"{old}.attn.proj"]
        modules[f"{new}.mlp.fc1"] = [f"{old}.mlp.0"]
        modules[f"{new}.mlp.fc2"] = [f"{old}.mlp.2"]
        modules |= {f"{new}.layer_norm{n}": [f"{old}.norm{n}"] for n in (1, 2)}
    places: dict[str, list] = {
        "embeddings.class_embedding": ["visual.cls_embedding"],
        "embeddings.position_embedding.weight": ["visual.pos_embedding"],
        "embeddings.patch_embedding.weight": ["visual.patch_embedding.weight"],
    }
    for new, (old, *runs) in modules.items():
        places |= {f"{new}.{kind}": [f"{old}.{kind}", *runs] for kind in ("weight", "bias")}
    return places


def as_released(state, places) -> dict[str, torch.Tensor]:
    """diffusers' tensors put together as a release has them, whatever the model's width.

    Args:
        state: The tensors by diffusers' names.
        places: What `origins` says of each: a share of the rows that it has in the release.
    """
    pieces: dict[str, list] = {}
    for new, tensor in state.items():
        old, *runs = places[new]
        lengths = [end - begin for begin, end in runs] or [1]
        sizes = [len(tensor) * length // sum(lengths) for length in lengths]
        begins = [begin for begin, _ in runs] or [0]
        pieces.setdefault(old, []).extend(zip(begins, tensor.split(sizes), strict=True))
    return {
        old: torch.cat([piece for _, piece in sorted(found, key=lambda item: item[0])])
        for old, found in pieces.items()
    }
