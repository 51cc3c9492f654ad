"""The originals' results read again: miniatures of their trees by hand, ours there and back, what is broken."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from slosched.errors import InvalidConfig, UnknownName
from slosched.share.experiment import solo_path
from slosched.share.imported import Imported, ImportedJob, of_metrics
from slosched.share.importers import deft_metrics, deft_run, read_deft_requests, read_hotcarbon
from slosched.share.metrics import metrics_of
from slosched.share.outputs import write_run
from slosched.share.published_figures import (
    compare,
    hotcarbon_set,
    hotcarbon_sets,
)
from slosched.share.result_paths import run_path
from slosched.share_spec import (
    Job,
    JobResult,
    Mode,
    PowerSample,
    Request,
    RunResult,
    ShareSpec,
)

MS, S = 1_000_000, 1_000_000_000
DEFT = (
    "start_timestamp_ns,end_timestamp_ns,jct_ms,max_allocated_gpu_memory_allocated_byte,"
    "max_reserved_gpu_memory_byte\n"
)
PWR = (
    "timestamp, name, pstate, temperature.gpu, memory.total [MiB], memory.free [MiB], memory.used [MiB], "
    "utilization.memory [%], utilization.gpu [%], power.draw [W]\n"
)

# ----------------------------------------------------------------------------------------------- Deft


def deft_csv(path: Path, rows: list[tuple[int, int]]) -> Path:
    """Jobs by begin and end in ms, behind a warm-up."""
    warm = f"{0},{900 * MS},900.0,1,2\n"
    body = "".join(f"{a * MS},{b * MS},{float(b - a)},1,2\n" for a, b in rows)
    path.write_text(DEFT + warm + body)
    return path


def test_a_csv_of_defts_without_its_warmup(tmp_path: Path) -> None:
    path = deft_csv(tmp_path / "model_A.csv", [(1000, 1100), (1100, 1210)])
    assert [row.latency_ns for row in read_deft_requests(path)] == [100 * MS, 110 * MS]
    assert len(read_deft_requests(path, drop_first=False)) == 3


def test_text_lines_of_early_2023(tmp_path: Path) -> None:
    path = tmp_path / "model_A.log"
    path.write_text(
        '{\n    "model_name": "fasterrcnn_resnet50_fpn",\n}\n'
        "JCT 1681000000900000000 0 5012.5\n\n"
        "1681000001000000 kernelGroupStart\n\n"
        "JCT 1681000001000000000 0 110.25\n\n"
        "JCT 1681000001200000000 0 105\n"
    )
    rows = read_deft_requests(path)
    assert [row.latency_ns for row in rows] == [110_250_000, 105 * MS]
    assert rows[0].ended_ns == 1681000001000000000


def test_defts_two_jobs_give_the_same_summary_as_ours(tmp_path: Path) -> None:
    low = deft_csv(tmp_path / "a.csv", [(1000 + 125 * k, 1125 + 125 * k) for k in range(40)])
    high = deft_csv(tmp_path / "b.csv", [(1100 + 1000 * k, 1150 + 1000 * k) for k in range(5)])
    alone = deft_csv(tmp_path / "solo.csv", [(1000 + 100 * k, 1100 + 100 * k) for k in range(40)])
    found = deft_metrics({"A": low, "B": high}, {"A": alone}, {"B": 1})
    a, b = found.jobs
    assert (b.n, b.priority) == (5, 1) and b.latency is not None and b.latency.mean_ms == 50.0
    assert a.solo_mean_ms == 100.0 and a.inflation.all == pytest.approx(0.25)
    # The window is from 1100 to 5150 ms; A's jobs that begin in it: from 1125 on.
    assert found.window_s == pytest.approx(4.05)
    # B's jobs of 50 ms at 1100, 2100, ..: the first overlaps two of A's, of which one began before.
    assert a.inflation.overlapping_n > 0 and a.inflation.apart_n > 0
    assert a.inflation.overlapping_n + a.inflation.apart_n == a.n == 33
    assert b.solo_mean_ms is None and found.stp is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not a log of Deft's"),
        ("hello\n", "is not a log of Deft's"),
        (DEFT, "has no job behind the warm-up"),
        (DEFT + "1,2,3e-6,0,0\n", "has no job behind the warm-up"),
        (DEFT + "1,x,3.0,0,0\n1,2,1e-6,0,0\n", "line 2 is not a row"),
        (DEFT + "1,2\n1,2,1e-6,0,0\n", "line 2 is not a row"),
        (DEFT + "5,2,1e-6,0,0\n", "a job from 5 to 2 ns"),
        (DEFT + f"0,{S},5.0,0,0\n", "jct_ms is 5.0, but its times are 1000.0 ms apart"),
        ("JCT 1681000000900000000 0 1e999\n", "a job took inf ms"),
        ("JCT 5 0 1000.0\n", "a job from -999999995 to 5 ns"),
    ],
)
def test_what_is_not_defts_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "log.csv"
    path.write_text(text)
    with pytest.raises(InvalidConfig, match=r"log\.csv") as raised:
        read_deft_requests(path)
    assert says in str(raised.value)


def test_a_row_that_a_kill_cut_short_is_passed_over(tmp_path: Path) -> None:
    path = deft_csv(tmp_path / "a.csv", [(1000, 1100), (1100, 1200)])
    path.write_text(path.read_text() + "1200000000,13000")
    assert len(read_deft_requests(path)) == 2


def test_logs_that_do_not_belong_together(tmp_path: Path) -> None:
    a = deft_csv(tmp_path / "a.csv", [(1000, 1100)])
    b = deft_csv(tmp_path / "b.csv", [(2000, 2100)])
    with pytest.raises(InvalidConfig, match="did not run at the same time"):
        deft_run({"A": a, "B": b})
    with pytest.raises(InvalidConfig, match="'C' has a log alone"):
        deft_metrics({"A": a}, {"C": b})
    with pytest.raises(InvalidConfig, match="no log"):
        deft_run({})
    with pytest.raises(InvalidConfig, match="cannot read"):
        deft_run({"A": tmp_path / "none.csv"})


# ------------------------------------------------------------------------------------------ HotCarbon


def hotcarbon(
    folder: Path,
    columns: str,
    *rows: str,
    watts: float | None = 100.0,
    seconds: int = 130,
    gpus: int = 1,
) -> Path:
    """A folder of results: each of `rows` is "mode,tput,.."; p50 is 10 x tput, the others follow."""
    folder.mkdir(parents=True)
    tables: dict[str, list[str]] = {"tput.csv": []}
    for row in rows:
        mode, *values = row.split(",")
        tables["tput.csv"].append(f"{mode},1.0,{','.join(values)}")
        for place, percentile in enumerate((0, 50, 90, 99, 100)):
            cells = ",".join(str((9 + place) * float(value)) for value in values)
            tables.setdefault(f"total_p{percentile}.csv", []).append(f"{mode},1.0,{cells}")
    for name, lines in tables.items():
        (folder / name).write_text("\n".join((f"mode,load,{columns}", *lines)) + "\n")
    if watts is not None:
        text = PWR
        for second in range(seconds):
            for gpu in range(gpus):
                stamp = f"2024/05/07 12:{second // 60:02d}:{second % 60:02d}.{100 + gpu:03d}"
                text += (
                    f"{stamp}, NVIDIA A100 80GB PCIe, P0, 33, 81920 MiB, 81038 MiB, 4 MiB, 0 %, 0 %, "
                    f"{watts + 1000 * gpu:.2f} W\n"
                )
        (folder / "pwr.csv").write_text(text)
    return folder


def test_a_miniature_of_hotcarbons_tree(tmp_path: Path) -> None:
    hotcarbon(tmp_path / "4090-tm/bert/bert-1", "0_bert-1", "tm,200.0", watts=200.0)
    hotcarbon(tmp_path / "4090-tm/gpt/gpt-1", "0_gpt-1", "tm,0.8", watts=250.0)
    hotcarbon(
        tmp_path / "4090-tm/bert-gpt/bert-1_gpt-1", "0_bert-1,1_gpt-1", "tm,100.0,0.6", watts=270.0
    )
    shared, bert, _gpt = read_hotcarbon(tmp_path)[1], *read_hotcarbon(tmp_path)[::2]
    assert (shared.label, shared.mode, shared.mix) == ("4090-tm", "tm", ("bert", "gpt"))
    assert shared.watts == pytest.approx(270.0) and shared.problems == ()
    assert shared.stp == pytest.approx(0.5 + 0.75)
    # Alone, one second's requests take half a second at 200 W and three quarters at 250 W.
    assert shared.energy_ratio == pytest.approx(270 / (0.5 * 200 + 0.75 * 250))
    assert [job.normalized for job in shared.jobs] == pytest.approx([0.5, 0.75])
    gpt = shared.jobs[1]
    assert (gpt.p0_ms, gpt.p50_ms, gpt.p99_ms) == pytest.approx((5.4, 6.0, 7.2))
    assert bert.stp == bert.energy_ratio == 1.0


def test_appended_rows_are_runs_and_power_is_the_last_ones(tmp_path: Path) -> None:
    root = tmp_path / "a6000"
    hotcarbon(root / "bert/bert-1", "0_bert-1", "mps-uncap,70.0", "tm,60.0", watts=120.0)
    hotcarbon(root / "gpt/gpt-1", "0_gpt-1", "tm,0.5", watts=200.0)
    hotcarbon(root / "bert-gpt/bert-1_gpt-1", "0_bert-1,1_gpt-1", "mps-uncap,35,0.25", "tm,30,0.4")
    runs = read_hotcarbon(root)
    assert [(run.mode, run.row, run.label) for run in runs] == [
        ("mps-uncap", 0, "a6000"),
        ("tm", 1, "a6000"),
        ("mps-uncap", 0, "a6000"),
        ("tm", 1, "a6000"),
        ("tm", 0, "a6000"),
    ]
    mps, tm = runs[2:4]
    # Each beside the solo run of its own mode; where there is none, of any.
    assert mps.stp == pytest.approx(35 / 70 + 0.25 / 0.5) and tm.stp == pytest.approx(0.5 + 0.8)
    assert mps.watts is None and mps.energy_ratio is None and tm.watts == pytest.approx(100.0)


def test_gpus_take_turns_in_pwr(tmp_path: Path) -> None:
    folder = hotcarbon(tmp_path / "a100/bert/bert-1", "0_bert-1", "tm,1.0", gpus=4)
    (run,) = read_hotcarbon(tmp_path)
    assert run.watts == pytest.approx(100.0) and "number 0 of 4 GPUs" in run.problems[0]
    assert read_hotcarbon(tmp_path, gpu=2)[0].watts == pytest.approx(2100.0)
    assert read_hotcarbon(tmp_path, gpus=4, gpu=3)[0].watts == pytest.approx(3100.0)
    assert read_hotcarbon(tmp_path, gpu=4)[0].watts is None
    with pytest.raises(InvalidConfig, match="GPU 4 of 4 does not exist"):
        read_hotcarbon(tmp_path, gpus=4, gpu=4)
    assert read_hotcarbon(folder)[0].label == "a100", "its own folder has the same label"


def test_what_the_card_did_not_say_and_a_cut_file(tmp_path: Path) -> None:
    folder = hotcarbon(tmp_path / "x/bert/bert-1", "0_bert-1", "tm,1.0")
    lines = (folder / "pwr.csv").read_text().splitlines()
    lines[60] = lines[60].replace("100.00 W", "[N/A]")
    lines[61] = lines[61].replace("100.00 W", "[Not Supported]")
    (folder / "pwr.csv").write_text("\n".join([*lines, "2024/05/07 12:09:00.100, NVIDIA A1"]))
    (run,) = read_hotcarbon(tmp_path)
    assert run.watts == pytest.approx(100.0)
    assert run.problems == ("pwr.csv: 1 incomplete rows", "pwr.csv: 2 samples without power")


def test_the_window_is_the_last_part_of_pwr(tmp_path: Path) -> None:
    folder = hotcarbon(tmp_path / "x/bert/bert-1", "0_bert-1", "tm,1.0", seconds=200)
    lines = (folder / "pwr.csv").read_text().splitlines()
    lines[1:81] = [line.replace("100.00 W", "30.00 W") for line in lines[1:81]]  # loading
    (folder / "pwr.csv").write_text("\n".join(lines) + "\n")
    assert read_hotcarbon(tmp_path)[0].watts == pytest.approx(100.0)
    whole = read_hotcarbon(tmp_path, window_s=300.0)[0]
    assert whole.watts is not None and whole.watts < 80.0
    assert "has 199 s of the window's 300 s" in whole.problems[0]
    with pytest.raises(InvalidConfig, match="too short"):
        read_hotcarbon(tmp_path, window_s=3.0)


def test_missing_files_are_problems_of_their_run(tmp_path: Path) -> None:
    folder = hotcarbon(tmp_path / "x/bert/bert-1", "0_bert-1", "tm,1.0", watts=None)
    (folder / "total_p99.csv").rename(folder / "total_99.csv")  # as its README calls it
    (folder / "total_p0.csv").unlink()
    (folder / "total_p90.csv").write_text("mode,load,0_gpt-1\ntm,1.0,3\n")
    (run,) = read_hotcarbon(tmp_path)
    (job,) = run.jobs
    assert (job.p0_ms, job.p90_ms, job.p50_ms, job.p99_ms) == (None, None, 10.0, 12.0)
    assert run.problems == (
        "total_p0.csv is missing",
        "total_p90.csv does not match tput.csv",
        "pwr.csv is missing",
    )
    (folder / "pwr.csv").write_text("")
    assert "no columns timestamp" in read_hotcarbon(tmp_path)[0].problems[2]
    (folder / "pwr.csv").write_text(PWR)
    assert read_hotcarbon(tmp_path)[0].problems[2] == "pwr.csv has 0 usable samples"


def test_a_model_twice_and_names_with_dashes(tmp_path: Path) -> None:
    hotcarbon(tmp_path / "x/a-b-a-b/a-b-1_a-b-8", "0_a-b-1,1_a-b-8", "tm,1.0,2.0")
    (run,) = read_hotcarbon(tmp_path)
    assert [(job.model, job.batch) for job in run.jobs] == [("a-b", 1), ("a-b", 8)]
    assert run.label == "x" and run.stp is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("a,b\n1,2\n", "does not begin with mode,load"),
        ("mode,load\ntm,1.0\n", "does not begin with mode,load"),
        ("mode,load,bert\ntm,1.0,2\n", "does not begin with mode,load"),
    ],
)
def test_what_is_not_hotcarbons_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "tput.csv").write_text(text)
    with pytest.raises(InvalidConfig, match=r"tput\.csv") as raised:
        read_hotcarbon(tmp_path)
    assert says in str(raised.value)


def test_no_results_at_all(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"there is no tput\.csv below it"):
        read_hotcarbon(tmp_path)
    with pytest.raises(InvalidConfig, match="is not a folder"):
        read_hotcarbon(tmp_path / "none")
    (tmp_path / "tput.csv").write_text("mode,load,0_bert-1\ntm,1.0\n")
    assert read_hotcarbon(tmp_path) == ()


# ------------------------------------------------------------------------------------- there and back

SPEC = ShareSpec(jobs=(Job(name="a", model="bert"), Job(name="b", model="gpt")), label="h200")


def run(mode: Mode, level: float, **each_ms: int) -> RunResult:
    """Closed loops of 30 s at `level` W: each job's requests take so long, one behind the other."""
    jobs = tuple(
        JobResult(
            job=job,
            requests=tuple(
                Request(
                    job=job,
                    number=k,
                    arrived_ns=k * took * MS,
                    started_ns=k * took * MS,
                    ended_ns=(k + 1) * took * MS,
                )
                for k in range(30_000 // took)
            ),
        )
        for job, took in ((0, each_ms.get("a")), (1, each_ms.get("b")))
        if took
    )
    power = tuple(
        PowerSample(at_ns=k * S // 10, watts=level, energy_mj=round(level * 100 * k))
        for k in range(-30, 301)
    )
    return RunResult(mode=mode, repeat=0, jobs=jobs, begin_ns=0, end_ns=30 * S, power=power[30:])


SOLOS = {0: run(Mode.EXCLUSIVE, 200.0, a=20), 1: run(Mode.EXCLUSIVE, 300.0, b=250)}
SHARED = run(Mode.MPS, 350.0, a=25, b=300)


@pytest.mark.parametrize("layout", ["slosched", "hotcarbon"])
def test_our_tree_read_again_has_our_numbers(tmp_path: Path, layout: str) -> None:
    for result in (*SOLOS.values(), SHARED):
        jobs = [SPEC.jobs[each.job] for each in result.jobs]
        folder = tmp_path / "out" / run_path(SPEC, jobs, result.mode, 0)
        write_run(folder, SPEC, result, SOLOS, layout=layout, results_root=tmp_path / "results")
    root = tmp_path / ("out" if layout == "slosched" else "results")
    runs = {each.mix: each for each in read_hotcarbon(root, window_s=30.0)}
    found = runs["bert", "gpt"]
    metrics = metrics_of(SPEC, SHARED, SOLOS)
    ours = of_metrics(metrics, label="h200", mode="mps-uncap")
    assert (found.label, found.mode, found.mix) == (ours.label, ours.mode, ours.mix)
    for got, expected in zip(found.jobs, ours.jobs, strict=True):
        assert got.throughput_per_s == pytest.approx(expected.throughput_per_s)
        assert got.normalized == pytest.approx(expected.normalized)
        assert got.p50_ms == pytest.approx(expected.p50_ms)
        assert got.p100_ms == pytest.approx(expected.p100_ms)
    assert found.stp == pytest.approx(ours.stp) == pytest.approx(0.8 + 250 / 300)
    assert found.watts == pytest.approx(350.0)
    assert found.energy_ratio == pytest.approx(ours.energy_ratio)
    assert found.energy_ratio == pytest.approx(350 / (0.8 * 200 + 250 / 300 * 300))
    if layout == "slosched":
        assert found.source == "slosched" and read_hotcarbon(root)[0].window_s == 30.0


def test_our_jobs_that_differ_in_more_than_their_model_have_the_solos_that_are_theirs(
    tmp_path: Path,
) -> None:
    """Two sizes of one model: the seven files alone do not tell their solos apart, and our summary does."""
    sizes = ((1440, 2560), (720, 1280))
    jobs = tuple(Job(name=f"job{n}", model="bert", size=size) for n, size in enumerate(sizes))
    spec = msgspec.structs.replace(SPEC, jobs=jobs)
    for result in (*SOLOS.values(), SHARED):
        alone = result.mode is Mode.EXCLUSIVE
        path = (
            solo_path(spec, result.jobs[0].job, 0) if alone else run_path(spec, jobs, Mode.MPS, 0)
        )
        write_run(tmp_path / path, spec, result, SOLOS)
    found = read_hotcarbon(tmp_path)
    assert [run.label for run in found] == ["h200"] * 3
    shared = next(run for run in found if len(run.jobs) == 2)
    assert [job.normalized for job in shared.jobs] == pytest.approx([0.8, 250 / 300])
    assert shared.stp == pytest.approx(0.8 + 250 / 300)
    assert [run.stp for run in found if run is not shared] == pytest.approx([1.0, 1.0])
    next(tmp_path.rglob("bert-1@*/exclusive/r0/summary.json")).unlink()
    assert [run.label for run in read_hotcarbon(tmp_path)] == ["h200"] * 3


def test_both_layouts_in_one_tree_count_once(tmp_path: Path) -> None:
    folder = tmp_path / run_path(SPEC, SPEC.jobs, Mode.MPS, 0)
    shared = folder.parent.parent
    shared.mkdir(parents=True)
    (shared / "tput.csv").write_text("mode,load,0_bert-1,1_gpt-1\ntm,1.0,3.0,4.0\n")
    write_run(folder, SPEC, SHARED, SOLOS, layout="hotcarbon", results_root=tmp_path)
    found = read_hotcarbon(tmp_path)
    assert [(run.mode, run.source) for run in found] == [
        ("tm", "hotcarbon"),
        ("mps-uncap", "slosched"),
    ]


def test_our_deft_csv_read_again(tmp_path: Path) -> None:
    for compat in (False, True):
        write_run(tmp_path, SPEC, SHARED, SOLOS, deft_compat=compat)
        logs = {"a": tmp_path / "a.csv", "b": tmp_path / "b.csv"}
        found = deft_metrics(logs, drop_first=compat)
        expected = metrics_of(SPEC, SHARED)
        assert expected.short and not found.short  # 30 s of 120 s; the logs do not say of how many
        for got, ours in zip(found.jobs, expected.jobs, strict=True):
            assert got.latency == ours.latency and got.throughput_per_s == ours.throughput_per_s


# ------------------------------------------------------------------------------------------ published


def test_the_published_sets_follow_from_their_own_numbers() -> None:
    assert [each.name for each in hotcarbon_sets()] == [
        "a6000-tm",
        "a6000-mps",
        "4090-tm",
        "4090-mps",
        "five-min-a100-pwr",
    ]
    mixes = 0
    for each in hotcarbon_sets():
        alone = {run.models[0]: run for run in each.runs if len(run.models) == 1}
        assert set(alone) == {"bert", "whisper", "gpt", "diffusion"}
        for run in each.runs:
            assert len(run.models) == len(run.throughput_per_s) == len(run.p99_ms)
            normalized = [
                rate / alone[model].throughput_per_s[0]
                for model, rate in zip(run.models, run.throughput_per_s, strict=True)
            ]
            assert run.normalized == pytest.approx(tuple(normalized), abs=2e-3)
            assert run.stp == pytest.approx(sum(normalized), abs=3e-3)
            if len(run.models) > 1:
                mixes += 1
                joules = sum(
                    part * alone[model].watts
                    for model, part in zip(run.models, normalized, strict=True)
                )
                assert run.energy_ratio == pytest.approx(run.watts / joules, abs=0.02)
    assert mixes == 10 + 7 * 2 + 7 + 10


def test_known_published_figures() -> None:
    best = next(
        r for r in hotcarbon_set("a6000-mps").runs if set(r.models) == {"bert", "whisper", "gpt"}
    )
    assert (best.stp, best.energy_ratio) == (2.382, 0.703)
    assert hotcarbon_set("a100-tm") is hotcarbon_set("five-min-a100-pwr")
    with pytest.raises(UnknownName, match="a6000-mig"):
        hotcarbon_set("a6000-mig")


def test_a6000_mps_then_and_ours_now() -> None:
    jobs = tuple(
        ImportedJob(model=model, normalized=part, p99_ms=p99)
        for model, part, p99 in (("gpt", 0.9, 400.0), ("bert", 1.0, 7.0))
    )
    now = Imported(
        source="slosched", path="", label="h200", mode="mps-uncap", jobs=jobs, stp=1.9, watts=300.0
    )
    found = compare(now, hotcarbon_set("a6000-mps"))
    assert found is not None and found.models == ("bert", "gpt")
    assert (found.stp_then, found.stp_now, found.then_device) == (1.982, 1.9, "A6000")
    assert found.normalized_now == (1.0, 0.9) and found.p99_ms_now == (7.0, 400.0)
    assert found.energy_ratio_then == 0.828 and found.energy_ratio_now is None
    batched = msgspec.structs.replace(now, jobs=(*jobs[:1], ImportedJob(model="bert", batch=2)))
    assert compare(batched, hotcarbon_set("a6000-mps")) is None
    other = msgspec.structs.replace(now, jobs=(ImportedJob(model="vit"),))
    assert compare(other, hotcarbon_set("a6000-mps")) is None
    twice = msgspec.structs.replace(now, jobs=(jobs[0], jobs[0]))
    assert compare(twice, hotcarbon_set("a6000-mps")) is None
    json.loads(msgspec.json.encode(found))
