"""LoRAs merged at conversion: equal to diffusers' fuse_lora, or refused in one sentence.

The reference loads and fuses in float32 and is cast afterwards. B A is summed in another order
there, so that a sum may round to the neighbouring number: one unit in the last place, in few of
the weights of a bfloat16 or float16 checkpoint; 1e-6 of the largest in a float32 one.
"""

import json
import re

import ml_dtypes
import numpy as np
import peft
import pytest
import torch
import transformers
from diffusers.loaders.lora_conversion_utils import _convert_hunyuan_video_lora_to_diffusers
from safetensors.numpy import load_file, save_file
from tiny_configs import T5
from tiny_lora import (
    FAMILIES,
    WAN_NAMES,
    WEIGHTS,
    Q,
    fuse,
    open_pipeline,
    random_lora,
    renamed,
    save_lora,
    weights_of,
    write_source,
)
from tiny_source import sha256
from typer.testing import CliRunner

from svg_jax.cli.app import app
from svg_jax.convert import (
    LoraSource,
    convert_pipeline,
    export_pipeline,
    match_rules,
    plan_conversion,
    read_manifest,
    verify_pipeline,
)
from svg_jax.convert.formats.stored_tensor import read_tensor
from svg_jax.convert.lora.read import read_loras
from svg_jax.convert.tables import hunyuan_video
from svg_jax.models import HunyuanVideoConfig


def merge(source, *loras, scale=1.0, components=None):
    """The transformer's weights after conversion, by diffusers' names; verifies it."""
    out = source.parent / "out"
    convert_pipeline(source, out, lora=loras, lora_scale=scale, components=components)
    verify_pipeline(out)
    export_pipeline(out, source.parent / "back")
    return load_file(source.parent / "back" / WEIGHTS)


def assert_merged(found, expected, source):
    """As equal as the module's text says, and not what it was in as many tensors as expected."""
    base = load_file(source / WEIGHTS)
    changed = set()
    assert found.keys() == expected.keys() == base.keys()
    for name, tensor in found.items():
        wanted = expected[name].astype(tensor.dtype)
        if not np.array_equal(wanted, base[name]):
            changed.add(name)
        if tensor.dtype == np.float32:
            np.testing.assert_allclose(tensor, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())
            continue
        ulps = np.abs(tensor.view(np.int16).astype(int) - wanted.view(np.int16))
        assert ulps.max() <= 1
        assert np.count_nonzero(ulps) <= max(1, 0.01 * ulps.size)
    assert changed == {name for name in found if not np.array_equal(found[name], base[name])}
    return changed


