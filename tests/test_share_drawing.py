"""All figures of a folder of results: from its files alone, with what was left out named."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from slosched.analysis import style
from slosched.errors import InvalidConfig
from slosched.share.drawing import TEXT, by_method, draw_all
from slosched.share.drawing_mixes import mixes_of, published_mixes
from slosched.share.drawing_runs import phases_of
from slosched.share.found_runs import find_runs
from slosched.share.outputs import write_run
from slosched.share.result_paths import jobs_of, run_path
from slosched.share_spec import (
    Boundary,
    BoundaryKind,
    Interruption,
    Job,
    JobResult,
    Mode,
    PowerSample,
    Prepared,
    Request,
    RunResult,
    ShareSpec,
)
from slosched.units import NS_PER_MS, NS_PER_S

BEGIN = 7 * NS_PER_S


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few pixels and no second document."""
    save = style.save

    def quick(figure: Any, out: Path, stem: str, **more: Any) -> list[Path]:
        return save(figure, out, stem, dpi=30, **{"forms": ("png",), **more})

    monkeypatch.setattr(style, "save", quick)


def spec_of(every: int, mode: Mode = Mode.GATE) -> ShareSpec:
    return ShareSpec(
        jobs=(
            Job(name="A", model="gpt", boundary=Boundary(kind=BoundaryKind.SYNC, every=every)),
            Job(name="B", model="bert", priority=1),
        ),
        modes=(mode,),
        label="made-up",
        idle_ns=NS_PER_S,
    )


def requests(job: int, starts_ms: list[int], took_ms: int) -> tuple[Request, ...]:
    return tuple(
        Request(
            job=job,
            number=number,
            arrived_ns=BEGIN + at * NS_PER_MS,
            started_ns=BEGIN + at * NS_PER_MS,
            ended_ns=BEGIN + (at + took_ms) * NS_PER_MS,
        )
        for number, at in enumerate(starts_ms)
    )


def result_of(mode: Mode, jobs: tuple[JobResult, ...]) -> RunResult:
    """A window of 1 s, at 300 W, behind an idle time of 1 s at 100 W."""
    watts = [(-1000, 100.0), (-1, 100.0), (0, 300.0), (500, 300.0), (1000, 300.0), (1500, 100.0)]
    power = tuple(PowerSample(at_ns=BEGIN + at * NS_PER_MS, watts=each) for at, each in watts)
    return RunResult(
        mode=mode,
        repeat=0,
        jobs=jobs,
        begin_ns=BEGIN,
        end_ns=BEGIN + NS_PER_S,
        power=power,
        idle_watts=100.0,
    )


def solo(job: int, took_ms: int) -> RunResult:
    starts = list(range(0, 1000, took_ms))
    return result_of(Mode.EXCLUSIVE, (JobResult(job=job, requests=requests(job, starts, took_ms)),))


def shared(mode: Mode, low_ms: int) -> RunResult:
    """A takes `low_ms` each, B 20 ms at 0.5 s."""
    low = JobResult(
        job=0,
        requests=requests(0, list(range(0, 1000, low_ms)), low_ms),
        interruptions=(
            Interruption(
                job=0,
                by=1,
                wanted_ns=BEGIN + 500 * NS_PER_MS,
                started_ns=BEGIN + 501 * NS_PER_MS,
                resumed_ns=BEGIN + 520 * NS_PER_MS,
            ),
        ),
        prepared=Prepared(job=0, pid=1, boundaries=80),
    )
    return result_of(mode, (low, JobResult(job=1, requests=requests(1, [500], 20))))


def write(out: Path, spec: ShareSpec, results: list[RunResult]) -> None:
    solos = {each.jobs[0].job: each for each in results if each.mode is Mode.EXCLUSIVE}
    for result in results:
        folder = out / run_path(spec, jobs_of(spec, result), result.mode, result.repeat)
        write_run(folder, spec, result, solos)
        (folder / "run.json").write_bytes(msgspec.json.encode(result))
        (folder / "spec.json").write_bytes(msgspec.json.encode(spec))


def made_sweep(out: Path) -> None:
    for every, low_ms in ((1, 100), (10, 80), (2, 90)):
        write(
            out / f"every_{every}",
            spec_of(every),
            [solo(0, 75), solo(1, 10), shared(Mode.GATE, low_ms)],
        )


