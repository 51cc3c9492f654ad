"""`slosched validate`: delays measured from logs, the comparison's rules, and one real run both ways."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import validate as benchmark

import slosched.cli.local_run
from slosched.analysis.validation import (
    HEADINGS,
    compare,
    held_steps,
    measure_delays,
    plot_validation,
    row,
    spread_of,
)
from slosched.cli.app import app
from slosched.cli.local_run import Cluster
from slosched.cli.machine import Disturbance, MachineWatch, _ours, _Sample
from slosched.cli.validate import Meter, Plan, Validation, network_like, run_plan, verdict_text
from slosched.clock import now_ns
from slosched.config import SchedulerConfig
from slosched.config_file import load_profile
from slosched.errors import InvalidConfig
from slosched.loadgen.results import MalformedResult, RunResult
from slosched.sim.network import Network
from slosched.sim.run import simulate
from slosched.sim.spec import SimSpec
from slosched.units import NS_PER_S
from slosched.workloads import parse_workload
from slosched.workloads.base import Step

US, MS = 1_000, 1_000_000
HELD = [False, False, True]  # of WORDS, from 3.4x up
WORDS = ("slo-exp-1", "resnet50_v2", "2", "poisson", "200", "1.5", "3.375", "1.5", "mul", "1")
WAYS = Network(
    to_worker_ns=250 * US,
    from_worker_ns=250 * US,
    from_client_ns=40 * US,
    to_client_ns=60 * US,
    jitter_ns=50 * US,
)


def spec(network: Network = WAYS) -> SimSpec:
    return SimSpec(
        workload=parse_workload(WORDS[0], WORDS[1:]),
        scheduler=SchedulerConfig(schedule_ahead_ns=5 * MS),
        profiles=(load_profile("v100"),),
        gpus=2,
        gpus_per_worker=2,
        network=network,
    )


def plan(**changed: Any) -> Plan:
    workload = parse_workload(WORDS[0], WORDS[1:])
    assert workload.duration_ns is not None
    cluster = Cluster(SchedulerConfig(schedule_ahead_ns=5 * MS), 2, "v100")
    return replace(Plan(WORDS, workload, cluster, workload.duration_ns), **changed)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return simulate(spec(), out=tmp_path_factory.mktemp("runs") / "run")


# ------------------------------------------------------------------------------------- delays


def test_delays_are_found_again_in_the_logs(simulated: RunResult) -> None:
    assert simulated.run_dir is not None
    delays = measure_delays(simulated.run_dir)
    assert delays.to_worker_ns == pytest.approx(250 * US, abs=25 * US)
    assert delays.from_worker_ns == pytest.approx(250 * US, abs=25 * US)
    assert delays.client_round_trip_ns == pytest.approx(100 * US, abs=25 * US)
    means_ns = {way: sum(spread) / len(spread) for way, spread in delays.spreads_ns.items()}
    # The worker's clock is known to some microseconds only, which widens both spreads: the sum is certain.
    to_and_from_ns = delays.to_worker_ns + delays.from_worker_ns
    assert to_and_from_ns + means_ns["to_worker"] + means_ns["from_worker"] == pytest.approx(
        600 * US, rel=0.05
    )
    assert delays.client_round_trip_ns + means_ns["client"] == pytest.approx(200 * US, rel=0.05)
    assert delays.actions > 300 and "to the worker 2" in delays.text


def test_a_simulation_with_measured_delays_is_like_the_run_that_they_are_from(
    simulated: RunResult,
) -> None:
    assert simulated.run_dir is not None
    delays = measure_delays(simulated.run_dir)
    again = simulate(spec(network_like(delays)))
    for before, after in zip(simulated.steps, again.steps, strict=True):
        assert after.sent == before.sent
        assert after.satisfaction == pytest.approx(before.satisfaction, abs=0.03)


def test_a_spread_keeps_the_mean_whatever_its_greatest_value() -> None:
    values = [100] * 990 + [200] * 9 + [10**6]
    least, spread_ns = spread_of(values)
    drawn = [(low + high) / 2 for low, high in pairwise(spread_ns)]  # each interval is as likely
    assert least == 100 and list(spread_ns) == sorted(spread_ns) and spread_ns[0] == 0
    mean = sum(values) / len(values)
    assert least + sum(drawn) / len(drawn) == pytest.approx(mean, rel=0.02)


def test_a_run_without_answers_has_no_delays(tmp_path: Path, simulated: RunResult) -> None:
    assert simulated.run_dir is not None
    for name in ("clockwork_action_log.tsv", "client_log.tsv"):
        header = (simulated.run_dir / name).read_text().partition("\n")[0]
        (tmp_path / name).write_text(header + "\n")
    with pytest.raises(InvalidConfig, match="no request was served"):
        measure_delays(tmp_path)


# --------------------------------------------------------------------------------- comparison


def test_a_run_beside_itself_differs_by_nothing(simulated: RunResult, tmp_path: Path) -> None:
    found = compare(simulated, simulated, attempt=1, disturbed=[(), (), ()], held=HELD)
    assert [d.points for d in found] == [0, 0, 0]
    assert [d.goodput_ratio for d in found] == [1, 1, 1]
    assert [d.held for d in found] == [False, False, True]
    assert all(len(row(d)) == len(HEADINGS) for d in found)
    json.dumps([d.as_dict() for d in found])
    files = plot_validation(found, tmp_path, title="itself")
    assert [f.name for f in files] == ["validate.png", "validate.pdf"]
    assert all(f.stat().st_size > 5_000 for f in files)


def test_steps_are_held_by_multiples_of_b1_whatever_the_slo_is_written_in() -> None:
    # 3.375 is what "3.4x" shows.
    assert plan().held() == HELD
    b1_ns = load_profile("v100").model("resnet50_v2").exec_ns[1]
    assert 8 * MS < 3.4 * b1_ns < 10 * MS
    words = ("slo-exp-1", "resnet50_v2", "2", "poisson", "200", "6ms", "10ms", "2ms", "add", "1")
    assert plan(workload=parse_workload(words[0], words[1:])).held() == [False, False, True]
    steps = [Step(0, 0), Step(1, 1, slo_ns=7), Step(2, 2, slo_ns=6), Step(3, 3, slo_factor=2)]
    assert held_steps(steps, from_slo=3.4, b1_ns=2) == [True, True, False, False]


def test_differences_are_in_points_and_the_larger_judge_counts(simulated: RunResult) -> None:
    step = simulated.steps[0]
    fewer = replace(step, in_time=step.in_time - step.sent // 10, met=step.met - step.sent // 5)
    live = replace(simulated, steps=(fewer, *simulated.steps[1:]))
    first = compare(live, simulated, attempt=1, disturbed=[(), (), ()], held=HELD)[0]
    assert first.client_points == pytest.approx(100 * (step.sent // 10) / step.sent)
    assert first.points == first.controller_points > 19
    assert first.goodput_ratio > 1


def test_runs_of_other_steps_are_not_compared(simulated: RunResult) -> None:
    shorter = replace(simulated, steps=simulated.steps[:2])
    with pytest.raises(InvalidConfig, match=r"the live run has 3 steps .* simulated one 2"):
        compare(simulated, shorter, attempt=1, disturbed=[(), (), ()], held=HELD)


def test_a_result_survives_json(simulated: RunResult) -> None:
    document = json.loads(json.dumps(simulated.as_dict()))
    assert RunResult.from_dict(document) == simulated
    with pytest.raises(MalformedResult, match="steps"):
        RunResult.from_dict({key: value for key, value in document.items() if key != "steps"})


# -------------------------------------------------------------------------------------- tries


class Told:
    """A meter whose n-th live run was disturbed in the steps that it is told."""

    def __init__(self, disturbed: list[set[int]]) -> None:
        self.disturbed, self.runs = disturbed, 0

    @contextlib.contextmanager
    def watch(self) -> Iterator[Meter]:
        self.step = -1
        yield self
        self.runs += 1

    def reasons(self, start_ns: int, end_ns: int) -> tuple[str, ...]:
        self.step += 1
        return ("it stood still",) if self.step in self.disturbed[self.runs] else ()


def tried(
    monkeypatch: pytest.MonkeyPatch,
    directory: Path,
    disturbed: list[set[int]],
    *,
    missed: tuple[int, ...],
    **changed: Any,
) -> tuple[Validation, Told]:
    """Run a plan whose live runs are simulations in which step 2 lost `missed[n]` answers."""
    meter = Told(disturbed)

    def run_locally(where: Path, *args: Any, **more: Any) -> RunResult:
        result = simulate(spec(), out=where / "run")
        last = result.steps[2]
        less = replace(last, in_time=last.in_time - missed[meter.runs])
        return replace(result, steps=(*result.steps[:2], less))

    monkeypatch.setattr(slosched.cli.local_run, "run_locally", run_locally)
    return run_plan(plan(**changed), directory, meter.watch, show=lambda _: None), meter


def test_an_undisturbed_run_is_final(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found, meter = tried(monkeypatch, tmp_path, [set(), set()], missed=(50, 0))
    assert meter.runs == 1 and not found.passed and found.verdict == "beyond"
    assert found.worst_points is not None and found.worst_points > 20
    assert found.as_dict()["passed"] is False


def test_a_disturbed_step_beyond_the_tolerance_is_run_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found, meter = tried(monkeypatch, tmp_path, [{0, 2}, {0}], missed=(50, 0))
    assert meter.runs == 2 and found.passed
    assert [d.attempt for d in found.differences] == [1, 1, 2]
    assert [bool(d.disturbed) for d in found.differences] == [True, False, False]
    assert found.worst_points is not None and found.worst_points < 1
    assert "1 of 1 steps were undisturbed, the worst of them" in verdict_text(found)
    assert {p.name for p in tmp_path.iterdir()} == {"try-1", "try-2"}


def test_a_step_that_was_disturbed_each_time_has_its_closest_try(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found, meter = tried(monkeypatch, tmp_path, [{2}] * 3, missed=(50, 40, 45))
    assert meter.runs == 3 and not found.passed
    assert found.differences[2].attempt == 2
    assert found.worst_points is None and found.verdict == "undecided"
    said = verdict_text(found)
    assert said.startswith("UNDECIDED") and said.endswith("disturbed all 1 steps in every try")
    assert len(found.delays) == 3


def test_a_disturbed_try_within_the_tolerance_is_no_agreement(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found, meter = tried(monkeypatch, tmp_path, [{2}, {2}, set()], missed=(0, 0, 0))
    assert meter.runs == 3 and not any(d.disturbed for d in found.differences) and found.passed
    found, meter = tried(monkeypatch, tmp_path / "b", [{2}, {2}], missed=(0, 0), tries=2)
    assert meter.runs == 2 and not found.passed and found.verdict == "undecided"
    assert [d.attempt for d in found.differences] == [1, 1, 1] and found.differences[2].points < 1


def test_a_plan_that_would_hold_nothing_is_refused(tmp_path: Path) -> None:
    meter = Told([])
    for changed in ({"from_slo": 4.0}, {"duration_ns": 2 * NS_PER_S}):
        with pytest.raises(InvalidConfig, match="nothing would be held"):
            run_plan(plan(**changed), tmp_path / "out", meter.watch)
    assert meter.runs == 0 and not (tmp_path / "out").exists()
    # A run in which the held steps sent nothing shows nothing either.
    nothing = Validation(plan(), (), (), tmp_path)
    assert nothing.verdict == "undecided" and not nothing.passed and nothing.worst_points is None


# ------------------------------------------------------------------------------ the benchmark


def test_the_table_says_what_was_measured_and_what_not(simulated: RunResult) -> None:
    last = simulated.steps[2]
    less = replace(last, met=last.met - last.sent // 20)
    live = replace(simulated, steps=(*simulated.steps[:2], less))
    verdicts = []
    for told, other in ((simulated, ()), (live, ()), (live, ("it stood still",))):
        found = compare(told, simulated, attempt=1, disturbed=[(), (), other], held=HELD)
        validation = Validation(plan(), tuple(found), (), Path())
        table = benchmark.rows_of(200, validation.as_dict()).splitlines()
        assert len(table) == 5 and table[2].startswith("| 200 | 1.5x | ")
        verdicts.append((table[4].split(" | ")[-1], benchmark.holds(tuple(found))))
    assert verdicts == [
        ("≤ 1 point: met |", True),
        ("≤ 1 point: **missed** |", False),
        ("not measured: it stood still |", False),
    ]


# ---------------------------------------------------------------------------------- the machine


def test_the_watch_sees_a_stall_in_its_stretch_alone() -> None:
    watch = MachineWatch()
    watch._stalls = [(2_000 * MS, 25 * MS)]
    samples = [(0, 0, 0), (1_000 * MS, 0, 0), (4_000 * MS, 300 * MS, 600 * MS)]
    watch._samples = [_Sample(*sample) for sample in samples]
    assert watch.between(0, 1_000 * MS).reasons() == ()
    found = watch.between(1_500 * MS, 2_500 * MS)
    assert found == Disturbance(1, 25 * MS, 0.025, 0.1, 0.2)
    assert found.reasons() == (
        "the machine stood still for 25 ms",
        "2.5 % of the time lost to stalls",
        "10 % of a CPU taken by the host",
        "20 % of a CPU used by other processes",
    )
    assert watch.between(1_990 * MS, 2_990 * MS).stalled_share == pytest.approx(0.01)


def test_the_watch_runs_and_ends_and_its_own_children_are_no_strangers() -> None:
    with MachineWatch() as watch:
        start_ns = now_ns()
        code = "import time\nwhile time.process_time() < 1.2: pass"
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
        end_ns = now_ns()
        time.sleep(0.6)
        samples = list(watch._samples)
    assert not watch._thread.is_alive()
    assert len(samples) >= 3 and samples[0].at_ns <= start_ns + NS_PER_S
    assert watch.between(start_ns, end_ns).steal_cores >= 0
    ours = _ours(os.getpid())
    assert ours * NS_PER_S // os.sysconf("SC_CLK_TCK") > NS_PER_S  # with the child's second


# ---------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["simple"], "never ends by itself"),
        (["slo-exp-9", "1"], "unknown workload 'slo-exp-9'"),
        (["x.toml", "3"], "x.toml describes the workload whole; '3' is one too many"),
        ([*WORDS, "--type", "LIFO"], "LIFO"),
        ([*WORDS, "--profile", "v1000"], "v1000"),
        ([*WORDS, "--from-slo", "4"], "nothing would be held"),
    ],
)
def test_what_is_wrong_is_named_before_anything_runs(
    words: list[str], said: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["validate", *words, "--out", str(out)])
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.stderr.split())
    assert not out.exists()


@pytest.mark.processes
def test_twenty_seconds_live_are_as_simulated(tmp_path: Path) -> None:
    out = tmp_path / "validated"
    words = ["slo-exp-1", "resnet50_v2", "12", "poisson", "300", "2", "32", "2", "mul", "4"]
    result = CliRunner().invoke(app, ["validate", *words, "--tries", "2", "--out", str(out)])
    document = json.loads((out / "validate.json").read_text())
    held = [step for step in document["steps"] if step["held"]]
    assert [step["step"] for step in held] == ["4x", "8x", "16x", "32x"]
    if result.exit_code == 8:
        why = "; ".join(reason for step in held for reason in step["disturbed"])
        assert why and not document["passed"]
        pytest.skip(f"nothing could be measured here, in two tries: {why}")
    assert result.exit_code == 0, result.output  # within 3 points from 3.4x up
    assert document["passed"] and document["tolerance_points"] == 3
    assert document["held_steps"] == 4 and document["undecided_steps"] == 0
    for step in document["steps"]:
        assert step["live"]["sent"] == step["simulated"]["sent"] > 1_000
    assert document["delays"][-1]["to_worker_ns"] > 0
    assert (out / "validate.png").stat().st_size > 5_000
    simulated = json.loads((out / "try-1" / "simulated" / "manifest.json").read_text())
    assert simulated["kind"] == "simulation" and simulated["complete"]
