"""A pipeline on the Hugging Face hub to a folder on this machine: only the files that are needed.

`huggingface_hub` keeps them in its own cache, which also serves without a network.
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
LORA_STEMS = ("pytorch_lora_weights", "adapter_model")  # what diffusers and PEFT call the file
_SHARD = "-?????-of-?????"


def is_hub_id(model: str) -> bool:
    """Whether a string has the form of a hub id, "owner/name"."""
    return re.fullmatch(f"{_PART}/{_PART}", model) is not None


def download_index(
    hub_id: str, *, revision: str | None = None, cache_dir: str | Path | None = None
) -> Path:
    """Brings a pipeline's model_index.json into the hub's cache.

    Args:
        hub_id: "owner/name".
        revision: A branch, tag or commit; None is the main branch.
        cache_dir: In place of the hub's own cache ($HF_HUB_CACHE).

    Returns:
        The snapshot's folder, named by its commit. Of the rest nothing needs to be there.

    Raises:
        ValueError: If the hub has no such repository or revision, or it is no pipeline.
        PermissionError: If the repository's licence was not accepted.
        ConnectionError: If the hub cannot be reached and the cache does not have it.
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
    """Brings the rest of a pipeline to its model_index.json: what `convert_pipeline` reads.

    Args:
        hub_id: "owner/name".
        folder: What `download_index` returned.
        components: See `convert_pipeline`.
        variant: Which weights where a component has them, e.g. "fp16"; the plain ones elsewhere.
        cache_dir: As with `download_index`.

    Raises:
        ValueError: If the pipeline has components that are not ported, or no such variant.
        OSError: See `download_index`.
    """
    index = read_pipeline_index(folder)
    chosen = select_components(index, components, folder)
    commit = folder.name  # whatever happens on the hub meanwhile
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
    """Find what is here by the source's name, or bring what the hub has into its cache.

    Returns:
        The settings with what was fetched as their source.

    Raises:
        ValueError: See `download_index` and `download_components`.
        OSError: See `download_index`.
    """
    name = str(settings.source)
    if Path(name).expanduser().exists() or not is_hub_id(name):
        return settings
    folder = download_index(name, revision=settings.revision)
    download_components(name, folder, components=settings.components, variant=settings.variant)
    return replace(settings, source=folder, revision=None)


def is_hub_lora(path: str) -> bool:
    """Whether a string has the form of a LoRA on the hub, "owner/name" or "owner/name/file"."""
    parts = path.split("/")
    if len(parts) == 2:
        return is_hub_id(path) and not _is_weights(path)
    plain = all(
        part not in ("", ".", "..") and not re.search(r"[*?\[\]\\]", part) for part in parts
    )
    return is_hub_id("/".join(parts[:2])) and plain


def download_lora(path: str, *, cache_dir: str | Path | None = None) -> Path:
    """Bring a LoRA's file into the hub's cache, and PEFT's config if there is one beside it.

    Args:
        path: "owner/name", whose only .safetensors file is meant, or one of a known name; or
            "owner/name/file", the file perhaps in a folder.
        cache_dir: Folder in place of the hub's own cache.

    Returns:
        The file.

    Raises:
        ValueError: If the hub has no such repository or file, or several and none of a known name.
        OSError: See `download_index`.
    """
    owner, name, *rest = path.split("/", 2)
    hub_id = f"{owner}/{name}"
    if rest:
        (file,) = rest
    else:
        folder = _snapshot(hub_id, [f"{stem}.safetensors" for stem in LORA_STEMS], None, cache_dir)
        found = [f"{stem}.safetensors" for stem in LORA_STEMS]
        found = [name for name in found if (folder / name).is_file()]
        found = found or [name for name in _list_files(hub_id, folder) if _is_weights(name)]
        if len(found) != 1:
            what = f"holds {', '.join(found[:5])}" if found else "holds no .safetensors file"
            raise ValueError(f"{hub_id}: {what}: give the file that is meant, {hub_id}/FILE.")
        (file,) = found
    config = str(PurePosixPath(file).with_name("adapter_config.json"))
    local = _snapshot(hub_id, [file, config], None, cache_dir) / file
    if not local.is_file():
        raise ValueError(f"{hub_id}: has no file {file}: check its name.")
    return local


def _is_weights(name: str) -> bool:
    return name.lower().endswith(".safetensors")


def _list_files(hub_id: str, folder: Path) -> list[str]:
    """The files of a repository; without a network those that the cache has."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return sorted(huggingface_hub.list_repo_files(hub_id))
    except (errors.HTTPError, ConnectionError):
        files = (file for file in folder.rglob("*") if file.is_file())
        return sorted(file.relative_to(folder).as_posix() for file in files)


def _weights(component: str, variant: str | None) -> list[str]:
    """Patterns of a component's files of weights; shards of variants are named in two ways."""
    mark = "" if variant is None else f".{variant}"
    endings = {
        f"{mark}.safetensors",
        f"{mark}{_SHARD}.safetensors",
        f"{_SHARD}{mark}.safetensors",
        f".safetensors.index{mark}.json",
    }
    return [f"{component}/{stem}{ending}" for stem in STEMS.values() for ending in sorted(endings)]


def _snapshot(
    hub_id: str, patterns: Sequence[str], revision: str | None, cache_dir: str | Path | None
) -> Path:
    import huggingface_hub  # slow, and only needed here
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