def test_a_sweep_is_drawn_from_its_files(tmp_path: Path) -> None:
    made_sweep(tmp_path / "out")
    (tmp_path / "out" / "broken").mkdir()
    (tmp_path / "out" / "broken" / "run.json").write_text("{")
    said: list[str] = []
    files = draw_all(tmp_path / "out", tmp_path / "figures", say=said.append, singles=1)
    names = {file.name for file in files}
    assert {file.name for file in (tmp_path / "figures").iterdir()} == names
    mix = "bert+gpt"
    for kind in ("latencies", "modes", "methods", "trade-off", "knob", "overhead"):
        assert f"{kind}_{mix}.png" in names
    assert {"dedicated_gate.png", "mixes.png", f"trade-off_{mix}.csv", TEXT} <= names
    for kind in ("jct", "lanes", "power"):
        assert f"{kind}_{mix}_gate_every_1.png" in names
    text = (tmp_path / "figures" / TEXT).read_text()
    # 100, 90 and 80 ms against 75 alone, at 80, 40 and 8 waits.
    slope, at_zero = np.polyfit([80, 40, 8], [25, 15, 5], 1)
    line = next(line for line in text.splitlines() if "us per boundary" in line)
    assert float(line.split()[0]) == pytest.approx(1000 * slope, rel=5e-3)
    assert float(line.split("boundary, ")[1].split()[0]) == pytest.approx(at_zero, rel=5e-3)
    assert any("broken" in line for line in said) and any("the first 1 of" in line for line in said)
    rows = (tmp_path / "figures" / f"trade-off_{mix}.csv").read_text().splitlines()
    # In the order of the knob: B takes 20 ms and 10 alone; A without overlap 100 and 75 alone.
    first = dict(zip(rows[0].split(","), rows[1].split(","), strict=True))
    assert [row.split(",")[0] for row in rows[1:]] == ["1", "2", "10"]
    assert float(first["xvals_abs"]) == 20 and float(first["yvals_abs"]) == 100
    assert float(first["xvals"]) == pytest.approx(1.0)
    assert float(first["yvals"]) == pytest.approx(1 / 3)


def test_one_run_is_drawn_by_its_own_folder(tmp_path: Path) -> None:
    write(tmp_path / "out", spec_of(1, Mode.TM), [shared(Mode.TM, 100)])
    folder = next((tmp_path / "out").rglob("run.json")).parent
    said: list[str] = []
    files = draw_all(folder, tmp_path / "figures", say=said.append)
    names = {file.name for file in files}
    assert "jct_bert+gpt_tm.png" in names and "mixes.png" not in names
    drawn = draw_all(folder, tmp_path / "some", say=said.append, only=("power",))
    assert [file.name for file in drawn] == ["power_bert+gpt_tm.png", TEXT]
    with pytest.raises(InvalidConfig, match="unknown kind of figure 'powr'"):
        draw_all(folder, tmp_path / "some", only=("powr",))
    # Nothing ran alone, so that nothing can be compared with that.
    assert any(line.startswith("left out: mixes") for line in said)
    assert any(line.startswith("left out: methods") for line in said)
    assert any(line.startswith("left out: dedicated tm") for line in said)


def test_folders_without_results_are_refused(tmp_path: Path) -> None:
    for folder, says in ((tmp_path, "no result"), (tmp_path / "none", "not a folder")):
        with pytest.raises(InvalidConfig, match=says):
            draw_all(folder, tmp_path / "figures")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InvalidConfig, match=r"no result .*run\.json is not a result .*truncated"):
        draw_all(tmp_path, tmp_path / "figures")
    part = msgspec.structs.replace(shared(Mode.TM, 100), jobs=(JobResult(job=1),))
    (tmp_path / "run.json").write_bytes(msgspec.json.encode(part))
    (tmp_path / "spec.json").write_bytes(msgspec.json.encode(spec_of(1)))
    said: list[str] = []
    with pytest.raises(InvalidConfig, match="no result"):
        find_runs(tmp_path, said.append)
    assert "lacks a job" in said[0]
    (tmp_path / "run.json").write_bytes(msgspec.json.encode(shared(Mode.TM, 100)))
    (tmp_path / "spec.json").write_bytes(msgspec.json.encode(ShareSpec(jobs=())))
    with pytest.raises(InvalidConfig, match="no result"):
        draw_all(tmp_path, tmp_path / "figures")