class TestAgainstDiffusers:
    @pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_ranks_that_differ_alpha_and_scale(self, tmp_path, family, dtype):
        source = write_source(tmp_path / "source", family, dtype)
        *linear, convolution = modules = FAMILIES[family][-1]
        file = save_lora(
            tmp_path / "lora.safetensors",
            random_lora(source, modules, ranks=(4, 2)),
            r=4,
            rank_pattern=dict.fromkeys(modules[1::2], 2),
            lora_alpha=6,
            alpha_pattern={linear[0]: 3, re.escape(convolution): 1},
            target_modules=list(modules),
        )
        changed = assert_merged(
            merge(source, file, scale=0.7), fuse(source, family, file, scale=0.7), source
        )
        assert changed == {f"{module}.weight" for module in modules}

    @pytest.mark.parametrize("family", FAMILIES)
    def test_without_a_config_alpha_is_the_rank(self, tmp_path, family):
        source = write_source(tmp_path / "source", family)
        modules = FAMILIES[family][-1]
        lora = random_lora(source, modules, ranks=(4, 2, 3))
        folder = save_lora(tmp_path / "lora/pytorch_lora_weights.safetensors", lora).parent
        assert_merged(merge(source, folder), fuse(source, family, folder), source)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_biases(self, tmp_path, family):
        source = write_source(tmp_path / "source", family)
        modules = FAMILIES[family][-1]
        lora = random_lora(source, modules, bias=True)
        config = {"r": 4, "lora_alpha": 2, "lora_bias": True, "target_modules": list(modules)}
        file = save_lora(tmp_path / "lora.safetensors", lora, **config)
        changed = assert_merged(
            merge(source, file, scale=-2.0), fuse(source, family, file, scale=-2.0), source
        )
        assert len(changed) == 2 * len(modules)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_diffusers_old_names(self, tmp_path, family):
        source = write_source(tmp_path / "source", family)
        modules = [name for name in FAMILIES[family][-1] if re.search(r"to_([qkv]|out\.0)$", name)]
        names = {}
        for module in modules:
            old = re.sub(r"\.to_out\.0$", ".to_out", module).replace(".to_", ".processor.to_")
            names[f"{module}.lora_A.weight"] = f"{old}_lora.down.weight"
            names[f"{module}.lora_B.weight"] = f"{old}_lora.up.weight"
        other = FAMILIES[family][-1][3]
        names[f"{other}.lora_A.weight"] = f"{other}.lora.down.weight"
        names[f"{other}.lora_B.weight"] = f"{other}.lora.up.weight"
        lora = random_lora(source, [*modules, other])
        file = save_lora(tmp_path / "old.safetensors", {names[name]: lora[name] for name in lora})
        changed = assert_merged(merge(source, file), fuse(source, family, file), source)
        assert len(changed) == len(modules) + 1 > 1

    @pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
    def test_several_with_a_scale_for_all(self, tmp_path):
        source = write_source(tmp_path / "source", dtype=ml_dtypes.bfloat16)
        modules = FAMILIES["Wan"][-1]
        first = save_lora(tmp_path / "a.safetensors", random_lora(source, modules))
        lora = random_lora(source, modules[:2], ranks=(2,))
        second = save_lora(tmp_path / "b.safetensors", lora)
        expected = fuse(source, "Wan", first, second, scale=0.5)
        assert_merged(merge(source, first, second, scale=0.5), expected, source)

    def test_a_models_own_file_has_no_prefix(self, tmp_path):
        source = write_source(tmp_path / "source", "CogVideoX")
        pipe = open_pipeline(source, "CogVideoX")
        targets = ["to_q", "ff.net.2"]
        config = peft.LoraConfig(
            r=3, lora_alpha=5, target_modules=targets, init_lora_weights="gaussian"
        )
        pipe.transformer.add_adapter(config)
        for name, parameter in pipe.transformer.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_()
        pipe.transformer.save_lora_adapter(tmp_path / "own")
        pipe.transformer.fuse_lora()
        pipe.transformer.unload_lora()
        found = merge(source, tmp_path / "own/pytorch_lora_weights.safetensors")
        assert len(assert_merged(found, weights_of(pipe.transformer), source)) == 4


