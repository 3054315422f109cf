"""Tokenizers from the files in checkpoints, in each released form.

`tokenizer.json` is complete. `spiece.model` (T5, UMT5) and `vocab.json` with `merges.txt` (CLIP)
hold only a vocabulary. The rest is added here, as in transformers 5.23: how text is normalised and
split into words, and which special tokens are recognised in a prompt.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram
from tokenizers.processors import TemplateProcessing

from svg_jax.convert.formats.checked_files import check_regular
from svg_jax.convert.formats.show import show

_UNIGRAM = 1  # sentencepiece's number for this kind of model
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # and for these kinds of pieces
SIZE_LIMIT = 64 * 2**20  # bytes of a file; the largest vocabulary of a released model has 17 MB
_EXTRA_LIMIT = 10_000  # tokens; T5 has 100
_STEPS_LIMIT = 8  # steps of processing a text, each of which may double it
_GROWTH_LIMIT = 16  # characters that may replace one
_FLAGS = ("lstrip", "rstrip", "normalized", "single_word")
_CLIP_START, _CLIP_END = "<|startoftext|>", "<|endoftext|>"
_CLIP_WORD = Regex(
    r"<\|startoftext\|>|<\|endoftext\|>|'(?:s|t|re|ve|m|ll|d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
)


def read_backend(folder: Path, settings: Mapping[str, Any]) -> Tokenizer:
    """Read tokenizer.json, or else spiece.model, or else vocab.json and merges.txt.

    Args:
        folder: Folder of the tokenizer.
        settings: Values of its tokenizer_config.json.

    Raises:
        FileNotFoundError: If the folder holds none of them, or only one of CLIP's two files.
        ValueError: If a file is damaged, or holds another kind of vocabulary.
    """
    if (file := folder / "tokenizer.json").is_file():
        return _read_whole(file)
    if (file := folder / "spiece.model").is_file():
        return _read_sentencepiece(file, settings)
    pair = (folder / "vocab.json", folder / "merges.txt")
    missing = [file for file in pair if not file.is_file()]
    if len(missing) == 1:
        raise FileNotFoundError(f"{missing[0]}: is missing, half of the vocabulary: fetch it.")
    if missing:
        raise FileNotFoundError(
            f"{folder}: there is no tokenizer: neither tokenizer.json nor spiece.model, nor "
            "vocab.json with merges.txt."
        )
    return _read_byte_pairs(*pair, settings)


def _read_whole(file: Path) -> Tokenizer:
    _check_file(file)
    with readable(file):
        backend = Tokenizer.from_file(str(file))
    _check_steps(backend, file)
    backend.no_padding()
    backend.no_truncation()
    return backend


def _read_sentencepiece(file: Path, settings: Mapping[str, Any]) -> Tokenizer:
    """Read a sentencepiece model of T5's kind, and add `<extra_id_…>` in descending order."""
    _check_file(file)
    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        model.ParseFromString(file.read_bytes())
    except DecodeError as error:
        raise _damaged(file, error) from error
    trained, spec = model.trainer_spec, model.normalizer_spec
    if not (model.pieces and model.HasField("trainer_spec") and model.HasField("normalizer_spec")):
        raise _damaged(file, "it ends early")
    as_t5 = spec.add_dummy_prefix and spec.remove_extra_whitespaces and spec.escape_whitespaces
    if trained.model_type != _UNIGRAM or not as_t5:
        raise ValueError(f"{file}: is no unigram model with T5's rules for spaces.")

    extra = settings.get("extra_ids", 100)
    if type(extra) is not int or not 0 <= extra <= _EXTRA_LIMIT:
        settings_file = file.with_name("tokenizer_config.json")
        raise ValueError(f"{settings_file}: extra_ids cannot be '{show(extra)}': fetch it again.")
    extra_ids = [f"<extra_id_{i}>" for i in reversed(range(extra))]
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    pieces += [(token, 0.0) for token in extra_ids]
    with readable(file):
        backend = Tokenizer(Unigram(pieces, trained.unk_id, trained.byte_fallback))
        if spec.precompiled_charsmap:
            backend.normalizer = normalizers.Precompiled(spec.precompiled_charsmap)
    words = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    backend.pre_tokenizer = pre_tokenizers.Sequence(words)
    special = (_UNKNOWN, _CONTROL, _USER_DEFINED)
    named = [piece.piece for piece in model.pieces if piece.type in special]
    _add_special_tokens(backend, [*named, "</s>", *extra_ids], settings, file)
    ends = [("</s>", backend.token_to_id("</s>"))]
    backend.post_processor = TemplateProcessing(single="$A </s>", special_tokens=ends)
    return backend


