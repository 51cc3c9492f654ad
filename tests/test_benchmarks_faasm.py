"""benchmarks/gpu/faasm.py: parts that fail, hang and are resumed, GPU memory that stays, and the page."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

GPU = Path(__file__).parent.parent / "benchmarks" / "gpu"
sys.path[:0] = [str(GPU.parent), str(GPU)]  # its programs import one another as neighbours

import faasm as bench  # noqa: E402
import faasm_page as pages  # noqa: E402
from faasm_parts import PARTS, Part, command  # noqa: E402

from slosched.cli.app import app  # noqa: E402
from slosched.faasm.names import REPLACED  # noqa: E402


def part(**more: Any) -> Part:
    given: dict[str, Any] = {"words": (), "needs_s": 0.0, "limit_s": 60.0, **more}
    return Part(**given)


def made(tmp_path: Path, **more: Any) -> bench.Bench:
    return bench.Bench(tmp_path, tmp_path, "cpu", more.pop("budget_s", 600.0), "test")


def commands(monkeypatch: pytest.MonkeyPatch, programs: dict[str, str]) -> dict[str, Part]:
    """Parts whose commands are programs of Python."""

    def chosen(each: Part, out: str, *, gpu: bool, resume: bool) -> list[str]:
        return [sys.executable, "-c", programs[Path(out).name]]

    monkeypatch.setattr(bench, "command", chosen)
    return {name: part() for name in programs}


@pytest.mark.processes
def test_a_part_that_fails_or_hangs_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = {
        "fails": "raise SystemExit('no such thing')",
        "hangs": "import time\nprint('begun', flush=True)\ntime.sleep(600)",
        "works": "print('well')",
    }
    parts = commands(monkeypatch, programs)
    parts["hangs"] = part(limit_s=0.5)
    run = made(tmp_path)
    run.run([*programs], parts)
    found = json.loads((tmp_path / bench.NAME).read_text())["parts"]
    assert {name: each["complete"] for name, each in found.items()} == {
        "fails": False,
        "hangs": False,
        "works": True,
    }
    assert "no such thing" in found["fails"]["why"]
    assert "ended after" in found["hangs"]["why"]
    assert "no such thing" in (tmp_path / "faasm.md").read_text()

    again = made(tmp_path)
    again.take_up([tmp_path / bench.NAME])
    programs["works"] = "raise SystemExit('it is not run again')"
    programs["fails"] = ""
    again.run(["fails", "works"], parts)
    assert all(again.document["parts"][name]["complete"] for name in ("fails", "works"))


def test_a_part_for_which_no_time_is_left_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = commands(monkeypatch, {"late": "raise SystemExit('it must not run')"})
    run = made(tmp_path, budget_s=1.0)
    run.run(["late"], parts)
    assert "late" in run.document["left_out"] and not run.document["parts"]
    assert "late" in (tmp_path / "faasm.md").read_text()


@pytest.mark.processes
def test_gpu_memory_that_a_part_leaves_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = commands(monkeypatch, {"clean": "", "leaks": ""})
    used = iter([10**9, 10**9, 10**9, 2 * 10**9])
    run = made(tmp_path)
    monkeypatch.setattr(run, "_used", lambda: next(used))
    monkeypatch.setattr(bench, "_SETTLE_NS", 0)
    run.run(["clean", "leaks"], parts)
    assert run.document["parts"]["clean"]["gpu_equal"] is True
    assert run.document["parts"]["leaks"]["gpu_equal"] is False
    assert "| 1,000 | 2,000 | NO |" in (tmp_path / "faasm.md").read_text()


@pytest.mark.parametrize("name", [name for name, each in PARTS.items() if each.experiment])
@pytest.mark.parametrize("gpu", [True, False])
def test_every_part_is_a_command_that_there_is(name: str, gpu: bool) -> None:
    import typer.main

    words = command(PARTS[name], "out", gpu=gpu, resume=False)
    assert words[1:3] == ["-m", "slosched"]
    group: Any = typer.main.get_command(app)
    context = group.make_context("slosched", words[3:])
    experiments = group.get_command(context, "exp")
    given = words[4:]
    inner = experiments.make_context("exp", list(given), parent=context)
    found = experiments.get_command(inner, given[0])
    found.make_context(given[0], given[1:], parent=inner)  # raises where an option is not known


def test_the_parts_fit_the_time_on_the_device() -> None:
    assert sum(each.needs_s for each in PARTS.values()) < 540 - 40


PRODUCT = {
    "kind": "product",
    "splits": 2,
    "error": 1e-7,
    "tolerance": 1e-5,
    "device_copy_ns": 0,
}
LOAD = {
    "instances": 4,
    "network": "timm",
    "n": 10,
    "ok": 10,
    "loop": "capacity",
    "cold": "20%",
    "rung": "L3",
    "refused": 0,
    "timeout": 0,
    "wrong": 0,
    "largest_error": 1e-6,
    "gpu_by": "process",
    **dict.fromkeys(("warm_p50_ms", "warm_p99_ms", "cold_p50_ms", "cold_p99_ms"), 2.0),
}
TRAINED = {"losses": [1.0], "loss": 0.5, "target_s": 2.0, "epochs": 5, "size": "full"}
MOVED = dict.fromkeys(
    ("inputs_pulled_bytes", "weights_pulled_bytes", "weights_pushed_bytes"), 10**6
)


def records() -> dict[str, list[dict[str, Any]]]:
    """What a part of each kind leaves."""
    return {
        "coldstart": [
            {
                "what": "MobileNet",
                "rung": "L4",
                "start": "new process",
                "ms": 4000.0,
                "gpu_mb": 600.0,
            },
            {"what": "MobileNet", "rung": "L3", "start": "live process", "ms": 40.0},
            {
                "kind": "fill",
                "what": "MobileNet",
                "rung": "L4",
                "start": "new process",
                "most": 40,
                "held": 40,
                "right": 40,
                "stopped_by": "the bound",
                "start_s": 20.0,
            },
        ],
        "matrices-torch": [
            {**PRODUCT, "system": "whole", "size": 2000, "splits": 0, "took_ns": 10**6},
            {**PRODUCT, "system": "slots", "size": 2000, "took_ns": 10**8, "gpu_peak_mb": 700.0},
        ],
        "throughput": [
            {**LOAD, "system": "slosched", "achieved_per_s": 500.0, "gpu_gb_s_integral": 2.0},
            {**LOAD, "system": "process", "achieved_per_s": 250.0, "gpu_gb_s_integral": 6.0},
        ],
        "sgd": [
            {
                **TRAINED,
                **MOVED,
                "system": system,
                "workers": workers,
                "train_s": seconds,
                "key": "k",
            }
            for system, workers, seconds in (
                ("shared", 1, 8.0),
                ("shared", 16, 2.0),
                ("copies", 16, 4.0),
            )
        ],
    }


def document() -> dict[str, Any]:
    """Results as one run of each kind of part leaves them."""
    about = "NVIDIA H200, 2026-11-30"
    base = {
        "about": about,
        "complete": True,
        "why": "",
        "seconds": 9.0,
        "gpu_before_bytes": 10**9,
        "gpu_after_bytes": 10**9,
        "gpu_equal": True,
    }
    return {
        "parts": {
            name: {**base, "command": f"slosched {name}", "records": found}
            for name, found in records().items()
        },
        "left_out": {"matrices-cupy": "3 s were left"},
    }


def test_the_page_begins_with_ratios_and_says_what_is_replaced() -> None:
    text = pages.page(document())
    assert text.index("| ratio |") < text.index("## The ladder")
    assert REPLACED in text and "NVIDIA H200, 2026-11-30" in text
    for row in (
        "| a new process (L4) to a live one that loads all (L3) | 100 x |",
        "40 of 40 right",
        "graph of 73 calls to one A @ B, 2,000 rows | 100 x | 1 ms |",
        "capacity, slosched to process, cold 20% | 2 x | 250 answers/s |",
        "process to slosched, cold 20% | 3 x |",
        "sgd, shared: 1 to 16 workers, training time | 4 x |",
        "copies to shared, training time, s | 2 x |",
        "| 0 of 20 | largest error 1.0e-06 |",
        "- matrices-cupy: 3 s were left",
    ):
        assert row in text, row


def test_several_runs_are_one_and_a_complete_part_stays(tmp_path: Path) -> None:
    first, second = document(), document()
    second["parts"]["sgd"]["complete"] = False
    second["parts"]["matrices-cupy"] = first["parts"]["matrices-torch"]
    second["left_out"] = {}
    files = []
    for number, each in enumerate((first, second)):
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(each))
    assert bench.main(["--merge", *map(str, files), "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / bench.NAME).read_text())
    assert found["parts"]["sgd"]["complete"] and not found["left_out"]


def test_the_page_is_that_of_its_results() -> None:
    if not pages.RESULTS.exists():
        pytest.skip("the results of a GPU are not here yet")
    written = pages.page(json.loads(pages.RESULTS.read_text(encoding="utf-8")))
    assert pages.PAGE.read_text(encoding="utf-8") == written
