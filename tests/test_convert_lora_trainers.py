"""LoRAs of whole models as trainers write them: merged as base + scale · alpha / rank · B A.

Each file of `lora_trainers.TRAINERS` holds all that its trainer changes, by its own names.
"""

import dataclasses
import json
import re
from pathlib import Path

import diffusers
import ml_dtypes
import numpy as np
import pytest
import torch
from lora_trainers import TRAINERS, write
from safetensors.numpy import load_file, save_file
from tiny_lora import FAMILIES, WEIGHTS, Q, random_lora, save_lora, write_source
from typer.testing import CliRunner

from svg_jax.cli import app
from svg_jax.convert import (
    ConversionError,
    convert_pipeline,
    export_pipeline,
    plan_conversion,
    read_contents,
    read_manifest,
)
from svg_jax.convert.lora_change import add_changes
from svg_jax.convert.lora_names import METHODS, PREFIXES, SUFFIXES, normal_name
from svg_jax.convert.lora_targets import changeable_shapes, module_names

ROOT = Path(__file__).parents[1]
LOG = "svg_jax.convert.lora"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A pipeline's folder of each family, and one of Wan without image layers."""
    folder = tmp_path_factory.mktemp("sources")
    found = {family: write_source(folder / family, family) for family in FAMILIES}
    found["text to video"] = write_source(folder / "text", "Wan")
    config = {k: v for k, v in FAMILIES["Wan"][2].items() if k not in IMAGE}
    torch.manual_seed(0)
    diffusers.WanTransformer3DModel(**config).save_pretrained(folder / "text/transformer")
    return found


IMAGE = ("image_dim", "added_kv_proj_dim")


def merged(source, lora, **options):
    """The weights that a LoRA changes, by diffusers' names, and what it is planned as."""
    plan = plan_conversion(source, lora=lora, **options)
    (found,) = plan.loras
    base = load_file(source / WEIGHTS)
    changes = found.changes["transformer"]
    return {name: add_changes(base[name], of) for name, of in changes.items()}, found


