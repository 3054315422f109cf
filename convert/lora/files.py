"""Find a LoRA's file (in a folder or on the hub), and read what is in it."""

import math
from pathlib import Path

import numpy as np

from svg_jax.convert.errors import ConversionError
from svg_jax.convert.formats.checked_files import check_regular
from svg_jax.convert.formats.safetensors_file import Header, read_header
from svg_jax.convert.formats.show import show_some
from svg_jax.convert.formats.stored_tensor import StoredTensor, is_float, read_tensor
from svg_jax.convert.formats.torch_file import read_dicts
from svg_jax.convert.formats.wrappers import drop_layer_wrappers
from svg_jax.convert.paths import usable_path
from svg_jax.convert.sources.hub import LORA_STEMS, download_lora, is_hub_lora
from svg_jax.convert.sources.weights import SUFFIXES, is_torch, is_weights


def find_lora(path: str | Path) -> Path:
    """Find the file of a path or an id of the hub, which is downloaded to the hub's cache.

    Args:
        path: File, folder with one, "owner/name" or "owner/name/file.safetensors".

    Raises:
        ConversionError: If there is no file, or there are several and none has a known name.
        OSError: See `hub.download_index`.
    """
    local = usable_path(path)
    is_file = len(local.parts) > 2  # on the hub: "owner/name/file"
    if (
        is_hub_lora(str(path))
        and not local.exists()
        and not Path(local.parts[0]).is_dir()
        and (is_weights(local) or not is_file)
    ):
        local = download_lora(str(path))
    if not local.is_dir():
        if not is_weights(local):
            raise ConversionError(
                f"{path}: is no {', '.join(SUFFIXES)} file, and no folder with one: give a LoRA's."
            )
        return local
    return _only_file(local)


def _only_file(folder: Path) -> Path:
    found = sorted(file for file in folder.iterdir() if is_weights(file))
    known = [file for file in found if file.stem in LORA_STEMS]
    # Folders of PEFT and diffusers may also hold an optimizer's state.
    safe = [file for file in known or found if not is_torch(file)]
    chosen = safe or known or found
    if len(chosen) != 1:
        names = ", ".join(file.name for file in chosen[:5])
        what = f"holds {names}" if chosen else f"holds no {', '.join(SUFFIXES)} file"
        raise ConversionError(f"{folder}: {what:.300}: give the file that is meant.")
    return chosen[0]


def read_lora_file(file: Path) -> Header:
    """Find the tensors of a LoRA's file, and its metadata; matrices are not read.

    Raises:
        ConversionError: If the file is damaged or holds several sets of tensors.
    """
    check_regular(file)
    if not is_torch(file):
        header = read_header(file)
        return Header(drop_layer_wrappers(header.tensors), header.metadata)
    dicts = read_dicts(file)
    if len(dicts) > 1:
        raise ConversionError(
            f"{file}: holds tensors under {show_some(sorted(dicts))}: save the LoRA that is meant "
            "in a file of its own."
        )
    (tensors,) = dicts.values()
    return Header(drop_layer_wrappers(tensors), None)


def read_alpha(stored: StoredTensor) -> float:
    """Read alpha, a number of any type.

    Raises:
        ConversionError: If it is not one finite number.
    """
    found: object = f"{stored.dtype} {list(stored.shape)}"
    is_number = is_float(stored) or stored.dtype.kind in "iu"
    if is_number and math.prod(stored.shape) == 1:
        found = float(read_tensor(stored).reshape(()))
        if math.isfinite(found):
            return found
    raise ConversionError(
        f"{stored.file}: {stored.name} is not one finite number, but {found}: fetch the LoRA again."
    )


def is_zero(stored: StoredTensor) -> bool:
    """Tell whether all elements are zero, as some trainers write for all norms and biases."""
    return not np.any(read_tensor(stored))
