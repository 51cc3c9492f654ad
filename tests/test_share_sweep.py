"""Sweeps of sharing experiments: keys, presets, what is kept, what is run again, and the table."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from slosched.errors import InvalidConfig, UnknownName
from slosched.share.axes import Point, parse_axis, points_of, short_keys, with_value
from slosched.share.energy import Energy
from slosched.share.figures import Inflation, JobMetrics, Misses, Pauses, RunMetrics
from slosched.share.latency import latency_of
from slosched.share.presets import (
    DEMO_METHODS,
    HOTCARBON_MODES,
    PRESETS,
    Wanted,
    hotcarbon_mixes,
    preset,
)
from slosched.share.spec_check import check_spec
from slosched.share.sweep import POINTS, Swept, run_sweep
from slosched.share_spec import Boundary, BoundaryKind, Job, Mode, Run, ShareSpec, Status
from slosched.units import NS_PER_S

SPEC = ShareSpec(
    jobs=(Job(name="low", model="gpt"), Job(name="high", model="bert", priority=1)),
    modes=(Mode.TM,),
)
EVERY = "jobs.low.boundary.every"


def made(mode: Mode, repeat: int, ms: float, *, status: Status = Status.OK) -> RunMetrics:
    """Figures of a run of both jobs whose latency is `ms`."""
    jobs = tuple(
        JobMetrics(
            job=place,
            name=name,
            model="m",
            batch=1,
            priority=place,
            status=status if place == 0 else Status.OK,
            reason="",
            pid=0,
            n=1,
            work=1.0,
            throughput_per_s=2.0,
            latency=latency_of([round((ms + place) * 1e6)]),
            wait_mean_ms=None,
            inflation=Inflation(),
            misses=Misses(),
            pauses=Pauses(),
        )
        for place, name in enumerate(("low", "high"))
    )
    return RunMetrics(
        mode=mode,
        repeat=repeat,
        window_s=1.0,
        jobs=jobs,
        complete=True,
        energy=Energy(window_s=1.0),
        pauses=Pauses(),
        stp=ms,
    )


class Runner:
    """Stands for the experiments: each call is recorded, and gives what `give` says."""

    def __init__(self, give: Callable[[ShareSpec], Sequence[RunMetrics]] | None = None) -> None:
        self.every: list[int] = []
        self.places: list[Path] = []
        self._give = give or (
            lambda spec: [made(spec.modes[0], 0, float(spec.jobs[0].boundary.every))]
        )

    def __call__(self, spec: ShareSpec, place: Path) -> Sequence[RunMetrics]:
        self.every.append(spec.jobs[0].boundary.every)
        self.places.append(place)
        return self._give(spec)


def sweep(points: Sequence[Point], out: Path, run: Runner, **more: Any) -> Swept:
    return run_sweep(points, out, run=run, draw=False, **({"say": lambda _: None} | more))


def table(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "sweep.csv").read_text().splitlines()))


# ------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        (EVERY, "4", lambda spec: spec.jobs[0].boundary.every == 4),
        ("jobs.0.boundary.every", 1e6, lambda spec: spec.jobs[0].boundary.every == 10**6),
        ("jobs.0.boundary.every", "1e6", lambda spec: spec.jobs[0].boundary.every == 10**6),
        ("jobs.*.batch", 8, lambda spec: [job.batch for job in spec.jobs] == [8, 8]),
        ("jobs.1.clients.think", "10ms", lambda spec: spec.jobs[1].clients.think_ns == 10**7),
        ("duration", "20s", lambda spec: spec.duration_ns == 20 * 10**9),
        ("modes", "tm+mps-uncap", lambda spec: spec.modes == (Mode.TM, Mode.MPS)),
        ("jobs.0.size", "720x1280", lambda spec: spec.jobs[0].size == (720, 1280)),
        ("jobs.0.boundary.tuned", "true", lambda spec: spec.jobs[0].boundary.tuned),
        ("jobs", "bert-8+gpt-1", lambda spec: [j.batch for j in spec.jobs] == [8, 1]),
        ("seed", "7", lambda spec: spec.seed == 7),
    ],
)
def test_a_key_reaches_its_field(key: str, value: Any, found: Callable[[ShareSpec], bool]) -> None:
    assert found(with_value(SPEC, key, value))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("jobs.9.batch", 1, "unknown job '9'"),
        ("jobs.0", 1, "name a field of the job"),
        ("jobs.0.boundary", 1, "boundary.kind"),
        ("jobs.0.batch.size", 1, "no fields"),
        ("jobs.0.bach", 1, "did you mean batch"),
        ("jobs.0.batch", "many", "it must be a whole number, not 'many'"),
        ("modes", "tn", "unknown mode"),
        ("duration", "20", "unit"),
        ("", 1, "unknown key"),
    ],
)
def test_a_wrong_key_or_value_is_named(key: str, value: Any, says: str) -> None:
    with pytest.raises(InvalidConfig, match=says) as error:
        with_value(SPEC, key, value)
    assert str(error.value).startswith(f"{key}={value}")


def test_points_are_all_combinations_in_order() -> None:
    points = points_of(SPEC, {EVERY: (1, 4), "modes": ("tm", "tm+mps")})
    assert [point.folder for point in points] == [
        "every_1-modes_tm",
        "every_1-modes_tm+mps",
        "every_4-modes_tm",
        "every_4-modes_tm+mps",
    ]
    assert points[3].name == "every=4, modes=tm+mps" and points[3].spec.modes[1] is Mode.MPS
    assert short_keys(["jobs.0.batch", "jobs.1.batch", "seed"]) == {
        "jobs.0.batch": "0.batch",
        "jobs.1.batch": "1.batch",
        "seed": "seed",
    }
    with pytest.raises(InvalidConfig, match="every=0: job low: every of boundary"):
        points_of(SPEC, {EVERY: (0,)})
    with pytest.raises(InvalidConfig, match="at most 10,000"):
        points_of(SPEC, {EVERY: range(1, 200), "seed": range(200)})
    with pytest.raises(InvalidConfig, match="no values"):
        points_of(SPEC, {EVERY: ()})
    slashes = points_of(SPEC, {"jobs.0.model": ("tiny:4:1", "tiny_4:1")})
    assert len({point.folder for point in slashes}) == 2
    assert not any(sign in point.folder for point in slashes for sign in ":/")


def test_an_axis_is_read_from_text() -> None:
    assert parse_axis(" seed = 1, 2,3 ") == ("seed", ("1", "2", "3"))
    for text in ("seed", "=1", "seed=", "seed=,"):
        with pytest.raises(InvalidConfig, match="KEY=VALUE"):
            parse_axis(text)
    with pytest.raises(InvalidConfig, match="stands twice"):
        parse_axis("seed=1,1")


# ---------------------------------------------------------------------------------------- presets


def test_sweep_sync_has_deft_thirteen_values() -> None:
    points = preset("sweep-sync", Wanted(device="cuda:1", seed=3)).points
    syncs = tuple(point.spec.jobs[0].boundary.every for point in points)
    assert syncs == (1, 2, 4, 8, 10, 20, 50, 100, 500, 1000, 5000, 10_000, 1_000_000)
    low, high = points[5].spec.jobs
    assert low.boundary == Boundary(kind=BoundaryKind.SYNC, every=20)
    assert (low.size, high.size) == ((1440, 2560), (720, 1280))
    assert (low.priority, high.priority) == (0, 1) and high.clients.think_ns == 10**9
    assert high.boundary.kind is BoundaryKind.NONE and low.run is Run.EAGER
    assert points[0].spec.modes == (Mode.GATE,) and points[0].spec.device == "cuda:1"


def test_hotcarbon_has_fourteen_mixes() -> None:
    mixes = hotcarbon_mixes()
    assert [sum(len(mix) == count for mix in mixes) for count in (1, 2, 3)] == [4, 6, 4]
    points = preset("hotcarbon", Wanted(run=Run.EAGER)).points
    assert len(points) == 14 and len({point.folder for point in points}) == 14
    # What the 24 GB card could not hold.
    for missing in ("gpt+diffusion", "bert+gpt+diffusion", "whisper+gpt+diffusion"):
        point = next(point for point in points if point.folder == missing)
        assert point.spec.modes == HOTCARBON_MODES and point.together
        assert [job.model for job in point.spec.jobs] == missing.split("+")
        assert all(job.batch == 1 and job.run is Run.EAGER for job in point.spec.jobs)
    assert points[0].spec.modes == (Mode.EXCLUSIVE,)
    assert HOTCARBON_MODES == (Mode.TM, Mode.MPS, Mode.STREAMS, Mode.PREEMPT)


def test_pairs_are_unordered_and_have_a_model_beside_itself() -> None:
    points = preset("pairs", Wanted(models=("bert", "gpt"), batches=(1, 8))).points
    assert len(points) == 10
    assert [point.folder for point in points][:2] == ["bert-1+bert-1", "bert-1+bert-8"]
    assert [job.name for job in points[0].spec.jobs] == ["bert", "bert_2"]


def test_the_demo_names_its_baselines_by_what_they_do() -> None:
    points = {point.folder: point.spec for point in preset("deft-demo").points}
    assert list(points) == list(DEMO_METHODS)
    off = points["gate-off"]
    assert off.modes == (Mode.TM,) and off.jobs[0].boundary.kind is BoundaryKind.NONE
    assert points["gate-sync-20"].modes == (Mode.GATE,)
    assert points["bounded-queue-4"].jobs[0].boundary == Boundary(kind=BoundaryKind.SYNC, every=4)
    both = points["bounded-queues-4-4"]
    assert both.jobs[1].boundary == both.jobs[0].boundary
    words = " ".join(PRESETS) + " ".join(points)
    assert not any(name in words.lower() for name in ("reef", "pipeswitch", "shepherd"))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_sound_and_has_a_tiny_form(name: str) -> None:
    for wanted in (Wanted(device="emulated"), Wanted(device="cpu", tiny=True, repeats=2)):
        found = preset(name, wanted)
        assert found.about and found.points
        for point in found.points:
            assert check_spec(point.spec) is point.spec
            assert point.spec.device == wanted.device and point.spec.repeats == wanted.repeats
    assert all(job.model == "tiny" for point in found.points for job in point.spec.jobs)
    assert all(point.spec.duration_ns < 10**9 for point in found.points)


def test_presets_refuse_what_they_do_not_have() -> None:
    with pytest.raises(UnknownName, match="did you mean pairs"):
        preset("pair")
    with pytest.raises(InvalidConfig, match="pairs, not for hotcarbon"):
        preset("hotcarbon", Wanted(models=("bert",)))
    with pytest.raises(InvalidConfig):
        preset("pairs", Wanted(models=("bert large",)))
    library = preset("pairs", Wanted(models=("timm/vit_b", "bert"))).points
    assert library[0].folder == "timm_vit_b-1+timm_vit_b-1"


# ----------------------------------------------------------------------------------------- running


def test_a_sweep_is_resumed_where_it_ended(tmp_path: Path) -> None:
    points = points_of(SPEC, {EVERY: (1, 4, 10)})
    first = Runner()
    said: list[str] = []
    swept = sweep(
        points,
        tmp_path,
        first,
        stopped=lambda: len(first.every) == 2 and first.every[-1] == 4,
        say=said.append,
    )
    # The second was running when it was stopped, so it does not count.
    assert first.every == [1, 4] and swept.stopped and (swept.done, swept.left) == (1, 2)
    assert [row["point"] for row in table(tmp_path)] == ["every_1"]
    assert any(line.startswith("about ") and "2 points" in line for line in said)
    again = Runner()
    swept = sweep(points, tmp_path, again)
    assert again.every == [4, 10] and (swept.kept, swept.done, swept.left) == (1, 3, 0)
    assert [row["stp"] for row in table(tmp_path)] == ["1.0", "4.0", "10.0"]
    assert sweep(points, tmp_path, third := Runner()).kept == 3 and third.every == []
    assert sweep(points, tmp_path, fourth := Runner(), resume=False).kept == 0
    assert fourth.every == [1, 4, 10] and fourth.places[1] == tmp_path / "every_4"


def test_another_experiment_or_a_broken_file_is_run_again(tmp_path: Path) -> None:
    points = points_of(SPEC, {EVERY: (1, 4)})
    sweep(points, tmp_path, Runner())
    (tmp_path / POINTS / "every_4.json").write_bytes(b'{"digest": "x"')
    sweep(points, tmp_path, broken := Runner())
    assert broken.every == [4]
    longer = msgspec.structs.replace(SPEC, duration_ns=10**9)
    sweep(points_of(longer, {EVERY: (1, 4)}), tmp_path, other := Runner())
    assert other.every == [1, 4]


def test_ctrl_c_keeps_the_table_and_what_is_done(tmp_path: Path) -> None:
    def interrupted(spec: ShareSpec) -> Sequence[RunMetrics]:
        if spec.jobs[0].boundary.every == 4:
            raise KeyboardInterrupt
        return [made(Mode.TM, 0, 1.0)]

    points = points_of(SPEC, {EVERY: (1, 4, 10)})
    with pytest.raises(KeyboardInterrupt):
        sweep(points, tmp_path, Runner(interrupted))
    assert [row["point"] for row in table(tmp_path)] == ["every_1"]
    sweep(points, tmp_path, again := Runner())
    assert again.every == [4, 10]


def test_a_point_that_fails_is_named_and_run_again(tmp_path: Path) -> None:
    def some_fail(spec: ShareSpec) -> Sequence[RunMetrics]:
        every = spec.jobs[0].boundary.every
        if every == 1:
            raise InvalidConfig("it cannot be")
        return [made(Mode.TM, 0, 1.0, status=Status.DIED if every == 4 else Status.OK)]

    points = points_of(SPEC, {EVERY: (1, 4, 10)})
    swept = sweep(points, tmp_path, Runner(some_fail))
    assert swept.failed == {"every_1": "it cannot be", "every_4": "low in tm died"}
    assert (swept.done, swept.left) == (2, 1)
    # What a failed point did measure is in the table, and says so.
    assert [row["status"] for row in table(tmp_path)] == ["low in tm died", "ok"]
    sweep(points, tmp_path, again := Runner())
    assert again.every == [1, 4]


def test_a_sweep_of_which_all_points_fail_ends(tmp_path: Path) -> None:
    points = points_of(SPEC, {EVERY: range(1, 9)})
    swept = sweep(points, tmp_path, runner := Runner(lambda _: []))
    assert runner.every == [1, 2, 3] and swept.left == 8
    assert swept.failed["every_1"] == "it left no results"


def test_a_mode_that_was_unavailable_is_tried_again(tmp_path: Path) -> None:
    lacking = msgspec.structs.replace(made(Mode.TM, 0, 1.0), unavailable="no driver", jobs=())
    points = points_of(SPEC, {EVERY: (1,)})
    swept = sweep(points, tmp_path, Runner(lambda _: [lacking]))
    assert not swept.failed and table(tmp_path)[0]["status"] == "unavailable"
    sweep(points, tmp_path, again := Runner())
    assert again.every == [1]


def test_repeats_have_intervals_and_solos_no_row(tmp_path: Path) -> None:
    def repeated(spec: ShareSpec) -> Sequence[RunMetrics]:
        alone = made(Mode.EXCLUSIVE, 0, 99.0)
        return [alone, *(made(Mode.TM, repeat, ms) for repeat, ms in enumerate((10.0, 12.0, 14.0)))]

    sweep(points_of(SPEC, {EVERY: (4,)}), tmp_path, Runner(repeated))
    (row,) = table(tmp_path)
    assert row["mode"] == "tm" and row["repeats"] == "3" and row[EVERY] == "4"
    assert float(row["job0_mean_ms"]) == 12 and float(row["job1_mean_ms"]) == 13
    # Student's t of 2 degrees of freedom 4.303, standard deviation 2, three repeats.
    assert float(row["job0_mean_ms_half"]) == pytest.approx(4.303 * 2 / 3**0.5)
    assert row["energy_ratio"] == "" == row["energy_ratio_half"] and row["job1_name"] == "high"


def test_a_sweep_refuses_a_file_in_its_place_and_equal_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    points = points_of(SPEC, {EVERY: (1,)})
    with pytest.raises(InvalidConfig, match="not a directory"):
        sweep(points, tmp_path / "file", Runner())
    with pytest.raises(InvalidConfig, match="two points"):
        sweep([*points, *points], tmp_path, Runner())
    with pytest.raises(InvalidConfig, match="at least one"):
        sweep([], tmp_path, Runner())


def test_the_time_left_is_what_points_took_so_far(tmp_path: Path) -> None:
    clock = iter([0, 20 * NS_PER_S, 60 * NS_PER_S])
    lines: list[str] = []
    points = points_of(SPEC, {EVERY: (1, 4, 10)})
    sweep(points, tmp_path, Runner(), say=lines.append, now=lambda: next(clock))
    assert [line for line in lines if "left" in line] == [
        "about 40s left (2 points)",
        "about 30s left (1 point)",
    ]
