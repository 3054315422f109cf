"""What inspect says of a folder, in both layouts: golden texts and numbers."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tiny_lora
import torch
from safetensors.numpy import load_file
from tiny_lora import Q
from tiny_source import ENCODER_FILE, TEXT_ENCODER, TRANSFORMER_FILE, sha256, write_source

from svg_jax.convert import ConversionError, DamageError, convert_pipeline, read_contents
from svg_jax.convert.contents import Statistics, tensor_statistics

DATA = Path(__file__).parents[1] / "data" / "original"
TABLE = """\
CogVideoXPipeline, {layout}
component     class                        parameters  size      dtypes
text_encoder  T5EncoderModel               5,584       11.17 kB  float16
transformer   CogVideoXTransformer3DModel  42,224      84.45 kB  bfloat16
scheduler     CogVideoXDDIMScheduler
tokenizer     T5Tokenizer
text_encoder: model_type='t5', dtype='float16', d_model=16, d_ff=32, d_kv=8, num_heads=2, \
num_layers=2, vocab_size=20, feed_forward_proj='gated-gelu'
"""
MEASURED = [
    "text_encoder shape dtype min max mean std not finite",
    "encoder.block.0.layer.0.SelfAttention.k.weight 16×16 float16 -3.197 2.875 -0.04278 1.006 0",
    "encoder.block.0.layer.0.SelfAttention.o.weight 16×16 float16 -2.246 2.221 -0.02524 0.9923 0",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contents")
    source = write_source(folder / "source")
    convert_pipeline(source, folder / "converted")
    return folder


@pytest.fixture
def printed_by(run):
    """Call the command line, which succeeds; what it printed."""

    def call(*arguments):
        result = run(*arguments)
        assert not result.code, result.err
        return "\n".join(line.rstrip() for line in result.out.splitlines()) + "\n"

    return call


@pytest.mark.parametrize(
    ("name", "layout"), [("source", "not converted"), ("converted", "converted")]
)
def test_the_table_of_components(folders, printed_by, name, layout):
    printed = printed_by("inspect", folders / name)
    assert printed.startswith(TABLE.format(layout=layout))
    assert printed.splitlines()[-1].startswith("transformer: _class_name='CogVideoXTransformer3D")


def test_the_table_of_tensors_follows(folders, printed_by):
    printed = printed_by("inspect", folders / "converted", "--stats")
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert lines[8:11] == MEASURED
    assert len(lines) == 8 + 1 + 21 + 1 + 64
    assert printed == printed_by("inspect", folders / "source", "--stats").replace(
        "not converted", "converted"
    )


def test_json_has_the_same(folders, printed_by):
    values = json.loads(printed_by("inspect", folders / "converted", "--stats", "--json", "-"))
    assert (values["pipeline"], values["converted"]) == ("CogVideoXPipeline", True)
    encoder, transformer = values["components"]
    assert encoder["config"] == TEXT_ENCODER
    assert (encoder["parameters"], encoder["bytes"]) == (5584, 11168)
    assert transformer["dtypes"] == {"bfloat16": 42224}
    stored = load_file(folders / "source" / TRANSFORMER_FILE)
    tensors = {tensor["name"]: tensor for tensor in transformer["tensors"]}
    assert tensors.keys() == stored.keys()
    for name, tensor in stored.items():
        assert tensors[name]["shape"] == list(tensor.shape)
        exact = tensor.astype(np.float64)
        assert tensors[name]["statistics"] == {
            "minimum": exact.min(),
            "maximum": exact.max(),
            "mean": pytest.approx(exact.mean()),
            "std": pytest.approx(exact.std()),
            "nonfinite": 0,
        }


def test_statistics_are_read_a_tensor_at_a_time_and_counted(folders):
    calls = []
    read_contents(folders / "source", statistics=True, progress=lambda *call: calls.append(call))
    assert calls[-1][:2] == (11168 + 84448, 11168 + 84448)
    calls.clear()
    read_contents(folders / "source", progress=lambda *call: calls.append(call))
    assert calls == []


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_statistics_leave_out_what_is_no_number(monkeypatch, dtype):
    monkeypatch.setattr("svg_jax.convert.contents._PIECE", 7)  # many pieces are merged
    array = (np.arange(60) * 0.5 + 100).astype(dtype).reshape(3, 20)
    expected = array.astype(np.float64)
    array[1, 3], array[2, 5], array[2, 6] = np.nan, np.inf, -np.inf
    expected = np.delete(expected.reshape(-1), [23, 45, 46])
    found = tensor_statistics(array)
    assert (found.minimum, found.maximum) == (expected.min(), expected.max())
    assert found.mean == pytest.approx(expected.mean())
    assert found.std == pytest.approx(expected.std())
    assert found.nonfinite == 3


def test_statistics_of_nothing():
    nothing = Statistics(None, None, None, None, 0)
    assert tensor_statistics(np.zeros((0, 3), np.float32)) == nothing


def test_dry_run_says_what_would_be_written(folders, printed_by, tmp_path):
    printed = printed_by(
        "convert", folders / "source", tmp_path / "out", "--dry-run", "--cast=float32"
    )
    assert list(tmp_path.iterdir()) == []
    header, *rows, total = (" ".join(line.split()) for line in printed.splitlines())
    assert header == "component class tensors read written dtypes not needed"
    assert rows == [
        "text_encoder T5EncoderModel 21 11.17 kB 22.34 kB float32",
        "transformer CogVideoXTransformer3DModel 64 84.45 kB 168.90 kB float32",
    ]
    assert total.endswith("these weights, 3 small files as they are, and a manifest")


UMT5 = """\
component     class             parameters  size      dtypes
text_encoder  UMT5EncoderModel  5,920       23.68 kB  float32
text_encoder: Wan's text encoder as released; by the names of UMT5EncoderModel
text_encoder: """


@pytest.mark.parametrize("alone", [True, False])
def test_an_original_file_is_shown_by_the_names_that_it_will_have(tmp_path, printed_by, alone):
    shapes = json.loads((DATA / "wan_encoders.json").read_text())["umt5"]["shapes"]
    random = np.random.default_rng(0)
    tensors = {name: random.normal(size=shape) for name, shape in shapes.items()}
    source = tmp_path / "source"
    file = source / "text_encoder/models_t5.pth"
    file.parent.mkdir(parents=True)
    torch.save({name: torch.tensor(of, dtype=torch.float32) for name, of in tensors.items()}, file)
    index = {"_class_name": "WanPipeline", "text_encoder": ["transformers", "UMT5EncoderModel"]}
    (source / "model_index.json").write_text(json.dumps(index))
    printed = printed_by("inspect", file if alone else source)
    first = "a component alone, not converted" if alone else "WanPipeline, not converted"
    assert printed.startswith(f"{first}\n{UMT5}")
    assert "d_model=16" in printed
    (part,) = read_contents(file.parent if alone else source, statistics=True).components
    measured = {tensor.name: tensor.statistics for tensor in part.tensors}
    key = "encoder.block.1.layer.1.DenseReluDense.wi_1.weight"
    found = measured[key]
    assert found is not None
    assert found.maximum == tensors["blocks.1.ffn.fc1.weight"].astype(np.float32).max()

    convert_pipeline(file if alone else source, tmp_path / "out")
    again = printed_by("inspect", tmp_path / "out").splitlines()
    first = "a component alone, converted" if alone else "WanPipeline, converted"
    assert again[:3] == [first, *printed.splitlines()[1:3]]
    (converted,) = read_contents(tmp_path / "out", statistics=True).components
    assert {tensor.name: tensor.statistics for tensor in converted.tensors} == measured


def test_merged_loras_are_shown(tmp_path, printed_by):
    source = tiny_lora.write_source(tmp_path / "source")
    loras = [
        tiny_lora.save_lora(tmp_path / f"loras/{name}", tiny_lora.random_lora(source, [module]))
        for name, module in (("a.safetensors", Q), ("b.safetensors", "blocks.0.ffn.net.2"))
    ]
    convert_pipeline(source, tmp_path / "out", lora=loras, lora_scale=[0.8, 1.0])
    lines = printed_by("inspect", tmp_path / "out").splitlines()
    digests = [sha256(lora.read_bytes()) for lora in loras]
    assert lines[:1] + lines[3:5] == [
        "WanPipeline, converted",
        f"merged: a.safetensors at 0.8 into transformer (a.safetensors sha256 {digests[0]})",
        f"merged: b.safetensors at 1 into transformer (b.safetensors sha256 {digests[1]})",
    ]
    values = json.loads(printed_by("inspect", tmp_path / "out", "--json", "-"))
    assert values["loras"] == [
        {"source": name, "scale": scale, "files": {name: sha}, "into": "transformer", "skipped": []}
        for name, scale, sha in zip(
            ("a.safetensors", "b.safetensors"), (0.8, 1.0), digests, strict=True
        )
    ]
    assert values["components"][0]["release"] is None


def test_what_cannot_be_read_is_told(folders, tmp_path):
    with pytest.raises(ConversionError, match="is no folder"):
        read_contents(tmp_path / "nowhere")
    source = write_source(tmp_path / "source")
    (source / ENCODER_FILE).write_bytes(b"")
    with pytest.raises(ConversionError, match="has only 0 bytes"):
        read_contents(source)
    convert_pipeline(folders / "source", tmp_path / "out")
    (tmp_path / "out/text_encoder/config.json").write_text("{}")
    with pytest.raises(DamageError, match="is not the file that was converted"):
        read_contents(tmp_path / "out")
