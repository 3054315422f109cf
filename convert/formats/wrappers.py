"""What trainers and other programs put around weights: keys that lead to them, prefixes of names.

A file of torch.save may hold the weights under one or more nested keys, and any file may have a
prefix before all names of a component. Both are the same here: words before a name that a model
knows. `WRAPPERS` lists these words. Where a file holds several sets of weights (with and without a
moving average), whoever converts it must choose one.
"""

import itertools
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import TypeVar

from svg_jax.convert.errors import ConversionError
from svg_jax.convert.formats.show import show, show_some
from svg_jax.convert.formats.stored_tensor import StoredTensor

WRAPPERS = frozenset(
    {
        # Whole models: DataParallel and DeepSpeed, Lightning, FSDP, torch.compile, trainers.
        *("module", "_orig_mod", "_forward_module", "model", "models", "net", "network", "weights"),
        *("state_dict", "model_state_dict", "model_state", "params", "student", "generator"),
        # Moving averages of them.
        *("ema", "ema_model", "ema_state_dict", "model_ema", "state_dict_ema", "params_ema"),
        *("generator_ema", "net_ema", "ema_weights", "shadow", "online_model"),
        # LoRAs, in a file of torch.save.
        *("lora", "lora_state_dict", "lora_weights"),
        # Parts of a pipeline.
        *("pipe", "pipeline", "dit", "transformer", "diffusion_model", "denoiser", "unet"),
        *("vae", "first_stage_model", "autoencoder", "text_encoder", "text_encoders"),
        *("image_encoder", "clip_vision", "cond_stage_model", "umt5xxl", "t5xxl", "clip_l"),
        "llama",
    }
)
# Modules around single layers, which the model does not have.
_AROUND_LAYERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
_MOST_WORDS = 8  # of an unknown prefix
TOP = "."  # the key of weights without any prefix

Found = TypeVar("Found")


def drop_layer_wrappers(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Drop the modules that compilers put around layers from the tensors' names.

    Raises:
        ConversionError: If two tensors get one name.
    """
    bare: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        new = _AROUND_LAYERS.sub("", name)
        if new in bare:
            raise ConversionError(
                f"{tensor.file}: {show(name)} and {show(bare[new].name)} are both {show(new)}: "
                "keep one of them."
            )
        bare[new] = tensor if new == name else replace(tensor, name=new)
    return bare


def find_wrapped(
    names: Collection[str], known: Callable[[str], Found | None], weights_key: str | None = None
) -> dict[tuple[str, Found], int]:
    """Count the known names under each prefix that may be around weights.

    Args:
        names: Names of all tensors.
        known: Function that tells what a name without its prefix is, or None.
        weights_key: Prefix that is accepted besides the words of `WRAPPERS`.

    Returns:
        The number of names by their prefix, dot included, and by what `known` tells of them.
    """
    words = words_of(weights_key)
    found: dict[tuple[str, Found], int] = {}
    for name in names:
        start = 0
        while True:
            told = known(name[start:])
            if told is not None:
                key = (name[:start], told)
                found[key] = found.get(key, 0) + 1
                break
            end = name.find(".", start)
            if end < 0 or name[start:end] not in words:
                break
            start = end + 1
    return found


def check_prefix(
    names: Collection[str], known: Callable[[str], Found | None], where: object
) -> None:
    """Refuse names that would be known without a common prefix that is not in `WRAPPERS`.

    Args:
        names: Names of all tensors, none of which `find_wrapped` found.
        known: See `find_wrapped`.
        where: File or folder, for errors.

    Raises:
        ConversionError: If there is such a prefix.
    """
    first = min(names, default="")
    for match in itertools.islice(re.finditer(r"\.", first), _MOST_WORDS):
        prefix = first[: match.end()]
        if not all(name.startswith(prefix) for name in names):
            return
        if any(known(name.removeprefix(prefix)) is not None for name in names):
            key = show(prefix.removesuffix("."))
            raise ConversionError(
                f"{where}: all names begin with '{key}', which is not known to stand around "
                f"weights: if these are meant, give weights_key='{key}'."
            )


def words_of(weights_key: str | None) -> frozenset[str]:
    """Return the words of prefixes: those of the table and of a given key."""
    return WRAPPERS | {*(weights_key or "").split(".")}


def choose(prefixes: Collection[str], weights_key: str | None, where: object) -> str:
    """Choose one of several prefixes: the only one, or the one that was asked for.

    Args:
        prefixes: Prefixes under which there are weights, at least one.
        weights_key: Prefix that was asked for, without its last dot, or one of its words; "." is
            no prefix; None is the only one there is.
        where: File or folder, for errors.

    Raises:
        ConversionError: If several prefixes fit, or none does.
    """
    keys = {prefix.removesuffix(".") or TOP: prefix for prefix in prefixes}
    meant = list(keys)
    if weights_key is not None:
        weights_key = weights_key.removesuffix(".") or TOP
        meant = [key for key in meant if weights_key in key.split(".") and key != TOP]
        meant = [weights_key] if weights_key in keys else meant
    if len(meant) == 1:
        return keys[meant[0]]
    if not meant:
        raise ConversionError(
            f"{where}: holds no weights under weights_key='{show(weights_key)}', but under "
            f"{show_some(sorted(keys))}: give one of these, or none."
        )
    raise ConversionError(
        f"{where}: holds weights as {' and as '.join(show(key) for key in meant[:4])}: say which "
        "are meant with weights_key=…."
    )


def unwrap(
    stored: Mapping[str, StoredTensor], prefix: str, prefixes: Collection[str]
) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """Remove the chosen prefix from the names that have it.

    Args:
        stored: Tensors by their full names.
        prefix: Prefix that was chosen.
        prefixes: All prefixes under which there are weights.

    Returns:
        The tensors under the prefix by the model's names, and the full names of all others.
    """
    longer = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
    meant = [name for name in stored if name.startswith(prefix) and not name.startswith(longer)]
    tensors = {name.removeprefix(prefix): stored[name] for name in meant}
    return tensors, tuple(sorted(stored.keys() - set(meant)))
