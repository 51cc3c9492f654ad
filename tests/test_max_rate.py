"""The search for the highest rate at which an SLO holds, on probes that are known, simulated and live."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import slosched.clients.run
from slosched.cli.app import app
from slosched.errors import InvalidConfig
from slosched.experiment.children import Children
from slosched.loadgen.max_rate import (
    LEAD_IN_NS,
    LEAST_REQUESTS,
    End,
    Search,
    Window,
    find_max_rate,
    window_of,
    window_workload,
)
from slosched.loadgen.results import RunResult, StepResult
from slosched.loadgen.verdict import most_late
from slosched.units import NS_PER_MS, NS_PER_S


class Known:
    """A probe whose windows are known: what is above `capacity` is late. `disturbed` counts down by rate."""

    def __init__(self, capacity: float, disturbed: dict[float, int] | None = None) -> None:
        self.capacity = capacity
        self.disturbed = disturbed or {}
        self.asked: list[tuple[float, int, int]] = []

    def __call__(self, rate: float, length_ns: int, number: int) -> Window:
        self.asked.append((rate, length_ns, number))
        sent = round(rate * length_ns / NS_PER_S)
        late = 0 if rate <= self.capacity else max(1, round(sent * (1 - self.capacity / rate)))
        if self.disturbed.get(rate, 0) > 0:
            self.disturbed[rate] -= 1
            return Window(sent, sent // 2, ("the machine stood still for 30 ms",))
        return Window(sent, late)


SEARCH = Search(100, 1000, 100, 10 * NS_PER_S)


@settings(max_examples=200, deadline=None)
@given(
    low=st.integers(1, 500),
    steps=st.integers(0, 60),
    resolution=st.integers(5, 200),
    above=st.integers(-600, 15_000),
)
def test_the_last_rate_below_the_capacity_is_found(
    low: int, steps: int, resolution: int, above: int
) -> None:
    capacity = max(0.5, low + above + 0.5)
    high = low + steps * resolution
    probe = Known(capacity)
    found = find_max_rate(probe, Search(low, high, resolution, 2_000 * NS_PER_S))
    rates = [low + i * resolution for i in range(steps + 1)]
    # 1 % above the capacity still holds: 99 % are in time. The verdict needs some more than that.
    holding = [rate for rate in rates if rate <= capacity]
    failing = [rate for rate in rates if rate > 1.03 * capacity]
    assert found.holds is None or found.holds.rate >= max(holding, default=0)
    if found.end is End.FOUND:
        assert found.holds is not None and found.beyond is not None
        assert found.beyond.rate - found.holds.rate == resolution
        assert found.holds.rate < min(failing, default=10**9)
    elif found.end is End.ALL_HOLD:
        assert found.holds is not None and found.holds.rate == high and not failing
    else:
        assert found.end is End.NONE_HOLDS and not holding
    tried = [each.rate for each in found.tried]
    assert len(set(tried)) == len(tried) <= 2 + max(1, steps).bit_length()
    assert [number for _, _, number in probe.asked] == list(range(len(probe.asked)))


def test_the_answer_is_a_sentence() -> None:
    assert find_max_rate(Known(640), SEARCH).text == (
        "with >= 99 % in time at 99 % confidence: 600 requests/s holds, 700 does not hold"
    )
    assert find_max_rate(Known(5000), SEARCH).text.endswith(
        ": 1000 requests/s holds, the highest rate that was asked for"
    )
    assert find_max_rate(Known(50), SEARCH).text.endswith(
        ": no rate was found to hold, 100 does not hold"
    )


def test_a_window_is_long_enough_for_a_verdict() -> None:
    probe = Known(5000)
    find_max_rate(probe, SEARCH)
    assert [(rate, length_ns) for rate, length_ns, _ in probe.asked] == [
        (100, LEAST_REQUESTS * NS_PER_S // 100),
        (1000, 10 * NS_PER_S),
    ]
    assert most_late(LEAST_REQUESTS, confidence=SEARCH.confidence) >= 1


def test_an_undecided_rate_gets_three_windows_judged_together() -> None:
    asked: list[float] = []

    def probe(rate: float, length_ns: int, number: int) -> Window:
        asked.append(rate)
        return Window(10_000, {100: 0, 200: 75, 300: 100}[round(rate)])

    found = find_max_rate(probe, Search(100, 300, 100, NS_PER_S))
    assert asked == [100, *[300] * 3, *[200] * 2]  # 75 of 10,000 do not decide
    assert found.end is End.FOUND and found.text.endswith("200 requests/s holds, 300 is undecided")
    high = found.tried[1]
    assert high.verdict is not None
    assert (high.verdict.sent, high.verdict.late, high.windows) == (30_000, 300, 3)
    assert high.verdict.confidence > 0.998  # all looks at one rate together leave 1 %


def test_a_disturbed_window_is_repeated() -> None:
    probe = Known(640, {600: 2})
    found = find_max_rate(probe, SEARCH)
    assert found.text.endswith("600 requests/s holds, 700 does not hold")
    assert [rate for rate, _, _ in probe.asked].count(600) == 3


def test_a_rate_that_stays_disturbed_is_said_to_be() -> None:
    probe = Known(640, {600: 99})
    found = find_max_rate(probe, SEARCH)
    assert found.end is End.DISTURBED and [rate for rate, _, _ in probe.asked].count(600) == 4
    assert found.text.endswith("500 requests/s holds, 600 was disturbed too often")
    lowest = find_max_rate(Known(640, {100: 99}), SEARCH)
    assert lowest.end is End.DISTURBED and lowest.holds is None


def test_a_disturbed_window_counts_where_the_slo_holds_in_spite_of_it() -> None:
    def probe(rate: float, length_ns: int, number: int) -> Window:
        return Window(10_000, 0 if rate < 500 else 2_000, ("sends were late",))

    found = find_max_rate(probe, SEARCH)
    assert found.end is End.DISTURBED and found.holds is not None and found.holds.rate == 400
    assert all(
        t.holds == (t.rate < 500) and bool(t.disturbed) == (t.rate >= 500) for t in found.tried
    )


@pytest.mark.parametrize("after", [0, 1, 2, 4])
def test_a_problem_ends_the_search_with_what_is_known(after: int) -> None:
    known = Known(640)

    def probe(rate: float, length_ns: int, number: int) -> Window:
        return known(rate, length_ns, number) if number < after else Window(0, 0, problem="gone")

    found = find_max_rate(probe, SEARCH)
    assert found.end is End.STOPPED and found.problem == "gone" and len(found.tried) == after + 1
    assert found.text.endswith("the search ended early: gone")
    assert (found.holds is None) == (after == 0)


def test_the_document_says_what_the_sentence_says() -> None:
    document = json.loads(json.dumps(find_max_rate(Known(640, {700: 99}), SEARCH).as_dict()))
    assert (document["end"], document["holds_rps"], document["beyond_rps"]) == (
        "disturbed",
        600,
        700,
    )
    assert [each["rate_rps"] for each in document["tried"]] == [100, 1000, 500, 700, 600]
    assert document["tried"][3]["verdict"] is None
    assert document["tried"][3]["disturbed"] == ["the machine stood still for 30 ms"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((0, 1, 1, 1), "low must be above 0"),
        ((1, float("inf"), 1, 1), "high must be above 0"),
        ((2, 1, 1, 1), "must not be below low"),
        ((1, 2, 0, 1), "resolution must be above 0"),
        ((1, 1e6, 1, 1), "take a coarser resolution"),
        ((1, 2, 1, 0), "window must be above 0"),
    ],
)
def test_what_is_wrong_with_a_search_is_named(values: tuple[float, ...], said: str) -> None:
    low, high, resolution, window_ns = values
    with pytest.raises(InvalidConfig, match=said):
        Search(low, high, resolution, int(window_ns))


# ---------------------------------------------------------------------------------------- windows


def result(*, late_sends_ns: int = 0, problem: str = "") -> RunResult:
    def step(index: int, sent: int, in_time: int, delay_ns: int) -> StepResult:
        return StepResult(
            index=index,
            slo="500/s",
            group="",
            slo_factor=0.0,
            slo_ns=25 * NS_PER_MS,
            duration_ns=NS_PER_S,
            sent=sent,
            in_time=in_time,
            met=in_time,
            codes={"ok": in_time},
            latency_p50_ns=1,
            latency_p99_ns=1,
            issue_delay_p50_ns=0,
            issue_delay_p99_ns=delay_ns,
        )

    return RunResult(
        workload="w",
        steps=(step(0, 500, 0, NS_PER_S), step(1, 3000, 2990, late_sends_ns)),
        complete=not problem,
        problem=problem,
        issue_delay_p50_ns=0,
        issue_delay_p99_ns=0,
        inputs=False,
        random_weights=False,
        elapsed_ns=1,
    )


def test_the_lead_in_is_not_counted() -> None:
    assert window_of(result()) == Window(3000, 10)
    workload = window_workload(model="m", copies=2, slo=(0.0, 25), rate=500, length_ns=3 * NS_PER_S)
    assert [step.start_ns for step in workload.steps()] == [0, LEAD_IN_NS]
    assert workload.duration_ns == LEAD_IN_NS + 3 * NS_PER_S


def test_late_sends_and_stalls_disturb_a_window() -> None:
    [reason] = window_of(result(late_sends_ns=3 * NS_PER_MS)).disturbed
    assert reason == "sends were late: issue delay p99 3ms"
    assert window_of(result(), ("stood still",)).disturbed == ("stood still",)
    assert window_of(result(problem="stopped")) == Window(0, 0, problem="stopped")


# --------------------------------------------------------------------------------- the command line

MODEL = ["resnet50_v2", "--slo", "25ms"]


def test_a_simulated_search(tmp_path: Path) -> None:
    words = [
        "--gpus",
        "1",
        "--low",
        "300",
        "--high",
        "1500",
        "--resolution",
        "300",
        "--window",
        "3s",
    ]
    done = CliRunner().invoke(app, ["max-rate", "INFER5", *MODEL, *words])
    assert done.exit_code == 0, done.output
    title, answer = done.stdout.splitlines()
    assert title == "max-rate: 1 x resnet50_v2, poisson, SLO 25ms; INFER5 on 1 GPU (v100), seed 0"
    assert answer.endswith(": 600 requests/s holds, 900 does not hold")
    assert done.stderr.count("slosched: max-rate: ") == 4
    assert "1500/s: does not hold; " in done.stderr
    again = CliRunner().invoke(app, ["max-rate", "INFER5", *MODEL, *words, "--json"])
    document = json.loads(again.stdout)
    assert document["text"] == answer and document["holds_rps"] == 600


def test_not_even_the_lowest_rate_is_exit_code_1() -> None:
    words = ["--gpus", "1", "--low", "2000", "--window", "1s"]
    done = CliRunner().invoke(app, ["max-rate", "INFER5", *MODEL, *words])
    assert done.exit_code == 1 and "no rate was found to hold, 2000 does not hold" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--slo", "0"], "--slo must be above 0"),
        (["--slo", "abc"], "--slo must be a multiple"),
        (["--slo", "25ms", "--copies", "0"], "--copies must be within"),
        (["--slo", "25ms", "--low", "500", "--high", "400"], "must not be below low"),
        (["--slo", "25ms", "--window", "soon"], "--window"),
    ],
)
def test_wrong_options_are_named(words: list[str], said: str) -> None:
    for command in (["client", "max-rate"], ["max-rate", "INFER5"]):
        done = CliRunner().invoke(app, [*command, "resnet50_v2", *words])
        assert done.exit_code == 2 and said in done.stderr, done.output


def test_an_unknown_scheduler_is_named_before_anything_runs() -> None:
    done = CliRunner().invoke(app, ["max-rate", "INFER9", *MODEL])
    assert done.exit_code == 2 and "unknown scheduler TYPE 'INFER9'" in done.stderr


def live(monkeypatch: pytest.MonkeyPatch, answer: RunResult) -> Any:
    async def run_workload(*given: Any, **more: Any) -> RunResult:
        return answer

    monkeypatch.setattr(slosched.clients.run, "run_workload", run_workload)
    words = ["--low", "500", "--high", "500", "--repeats", "1"]
    return CliRunner().invoke(app, ["client", "max-rate", *MODEL, *words])


def test_what_is_disturbed_too_often_is_exit_code_8(monkeypatch: pytest.MonkeyPatch) -> None:
    late = result(late_sends_ns=9 * NS_PER_MS)
    worse = RunResult(
        **{
            **vars(late),
            "steps": tuple(
                StepResult(**{**vars(step), "in_time": step.sent // 2}) for step in late.steps
            ),
        }
    )
    done = live(monkeypatch, worse)
    assert done.exit_code == 8 and "500 was disturbed too often" in done.stdout
    assert done.stderr.count("a disturbed window: sends were late") == 2


def test_a_controller_that_went_away_is_exit_code_5(monkeypatch: pytest.MonkeyPatch) -> None:
    done = live(monkeypatch, result(problem="the controller went away"))
    assert done.exit_code == 5 and "the search ended early: the controller went away" in done.stdout


def test_nobody_there_is_exit_code_5() -> None:
    done = CliRunner().invoke(app, ["client", "127.0.0.1:1", "max-rate", *MODEL])
    assert done.exit_code == 5 and "no controller answered" in done.stderr


# ------------------------------------------------------------------------------------- for real


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[str]:
    """The address of a controller with one emulated GPU."""
    with Children() as children:
        loopback = ("--bind", "127.0.0.1", "--port", "0")
        words = ["worker", "--device", "emulated", "--gpus", "1", *loopback]
        worker = children.start("worker", words, tmp_path / "w.log")
        address = f"127.0.0.1:{children.wait_ready(worker, within_s=30)}"
        words = ["controller", "INFER5", "--workers", address, *loopback]
        words += ["--log-dir", str(tmp_path / "run")]
        controller = children.start("controller", words, tmp_path / "c.log")
        yield f"127.0.0.1:{children.wait_ready(controller, within_s=30)}"


@pytest.mark.processes
def test_a_live_search_finds_what_one_gpu_keeps(controller: str) -> None:
    """From far below its capacity of 1,019/s to far above: no machine is too slow for the one or too fast
    for the other. A second of SLO leaves room for whatever disturbs the machine."""
    words = ["--low", "500", "--high", "3000", "--resolution", "2500", "--window", "1s"]
    words += ["--no-inputs", "--repeats", "1"]
    done = CliRunner().invoke(
        app, ["client", controller, "max-rate", "resnet50_v2", "--slo", "1s", *words, "--json"]
    )
    document = json.loads(done.stdout)
    low, high = document["tried"]
    assert low["verdict"]["outcome"] == "holds" and low["verdict"]["sent"] > LEAST_REQUESTS * 0.8
    assert document["holds_rps"] == 500 and document["beyond_rps"] == 3000
    # Overload is never said to hold; on a machine that stands still it may stay undecided.
    assert (done.exit_code, document["end"]) in ((0, "found"), (8, "disturbed")), done.output
    if document["end"] == "found":
        assert high["verdict"]["outcome"] == "fails"
