"""Files of original releases, recognised by their tensors: whose they are, and what is in them."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svg_jax.convert.components import named_class, split_unused
from svg_jax.convert.errors import ConversionError
from svg_jax.convert.formats.json_file import read_json_if_any
from svg_jax.convert.formats.show import show, show_some
from svg_jax.convert.formats.stored_tensor import StoredTensor
from svg_jax.convert.formats.wrappers import (
    Unwrapped,
    check_prefix,
    choose,
    drop_layer_wrappers,
    find_wrapped,
    unwrap,
)
from svg_jax.convert.releases import cogvideox, hunyuan_video, wan
from svg_jax.convert.releases import t5 as original_t5
from svg_jax.convert.releases.renaming import Origin, Shapes, rename_tensors
from svg_jax.convert.sources.scales import attach_scales, check_scales
from svg_jax.convert.sources.weights import is_torch, read_file, read_weights
from svg_jax.convert.tables import t5
from svg_jax.convert.tables.lora_names import read_name
from svg_jax.convert.tables.registry import MODEL_CLASSES
from svg_jax.convert.tables.rules import Leaf, match_rules


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
        unused: Names of tensors that the model does without.
    """

    name: str
    class_name: str
    mark: str
    table: Callable[[Shapes], Sequence[Origin]]
    config: Callable[[Shapes, Mapping[str, Any]], dict[str, Any]]
    unused: re.Pattern[str] | None = None


RELEASES = (
    Release(
        "HunyuanVideo's transformer",
        "HunyuanVideoTransformer3DModel",
        "double_blocks.0.img_attn_qkv.weight",
        hunyuan_video.transformer_table,
        hunyuan_video.transformer_config,
    ),
    Release(
        "HunyuanVideo's VAE",
        "AutoencoderKLHunyuanVideo",
        "decoder.up_blocks.0.upsamplers.0.conv.conv.weight",
        hunyuan_video.vae_table,
        hunyuan_video.vae_config,
    ),
    Release(
        "Wan's transformer",
        "WanTransformer3DModel",
        "blocks.0.self_attn.q.weight",
        wan.transformer_table,
        wan.transformer_config,
    ),
    Release(
        "Wan 2.1's VAE",
        "AutoencoderKLWan",
        "decoder.upsamples.0.residual.0.gamma",
        wan.vae_table,
        wan.vae_config,
    ),
    Release(
        "Wan 2.2's VAE",
        "AutoencoderKLWan",
        "decoder.upsamples.0.upsamples.0.residual.0.gamma",
        wan.residual_vae_table,
        wan.residual_vae_config,
    ),
    Release(
        "Wan's text encoder",
        "UMT5EncoderModel",
        "blocks.0.pos_embedding.embedding.weight",
        wan.umt5_table,
        wan.umt5_config,
    ),
    Release(
        "Wan's image encoder",
        "CLIPVisionModel",
        "visual.transformer.0.attn.to_qkv.weight",
        wan.clip_table,
        wan.clip_config,
        unused=wan.CLIP_UNUSED,
    ),
    Release(
        "CogVideoX's transformer",
        "CogVideoXTransformer3DModel",
        "transformer.layers.0.attention.query_key_value.weight",
        cogvideox.transformer_table,
        cogvideox.transformer_config,
        unused=cogvideox.UNUSED,
    ),
    Release(
        "CogVideoX's VAE",
        "AutoencoderKLCogVideoX",
        "decoder.up.0.block.0.norm1.conv_y.conv.weight",
        cogvideox.vae_table,
        cogvideox.vae_config,
        unused=cogvideox.VAE_UNUSED,
    ),
    Release(
        "T5's text encoder",
        "T5EncoderModel",
        original_t5.T5_MARK,
        original_t5.table,
        original_t5.t5_config,
        unused=t5.UNUSED,
    ),
    Release(  # behind T5's, whose mark it has too
        "UMT5's text encoder",
        "UMT5EncoderModel",
        original_t5.UMT5_MARK,
        original_t5.table,
        original_t5.umt5_config,
        unused=t5.UNUSED,
    ),
)


