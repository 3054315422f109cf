"""A pipeline on the Hugging Face hub to a folder on this machine: only the files that are needed.

`huggingface_hub` keeps them in its own cache, which also serves without a network.
"""

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from svg_jax.convert.components import COPIED, read_pipeline_index, select_components
from svg_jax.convert.reader import STEMS, weights_files

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
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
    folder = _snapshot(hub_id, ["model_index.json"], revision, cache_dir)
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


def _weights(component: str, variant: str | None) -> list[str]:
    """Patterns of a component's files of weights; shards of variants are named in two ways."""
    mark = "" if variant is None else f".{variant}"
    endings = {
        f"{mark}.safetensors",
        f"{mark}{_SHARD}.safetensors",
        f"{_SHARD}{mark}.safetensors",
        f".safetensors.index{mark}.json",
    }
    return [f"{component}/{stem}{ending}" for stem in STEMS for ending in sorted(endings)]


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
