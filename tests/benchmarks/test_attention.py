"""The check of the kernel's speed: which figures pass."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import attention as benchmark
from attention_cases import CASES

RESULTS = Path(benchmark.__file__).parent / "results/attention.json"


@pytest.mark.parametrize("name", CASES)
def test_the_committed_figures_pass_and_a_tenth_less_does_not(name):
    results = json.loads(RESULTS.read_text())["cases"]
    entry: dict[str, Any] = results[f"{name}, {CASES[name].heads} heads"]
    assert benchmark.shortfall(name, entry) is None
    slower = entry | {benchmark.RATE: 0.9 * entry[benchmark.RATE]}
    said = benchmark.shortfall(name, slower)
    assert said == (
        f"{name}: the sparse kernel has {slower[benchmark.RATE]} of cuDNN's rate, and should have "
        f"{CASES[name].least_rate}"
    )
    del slower[benchmark.RATE]  # as of a kernel that did not run
    assert "has 0.0 of cuDNN's rate" in str(benchmark.shortfall(name, slower))
    if CASES[name].target is not None:
        said = benchmark.shortfall(name, entry | {benchmark.STEP_IS_FAST: False})
        assert (
            said
            == f"{name}: the whole step takes more than {CASES[name].target} of dense attention"
        )


def test_a_case_that_is_too_slow_fails_the_check(monkeypatch, capsys):
    results = json.loads(RESULTS.read_text())["cases"]
    slow = "Wan 480p, 12 heads"

    def measured(run, name):
        title = f"{name}, {CASES[name].heads} heads"
        return {title: results[title] | ({benchmark.RATE: 0.5} if title == slow else {})}

    monkeypatch.setattr(benchmark.jax, "default_backend", lambda: "gpu")
    monkeypatch.setitem(benchmark.SECTIONS, "cases", (measured, tuple(CASES)))
    assert benchmark.main(["--sections=cases"]) == 0
    assert benchmark.main(["--sections=cases", "--check"]) == 1
    assert "Wan 480p: the sparse kernel has 0.5 of cuDNN's rate" in capsys.readouterr().err
    assert benchmark.main(["--sections=cases", "--check", "--cases=720p,CogVideoX"]) == 0
    for wrong in (["--tiny", "--check"], ["--check", "--sections=density"]):
        with pytest.raises(SystemExit):
            benchmark.main(wrong)
    assert "--check is for the section cases" in capsys.readouterr().err
