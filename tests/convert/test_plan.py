"""What a conversion will do, said before it is done: sizes, variants, and what stays float32."""

import json
import shutil
from importlib.resources import files
from pathlib import Path

import diffusers
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from tiny_configs import T5, WAN_I2V
from tiny_source import (
    ENCODER_FILE,
    TRANSFORMER_FILE,
    change_tensors,
    files_of,
    random_state,
    write_source,
)

from svg_jax.convert import (
    ConversionError,
    convert_pipeline,
    export_pipeline,
    plan_conversion,
    read_manifest,
    verify_pipeline,
)

BUNDLED = Path(str(files("svg_jax"))) / "assets" / "tiny_cogvideox"


@pytest.fixture
def source(tmp_path):
    return write_source(tmp_path / "source")


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_the_bytes_of_the_result_are_known_before_within_a_percent(tmp_path, dtype):
    plan = plan_conversion(BUNDLED, dtype=dtype)
    convert_pipeline(BUNDLED, tmp_path / "out", dtype=dtype)
    written = sum(map(len, files_of(tmp_path / "out").values()))
    assert plan.written_nbytes == pytest.approx(written, rel=0.01)
    tensors = read_manifest(tmp_path / "out").tensor_bytes
    assert tensors == sum(part.stored_nbytes for part in plan.components)


