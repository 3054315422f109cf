"""LoRAs of whole models as trainers write them: merged as base + scale · alpha / rank · B A.

Each file of `lora_trainers.TRAINERS` holds all that its trainer changes, by its own names.
"""

import dataclasses
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from lora_trainers import TRAINERS, assert_merged, merged, save, write, write_sources
from safetensors.numpy import load_file
from tiny_lora import (
    FAMILIES,
    WEIGHTS,
    Q,
    fuse,
    random_lora,
    save_lora,
)
from typer.testing import CliRunner

from svg_jax.cli.app import app
from svg_jax.convert import (
    ConversionError,
    convert_pipeline,
    export_pipeline,
    plan_conversion,
    read_contents,
    read_manifest,
)
from svg_jax.convert.lora.targets import changeable_shapes, module_names
from svg_jax.convert.tables.lora_names import METHODS, PREFIXES, SUFFIXES, normal_name, read_name

ROOT = Path(__file__).parents[3]
LOG = "svg_jax.convert.lora.read"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_whole_model_is_merged_as_its_trainer_means_it(tmp_path, sources, trainer):
    of = TRAINERS[trainer]
    written = write(of, sources[of.family], tmp_path / "lora")
    found, plan = merged(sources[of.family], written.path, lora_scale=0.7, strict=True)
    assert_merged(found, written.changes, sources[of.family], 0.7)
    assert plan.skipped == ()
    assert len(found) >= 8


