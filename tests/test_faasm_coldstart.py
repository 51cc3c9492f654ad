"""The ladder of cold starts, and both experiments by their whole run, with a tiny network."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")

from slosched.errors import OutOfResources
from slosched.faasm.coldstart import fill, ladder, summary
from slosched.faasm.coldstart.options import ColdstartOptions
from slosched.faasm.frame_processes import below
from slosched.faasm.frame_run import Order, report_again, run_experiment
from slosched.faasm.inference import campaign, network, throughput, wire
from slosched.faasm.inference.options import LatencyOptions, ThroughputOptions
from slosched.faasm.inference.plan import Plan
from slosched.faasm.inference.process import InstanceFailed, InstanceProcess
from slosched.faasm.inference.requests import Done, Request, ended, read_outcomes
from slosched.telemetry.manifest import read_manifest
from slosched.units import NS_PER_MS, NS_PER_S

pytestmark = [pytest.mark.processes, pytest.mark.torch]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plan]:
    path = tmp_path_factory.mktemp("weights") / "weights.npy"
    plan = Plan(network="own", size="micro", device="cpu", weights=str(path), seed=3)
    network.write_weights(plan)
    yield plan


def test_a_live_instance_goes_through_its_rungs_and_forks(plan: Plan) -> None:
    with ladder.instance(plan) as process:
        for rung in ("L0", "L1", "L2", "L3"):
            found = ladder.rung(process, rung, 3)
            assert found["n"] == 3
            assert 0 < found["least_ms"] <= found["ms"] <= found["most_ms"]
        with pytest.raises(InstanceFailed, match="a live process has the rungs"):
            ladder.rung(process, "L9", 1)
        assert ladder.forks(process, 2)["ms"] > 0
        held = process.ask(wire.Hold(3), wire.Held)
        assert {each.pid for each in below([process.pid])} == set(held.pids)
        assert ladder.rung(process, "L0", 1)["n"] == 1  # the next order ends them
        assert not below([process.pid])
        process.ask(wire.Hold(2), wire.Held)
    assert not below([process.pid])
    assert not [each for each in below([os.getpid()]) if each.pid in held.pids]


def test_a_fork_takes_less_memory_than_a_process_of_its_own(plan: Plan) -> None:
    with ladder.instance(plan) as process:
        fork = ladder.memory_of_forks(process, 3)
    alone = ladder.memory_of_processes(plan, 2)
    assert 0 < fork.pss_bytes < alone.pss_bytes / 3  # torch itself is shared
    assert alone.record()["fit"] == int(alone.room_bytes / alone.pss_bytes)
    assert alone.record()["gpu_mb"] is None


def test_a_process_without_a_network_starts_sooner_than_one_with(plan: Plan) -> None:
    nothing, something = ladder.new_processes(None, 2), ladder.new_processes(plan, 2)
    assert nothing["cpu_ms"] < something["cpu_ms"]
    assert something["import_ms"] > something["load_ms"] > 0


def test_what_fits_is_bounded_by_the_memory_that_is_scarcer() -> None:
    memory = ladder.Memory(
        pss_bytes=100e6, rss_bytes=200e6, gpu_bytes=500e6, room_bytes=10**10, gpu_room_bytes=10**10
    )
    assert memory.record()["fit"] == 20


def alive() -> set[int]:
    """Processes below this one; those of tests before may be among them."""
    return {each.pid for each in below([os.getpid()]) if not each.ended}


def test_instances_are_tried_until_the_bound_and_each_answers_rightly(plan: Plan) -> None:
    others = alive()
    found = fill.processes(plan, 3)
    assert (found["held"], found["right"], found["stopped_by"]) == (3, 3, fill.BOUND)
    nothing = fill.processes(None, 4)
    assert (nothing["held"], nothing["right"]) == (4, 4)
    with ladder.instance(plan) as process:
        forked = fill.forks(process, 20)
        assert (forked["held"], forked["right"], forked["stopped_by"]) == (20, 20, fill.BOUND)
    assert not below([process.pid])
    assert not alive() - others


def test_the_trial_ends_before_memory_does(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    # The first instance takes less than the 3 GB that are there beside those left alone; then 10 MB are free.
    free = iter([4 * 10**9, 4 * 10**9])
    monkeypatch.setattr(fill, "available_bytes", lambda: next(free, 10**9 + 10**7))
    found = fill.processes(plan, 50)
    assert (found["held"], found["right"], found["stopped_by"]) == (1, 1, fill.HOST)
    monkeypatch.setattr(fill, "available_bytes", lambda: 10**8)
    with ladder.instance(plan) as process:
        assert fill.forks(process, 50)["held"] == 0


def test_an_instance_that_does_not_start_ends_the_trial(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[object] = []

    class Failing(InstanceProcess):
        def ready(self) -> wire.Ready:
            begun.append(self)
            if len(begun) > 2:
                raise InstanceFailed("no memory on the card")
            return super().ready()

    monkeypatch.setattr(fill, "InstanceProcess", Failing)
    others = alive()
    found = fill.processes(None, 40)
    assert found["held"] <= 2 and "no memory on the card" in found["stopped_by"]
    assert not alive() - others


def test_room_is_that_of_the_scarcer_memory() -> None:
    room = fill.Room(host=100, gpu=30)
    assert room.fits(8, 10.0, 10.0) == (3, fill.GPU)
    assert room.fits(8, 50.0, 1.0) == (2, fill.HOST)
    assert room.fits(8, 10.0, 1.0) == (8, "")
    assert fill.Room(host=-5).fits(8, 10.0, 10.0) == (0, fill.HOST)


def test_instances_that_do_not_fit_are_refused_with_the_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(campaign, "available_bytes", lambda: 2 * 10**9)
    wanted = "20 instances take about 6.0 GB of memory, and 2.0 GB are free; take fewer"
    throughput = ThroughputOptions(size="micro", systems=("process",), workers=20)
    coldstart = ColdstartOptions(size="micro", instances=20)
    for name, options in (("inference-throughput", throughput), ("coldstart", coldstart)):
        order = Order(experiment=name, options=options, scale="quick", out=tmp_path / name)
        with pytest.raises(OutOfResources, match=wanted):
            run_experiment(order, say=_nothing, show=_nothing)


def test_the_published_table_is_the_paper_s() -> None:
    assert [(each["start"], each["init_ms"], each["capacity"]) for each in summary.PUBLISHED] == [
        ("Docker", 2800.0, 8_000),
        ("Faaslet", 5.2, 70_000),
        ("Proto-Faaslet", 0.5, 100_000),
    ]


# ---------------------------------------------------------------------------------------- whole runs


def test_coldstart_measures_every_rung_and_draws_it(tmp_path: Path) -> None:
    options = ColdstartOptions(size="micro", repeats=2, instances=2, fill=2)
    order = Order(experiment="coldstart", options=options, scale="quick", out=tmp_path / "out")
    frame = run_experiment(order, say=_nothing, show=_nothing)
    rows = {
        (each["what"], each["rung"], each["start"].partition(" (")[0]) for each in frame.records()
    }
    assert {("no-op", "L4", "new process"), ("no-op", "fork", "fork of a template")} <= rows
    assert set(frame.cells) == set(frame._expected)
    assert {rung for what, rung, _ in rows if what == "MobileNet"} == {
        "L0",
        "L1",
        "L2",
        "L3",
        "L4",
        "fork",
    }
    assert ("MobileNet", "L4", "call, reset=reload") in rows
    tried = [each for each in frame.records() if each.get("kind") == "fill"]
    assert [(each["held"], each["right"]) for each in tried] == [(2, 2), (16, 16), (2, 2), (16, 16)]
    assert all(each["peak_pss_mb"] > 0 for each in tried)
    fit = (tmp_path / "out" / "tables" / "fit.tsv").read_text().splitlines()
    assert len(fit) == 5 and "computed" in fit[0]
    page = (tmp_path / "out" / "report.md").read_text()
    assert "Proto-Faaslet" in page
    assert "No container was started" in page
    assert (tmp_path / "out" / "figures" / "coldstart.png").stat().st_size > 10_000


def test_throughput_measures_a_capacity_and_loads_at_parts_of_it(tmp_path: Path) -> None:
    options = ThroughputOptions(
        size="micro",
        systems=("container", "loop"),
        workers=1,
        duration_ns=300 * NS_PER_MS,
        delay_ns=20 * NS_PER_MS,
        fractions=(0.5,),
        thinks=("100ms",),
        connections=4,
    )
    out = tmp_path / "out"
    order = Order(
        experiment="inference-throughput", options=options, scale="quick", out=out, layout="faasm"
    )
    frame = run_experiment(order, say=_nothing, show=_nothing)
    records = frame.records()
    assert len(records) == 2 * 2 * 3 and set(frame.cells) == set(frame._expected)
    for each in records:
        assert each["n"] == sum(each[status] for status in ("ok", "timeout", "refused", "failed"))
        assert each["failed"] == 0
        raw = read_outcomes(out / "raw" / each["raw"])
        assert len(raw) == each["n"]
        assert sum(outcome.is_cold for outcome in raw) == each["cold_n"]
    [container] = frame.records("container open cold=20% L3 at=0.5")
    assert container["cold"] == "20%"
    log = out / "tf_image" / "SYSTEM_NATIVE_COLD_5_THREADS_1_CONNS_4_DELAY_100_logs" / "latency.txt"
    assert log.read_text().startswith("MIN=")
    for name in ("throughput", "throughput-cdf"):
        assert (out / "figures" / f"{name}.png").stat().st_size > 10_000
    before = (out / "tables" / "load.tsv").read_text()
    report_again(out, show=_nothing)
    assert (out / "tables" / "load.tsv").read_text() == before


def test_a_system_that_answers_nothing_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refuses:
        name, about = "loop", "for this test"

        def submit(self, request: Request, done: Done) -> Callable[[], None]:
            done(ended("refused", "it is busy"))
            return lambda: None

        def lacks(self, rung: str) -> str:
            return ""

        def close(self) -> None:
            """It has nothing."""

    monkeypatch.setattr(campaign, "opened", lambda *_: closing(Refuses()))
    monkeypatch.setattr(campaign, "warm_up", lambda *_: None)
    options = ThroughputOptions(
        size="micro",
        systems=("loop",),
        cold=("none",),
        duration_ns=50 * NS_PER_MS,
        fractions=(0.5,),
        thinks=("10ms",),
        connections=2,
    )
    monkeypatch.setattr(throughput, "_QUICK_CAPACITY_NS", 50 * NS_PER_MS)
    lines: list[str] = []
    order = Order(
        experiment="inference-throughput", options=options, scale="quick", out=tmp_path / "out"
    )
    frame = run_experiment(order, say=lines.append, show=_nothing)
    assert frame.cells == ["loop capacity cold=none L0", "loop closed cold=none L0 think=10ms"]
    assert all(each["ok"] == 0 < each["refused"] for each in frame.records())
    [left_out] = [line for line in lines if "is left out" in line]
    assert left_out.startswith("loop open cold=none L0 at=0.5 is left out: loop answered nothing")
    assert read_manifest(tmp_path / "out")["complete"] is True


def test_a_run_of_latency_is_continued_where_it_was_left(tmp_path: Path) -> None:
    options = LatencyOptions(
        size="micro", systems=("process", "loop"), rungs=("L3",), duration_ns=300 * NS_PER_MS
    )
    out = tmp_path / "out"
    order = Order(experiment="inference-latency", options=options, scale="quick", out=out)
    lines: list[str] = []

    def stop_at_loop(line: str) -> None:
        lines.append(line)
        if line.startswith("loop: started"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_experiment(order, say=stop_at_loop, show=_nothing)
    again: list[str] = []
    frame = run_experiment(
        Order(experiment=order.experiment, options=options, scale="quick", out=out, resume=True),
        say=again.append,
        show=_nothing,
    )
    assert [each["system"] for each in frame.records()] == ["process", "process", "loop", "loop"]
    assert not any(line.startswith("process: started") for line in again)
    [mixed] = frame.records("loop closed cold=every:5 L3")
    raw = read_outcomes(out / "raw" / mixed["raw"])
    assert [each.number for each in raw if each.is_cold] == [*range(0, len(raw), 5)]
    assert mixed["duration_s"] == options.duration_ns / NS_PER_S
    rows = (out / "tables" / "answers.tsv").read_text().splitlines()
    assert len(rows) == 3  # the heading, and a row for each system


def _nothing(line: str) -> None:
    """What a test does not look at."""
