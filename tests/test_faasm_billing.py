"""Bills of processes, the host's billing log, and the original's layout of results."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from slosched.clock import now_ns, sleep_ns
from slosched.errors import InvalidConfig, OutputExists, PeerUnreachable, SloschedError
from slosched.faasm import layout
from slosched.faasm.billing import Bill, Billing, host_log_name
from slosched.faasm.billing_host import Host, log_lines, read_log, summary_text
from slosched.faasm.frame_processes import Process, Tree, below, memory_of, read_process
from slosched.faasm.names import REPLACED
from slosched.faasm.pull import pull_results

_MB = 1_000_000
#: Says that it is ready, and ends when its input does.
_WAIT = "print('ready', flush=True); sys.stdin.read()"
_HOLDS = (
    f"import sys; held = bytearray(60_000_000); held[::4096] = b'x' * len(held[::4096]); {_WAIT}"
)
#: Uses 0.3 s of CPU time, however fast the machine is.
_BUSY = f"import sys, time\nwhile time.process_time() < 0.3: pass\n{_WAIT}"
#: Two processes that read one piece of 60 MB, which the first made.
_SHARE = """
import os, sys
held = bytearray(60_000_000)
held[::4096] = b'x' * len(held[::4096])
child = os.fork()
if child: print('ready', flush=True)
sys.stdin.read()
if child: os.waitpid(child, 0)
"""


@contextmanager
def process(program: str) -> Iterator[subprocess.Popen[bytes]]:
    started = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert started.stdin is not None and started.stdout is not None
    try:
        assert started.stdout.readline() == b"ready\n"
        yield started
        started.stdin.close()
        assert started.wait(30) == 0
    finally:
        started.kill()
        started.wait(10)
        started.stdout.close()


def sampled(billing: Billing) -> None:
    """Wait for two samples that begin from now on."""
    wanted, until_ns = billing.samples + 3, now_ns() + 30_000_000_000
    while billing.samples < wanted:
        assert now_ns() < until_ns
        sleep_ns(1_000_000)


def ended(billing: Billing) -> Bill:
    assert billing.bill is not None
    return billing.bill


# --------------------------------------------------------------------------------------- processes


@pytest.mark.processes
def test_memory_of_the_processes_below_this_one_is_billed(tmp_path: Path) -> None:
    # Those of other tests, as a tracker of shared memory.
    others = {each.pid for each in below([os.getpid()])}
    with Billing(every_s=0.01, files=tmp_path / "a") as billing, process(_HOLDS) as holds:
        sampled(billing)
    bill, record = ended(billing), billing.record()
    assert bill.most_processes == 1 + len(others)
    assert 60 * _MB < bill.peak_pss_bytes <= bill.peak_rss_bytes
    [one] = [each for each in billing.processes.values() if each.pid not in others]
    assert one.pid == holds.pid and one.command.startswith(sys.executable)
    assert one.peak_pss_bytes == bill.largest_pss_bytes
    paper = bill.largest_pss_bytes * bill.most_processes * bill.wall_ns
    assert record["gb_s_paper"] == pytest.approx(paper / 1e18)
    assert record["gb_s_peak"] == pytest.approx(bill.peak_pss_bytes * bill.wall_ns / 1e18)
    assert 0 < record["gb_s_integral"] <= record["gb_s_peak"]
    assert record["billing"] == "a" and record["peak_pss_mb"] * 1e6 == bill.peak_pss_bytes


@pytest.mark.processes
def test_the_integral_is_that_of_the_samples_in_the_file(tmp_path: Path) -> None:
    with (
        process(_HOLDS) as holds,
        Billing(pids=[holds.pid], every_s=0.01, files=tmp_path / "a") as billing,
    ):
        sampled(billing)
    lines = [line.split("\t") for line in (tmp_path / "a.tsv").read_text().splitlines()]
    assert lines[0] == ["t_s", "pid", "pss_bytes", "rss_bytes", "cpu_s", "command"]
    samples = [(float(line[0]), int(line[2])) for line in lines[1:]]
    assert len(samples) == billing.record()["bill_samples"] >= 2
    area = sum((t1 - t0) * (a + b) / 2 for (t0, a), (t1, b) in itertools.pairwise(samples))
    # Times in the file are rounded to a millisecond.
    assert billing.record()["gb_s_integral"] == pytest.approx(
        area / 1e9, abs=1e-3 * len(samples) * max(b for _, b in samples) / 1e9
    )


@pytest.mark.processes
def test_a_page_that_two_processes_share_is_billed_once() -> None:
    with process(_SHARE) as shares, Billing(pids=[shares.pid], every_s=0.01, host=False) as billing:
        sampled(billing)
    bill = ended(billing)
    assert bill.most_processes == 2
    assert bill.peak_rss_bytes > 120 * _MB and 60 * _MB < bill.peak_pss_bytes < 100 * _MB


@pytest.mark.processes
def test_cpu_time_is_billed_also_of_a_process_that_ended_between_samples() -> None:
    with Billing(every_s=60, host=False) as billing, process(_BUSY):
        pass
    # The kernel counts in hundredths of a second.
    assert 0.28 <= ended(billing).cpu_ns / 1e9 < 30
    with process(_BUSY) as busy, Billing(pids=[busy.pid], every_s=0.01, host=False) as later:
        sampled(later)
    assert ended(later).cpu_ns < 200_000_000  # what was used before is not in it


def test_this_process_is_billed_when_asked() -> None:
    with Billing(own=True, every_s=0.01, host=False) as billing:
        sampled(billing)
    assert os.getpid() in {each.pid for each in billing.processes.values()}
    with Billing(pids=[], every_s=0.01, host=False) as nothing:
        sampled(nothing)
    assert ended(nothing).peak_pss_bytes == 0 and not nothing.processes


def test_a_billing_that_fails_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="every_s is within"):
        Billing(every_s=0)
    with pytest.raises(InvalidConfig, match="when its block has ended"):
        Billing().record()

    def pids() -> list[int]:
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("no pids")
        return []

    calls: list[int] = []
    with (
        pytest.raises(SloschedError, match="RuntimeError: no pids"),
        Billing(pids=pids, every_s=0.01),
    ):
        while len(calls) < 3:
            sleep_ns(1_000_000)
    calls.clear()
    with pytest.raises(KeyError), Billing(pids=pids, every_s=0.01, files=tmp_path / "a"):
        raise KeyError  # the block's own error is the one that counts
    assert [*tmp_path.iterdir()] == []


def identities(processes: Iterable[Process]) -> list[tuple[int, int]]:
    return [each.identity for each in processes]


@pytest.mark.processes
def test_a_tree_finds_new_processes_and_those_below_new_roots() -> None:
    tree = Tree()
    before = identities(tree.look([os.getpid()]))
    assert before == identities(below([os.getpid()]))
    program = (
        "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'input()'], "
        "stdin=subprocess.PIPE); print('ready', flush=True); sys.stdin.read(); child.kill(); child.wait()"
    )
    with process(program) as parent:
        found = [each for each in tree.look([os.getpid()]) if each.identity not in before]
        assert [each.parent for each in found] == [os.getpid(), parent.pid]
        # A tree forgets none that lives, also when it is asked for what is below others.
        assert identities(tree.look([2**22 + 1])) == [*before, *identities(found)]
        other = Tree()
        assert other.look([2**22 + 1]) == []
        assert identities(other.look([parent.pid])) == [found[1].identity]
    assert identities(tree.look([os.getpid()])) == before


def test_processes_are_read_by_their_identity() -> None:
    own = read_process(os.getpid())
    assert own is not None and own.parent == os.getppid() and not own.ended
    assert read_process(2**22 + 1) is None and memory_of(2**22 + 1) is None
    child = subprocess.Popen([sys.executable, "-c", ""])
    found = None
    while found is None or not found.ended:  # it has ended, and is not waited for
        found = next((each for each in below([os.getpid()]) if each.pid == child.pid), found)
    child.wait(10)
    assert child.pid not in {each.pid for each in below([os.getpid()])}


# -------------------------------------------------------------------------------------------- host

#: What the original's log has, for a host with one core.
_CPU = (
    "PCT",
    *(
        f"{kind}_{name}"
        for kind in ("TIME", "PCT")
        for name in ("IDLE", "IOWAIT", "USER", "SYSTEM")
    ),
)
_METRICS = (
    *(
        "CPU_COUNT",
        "CPU_FREQ",
        "MEMORY_USED",
        "MEMORY_ACTIVE",
        "MEMORY_USED_PCT",
        "MEMORY_AVAILABLE",
    ),
    *("SWAP_USED", "DISK_READ_MB", "DISK_WRITE_MB", "NET_SENT_MB", "NET_RECV_MB"),
    *(f"{core}_{name}" for core in ("CPU", "CPU_0") for name in _CPU),
)


def test_the_hosts_log_has_the_originals_metrics() -> None:
    host = Host()
    host.read()
    metrics = {**host.once(), **host.read()}
    for core in range(1, os.cpu_count() or 1):
        metrics = {name: value for name, value in metrics.items() if f"CPU_{core}_" not in name}
    assert sorted(metrics) == sorted(_METRICS)
    assert all(value >= 0 for value in metrics.values())
    assert metrics["MEMORY_USED"] + metrics["MEMORY_AVAILABLE"] > 100
    for line in log_lines(1_600_000_000_120_000_000, metrics).splitlines():
        assert re.fullmatch(r"1600000000\.12 [A-Z0-9_]+ [0-9.e+-]+", line)


def test_the_summary_is_the_published_one(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text(
        "1.00 NET_SENT_MB 5\n1.00 MEMORY_USED 100\n3.00 NET_SENT_MB 9\n3.00 MEMORY_USED 180.5\n"
        "5.00 MEMORY_USED 120\n"
    )
    (tmp_path / "b.log").write_text(
        "1.00 NET_SENT_MB 1\n3.00 NET_SENT_MB 2\n1.00 CPU_TIME_USER 7\n"
    )
    assert read_log(tmp_path / "a.log")["MEMORY_USED"] == [(1, 100), (3, 180.5), (5, 120)]
    logs = [tmp_path / "a.log", tmp_path / "b.log"]
    assert summary_text(logs, 4) == (
        "WORKERS 4\nNET_SENT_MB 5\nNET_RECV_MB 0\nDISK_WRITE_MB 0\nCPU_USER 0\nCPU_IOWAIT 0\nCPU_IDLE 0\n"
        "PEAK_MEMORY 80.5\n"
    )
    (tmp_path / "c.log").write_text("1.00 NET_SENT_MB 5\nnonsense\n")
    with pytest.raises(InvalidConfig, match=r"c\.log:2: not a line of a billing log"):
        read_log(tmp_path / "c.log")
    with pytest.raises(InvalidConfig, match="cannot read"):
        read_log(tmp_path / "d.log")


# ------------------------------------------------------------------------------------------ layout


def files_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_sgd_has_the_published_names(tmp_path: Path) -> None:
    made = [
        layout.sgd("NATIVE", workers=10, interval=60000, run_ns=1_500_000, losses=losses)
        for losses in ([(2.0, 0.9)], [(2.0, 0.91), (3.25, 0.5)])
    ]
    (tmp_path / "billing").mkdir()
    (tmp_path / "billing" / "x.1.host.log").write_text("1.00 NET_SENT_MB 5\n2.00 NET_SENT_MB 6\n")
    records: list[dict[str, Any]] = [
        {"published": made[0]},
        {"other": 1},
        {"published": made[1], "billing": "x.1"},
    ]
    [folder] = layout.write_published(records, tmp_path, tmp_path)
    assert folder == tmp_path / "sgd_reuters_svm" / "SYSTEM_NATIVE_WORKERS_10_INTERVAL_60000_logs"
    found = files_of(folder)
    assert found["RUN_TIME.log"] == "3.0ms"  # of both repeats
    assert found["NODE_0_SGD_LOSS.log"] == "0.0000 0.9100\n1.2500 0.5000\n"
    assert found[f"billing/results/{host_log_name()}"].startswith("1.00 NET_SENT_MB 5\n")
    assert found["billing_summary.txt"].startswith("WORKERS 10\nNET_SENT_MB 1\n")
    assert found["REPLACED.txt"] == f"{REPLACED}\n" and len(found) == 5


def test_matrices_and_inference_have_the_published_names(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"published": layout.matrices("FAASM", size=100, splits=2, workers=4, run_ns=10**9)},
        {
            "published": layout.inference(
                "sum delta",
                cold=5,
                threads=1,
                connections=1,
                delay_ms=5,
                run_ns=2 * 10**9,
                latencies_ns=[1_000 * n for n in range(1, 201)],
            )
        },
    ]
    folders = layout.write_published(records, tmp_path, tmp_path)
    assert [str(folder.relative_to(tmp_path)) for folder in folders] == [
        "python_mat_mul/SYSTEM_FAASM_MATRIX_100_SPLITS_2_WORKERS_4_logs",
        "tf_image/SYSTEM_SUM-DELTA_COLD_5_THREADS_1_CONNS_1_DELAY_5_logs",
    ]
    assert files_of(folders[0]) == {
        "NODE_0_MAT_MUL.log": "SUCCESS",
        "REPLACED.txt": f"{REPLACED}\n",
        "RUN_TIME.log": "1000.0ms",
    }
    latency = files_of(folders[1])["latency.txt"]
    lines = dict(line.split("=") for line in latency.splitlines())
    assert [*lines] == [
        "MIN",
        "MAX",
        "STDDEV",
        "DURATION",
        "REQUESTS",
        "MEDIAN",
        "90TH",
        "10TH",
        "LATENCIES",
    ]
    assert lines["MIN"] == "1.000000" and lines["MAX"] == "200.000000"
    assert lines["DURATION"] == "2000000" and lines["REQUESTS"] == "200"
    assert (lines["MEDIAN"], lines["90TH"], lines["10TH"]) == ("100", "180", "20")
    assert lines["LATENCIES"] == ",".join(["0", *(str(2 * share) for share in range(1, 100))])
    assert "REQUESTS=0\n" in layout.latency_text([], 10**9)
    assert layout.write_published([{"x": 1}], tmp_path, tmp_path) == []


# -------------------------------------------------------------------------------------------- pull


@pytest.mark.processes
def test_results_are_pulled_from_a_host_over_ssh(tmp_path: Path) -> None:
    import ssh_rig

    if reason := ssh_rig.missing():
        pytest.skip(reason)
    results = tmp_path / "there" / "sgd_reuters_svm" / "SYSTEM_FAASM_WORKERS_4_INTERVAL_60000_logs"
    results.mkdir(parents=True)
    (results / "RUN_TIME.log").write_text("12.5ms")
    with ssh_rig.server(tmp_path / "ssh") as server:
        import getpass

        def pull(folder: str, into: Path, python: str = sys.executable) -> int:
            return pull_results(
                "sgd",
                user=getpass.getuser(),
                host="two",
                folder=folder,
                into=into,
                python=python,
                ssh_config=str(server.folder / "ssh_config"),
            ).files

        there = str(results.parent)
        assert pull(there, tmp_path / "here") == 1
        assert files_of(tmp_path / "here") == {f"{results.name}/RUN_TIME.log": "12.5ms"}
        with pytest.raises(OutputExists, match="choose another folder by --into"):
            pull(there, tmp_path / "here")
        with pytest.raises(InvalidConfig, match="has no files in /nowhere"):
            pull("/nowhere", tmp_path / "other")
        assert not (tmp_path / "other").exists()
        odd = ("a b", "a\nb", "-rf", "umlaut ä", "*", os.fsdecode(b"byte \xff"), "$HOME")
        for name in odd:
            (results / name).write_text(name.encode(errors="replace").decode())
        (results / "again").hardlink_to(results / "RUN_TIME.log")
        (results / "link").symlink_to("/etc/passwd")
        (results / "empty").mkdir()
        os.mkfifo(results / "pipe")
        cut = tmp_path / "python that stops"
        cut.write_text(f'#!/bin/sh\n{sys.executable} "$@" | head -c 300\n')
        cut.chmod(0o755)
        with pytest.raises(PeerUnreachable, match="its files did not come"):
            pull(there, tmp_path / "deep" / "other", python=str(cut))
        assert not [*(tmp_path / "deep").iterdir()]
        (tmp_path / "deep" / "other").mkdir()
        assert pull(there, tmp_path / "deep" / "other") == len(odd) + 2
        pulled = tmp_path / "deep" / "other" / results.name
        assert {path.name for path in pulled.iterdir()} == {*odd, "again", "RUN_TIME.log"}
        assert (pulled / "again").read_text() == "12.5ms"
        assert [path.name for path in (tmp_path / "deep").iterdir()] == ["other"]
    with pytest.raises(InvalidConfig, match="not a host's name"):
        pull_results("sgd", user="alice", host="///")
    with pytest.raises(InvalidConfig, match="is not a user's name"):
        pull_results("sgd", user="-oProxyCommand=x", host="two", into=tmp_path / "new")
    with pytest.raises(InvalidConfig, match="is not a host's name or address"):
        pull_results("sgd", user="alice", host="-oProxyCommand=x", into=tmp_path / "new")
