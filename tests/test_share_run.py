"""The runner of sharing experiments with members that misbehave, and with a fake MPS daemon."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from slosched.clock import monotonic_ns
from slosched.errors import SloschedError
from slosched.share import members as members_module
from slosched.share import run as run_module
from slosched.share.members import Members
from slosched.share.mps import client_settings, mps_daemon, mps_missing
from slosched.share.power_log import PowerLog
from slosched.share.row_files import read_rows
from slosched.share.run import distinct, run_mode, unavailable
from slosched.share.session import Interrupted, Session, common_window
from slosched.share_spec import (
    Clients,
    Job,
    JobResult,
    Mode,
    Order,
    Policy,
    Request,
    Row,
    ShareSpec,
    Status,
)
from slosched.units import NS_PER_MS, NS_PER_S

FAKE = (sys.executable, str(Path(__file__).with_name("fake_member.py")))


def spec_of(*models: str, **fields: object) -> ShareSpec:
    jobs = tuple(Job(name=f"job{i}", model=model) for i, model in enumerate(models))
    given = {"jobs": jobs, "device": "cpu", "duration_ns": 200 * NS_PER_MS, **fields}
    return ShareSpec(**given)  # type: ignore[arg-type]


def run_fakes(
    tmp_path: Path,
    spec: ShareSpec,
    *,
    mode: Mode = Mode.TM,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[int, JobResult]:
    [result] = run_mode(
        spec, mode, 0, tmp_path / "logs", say=lambda text: None, stopped=stopped, command=FAKE
    )
    assert result.unavailable == ""
    return {each.job: each for each in result.jobs}


@pytest.mark.processes
def test_what_one_job_does_wrong_leaves_the_others_results(tmp_path: Path) -> None:
    spec = spec_of("fast", "exits", "killed", "garbage", "refuses", "floods", "late", "prints")
    found = run_fakes(tmp_path, spec)

    assert [found[i].status for i in range(8)] == [
        Status.OK,
        Status.DIED,
        Status.DIED,
        Status.FAILED,
        Status.OUT_OF_MEMORY,
        Status.OK,
        Status.OK,
        Status.OK,
    ]
    assert "ended with exit code 7; its last words: RuntimeError: no more" in found[1].reason
    assert "was ended by SIGKILL" in found[2].reason
    assert "its message cannot be read" in found[3].reason
    assert found[4].reason == "it is too big"
    # What was measured before is there, also of those that died.
    assert [len(found[i].requests) for i in range(8)] == [3, 3, 3, 3, 0, 3, 3, 3]
    assert found[0].memory_allocated == 5
    assert (tmp_path / "logs" / "job7.log").stat().st_size <= 17 << 20


@pytest.mark.processes
def test_jobs_that_are_not_ready_or_do_not_end_are_timed_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slosched.share.session._GRACE_NS", 0)
    wait, calls = Members.wait, []

    def timed_out(self: Members, done: Callable[[], bool], until_ns: int, **more: object) -> bool:
        """The time to prepare is over as soon as the others are ready."""
        calls.append(until_ns)
        if len(calls) > 1:
            return wait(self, done, until_ns, **more)  # type: ignore[arg-type]
        assert wait(self, lambda: sum(m.ready for m in self.all) == 2, until_ns)
        return False

    monkeypatch.setattr(Members, "wait", timed_out)
    spec = spec_of("fast", "never", "hangs", finish_within_ns=NS_PER_S // 2)
    found = run_fakes(tmp_path, spec)
    assert [found[i].status for i in range(3)] == [Status.OK, Status.TIMED_OUT, Status.TIMED_OUT]
    assert "not ready within 600s" in found[1].reason
    assert "did not end within" in found[2].reason
    assert len(found[2].requests) == 3


@pytest.mark.processes
def test_one_process_holds_all_jobs_of_streams(tmp_path: Path) -> None:
    found = run_fakes(tmp_path, spec_of("fast", "refuses", "fast"), mode=Mode.STREAMS)
    assert [found[i].status for i in range(3)] == [Status.OK, Status.OUT_OF_MEMORY, Status.OK]
    assert found[0].pid == found[2].pid
    # Its death is that of all of them.
    found = run_fakes(tmp_path, spec_of("killed", "fast"), mode=Mode.STREAMS)
    assert {each.status for each in found.values()} == {Status.DIED}


@pytest.mark.processes
def test_models_stay_loaded_over_windows_with_a_part_of_the_jobs(tmp_path: Path) -> None:
    with Session(
        spec_of("fast", "fast", "refuses"),
        Mode.TM,
        tmp_path,
        say=lambda text: None,
        stopped=lambda: False,
        command=FAKE,
    ) as session:
        first = session.window([0], duration_ns=50 * NS_PER_MS)
        both = session.window([0, 1, 2], repeat=4, duration_ns=50 * NS_PER_MS)
        # A member that dies while others have a window is not taken to have served the next one.
        os.kill(first.jobs[0].pid, signal.SIGKILL)
        session.window([1], duration_ns=50 * NS_PER_MS)
        [dead] = session.window([0], duration_ns=50 * NS_PER_MS).jobs
    assert (dead.status, dead.requests) == (Status.DIED, ())
    assert [each.job for each in first.jobs] == [0]
    assert [each.status for each in both.jobs] == [Status.OK, Status.OK, Status.OUT_OF_MEMORY]
    assert first.jobs[0].pid == both.jobs[0].pid
    assert [len(each.requests) for each in both.jobs] == [3, 3, 0]
    assert {row.arrived_ns for row in first.jobs[0].requests}.isdisjoint(
        row.arrived_ns for row in both.jobs[0].requests
    )
    assert both.repeat == 4
    assert both.end_ns - both.begin_ns == 50 * NS_PER_MS


@pytest.mark.processes
def test_a_stop_before_all_are_ready_measures_nothing_and_ends_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(members_module, "_END_WITHIN_S", 0.2)
    started: list[int] = []
    start = Members.start

    def noted(self: Members, *args: object, **more: object) -> object:
        member = start(self, *args, **more)  # type: ignore[arg-type]
        started.append(member.pid)
        return member

    monkeypatch.setattr(Members, "start", noted)
    with pytest.raises(Interrupted, match="stopped before"):
        run_fakes(tmp_path, spec_of("never", "stubborn"), stopped=lambda: len(started) == 2)
    assert len(started) == 2
    for pid in started:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.processes
def test_a_stop_while_it_runs_keeps_what_was_measured(tmp_path: Path) -> None:
    said: list[str] = []
    [result] = run_mode(
        spec_of("fast"),
        Mode.TM,
        0,
        tmp_path,
        say=said.append,
        stopped=lambda: any("running" in text for text in said),
        command=FAKE,
    )
    assert result.jobs[0].status is Status.OK
    assert len(result.jobs[0].requests) == 3
    assert "stopped" in result.about


@pytest.mark.processes
def test_what_a_member_started_is_ended_with_it(tmp_path: Path) -> None:
    script = tmp_path / "member.py"
    child = tmp_path / "child"
    script.write_text(
        "import os, subprocess, sys, time\n"
        "sys.stdin.readline()\n"
        "p = subprocess.Popen(['sleep', '60'])\n"
        f"open({str(child)!r}, 'w').write(str(p.pid))\n"
        "os._exit(3)\n"
    )
    [result] = run_mode(
        spec_of("fast"),
        Mode.TM,
        0,
        tmp_path,
        say=lambda text: None,
        stopped=lambda: False,
        command=(sys.executable, str(script)),
    )
    assert result.jobs[0].status is Status.DIED
    assert _eventually(lambda: not _lives(int(child.read_text())))


def _lives(pid: int) -> bool:
    """False also for a zombie, which only waits to be asked for."""
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


@pytest.mark.processes
def test_a_long_order_does_not_block_and_a_line_without_end_is_refused(tmp_path: Path) -> None:
    # A member that never reads its input, and writes a line that never ends.
    script = tmp_path / "member.py"
    script.write_text("import os, sys\nwhile True:\n    os.write(int(sys.argv[1]), b'x' * 65536)\n")
    trace = tuple(float(i) for i in range(100_000))
    order = Order(
        mode=Mode.TM,
        device="cpu",
        jobs={0: Job(name="a", model="fast", clients=Clients(trace=trace))},
        policy=Policy.FCFS,
        seed=0,
        rows=str(tmp_path / "rows"),
    )
    with Members((sys.executable, str(script))) as members:
        member = members.start(order, tmp_path / "log")
        assert members.wait(lambda: member.gone, monotonic_ns() + 20 * NS_PER_S)
    assert member.status is Status.FAILED


_KILLED = """
import os, signal, subprocess, sys
from pathlib import Path
from slosched.share.keeper import FOLDER, GROUP, Keeper
folder, gone = Path(sys.argv[1]), Path(sys.argv[2])
with Keeper() as keeper:
    child = subprocess.Popen(["sleep", "60"], start_new_session=True)
    keeper.keep(GROUP, child.pid)
    for each in (folder, gone):
        keeper.keep(FOLDER, each)
    keeper.release(FOLDER, gone)
    print(child.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.processes
def test_what_a_killed_run_has_left_is_ended_and_removed(tmp_path: Path) -> None:
    folder, released = tmp_path / "folder", tmp_path / "released"
    for each in (folder, released):
        each.mkdir()
        (each / "rows").write_text("1")
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(folder), str(released)],
        stdout=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    child = int(done.stdout)
    assert _eventually(lambda: not _lives(child) and not folder.exists())
    assert (released / "rows").exists()


