"""benchmarks/gpu/sharing.py: its windows, what it keeps, and its page, which is that of its results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

GPU = Path(__file__).parent.parent / "benchmarks" / "gpu"
sys.path[:0] = [str(GPU.parent), str(GPU)]  # its programs import one another as neighbours

import sharing as bench  # noqa: E402
import sharing_jobs  # noqa: E402
import sharing_page as pages  # noqa: E402
import sharing_simulated as simulated  # noqa: E402

from slosched.share.presets import hotcarbon_mixes  # noqa: E402
from slosched.share_spec import ShareSpec  # noqa: E402


def job(name: str, p50: float, p99: float, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "model": name,
        "status": "ok",
        "n": 100,
        "p50_ms": p50,
        "p99_ms": p99,
        "p99_is_maximum": False,
        "mean_ms": p50,
        "inflation": 0.1,
        "inflation_apart": 0.0,
        "ended": 100,
        "wrong": 0,
        **more,
    }


def cell(mode: str, stp: float, *jobs: dict[str, Any]) -> dict[str, Any]:
    return {"mode": mode, "stp": stp, "energy_ratio": 0.9, "jobs": list(jobs), "prepared": []}


def document(cells: dict[str, Any]) -> dict[str, Any]:
    modes = {run: list(names) for run, names in sharing_jobs.MODES.items()}
    return {"runs": ["a GPU"], "modes": modes, "cells": cells, "left_out": {}, "failed": {}}


def mixes(mode: str, stp: float, p99: float) -> dict[str, Any]:
    return {
        f"mix/graphs/{mode}/{pages.mix_name(mix)}": cell(mode, stp, *(job(m, 1, p99) for m in mix))
        for mix in pages.MIXES
        if len(mix) > 1
    }


def test_the_mixes_are_hotcarbons() -> None:
    assert set(map(frozenset, pages.MIXES)) == set(map(frozenset, hotcarbon_mixes()))
    assert len(pages.MIXES) == 14


def test_the_verdict_asks_for_throughput_and_for_tails() -> None:
    cells = {**mixes("tm", 1.0, 5.0), **mixes("mps", 1.5, 9.0)}
    cells |= {**mixes("streams", 1.45, 7.0), **mixes("preempt", 1.43, 4.0)}
    found = pages.verdicts(cells, "graphs", sharing_jobs.MODES["graphs"])
    assert {mode for mode, each in found.items() if each["both"]} == {"preempt"}
    assert found["streams"]["worst_stp"] == pytest.approx(1.45 / 1.5)
    assert found["streams"]["worst_tail"] == pytest.approx(7 / 5)
    assert "both hold for preempt (graphs)" in pages.page(document(cells))
    cells["mix/graphs/preempt/bert+gpt"]["stp"] = 1.0  # one mix is enough to lose it
    mixes_with_both = pages.verdicts(cells, "graphs", sharing_jobs.MODES["graphs"])["preempt"][
        "both"
    ]
    assert mixes_with_both == found["preempt"]["mixes"] - 1
    text = pages.page(document(cells))
    assert "No mode has both in every mix" in text
    assert f"| {mixes_with_both:.0f} |" in next(
        line for line in text.splitlines() if line.startswith("| graphs preempt")
    )


def test_a_mix_stands_beside_what_was_published() -> None:
    cells = {
        "mix/eager/mps/bert+whisper": cell("mps", 1.25, job("whisper", 9, 9), job("bert", 2, 3))
    }
    text = pages.page(document(cells))
    row = next(line for line in text.splitlines() if line.startswith("| bert+whisper | 1.25"))
    assert "1.94" in row  # A6000 under MPS
    assert "| bert+whisper | - | 2 / 3 |" in text  # the shorter one's latency, whatever the order


def test_windows_on_this_machine_are_kept_and_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = bench.spec_of

    def on_emulated(jobs: Any, mode: Any, seconds: float) -> ShareSpec:
        small = [msgspec.structs.replace(each, model="tiny:2:1") for each in jobs]
        return msgspec.structs.replace(made(small, mode, seconds), device="cpu")

    monkeypatch.setattr(bench, "spec_of", on_emulated)
    options = ["--out", str(tmp_path), "--window", "0.5", "--models", "bert,whisper"]
    assert bench.main([*options, "--parts", "mix-eager-tm", "--seconds", "80"]) == 0
    found = json.loads((tmp_path / "sharing.json").read_text())
    keys = ["mix/eager/exclusive/bert", "mix/eager/exclusive/whisper", "mix/eager/tm/bert+whisper"]
    assert list(found["cells"]) == keys
    assert all(job["n"] > 0 and job["wrong"] == 0 for job in found["cells"][keys[2]]["jobs"])
    assert found["cells"][keys[2]]["stp"] > 0
    monkeypatch.setattr(bench, "Session", None)  # nothing is started again
    assert bench.main([*options, "--parts", "mix-eager-tm", "--seconds", "80"]) == 0


def test_each_cell_stands_beside_its_simulation(tmp_path: Path) -> None:
    def measured(mode: str, stp: float, *jobs: dict[str, Any]) -> dict[str, Any]:
        return {**cell(mode, stp, *jobs), "window_s": 2.0, "watts": 300.0}

    cells = {
        "mix/graphs/exclusive/bert": measured("tm", 1, job("bert", 2.6, 2.7, throughput_per_s=379)),
        "mix/graphs/tm/bert+whisper": measured(
            "tm",
            0.91,
            job("bert", 7.44, 7.51, throughput_per_s=135),
            job("whisper", 193.2, 196.6, throughput_per_s=5.18),
        ),
        "mix/graphs/mps-priority/bert+gpt": measured(
            "mps", 1.2, job("bert", 5, 5.2, throughput_per_s=200)
        ),
        "pair-graphs/preempt": measured(
            "preempt", 1.9, job("resnet50", 1.2, 1.7, throughput_per_s=25)
        ),
        "demo-alone/model_B": measured("tm", 1, job("model_B", 19, 24, throughput_per_s=3.8)),
        "demo/no such way": measured("tm", 1, job("model_B", 19, 24, throughput_per_s=3.8)),
        "check/solo": {"graphs bert": [1.003, 0.99]},
    }
    whole = document(cells)
    lines = simulated.simulated_lines(whole)
    page = pages.page(whole, lines)
    for key in cells:
        assert f"| {key} | " in page or key in ("demo/no such way", "check/solo")
    row = next(line for line in lines if line.startswith("| mix/graphs/tm/bert+whisper | 0.91 / "))
    assert "| 7.44 / 7.4" in row  # two slices of each, and four changes of context
    assert simulated.simulated_lines(document({"check/solo": {"stp": {}}})) == []
    (tmp_path / "page.md").write_text(page)
    kept = simulated.kept_lines(tmp_path / "page.md")
    assert pages.page(whole, kept) == page
    assert simulated.kept_lines(tmp_path / "none.md") == []


def test_results_of_several_runs_become_one(tmp_path: Path) -> None:
    first, second = document({"a": cell("tm", 1)}), document({"b": cell("mps", 2)})
    first["left_out"] = {"b": "no time was left"}
    for name, each in (("1", first), ("2", second)):
        (tmp_path / name).write_text(json.dumps(each))
    bench.merge([tmp_path / "1", tmp_path / "2"], tmp_path)
    found = json.loads((tmp_path / "sharing.json").read_text())
    assert (list(found["cells"]), found["left_out"]) == (["a", "b"], {})


@pytest.mark.skipif(not pages.RESULTS.is_file(), reason="nothing was measured yet")
def test_the_committed_page_is_that_of_its_results() -> None:
    kept = simulated.kept_lines(pages.PAGE)
    text = pages.page(json.loads(pages.RESULTS.read_text(encoding="utf-8")), kept)
    assert pages.PAGE.read_text(encoding="utf-8") == text
