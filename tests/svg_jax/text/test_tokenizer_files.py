"""Released tokenizer files in every form, against transformers on the same files."""

import json
import re
import unicodedata

import numpy as np
import pytest
import sentencepiece
from odd_prompts import odd_prompts
from real_tokenizers import real_tokenizer
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import Unigram
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import UnigramTrainer
from transformers import CLIPTokenizer, PreTrainedTokenizerFast, T5Tokenizer

from svg_jax.text.tokenizer import load_tokenizer

PROMPTS = odd_prompts(1500)


def assert_same(folder, theirs, lengths):
    """Ids and masks of all prompts, cut and padded to each length, are transformers' own."""
    ours = load_tokenizer(folder)
    for length in lengths:
        expected = theirs(
            PROMPTS, padding="max_length", max_length=length, truncation=True, return_tensors="np"
        )
        tokens = ours.encode(PROMPTS, length)
        for prompt, *rows in zip(PROMPTS, tokens.ids, expected["input_ids"], strict=True):
            assert rows[0].tolist() == rows[1].tolist(), repr(prompt)
        np.testing.assert_array_equal(tokens.mask, expected["attention_mask"])
        assert tokens.ids.dtype == tokens.mask.dtype == np.int32


# Not by the class that LLaMA's settings name: transformers 5 rebuilds that one as LLaMA 2's.
@pytest.mark.parametrize(
    ("name", "kind", "lengths"),
    [
        ("t5-spiece", T5Tokenizer, (226, 7)),
        ("t5-json", PreTrainedTokenizerFast, (226, 7)),
        ("clip", CLIPTokenizer, (77, 7)),
        ("clip-older-settings", CLIPTokenizer, (77,)),
        ("llama3", PreTrainedTokenizerFast, (351, 7)),
    ],
)
def test_ids_and_masks_are_those_of_transformers(name, kind, lengths):
    folder = real_tokenizer(name)
    assert_same(folder, kind.from_pretrained(folder), lengths)


SPECIAL = ["<pad>", "</s>", "<s>", "<unk>"]  # UMT5's order, which is not T5's


def corpus():
    return [f"{a} {b} {c}" for a, b, c in zip(PROMPTS, PROMPTS[7:], PROMPTS[31:], strict=False)]


def charsmap():
    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    model.ParseFromString((real_tokenizer("t5-spiece") / "spiece.model").read_bytes())
    return model.normalizer_spec.precompiled_charsmap


def save_settings(folder, **more):
    roles = ["pad", "eos", "bos", "unk"]
    settings = {f"{role}_token": token for role, token in zip(roles, SPECIAL, strict=True)}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | more))


def test_ids_are_those_of_transformers_for_a_vocabulary_in_umt5s_order(tmp_path):
    trained = Tokenizer(Unigram())
    trained.normalizer = normalizers.Precompiled(charsmap())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(corpus(), UnigramTrainer(vocab_size=600, show_progress=False))
    extra = [f"<extra_id_{i}>" for i in reversed(range(300))]
    vocabulary = json.loads(trained.to_str())["model"]["vocab"]
    pieces = [(p, score) for p, score in vocabulary if p not in SPECIAL + extra]
    backend = Tokenizer(Unigram([*((token, 0.0) for token in SPECIAL), *pieces], 3, False))
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.Precompiled(charsmap()),
            normalizers.Strip(left=False, right=True),
            normalizers.Replace(Regex(" {2,}"), "▁"),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.add_special_tokens([AddedToken(token) for token in SPECIAL + extra])
    backend.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    backend.save(str(tmp_path / "tokenizer.json"))
    save_settings(tmp_path, tokenizer_class="T5Tokenizer")
    assert_same(tmp_path, PreTrainedTokenizerFast.from_pretrained(tmp_path), (512, 7))
    ids = load_tokenizer(tmp_path)(["<s><unk><extra_id_0>"], 5)
    assert ids.tolist() == [[2, 3, len(pieces) + 303, 1, 0]]


def train_sentencepiece(folder):
    """A small model with UMT5's ids."""
    lines = [line for line in corpus() if not set("\0\n") & set(line)]
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "spiece"),
        vocab_size=700,
        hard_vocab_limit=False,
        **dict(zip(("pad_id", "eos_id", "bos_id", "unk_id"), range(4), strict=True)),
        pad_piece="<pad>",
        byte_fallback=True,
        minloglevel=2,
    )
    save_settings(folder, extra_ids=300)


def is_composing(character):
    jamo = "\u1100" <= character <= "\u11ff"
    return jamo or character == "\u0e33" or unicodedata.category(character) in ("Mn", "Mc", "Cf")


# transformers 5 takes spiece.model for T5's: no bytes, and the third piece for the unknown one.
@pytest.mark.parametrize("name", ["mt5-spiece", "trained"])
def test_bytes_spell_unknown_characters_as_in_sentencepiece(name, tmp_path):
    if name == "trained":
        folder = tmp_path
        train_sentencepiece(folder)
    else:
        folder = real_tokenizer(name)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    ours = load_tokenizer(folder)
    special = {t.content: i for i, t in ours.backend.get_added_tokens_decoder().items()}
    pattern = re.compile(f"({'|'.join(map(re.escape, special))})")
    # The libraries normalise what is composed of several characters differently, and one takes
    # U+0085 for a space.
    prompts = [p for p in PROMPTS if not any(map(is_composing, p)) and "\x85" not in p]
    assert len(prompts) > 500
    for prompt in prompts:
        expected = []
        # Texts and, at every second place, the special tokens between them.
        for i, part in enumerate(pattern.split(prompt)):
            expected += [special[part]] if i % 2 else theirs.encode(part)
        assert ours.backend.encode(prompt).ids == [*expected, 1], repr(prompt)
    assert theirs.id_to_piece(ours.backend.encode("\U00020001").ids[-2]) == "<0x81>"