# ------------------------------------------------------------------------------------ what is missing


def test_a_mode_that_the_machine_lacks_is_unavailable_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object, **more: object) -> None:
        raise AssertionError("something was started")

    monkeypatch.setattr(run_module, "Session", never)
    monkeypatch.setattr(run_module, "_DRIVERS", (str(tmp_path),))
    monkeypatch.setenv("PATH", str(tmp_path))
    for device, mode, words in (
        ("cuda:0", Mode.MPS, "mps: nvidia-cuda-mps-control is not installed"),
        ("cpu", Mode.MPS, "service of NVIDIA GPUs"),
        ("cpu", Mode.PREEMPT, "graphs of a GPU"),
    ):
        [result] = run_mode(
            spec_of("bert", device=device),
            mode,
            2,
            tmp_path,
            say=lambda text: None,
            stopped=lambda: False,
        )
        assert words in result.unavailable
        assert result.repeat == 2
        assert [each.status for each in result.jobs] == [Status.UNAVAILABLE]
    monkeypatch.setattr(run_module, "_DRIVERS", ())
    assert "no NVIDIA driver" in unavailable(spec_of("bert", device="cuda:0"), Mode.TM)
    assert unavailable(spec_of("bert", device="emulated"), Mode.PREEMPT) == ""


def test_power_of_what_is_no_gpu_is_not_measured_and_says_so(tmp_path: Path) -> None:
    with PowerLog("cpu", tmp_path) as power:
        assert "is not a GPU" in power.problem
        assert power.samples(0, 1) == ()
    with PowerLog("cuda:0", tmp_path, command=(str(tmp_path / "nothing"),)) as power:
        assert "does not start" in power.problem
    with PowerLog(
        "cuda:0", tmp_path, command=(sys.executable, "-c", "raise SystemExit(4)")
    ) as power:
        assert power._process is not None
        power._process.wait(20)
    assert power.problem == "the sampler of power ended with 4"