def _read_byte_pairs(vocabulary: Path, merges: Path, settings: Mapping[str, Any]) -> Tokenizer:
    """Read CLIP's byte-pair encoding."""
    _check_file(vocabulary)
    _check_file(merges)
    try:
        words, pairs = BPE.read_file(str(vocabulary), str(merges))
        model = BPE(
            words,
            pairs,
            unk_token=_CLIP_END,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
        )
    except Exception as error:
        raise ValueError(
            f"{vocabulary} and {merges.name}: hold no vocabulary that can be read "
            f"({show(str(error))}): fetch both again."
        ) from error
    made = {first + second for first, second in pairs} | {_CLIP_START, _CLIP_END}
    unmade = [word for word in words if len(word.removesuffix("</w>")) > 1 and word not in made]
    if unmade:
        raise ValueError(
            f"{merges}: lacks the merges of {len(unmade)} words of {vocabulary.name}, "
            f"'{show(unmade[0])}' among them: fetch both again."
        )
    backend = Tokenizer(model)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    split = pre_tokenizers.Split(_CLIP_WORD, behavior="removed", invert=True)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    _add_special_tokens(backend, [_CLIP_START, _CLIP_END], settings, vocabulary)
    ends = [(token, words[token]) for token in (_CLIP_START, _CLIP_END)]
    frame = TemplateProcessing(single=f"{_CLIP_START} $A {_CLIP_END}", special_tokens=ends)
    backend.post_processor = frame
    return backend


def _add_special_tokens(
    backend: Tokenizer, tokens: Iterable[str], settings: Mapping[str, Any], file: Path
) -> None:
    """Add the special tokens of prompts, with the flags and ids in the settings.

    The flags determine whether a token absorbs the spaces beside it, and whether it is recognised
    before or after the text is normalised.
    """
    for token in tokens:
        if backend.token_to_id(token) is None:
            raise ValueError(f"{file}: its vocabulary lacks '{show(token)}': fetch it again.")
    flags: dict[str, dict[str, bool]] = {token: {} for token in tokens}
    # Older files spell out only the tokens with a role; of several roles, the last one counts.
    roles = [settings.get(f"{role}_token") for role in ("unk", "bos", "eos", "pad")]
    try:
        named = [{"content": role} if isinstance(role, str) else role for role in roles if role]
        known = [entry for entry in named if backend.token_to_id(entry["content"]) is not None]
        listed = {int(i): entry for i, entry in settings.get("added_tokens_decoder", {}).items()}
        for entry in [*known, *(listed[index] for index in sorted(listed))]:
            flags[entry["content"]] = {name: entry[name] for name in _FLAGS if name in entry}
        backend.add_special_tokens(
            [AddedToken(token, special=True, **kept) for token, kept in flags.items()]
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file.with_name('tokenizer_config.json')}: the tokens that it lists are damaged "
            f"({show(repr(error))}): fetch it again."
        ) from error
    for index, entry in listed.items():
        found = backend.token_to_id(entry["content"])
        if found != index:
            raise ValueError(
                f"{file}: has '{show(entry['content'])}' at {found}, and tokenizer_config.json at "
                f"{index}: the two are not of one tokenizer, fetch both again."
            )


@contextlib.contextmanager
def readable(what: Path | str) -> Iterator[None]:
    """Turn any error of `tokenizers`, panics included, into one sentence.

    Raises:
        ValueError: If any other error occurs.
    """
    try:
        yield
    except BaseException as error:  # it raises bare Exceptions, and panics are not even these
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise _damaged(what, error) from error


def _check_steps(backend: Tokenizer, file: Path) -> None:
    """Refuse steps that together could make a short text huge."""
    for part in (backend.normalizer, backend.pre_tokenizer, backend.post_processor):
        if part is None:
            continue
        left, steps = [json.loads(part.__getstate__())], 0
        while left:
            node = left.pop()
            if isinstance(node, list):
                left += node
            if not isinstance(node, dict):
                continue
            left += node.values()
            if "type" not in node:
                continue
            steps += 1
            grows = len(node.get("content", node.get("prepend", ""))) > _GROWTH_LIMIT
            if steps > _STEPS_LIMIT or grows or len(node.get("single", "")) > _STEPS_LIMIT:
                raise _damaged(file, "it makes too much of a text")


def _check_file(file: Path) -> None:
    check_regular(file)
    if file.stat().st_size > SIZE_LIMIT:
        raise ValueError(f"{file}: is larger than {SIZE_LIMIT} bytes: fetch it again.")
    with file.open("rb") as stream:
        if stream.read(8) == b"version ":
            raise ValueError(
                f"{file}: is a Git-LFS pointer, not the vocabulary: run `git lfs pull` in that "
                "folder."
            )


def _damaged(file: Path | str, error: BaseException | str) -> ValueError:
    reason = show(str(error))
    return ValueError(f"{file}: holds no tokenizer that can be read ({reason}): fetch it again.")
