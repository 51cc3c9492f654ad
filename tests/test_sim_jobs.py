"""Several simulations over processes: the same bytes, resumed, and ended whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from golden_runs import LOGS, slo_exp_1, sweep
from slosched.errors import InvalidConfig
from slosched.loadgen.results import RunResult
from slosched.sim.jobs import Job, JobFailed, JobsProgress, _Pool, finished_run, run_many
from slosched.sim.run import source_digest, spec_digest
from slosched.telemetry.manifest import read_manifest
from slosched.workloads import parse_workload
from slosched.workloads.azure_trace import file_name

SPEC = sweep("resnet50_v2 2 poisson 400 3.4 5.1 1.5 mul 0.1")


def jobs(folder: Path, seeds: range = range(3)) -> list[Job]:
    return [Job(replace(SPEC, seed=seed), folder / f"seed={seed}") for seed in seeds]


def without_place(result: RunResult) -> RunResult:
    return replace(result, run_dir=None)


def test_processes_change_nothing_and_complete_runs_are_not_run_again(tmp_path: Path) -> None:
    alone = run_many(jobs(tmp_path / "alone"))
    shown: list[JobsProgress] = []
    spread = run_many(jobs(tmp_path / "spread"), processes=2, progress=shown.append)
    assert [without_place(r) for r in alone] == [without_place(r) for r in spread]
    assert [r.sent for r in alone] != [alone[0].sent] * 3
    assert shown[-1] == JobsProgress(3, 3, {})
    for seed in range(3):
        for log in LOGS:
            name = f"seed={seed}/{log}"
            assert (tmp_path / "alone" / name).read_bytes() == (
                tmp_path / "spread" / name
            ).read_bytes()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "spread").rglob("*.tsv")}
    again = run_many(jobs(tmp_path / "spread"), processes=2)
    assert again == spread
    assert before == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "spread").rglob("*.tsv")
    }


def test_another_spec_or_a_part_is_run_beside_what_is_there(tmp_path: Path) -> None:
    (first,) = run_many(jobs(tmp_path, range(1)))
    other = Job(replace(SPEC, gpus=1), tmp_path / "seed=0")
    assert finished_run(other) is None
    (second,) = run_many([other])
    assert second.run_dir == tmp_path / "seed=0" / "run-002"
    assert finished_run(other) == second
    assert finished_run(jobs(tmp_path, range(1))[0]) == first
    manifest = tmp_path / "seed=0" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"complete": true', '"complete": false'))
    assert finished_run(jobs(tmp_path, range(1))[0]) is None


def test_a_run_over_a_changed_log_or_of_other_source_is_not_finished(tmp_path: Path) -> None:
    (first,) = run_many(jobs(tmp_path, range(1)))
    assert first.run_dir is not None
    log = tmp_path / "log.tsv"
    log.write_bytes((first.run_dir / "client_log.tsv").read_bytes())
    replay = parse_workload("replay", [str(log)])
    job = Job(replace(SPEC, workload=replay), tmp_path / "replay")
    (second,) = run_many([job])
    assert finished_run(job) == second
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:-1]))  # the same path, a request fewer
    assert finished_run(job) is None
    (third,) = run_many([job])
    assert third.sent == second.sent - 1

    manifest = tmp_path / "seed=0" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(source_digest(), "0" * 64))
    assert finished_run(jobs(tmp_path, range(1))[0]) is None


def test_a_changed_trace_is_another_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_TRACE_DIR", str(tmp_path))
    trace = tmp_path / file_name(1)
    minutes = ",".join(str(minute) for minute in range(1, 4))
    trace.write_text(f"HashOwner,HashApp,HashFunction,Trigger,{minutes}\no,a,f,http,1,2,3\n")
    spec = replace(SPEC, workload=parse_workload("azure", []))
    before = spec_digest(spec)
    assert spec_digest(replace(SPEC, workload=parse_workload("azure", []))) == before
    trace.write_text(trace.read_text().replace("http,1,2,3", "http,1,2,4"))
    assert spec_digest(spec) != before


@pytest.mark.parametrize("processes", [1, 2])
def test_a_job_that_fails_ends_them_all(tmp_path: Path, processes: int) -> None:
    unknown = slo_exp_1("nonesuch 1 poisson 10 2 4 2 mul 1")
    todo = jobs(tmp_path, range(2))
    todo.insert(1, Job(replace(SPEC, workload=unknown)))
    with pytest.raises(Exception, match="nonesuch") as raised:
        run_many(todo, processes=processes)
    if processes == 2:
        assert isinstance(raised.value, JobFailed) and "run 2 of 3" in str(raised.value)


def test_there_is_at_least_one_process() -> None:
    with pytest.raises(InvalidConfig, match="at least 1, not 0"):
        run_many([], processes=0)


_LONG = """
import sys, threading, os
from pathlib import Path
from dataclasses import replace
from golden_runs import sweep
from slosched.sim.jobs import Job, run_many

def main():
    spec = sweep("resnet50_v2 2 poisson 400 3.4 3.4 2 mul 3000")
    shown = set()
    def progress(where):
        shown.update(where.running)
        if len(shown) == 2:
            print("both run", flush=True)
            shown.clear()
    todo = [Job(replace(spec, seed=seed), Path(sys.argv[1]) / str(seed)) for seed in range(2)]
    run_many(todo, processes=2, progress=progress)

if __name__ == "__main__":
    main()
"""


def started(tmp_path: Path) -> subprocess.Popen[str]:
    """A process with two endless jobs in two processes of its own, both under way."""
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(_LONG))
    child = subprocess.Popen(
        [sys.executable, str(program), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": "tests:src"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline().startswith("both run")
    return child


def children_of(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(each) for each in found]


def gone(pids: list[int], within_s: float) -> bool:
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        if not any(Path(f"/proc/{pid}/cmdline").exists() and _alive(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.processes
def test_ctrl_c_stops_every_process_and_leaves_valid_parts(tmp_path: Path) -> None:
    child = started(tmp_path)
    inner = children_of(child.pid)
    try:
        os.killpg(child.pid, signal.SIGINT)  # as a terminal does: parent and children
        assert child.wait(30) != 0
    finally:
        child.kill()
    assert gone(inner, 5.0)
    for seed in "01":
        manifest = read_manifest(tmp_path / seed)
        assert manifest["complete"] is False and manifest["outcome"]["problem"] == "stopped"


@pytest.mark.processes
def test_processes_die_with_their_parent(tmp_path: Path) -> None:
    child = started(tmp_path)
    inner = children_of(child.pid)
    assert len(inner) >= 2
    child.kill()
    child.wait(10)
    assert gone(inner, 10.0)


@pytest.mark.processes
def test_a_process_that_died_while_it_had_nothing_to_do_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between two runs: its death shows when it is given the next one."""
    give = _Pool._give

    def give_to_the_dead(pool: _Pool, connection: Connection) -> None:
        if len(pool._waiting) == 1:
            process = pool._processes[connection]
            process.kill()
            process.join(10)
        give(pool, connection)

    monkeypatch.setattr(_Pool, "_give", give_to_the_dead)
    with pytest.raises(JobFailed, match=r"the process of run 3 ended \(exit code -9\)"):
        run_many(jobs(tmp_path, range(3)), processes=2)