def test_a_plan_writes_nothing_and_names_what_is_not_needed(tmp_path):
    encoder = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        projection_dim=8,
    )
    name = "CLIPVisionModelWithProjection"
    getattr(transformers, name)(encoder).save_pretrained(tmp_path / "image_encoder")
    index = {"_class_name": "WanPipeline", "image_encoder": ["transformers", name]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    before = files_of(tmp_path)
    (part,) = plan_conversion(tmp_path).components
    assert part.unused == ("visual_projection.weight",)
    assert files_of(tmp_path) == before


class TestVariants:
    @pytest.fixture
    def with_variants(self, source):
        """The transformer also in float16, in one file; the encoder only in float16 shards."""
        save_file(
            random_state("transformer", np.float16),
            source / TRANSFORMER_FILE.replace(".safetensors", ".fp16.safetensors"),
        )
        tensors = load_file(source / ENCODER_FILE)
        (source / ENCODER_FILE).unlink()
        names = sorted(tensors)
        shards = {
            "model.fp16-00001-of-00002.safetensors": names[:5],
            "model.fp16-00002-of-00002.safetensors": names[5:],
        }
        for file, part in shards.items():
            save_file({name: tensors[name] for name in part}, source / "text_encoder" / file)
        weight_map = {name: file for file, part in shards.items() for name in part}
        index = source / "text_encoder/model.safetensors.index.fp16.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
        return source

    def test_the_one_asked_for_is_taken(self, with_variants, tmp_path):
        convert_pipeline(with_variants, tmp_path / "out", variant="fp16")
        manifest = read_manifest(tmp_path / "out")
        assert manifest.variant == "fp16"
        assert "text_encoder/model.fp16-00002-of-00002.safetensors" in manifest.sources
        assert TRANSFORMER_FILE not in manifest.sources
        dtypes = {record.dtype for record in manifest.components["transformer"].values()}
        assert dtypes == {"float16"}

    def test_a_component_without_it_gives_its_only_set(self, source, tmp_path):
        file = source / ENCODER_FILE
        file.rename(file.with_name("model.fp16.safetensors"))
        convert_pipeline(source, tmp_path / "out", variant="fp16")
        assert TRANSFORMER_FILE in read_manifest(tmp_path / "out").sources

    def test_none_is_the_one_without_a_name(self, with_variants):
        (part,) = plan_conversion(with_variants, components=["transformer"]).components
        assert part.files["final_norm", "scale"].dtype == ml_dtypes.bfloat16
        message = "found: model.fp16-00001.*choose the variant that is there"
        with pytest.raises(ConversionError, match=message):
            plan_conversion(with_variants)

    def test_a_shard_that_its_index_does_not_list_is_refused(self, with_variants):
        stray = with_variants / "text_encoder/model.fp16-00003-of-00003.safetensors"
        shutil.copyfile(with_variants / "text_encoder/model.fp16-00001-of-00002.safetensors", stray)
        with pytest.raises(ConversionError, match=r"lists nothing of model\.fp16-00003"):
            plan_conversion(with_variants, variant="fp16")

    @pytest.mark.parametrize(
        ("variant", "message"),
        [("bf16", "no component has weights of the variant 'bf16'"), ("../x", "is no name")],
    )
    def test_one_that_is_not_there_is_refused(self, with_variants, variant, message):
        with pytest.raises(ConversionError, match=message):
            plan_conversion(with_variants, variant=variant)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    folder = tmp_path_factory.mktemp("released")
    torch.manual_seed(0)
    transformer = diffusers.WanTransformer3DModel(**WAN_I2V, cross_attn_norm=True)
    transformer.save_pretrained(folder / "transformer")
    encoder = transformers.UMT5EncoderModel(transformers.UMT5Config(**T5))
    encoder.save_pretrained(folder / "text_encoder")
    index = {
        "_class_name": "WanImageToVideoPipeline",
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


class TestFloat32:
    """A cast keeps in float32 what diffusers and transformers keep."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_as_the_originals_do(self, released, tmp_path, dtype):
        name = str(dtype).removeprefix("torch.")
        convert_pipeline(released, tmp_path / "out", dtype=name)
        verify_pipeline(tmp_path / "out")
        export_pipeline(tmp_path / "out", tmp_path / "back")
        # diffusers does so only with accelerate, so that its list is applied here.
        wan = diffusers.WanTransformer3DModel._keep_in_fp32_modules or ()
        encoder = transformers.UMT5EncoderModel.from_pretrained(
            released / "text_encoder", dtype=dtype
        )
        theirs = encoder.state_dict()
        for component, is_kept in (
            ("transformer", lambda tensor: bool({*tensor.split(".")} & {*wan})),
            ("text_encoder", lambda tensor: theirs[tensor].dtype == torch.float32),
        ):
            stored, back = (
                load_tensors(folder / component) for folder in (released, tmp_path / "back")
            )
            kept = {tensor for tensor in stored if is_kept(tensor)}
            assert bool(kept) == (component == "transformer" or dtype == torch.float16)
            for tensor, array in stored.items():
                expected = array.astype(np.float32 if tensor in kept else name)
                assert back[tensor].dtype == expected.dtype, tensor
                assert back[tensor].tobytes() == expected.tobytes()


def load_tensors(folder: Path) -> dict[str, np.ndarray]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_cast_is_numpys_however_it_is_cut(source, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("svg_jax.convert.formats.stored_tensor._PIECE_BYTES", 28)
    convert_pipeline(source, tmp_path / "out", dtype=dtype)
    export_pipeline(tmp_path / "out", tmp_path / "back")
    for name in ("text_encoder", "transformer"):
        back = load_tensors(tmp_path / "back" / name)
        for tensor, array in load_tensors(source / name).items():
            # T5's `wo` stays float32 among float16
            kept = dtype == "float16" and ".wo." in tensor
            expected = array.astype("float32" if kept else dtype)
            assert back[tensor].dtype == expected.dtype, tensor
            assert back[tensor].tobytes() == expected.tobytes()


def test_values_that_are_no_numbers_are_counted_where_they_are_allowed(source, tmp_path):
    def poison(tensors):
        tensors["proj_out.bias"][:3] = np.nan

    change_tensors(source / TRANSFORMER_FILE, poison)
    with pytest.raises(ConversionError, match=r"proj_out.bias holds NaN or infinities \(3 of 16\)"):
        convert_pipeline(source, tmp_path / "out")
    convert_pipeline(source, tmp_path / "out", allow_nonfinite=True, dtype="float16")
    record = read_manifest(tmp_path / "out").components["transformer"]["proj_out.bias"]
    assert record.nonfinite == 3
    verify_pipeline(tmp_path / "out")
