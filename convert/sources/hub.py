"""Download the needed files of a pipeline or a LoRA from the Hugging Face hub.

`huggingface_hub` keeps them in its own cache, which also works without a network.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from svg_jax.convert.components import COPIED, read_pipeline_index, select_components
from svg_jax.convert.run_defaults import FILE as RUN_DEFAULTS
from svg_jax.convert.settings import ConversionSettings
from svg_jax.convert.sources.weights import weights_files
from svg_jax.convert.tables.registry import STEMS

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
LORA_STEMS = ("pytorch_lora_weights", "adapter_model")  # names by diffusers and PEFT
_SHARD = "-?????-of-?????"


def is_hub_id(model: str) -> bool:
    """Return whether a string has the form of a hub id, "owner/name"."""
    return re.fullmatch(f"{_PART}/{_PART}", model) is not None


def download_index(
    hub_id: str, *, revision: str | None = None, cache_dir: str | Path | None = None
) -> Path:
    """Download a pipeline's model_index.json into the hub's cache.

    Args:
        hub_id: Id of the repository, "owner/name".
        revision: Branch, tag or commit; None is the main branch.
        cache_dir: Folder to use in place of the hub's own cache ($HF_HUB_CACHE).

    Returns:
        The folder of the snapshot, named after its commit. Other files may be missing in it.

    Raises:
        ValueError: If the hub has no such repository or revision, or it is no pipeline.
        PermissionError: If the repository's licence was not accepted.
        ConnectionError: If the hub cannot be reached and the cache lacks the file.
    """
    folder = _snapshot(hub_id, ["model_index.json", RUN_DEFAULTS], revision, cache_dir)
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{hub_id}: is no pipeline in diffusers' layout: has no model_index.json.")
    return folder


def download_components(
    hub_id: str,
    folder: Path,
    *,
    components: Collection[str] | None = None,
    variant: str | None = None,
    cache_dir: str | Path | None = None,
) -> None:
    """Download the other files of a pipeline that `convert_pipeline` reads.

    Args:
        hub_id: Id of the repository, "owner/name".
        folder: Folder of the snapshot, by `download_index`.
        components: Names of the components; see `ConversionSettings`.
        variant: Variant of the weights, e.g. "fp16"; components that lack it give the plain ones.
        cache_dir: Folder to use in place of the hub's own cache.

    Raises:
        ValueError: If the pipeline has components that are not ported, or no such variant.
        OSError: If the hub cannot be reached or refuses; see `download_index`.
    """
    index = read_pipeline_index(folder)
    chosen = select_components(index, components, folder)
    commit = folder.name  # of the index, whatever is pushed to the hub meanwhile
    patterns = [f"{name}/*" for name in COPIED if name in index.classes]
    patterns += [f"{name}/config.json" for name in chosen]
    patterns += [pattern for name in chosen for pattern in _weights(name, variant)]
    _snapshot(hub_id, patterns, commit, cache_dir)
    plain = [name for name in chosen if not weights_files(folder / name, variant)]
    if variant is None or not plain:
        return
    if len(plain) == len(chosen):
        raise ValueError(f"{hub_id}: has no weights of the variant {variant!r}: omit it.")
    patterns = [pattern for name in plain for pattern in _weights(name, None)]
    _snapshot(hub_id, patterns, commit, cache_dir)


def fetch_source(settings: ConversionSettings) -> ConversionSettings:
    """Download the source of a conversion if it is a hub id and no local path.

    Returns:
        The settings, with the downloaded folder as their source.

    Raises:
        ValueError: If it cannot be converted; see `download_index` and `download_components`.
        OSError: If the hub cannot be reached or refuses; see `download_index`.
    """
    name = str(settings.source)
    if Path(name).expanduser().exists() or not is_hub_id(name):
        return settings
    folder = download_index(name, revision=settings.revision)
    download_components(name, folder, components=settings.components, variant=settings.variant)
    return replace(settings, source=folder, revision=None)


def is_hub_lora(path: str) -> bool:
    """Return whether a string has the form "owner/name" or "owner/name/file"."""
    parts = path.split("/")
    if len(parts) == 2:
        return is_hub_id(path) and not path.lower().endswith(".safetensors")
    plain = all(
        part not in ("", ".", "..") and not re.search(r"[*?\[\]\\]", part) for part in parts
    )
    return is_hub_id("/".join(parts[:2])) and plain


def download_lora(path: str) -> Path:
    """Download a LoRA's file, and PEFT's config if there is one beside it, into the hub's cache.

    Args:
        path: "owner/name/file"; or "owner/name" of a repository with a file of a known name, or
            with a single .safetensors file.

    Returns:
        The path of the file.

    Raises:
        ValueError: If the hub has no such repository or file, or the file is ambiguous.
        OSError: If the hub cannot be reached or refuses; see `download_index`.
    """
    owner, name, *rest = path.split("/", 2)
    hub_id = f"{owner}/{name}"
    if rest:
        (file,) = rest
    else:
        known = [f"{stem}.safetensors" for stem in LORA_STEMS]
        folder = _snapshot(hub_id, known)
        found = [name for name in known if (folder / name).is_file()]
        if not found:
            listed = _list_files(hub_id, folder)
            found = [name for name in listed if name.lower().endswith(".safetensors")]
        if len(found) != 1:
            what = f"holds {', '.join(found[:5])}" if found else "holds no .safetensors file"
            raise ValueError(f"{hub_id}: {what}: give the file that is meant, {hub_id}/FILE.")
        (file,) = found
    config = str(PurePosixPath(file).with_name("adapter_config.json"))
    local = _snapshot(hub_id, [file, config]) / file
    if not local.is_file():
        raise ValueError(f"{hub_id}: has no file {file}: check its name.")
    return local


def _list_files(hub_id: str, folder: Path) -> list[str]:
    """List the files of a repository; without a network, those in the cache."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return sorted(huggingface_hub.list_repo_files(hub_id))
    except (errors.HTTPError, ConnectionError):
        files = (file for file in folder.rglob("*") if file.is_file())
        return sorted(file.relative_to(folder).as_posix() for file in files)


def _weights(component: str, variant: str | None) -> list[str]:
    """Return patterns of a component's weights; there are two ways to name a variant's shards."""
    mark = "" if variant is None else f".{variant}"
    endings = {
        f"{mark}.safetensors",
        f"{mark}{_SHARD}.safetensors",
        f"{_SHARD}{mark}.safetensors",
        f".safetensors.index{mark}.json",
    }
    return [f"{component}/{stem}{ending}" for stem in STEMS.values() for ending in sorted(endings)]


def _snapshot(
    hub_id: str,
    patterns: Sequence[str],
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    import huggingface_hub  # slow to import
    from huggingface_hub import errors

    try:
        return Path(
            huggingface_hub.snapshot_download(
                hub_id, revision=revision, cache_dir=cache_dir, allow_patterns=list(patterns)
            )
        )
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{hub_id}: is gated: accept its licence on https://huggingface.co/{hub_id} and log in "
            "(`hf auth login`, or $HF_TOKEN)."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"{hub_id}: is no folder here and no repository on the hub: check the name, and log in "
            "if it is private."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{hub_id}: has no revision {revision!r} on the hub.") from error
    except (errors.LocalEntryNotFoundError, errors.HTTPError) as error:
        raise ConnectionError(
            f"{hub_id}: is no folder here, is not or only in part in the hub's cache, and the hub "
            "cannot be reached: check the name and the network ($HF_HUB_OFFLINE forbids its use)."
        ) from error
