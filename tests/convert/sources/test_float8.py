"""Weights in dtypes that no model computes in: float8, plain and scaled, and float64; buffers."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file
from tiny_source import ENCODER_FILE, TEXT_ENCODER, random_state, write_json

from svg_jax.cli import checkpoints
from svg_jax.convert import (
    ConversionError,
    convert_pipeline,
    export_pipeline,
    plan_conversion,
    read_contents,
    read_manifest,
    verify_pipeline,
)
from svg_jax.convert.formats.stored_tensor import read_pieces, read_tensor
from svg_jax.convert.releases.renaming import Origin, rename_tensors
from svg_jax.convert.sources.scales import attach_scales
from svg_jax.convert.sources.weights import read_file

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
CODES = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
Q = "encoder.block.0.layer.0.SelfAttention.q"
GOLDENS = json.loads((Path(__file__).parents[2] / "data/original/wan_encoders.json").read_text())


def ours(dtype=np.float32) -> dict[str, torch.Tensor]:
    """A T5's weights by transformers' names."""
    return {n: torch.from_numpy(array) for n, array in random_state("text_encoder", dtype).items()}


def component(folder: Path, tensors, name="model.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", {"architectures": ["T5EncoderModel"], **TEXT_ENCODER})
    save = save_file if name.endswith(".safetensors") else torch.save
    save({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)
    return folder


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "transposed.pt"])
def test_every_number_of_float8_is_widened_exactly(tmp_path, dtype, name):
    held = CODES.view(dtype)
    held = held.t() if "transposed" in name else held
    (torch.save if name.endswith(".pt") else save_file)({"w": held}, tmp_path / name)
    (tensor,) = read_file(tmp_path / name).values()
    assert tensor.converted_dtype == ml_dtypes.bfloat16
    found = read_tensor(tensor)
    assert found.dtype.name == str(dtype).removeprefix("torch.")
    expected = held.float().numpy()
    np.testing.assert_array_equal(found.astype(np.float32), expected)
    np.testing.assert_array_equal(found.astype(ml_dtypes.bfloat16).astype(np.float32), expected)


def finite(shape, seed=0) -> torch.Tensor:
    """Numbers of float8, without those that are none."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(E4M3)