# Some have the same names in both worlds: without a config.json alone they are a release.
_SAME_NAMES = ("HunyuanVideo's VAE", "T5's text encoder", "UMT5's text encoder")
_RENAMED = tuple(release for release in RELEASES if release.name not in _SAME_NAMES)


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
        unused: Full names of the tensors in the files that the model does without.
    """

    release: str
    class_name: str
    config: dict[str, Any]
    tensors: Mapping[str, StoredTensor]
    leaves: tuple[Leaf, ...]
    unused: tuple[str, ...] = ()


def read_original(
    source: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    weights_key: str | None = None,
) -> OriginalComponent:
    """Recognise a component of an original release and say what its tensors become.

    Args:
        source: A file of weights, or a folder with one, or with shards and an index.
        config: Values of config.json that the weights do not tell (an error says which are needed),
            or that are others than those of the release.
        weights_key: See `convert_pipeline`.

    Raises:
        ConversionError: If the files are damaged, of no known release, or not whole; or `config`
            says too little, or nonsense.
    """
    source = Path(source)
    stored = (
        read_weights(source, weights_key=weights_key)
        if source.is_dir()
        else read_file(source, weights_key)
    )
    return recognise(stored, source, config=config, weights_key=weights_key)


def recognise(
    stored: Mapping[str, StoredTensor],
    where: Path,
    *,
    config: Mapping[str, Any] | None = None,
    weights_key: str | None = None,
) -> OriginalComponent:
    """As `read_original`, of tensors that were found already, `where` errors will say."""
    stored = attach_scales(drop_layer_wrappers(stored))
    found = _find_releases(stored, RELEASES, weights_key)
    if not found:
        raise _unknown(stored, where)
    prefix = choose(found, weights_key, where)
    check_scales(stored, prefix)
    return _recognise(found[prefix], unwrap(stored, prefix, found), where, config)


def _recognise(
    release: Release, unwrapped: Unwrapped, where: Path, config: Mapping[str, Any] | None
) -> OriginalComponent:
    given, tensors = dict(config or {}), unwrapped.tensors
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    try:
        values = {**release.config(shapes, given), **given}
        tensors = rename_tensors(tensors, release.table(shapes))
    except ConversionError as error:
        raise ConversionError(f"{where}: is {release.name}, and {error}") from error
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise ConversionError(
            f"{where}: is {release.name}, but not whole or of another version "
            f"({show(str(error))}): fetch it again."
        ) from error
    model_class = MODEL_CLASSES[release.class_name]
    try:
        made = model_class.read_config(values)
    except ValueError as error:
        raise ConversionError(f"{where}: is {release.name}, but {show(str(error), 300)}") from error
    rules = model_class.rules(made)
    tensors, unused = split_unused(tensors, rules, release.unused, where)
    new_shapes = {name: tensor.shape for name, tensor in tensors.items()}
    leaves = match_rules(new_shapes, rules, where=f"{where} ({release.name})")
    for tensor in tensors.values():
        tensor.converted_dtype  # noqa: B018 - refuses what is no weight
    written = {"_class_name": release.class_name, **made.to_dict()}
    return OriginalComponent(
        release.name,
        release.class_name,
        written,
        tensors,
        leaves,
        tuple(sorted((*unused, *unwrapped.others))),
    )


def find_original(
    source: Path,
    class_name: str | None,
    allowed: Iterable[Path] = (),
    weights_key: str | None = None,
) -> OriginalComponent | None:
    """What a component's folder, or a file, holds if that is weights of an original release.

    What config.json says of the model, if its "_class_name" is this class, counts as
    `read_original`'s `config`; the authors' own config.json names other classes.

    Args:
        source: The component's folder, or its file of weights, beside which config.json may be.
        class_name: Its class in model_index.json; None takes any.
        allowed: See `weights.read_weights`.
        weights_key: See `convert_pipeline`.

    Returns:
        The component; None if the weights are diffusers' or transformers' own.

    Raises:
        ConversionError: See `read_original`; or if the weights are another class's, or of
            torch.save and nobody's.
    """
    is_folder = source.is_dir()
    config = (source if is_folder else source.parent) / "config.json"
    said = read_json_if_any(config)
    stored = (
        read_weights(source, allowed, weights_key=weights_key)
        if is_folder
        else read_file(source, weights_key)
    )
    return identify(stored, source, class_name, said, weights_key)


def identify(
    stored: Mapping[str, StoredTensor],
    source: Path,
    class_name: str | None,
    said: Mapping[str, Any],
    weights_key: str | None,
) -> OriginalComponent | None:
    """As `find_original`, of tensors that were found already and a config.json that was read."""
    torch_files = [of.file for of in stored.values() if is_torch(of.file)]
    where = torch_files[0] if torch_files else source
    stored = attach_scales(drop_layer_wrappers(stored))
    named = named_class(said) or (class_name if said else None)
    is_ours = named in MODEL_CLASSES
    is_told = is_ours or (said and named is None)
    found = _find_releases(stored, _RENAMED if is_told else RELEASES, weights_key)
    if not found and not is_ours:
        check_prefix(stored, {release.mark: release for release in RELEASES}.get, where)
        if class_name is None:
            _check_kind(stored, where)
    if not found and (is_ours or not torch_files):
        return None
    if not found:
        raise _unknown(stored, where)
    fitting = {
        prefix: release
        for prefix, release in found.items()
        if class_name in (None, release.class_name)
    }
    if not fitting:
        release = next(iter(found.values()))
        raise ConversionError(
            f"{where}: is {release.name}, a {release.class_name}, and in this pipeline it should "
            f"be a {show(class_name)}: put the right file there."
        )
    prefix = choose(fitting, weights_key, where)
    release = fitting[prefix]
    check_scales(stored, prefix)
    if said.get("_class_name") != release.class_name:
        said = {}
    given = {key: value for key, value in said.items() if not key.startswith("_")}
    return _recognise(release, unwrap(stored, prefix, found), where, given)


def _find_releases(
    stored: Mapping[str, StoredTensor], releases: Iterable[Release], weights_key: str | None
) -> dict[str, Release]:
    """The releases that tensors are of, by what stands before their names."""
    marks = {release.mark: release for release in releases}
    found = set(find_wrapped(stored, marks.get, weights_key))
    return {
        prefix: release
        for release in marks.values()
        for prefix, of in sorted(found, key=lambda pair: pair[0])
        if of is release
    }


def _check_kind(stored: Mapping[str, StoredTensor], where: Path) -> None:
    """Refuse what was taken for a model's weights by mistake."""
    if not stored:
        raise ConversionError(f"{where}: holds no tensors: fetch it again.")
    if any(part and part.suffix.kind in ("down", "up") for part in map(read_name, stored)):
        raise ConversionError(
            f"{where}: is a LoRA, and not a model's weights: give the model here, and this file as "
            "its lora (--lora)."
        )


def _unknown(stored: Mapping[str, StoredTensor], where: Path) -> ConversionError:
    known = ", ".join(release.name for release in RELEASES)
    return ConversionError(
        f"{where}: its tensors ({show_some(sorted(stored))}) are of no original release that is "
        f"known: {known}."
    )
