"""Run directories are never overwritten, and manifests say what a run was."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pytest

from slosched.config import ControllerConfig, SchedulerConfig
from slosched.core.scheduler.policies import resolved
from slosched.errors import InvalidConfig, RunDirectoryInUse
from slosched.telemetry.manifest import (
    ManifestNotWritten,
    finish_manifest,
    read_manifest,
    write_manifest,
)
from slosched.telemetry.run_dir import (
    CLIENT_MANIFEST,
    MANIFEST,
    claim_run_dir,
    default_log_dir,
)


def test_a_fresh_or_empty_directory_is_used_as_it_is(tmp_path: Path) -> None:
    assert claim_run_dir(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    (tmp_path / "empty").mkdir()
    assert claim_run_dir(tmp_path / "empty", exclusive=True) == tmp_path / "empty"


def test_other_files_do_not_make_a_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert claim_run_dir(tmp_path) == tmp_path
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("file", [MANIFEST, "clockwork_request_log.tsv", "anything.tsv"])
def test_a_directory_that_holds_a_run_is_left_alone(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_text("old")
    assert claim_run_dir(tmp_path) == tmp_path / "run-002"
    assert claim_run_dir(tmp_path) == tmp_path / "run-003"
    assert (tmp_path / file).read_text() == "old"
    with pytest.raises(RunDirectoryInUse, match="already holds a run"):
        claim_run_dir(tmp_path, exclusive=True)


def test_a_client_may_share_a_controller_s_directory_once(tmp_path: Path) -> None:
    claim_run_dir(tmp_path)
    (tmp_path / "clockwork_request_log.tsv").write_text("")
    assert claim_run_dir(tmp_path, manifest=CLIENT_MANIFEST) == tmp_path
    assert claim_run_dir(tmp_path, manifest=CLIENT_MANIFEST) == tmp_path / "run-002"


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidConfig, match="not a directory"):
        claim_run_dir(tmp_path / "file")
    with pytest.raises(InvalidConfig, match="not a directory"):
        claim_run_dir(tmp_path / "file" / "below")


def _claim(path: str, barrier: multiprocessing.synchronize.Barrier, results: object) -> None:
    barrier.wait(30)
    claimed = [str(claim_run_dir(Path(path))) for _ in range(20)]
    results.put(claimed)  # type: ignore[attr-defined]


@pytest.mark.processes
def test_two_processes_never_get_the_same_directory(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    results = context.Queue()
    target = str(tmp_path / "runs")
    children = [context.Process(target=_claim, args=(target, barrier, results)) for _ in range(2)]
    for child in children:
        child.start()
    try:
        claimed = results.get(timeout=60) + results.get(timeout=60)
    finally:
        for child in children:
            child.join(30)
            if child.is_alive():
                child.kill()
    assert len(claimed) == len(set(claimed)) == 40
    assert target in claimed


def test_default_log_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOCKWORK_LOG_DIR", str(tmp_path))
    assert default_log_dir("controller") == tmp_path
    monkeypatch.setenv("CLOCKWORK_LOG_DIR", "")
    path = default_log_dir("controller")
    assert path.parent == Path("slosched-runs")
    assert path.name.endswith("Z-controller")
    datetime.strptime(path.name.removesuffix("-controller"), "%Y%m%dT%H%M%SZ")
    assert not path.exists()


@dataclass(frozen=True)
class _Odd:
    where: Path
    ratio: float


def test_a_manifest_says_what_was_run(tmp_path: Path) -> None:
    config = ControllerConfig(resolved(SchedulerConfig()), ("127.0.0.1:12345",))
    gpu = {"name": "H200", "driver": "575"}
    path = write_manifest(
        tmp_path, "controller", config, {"arrivals": 7}, {"note": "x", "kind": "no"}, gpu=gpu
    )
    document = json.loads(path.read_text())
    assert path == tmp_path / MANIFEST
    assert document["kind"] == "controller"
    assert document["complete"] is False
    assert document["ended_at"] is None
    assert document["config"]["scheduler"]["schedule_ahead_ns"] == 10_000_000
    assert document["config"]["workers"] == ["127.0.0.1:12345"]
    assert document["seeds"] == {"arrivals": 7}
    assert (document["note"], document["gpu"]) == ("x", gpu)
    assert document["host"]["cpu_count"] >= 1
    assert document["host"]["memory_bytes"] > 0
    assert document["argv"]


@pytest.mark.parametrize("complete", [True, False])
def test_the_end_of_a_run_is_added(tmp_path: Path, complete: bool) -> None:
    write_manifest(tmp_path, "client", _Odd(tmp_path, float("nan")), name=CLIENT_MANIFEST)
    outcome = {"complete": complete, "counts": {"rows": 3}}
    finish_manifest(tmp_path, outcome, name=CLIENT_MANIFEST)
    document = read_manifest(tmp_path, name=CLIENT_MANIFEST)
    assert document["complete"] is complete
    assert document["outcome"] == {"counts": {"rows": 3}}
    assert document["config"] == {"where": str(tmp_path), "ratio": None}
    started, ended = (datetime.fromisoformat(document[key]) for key in ("started_at", "ended_at"))
    assert started <= ended
    assert [p.name for p in tmp_path.iterdir()] == [CLIENT_MANIFEST]  # no drafts are left


def test_a_manifest_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ManifestNotWritten, match=r"cannot write .*manifest\.json"):
        write_manifest(tmp_path / "absent", "controller", {})


def test_reading_what_a_killed_process_left(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) == {}
    claim_run_dir(tmp_path)  # claimed, and then nothing
    assert read_manifest(tmp_path) == {}
    (tmp_path / MANIFEST).write_text('{"kind": "contr')
    assert read_manifest(tmp_path) == {}
