"""JSON of strangers: read in linear time and bounded memory, or refused in one sentence."""

import json
import struct
import time
import tracemalloc

import pytest

from svg_jax.convert import ConversionError, read_contents
from svg_jax.convert.formats.json_file import JSON_LIMIT, parse_json, read_json
from svg_jax.convert.formats.safetensors_file import read_header
from svg_jax.convert.formats.show import show
from svg_jax.text.tokenizer import load_tokenizer

MANY = ",".join(f'"{number:08}":0' for number in range(100_000))
ODD = {
    "a key twice at the end of many": (f'{{{MANY},"zz":1,"zz":2}}'.encode(), "'zz' occurs twice"),
    "a key twice, deep inside": (b'{"a":[{"b":{"c":1,"c":1}}]}', "'c' occurs twice"),
    "a key twice, of commands": (b'{"\\u001b]0;x\\u0007":1,"\\u001b]0;x\\u0007":1}', r"x1b\]0;x"),
    "deep lists": (b'{"a":' + b"[" * 500_000, "nests too deeply"),
    "deep objects": (b'{"a":' * 100_000, "nests too deeply"),
    "a number of a million digits": (b'{"a":' + b"9" * 10**6 + b"}", "no whole JSON"),
    "a number larger than any": (b'{"a":1e400}', "1e400 is too large"),
    "not a number": (b'{"a":NaN}', "NaN is no number"),
    "minus infinity": (b'{"a":[-Infinity]}', "-Infinity is no number"),
    "a byte order mark": (b'\xef\xbb\xbf{"a":1}', "no whole JSON"),
    "UTF-16": ('{"a":1}'.encode("utf-16"), "no whole JSON"),
    "half a character": (b'{"a":"\\ud800"}', "no whole JSON"),
    "the other half as a key": (b'{"\\uDfff":1}', "no whole JSON"),
    "a control character": (b'{"a":"\x1b"}', "no whole JSON"),
    "a list": (b"[1]", "not an object"),
    "nothing": (b"", "no whole JSON"),
}


@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize("reader", ["a config", "a header", "a tokenizer's settings"])
def test_what_is_no_plain_object_is_refused_at_once(tmp_path, case, reader):
    text, message = ODD[case]
    file = tmp_path / ("model.safetensors" if reader == "a header" else "tokenizer_config.json")
    read = {"a config": read_json, "a header": read_header}.get(
        reader, lambda _: load_tokenizer(tmp_path)
    )
    if reader == "a header":
        file.write_bytes(struct.pack("<Q", len(text)) + text)
        message = message if text else "claims a header of 0"
    else:
        file.write_bytes(text)
    start = time.process_time()
    with pytest.raises(ConversionError, match=message) as found:
        read(file)
    assert time.process_time() - start < 2
    assert str(file) in str(found.value)
    assert str(found.value).isprintable()
    assert len(str(found.value)) < 500


def test_what_looks_odd_and_is_not_is_read():
    text = (
        b'{"\\ud83d\\ude00":"\\\\ud800","a":{"a":{"a":1e-400}},"b":-0.0,"c":12345678901234567890}'
    )
    expected = {
        "\U0001f600": "\\ud800",
        "a": {"a": {"a": 0.0}},
        "b": 0.0,
        "c": 12345678901234567890,
    }
    assert parse_json(text, "x") == expected == json.loads(text)


def test_a_large_file_is_not_read(tmp_path):
    file = tmp_path / "config.json"
    with file.open("wb") as stream:
        stream.truncate(JSON_LIMIT + 1)
    tracemalloc.start()
    try:
        with pytest.raises(ConversionError, match="is larger than"):
            read_contents(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("plain", "plain"),
        ("\x1b[31mred\x07\n", r"\x1b[31mred\x07\n"),
        ("\u202etxt.exe", r"\u202etxt.exe"),
        ("\ud800", r"\ud800"),
        ("日本", "日本"),
        ("x" * 10**6, "x" * 79 + "…"),
        (["\x1b"], r"['\x1b']"),
        (None, "None"),
    ],
)
def test_what_a_file_says_is_shown_escaped_and_cut(value, shown):
    assert show(value) == shown


def test_a_value_of_any_depth_is_shown():
    value = []
    for _ in range(5000):
        value = [value, "x" * 1000]
    assert len(show(value)) <= 80
