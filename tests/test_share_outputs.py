"""Every file of a run: the originals' exact headers and numbers, and all that is written beside them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import msgspec
import numpy as np
import pytest

from slosched.errors import InvalidConfig
from slosched.share.carbon import read_constants
from slosched.share.deft_files import config_name
from slosched.share.outputs import read_summary, summary_of, write_run
from slosched.share.result_paths import mix_path, run_path
from slosched.share_spec import (
    Boundary,
    BoundaryKind,
    Clients,
    Interruption,
    Job,
    JobResult,
    Mode,
    PowerSample,
    Prepared,
    Request,
    RunResult,
    ShareSpec,
    Status,
)

MS, S = 1_000_000, 1_000_000_000
BEGIN = 1_000 * S
JOBS = (
    Job(name="model_A", model="diffusion", size=(1440, 2560)),
    Job(name="tput", model="whisper", batch=2, priority=1, clients=Clients(think_ns=2 * S)),
)
SPEC = ShareSpec(jobs=JOBS, label="h200", seed=5)
RNG = np.random.default_rng(11)
LOW_NS = [int(each) for each in RNG.integers(50 * MS, 60 * MS, 150)]


def low_rows() -> tuple[Request, ...]:
    at, rows = BEGIN, []
    for number, took in enumerate(LOW_NS):
        rows.append(Request(job=0, number=number, arrived_ns=at, started_ns=at, ended_ns=at + took))
        at += took
    warm = Request(
        job=0,
        number=-1,
        arrived_ns=BEGIN - S,
        started_ns=BEGIN - S,
        ended_ns=BEGIN - S // 2,
        warmup=True,
    )
    return (warm, *rows)


HIGH = tuple(
    Request(
        job=1,
        number=k,
        arrived_ns=BEGIN + k * S,
        started_ns=BEGIN + k * S + 2 * MS,
        ended_ns=BEGIN + k * S + 40 * MS,
        deadline_ns=BEGIN + k * S + (30 if k == 1 else 50) * MS,
    )
    for k in range(8)
)
PAUSE = Interruption(
    job=0, by=1, wanted_ns=BEGIN + S, started_ns=BEGIN + S + 2 * MS, resumed_ns=BEGIN + S + 45 * MS
)
POWER = tuple(
    PowerSample(
        at_ns=BEGIN - 3 * S + k * S // 20,
        watts=300.0,
        watts_average=299.0,
        energy_mj=-1 if k % 4 else 15_000 * k,
        utilization=98,
        memory_utilization=41,
        memory_used=4 * 1024**2,
        memory_total=81920 * 1024**2,
        temperature=33,
        sm_mhz=1980,
        pstate=0,
        throttle=0,
    )
    for k in range(20 * 13 + 1)
)
RESULT = RunResult(
    mode=Mode.MPS,
    repeat=0,
    jobs=(
        JobResult(
            job=0,
            pid=41,
            requests=low_rows(),
            interruptions=(PAUSE,),
            prepared=Prepared(job=0, pid=41, exec_ns=55 * MS, note="random weights"),
            memory_allocated=7,
            memory_reserved=9,
        ),
        JobResult(job=1, pid=42, requests=HIGH),
    ),
    begin_ns=BEGIN,
    end_ns=BEGIN + 10 * S,
    power=POWER,
    idle_watts=76.0,
    about={
        "gpu": "NVIDIA H200",
        "epoch_minus_monotonic_ns": str(1_713_583_832_115 * MS - (BEGIN - 3 * S)),
    },
)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_all_files_are_there(tmp_path: Path) -> None:
    written = write_run(tmp_path / "r0", SPEC, RESULT, {})
    assert sorted(path.name for path in written) == sorted(
        p.name for p in (tmp_path / "r0").iterdir()
    )
    assert {path.name for path in written} == {
        *("model_A.csv", "model_A.json", "job-tput.csv", "job-tput.json", "models_pid.json"),
        *("tput.csv", "total_p0.csv", "total_p50.csv", "total_p90.csv", "total_p99.csv"),
        *("total_p100.csv", "pwr.csv", "requests.csv", "preemptions.csv", "power.csv"),
        "summary.json",
    }


def test_paths_and_names() -> None:
    assert mix_path(JOBS) == Path("diffusion-whisper/diffusion-1_whisper-2")
    path = run_path(SPEC, JOBS, Mode.TM, 3)
    assert path == Path("h200/diffusion-whisper/diffusion-1_whisper-2/tm/r3")
    assert config_name(JOBS[0]) == "diffusion_1440x2560_batch_1_sleep_0"
    assert config_name(JOBS[1]) == "whisper_batch_2_sleep_2"


def test_defts_csv(tmp_path: Path) -> None:
    write_run(tmp_path, SPEC, RESULT, {})
    got = lines(tmp_path / "model_A.csv")
    assert got[0] == (
        "start_timestamp_ns,end_timestamp_ns,jct_ms,max_allocated_gpu_memory_allocated_byte,"
        "max_reserved_gpu_memory_byte"
    )
    assert got[1] == f"{BEGIN},{BEGIN + LOW_NS[0]},{LOW_NS[0] / 1e6!r},7,9"
    assert len(got) == 151
    high = lines(tmp_path / "job-tput.csv")[1]
    assert high == f"{BEGIN},{BEGIN + 40 * MS},40.0,0,0", "from the arrival, with the wait"
    assert json.loads((tmp_path / "models_pid.json").read_text()) == [
        ["diffusion_1440x2560_batch_1_sleep_0", 41],
        ["whisper_batch_2_sleep_2", 42],
    ]


def test_defts_first_row_is_the_warmup_where_that_is_asked_for(tmp_path: Path) -> None:
    write_run(tmp_path, SPEC, RESULT, {}, deft_compat=True)
    got = lines(tmp_path / "model_A.csv")
    assert len(got) == 152 and got[1].startswith(f"{BEGIN - S},{BEGIN - S // 2},500.0,")
    # Without a recorded warm-up there still is a first row to drop.
    assert len(lines(tmp_path / "job-tput.csv")) == 10
    assert lines(tmp_path / "job-tput.csv")[1] == f"{BEGIN},{BEGIN},0.0,0,0"


def test_the_configuration_in_defts_keys(tmp_path: Path) -> None:
    gated = Job(
        name="a",
        model="fasterrcnn_resnet50_fpn",
        boundary=Boundary(kind=BoundaryKind.SYNC, every=4),
    )
    spec = ShareSpec(jobs=(gated,))
    result = msgspec.structs.replace(RESULT, mode=Mode.GATE, jobs=(JobResult(job=0),))
    write_run(tmp_path, spec, result, {})
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["control"] == {
        "control": True,
        "controlsync": True,
        "controlEvent": False,
        "queue_limit": {"sync": 4, "event_group": 0},
    }
    assert (found["model_name"], found["resize"], found["sync_level"]) == (gated.model, False, "")
    assert "resize_size" not in found


def test_hotcarbons_files(tmp_path: Path) -> None:
    write_run(tmp_path, SPEC, RESULT, {})
    header = "mode,load,0_diffusion-1,1_whisper-2"
    for percentile in (0, 50, 90, 99, 100):
        got = lines(tmp_path / f"total_p{percentile}.csv")
        mode, load, low, high = got[1].split(",")
        assert got[0] == header and len(got) == 2
        assert (mode, load, high) == ("mps-uncap", "1.0", "40.0")
        assert float(low) == pytest.approx(np.percentile(np.array(LOW_NS) / 1e6, percentile))
    _, _, low, high = lines(tmp_path / "tput.csv")[1].split(",")
    assert float(low) == pytest.approx(15.0) and float(high) == pytest.approx(0.8)


def test_pwr_is_nvidia_smis_once_a_second(tmp_path: Path) -> None:
    write_run(tmp_path, SPEC, RESULT, {})
    got = lines(tmp_path / "pwr.csv")
    assert got[0] == (
        "timestamp, name, pstate, temperature.gpu, memory.total [MiB], memory.free [MiB], "
        "memory.used [MiB], utilization.memory [%], utilization.gpu [%], power.draw [W]"
    )
    assert got[1] == (
        "2024/04/20 03:30:32.115, NVIDIA H200, P0, 33, 81920 MiB, 81916 MiB, 4 MiB, 41 %, 98 %, "
        "300.00 W"
    )
    assert got[2].startswith("2024/04/20 03:30:33.115,") and len(got) == 1 + 14
    bare = msgspec.structs.replace(RESULT, about={}, power=(PowerSample(at_ns=S, watts=-1.0),))
    write_run(tmp_path, SPEC, bare, {})
    cells = lines(tmp_path / "pwr.csv")[1].split(", ")
    assert cells[0] == "1970/01/01 00:00:01.000" and cells[1:] == ["h200", *["[N/A]"] * 8]


def test_a_failed_job_has_no_number(tmp_path: Path) -> None:
    failed = msgspec.structs.replace(
        RESULT, jobs=(RESULT.jobs[0], JobResult(job=1, status=Status.DIED, reason="signal 9"))
    )
    write_run(tmp_path, SPEC, failed, {})
    assert lines(tmp_path / "tput.csv")[1].endswith(",nan")
    assert lines(tmp_path / "total_p50.csv")[1].endswith(",nan")
    summary = read_summary(tmp_path / "summary.json")
    assert summary.status == {"model_A": Status.OK, "tput": Status.DIED}
    assert "tput: died: signal 9" in summary.notes and not summary.metrics.complete


def test_a_mode_that_is_unavailable_leaves_a_summary_alone(tmp_path: Path) -> None:
    nothing = RunResult(
        mode=Mode.MPS, repeat=0, jobs=(), begin_ns=0, end_ns=0, unavailable="no MPS"
    )
    written = write_run(
        tmp_path / "r0", SPEC, nothing, {}, layout="hotcarbon", results_root=tmp_path / "results"
    )
    assert [path.name for path in written] == ["summary.json"]
    assert read_summary(written[0]).unavailable == "no MPS"
    assert not (tmp_path / "results").exists()


def test_our_own_tables(tmp_path: Path) -> None:
    write_run(tmp_path, SPEC, RESULT, {})
    with (tmp_path / "requests.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 151 + 8
    assert (rows[0]["warmup"], rows[0]["arrival_s"], rows[0]["met"]) == ("1", "-1.0", "")
    assert {row["wrong_answer"] for row in rows} == {"0"} == {row["beside_lower"] for row in rows}
    late = rows[152]
    assert (late["name"], late["batch"], late["wait_ms"], late["jct_ms"]) == (
        "tput",
        "2",
        "2.0",
        "40.0",
    )
    assert (late["met"], late["deadline_s"], rows[153]["met"]) == ("0", "1.03", "1")
    with (tmp_path / "preemptions.csv").open() as file:
        (pause,) = csv.DictReader(file)
    assert (pause["name"], pause["by_name"], pause["wanted_s"]) == ("model_A", "tput", "1.0")
    assert (pause["preemption_ms"], pause["paused_ms"]) == ("2.0", "43.0")
    with (tmp_path / "power.csv").open() as file:
        power = list(csv.DictReader(file))
    assert len(power) == 261 and power[0]["t_s"] == "-3.0" and power[1]["energy_mj"] == ""
    assert power[4]["energy_mj"] == "60000"


def test_the_summary_says_what_was_measured(tmp_path: Path) -> None:
    write_run(tmp_path, SPEC, RESULT, {})
    found = read_summary(tmp_path / "summary.json")
    assert (found.mode, found.label, found.seed, found.mix) == (
        "mps-uncap",
        "h200",
        5,
        "diffusion-1_whisper-2",
    )
    assert found.metrics.energy.joules == pytest.approx(3000.0)
    assert found.metrics.energy.difference == pytest.approx(0.0, abs=1e-9)
    assert found.carbon.device == "h200" and found.carbon.operational_g == pytest.approx(1 / 3)
    assert "model_A: random weights" in found.notes and found.carbon_alone is None
    assert found == summary_of(SPEC, RESULT, {}, constants=read_constants())
    # It is JSON for every reader: no NaN, no infinity.
    json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)


def test_carbon_of_the_same_work_alone() -> None:
    solos = {job: msgspec.structs.replace(RESULT, jobs=(RESULT.jobs[job],)) for job in (0, 1)}
    found = summary_of(SPEC, RESULT, solos, constants=read_constants())
    alone_s = found.metrics.gpu_s_alone
    assert alone_s == pytest.approx(sum(LOW_NS) / 1e9 + 8 * 0.038)
    assert alone_s and found.carbon_alone is not None and found.carbon.usd is not None
    assert found.carbon_alone.usd == pytest.approx(found.carbon.usd * alone_s / 10)
    assert found.carbon_alone.kwh == pytest.approx((found.metrics.energy_alone_j or 0) / 3.6e6)


# --------------------------------------------------------------------------------- HotCarbon's own tree


def in_tree(root: Path, result: RunResult, spec: ShareSpec = SPEC) -> Path:
    write_run(root / "run", spec, result, {}, layout="hotcarbon", results_root=root / "results")
    return root / "results/h200/diffusion-whisper/diffusion-1_whisper-2"


def test_modes_append_rows_and_a_run_again_replaces_its_own(tmp_path: Path) -> None:
    folder = in_tree(tmp_path, RESULT)
    tm = msgspec.structs.replace(RESULT, mode=Mode.TM, power=POWER[:40])
    in_tree(tmp_path, tm)
    again = msgspec.structs.replace(RESULT, repeat=1)
    in_tree(tmp_path, again)
    for name in ("tput.csv", "total_p0.csv", "total_p100.csv"):
        modes = [line.split(",")[0] for line in lines(folder / name)]
        assert modes == ["mode", "mps-uncap", "tm", "mps-uncap"]
    before = lines(folder / "tput.csv")
    in_tree(tmp_path, tm)  # resumed
    assert lines(folder / "tput.csv") == before
    assert len(lines(folder / "pwr.csv")) == 1 + 2, "that of the last run"
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in folder.glob("*.csv")} | {".slosched-rows.json"}
    assert len(list(folder.glob("*.csv"))) == 7


def test_rows_of_the_original_stay(tmp_path: Path) -> None:
    folder = tmp_path / "results/h200/diffusion-whisper/diffusion-1_whisper-2"
    folder.mkdir(parents=True)
    (folder / "tput.csv").write_text("mode,load,0_diffusion-1,1_whisper-2\ntm,1.0,0.1,2.0\n")
    for _ in range(2):
        in_tree(tmp_path, RESULT)
    got = lines(folder / "tput.csv")
    assert len(got) == 3 and got[1] == "tm,1.0,0.1,2.0" and got[2].startswith("mps-uncap,1.0,")
    assert len(lines(folder / "total_p50.csv")) == 2


def test_files_of_another_mix_are_not_touched(tmp_path: Path) -> None:
    folder = tmp_path / "results/h200/diffusion-whisper/diffusion-1_whisper-2"
    folder.mkdir(parents=True)
    (folder / "total_p99.csv").write_text("mode,load,0_gpt-1\ntm,1.0,0.1\n")
    with pytest.raises(InvalidConfig, match="another mix"):
        in_tree(tmp_path, RESULT)
    assert sorted(path.name for path in folder.iterdir()) == ["total_p99.csv"]


def test_a_lost_memory_of_rows_only_appends(tmp_path: Path) -> None:
    folder = in_tree(tmp_path, RESULT)
    (folder / ".slosched-rows.json").write_text("{")
    in_tree(tmp_path, RESULT)
    assert len(lines(folder / "tput.csv")) == 3


def test_the_solo_run_is_a_mix_of_one(tmp_path: Path) -> None:
    solo = msgspec.structs.replace(RESULT, mode=Mode.EXCLUSIVE, jobs=(RESULT.jobs[1],))
    in_tree(tmp_path, solo)
    got = lines(tmp_path / "results/h200/whisper/whisper-2/tput.csv")
    assert got[0] == "mode,load,0_whisper-2" and got[1].startswith("exclusive,1.0,")


def test_wrong_layouts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="slosched or hotcarbon, not 'mine'"):
        write_run(tmp_path, SPEC, RESULT, {}, layout="mine")
    with pytest.raises(InvalidConfig, match="needs the folder"):
        write_run(tmp_path, SPEC, RESULT, {}, layout="hotcarbon")
    with pytest.raises(InvalidConfig, match="cannot read"):
        read_summary(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"slosched": 3}')
    with pytest.raises(InvalidConfig, match="not a summary"):
        read_summary(tmp_path / "bad.json")
