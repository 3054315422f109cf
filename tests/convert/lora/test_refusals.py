"""LoRAs that cannot be merged are refused in one sentence that names the tensor."""

import os
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from tiny_lora import Q, random_lora, save_lora, write_source

from svg_jax.convert import ConversionError, convert_pipeline, plan_conversion, read_contents


def without(*names):
    return lambda lora: [lora.pop(name) for name in names]


def with_tensor(name, tensor):
    return lambda lora: lora.update({name: np.asarray(tensor, np.float32)})


A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
WRONG = {
    "a weight": (with_tensor(f"{Q}.weight", [[1.0]]), f"{Q}.weight is no part of a LoRA"),
    "another norm": (
        with_tensor("blocks.0.norm3.diff", [1.0]),
        r"norm3.diff is \[1\] and does not fit blocks.0.norm2.weight, \[32\]: the LoRA is of an",
    ),
    "DoRA": (with_tensor(f"{Q}.lora_magnitude_vector", [1.0]), "vector makes it a DoRA"),
    "DoRA of kohya": (with_tensor(f"{Q}.dora_scale", [1.0]), "dora_scale makes it a DoRA"),
    "DoRA of ai-toolkit": (with_tensor(f"{Q}.magnitude", [1.0]), "magnitude makes it a DoRA"),
    "LoKr": (with_tensor(f"{Q}.lokr_w1", [[1.0]]), "lokr_w1 makes it a LoKr, which is not merged"),
    "LoKr of PEFT": (with_tensor(f"{Q}.lokr_w2_a.default", [[1.0]]), "default makes it a LoKr"),
    "LoHa": (with_tensor(f"{Q}.hada_w1_a", [[1.0]]), "hada_w1_a makes it a LoHa"),
    "OFT": (with_tensor(f"{Q}.oft_blocks", [[1.0]]), "oft_blocks makes it an OFT"),
    "IA3": (with_tensor(f"{Q}.on_input", 1.0), "on_input makes it an IA3"),
    "GLoRA": (with_tensor(f"{Q}.a1.weight", [[1.0]]), "a1.weight makes it a GLoRA"),
    "a weight that is replaced": (with_tensor(f"{Q}.set_weight", [[1.0]]), "weights that replace"),
    "a block that is not there": (
        lambda lora: lora.update({key.replace(".0.", ".9.", 1): lora.pop(key) for key in [A, B]}),
        r"nothing in it fits transformer, where there is no blocks.\*.attn1.to_q: .* another model",
    ),
    "a norm": (
        lambda lora: lora.update({key.replace("to_q", "norm_q"): lora.pop(key) for key in [A, B]}),
        "blocks.0.attn1.norm_q.weight is none that a LoRA can change",
    ),
    "no A": (without(A), f"{B} has no A .down. beside it"),
    "no B": (without(B), f"{A} has no B .up. beside it"),
    "only alpha": (with_tensor("proj_out.alpha", 1.0), "proj_out.alpha has no A"),
    "only a bias": (with_tensor("proj_out.lora_B.bias", [1.0]), "proj_out.lora_B.bias has no A"),
    "rank 0": (
        lambda lora: lora.update({A: lora[A][:0], B: lora[B][:, :0]}),
        r"lora_A.weight is \[0, 32\] and .* no rank in common",
    ),
    "two ranks": (lambda lora: lora.update({A: lora[A][:3]}), "no rank in common"),
    "a scalar": (with_tensor(A, 1.0), "no rank in common"),
    "another width": (
        lambda lora: lora.update({A: lora[A][:, :30]}),
        r"lora_A.weight is \[4, 30\] and blocks.0.attn1.to_q.weight is \[32, 32\]",
    ),
    "another height": (
        lambda lora: lora.update({B: lora[B][:30]}),
        r"lora_B.weight is \[30, 4\] and does not fit blocks.0.attn1.to_q.weight, \[32, 32\]",
    ),
    "another bias": (
        with_tensor(f"{Q}.lora_B.bias", [1.0]),
        r"bias is \[1\] and does not fit blocks.0.attn1.to_q.bias, \[32\]",
    ),
    "NaN": (lambda lora: lora[A].fill(np.nan), r"lora_A.weight holds NaN .*128 of 128"),
    "infinity": (lambda lora: lora[B].fill(np.inf), "lora_B.weight holds NaN or infinities"),
    "too large": (lambda lora: lora[B].fill(3e38), "values that float32 cannot hold"),
    "alpha not finite": (with_tensor(f"{Q}.alpha", np.nan), "alpha is not one finite number"),
    "a boolean alpha": (
        lambda lora: lora.update({f"{Q}.alpha": np.array(True)}),
        r"alpha is not one finite number, but bool \[\]: fetch",
    ),
    "whole numbers": (
        lambda lora: lora.update({A: lora[A].astype(np.int8)}),
        "lora_A.weight is int8, and must be of a floating-point type",
    ),
    "no rank beside a core": (
        with_tensor(f"{Q}.lora_mid.weight", np.ones((4, 3, 1))),
        r"lora_mid.weight is \[4, 3, 1\] and .* no rank in common",
    ),
    "two alphas": (with_tensor(f"{Q}.alpha", [1, 2]), "alpha is not one finite number"),
    "the same part twice": (
        lambda lora: lora.update({f"{Q}.lora.down.weight": lora[A]}),
        "are the same part: keep one",
    ),
    "the same weight twice": (
        lambda lora: lora.update(
            {key.replace("attn1.to_q", "self_attn.q"): lora[key] for key in [A, B]}
        ),
        "are the same part: keep one",
    ),
    "nothing": (without(A, B), "changes nothing"),
}
WRONG_CONFIGS = {
    "DoRA": ({"use_dora": True}, "use_dora is True, which is not merged like a LoRA"),
    "modules beside it": ({"modules_to_save": ["proj_out"]}, "modules_to_save is"),
    "another method": ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
    "a changed base": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    "another rank": ({"r": 8}, f"gives {Q} the rank 8 and its tensors have 4"),
    "another rank by pattern": ({"rank_pattern": {"to_q": 2}}, "the rank 2 and its tensors have 4"),
    "a word": ({"lora_alpha": "8"}, f"lora_alpha of {Q} is '8', and no number"),
    "more than a float": ({"lora_alpha": 10**400}, "lora_alpha of .* is 10+, and no number"),
    "another product": ({"use_qalora": True}, "use_qalora is True, which is not merged"),
    "not finite": ({"lora_alpha": float("inf")}, "Infinity is no number of JSON"),
    "no object": ({"alpha_pattern": [1]}, r"alpha_pattern is \[1\], and no object"),
    "no pattern": ({"alpha_pattern": {"(": 1}}, r"'\(' in alpha_pattern is no pattern"),
    "an endless pattern": ({"alpha_pattern": {"(.*)*x": 1}}, "not one that is quick to match"),
}