_SAMPLER = """
import json, select, sys, time
file, interval = sys.argv[sys.argv.index("--file") + 1], sys.argv[sys.argv.index("--interval-ms") + 1]
print(json.dumps({"problem": ""}), flush=True)
time.sleep(0.3)
with open(file, "w", buffering=1) as out:
    while not select.select([sys.stdin], [], [], 0.002)[0]:  # its end
        sample = {"at_ns": time.monotonic_ns(), "watts": 70.0, "temperature": int(interval)}
        out.write(json.dumps(sample) + "\\n")
"""


@pytest.mark.processes
def test_the_idle_time_begins_when_the_sampler_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = functools.partial(PowerLog, command=(sys.executable, "-c", _SAMPLER))
    monkeypatch.setattr("slosched.share.session.PowerLog", sampler)
    spec = spec_of("fast", device="cuda:0", idle_ns=100 * NS_PER_MS, power_every_ns=80 * NS_PER_MS)
    with Session(
        spec, Mode.TM, tmp_path, say=lambda text: None, stopped=lambda: False, command=FAKE
    ) as session:
        result = session.window(duration_ns=20 * NS_PER_MS)
    assert result.idle_watts == pytest.approx(70)
    assert {each.temperature for each in result.power} == {80}  # the interval that it was given


