"""Dense and sparse attention beside each other, on the command line."""

import json
from pathlib import Path

import pytest
from tiny_checkpoint import PROMPT, QUICK, is_one_sentence


def test_compare_reports_and_writes_both_videos(run, model, tmp_path):
    result = run(
        "compare", "--model", model, *PROMPT, *QUICK, "--dense-steps", "0.5", "--json", "r.json"
    )
    assert (result.code, result.err) == (0, "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["compare.gif", "compare.mp4", "r.json"]
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["dense_steps"] == 2
    assert report["latents"] == [4, 3, 12, 16]
    assert report["num_tokens"] == 8 + 4 * 6 * 8
    assert 0 < report["density"] < 0.7
    assert 10 < report["psnr"] < 100
    assert 0 < report["ssim"] <= 1
    assert len(report["spatial_share"]) == 2
    assert report["speed_up"] == pytest.approx(report["dense_seconds"] / report["sparse_seconds"])
    for figure in ("PSNR", "SSIM", "spatial heads", "a red cat", "not with a true one"):
        assert figure in result.out
    stages = ["loading", "encoding", "dense steps", "sparse steps", "writing"]
    assert set(stages) < report["stage_seconds"].keys()
    assert sum(report["stage_seconds"].values()) <= report["total_seconds"]
    for stage in stages:
        assert f"\n{stage} " in result.out


def test_compare_at_density_one_finds_no_difference(run, model):
    options = ["--steps", "4", "--guidance-scale", "1", "--density", "1", "--json", "r.json"]
    assert run("compare", "--model", model, *PROMPT, *options).code == 0
    report = json.loads(Path("r.json").read_text())
    assert report["density"] == 1
    assert report["psnr"] is None or report["psnr"] > 80


def test_compare_with_one_kind_of_head_prints_figures_and_writes_the_named_file(run, model):
    options = ["--pattern", "temporal", "--json", "-", "-o", "a.mp4"]
    result = run("compare", "--model", model, *PROMPT, *QUICK, *options)
    assert result.code == 0
    report = json.loads(result.out)
    assert report["spatial_share"] == [0, 0]
    assert "PSNR" in result.err
    assert [path.name for path in Path().iterdir()] == ["a.mp4"]


def test_a_density_that_is_not_reached_is_told(run, model):
    options = ["--density", "0.5", "--band-multiple", "32", "-o", "a.gif"]
    result = run("compare", "--model", model, *PROMPT, *QUICK, *options)
    assert (result.code, is_one_sentence(result.err)) == (0, True), result.err
    assert "of the density 0.5 that was asked only 0.356 is computed" in result.err


def test_demo_leaves_two_videos(run, source, tmp_path):
    result = run("demo", "--prompt", "a blue cat", "--source", source)
    assert (result.code, result.err) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.gif", "demo.mp4"]
    assert "PSNR" in result.out