def assert_merged(found, changes, source, scale=1.0):
    """Whether just these weights are changed, by just so much."""
    base = load_file(source / WEIGHTS)
    assert found.keys() == changes.keys()
    for name, tensor in found.items():
        wanted = base[name] + np.float32(scale) * changes[name]
        assert not np.array_equal(wanted, base[name])
        np.testing.assert_allclose(tensor, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_whole_model_is_merged_as_its_trainer_means_it(tmp_path, sources, trainer):
    of = TRAINERS[trainer]
    written = write(of, sources[of.family], tmp_path / "lora")
    found, plan = merged(sources[of.family], written.path, lora_scale=0.7, strict=True)
    assert_merged(found, written.changes, sources[of.family], 0.7)
    assert plan.skipped == ()
    assert len(found) >= 8


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
        assert "not merged, for the model lacks it: blocks.*.cross_attn.k_img" in " ".join(
            result.output.split()
        )
        export_pipeline(tmp_path / "python", tmp_path / "back")
        exported, base = (load_file(of / WEIGHTS) for of in (tmp_path / "back", source))
        assert not np.array_equal(exported[f"{Q}.weight"], base[f"{Q}.weight"])


class TestFiles:
    @pytest.mark.parametrize(
        "suffix", ["SAFETENSORS", "Safetensors", "sft", "pt", "PT", "pth", "bin", "ckpt"]
    )
    def test_of_safetensors_or_torch(self, tmp_path, sources, suffix):
        lora = random_lora(sources["Wan"], [Q])
        a, b = lora.values()
        if suffix == "sft":
            file = save(tmp_path, lora, "safetensors").rename(tmp_path / "lora.sft")
        else:
            file = save(tmp_path, lora, suffix)
        for given in (file, str(file), tmp_path):
            found, plan = merged(sources["Wan"], given)
            assert_merged(found, {f"{Q}.weight": b @ a}, sources["Wan"])
        assert plan.name == tmp_path.name

    def test_torch_tensors_that_are_transposed(self, tmp_path, sources):
        lora = random_lora(sources["HunyuanVideo"], ["transformer_blocks.0.attn.to_q"])
        a, _ = lora.values()
        b = np.random.default_rng(2).normal(size=(64, 4)).astype(np.float32)
        b[:32] *= 2  # shift, then scale
        name = "final_layer.adaLN_modulation.1.lora"
        lora = {f"{name}_A.weight": torch.from_numpy(a)}
        lora[f"{name}_B.weight"] = torch.from_numpy(b.T.copy()).T
        torch.save(lora, tmp_path / "lora.pt")
        found, _ = merged(sources["HunyuanVideo"], tmp_path / "lora.pt")
        change = np.concatenate([b[32:], b[:32]]) @ a
        assert_merged(found, {"norm_out.linear.weight": change}, sources["HunyuanVideo"])

    @pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_lora_weights.safetensors"])
    def test_of_a_known_name_beside_others(self, tmp_path, sources, name):
        lora = random_lora(sources["Wan"], [Q])
        a, b = lora.values()
        save(tmp_path, lora, name.rpartition(".")[2]).rename(tmp_path / name)
        torch.save({}, tmp_path / "optimizer.pt")
        factor = 1.0
        if name == "adapter_model.bin":
            factor = 0.5
            (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 2}))
        found, plan = merged(sources["Wan"], tmp_path)
        assert_merged(found, {f"{Q}.weight": np.float32(factor) * (b @ a)}, sources["Wan"])
        assert plan.files[0].name == name

    @pytest.mark.parametrize("rest", ["", "/lora.safetensors", "/high/a b.SAFETENSORS"])
    def test_of_the_hub(self, tmp_path, sources, monkeypatch, rest):
        snapshot = tmp_path / "models--owner--name/snapshots" / ("0123456789" * 4)
        (snapshot.parents[1] / "refs").mkdir(parents=True)
        (snapshot.parents[1] / "refs/main").write_text(snapshot.name)
        lora = random_lora(sources["Wan"], [Q])
        a, b = lora.values()
        file = snapshot / (rest.strip("/") or "any.safetensors")
        file.parent.mkdir(parents=True)
        save_file(lora, file)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        found, plan = merged(sources["Wan"], f"owner/name{rest}")
        assert_merged(found, {f"{Q}.weight": b @ a}, sources["Wan"])
        assert plan.name == f"owner/name{rest}"
        assert plan.record().files.keys() == {file.name}
        (snapshot / "other.safetensors").touch()
        if not rest:
            with pytest.raises(ValueError, match=r"holds any.*, other.safetensors: give"):
                merged(sources["Wan"], "owner/name")
        with pytest.raises(ValueError, match=r"owner/name: has no file missing.safetensors: check"):
            merged(sources["Wan"], "owner/name/missing.safetensors")
        with pytest.raises(ConnectionError, match="owner/other: is no folder here"):
            merged(sources["Wan"], "owner/other")

    def test_a_missing_file_is_not_looked_for_on_the_hub(self, tmp_path, sources, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "loras").mkdir()
        for name in ("loras/a/b.safetensors", "loras/b.safetensors", "wan/b.safetensors", "b.pt"):
            with pytest.raises(ConversionError, match=f"{name}: cannot be read"):
                plan_conversion(sources["Wan"], lora=name)

    def test_of_sat_with_the_whole_model(self, tmp_path, sources, caplog):
        of = TRAINERS["SAT"]
        written = write(of, sources["CogVideoX"], tmp_path / "lora")
        whole = {"model.diffusion_model.time_embed.0.weight": np.ones((16, 32), np.float32)}
        state = {name: torch.from_numpy(t) for name, t in (written.tensors | whole).items()}
        file = tmp_path / "mp_rank_00_model_states.pt"
        torch.save({"module": state}, file)
        found, plan = merged(sources["CogVideoX"], file, strict=True)
        assert_merged(found, written.changes, sources["CogVideoX"])
        assert plan.skipped == ()
        said = [record.getMessage() for record in caplog.records if record.name == LOG]
        assert len(said) == 2
        assert "alpha: its default, 1, is taken" in said[0]
        assert "1 tensors are the model's own, and are passed over" in said[1]


def save(folder, lora, suffix):
    """A file of safetensors or torch.save."""
    file = folder / f"lora.{suffix}"
    if suffix.lower() == "safetensors":
        save_file(lora, file)
    else:
        state = {n: torch_tensor(t) for n, t in lora.items()}
        torch.save(state, file)
    return file


def torch_tensor(array):
    """A torch tensor of numpy's, also of types that torch alone has a name for."""
    if array.dtype.name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        width = {1: np.uint8, 2: np.int16}[array.dtype.itemsize]
        return torch.from_numpy(array.view(width).copy()).view(getattr(torch, array.dtype.name))
    return torch.from_numpy(array)
