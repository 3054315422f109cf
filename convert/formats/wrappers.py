"""What trainers and other programs put around weights: keys that lead to them, prefixes of names.

A file of torch.save may keep weights under a key, or under a key of what is under a key, and any
file may have a prefix before all of a component's names. Both are the same here: words before a
name that a model knows. Which words these may be stands in one table; where the weights are there
more than once (with and without a moving average), whoever converts them has to say which.
"""

import itertools
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
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
        *(
            "image_encoder",
            "clip_vision",
            "cond_stage_model",
            "umt5xxl",
            "t5xxl",
            "clip_l",
            "llama",
        ),
    }
)
# Modules around each layer, which have no name of their own in the model.
_AROUND_LAYERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
_MOST_WORDS = 8  # of a prefix that is not known
TOP = "."  # how the key of weights without any prefix is given

Found = TypeVar("Found")


@dataclass(frozen=True)
class Unwrapped:
    """Tensors without what was around their names.

    Attributes:
        tensors: Those under the prefix, by the names that the model gives them.
        others: The full names of all others.
    """

    tensors: Mapping[str, StoredTensor]
    others: tuple[str, ...]


def drop_layer_wrappers(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return tensors by their names without the modules that compilers put around layers.

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
    """Count what is known under each prefix that may be around weights.

    Args:
        names: The names of all tensors.
        known: What a name without its prefix tells, or None.
        weights_key: A prefix that may be there besides those of `WRAPPERS`.

    Returns:
        How many names tell what under which prefix, the dot at its end included.
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
    """Refuse a prefix that is not in `WRAPPERS`, stands before all names, and leads to weights.

    Args:
        names: The names of all tensors, none of which was found.
        known: See `find_wrapped`.
        where: The file or folder, for errors.

    Raises:
        ConversionError: If there is one.
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
                f"weights: if these are meant, give weights_key='{key}' (--weights-key)."
            )


def words_of(weights_key: str | None) -> frozenset[str]:
    """Return the words that may stand around weights: those of the table and of a given key."""
    return WRAPPERS | {*(weights_key or "").split(".")}


def choose(prefixes: Collection[str], weights_key: str | None, where: object) -> str:
    """Choose one of several prefixes: the only one, or the one that is asked for.

    Args:
        prefixes: At least one.
        weights_key: What was asked for: all of a prefix without the dot at its end, "." for none at
            all, or one of its words.
        where: The file or folder, for errors.

    Raises:
        ConversionError: If several are meant, or none.
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
        "are meant with weights_key=… (--weights-key)."
    )


def unwrap(stored: Mapping[str, StoredTensor], prefix: str, prefixes: Collection[str]) -> Unwrapped:
    """Take a prefix off the names that have it.

    Args:
        stored: The tensors.
        prefix: The one that is meant.
        prefixes: All under which there are weights.
    """
    longer = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
    meant = [name for name in stored if name.startswith(prefix) and not name.startswith(longer)]
    tensors = {name.removeprefix(prefix): stored[name] for name in meant}
    return Unwrapped(tensors, tuple(sorted(stored.keys() - set(meant))))