def test_runs_that_were_unavailable_or_empty_are_named(tmp_path: Path) -> None:
    spec = spec_of(1, Mode.MPS)
    lacking = msgspec.structs.replace(result_of(Mode.MPS, ()), unavailable="mps: no driver")
    jobs = (JobResult(job=0), JobResult(job=1))
    folder = tmp_path / "out" / run_path(spec, spec.jobs, Mode.MPS, 0)
    write_run(folder, spec, lacking, {})
    (folder / "run.json").write_bytes(msgspec.json.encode(lacking))
    (folder / "spec.json").write_bytes(msgspec.json.encode(spec))
    write(tmp_path / "out", spec, [result_of(Mode.TM, jobs)])
    said: list[str] = []
    draw_all(tmp_path / "out", tmp_path / "figures", say=said.append)
    assert any(line.endswith(", mps: no driver") for line in said)
    assert any("no request ended" in line for line in said)


def test_methods_are_named_by_what_differs(tmp_path: Path) -> None:
    made_sweep(tmp_path / "points")
    runs = find_runs(tmp_path / "points", lambda _: None)
    both = [run for run in runs if run.result.mode is Mode.GATE]
    assert list(by_method(both)) == ["every_1", "every_2", "every_10"]
    one = tmp_path / "one"
    write(one, spec_of(1), [shared(Mode.GATE, 100), shared(Mode.TM, 100)])
    assert list(by_method(find_runs(one, lambda _: None))) == ["tm", "gate"]
    # Runs of two devices are never pooled.
    other = msgspec.structs.replace(spec_of(1), label="other")
    write(one, other, [shared(Mode.GATE, 50)])
    methods = by_method(find_runs(one, lambda _: None))
    assert list(methods) == ["tm, made-up", "gate, made-up", "gate, other"]


def test_mixes_are_ours_beside_the_published(tmp_path: Path) -> None:
    write(tmp_path, spec_of(1), [solo(0, 75), solo(1, 10), shared(Mode.GATE, 100)])
    (ours,) = mixes_of(
        [r for r in find_runs(tmp_path, lambda _: None) if r.result.mode is Mode.GATE]
    )
    # A does 10 of 1000/75 requests, B 1 of 100.
    assert ours.name == "made-up gate"
    assert ours.values["bert+gpt"][0] == pytest.approx(10 / (1000 / 75) + 1 / 100)
    published = {each.name: each for each in published_mixes()}
    a6000 = next(each for name, each in published.items() if name.startswith("A6000 tm"))
    assert a6000.published and a6000.values["bert+gpt"] == (1.819, 0.861)
    assert all("+" in mix for each in published.values() for mix in each.values)
    assert all(math.isfinite(stp) for each in published.values() for stp, _ in each.values.values())


def test_many_jobs_have_a_folder_that_can_be_made(tmp_path: Path) -> None:
    jobs = [Job(name=f"job{n}", model="fasterrcnn_resnet50_fpn", batch=8) for n in range(64)]
    others = [*jobs[:-1], Job(name="job63", model="fasterrcnn_resnet50_fpn", batch=1)]
    spec = ShareSpec(jobs=tuple(jobs))
    paths = [run_path(spec, each, Mode.MPS, 0) for each in (jobs, others)]
    for path in paths:
        (tmp_path / path).mkdir(parents=True)
    assert len(set(paths)) == 2


def test_power_has_its_phases(tmp_path: Path) -> None:
    write(tmp_path, spec_of(1), [shared(Mode.GATE, 100)])
    (run,) = find_runs(tmp_path, lambda _: None)
    phases = {phase.name: (phase.begin_s, phase.end_s) for phase in phases_of(run, -3.0, 2.0)}
    assert phases == {
        "idle": (-3.0, -2.0),
        "prepare": (-2.0, 0.0),
        "window": (0.0, 1.0),
        "cool-down": (1.0, 2.0),
    }
    assert [phase.name for phase in phases_of(run, 0.2, 0.7)] == ["window"]