@pytest.fixture
def types_unchecked():
    """Leave wrong types to the library, as a caller's own Python does."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


class TestRefusals:
    def refuse(self, tmp_path, lora, message, **options):
        with pytest.raises(ConversionError, match=message) as caught:
            convert_pipeline(tmp_path / "source", tmp_path / "out", lora=lora, **options)
        assert "\n" not in str(caught.value)
        assert str(tmp_path) in str(caught.value)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / ".out.partial").exists()

    @pytest.mark.parametrize("wrong", WRONG)
    def test_tensors_that_do_not_fit(self, tmp_path, wrong):
        change, message = WRONG[wrong]
        lora = random_lora(write_source(tmp_path / "source"), [Q])
        change(lora)
        self.refuse(tmp_path, save_lora(tmp_path / "lora.safetensors", lora), message)

    @pytest.mark.parametrize("wrong", WRONG_CONFIGS)
    def test_configs_of_anything_but_a_plain_lora(self, tmp_path, wrong):
        values, message = WRONG_CONFIGS[wrong]
        lora = random_lora(write_source(tmp_path / "source"), [Q])
        file = save_lora(tmp_path / "lora.safetensors", lora, **{"r": 4, "lora_alpha": 4} | values)
        self.refuse(tmp_path, file, message)

    def test_two_statements_of_one_scale(self, tmp_path):
        lora = random_lora(write_source(tmp_path / "source"), [Q])
        lora[f"{Q}.alpha"] = np.array(1, np.float32)
        file = save_lora(tmp_path / "lora.safetensors", lora, r=4)
        self.refuse(tmp_path, file, f"{Q}.alpha and lora.safetensors both say its scale")

    def test_a_fused_weight_and_its_part(self, tmp_path):
        modules = ["transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.to_out.0"]
        source = write_source(tmp_path / "source", "HunyuanVideo")
        lora = random_lora(source, modules)
        name = "double_blocks.0.img_attn_qkv.lora_A.weight"
        lora |= {name: np.ones((4, 32), np.float32)}
        lora |= {name.replace("_A", "_B"): np.ones((96, 4), np.float32)}
        file = save_lora(tmp_path / "lora.safetensors", lora)
        self.refuse(tmp_path, file, r"both change transformer_blocks.0.attn.to_k.weight")

    def test_a_component_that_is_not_converted(self, tmp_path):
        lora = random_lora(write_source(tmp_path / "source"), [Q])
        file = save_lora(tmp_path / "lora.safetensors", lora, "text_encoder.")
        self.refuse(tmp_path, file, r"fits transformer, .* no text_encoder.blocks.\*.attn1.to_q")

    def test_values_that_the_stored_dtype_cannot_hold(self, tmp_path):
        source = write_source(tmp_path / "source", dtype=np.float16)
        file = save_lora(tmp_path / "lora.safetensors", random_lora(source, [Q]))
        self.refuse(tmp_path, file, f"{Q}.weight has values that float16", lora_scale=1e6)

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda file: None, "lora.safetensors: cannot be read"),
            (lambda file: file.write_bytes(b"12345678{}"), "claims a header of"),
            (lambda file: file.mkdir(), "holds no .safetensors, .* file: give the file"),
        ],
    )
    def test_what_is_no_lora_file(self, tmp_path, make, message):
        write_source(tmp_path / "source")
        make(tmp_path / "lora.safetensors")
        self.refuse(tmp_path, tmp_path / "lora.safetensors", message)

    def test_files_that_must_be_chosen(self, tmp_path):
        lora = random_lora(write_source(tmp_path / "source"), [Q])
        for name in ("pytorch_lora_weights", "adapter_model"):
            save_lora(tmp_path / "lora" / f"{name}.safetensors", lora)
        both = "holds adapter_model.safetensors, pytorch_lora_weights.safetensors: give the file"
        self.refuse(tmp_path, tmp_path / "lora", both)
        self.refuse(tmp_path, tmp_path / "lora.gguf", "is no .safetensors, .* file, and no folder")

    def test_what_is_no_scale_path_or_name(self, tmp_path, types_unchecked):
        source = write_source(tmp_path / "source")
        file = save_lora(tmp_path / "lora.safetensors", random_lora(source, [Q]))
        for scale in (float("nan"), True, "0.5", [None], 1e39, 10**400):
            self.refuse(tmp_path, file, "its scale is .* and must be", lora_scale=scale)
        an_array: Any = np.array([0.5])
        (half,) = plan_conversion(source, lora=[file], lora_scale=an_array).loras
        assert half.source.scale == 0.5
        assert plan_conversion(source, lora=None).loras == ()
        no_paths: Any = (5, [None], {file}, b"a")
        for wrong in no_paths:
            with pytest.raises(ConversionError, match=r"lora=.*: must be a path, or a list"):
                plan_conversion(source, lora=wrong)
        alone: Any
        for alone in ({"lora_scale": 0.5}, {"lora_into": "vae"}):
            with pytest.raises(ConversionError, match="say nothing without a LoRA"):
                plan_conversion(source, **alone)
        with pytest.raises(ConversionError, match="lora_into=5: must be a component's name"):
            plan_conversion(source, lora=file, **{"lora_into": no_paths[0]})
        with pytest.raises(ConversionError, match="is too long for a path") as caught:
            plan_conversion(source, lora="a/" + 300 * "b")
        assert len(str(caught.value)) <= 500
        with pytest.raises(ConversionError, match="2 scales for 1 LoRAs"):
            convert_pipeline(source, tmp_path / "out", lora=file, lora_scale=[1.0, 2.0])

    def test_a_lora_in_place_of_a_model(self, tmp_path):
        lora = random_lora(write_source(tmp_path / "source"), [Q])
        file = save_lora(tmp_path / "lora.safetensors", lora)
        torch.save({"state_dict": {name: torch.zeros(2) for name in lora}}, tmp_path / "a.pt")
        for given in (file, tmp_path / "a.pt"):
            for read in (plan_conversion, read_contents):
                with pytest.raises(ConversionError, match=r"is a LoRA, .* as its lora"):
                    read(given)
        save_file({}, tmp_path / "empty.safetensors")
        with pytest.raises(ConversionError, match="holds no tensors"):
            plan_conversion(tmp_path / "empty.safetensors")

    def test_a_destination_that_holds_it(self, tmp_path):
        source = write_source(tmp_path / "source")
        convert_pipeline(source, tmp_path / "before")
        file = save_lora(tmp_path / "before/lora.safetensors", random_lora(source, [Q]))
        with pytest.raises(ConversionError, match=r"lies inside the source, .* or around it"):
            convert_pipeline(source, tmp_path / "before", lora=file, overwrite=True)
        assert file.is_file()

    def test_a_file_that_changes_meanwhile(self, tmp_path):
        source = write_source(tmp_path / "source")
        file = save_lora(tmp_path / "lora.safetensors", random_lora(source, [Q]))
        content = file.read_bytes()

        def change(*_):
            with file.open("r+b") as stream:
                stream.seek(-1, os.SEEK_END)
                stream.write(bytes([content[-1] ^ 1]))

        self.refuse(tmp_path, file, "a LoRA was changed while it was read", progress=change)
