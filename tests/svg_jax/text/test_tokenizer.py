"""Prompts to token ids, against transformers' tokenizer on the same files."""

import json
import logging

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import Unigram, WordLevel
from tokenizers.pre_tokenizers import Metaspace, WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from svg_jax.text.tokenizer import load_tokenizer

WORDS = ["a", "red", "blue", "three", "moving", "left", "over", "the", "flower"]


def save(tokenizer, folder, **settings):
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = special | {"tokenizer_class": "PreTrainedTokenizerFast"} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def word_level(tmp_path):
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return save(tokenizer, tmp_path / "word_level")


@pytest.fixture
def unigram(tmp_path):
    """As T5's: pieces with a score, a word begins with ▁, bytes are not a fallback."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(f"▁{word}", -5.0) for word in WORDS]
    pieces += [(letter, -8.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = Metaspace()
    return save(tokenizer, tmp_path / "unigram")


@pytest.mark.parametrize("kind", ["word_level", "unigram"])
def test_ids_are_those_of_transformers(kind, request):
    transformers = pytest.importorskip("transformers")
    folder = request.getfixturevalue(kind)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    prompts = ["a red three moving left", "", "  the   flower ", "a blue three over the flower"]
    expected = theirs(
        prompts, padding="max_length", max_length=12, truncation=True, return_tensors="np"
    )["input_ids"]
    np.testing.assert_array_equal(load_tokenizer(folder)(prompts, 12), expected)


def test_a_long_prompt_is_cut_as_transformers_does_and_said(unigram, caplog):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(unigram)
    prompt = "a red three moving left over the flower"
    expected = theirs([prompt], max_length=6, truncation=True, return_tensors="np")["input_ids"]
    with caplog.at_level(logging.WARNING, "svg_jax"):
        ids = load_tokenizer(unigram)([prompt, "a red"], 6)
    np.testing.assert_array_equal(ids[:1], expected)
    (record,) = caplog.records
    assert record.getMessage().replace("' over", "'over") == (
        "the prompt is longer than 6 tokens: 'over the flower' was cut off"
    )


def test_the_mask_is_that_of_what_was_filled_up_and_not_of_a_pad_token_in_the_prompt(word_level):
    tokens = load_tokenizer(word_level).encode(["a <pad> red", ""], 6)
    assert tokens.ids.tolist() == [[3, 0, 4, 1, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert tokens.mask.tolist() == [[1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]]


def test_a_length_without_room_for_text(word_level):
    with pytest.raises(ValueError, match="max_sequence_length must be over 1: got 1"):
        load_tokenizer(word_level)([""], 1)


def test_text_that_is_no_unicode(unigram):
    with pytest.raises(ValueError, match=r"the prompt 'a \\udcff' is no valid Unicode"):
        load_tokenizer(unigram)(["a \udcff"], 6)


def test_a_token_that_is_not_there(word_level):
    tokenizer = load_tokenizer(word_level)
    assert tokenizer.token_id("red") == 4
    with pytest.raises(ValueError, match="the tokenizer has no token '<image>'"):
        tokenizer.token_id("<image>")


def test_a_prompt_that_just_fits_is_not_cut(word_level):
    ids = load_tokenizer(word_level)(["a red three"], 4)
    assert ids.tolist() == [[3, 4, 6, 1]]


def test_unknown_words_are_named_with_those_that_are_known(word_level):
    with pytest.raises(ValueError, match="does not know 'dog', 'surfing'; it knows: a, blue, "):
        load_tokenizer(word_level)(["a red three", "a dog surfing dog"], 12)


def test_a_subword_vocabulary_takes_any_word(unigram):
    ids = load_tokenizer(unigram)(["a dog Ω"], 12)
    assert ids.shape == (1, 12)


def test_a_tokenizers_own_truncation_and_padding_do_not_count(word_level):
    path = word_level / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(path))
    assert load_tokenizer(word_level)(["a red three"], 6).tolist() == [[3, 4, 6, 1, 0, 0]]