class TestPeft:
    @pytest.mark.parametrize("rslora", [False, True])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_folder_of_peft(self, tmp_path, family, rslora):
        source = write_source(tmp_path / "source", family)
        modules = FAMILIES[family][-1]
        config = peft.LoraConfig(
            r=4,
            lora_alpha=3,
            target_modules=list(modules),
            rank_pattern={} if rslora else {modules[1]: 2},
            alpha_pattern={} if rslora else {r".*blocks\.\d+\.[^.]+\.to_q": 7},
            use_rslora=rslora,
        )
        model = peft.get_peft_model(open_pipeline(source, family).transformer, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_()
        model.save_pretrained(tmp_path / "peft")
        assert {file.name for file in (tmp_path / "peft").iterdir()} >= {
            "adapter_model.safetensors",
            "adapter_config.json",
        }
        expected = weights_of(model.merge_and_unload())
        assert_merged(merge(source, tmp_path / "peft"), expected, source)

    @pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
    def test_a_text_encoder(self, tmp_path):
        source = write_source(tmp_path / "source", "CogVideoX")
        encoder = transformers.T5EncoderModel(transformers.T5Config(**T5)).eval()
        encoder.save_pretrained(source / "text_encoder")
        index = json.loads((source / "model_index.json").read_text())
        index["text_encoder"] = ["transformers", "T5EncoderModel"]
        (source / "model_index.json").write_text(json.dumps(index))
        config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q", "wo"])
        model = peft.get_peft_model(encoder, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_()
        lora = peft.get_peft_model_state_dict(model)
        lora = {name.removeprefix("base_model.model."): t.numpy() for name, t in lora.items()}
        file = save_lora(tmp_path / "t.safetensors", lora, "text_encoder.", r=2, lora_alpha=3)
        found = merge(source, file)
        base = load_file(source / WEIGHTS)
        assert all(np.array_equal(found[name], base[name]) for name in base)
        found = load_file(tmp_path / "back/text_encoder/model.safetensors")
        base = load_file(source / "text_encoder/model.safetensors")
        expected = weights_of(model.merge_and_unload())
        changed = {name for name in found if not np.array_equal(found[name], base[name])}
        assert len(changed) == 4
        for name, tensor in found.items():
            np.testing.assert_allclose(tensor, expected[name], rtol=0, atol=1e-6)


WAN_OTHERS = {
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "proj_out": "head.head",
}
HUNYUAN_NAMES = {
    "norm1.linear": "img_mod.linear",
    "norm1_context.linear": "txt_mod.linear",
    "attn.to_out.0": "img_attn_proj",
    "attn.to_add_out": "txt_attn_proj",
    "ff.net.0.proj": "img_mlp.fc1",
    "ff.net.2": "img_mlp.fc2",
    "ff_context.net.0.proj": "txt_mlp.fc1",
    "ff_context.net.2": "txt_mlp.fc2",
}


class TestNamesOfTheFirstReleases:
    def test_wan_with_alpha_biases_and_norms_that_stay(self, tmp_path):
        source = write_source(tmp_path / "source")
        names = WAN_NAMES | WAN_OTHERS
        lora = renamed(random_lora(source, names, ranks=(4, 2)), names)
        for number, (ours, theirs) in enumerate(names.items()):
            if ours in WAN_NAMES:
                lora[f"{theirs}.alpha"] = np.array(1 + number % 3, np.float32)
            if number % 2:
                size = lora[f"{theirs}.lora_up.weight"].shape[0]
                lora[f"{theirs}.diff_b"] = np.linspace(0, 1, size, dtype=np.float32)
        lora["blocks.0.norm3.diff"] = np.zeros(32, np.float32)
        lora["blocks.0.norm3.diff_b"] = np.zeros(32, np.float32)
        file = save_lora(tmp_path / "wan.safetensors", lora, "diffusion_model.")
        expected = fuse(source, "Wan", file, scale=0.8)
        changed = assert_merged(merge(source, file, scale=0.8), expected, source)
        assert len(changed) == len(names) + len(names) // 2

    def test_wan_as_kohya_writes_it(self, tmp_path):
        source = write_source(tmp_path / "source")
        names = {ours: theirs.replace(".", "_") for ours, theirs in WAN_NAMES.items()}
        lora = renamed(random_lora(source, names), names)
        lora |= {f"{theirs}.alpha": np.array(3, np.float32) for theirs in names.values()}
        file = save_lora(tmp_path / "kohya.safetensors", lora, "lora_unet_")
        changed = assert_merged(merge(source, file), fuse(source, "Wan", file), source)
        assert len(changed) == len(names)

    @pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters:RuntimeWarning")
    @pytest.mark.parametrize("prefix", ["", "transformer.", "diffusion_model."])
    def test_hunyuan_video_takes_fused_modules_apart(self, tmp_path, prefix):
        source = write_source(tmp_path / "source", "HunyuanVideo")
        random = np.random.default_rng(2)
        names = {
            f"transformer_blocks.1.{ours}": f"double_blocks.1.{theirs}"
            for ours, theirs in HUNYUAN_NAMES.items()
        } | {
            "single_transformer_blocks.0.proj_out": "single_blocks.0.linear2",
            "single_transformer_blocks.0.norm.linear": "single_blocks.0.modulation.linear",
            "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
            "time_text_embed.timestep_embedder.linear_1": "time_in.mlp.0",
            "x_embedder.proj": "img_in.proj",
            "proj_out": "final_layer.linear",
        }
        lora = {}
        for name, tensor in random_lora(source, names).items():
            module, _, kind = name.rpartition(".lora_")
            lora[f"{names[module]}.lora_{kind}"] = tensor
        for fused in ("img_attn_qkv", "txt_attn_qkv"):
            for kind, shape in (("A", (4, 32)), ("B", (96, 4))):
                name = f"double_blocks.0.{fused}.lora_{kind}.weight"
                lora[name] = random.normal(size=shape).astype(np.float32)
        file = save_lora(tmp_path / "hunyuan.safetensors", lora, prefix)
        expected = fuse(source, "HunyuanVideo", file)
        assert len(assert_merged(merge(source, file), expected, source)) == len(names) + 6

    def test_kohyas_names_for_hunyuan_video_mean_the_same(self, tmp_path):
        source = write_source(tmp_path / "source", "HunyuanVideo")
        lora = {}
        for module, out in (("double_blocks.1.txt_attn_qkv", 96), ("single_blocks.0.linear2", 32)):
            width = 32 if out == 96 else 160
            lora[f"{module}.lora_down.weight"] = np.ones((2, width), ml_dtypes.bfloat16)
            rows = np.arange(2 * out).reshape(out, 2)
            lora[f"{module}.lora_up.weight"] = rows.astype(ml_dtypes.bfloat16)
            lora[f"{module}.alpha"] = np.array(1, ml_dtypes.bfloat16)
        released = save_lora(tmp_path / "released.safetensors", lora)
        lora = {
            "_".join(name.split(".", 3)[:3]) + "." + name.split(".", 3)[3]: tensor
            for name, tensor in lora.items()
        }
        kohya = save_lora(tmp_path / "kohya.safetensors", lora, "lora_unet_")
        found = []
        for file in (released, kohya):
            (plan,) = plan_conversion(source, lora=file, lora_scale=0.5).loras
            found.append(
                {
                    name: (change.scale, read_tensor(change.up))
                    for name, (change,) in plan.changes["transformer"].items()
                }
            )
        keys = ("add_q_proj", "add_k_proj", "add_v_proj")
        fused = lora["double_blocks_1_txt_attn_qkv.lora_up.weight"]
        expected = {
            f"transformer_blocks.1.attn.{key}.weight": fused[32 * number :][:32]
            for number, key in enumerate(keys)
        }
        output = lora["single_blocks_0_linear2.lora_up.weight"]
        expected["single_transformer_blocks.0.proj_out.weight"] = output
        for changes in found:
            assert changes.keys() == expected.keys()
            for name, (scale, up) in changes.items():
                assert scale == 0.25
                np.testing.assert_array_equal(up, expected[name])

    def test_hunyuan_videos_single_blocks_at_the_only_width_that_diffusers_knows(self, tmp_path):
        config = HunyuanVideoConfig.from_dict({"num_layers": 1, "num_single_layers": 1})
        rules = hunyuan_video.rules(config)
        shapes = {
            name: rule.source_shape
            for rule in rules
            for layer in range(rule.layers or 1)
            for name in rule.names_of(layer)
        }
        random = np.random.default_rng(0)
        lora = {
            "single_blocks.0.linear1.lora_A.weight": random.normal(size=(1, 3072)),
            "single_blocks.0.linear1.lora_B.weight": random.normal(size=(7 * 3072, 1)),
        }
        file = tmp_path / "single.safetensors"
        save_file({name: tensor.astype(np.float32) for name, tensor in lora.items()}, file)
        (found,) = read_loras([LoraSource(file)], {"transformer": match_rules(shapes, rules)})
        state = {name: torch.from_numpy(tensor) for name, tensor in load_file(file).items()}
        expected = _convert_hunyuan_video_lora_to_diffusers(state)
        assert len(found.changes["transformer"]) == 4
        for name, (change,) in found.changes["transformer"].items():
            wanted = expected[f"transformer.{name.removesuffix('.weight')}.lora_B.weight"].numpy()
            np.testing.assert_array_equal(read_tensor(change.up), wanted)

    def test_alpha_beside_diffusers_names_is_as_in_a_config(self, tmp_path):
        source = write_source(tmp_path / "source")
        lora = random_lora(source, [Q])
        named = save_lora(tmp_path / "a.safetensors", lora, r=4, lora_alpha=6)
        alpha = {f"{Q}.alpha": np.array(6, np.float32)}
        beside = save_lora(tmp_path / "b.safetensors", lora | alpha)
        expected = merge(source, named)[f"{Q}.weight"]
        convert_pipeline(source, tmp_path / "other", lora=beside)
        stored = (read_manifest(tmp_path / folder) for folder in ("other", "out"))
        assert len({found.components["transformer"][f"{Q}.weight"] for found in stored}) == 1
        assert not np.array_equal(expected, load_file(source / WEIGHTS)[f"{Q}.weight"])


class TestRecord:
    def test_the_manifest_tells_the_lora_and_keeps_the_base_digest(self, tmp_path):
        source = write_source(tmp_path / "source", dtype=ml_dtypes.bfloat16)
        file = save_lora(tmp_path / "lora.safetensors", random_lora(source, [Q]))
        merge(source, file, scale=0.25)
        manifest = read_manifest(tmp_path / "out")
        (record,) = manifest.loras
        assert (record.source, record.scale) == ("lora.safetensors", 0.25)
        assert record.files == {"lora.safetensors": sha256(file.read_bytes())}
        base = load_file(source / WEIGHTS)
        for name, tensor in manifest.components["transformer"].items():
            assert tensor.sha256 == sha256(base[name].tobytes())
            assert (tensor.stored_sha256 == tensor.sha256) == (name != f"{Q}.weight")

    def test_what_a_killed_run_wrote_without_it_is_not_kept(self, tmp_path):
        source = write_source(tmp_path / "source")
        file = save_lora(tmp_path / "lora.safetensors", random_lora(source, [Q]))
        convert_pipeline(source, tmp_path / "out")
        (tmp_path / "out").rename(tmp_path / ".out.partial")
        assert_merged(merge(source, file), fuse(source, "Wan", file), source)

    def test_a_dry_run_counts_it_and_writes_nothing(self, tmp_path):
        source = write_source(tmp_path / "source")
        file = save_lora(tmp_path / "lora.safetensors", random_lora(source, [Q, "proj_out"]))
        plan = plan_conversion(source, lora=file, lora_scale=0.5)
        assert plan.loras[0].changes["transformer"].keys() == {f"{Q}.weight", "proj_out.weight"}
        arguments = ["convert", str(source), str(tmp_path / "out"), "--lora", str(file)]
        result = CliRunner().invoke(app, [*arguments, "--lora-scale", "0.5", "--dry-run"])
        assert result.exit_code == 0
        assert re.search(r"merges \S+lora.safetensors \(.* kB\) at 0.5 into 2 ", result.output)
        assert not (tmp_path / "out").exists()

    def test_the_command_line_takes_several(self, tmp_path):
        source = write_source(tmp_path / "source")
        arguments = ["convert", str(source), str(tmp_path / "out")]
        for number, scale in enumerate((0.5, -1.0)):
            file = tmp_path / f"{number}.safetensors"
            save_lora(file, random_lora(source, [Q], ranks=(1 + number,)))
            arguments += ["--lora", str(file), "--lora-scale", str(scale)]
        assert CliRunner().invoke(app, arguments).exit_code == 0
        loras = read_manifest(tmp_path / "out").loras
        found = [(lora.source, lora.scale) for lora in loras]
        assert found == [("0.safetensors", 0.5), ("1.safetensors", -1.0)]
