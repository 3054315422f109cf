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
from svg_jax.convert.components import FAMILIES
from svg_jax.convert.reader import read_tensor
from svg_jax.convert.releases import read_original

DATA = Path(__file__).parent / "data"
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
    return json.loads((DATA / kind / f"{name}.json").read_text())


def converted(file: Path, make, config=None):
    """Our module with the weights of an original file; `config` is what they do not tell."""
    component = read_original(file, config=config)
    family = FAMILIES[component.class_name]
    made = family.read_config(component.config)
    tensors = {name: read_tensor(tensor) for name, tensor in component.tensors.items()}
    graph, state = nnx.split(nnx.eval_shape(lambda: make(made, rngs=nnx.Rngs(0))))
    tree = jax.tree.map(jnp.asarray, convert_state(tensors, family.rules(made)))
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


def as_released(state, places) -> dict[str, torch.Tensor]:
    """diffusers' tensors put together as a release has them, whatever the model's width.

    Args:
        state: The tensors by diffusers' names.
        places: Of each, what `origins` says: a share of the rows that it has in the release.
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
