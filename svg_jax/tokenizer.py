"""Prompts to token ids, as T5's tokenizers do it."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int32
from tokenizers import Encoding, Tokenizer


@dataclass(frozen=True)
class PromptTokenizer:
    """A `tokenizer.json` and what its neighbour says about padding.

    Attributes:
        backend: The tokenizer, neither padding nor truncating.
        pad_id: Token that fills a prompt up.
        known_words: All words of a word-level vocabulary; None where any word can be spelled.
    """

    backend: Tokenizer
    pad_id: int
    known_words: tuple[str, ...] | None

    def __call__(
        self, prompts: Sequence[str], max_length: int
    ) -> Int32[np.ndarray, "batch max_length"]:
        """Token ids with the end token, padded to max_length.

        A prompt that is too long is cut, its end token kept, with a warning that quotes what is
        lost.

        Raises:
            ValueError: At words that a word-level vocabulary lacks; the error lists those it has.
        """
        ids = np.full((len(prompts), max_length), self.pad_id, np.int32)
        for row, prompt in zip(ids, prompts, strict=True):
            encoding = self.backend.encode(prompt)
            self._check_words(prompt, encoding)
            if len(encoding.ids) > max_length:
                encoding = self._cut(prompt, encoding, max_length)
            row[: len(encoding.ids)] = encoding.ids
        return ids

    def _check_words(self, prompt: str, encoding: Encoding) -> None:
        if self.known_words is None:
            return
        unknown = self.backend.token_to_id(getattr(self.backend.model, "unk_token", "") or "")
        words = [
            prompt[start:end]
            for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
            if token == unknown
        ]
        if words:
            quoted = ", ".join(repr(word) for word in dict.fromkeys(words))
            raise ValueError(
                f"this model does not know {quoted}; it knows: {', '.join(self.known_words)}"
            )

    def _cut(self, prompt: str, encoding: Encoding, max_length: int) -> Encoding:
        special = self.backend.num_special_tokens_to_add(is_pair=False)
        if max_length <= special:
            raise ValueError(f"max_sequence_length must be over {special}: got {max_length}")
        lost = prompt[encoding.offsets[max_length - special][0] :]
        warnings.warn(
            f"the prompt is longer than {max_length} tokens: {lost!r} was cut off", stacklevel=4
        )
        encoding.truncate(max_length - special)
        end = self.backend.encode("")  # the special tokens alone
        return Encoding.merge([encoding, end], growing_offsets=False)


def load_tokenizer(folder: str | Path) -> PromptTokenizer:
    """Reads `tokenizer.json` and `tokenizer_config.json` of a tokenizer's folder.

    Raises:
        FileNotFoundError: If there is no tokenizer.json.
        ValueError: If the files are damaged or have no padding token.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        if (folder / "spiece.model").is_file():
            raise FileNotFoundError(
                f"{folder} has only spiece.model, which is not read yet: "
                "put the same tokenizer's tokenizer.json beside it, or pass prompt embeddings"
            )
        raise FileNotFoundError(f"there is no tokenizer at {path}")
    try:
        backend = Tokenizer.from_file(str(path))
        kind = json.loads(path.read_text())["model"].get("type")
        settings = json.loads((folder / "tokenizer_config.json").read_text())
    except FileNotFoundError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{folder} holds no tokenizer that can be read: {error}") from error
    backend.no_padding()
    backend.no_truncation()
    pad_token = settings.get("pad_token", "<pad>")
    if isinstance(pad_token, dict):  # older files spell the token out as an object
        pad_token = pad_token["content"]
    pad_id = backend.token_to_id(pad_token)
    if pad_id is None:
        raise ValueError(f"{folder}: the padding token {pad_token!r} is not in the vocabulary")
    known_words = None
    if kind == "WordLevel":
        special = {token.content for token in backend.get_added_tokens_decoder().values()}
        known_words = tuple(sorted(backend.get_vocab().keys() - special))
    return PromptTokenizer(backend, pad_id, known_words)
