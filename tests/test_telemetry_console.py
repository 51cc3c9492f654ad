"""The ten-second lines, from records alone."""

from __future__ import annotations

from slosched.codes import ActionType
from slosched.core.scheduler.interface import ActionRecord, RequestRecord
from slosched.messages import Span
from slosched.telemetry.console import ControllerConsole
from slosched.telemetry.tally import Tally

START_NS = 1_600_000_000_000_000_000
MS = 1_000_000
TEN_S = 10_000 * MS


def _request(code: int, latency_ns: int, met: bool) -> RequestRecord:
    end_ns = START_NS + latency_ns
    return RequestRecord(1, 1, 0, 0, code, "", 1.0, 10 * MS, START_NS, end_ns, met, 1, 1, False)


def _action(
    kind: ActionType, exec_ms: float, e2e_ms: float, *, gpu: int = 0, code: int = 0, clock: int = 0
) -> ActionRecord:
    duration_ns = int(exec_ms * MS)
    return ActionRecord(
        action_id=1,
        action_type=kind,
        code=code,
        worker_id=0,
        gpu_id=gpu,
        model_id=0,
        batch_size=4 if kind == ActionType.INFER else 1,
        sent_ns=START_NS,
        expected_duration_ns=0,
        expected_start_ns=0,
        expected_complete_ns=0,
        result_received_ns=START_NS + int(e2e_ms * MS),
        processed_ns=0,
        requests_queued=0,
        copies_loaded=0,
        exec=Span(0, 0, duration_ns),
        gpu_clock_before_mhz=clock,
        gpu_clock_mhz=clock,
    )


def test_the_client_line_tells_success_from_satisfaction() -> None:
    tally = Tally()
    console = ControllerConsole(tally, now_ns=START_NS)
    tally.add_request(_request(0, 4 * MS, True))
    tally.add_request(_request(0, 12 * MS, False))  # answered, but late
    tally.add_request(_request(0, 5 * MS, True))
    tally.add_request(_request(8, 100, False))
    assert console.lines(START_NS + TEN_S) == [
        "Client throughput=0.4 success=75.00% (1/4 violations) min=4.00 max=12.00 mean=7.00 "
        "satisfaction=50.00% (controller, from arrival)"
    ]


def test_gpu_lines_are_sorted_and_count_only_code_0() -> None:
    tally = Tally()
    console = ControllerConsole(tally, now_ns=START_NS)
    tally.add_action(_action(ActionType.INFER, 6, 7, gpu=1, clock=1380))
    tally.add_action(_action(ActionType.INFER, 4, 9, gpu=1, clock=690))
    tally.add_action(_action(ActionType.INFER, 900, 900, gpu=1, code=81))
    tally.add_action(_action(ActionType.LOAD_WEIGHTS, 8.33, 9))
    tally.add_action(_action(ActionType.EVICT_WEIGHTS, 1, 1))
    assert console.lines(START_NS + TEN_S)[1:] == [
        "W0-GPU0 LoadW min=8.33 max=8.33 mean=8.33 e2emean=9.00 e2emax=9.00 throughput=0.1 "
        "utilization=0.00 clock=[-] norm_max=8.33 norm_mean=8.33",
        "W0-GPU1 Infer min=4.00 max=6.00 mean=5.00 e2emean=8.00 e2emax=9.00 throughput=0.8 "
        "utilization=0.00 clock=[690-1380] norm_max=6.00 norm_mean=4.00",
    ]


def test_extremes_and_clocks_are_those_of_the_interval() -> None:
    tally = Tally()
    console = ControllerConsole(tally, now_ns=START_NS)
    tally.add_action(_action(ActionType.INFER, 9, 10))
    tally.add_action(_action(ActionType.INFER, 3, 4))
    tally.add_action(_action(ActionType.INFER, 2, 3, clock=2760))  # the first that tells its clock
    assert "max=9.00 mean=4.67" in console.lines(START_NS + TEN_S)[1]
    tally.add_action(_action(ActionType.INFER, 4, 5, clock=690))
    tally.add_request(_request(0, 7 * MS, True))
    answers, gpu = console.lines(START_NS + 2 * TEN_S)
    assert "min=7.00 max=7.00 mean=7.00" in answers
    assert gpu == (
        "W0-GPU0 Infer min=4.00 max=4.00 mean=4.00 e2emean=5.00 e2emax=5.00 throughput=0.4 "
        "utilization=0.00 clock=[690-690] norm_max=2.00 norm_mean=2.00"
    )


def test_durations_at_the_reference_clock_count_those_before_any_clock_as_they_were() -> None:
    tally = Tally()
    console = ControllerConsole(tally, now_ns=START_NS)
    tally.add_action(_action(ActionType.INFER, 9, 10))
    tally.add_action(_action(ActionType.INFER, 2, 3, clock=2760))
    tally.add_action(_action(ActionType.INFER, 1, 3))
    assert console.lines(START_NS + TEN_S)[1].endswith(
        "clock=[2760-2760] norm_max=9.00 norm_mean=4.67"
    )


def test_utilization_is_busy_seconds_per_second() -> None:
    tally = Tally()
    console = ControllerConsole(tally, now_ns=START_NS)
    for _ in range(5):
        tally.add_action(_action(ActionType.INFER, 1500, 1500))
    assert "utilization=0.75 " in console.lines(START_NS + TEN_S)[1]


def test_each_interval_stands_alone_and_an_idle_one_is_silent() -> None:
    tally = Tally()
    console = ControllerConsole(tally, now_ns=START_NS - TEN_S)
    assert console.lines(START_NS) == []
    tally.add_request(_request(0, 4 * MS, True))
    first = console.lines(START_NS + TEN_S)
    assert first[0].startswith("Client throughput=0.1 success=100.00% (0/1 violations) min=4.00")
    assert len(first) == 1
    assert console.lines(START_NS + 2 * TEN_S) == []
    tally.add_request(_request(8, 4 * MS, False))
    assert console.lines(START_NS + 3 * TEN_S) == [
        "Client throughput=0.1 success=0.00% (1/1 violations) min=- max=- mean=- "
        "satisfaction=0.00% (controller, from arrival)"
    ]