@pytest.mark.parametrize("trainer", ["musubi-tuner, Wan", "ai-toolkit, Wan"])
def test_diffusers_merges_the_same_where_it_knows_the_trainer(tmp_path, sources, trainer):
    written = write(TRAINERS[trainer], sources["Wan"], tmp_path / "lora")
    expected = fuse(sources["Wan"], "Wan", written.path, scale=0.7)
    found, _ = merged(sources["Wan"], written.path, lora_scale=0.7)
    base = load_file(sources["Wan"] / WEIGHTS)
    for name, wanted in expected.items():
        tensor = found.get(name, base[name])
        np.testing.assert_allclose(tensor, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.parametrize(
    "trainer",
    [
        "musubi-tuner, Wan",
        "diffusers, CogVideoX",
        "diffusion-pipe, HunyuanVideo",
        "ai-toolkit, Wan",
    ],
)
def test_no_model_takes_a_lora_of_another(tmp_path, sources, trainer):
    of = TRAINERS[trainer]
    written = write(of, sources[of.family], tmp_path / "lora")
    for family in FAMILIES.keys() - {of.family}:
        with pytest.raises(ConversionError, match="the LoRA is of another model; choose") as caught:
            plan_conversion(sources[family], lora=written.path)
        assert len(str(caught.value)) <= 500


@pytest.mark.parametrize("prefix", ["transformer.", "lora_unet_"])
def test_modules_of_the_same_name_do_not_make_it_the_same_model(tmp_path, sources, prefix):
    # Both have 3072 channels: the feed-forward layers of HunyuanVideo fit CogVideoX.
    modules = ["transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.ff.net.2"]
    own = [f"transformer_blocks.{n}.attn.to_{part}" for n in (0, 1) for part in "qkv"]
    lora = random_lora(sources["HunyuanVideo"], modules + own)
    if prefix.endswith("_"):
        lora = {re.sub(r"\.(?=.*\.lora)", "_", name): tensor for name, tensor in lora.items()}
    file = save_lora(tmp_path / "lora.safetensors", lora, prefix)
    with pytest.raises(ConversionError, match=r"only 2 of its modules fit .* another model"):
        plan_conversion(sources["CogVideoX"], lora=file)
    # "transformer_" is no prefix of Wan's "blocks".
    lora = random_lora(sources["CogVideoX"], ["transformer_blocks.0.attn1.to_q"])
    lora = {
        name.replace("transformer_blocks.0.", "transformer_blocks_0_"): lora[name] for name in lora
    }
    file = save_lora(tmp_path / "lora.safetensors", lora, prefix)
    with pytest.raises(ConversionError, match=r"nothing in it fits transformer, .* another model"):
        plan_conversion(sources["Wan"], lora=file)


KNOWN = ("base_model.model.", "model.diffusion_model.", "pipe.dit.", "lora_unet__", "lycoris_")
UNKNOWN = ("module.", "net.", "my_own_lora_", "diffusion_model_", "Wan2.1_I2V_", "a.b.")
ENDS = (
    (".lora_A.default_0.weight", ".lora_B.default_0.weight"),
    (".lora_A", ".lora_B"),
    ("_lora_A_default_weight", "_lora_B_default_weight"),
    ("_lora.down.weight", "_lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    ("._orig_mod.lora_A.default.weight", "._orig_mod.lora_B.default.weight"),
)


class TestNames:
    @pytest.mark.parametrize("prefix", [*KNOWN, *UNKNOWN])
    def test_any_prefix_of_all_names(self, tmp_path, sources, prefix, caplog):
        lora = random_lora(sources["Wan"], [Q, "proj_out"])
        file = save_lora(tmp_path / "lora.safetensors", lora, prefix)
        found, _ = merged(sources["Wan"], file)
        expected, _ = merged(sources["Wan"], save_lora(tmp_path / "plain.safetensors", lora))
        assert found.keys() == expected.keys() == {f"{Q}.weight", "proj_out.weight"}
        for name, tensor in found.items():
            np.testing.assert_array_equal(tensor, expected[name])
        said = [record.getMessage() for record in caplog.records if record.name == LOG]
        expected = {"base_model.model.": "PEFT's adapter_config.json is not beside it: alpha is ta"}
        expected |= {of: f"its names begin with {of}, which is passed over." for of in UNKNOWN}
        assert len(said) == (prefix in expected)
        assert all(f"lora.safetensors: {expected[prefix]}" in line for line in said)

    @pytest.mark.parametrize("ends", ENDS)
    @pytest.mark.parametrize(
        "module", [Q, Q.replace(".", "_"), "blocks_0.attn1_to_q", "blocks.0.self_attn_q"]
    )
    def test_dots_and_underscores_are_alike(self, tmp_path, sources, module, ends):
        a, b = random_lora(sources["Wan"], [Q]).values()
        down, up = (f"lora_unet_{module}{end}" for end in ends)
        found, _ = merged(sources["Wan"], save(tmp_path, {down: a, up: b}, "safetensors"))
        assert_merged(found, {f"{Q}.weight": b @ a}, sources["Wan"])

    @pytest.mark.parametrize("stored", ["", "text_model."])
    @pytest.mark.parametrize("asked", ["", "text_model."])
    def test_clips_modules_have_one_name_with_and_without_the_models(self, stored, asked):
        module = "encoder.layers.0.self_attn.q_proj"
        (target,) = module_names({f"{stored}{module}.weight": (8, 8)}).targets[
            normal_name(f"{asked}{module}".replace(".", "_"))
        ]
        assert target.module == stored + module

    @pytest.mark.parametrize("adapter", ["default", "lora_up", "lora_B"])
    def test_an_adapter_may_have_any_name(self, adapter):
        part = read_name(f"blocks.0.attn.lora_A.{adapter}.weight")
        assert part is not None
        assert (part.module, part.suffix.kind) == ("blocks.0.attn", "down")

    def test_the_docs_tell_all_of_the_tables(self):
        text = (ROOT / "docs/lora.md").read_text()
        missing = [name for name in (*PREFIXES, *SUFFIXES) if f"`{name}`" not in text]
        missing += [trainer for trainer in TRAINERS if f"{trainer.partition(',')[0]}" not in text]
        methods = {method.split()[-1] for method in METHODS.values() if len(method.split()) == 2}
        assert missing + [name for name in methods if name not in text] == []

    def test_no_name_means_two_things(self, sources):
        for family in FAMILIES:
            (part,) = plan_conversion(sources[family]).components
            shapes = changeable_shapes(part.leaves)
            modules = {re.sub(r"\.(weight|bias)$", "", name) for name in shapes}
            names = module_names(shapes).targets
            assert len({normal_name(module) for module in modules}) == len(modules)
            for module in modules:
                assert [t.module for t in names[normal_name(module)]] == [module]


class TestNumbers:
    @pytest.mark.parametrize(
        "alpha",
        [
            *(np.array(2, np.int64), np.array([2], np.int32), np.array([[2]], np.uint8)),
            *(np.array(2, np.float64), np.array(2, np.float16), np.array([2], ml_dtypes.bfloat16)),
            np.array(2, ml_dtypes.float8_e4m3fn),
        ],
    )
    @pytest.mark.parametrize("suffix", ["safetensors", "pt"])
    def test_alpha_of_any_type(self, tmp_path, sources, alpha, suffix):
        lora = random_lora(sources["Wan"], [Q])
        a, b = lora.values()
        found, _ = merged(sources["Wan"], save(tmp_path, lora | {f"{Q}.alpha": alpha}, suffix))
        assert_merged(found, {f"{Q}.weight": np.float32(0.5) * (b @ a)}, sources["Wan"])

    @pytest.mark.parametrize("dtype", [np.float64, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
    @pytest.mark.parametrize("suffix", ["safetensors", "pt"])
    def test_matrices_of_other_floats(self, tmp_path, sources, dtype, suffix):
        lora = {n: t.astype(dtype) for n, t in random_lora(sources["Wan"], [Q]).items()}
        a, b = (tensor.astype(np.float32) for tensor in lora.values())
        found, _ = merged(sources["Wan"], save(tmp_path, lora, suffix))
        assert_merged(found, {f"{Q}.weight": b @ a}, sources["Wan"])

    @pytest.mark.parametrize("flat", [False, True])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_convolutions_of_patches(self, tmp_path, sources, family, flat):
        *_, convolution = FAMILIES[family][-1]
        lora = random_lora(sources[family], [convolution])
        a, b = lora.values()
        change = b.reshape(len(b), -1) @ a.reshape(len(a), -1)
        if flat:  # a linear layer over patches, as some trainers have it
            lora = {name: t.reshape(len(t), -1) for name, t in lora.items()}
        found, _ = merged(sources[family], save(tmp_path, lora, "safetensors"))
        shape = load_file(sources[family] / WEIGHTS)[f"{convolution}.weight"].shape
        assert_merged(found, {f"{convolution}.weight": change.reshape(shape)}, sources[family])

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_difference_of_every_parameter(self, tmp_path, sources, family):
        random = np.random.default_rng(3)
        base = load_file(sources[family] / WEIGHTS)
        changes = {n: random.normal(size=t.shape).astype(np.float32) for n, t in base.items()}
        lora = {}
        for name, change in changes.items():
            module, _, leaf = name.rpartition(".")
            known = {"weight": f"{module}.diff", "bias": f"{module}.diff_b"}
            lora[known.get(leaf, f"{name}.diff")] = change
        file = save(tmp_path, {f"diffusion_model.{n}": t for n, t in lora.items()}, "safetensors")
        found, _ = merged(sources[family], file, lora_scale=-0.5)
        assert_merged(found, changes, sources[family], -0.5)

    def test_a_difference_beside_a_product(self, tmp_path, sources):
        lora = random_lora(sources["Wan"], [Q])
        a, b = lora.values()
        difference = np.full((32, 32), 0.25, np.float32)
        found, _ = merged(sources["Wan"], save(tmp_path, lora | {f"{Q}.diff": difference}, "bin"))
        assert_merged(found, {f"{Q}.weight": b @ a + difference}, sources["Wan"])


class TestAbsentLayers:
    """A LoRA for image to video on a model for text to video."""

    def lora(self, sources, folder, trainer="LightX2V"):
        of = dataclasses.replace(TRAINERS[trainer], differences=trainer == "LightX2V")
        written = write(of, sources["Wan"], folder)
        # The first layer takes in the image's latents as well: shapes that differ are refused.
        there = load_file(sources["text to video"] / WEIGHTS)
        changes = {name: of for name, of in written.changes.items() if name in there}
        assert len(changes) < len(written.changes)
        return written.path, changes

    @pytest.mark.parametrize("trainer", ["LightX2V", "musubi-tuner, Wan", "DiffSynth-Studio"])
    def test_are_skipped_with_one_line(self, tmp_path, sources, caplog, trainer):
        file, changes = self.lora(sources, tmp_path / "lora", trainer)
        found, plan = merged(sources["text to video"], file)
        assert_merged(found, changes, sources["text to video"])
        (line,) = [record.getMessage() for record in caplog.records if record.name == LOG]
        assert line.startswith("lora.safetensors: parts for what the model lacks are skipped: ")
        assert len(line) <= 500
        assert "\n" not in line
        for part in ("k_img", "v_img"):
            assert part in line
            assert any(re.search(rf"\*[._]cross_attn[._]{part}$", name) for name in plan.skipped)

    def test_strict_refuses_them(self, tmp_path, sources):
        file, _ = self.lora(sources, tmp_path / "lora")
        with pytest.raises(ConversionError, match=r"lacks, which strict=True forbids: .*k_img"):
            plan_conversion(sources["text to video"], lora=file, strict=True)

    def test_blocks_beyond_the_last_are_absent_and_no_other_model(self, tmp_path, sources, caplog):
        a, b = random_lora(sources["Wan"], [Q]).values()
        lora = {}
        for block in range(40):
            lora[f"lora_unet_blocks_{block}_self_attn_q.lora_down.weight"] = a
            lora[f"lora_unet_blocks_{block}_self_attn_q.lora_up.weight"] = b
        found, plan = merged(sources["Wan"], save(tmp_path, lora, "safetensors"))
        changes = {f"blocks.{block}.attn1.to_q.weight": b @ a for block in range(2)}
        assert_merged(found, changes, sources["Wan"])
        assert plan.skipped == ("blocks_*_self_attn_q",)
        assert len(caplog.messages) == 1

    def test_zeros_are_no_parts(self, tmp_path, sources, caplog):
        lora = random_lora(sources["text to video"], [Q])
        lora["blocks.0.attn2.norm_added_k.diff"] = np.zeros(32, np.float32)
        lora["blocks.0.norm1.diff_b"] = np.zeros(32, np.float32)
        file = save(tmp_path, lora, "safetensors")
        merged(sources["text to video"], file, strict=True)
        assert caplog.records == []

    def test_text_encoders_that_are_not_converted(self, tmp_path, sources, caplog):
        lora = random_lora(sources["Wan"], [Q])
        a, b = lora.values()
        lora |= {
            "lora_te1_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight": a,
            "lora_te1_encoder_block_0_layer_0_SelfAttention_q.lora_up.weight": b,
            "bundle_emb.<cat>.llama": a,
        }
        found, plan = merged(sources["Wan"], save(tmp_path, lora, "safetensors"))
        assert_merged(found, {f"{Q}.weight": b @ a}, sources["Wan"])
        text = "text_encoder.encoder_block_*_layer_*_SelfAttention_q"
        assert plan.skipped == ("bundle_emb.<cat>.llama", text)
        assert text in caplog.text

    def test_the_command_line_and_python_agree(self, tmp_path, sources):
        source = sources["text to video"]
        file, _ = self.lora(sources, tmp_path / "lora")
        convert_pipeline(source, tmp_path / "python", lora=file, lora_scale=0.5)
        arguments = ["convert", str(source), str(tmp_path / "cli"), "--lora", str(file)]
        result = CliRunner().invoke(app, [*arguments, "--strict"])
        assert isinstance(result.exception, ConversionError)
        assert not (tmp_path / "cli").exists()
        result = CliRunner().invoke(app, [*arguments, "--lora-scale", "0.5"])
        assert result.exit_code == 0
        first, second = (read_manifest(tmp_path / name) for name in ("python", "cli"))
        assert first.components == second.components
        assert first.loras == second.loras
        (record,) = read_contents(tmp_path / "cli").loras
        assert "blocks.*.cross_attn.k_img" in record.skipped
        result = CliRunner().invoke(app, ["inspect", str(tmp_path / "cli")])
        assert "not merged, since the model lacks it: blocks.*.cross_attn.k_img" in " ".join(
            result.output.split()
        )
        export_pipeline(tmp_path / "python", tmp_path / "back")
        exported, base = (load_file(of / WEIGHTS) for of in (tmp_path / "back", source))
        assert not np.array_equal(exported[f"{Q}.weight"], base[f"{Q}.weight"])
