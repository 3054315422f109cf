"""Files of original releases, recognised by their tensors: whose they are, and what is in them."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svg_jax.convert import original_cogvideox, original_hunyuan_video, original_wan
from svg_jax.convert.components import FAMILIES, named_class
from svg_jax.convert.original import Origin, Shapes, rename_tensors
from svg_jax.convert.reader import (
    DTYPES,
    StoredTensor,
    check_inside,
    read_header,
    read_json,
    read_weights,
)
from svg_jax.convert.rules import ConversionError, Leaf, match_rules
from svg_jax.convert.torch_file import SUFFIXES, read_torch_file


@dataclass(frozen=True)
class Release:
    """A component as its authors released it.

    Attributes:
        name: What an error calls it.
        class_name: The class that diffusers or transformers made of it.
        mark: A tensor that it has and no other release.
        table: Where its tensors go; it is given the shapes under the release's names.
        config: The values of config.json that its shapes tell. It is given these and what the
            caller says about the model, and refuses if that is too little.
        prefix: What may stand before all names.
        unused: Names of tensors that the model does without.
    """

    name: str
    class_name: str
    mark: str
    table: Callable[[Shapes], Sequence[Origin]]
    config: Callable[[Shapes, Mapping[str, Any]], dict[str, Any]]
    prefix: str = ""
    unused: re.Pattern[str] | None = None


RELEASES = (
    Release(
        "HunyuanVideo's transformer",
        "HunyuanVideoTransformer3DModel",
        "double_blocks.0.img_attn_qkv.weight",
        original_hunyuan_video.transformer_table,
        original_hunyuan_video.transformer_config,
    ),
    Release(
        "HunyuanVideo's VAE",
        "AutoencoderKLHunyuanVideo",
        "decoder.up_blocks.0.upsamplers.0.conv.conv.weight",
        original_hunyuan_video.vae_table,
        original_hunyuan_video.vae_config,
        prefix="vae.",
    ),
    Release(
        "Wan's transformer",
        "WanTransformer3DModel",
        "blocks.0.self_attn.q.weight",
        original_wan.transformer_table,
        original_wan.transformer_config,
        prefix="model.diffusion_model.",
    ),
    Release(
        "Wan 2.1's VAE",
        "AutoencoderKLWan",
        "decoder.upsamples.0.residual.0.gamma",
        original_wan.vae_table,
        original_wan.vae_config,
    ),
    Release(
        "Wan 2.2's VAE",
        "AutoencoderKLWan",
        "decoder.upsamples.0.upsamples.0.residual.0.gamma",
        original_wan.residual_vae_table,
        original_wan.residual_vae_config,
    ),
    Release(
        "Wan's text encoder",
        "UMT5EncoderModel",
        "blocks.0.pos_embedding.embedding.weight",
        original_wan.umt5_table,
        original_wan.umt5_config,
    ),
    Release(
        "Wan's image encoder",
        "CLIPVisionModel",
        "visual.transformer.0.attn.to_qkv.weight",
        original_wan.clip_table,
        original_wan.clip_config,
        unused=original_wan.CLIP_UNUSED,
    ),
    Release(
        "CogVideoX's transformer",
        "CogVideoXTransformer3DModel",
        "transformer.layers.0.attention.query_key_value.weight",
        original_cogvideox.transformer_table,
        original_cogvideox.transformer_config,
        prefix="model.diffusion_model.",
        unused=original_cogvideox.UNUSED,
    ),
    Release(
        "CogVideoX's VAE",
        "AutoencoderKLCogVideoX",
        "decoder.up.0.block.0.norm1.conv_y.conv.weight",
        original_cogvideox.vae_table,
        original_cogvideox.vae_config,
        unused=original_cogvideox.VAE_UNUSED,
    ),
)


# The VAE of HunyuanVideo has the same names in both worlds.
_RENAMED = tuple(r for r in RELEASES if r.class_name != "AutoencoderKLHunyuanVideo")


@dataclass(frozen=True)
class OriginalComponent:
    """A component of an original release, as diffusers or transformers would have saved it.

    Attributes:
        release: What the release is called.
        class_name: Its class in model_index.json.
        config: Its config.json.
        tensors: Its tensors by the names that class gives them, not read yet: they are places in
            the original files, and `reader.read_tensor` reads one.
        leaves: What they are converted to.
    """

    release: str
    class_name: str
    config: dict[str, Any]
    tensors: Mapping[str, StoredTensor]
    leaves: tuple[Leaf, ...]


def read_original(
    source: str | Path, *, config: Mapping[str, Any] | None = None
) -> OriginalComponent:
    """Recognises a component of an original release and says what its tensors become.

    Args:
        source: A .pt, .pth or .safetensors file, or a folder of safetensors shards with an index.
        config: Values of config.json that the weights do not tell (an error says which are needed),
            or that are others than those of the release.

    Raises:
        ConversionError: If the files are damaged, of no known release, or not whole; or `config`
            says too little, or nonsense.
    """
    source = Path(source)
    return recognise(_read(source), source, config=config)


def recognise(
    stored: Mapping[str, StoredTensor], where: Path, *, config: Mapping[str, Any] | None = None
) -> OriginalComponent:
    """As `read_original`, of tensors that were found already, `where` errors will say."""
    given = dict(config or {})
    release, tensors = _find_release(stored, where)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    try:
        values = {**release.config(shapes, given), **given}
        tensors = rename_tensors(tensors, release.table(shapes))
    except ConversionError as error:
        raise ConversionError(f"{where}: is {release.name}, and {error}") from error
    except (KeyError, ValueError, IndexError) as error:
        raise ConversionError(
            f"{where}: is {release.name}, but not whole or of another version ({error}): fetch it "
            "again."
        ) from error
    if release.unused is not None:
        tensors = {n: tensor for n, tensor in tensors.items() if not release.unused.fullmatch(n)}
    family = FAMILIES[release.class_name]
    try:
        made = family.read_config(values)
    except ValueError as error:
        raise ConversionError(f"{where}: is {release.name}, but {error}") from error
    new_shapes = {name: tensor.shape for name, tensor in tensors.items()}
    leaves = match_rules(new_shapes, family.rules(made), where=f"{where} ({release.name})")
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise ConversionError(
                f"{where}: {name} is {tensor.dtype}, and a weight must be float32, float16 or "
                "bfloat16: fetch the unquantised weights."
            )
    written = {"_class_name": release.class_name, **made.to_dict()}
    return OriginalComponent(release.name, release.class_name, written, tensors, leaves)


def find_original(
    source: Path, class_name: str | None, allowed: Iterable[Path] = ()
) -> OriginalComponent | None:
    """What a component's folder, or a file, holds if that is weights of an original release.

    Either it is a .pt or .pth file, or a folder with one and no safetensors, or the safetensors
    have an original release's names. What config.json says of the model, if its "_class_name" is
    this class, counts as `read_original`'s `config`; the authors' own config.json names other
    classes.

    Args:
        source: The component's folder, or its file of weights, beside which config.json may be.
        class_name: Its class in model_index.json; None takes any.
        allowed: See `reader.read_weights`.

    Returns:
        The component; None if the weights are diffusers' or transformers' own.

    Raises:
        ConversionError: See `read_original`; or if the weights are another class's.
    """
    is_folder = source.is_dir()
    config = (source if is_folder else source.parent) / "config.json"
    said = read_json(config) if config.is_file() else {}
    file = _torch_file(source, allowed) if is_folder else source
    where = source if file is None else file
    stored = read_weights(source, allowed) if file is None else _read(file)
    if file is None or file.suffix not in SUFFIXES:
        releases = _RENAMED if named_class(said) in FAMILIES else RELEASES
        if not any(r.mark in stored or r.prefix + r.mark in stored for r in releases):
            return None
    release, _ = _find_release(stored, where)
    if release.class_name != (class_name or release.class_name):
        raise ConversionError(
            f"{where}: is {release.name}, a {release.class_name}, and in this pipeline it should "
            f"be a {class_name}: put the right file there."
        )
    if said.get("_class_name") != release.class_name:
        said = {}
    given = {key: value for key, value in said.items() if not key.startswith("_")}
    return recognise(stored, where, config=given)


def _torch_file(folder: Path, allowed: Iterable[Path]) -> Path | None:
    """The file of torch.save in a folder without safetensors."""
    files = sorted(file for file in folder.glob("*") if file.suffix in SUFFIXES)
    if any(folder.glob("*.safetensors*")) or not files:
        return None
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ConversionError(f"{folder}: holds {names}: remove the ones that are not meant.")
    check_inside(files[0], (folder, *allowed))
    return files[0]


def _read(source: Path) -> dict[str, StoredTensor]:
    if source.is_dir():
        return read_weights(source)
    if source.suffix in SUFFIXES:
        return read_torch_file(source)
    return read_header(source)


def _find_release(
    stored: Mapping[str, StoredTensor], where: Path
) -> tuple[Release, dict[str, StoredTensor]]:
    """The release that the tensors are of, and the tensors without its prefix."""
    for release in RELEASES:
        for prefix in (release.prefix, ""):
            if prefix + release.mark in stored:
                return release, {
                    name.removeprefix(prefix): tensor
                    for name, tensor in stored.items()
                    if name.startswith(prefix)
                }
    known = ", ".join(release.name for release in RELEASES)
    raise ConversionError(
        f"{where}: its tensors ({', '.join(sorted(stored)[:3])}, …) are of no original release "
        f"that is known: {known}."
    )
