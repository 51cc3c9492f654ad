"""When a worker's process collects garbage, and on which core its loop stays."""

from __future__ import annotations

import gc
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from slosched.config import WorkerConfig
from slosched.config_file import load_worker_config
from slosched.daemon.housekeeping import Collector, check_core, own_process, usable_cores
from slosched.daemon.supervisor import run_workers
from slosched.daemon.worker import WorkerServer, run_worker
from slosched.errors import InvalidConfig, UnknownName
from slosched.units import NS_PER_MS, NS_PER_S

EMULATED = WorkerConfig(device="emulated", port=0, bind="127.0.0.1")
NO_CORE = os.cpu_count() or 1  # they count from 0
MIB = 2**20


class VirtualProcess:
    """A collector in virtual time. `done` has what it collected: (when in ms, 1 or "all" or "thawed")."""

    def __init__(self) -> None:
        self.now = 0
        self.takes_ns = 0
        self.young = 0
        self.rss = 1000 * MIB
        self.done: list[tuple[int, object]] = []
        self.collector = Collector(
            lambda: self.now,
            collect=lambda generation: self._collected(generation),
            collect_all=lambda thaw: self._collected("thawed" if thaw else "all"),
            young_objects=lambda: self.young,
            rss_bytes=lambda: self.rss,
        )

    def _collected(self, what: object) -> None:
        self.done.append((self.now // NS_PER_MS, what))
        self.now += self.takes_ns

    def run(self, until_ms: int, *, free_ms: int | None, unused: bool = False) -> None:
        """A loop that comes round each millisecond; the next thing is always due `free_ms` later."""
        while self.now < until_ms * NS_PER_MS:
            if self.now >= self.collector.due_ns:
                due_ns = None if free_ms is None else self.now + free_ms * NS_PER_MS
                self.collector.tidy(due_ns, unused=unused)
            self.now += NS_PER_MS


def test_young_objects_are_collected_once_a_second_when_nothing_is_due() -> None:
    process = VirtualProcess()
    process.run(3500, free_ms=5)
    assert process.done == [(1000, 1), (2000, 1), (3000, 1)]
    process = VirtualProcess()
    process.run(2500, free_ms=None)
    assert process.done == [(1000, 1), (2000, 1)]


def test_nothing_is_collected_before_a_start_and_everything_soon_after_it() -> None:
    process = VirtualProcess()
    process.run(2300, free_ms=4)
    assert process.done == []
    process.run(2400, free_ms=5)
    assert process.done == [(2300, 1)], "at the first time that was free"


def test_a_collection_that_took_long_waits_for_twice_that_time() -> None:
    process = VirtualProcess()
    process.takes_ns = 8 * NS_PER_MS
    process.run(1500, free_ms=5)
    assert len(process.done) == 1
    process.run(5000, free_ms=15)
    assert len(process.done) == 1
    process.run(5100, free_ms=16)
    assert len(process.done) == 2


def test_a_loop_that_is_never_idle_does_not_grow_for_ever() -> None:
    process = VirtualProcess()
    process.young = 200_000
    process.run(2000, free_ms=0)
    assert process.done == []
    process.young += 1
    process.run(2500, free_ms=0)
    assert [what for _, what in process.done] == [1]


def test_a_worker_that_is_idle_for_long_and_has_no_model_is_tidied_once() -> None:
    process = VirtualProcess()
    process.run(60_000, free_ms=100, unused=True)
    full = [(at, what) for at, what in process.done if what != 1]
    assert full == [(11_000, "thawed")]
    process.run(80_000, free_ms=100, unused=False)
    process.run(85_000, free_ms=100, unused=True)
    assert [e for e in process.done if e[1] != 1] == full, "with models it is not, however long"
    process.run(120_000, free_ms=100, unused=True)
    assert len([e for e in process.done if e[1] == "thawed"]) == 2


def test_a_full_collection_follows_when_memory_grew_by_a_quarter_and_512_mib() -> None:
    process = VirtualProcess()
    process.rss += 511 * MIB
    process.run(30_000, free_ms=100)
    assert {what for _, what in process.done} == {1}
    process.rss += MIB
    process.run(60_000, free_ms=4)
    assert {what for _, what in process.done} == {1}, "but never before a start"
    process.run(90_000, free_ms=100)
    assert [what for _, what in process.done].count("all") == 1
    process.rss += 300 * MIB
    process.run(120_000, free_ms=100)
    assert [what for _, what in process.done].count("all") == 1


# ------------------------------------------------------------------------- the real process


def state() -> tuple[bool, tuple[int, int, int], set[int]]:
    return gc.isenabled(), gc.get_threshold(), os.sched_getaffinity(0)


@pytest.mark.parametrize("mode", ["idle", "auto", "off"])
def test_a_process_of_ones_own_is_set_up_and_left_as_it_was(mode: str) -> None:
    before = state()
    core = usable_cores()[-1]
    other: list[set[int]] = []
    begin, end = threading.Event(), threading.Event()

    def elsewhere() -> None:
        begin.wait(10)
        other.append(os.sched_getaffinity(0))
        end.set()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    with own_process(replace(EMULATED, gc=mode, cpu=core)) as collector:
        begin.set()
        assert end.wait(10)
        assert os.sched_getaffinity(0) == {core}
        assert other == [before[2]], "other threads stay where they may run"
        assert gc.isenabled() is (mode == "auto")
        assert (collector is not None) is (mode == "idle")
        if mode == "auto":
            assert gc.get_threshold() == (50_000, 20, 100)
    thread.join(10)
    assert state() == before


def test_without_a_core_the_loop_may_run_anywhere() -> None:
    before = os.sched_getaffinity(0)
    with own_process(EMULATED):
        assert os.sched_getaffinity(0) == before


def test_the_real_collector_frees_cycles_and_reads_this_process() -> None:
    now = [0]
    collector = Collector(lambda: now[0])
    freed: list[int] = []

    class Node:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            freed.append(1)

    with own_process(replace(EMULATED, gc="off")):
        Node()
        assert freed == []
        now[0] += 2 * NS_PER_S
        collector.tidy(None, unused=False)
        assert freed == [1]
        assert collector._known_bytes > MIB
        collector._collect_all(True)
        assert gc.get_freeze_count() > 1000
    assert gc.get_freeze_count() == 0


def test_a_server_in_somebodys_process_changes_nothing_there() -> None:
    seen: list[object] = []
    before = state()
    server = WorkerServer(replace(EMULATED, cpu=usable_cores()[0], gc="off"))
    turn = server._turn

    def looking() -> None:
        seen.append(state())
        turn()

    server._turn = looking  # type: ignore[method-assign]
    with server:
        while len(seen) < 2:
            time.sleep(0.01)
    assert set(map(repr, seen)) == {repr(before)} and state() == before


def test_run_worker_tidies_between_the_turns_of_its_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    offered: list[tuple[int | None, bool]] = []
    stop = threading.Event()

    def tidy(self: Collector, next_ns: int | None, *, unused: bool) -> None:
        offered.append((next_ns, unused))
        self.due_ns += NS_PER_S
        stop.set()

    monkeypatch.setattr(Collector, "tidy", tidy)
    assert run_worker(EMULATED, announce=lambda line: None, stop=stop) == 0
    assert offered == [(None, True)]


# --------------------------------------------------------------------------------- options


def test_a_core_that_does_not_exist_is_named_with_those_that_do() -> None:
    check_core(-1)
    for core in usable_cores():
        check_core(core)
    with pytest.raises(InvalidConfig, match=rf"cpu {NO_CORE} is not a core .* it may use \d"):
        check_core(NO_CORE)
    lines: list[str] = []
    with pytest.raises(InvalidConfig, match="is not a core"):
        run_worker(replace(EMULATED, cpu=NO_CORE), announce=lines.append)
    assert lines == []


def test_each_of_several_gpus_has_a_core_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    started: list[WorkerConfig] = []

    def supervise(configs: list[WorkerConfig], *_: object, **__: object) -> int:
        started.extend(configs)
        return 0

    monkeypatch.setattr("slosched.daemon.supervisor.supervise", supervise)
    run_workers(WorkerConfig(), announce=print)
    assert [each.cpu for each in started] == [-1, -1, -1]
    with pytest.raises(InvalidConfig, match=f"cpu {NO_CORE} is not a core"):
        run_workers(WorkerConfig(cpu=NO_CORE - 1), announce=print)
    monkeypatch.setattr("slosched.daemon.supervisor.check_core", lambda cpu: None)
    started.clear()
    run_workers(WorkerConfig(cpu=4), announce=print)
    assert [each.cpu for each in started] == [4, 5, 6]


def test_the_options_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "worker.toml"
    file.write_text('cpu = 3\ngc = "off"\n')
    config = load_worker_config(file)
    assert (config.cpu, config.gc) == (3, "off")
    for text, said in (
        ('cpu = "3"', "cpu must be a whole number"),
        ("cpu = -2", "cpu must be the number of a core, or -1 for any, not -2"),
        ("gc = true", "gc must be a text"),
    ):
        file.write_text(text)
        with pytest.raises(InvalidConfig, match=said):
            load_worker_config(file)
    with pytest.raises(UnknownName, match="unknown gc 'never'; known: auto, idle, off"):
        WorkerConfig(gc="never")
