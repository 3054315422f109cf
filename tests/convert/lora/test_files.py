"""Where LoRAs lie, and in what: files of safetensors and torch.save, folders, the hub's cache."""

import json

import numpy as np
import pytest
import torch
from lora_trainers import TRAINERS, assert_merged, merged, save, write, write_sources
from safetensors.numpy import save_file
from tiny_lora import Q, random_lora

from svg_jax.convert import ConversionError, plan_conversion

LOG = "svg_jax.convert.lora.read"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("sources"))


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

    @pytest.mark.parametrize("key", ["state_dict", "lora", "lora_state_dict", "lora_weights"])
    def test_under_a_key_of_torch(self, tmp_path, sources, key):
        lora = random_lora(sources["Wan"], [Q])
        tensors = {name: torch.from_numpy(array) for name, array in lora.items()}
        torch.save({key: tensors, "step": 3, "optimizer": {"x": 1}}, tmp_path / "lora.pt")
        a, b = lora.values()
        found, _ = merged(sources["Wan"], tmp_path / "lora.pt")
        assert_merged(found, {f"{Q}.weight": b @ a}, sources["Wan"])
        torch.save({key: tensors, "ema": tensors}, tmp_path / "lora.pt")
        with pytest.raises(ConversionError, match=f"under ema, {key}: save the LoRA that is meant"):
            merged(sources["Wan"], tmp_path / "lora.pt")

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
        assert next(iter(plan.states)).name == name

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
