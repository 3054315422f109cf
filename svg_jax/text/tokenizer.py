"""From prompts to token ids, as by the tokenizers of T5, UMT5, LLaMA 3 and CLIP."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32
from tokenizers import Encoding, Tokenizer
from tokenizers.models import WordLevel

from svg_jax.convert.formats.json_file import read_json
from svg_jax.convert.formats.show import show
from svg_jax.text.tokenizer_files import read_backend, readable

_LISTED = 380  # characters of a vocabulary in an error message
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Tokens:
    """Prompts as a text encoder reads them.

    Attributes:
        ids: Token ids, padded on the right.
        mask: Mask of the tokens: 1 for a prompt's token, 0 for padding.
    """

    ids: Int32[np.ndarray, "batch length"]
    mask: Int32[np.ndarray, "batch length"]


@dataclass(frozen=True)
class PromptTokenizer:
    """A tokenizer and its padding.

    Attributes:
        backend: Tokenizer that neither pads nor truncates.
        pad_id: Id of the padding token.
        known_words: All words of a word-level vocabulary; None if any word can be spelled.
    """

    backend: Tokenizer
    pad_id: int
    known_words: tuple[str, ...] | None

    def __call__(
        self, prompts: Sequence[str], max_length: int
    ) -> Int32[np.ndarray, "batch max_length"]:
        """Return only the ids of `encode`, for an encoder without a mask."""
        return self.encode(prompts, max_length).ids

    def encode(self, prompts: Sequence[str], max_length: int) -> Tokens:
        """Tokenize prompts, with start and end tokens and padding to max_length.

        Special tokens in the text of a prompt (`</s>`) count as these tokens, as in transformers. A
        prompt that is too long is cut and keeps its end token; a warning quotes what is lost.

        Raises:
            ValueError: If a word-level vocabulary lacks a word (the error lists its words), text is
                not Unicode, or max_length leaves no room for text.
        """
        room = max_length - self.backend.num_special_tokens_to_add(is_pair=False)
        if room < 1:
            special = max_length - room
            raise ValueError(f"max_sequence_length must be over {special}: got {max_length}")
        ids = np.full((len(prompts), max_length), self.pad_id, np.int32)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            encoding = self._encode(prompt)
            if len(encoding) > room:
                lost = prompt[encoding.offsets[room][0] :]
                _LOGGER.warning(
                    "the prompt is longer than %d tokens: %r was cut off", max_length, lost
                )
                encoding.truncate(room)
            encoding = self.backend.post_process(encoding)
            ids[row, : len(encoding)] = encoding.ids
            mask[row, : len(encoding)] = 1
        return Tokens(ids, mask)

    def token_id(self, token: str) -> int:
        """Look up the id of a token.

        Raises:
            ValueError: If the vocabulary lacks it.
        """
        index = self.backend.token_to_id(token)
        if index is None:
            raise ValueError(
                f"the tokenizer has no token '{show(token)}': it is not the model's own"
            )
        return index

    def _encode(self, prompt: str) -> Encoding:
        """Tokenize one prompt, without start and end tokens."""
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the prompt {prompt!r:.80} is no valid Unicode: {error.reason}"
            ) from None
        with readable("the prompt's tokenizer"):
            encoding = self.backend.encode(prompt, add_special_tokens=False)
        if self.known_words is not None:
            unknown = self.backend.token_to_id(getattr(self.backend.model, "unk_token", "") or "")
            words = [
                prompt[start:end]
                for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
                if token == unknown
            ]
            if words:
                quoted = show(", ".join(f"'{show(word)}'" for word in dict.fromkeys(words)))
                known = show(", ".join(map(show, self.known_words)), _LISTED)
                raise ValueError(f"this model does not know {quoted}; it knows: {known}")
        return encoding


def load_tokenizer(folder: str | Path) -> PromptTokenizer:
    """Read a tokenizer's folder, in any form of `tokenizer_files`.

    Raises:
        FileNotFoundError: If there is no vocabulary.
        ValueError: If a file is damaged, or the padding token is missing.
    """
    settings_file = Path(folder) / "tokenizer_config.json"
    settings = read_json(settings_file)
    backend = read_backend(Path(folder), settings)
    pad_id = _padding(backend, settings, settings_file)
    known_words = None
    if isinstance(backend.model, WordLevel):
        special = {token.content for token in backend.get_added_tokens_decoder().values()}
        known_words = tuple(sorted(backend.get_vocab().keys() - special))
    return PromptTokenizer(backend, pad_id, known_words)


def _padding(backend: Tokenizer, settings: Mapping[str, Any], file: Path) -> int:
    """Look up the id of the padding token."""
    for side in ("padding_side", "truncation_side"):
        if settings.get(side, "right") != "right":
            raise ValueError(
                f"{file}: {side}={settings[side]!r:.80} is not implemented, only 'right'."
            )
    pad_token = settings.get("pad_token", "<pad>")
    if isinstance(pad_token, dict):  # older files spell the token out as an object
        pad_token = pad_token.get("content")
    pad_id = backend.token_to_id(pad_token) if isinstance(pad_token, str) else None
    if pad_id is None:
        raise ValueError(f"{file}: the padding token '{show(pad_token)}' is not in the vocabulary.")
    return pad_id
