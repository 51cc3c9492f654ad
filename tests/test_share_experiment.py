"""Whole experiments: baselines first, what is kept, what an interruption leaves, and the exit code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from slosched.errors import InvalidConfig
from slosched.share import experiment as experiment_module
from slosched.share import run as run_module
from slosched.share.experiment import (
    Outcome,
    RunEnded,
    compared_answers,
    from_solos,
    run_experiment,
    solo_path,
)
from slosched.share.run import without
from slosched.share.session import Interrupted
from slosched.share_spec import (
    Arriving,
    Boundary,
    BoundaryKind,
    Clients,
    Job,
    JobResult,
    Mode,
    Prepared,
    Request,
    RunResult,
    ShareSpec,
    Status,
)
from slosched.units import NS_PER_MS, NS_PER_S

BERT = Job(name="bert", model="bert")
WHISPER = Job(name="whisper", model="whisper", priority=1, slo_times_solo=1.6)


def spec_of(*jobs: Job, modes: Sequence[Mode] = (Mode.TM,), **fields: Any) -> ShareSpec:
    return ShareSpec(
        jobs=jobs, modes=tuple(modes), device="emulated", duration_ns=NS_PER_S, **fields
    )


def run(
    spec: ShareSpec, out: Path, *, stopped: Callable[[], bool] = lambda: False, **fields: Any
) -> tuple[Outcome, list[str]]:
    said: list[str] = []
    return run_experiment(spec, out, say=said.append, stopped=stopped, **fields), said


def test_a_run_in_virtual_time_can_be_stopped_in_its_middle(tmp_path: Path) -> None:
    looks = 0

    def stopped() -> bool:
        nonlocal looks
        looks += 1
        return looks > 8

    long = msgspec.structs.replace(spec_of(BERT), duration_ns=3000 * NS_PER_S)
    outcome, said = run(long, tmp_path, solo=False, stopped=stopped)
    assert outcome.stopped and outcome.error_code == 1 and outcome.runs == ()
    assert said[-1] == "tm: stopped; nothing of this run is kept"
    assert looks < 12  # the whole run has hundreds of thousands of steps


def folders(outcome: Outcome, out: Path) -> list[tuple[str, bool]]:
    return [(each.directory.relative_to(out).as_posix(), each.kept) for each in outcome.runs]


def test_baselines_run_first_and_what_is_there_is_kept(tmp_path: Path) -> None:
    spec = spec_of(BERT, msgspec.structs.replace(BERT, name="again"), WHISPER)
    outcome, _ = run(spec, tmp_path)
    mix = "gpu/bert-bert-whisper/bert-1_bert-1_whisper-1/tm/r0"
    expected = ["gpu/bert/bert-1/exclusive/r0", "gpu/whisper/whisper-1/exclusive/r0", mix]
    assert folders(outcome, tmp_path) == [(each, False) for each in expected]
    assert outcome.error_code == 0
    assert outcome.statuses == dict.fromkeys(("bert", "again", "whisper"), Status.OK)
    assert set(outcome.paths) <= set(tmp_path.rglob("*"))
    # Each run can be read again, with the spec of which it is.
    result = msgspec.json.decode((tmp_path / mix / "run.json").read_bytes(), type=RunResult)
    assert msgspec.json.decode((tmp_path / mix / "spec.json").read_bytes(), type=ShareSpec) == spec
    assert [each.job for each in result.jobs] == [0, 1, 2]

    again, said = run(spec, tmp_path)
    assert folders(again, tmp_path) == [(each, True) for each in expected]
    assert again.paths == ()
    assert sum("kept from before" in text for text in said) == 3
    anew, _ = run(spec, tmp_path, resume=False)
    assert not any(kept for _, kept in folders(anew, tmp_path))


def test_a_baseline_serves_every_mix_that_has_the_job(tmp_path: Path) -> None:
    run(spec_of(BERT, WHISPER), tmp_path)
    outcome, _ = run(spec_of(WHISPER, BERT, modes=(Mode.MPS,)), tmp_path)
    assert [kept for _, kept in folders(outcome, tmp_path)] == [True, True, False]
    [result] = [each for each in outcome.runs if each.mode is Mode.MPS]
    assert result.status == {"whisper": Status.OK, "bert": Status.OK}


@pytest.mark.parametrize(
    "change",
    [
        {"duration_ns": 2 * NS_PER_S},
        {"seed": 3},
        {"jobs": (BERT, msgspec.structs.replace(WHISPER, batch=2))},
    ],
)
def test_another_experiment_is_not_taken_for_this_one(tmp_path: Path, change: Any) -> None:
    spec = spec_of(BERT, WHISPER)
    run(spec, tmp_path)
    outcome, _ = run(msgspec.structs.replace(spec, **change), tmp_path)
    assert not outcome.runs[-1].kept


def test_another_source_or_version_is_not_taken_for_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(BERT)
    run(spec, tmp_path)
    monkeypatch.setattr(experiment_module, "source_digest", lambda: "changed")
    outcome, _ = run(spec, tmp_path)
    assert [each.kept for each in outcome.runs] == [False, False]
    monkeypatch.setattr(experiment_module, "versions", lambda: "torch 9")
    outcome, _ = run(spec, tmp_path)
    assert [each.kept for each in outcome.runs] == [False, False]


def test_the_run_of_another_gpu_is_not_taken_for_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, here = spec_of(BERT), {"NVIDIA H200"}
    real = run_module.run_mode

    def on_a_gpu(*args: Any, **fields: Any) -> Any:
        [result] = real(*args, **fields)
        return (msgspec.structs.replace(result, about={**result.about, "gpu": "NVIDIA H200"}),)

    monkeypatch.setattr(experiment_module, "run_mode", on_a_gpu)
    monkeypatch.setattr(experiment_module, "gpus_here", lambda: here)
    run(spec, tmp_path, solo=False)
    for gpus, kept in (({"NVIDIA H200"}, True), (set(), True), ({"NVIDIA L4"}, False)):
        here = gpus
        outcome, _ = run(spec, tmp_path, solo=False)
        assert [each.kept for each in outcome.runs] == [kept]


def test_files_of_a_kept_run_are_written_where_they_are_missing(tmp_path: Path) -> None:
    spec = spec_of(BERT)
    outcome, _ = run(spec, tmp_path)
    directory = outcome.runs[-1].directory
    # It was killed behind run.json, or in the middle of the files that follow from it.
    for name in ("spec.json", "summary.json", "requests.csv"):
        (directory / name).unlink()
    again, _ = run(spec, tmp_path)
    assert [each.kept for each in again.runs] == [True, True]
    for name in ("spec.json", "summary.json", "requests.csv"):
        assert (directory / name).is_file()
    # The files of another layout, and Deft's warm-up row.
    rows = len((directory / "bert.csv").read_text().splitlines())
    again, _ = run(spec, tmp_path, layout="hotcarbon", deft_compat=True)
    assert [each.kept for each in again.runs] == [True, True]
    tree = (tmp_path / "gpu/bert/bert-1/tput.csv").read_text().splitlines()
    assert [line.partition(",")[0] for line in tree] == ["mode", "exclusive", "tm"]
    assert len((directory / "bert.csv").read_text().splitlines()) == rows + 1


def test_a_tree_of_another_mix_is_told_before_the_first_run(tmp_path: Path) -> None:
    tree = tmp_path / "gpu/bert-whisper/bert-1_whisper-1/total_p99.csv"
    tree.parent.mkdir(parents=True)
    tree.write_text("mode,load,0_gpt-1\ntm,1.0,5\n")
    with pytest.raises(InvalidConfig, match="it is of another mix"):
        run(spec_of(BERT, WHISPER), tmp_path, layout="hotcarbon")
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [tree]
    assert tree.read_text().endswith("tm,1.0,5\n")


def test_the_slo_in_times_of_the_solo_latency_reaches_the_requests(tmp_path: Path) -> None:
    spec = spec_of(BERT, WHISPER)
    outcome, _ = run(spec, tmp_path)
    solo, shared = (
        msgspec.json.decode((outcome.runs[i].directory / "run.json").read_bytes(), type=RunResult)
        for i in (1, 2)
    )
    rows = [row for row in solo.jobs[0].requests if not row.warmup and row.arrived_ns < solo.end_ns]
    mean_ns = sum(row.latency_ns for row in rows) / len(rows)
    slos = {row.deadline_ns - row.arrived_ns for row in shared.jobs[1].requests if not row.warmup}
    assert list(slos) == [pytest.approx(1.6 * mean_ns, rel=0.001)]
    assert {row.deadline_ns for row in shared.jobs[0].requests} == {0}
    without_solo, _ = run(spec, tmp_path / "other", solo=False)
    assert [each.mode for each in without_solo.runs] == [Mode.TM]


def test_an_absolute_slo_comes_before_the_relative_one() -> None:
    job = msgspec.structs.replace(BERT, slo_ns=7, slo_times_solo=2.0)
    solo = RunResult(
        mode=Mode.EXCLUSIVE,
        repeat=0,
        jobs=(
            JobResult(
                job=0,
                requests=tuple(
                    Request(
                        job=0,
                        number=i,
                        arrived_ns=i * 100,
                        started_ns=i * 100,
                        ended_ns=i * 100 + 40,
                    )
                    for i in range(10)
                ),
            ),
        ),
        begin_ns=0,
        end_ns=1000,
    )
    relative = msgspec.structs.replace(job, slo_ns=0)
    deadlines, expected = from_solos((job, relative), {0: solo, 1: solo})
    assert deadlines == {0: 7, 1: 80}
    assert expected == {0: 40, 1: 40}
    assert from_solos((relative,), {}) == ({}, {})


def test_a_stop_keeps_what_was_measured_and_goes_on_there(tmp_path: Path) -> None:
    spec = spec_of(BERT, WHISPER, modes=(Mode.TM, Mode.MPS))
    said: list[str] = []
    outcome = run_experiment(
        spec,
        tmp_path,
        say=said.append,
        stopped=lambda: sum("written to" in text for text in said) >= 3,
    )
    assert outcome.stopped
    assert outcome.error_code == 1
    assert [each.mode for each in outcome.runs] == [Mode.EXCLUSIVE, Mode.EXCLUSIVE, Mode.TM]
    outcome, _ = run(spec, tmp_path)
    assert [each.kept for each in outcome.runs] == [True, True, True, False]


def test_a_run_that_was_stopped_or_went_wrong_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(BERT)
    real = run_module.run_mode

    def broken(*args: Any, **fields: Any) -> Any:
        [result] = real(*args, **fields)
        died = msgspec.structs.replace(result.jobs[0], status=Status.DIED, reason="kill -9")
        return (msgspec.structs.replace(result, jobs=(died,)),)

    def interrupted(*args: Any, **fields: Any) -> Any:
        raise Interrupted("stopped before all models were ready")

    monkeypatch.setattr(experiment_module, "run_mode", broken)
    outcome, said = run(spec, tmp_path)
    assert outcome.error_code == 1
    assert outcome.statuses == {"bert": Status.DIED}
    assert any("died" in text and "kill -9" in text for text in said)
    monkeypatch.setattr(experiment_module, "run_mode", interrupted)
    outcome, _ = run(spec, tmp_path)
    assert outcome.stopped
    assert [each.kept for each in outcome.runs] == [True]  # the baseline alone
    monkeypatch.setattr(experiment_module, "run_mode", real)
    outcome, _ = run(spec, tmp_path)
    assert [each.kept for each in outcome.runs] == [True, False]
    assert outcome.error_code == 0


def test_a_mode_that_is_unavailable_is_no_error_unless_all_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = run_module.run_mode

    def lacking(spec: ShareSpec, mode: Mode, repeat: int, *args: Any, **fields: Any) -> Any:
        if mode is Mode.MPS:
            return (
                without(mode, repeat, range(len(spec.jobs)), "mps: not installed", spec.device),
            )
        return real(spec, mode, repeat, *args, **fields)

    monkeypatch.setattr(experiment_module, "run_mode", lacking)
    outcome, said = run(spec_of(BERT, modes=(Mode.MPS, Mode.TM)), tmp_path)
    assert outcome.error_code == 0
    assert any("unavailable" in text and "not installed" in text for text in said)
    outcome, _ = run(spec_of(BERT, modes=(Mode.MPS,)), tmp_path)
    assert outcome.error_code == 1


def test_exit_codes_by_status() -> None:
    def ended(*statuses: Status, stopped: bool = False) -> RunEnded:
        return RunEnded(
            directory=Path(),
            mode=Mode.TM,
            repeat=0,
            status={str(i): status for i, status in enumerate(statuses)},
            stopped=stopped,
        )

    def code(*runs: RunEnded) -> int:
        return Outcome(runs=runs, paths=()).error_code

    assert code(ended(Status.OK, Status.OK)) == 0
    for status in set(Status) - {Status.OK}:
        assert code(ended(Status.OK), ended(Status.OK, status)) == 1
    assert code(ended(Status.OK, stopped=True)) == 1
    assert code() == 1


def test_jobs_of_one_model_that_differ_have_a_folder_each_for_their_baseline() -> None:
    large = msgspec.structs.replace(BERT, size=(1440, 2560))
    gated = msgspec.structs.replace(BERT, boundary=Boundary(kind=BoundaryKind.SYNC), priority=4)
    poisson = msgspec.structs.replace(
        BERT, clients=Clients(arriving=Arriving.POISSON, rate_per_s=5.0)
    )
    paths = [solo_path(spec_of(job), 0, 2).as_posix() for job in (BERT, gated, large, poisson)]
    assert paths[0] == paths[1] == "gpu/bert/bert-1/exclusive/r2"
    assert len(set(paths)) == 3
    assert all(path.startswith("gpu/bert/bert-1@") for path in paths[2:])


def test_answers_are_compared_with_those_alone_where_both_ran_alike() -> None:
    def result(*answers: str) -> RunResult:
        return RunResult(
            mode=Mode.TM,
            repeat=0,
            jobs=tuple(
                JobResult(job=i, prepared=Prepared(job=i, pid=1, answer=answer))
                for i, answer in enumerate(answers)
            ),
            begin_ns=0,
            end_ns=NS_PER_MS,
        )

    jobs = (BERT, WHISPER, msgspec.structs.replace(BERT, name="third"))
    solos = {0: result("x"), 1: result("other"), 2: result("")}
    found = compared_answers(jobs, result("x", "y", "z"), solos)
    assert found == {
        "bert": "equal to that of its run alone",
        "whisper": "its answer is not that of its run alone",
    }


def test_a_spec_that_cannot_be_run_is_refused_before_anything_starts(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InvalidConfig, match="is not a directory"):
        run(spec_of(BERT), file)
    with pytest.raises(InvalidConfig, match="no jobs"):
        run(spec_of(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
