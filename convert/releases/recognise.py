"""Files of original releases, recognised by the names and shapes of their tensors."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svg_jax.convert.components import named_class, split_unused
from svg_jax.convert.errors import ConversionError
from svg_jax.convert.formats.json_file import read_json_if_any
from svg_jax.convert.formats.show import show, show_some
from svg_jax.convert.formats.stored_tensor import StoredTensor
from svg_jax.convert.formats.wrappers import (
    check_prefix,
    choose,
    drop_layer_wrappers,
    find_wrapped,
    unwrap,
)
from svg_jax.convert.releases import cogvideox, hunyuan_video, t5, wan
from svg_jax.convert.releases.renaming import Layout, rename_tensors
from svg_jax.convert.sources.scales import attach_scales, check_scales
from svg_jax.convert.sources.weights import is_torch, read_file, read_weights
from svg_jax.convert.tables.lora_names import read_name
from svg_jax.convert.tables.registry import MODEL_CLASSES
from svg_jax.convert.tables.rules import Leaf, match_rules


@dataclass(frozen=True)
class Release:
    """A component as its authors released it.

    Attributes:
        name: Name of the release in errors.
        class_name: Class of diffusers or transformers that it was converted to.
        layout: Names and shapes of its tensors.
    """

    name: str
    class_name: str
    layout: Layout


RELEASES = (
    Release(
        "HunyuanVideo's transformer", "HunyuanVideoTransformer3DModel", hunyuan_video.TRANSFORMER
    ),
    Release("HunyuanVideo's VAE", "AutoencoderKLHunyuanVideo", hunyuan_video.VAE),
    Release("Wan's transformer", "WanTransformer3DModel", wan.TRANSFORMER),
    Release("Wan 2.1's VAE", "AutoencoderKLWan", wan.VAE),
    Release("Wan 2.2's VAE", "AutoencoderKLWan", wan.RESIDUAL_VAE),
    Release("Wan's text encoder", "UMT5EncoderModel", wan.TEXT_ENCODER),
    Release("Wan's image encoder", "CLIPVisionModel", wan.IMAGE_ENCODER),
    Release("CogVideoX's transformer", "CogVideoXTransformer3DModel", cogvideox.TRANSFORMER),
    Release("CogVideoX's VAE", "AutoencoderKLCogVideoX", cogvideox.VAE),
    Release("T5's text encoder", "T5EncoderModel", t5.T5),
    Release("UMT5's text encoder", "UMT5EncoderModel", t5.UMT5),  # after T5's, whose mark it has
)
_RENAMED = tuple(release for release in RELEASES if release.layout.table is not None)


@dataclass(frozen=True)
class OriginalComponent:
    """A component of an original release, as diffusers or transformers would have saved it.

    Attributes:
        release: Name of the release.
        class_name: Class of the component in model_index.json.
        config: Values of its config.json.
        tensors: Places of the tensors in the original files, by the names that the class gives
            them; `stored_tensor.read_tensor` reads one.
        leaves: Leaves that the tensors are converted to.
        unused: Full names of the tensors in the files that the model does not need.
    """

    release: str
    class_name: str
    config: dict[str, Any]
    tensors: Mapping[str, StoredTensor]
    leaves: tuple[Leaf, ...]
    unused: tuple[str, ...] = ()


def read_original(
    source: str | Path, *, config: Mapping[str, Any] | None = None, weights_key: str | None = None
) -> OriginalComponent:
    """Recognise a component of an original release, and place its tensors under their new names.

    Args:
        source: File of weights, or folder with one, or with shards and an index.
        config: Values of config.json that the weights do not tell (an error says which are needed),
            or that differ from those of the release.
        weights_key: See `convert_pipeline`.

    Raises:
        ConversionError: If the files are damaged, incomplete, or of no known release; or if values
            of `config` are missing or wrong.
    """
    stored = _read_stored(Path(source), (), weights_key)
    return recognise(stored, Path(source), config=config, weights_key=weights_key)


def recognise(
    stored: Mapping[str, StoredTensor],
    where: Path,
    *,
    config: Mapping[str, Any] | None = None,
    weights_key: str | None = None,
) -> OriginalComponent:
    """Recognise a component by its tensors; errors name `where`. See `read_original`."""
    stored = attach_scales(drop_layer_wrappers(stored))
    found = _find_releases(stored, RELEASES, weights_key)
    if not found:
        raise _unknown(stored, where)
    prefix = choose(found, weights_key, where)
    check_scales(stored, prefix)
    return _recognise(found[prefix], *unwrap(stored, prefix, found), where, config)


def _recognise(
    release: Release,
    tensors: Mapping[str, StoredTensor],
    others: tuple[str, ...],
    where: Path,
    config: Mapping[str, Any] | None,
) -> OriginalComponent:
    given = dict(config or {})
    layout = release.layout
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    try:
        values = {**layout.config(shapes, given), **given}
        if layout.table is not None:
            tensors = rename_tensors(tensors, layout.table(shapes))
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
    tensors, unused = split_unused(tensors, rules, layout.unused, where)
    new_shapes = {name: tensor.shape for name, tensor in tensors.items()}
    leaves = match_rules(new_shapes, rules, where=f"{where} ({release.name})")
    for tensor in tensors.values():
        tensor.converted_dtype  # noqa: B018 - refuses what is no weight
    written = {"_class_name": release.class_name, **made.to_dict()}
    spare = tuple(sorted((*unused, *others)))
    return OriginalComponent(
        release.name, release.class_name, written, tensors, leaves, unused=spare
    )


def find_original(
    source: Path,
    class_name: str | None,
    allowed: Iterable[Path] = (),
    weights_key: str | None = None,
) -> OriginalComponent | None:
    """Read a component's folder, or a file, if it holds weights of an original release.

    A config.json whose "_class_name" is the release's class counts as `read_original`'s `config`;
    the authors' own config.json names other classes.

    Args:
        source: Folder of the component, or file of weights, beside which config.json may be.
        class_name: Class of the component in model_index.json; None takes any.
        allowed: See `weights.read_weights`.
        weights_key: See `convert_pipeline`.

    Returns:
        The component; None if the weights are diffusers' or transformers' own.

    Raises:
        ConversionError: See `read_original`; or if the weights are of another class, or are of
            torch.save and of no known release.
    """
    folder = source if source.is_dir() else source.parent
    said = read_json_if_any(folder / "config.json")
    stored = _read_stored(source, allowed, weights_key)
    return identify(stored, source, class_name, said, weights_key)


def _read_stored(
    source: Path, allowed: Iterable[Path], weights_key: str | None
) -> Mapping[str, StoredTensor]:
    if source.is_dir():
        return read_weights(source, allowed, weights_key=weights_key)
    return read_file(source, weights_key)


def identify(
    stored: Mapping[str, StoredTensor],
    source: Path,
    class_name: str | None,
    said: Mapping[str, Any],
    weights_key: str | None,
) -> OriginalComponent | None:
    """Recognise a component by its tensors and its config.json; see `find_original`."""
    torch_files = [of.file for of in stored.values() if is_torch(of.file)]
    where = torch_files[0] if torch_files else source
    stored = attach_scales(drop_layer_wrappers(stored))
    named = named_class(said) or (class_name if said else None)
    is_ours = named in MODEL_CLASSES
    is_told = is_ours or (said and named is None)
    found = _find_releases(stored, _RENAMED if is_told else RELEASES, weights_key)
    if not found:
        if not is_ours:
            check_prefix(stored, {release.layout.mark: release for release in RELEASES}.get, where)
            if class_name is None:
                _check_kind(stored, where)
            if torch_files:
                raise _unknown(stored, where)
        return None
    fitting = {key: of for key, of in found.items() if class_name in (None, of.class_name)}
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
    return _recognise(release, *unwrap(stored, prefix, found), where, given)


def _find_releases(
    stored: Mapping[str, StoredTensor], releases: Iterable[Release], weights_key: str | None
) -> dict[str, Release]:
    """Find the releases that tensors are of, by the prefix of their names."""
    marks = {release.layout.mark: release for release in releases}
    found = set(find_wrapped(stored, marks.get, weights_key))
    return {
        prefix: release
        for release in marks.values()
        for prefix, of in sorted(found, key=lambda pair: pair[0])
        if of is release
    }


def _check_kind(stored: Mapping[str, StoredTensor], where: Path) -> None:
    """Refuse a file without tensors, or of a LoRA, in place of a model's weights."""
    if not stored:
        raise ConversionError(f"{where}: holds no tensors: fetch it again.")
    if any(part and part.suffix.kind in ("down", "up") for part in map(read_name, stored)):
        raise ConversionError(
            f"{where}: is a LoRA, and not a model's weights: give the model here, and this file as "
            "its lora."
        )


def _unknown(stored: Mapping[str, StoredTensor], where: Path) -> ConversionError:
    known = ", ".join(release.name for release in RELEASES)
    return ConversionError(
        f"{where}: its tensors ({show_some(sorted(stored))}) are of no original release that is "
        f"known: {known}."
    )