SCALES = {
    "one, of no axis": torch.tensor(0.3),
    "one": torch.tensor([0.3]),
    "one, in bfloat16": torch.tensor([0.3], dtype=torch.bfloat16),
    "one each row": torch.linspace(0.1, 2, 6),
    "a column": torch.linspace(0.1, 2, 6)[:, None],
    "blocks of a row": torch.linspace(0.1, 2, 12).reshape(6, 2, 1),
    "blocks of rows and columns": torch.linspace(0.1, 2, 6).reshape(3, 2),
    "one in float64": torch.tensor(0.3, dtype=torch.float64),
}


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("names", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_scaled_weights_are_the_products_in_float32(tmp_path, monkeypatch, kind, names, suffix):
    monkeypatch.setattr(
        "svg_jax.convert.formats.stored_tensor._PIECE_BYTES", 24
    )  # ends within a row
    weight, scale = finite((6, 10)), SCALES[kind]
    held = {"a.weight": weight, f"a.{names}": scale, "b.weight": torch.ones(2)}
    file = tmp_path / f"a.{suffix}"
    (torch.save if suffix == "pt" else save_file)(held, file)
    tensors = attach_scales(read_file(file))
    assert sorted(tensors) == ["a.weight", "b.weight"]
    factors = scale.float()
    if factors.numel() > 1:
        rows = 6 // factors.shape[0]
        factors = factors.reshape(factors.shape[0], -1).repeat_interleave(rows, 0)
        factors = factors.repeat_interleave(10 // factors.shape[1], 1)
    expected = (weight.float() * factors).numpy()
    assert tensors["a.weight"].converted_dtype == np.float32
    np.testing.assert_array_equal(read_tensor(tensors["a.weight"]), expected)
    raw = b"".join(elements.tobytes() for elements, _ in read_pieces(tensors["a.weight"]))
    assert raw == weight.view(torch.uint8).numpy().tobytes()
    table = [Origin("a", (("x", (0,)), ("y", (1,))), 2)]  # as fused weights are
    if kind == "blocks of rows and columns":
        with pytest.raises(ConversionError, match="cannot be cut between the blocks"):
            rename_tensors({"a.weight": tensors["a.weight"]}, table)
        return
    parts = rename_tensors({"a.weight": tensors["a.weight"]}, table)
    np.testing.assert_array_equal(read_tensor(parts["x.weight"]), expected[:3])
    np.testing.assert_array_equal(read_tensor(parts["y.weight"]), expected[3:])


@pytest.mark.parametrize(
    "scale", [torch.ones(4), torch.ones(6, 3), torch.ones(0), torch.ones(1, dtype=torch.int32)]
)
def test_a_scale_that_fits_no_blocks_is_refused(tmp_path, scale):
    save_file({"a.weight": finite((6, 8)), "a.scale_weight": scale}, tmp_path / "a.safetensors")
    with pytest.raises(ConversionError, match=r"a\.scale_weight .* is no scale of equal blocks"):
        attach_scales(read_file(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_float8_component_converts_is_verified_and_exported(tmp_path, capsys, name):
    tensors = ours()
    matrices = [n for n in tensors if "SelfAttention" in n and "relative" not in n]
    tensors |= {n: tensors[n].to(E4M3) for n in matrices}
    tensors |= {n.replace("weight", "scale_weight"): torch.tensor(0.3) for n in matrices[:3]}
    tensors |= {"scaled_fp8": torch.zeros(2, dtype=E4M3), f"{Q}.scale_input": torch.ones(1)}
    source = component(tmp_path / "t5", tensors, name)
    convert_pipeline(source, tmp_path / "out")
    verify_pipeline(tmp_path / "out")
    records = read_manifest(tmp_path / "out").components["text_encoder"]
    scaled, beside, plain = matrices[2], matrices[3], matrices[-1]
    stored = {n: (records[n].dtype, records[n].stored_dtype) for n in (scaled, beside, plain)}
    # The layers of one parameter have one dtype; float32 holds all of them.
    assert stored[scaled] == stored[beside] == ("float8_e4m3fn", "float32")
    assert stored[plain] == ("float8_e4m3fn", "bfloat16")
    export_pipeline(tmp_path / "out", tmp_path / "back")
    exported = load_file(tmp_path / "back" / ENCODER_FILE)
    for name in (beside, plain):
        found = exported[name].astype(np.float32)
        np.testing.assert_array_equal(found, tensors[name].float().numpy())
    product = tensors[scaled].float() * torch.tensor(0.3)
    np.testing.assert_array_equal(exported[scaled], product.numpy())
    convert_pipeline(source, tmp_path / "cast", dtype="bfloat16")
    export_pipeline(tmp_path / "cast", tmp_path / "cast_back")
    cast = load_file(tmp_path / "cast_back" / ENCODER_FILE)
    np.testing.assert_array_equal(cast[scaled].astype(np.float32), product.bfloat16().float())

    checkpoints.inspect_source(source, statistics=False, variant=None, weights_key=None)
    printed = " ".join(capsys.readouterr().out.split())
    assert "float8_e4m3fn" in printed
    assert "scaled_fp8" in printed
    assert "float8_e4m3fn is converted to bfloat16 and float32" in printed


def test_plain_float8_becomes_bfloat16_and_float64_float32(tmp_path):
    tensors = {n: tensor.to(E5M2) for n, tensor in ours().items()}
    tensors["encoder.final_layer_norm.weight"] = torch.rand(16, dtype=torch.float64)
    source = component(tmp_path / "t5", tensors)
    convert_pipeline(source, tmp_path / "out")
    verify_pipeline(tmp_path / "out")
    export_pipeline(tmp_path / "out", tmp_path / "back")
    exported = load_file(tmp_path / "back" / ENCODER_FILE)
    for name, tensor in tensors.items():
        expected = tensor.bfloat16() if tensor.dtype == E5M2 else tensor.float()
        assert exported[name].dtype.name == str(expected.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(exported[name].astype(np.float32), expected.float().numpy())
    (part,) = read_contents(source).components
    assert part.casts == {"float8_e5m2": "bfloat16", "float64": "float32"}
    record = read_manifest(tmp_path / "out").components["text_encoder"]
    norm = record["encoder.final_layer_norm.weight"]
    assert (norm.dtype, norm.stored_dtype) == ("float64", "float32")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_what_float32_cannot_hold_is_refused(tmp_path, value):
    tensors = ours()
    tensors["encoder.final_layer_norm.weight"] = torch.full((16,), value, dtype=torch.float64)
    message = "holds NaN" if value != 1e300 else "values that float32 cannot hold"
    with pytest.raises(ConversionError, match=message):
        convert_pipeline(component(tmp_path / "t5", tensors), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_float8_that_is_no_number_is_refused(tmp_path, dtype):
    tensors = ours()
    tensors[f"{Q}.weight"] = torch.full((16, 16), float("nan")).to(dtype)
    with pytest.raises(ConversionError, match="holds NaN or infinities"):
        convert_pipeline(component(tmp_path / "t5", tensors), tmp_path / "out")


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_hunyuan_videos_float8_release_has_its_scales_in_a_file_of_their_own(
    tmp_path, beside, prefix
):
    module = "double_blocks.0.img_attn_qkv"
    file = tmp_path / "mp_rank_00_model_states_fp8.pt"
    torch.save({f"{prefix}{module}.weight": finite((6, 2))}, file)
    if not beside:
        with pytest.raises(ConversionError, match=r"keep in mp_rank_00_model_states_fp8_map\.pt"):
            read_file(file)
        return
    torch.save({module: torch.tensor(0.3)}, tmp_path / "mp_rank_00_model_states_fp8_map.pt")
    (tensor,) = attach_scales(read_file(file)).values()
    np.testing.assert_array_equal(
        read_tensor(tensor), (finite((6, 2)).float() * torch.tensor(0.3)).numpy()
    )


BUFFERS = {
    "the vocabulary, as ComfyUI keeps it": ("spiece_model", torch.zeros(9, dtype=torch.uint8)),
    "a format, as ComfyUI keeps it": (f"{Q}.comfy_quant", torch.zeros(9, dtype=torch.uint8)),
    "positions": ("encoder.embeddings.position_ids", torch.arange(7)[None]),
    "positions in float": ("position_ids", torch.arange(7.0)),
    "frequencies": ("encoder.block.0.rotary_emb.inv_freq", torch.ones(2)),
    "a counter": ("encoder.norm.num_batches_tracked", torch.tensor(3)),
    "a state of another engine": (f"{Q}._extra_state", torch.zeros(3, dtype=torch.uint8)),
    "a scale of logits": ("logit_scale", torch.tensor(2.0)),
    "a decoder": ("decoder.block.0.layer.0.SelfAttention.q.weight", torch.ones(2, 2)),
    "a head": ("lm_head.weight", torch.ones(2, 2)),
}


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, None], ids=str)
@pytest.mark.parametrize("layout", ["ours", "released"])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_scale_of_what_is_no_float8_is_refused(tmp_path, dtype, layout, prefix):
    tensors, module = ours(), Q
    if layout == "released":
        tensors = {n: torch.zeros(shape) for n, shape in GOLDENS["umt5"]["shapes"].items()}
        module = "blocks.0.attn.q"
    if dtype is not None:
        tensors[f"{module}.weight"] = tensors[f"{module}.weight"].to(dtype)
    held = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    # without a dtype, a scale that has lost the prefix of its weight
    scale = f"{prefix if dtype else 'other.'}{module}.weight_scale"
    source = component(tmp_path / "t5", {**held, scale: torch.ones(1)})
    if layout == "released":
        (source / "config.json").unlink()
    what = "is not there" if dtype is None else f"is {str(dtype).removeprefix('torch.')}"
    with pytest.raises(ConversionError, match=f"{scale} is a scale and .*weight {what}: only"):
        plan_conversion(source)


@pytest.mark.parametrize(
    ("layout", "kind"),
    [("ours", kind) for kind in BUFFERS]
    + [("released", kind) for kind in BUFFERS if kind not in ("a decoder", "a head")],
)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_what_no_model_computes_with_is_skipped_and_named(tmp_path, kind, layout, name):
    extra, tensor = BUFFERS[kind]
    tensors = ours()
    if layout == "released":
        tensors = {n: torch.zeros(shape) for n, shape in GOLDENS["umt5"]["shapes"].items()}
    source = component(tmp_path / "t5", {**tensors, extra: tensor}, name)
    if layout == "released":
        (source / "config.json").unlink()
    (part,) = plan_conversion(source).components
    assert part.unused == (extra,)
    assert len(part.tensors) == len(tensors)
    (contents,) = read_contents(source).components
    assert contents.unused == (extra,)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("cast", [None, "bfloat16"])
def test_integers_that_are_weights_are_refused(tmp_path, dtype, cast):
    tensors = ours()
    tensors[f"{Q}.weight"] = tensors[f"{Q}.weight"].to(dtype)
    what = str(dtype).removeprefix("torch.")
    with pytest.raises(ConversionError, match=rf"{Q}.weight is {what}, and a weight must be float"):
        plan_conversion(component(tmp_path / "t5", tensors), dtype=cast)


def test_what_is_no_buffer_is_refused(tmp_path):
    for name, tensor in (("encoder.extra.weight", torch.ones(1)), ("step", torch.tensor(3))):
        source = component(tmp_path / "t5", {**ours(), name: tensor})
        with pytest.raises(ConversionError, match=rf"1 unexpected \({name}\)"):
            plan_conversion(source)


@pytest.mark.parametrize("umt5", [True, False])
@pytest.mark.parametrize("name", ["umt5_xxl_fp8.safetensors", "t5xxl.ckpt"])
def test_comfyuis_text_encoders_need_no_config(tmp_path, umt5, name):
    tensors = ours()
    if umt5:  # which has a bias in each layer
        bias = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
        tensors[bias.format(1)] = tensors[bias.format(0)] + 1
    held = {**tensors, "spiece_model": torch.zeros(9, dtype=torch.uint8)}
    source = component(tmp_path / "t5", {n: t.contiguous() for n, t in held.items()}, name)
    (source / "config.json").unlink()
    (part,) = plan_conversion(source / name).components
    assert part.class_name == ("UMT5EncoderModel" if umt5 else "T5EncoderModel")
    assert part.unused == ("spiece_model",)
    found = {n: read_tensor(tensor) for n, tensor in part.tensors.items()}
    assert found.keys() == tensors.keys()
    assert all(np.array_equal(found[n], tensor.numpy()) for n, tensor in tensors.items())
    sizes = ("d_model", "d_ff", "d_kv", "num_heads", "num_layers", "vocab_size")
    config = json.loads(part.config_text)
    assert {n: config[n] for n in sizes} == {n: TEXT_ENCODER[n] for n in sizes}
