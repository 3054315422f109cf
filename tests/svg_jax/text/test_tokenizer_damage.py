"""Tokenizer folders that are not whole."""

import json
import os
import shutil
import time

import pytest
import sentencepiece
from real_tokenizers import real_tokenizer
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

from svg_jax.text.tokenizer import PromptTokenizer, load_tokenizer
from svg_jax.text.tokenizer_files import SIZE_LIMIT


def train_byte_pairs(prefix):
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["a red panda", "a blue panda"]),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=20,
        minloglevel=2,
    )


def halve(name):
    def cut(folder):
        file = folder / name
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    return cut


def point(name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    return lambda folder: (folder / name).write_text(pointer)


def edit_settings(**more):
    def edit(folder):
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | more))

    return edit


def remove(name):
    return lambda folder: (folder / name).unlink()


def empty(name):
    return lambda folder: (folder / name).write_bytes(b"")


def lose_the_end_token(folder):
    (folder / "vocab.json").write_text('{"a": 0, "<|startoftext|>": 1}')
    (folder / "merges.txt").write_text("#version: 0.2\n")


def lose_all_but_settings(folder):
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()


def enlarge(name):
    """A file of more than a vocabulary takes, of holes."""
    return lambda folder: os.truncate(folder / name, SIZE_LIMIT + 1)


def replace_normalizer(*steps):
    def edit(folder):
        file = folder / "tokenizer.json"
        values = json.loads(file.read_text())
        values["normalizer"] = {"type": "Sequence", "normalizers": list(steps)}
        file.write_text(json.dumps(values))

    return edit


def becomes(content):
    return {"type": "Replace", "pattern": {"String": "a"}, "content": content}


def nest(folder):
    (folder / "tokenizer.json").write_text('{"a":' * 100_000)


SETTINGS = r"tokenizer_config\.json: "
DAMAGES = {
    "t5-spiece": [
        (halve("spiece.model"), r"spiece\.model: holds no tokenizer that can be read"),
        (empty("spiece.model"), r"spiece\.model: holds no tokenizer .* \(it ends early\)"),
        (point("spiece.model"), r"spiece\.model: is a Git-LFS pointer"),
        (lambda folder: train_byte_pairs(folder / "spiece"), r"model: is no unigram model"),
        (edit_settings(extra_ids="many"), f"{SETTINGS}extra_ids cannot be 'many'"),
        (edit_settings(extra_ids=10**9), f"{SETTINGS}extra_ids cannot be '1000000000'"),
        (enlarge("spiece.model"), r"spiece\.model: is larger than"),
        (
            edit_settings(pad_token="\x1b]0;x\x07"),
            rf"{SETTINGS}the padding token '\\x1b\]0;x\\x07'",
        ),
        (edit_settings(extra_ids="\x1b" * 10**6), rf"{SETTINGS}extra_ids cannot be '\\x1b"),
        (edit_settings(extra_ids=99), r"spiece\.model: has '<extra_id_99>' at 32099, and"),
        (edit_settings(added_tokens_decoder={"0": {}}), f"{SETTINGS}the tokens that it lists are"),
        (edit_settings(eos_token={"id": 1}), f"{SETTINGS}the tokens that it lists are damaged"),
        (edit_settings(pad_token="[PAD]"), rf"{SETTINGS}the padding token '\[PAD\]' is not in"),
        (remove("tokenizer_config.json"), f"{SETTINGS}cannot be read"),
        (halve("tokenizer_config.json"), f"{SETTINGS}is no whole JSON"),
    ],
    "t5-json": [
        (halve("tokenizer.json"), r"tokenizer\.json: holds no tokenizer that can be read"),
        (empty("tokenizer.json"), r"tokenizer\.json: holds no tokenizer that can be read"),
        (enlarge("tokenizer.json"), r"tokenizer\.json: is larger than"),
        (nest, r"tokenizer\.json: holds no tokenizer that can be read"),
        (replace_normalizer(*[becomes("aa")] * 60), r"tokenizer\.json: .*makes too much of a text"),
        (replace_normalizer(becomes("a" * 10**6)), r"tokenizer\.json: .*makes too much of a text"),
        (point("tokenizer.json"), r"tokenizer\.json: is a Git-LFS pointer"),
        (edit_settings(padding_side="left"), f"{SETTINGS}padding_side='left' is not implemented"),
    ],
    "clip": [
        (halve("vocab.json"), r"vocab\.json and merges\.txt: hold no vocabulary"),
        (halve("merges.txt"), r"vocab\.json and merges\.txt: hold no vocabulary"),
        (empty("merges.txt"), r"merges\.txt: lacks the merges of 48894 words of vocab\.json, "),
        (lose_the_end_token, r"vocab\.json: its vocabulary lacks '<\|endoftext\|>'"),
        (remove("vocab.json"), r"vocab\.json: is missing, half of the vocabulary"),
        (remove("merges.txt"), r"merges\.txt: is missing, half of the vocabulary"),
        (lose_all_but_settings, r"there is no tokenizer: neither tokenizer\.json nor spiece"),
    ],
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_refused_with_a_sentence_that_names_the_file(name, tmp_path):
    for number, (damage, message) in enumerate(DAMAGES[name]):
        folder = tmp_path / str(number)
        shutil.copytree(real_tokenizer(name), folder)
        damage(folder)
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            load_tokenizer(folder)
        assert str(folder) in str(error.value)
        assert str(error.value).isprintable()
        assert len(str(error.value)) <= 500


def test_a_pattern_that_would_take_for_ever_ends_in_a_sentence():
    backend = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"(a+)+$"), behavior="isolated")
    start = time.process_time()
    with pytest.raises(ValueError, match=r"holds no tokenizer that can be read .*retry-limit"):
        PromptTokenizer(backend, 0, None)(["a" * 99 + "b"], 10)
    assert time.process_time() - start < 20


def test_a_vocabulary_is_listed_escaped_and_in_part():
    words = {f"word{i}\x1b": i for i in range(10_000)}
    tokenizer = PromptTokenizer(Tokenizer(WordLevel(words, unk_token="word0\x1b")), 0, tuple(words))
    with pytest.raises(ValueError, match=r"does not know 'b.*it knows: word0\\x1b, word1") as error:
        tokenizer(["b" * 10**4], 10)
    assert str(error.value).isprintable()
    assert len(str(error.value)) <= 500