# ------------------------------------------------------------------------------------- pure decisions


def test_equal_jobs_run_alone_once() -> None:
    job = Job(name="a", model="bert")
    change = msgspec.structs.replace
    jobs = (
        job,
        change(job, name="b", priority=3, slo_times_solo=1.6, start_after_ns=5),
        change(job, name="c", batch=2),
        change(job, name="d", command=("true",)),
        change(job, name="e", clients=Clients(think_ns=1)),
    )
    assert distinct(jobs) == {0: (0, 1), 2: (2,), 4: (4,)}


def test_the_common_window_is_where_all_jobs_were_there() -> None:
    def ran(job: int, *ends: int) -> JobResult:
        return JobResult(
            job=job,
            requests=tuple(
                Request(job=job, number=i, arrived_ns=0, started_ns=0, ended_ns=end)
                for i, end in enumerate(ends)
            ),
        )

    jobs = {
        0: Job(name="a", model="x", start_after_ns=30),
        1: Job(name="b", model="x", count=2),
        2: Job(name="c", model="x", start_after_ns=900),
    }
    # Job 1 has made its two requests at 80; job 2 never ran.
    assert common_window([ran(0, 50, 99), ran(1, 60, 80), ran(2)], jobs, 10, 110) == (40, 80)
    assert common_window([ran(0, 50), ran(1, 60)], jobs, 10, 110) == (40, 110)
    # Where the jobs never met, it is the whole time.
    assert common_window([ran(0, 50), ran(1, 20, 35)], jobs, 10, 110) == (10, 110)


def test_rows_of_a_window_are_read_also_where_the_last_is_not_whole(tmp_path: Path) -> None:
    def line(job: int, at_ns: int, *, warmup: bool = False) -> bytes:
        row = Request(
            job=job, number=0, arrived_ns=at_ns, started_ns=at_ns, ended_ns=at_ns, warmup=warmup
        )
        return msgspec.json.encode(Row(request=row)) + b"\n"

    path = tmp_path / "rows"
    path.write_bytes(
        line(0, 1, warmup=True) + line(0, 5) + line(1, 20) + line(0, 20) + line(0, 30)[:9]
    )
    assert [row.arrived_ns for row in read_rows(path, 0, 10) if isinstance(row, Request)] == [1, 20]
    assert read_rows(tmp_path / "none", 0, 0) == []


# ------------------------------------------------------------------------------------------------- MPS

_CONTROL = """#!/bin/bash
pipes=$CUDA_MPS_PIPE_DIRECTORY
if [ "$1" = -d ]; then
    [ -n "$FAKE_MPS_FAILS" ] && { echo "no device"; exit 1; }
    echo "$0" > "$pipes/started"
    setsid "$0" daemon </dev/null >/dev/null 2>&1 &
    exit 0
fi
if [ "$1" = daemon ]; then
    [ -n "$FAKE_MPS_STUBBORN" ] && trap "" TERM
    echo $$ > "$pipes/nvidia-cuda-mps-control.pid"
    while [ ! -e "$pipes/quit" ] || [ -n "$FAKE_MPS_STUBBORN" ]; do sleep 0.02; done
    exit 0
fi
read -r command
case "$command" in
    get_server_list) echo 4711 ;;
    "get_client_list 4711") echo "$FAKE_MPS_CLIENTS" ;;
    quit*) touch "$pipes/quit" ;;
    *) exit 1 ;;
esac
"""


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake nvidia-cuda-mps-control in PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "nvidia-cuda-mps-control"
    script.write_text(_CONTROL)
    script.chmod(0o700)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return script


