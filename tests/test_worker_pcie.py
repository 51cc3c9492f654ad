"""Copies to emulated GPUs: processor sharing against its theory, and exec times from quantiles."""

from __future__ import annotations

import pytest

from slosched.config import EmulationNoise, GpuProfile, ModelProfile
from slosched.core.worker.emulated import EmulatedGpu, emulated_gpus
from slosched.core.worker.interface import Op, OpDone, OpKind
from slosched.core.worker.pcie import PcieLink
from slosched.errors import InvalidConfig
from slosched.units import NS_PER_MS

MS = NS_PER_MS
NET = ModelProfile("net", {1: 2 * MS}, 8 * MS, 100_000_000)
PROFILE = GpuProfile("tiny", {"net": NET}, weights_cache_bytes=2**30)


def ends(copies: list[tuple[int, int]]) -> dict[int, int]:
    """When copies (begin, work) end on one link; keys are their places in the list."""
    link, found = PcieLink(), dict[int, int]()
    for place, (begin_ns, work_ns) in enumerate(copies):
        link.begin(
            work_ns,
            now_ns=begin_ns,
            on_end=lambda end_ns, place=place: found.__setitem__(place, end_ns),  # type: ignore[misc]
        )
    while (due_ns := link.next_event_ns()) is not None:
        link.advance(due_ns)
    return found


def test_copies_that_run_at_once_share_the_link_equally() -> None:
    assert ends([(0, 100)]) == {0: 100}
    assert ends([(0, 100), (0, 100)]) == {0: 200, 1: 200}
    # Alone to 50, both at half speed until the short one has moved its 25, alone again.
    assert ends([(0, 100), (50, 25)]) == {1: 100, 0: 125}
    assert ends([(0, 90), (30, 30), (60, 5)]) == {2: 75, 1: 95, 0: 125}
    assert ends([(0, 10), (500, 10)]) == {0: 10, 1: 510}


@pytest.mark.parametrize("count", [3, 7, 16, 40])
def test_sharing_moves_as_much_as_the_link_can(count: int) -> None:
    found = ends([(0, 1000 + place) for place in range(count)])
    total = sum(1000 + place for place in range(count))
    assert max(found.values()) - total in range(2)
    assert list(found) == sorted(found)


def run(gpu: EmulatedGpu, *ops: tuple[int, Op]) -> dict[int, OpDone]:
    """Launch each op at its time and step to every event, as a stepper does."""
    done: dict[int, OpDone] = {}
    waiting = list(ops)
    while True:
        event_ns = gpu.next_event_ns()
        if waiting and (event_ns is None or waiting[0][0] <= event_ns):
            at_ns, op = waiting.pop(0)
            if (at_once := gpu.launch(op, now_ns=at_ns)) is not None:
                done[op.op_id] = at_once
        elif event_ns is None:
            return done
        else:
            done |= {d.op_id: d for d in polled(gpu, event_ns)}


def polled(gpu: EmulatedGpu, now_ns: int) -> list[OpDone]:
    return [event for event in gpu.poll(now_ns=now_ns) if isinstance(event, OpDone)]


def op(number: int, kind: OpKind, sizes: tuple[int, ...] = (), gpu_id: int = 0) -> Op:
    return Op(number, kind, gpu_id, 0, number, 1, 1, sizes, "net")


LOAD, COPY = OpKind.LOAD_WEIGHTS, OpKind.COPY_INPUT


def test_a_load_slows_an_input_and_the_other_way_round() -> None:
    noise = EmulationNoise(pcie_bytes_per_s=10**9)  # a byte takes 1 ns
    alone = run(EmulatedGpu(PROFILE, noise), (0, op(1, COPY, (1_000_000,))))
    assert alone[1].span.end_ns == MS and alone[1].span.duration_ns == MS
    both = run(EmulatedGpu(PROFILE, noise), (0, op(1, LOAD)), (MS, op(2, COPY, (500_000, 500_000))))
    assert both[2].span.begin_ns == MS and both[2].span.end_ns == 3 * MS
    assert both[1].span.end_ns == 9 * MS and both[1].span.duration_ns == 9 * MS


def test_without_a_speed_copies_take_no_time_and_loads_what_the_profile_says() -> None:
    done = run(EmulatedGpu(PROFILE), (0, op(1, LOAD)), (MS, op(2, COPY, (10**9,))))
    assert done[1].span.end_ns == 8 * MS and done[2].span.end_ns == MS


def test_outputs_go_the_other_way() -> None:
    noise = EmulationNoise(pcie_bytes_per_s=10**9)
    out = op(2, OpKind.COPY_OUTPUT, (1,))
    done = run(EmulatedGpu(PROFILE, noise), (0, op(1, LOAD)), (0, out))
    assert done[2].span.end_ns == 4000 and done[2].output_sizes == (4000,)
    assert done[1].span.end_ns == 8 * MS


def test_gpus_share_a_hosts_link_only_if_told() -> None:
    def loads_end(shared: bool) -> list[int]:
        gpus = emulated_gpus(PROFILE, EmulationNoise(pcie_bytes_per_s=10**9, pcie_shared=shared), 2)
        for gpu_id, gpu in gpus.items():
            gpu.launch(op(1, LOAD, gpu_id=gpu_id), now_ns=0)
        found: dict[int, int] = {}
        while len(found) < 2:
            due_ns = min(e for g in gpus.values() if (e := g.next_event_ns()) is not None)
            for gpu_id, gpu in gpus.items():
                for done in polled(gpu, due_ns):
                    found[gpu_id] = done.span.end_ns
        return [found[0], found[1]]

    assert loads_end(shared=False) == [8 * MS, 8 * MS]
    assert loads_end(shared=True) == [16 * MS, 16 * MS]


def test_exec_times_follow_measured_quantiles() -> None:
    noise = EmulationNoise(exec_quantiles=(0.9, 1.0, 1.5), seed=7)
    gpu, times = EmulatedGpu(PROFILE, noise), list[int]()
    now_ns = 0
    for number in range(2000):
        gpu.launch(op(number, OpKind.EXEC), now_ns=now_ns)
        now_ns = gpu.next_event_ns() or 0
        times += [d.span.duration_ns for d in polled(gpu, now_ns)]
    factors = sorted(time / (2 * MS) for time in times)
    assert factors[0] >= 0.9 and factors[-1] <= 1.5
    assert abs(factors[1000] - 1.0) < 0.03 and abs(factors[1500] - 1.25) < 0.03


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"exec_quantiles": (1.0,)}, "two or more"),
        ({"exec_quantiles": (1.0, 0.5)}, "never decrease"),
        ({"exec_quantiles": (0.0, 1.0)}, "above 0"),
        ({"exec_quantiles": (0.9, 1.1), "exec_sigma": 0.1}, "not both"),
        ({"pcie_shared": True}, "needs pcie_bytes_per_s"),
        ({"stall_ns": -1}, "at least 0"),
    ],
)
def test_impossible_disturbances_are_refused(given: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidConfig, match=words):
        EmulationNoise(**given)  # type: ignore[arg-type]