def _eventually(true: Callable[[], bool]) -> bool:
    pause = threading.Event()
    for _ in range(500):
        if true():
            return True
        pause.wait(0.01)
    return False


@pytest.mark.processes
def test_the_mps_daemon_is_started_in_its_own_folder_and_ended(
    control: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("FAKE_MPS_CLIENTS", "12 13")
    assert mps_missing() == ""
    problems: list[str] = []
    with mps_daemon(problems.append) as mps:
        folder = mps.folder
        pid_file = mps.pipes / "nvidia-cuda-mps-control.pid"
        assert _eventually(lambda: pid_file.exists() and pid_file.read_text().strip() != "")
        daemon = int(pid_file.read_text())
        assert mps.clients() == {12, 13}
        mine = mps.environment({"CUDA_MPS_CLIENT_PRIORITY": "1"})
        assert mine["CUDA_MPS_PIPE_DIRECTORY"] == str(mps.pipes)
        assert mine["CUDA_MPS_CLIENT_PRIORITY"] == "1"
        assert "CUDA_VISIBLE_DEVICES" not in mine
        # A socket's address has room for 107 bytes.
        assert len(str(mps.pipes / "nvidia-cuda-mps-control.sock")) < 108
        with pytest.raises(SloschedError, match="failed with code 1"):
            mps.ask("set_default_active_thread_percentage 5")
    assert problems == []
    assert not folder.exists()
    assert _eventually(lambda: not _lives(daemon))


@pytest.mark.processes
def test_an_mps_daemon_that_does_not_quit_is_killed_also_after_an_error(
    control: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slosched.share.mps._GONE_WITHIN_NS", NS_PER_S // 5)
    monkeypatch.setenv("FAKE_MPS_STUBBORN", "1")
    problems: list[str] = []
    daemon = 0
    with pytest.raises(KeyboardInterrupt), mps_daemon(problems.append) as mps:
        pid_file = mps.pipes / "nvidia-cuda-mps-control.pid"
        assert _eventually(lambda: pid_file.exists() and pid_file.read_text().strip() != "")
        daemon = int(pid_file.read_text())
        raise KeyboardInterrupt
    assert problems == ["mps: the daemon did not end when asked and was killed"]
    assert _eventually(lambda: not _lives(daemon))


@pytest.mark.processes
def test_an_mps_daemon_that_does_not_start_makes_the_mode_unavailable(
    control: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FAKE_MPS_FAILS", "1")
    monkeypatch.setattr(run_module, "_DRIVERS", (str(tmp_path),))
    [result] = run_mode(
        spec_of("fast", device="cuda:0", idle_ns=0, cool_down_ns=0),
        Mode.MPS,
        0,
        tmp_path / "logs",
        say=lambda text: None,
        stopped=lambda: False,
        command=FAKE,
    )
    assert "ended with code 1: no device" in result.unavailable


@pytest.mark.processes
def test_jobs_under_mps_run_in_the_daemons_environment(
    control: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(run_module, "_DRIVERS", (str(tmp_path),))
    said: list[str] = []
    [result] = run_mode(
        spec_of("fast", "killed", device="cuda:0", idle_ns=0, cool_down_ns=0),
        Mode.MPS,
        0,
        tmp_path / "logs",
        say=said.append,
        stopped=lambda: False,
        command=FAKE,
    )
    assert [each.status for each in result.jobs] == [Status.OK, Status.DIED]
    # The fake names none of them: a run whose processes do not use the daemon must say so.
    assert result.about["mps_clients"] == "0 of 2"
    assert any("names 0 of the 2 processes" in text for text in said)


def test_low_jobs_get_the_lower_client_priority_and_limits_their_percentage() -> None:
    jobs = {
        0: Job(name="a", model="x", priority=2),
        1: Job(name="b", model="x", priority=1, thread_percentage=30),
        2: Job(name="c", model="x", priority=2),
    }
    assert client_settings(jobs) == {
        0: {"CUDA_MPS_CLIENT_PRIORITY": "0"},
        1: {"CUDA_MPS_CLIENT_PRIORITY": "1", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "30"},
        2: {"CUDA_MPS_CLIENT_PRIORITY": "0"},
    }
