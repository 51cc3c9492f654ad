"""`slosched exp sgd` as a whole: its cells, tables and figures, resumed, from a file, and on processes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from slosched.errors import InvalidConfig, UnknownName
from slosched.faasm.frame import Frame
from slosched.faasm.frame_run import Order, report_again, run_experiment
from slosched.faasm.sgd import run as experiment
from slosched.faasm.sgd import summary
from slosched.faasm.sgd.examples import SIZES
from slosched.faasm.sgd.measure import measured
from slosched.faasm.sgd.options import Options
from slosched.faasm.sgd.training import MODES

TABLES = ("data", "time", "bytes", "memory", "lost", "check", "claims")


def run(out: Path, options: Options, *, resume: bool = False, layout: str = "slosched") -> Any:
    lines: list[str] = []
    order = Order(
        experiment="sgd", options=options, scale="quick", out=out, resume=resume, layout=layout
    )
    frame = run_experiment(order, say=lines.append, show=lines.append)
    return frame, "\n".join(lines)


def quick(**changes: Any) -> Options:
    given: dict[str, Any] = {"size": ("micro",), "workers": (1, 3), "repeats": 2, "epochs": 4}
    return Options(**{**given, "engine": "local", **changes})


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Frame, str, Path]:
    """A run of all modes on the local engine."""
    out = tmp_path_factory.mktemp("sgd") / "run"
    frame, text = run(out, quick(), layout="faasm")
    return frame, text, out


def rows_of(out: Path, table: str) -> list[dict[str, str]]:
    lines = (out / "tables" / f"sgd-{table}.tsv").read_text().splitlines()
    names = lines[0].split("\t")
    return [dict(zip(names, line.split("\t"), strict=True)) for line in lines[1:]]


class TestARun:
    def test_has_a_cell_for_each_configuration_and_seed(
        self, done: tuple[Frame, str, Path]
    ) -> None:
        frame, text, _ = done
        keys = {each["key"] for each in frame.records()}
        assert keys == set(frame._expected) and "by an estimate" in text
        wanted = {f"micro sequential seed={seed}" for seed in (1, 2)} | {"micro scikit-learn"}
        for mode in MODES:
            wanted |= {f"micro {mode} n={n} seed={s}" for n in (1, 3) for s in (1, 2)}
            wanted.add(f"micro {mode} n=3 seed=1 counting")
        assert keys == wanted
        assert f"[{len(wanted)}/{len(wanted)}]" in text, "what was expected is what was made"

    def test_one_worker_is_equal_to_the_sequential_training(
        self, done: tuple[Frame, str, Path]
    ) -> None:
        equal = {row["system"]: row["equal_bit_by_bit"] for row in rows_of(done[2], "check")}
        assert equal["shared"] == equal["copies"] == "2/2"
        differences = [float(row["largest_difference"] or 1) for row in rows_of(done[2], "check")]
        assert differences[:2] == [0, 0] and 0 <= differences[2] < 1e-12

    def test_every_table_says_what_is_replaced_and_emulated(
        self, done: tuple[Frame, str, Path]
    ) -> None:
        for name in TABLES:
            text = (done[2] / "tables" / f"sgd-{name}.txt").read_text()
            assert "Nothing here is Faasm" in text
            assert rows_of(done[2], name), f"{name} has rows"
        assert "EMULATED" in (done[2] / "tables" / "sgd-time.txt").read_text()
        assert "synthetic" in (done[2] / "tables" / "sgd-data.txt").read_text()
        page = (done[2] / "report.md").read_text()
        assert "options: workers 1,3, size micro, modes shared,copies,sum-delta, interval" in page

    def test_records_say_what_was_asked_and_what_happened(
        self, done: tuple[Frame, str, Path]
    ) -> None:
        for each in done[0].records():
            if each["system"] not in MODES:
                continue
            assert each["epochs"] == (1 if each["counting"] else 4) == len(each["losses"])
            assert each["batches"] == each["workers"] and each["interval"] == 60_000
            assert each["copies_left"] == 0 and each["uploaded_bytes"] > 0
            assert each["billed_s"] > 0 and each["peak_pss_mb"] > 0
            assert each["syncs"] == each["workers"] * each["epochs"]
            assert each["ledger_bytes"] == 0 or each["counting"]

    def test_the_figure_is_there(self, done: tuple[Frame, str, Path]) -> None:
        pytest.importorskip("matplotlib")
        png = (done[2] / "figures" / "sgd-micro.png").read_bytes()
        assert png.startswith(b"\x89PNG") and len(png) > 20_000
        assert "figures/sgd-micro.png" in (done[2] / "report.md").read_text()

    def test_the_published_layout_has_the_published_files(
        self, done: tuple[Frame, str, Path]
    ) -> None:
        folders = sorted(each.name for each in (done[2] / "sgd_reuters_svm").iterdir())
        assert "SYSTEM_FAASM_WORKERS_3_INTERVAL_60000_logs" in folders
        assert "SYSTEM_NATIVE_WORKERS_1_INTERVAL_60000_logs" in folders
        place = done[2] / "sgd_reuters_svm" / "SYSTEM_FAASM_WORKERS_3_INTERVAL_60000_logs"
        losses = (place / "NODE_0_SGD_LOSS.log").read_text().splitlines()
        assert len(losses) == 4 and losses[0].startswith("0.0000 ")
        assert re.fullmatch(r"[0-9.]+ms", (place / "RUN_TIME.log").read_text())

    def test_a_report_is_made_again_from_the_records(self, done: tuple[Frame, str, Path]) -> None:
        before = {name: (done[2] / "tables" / f"sgd-{name}.tsv").read_text() for name in TABLES}
        for name in TABLES:
            (done[2] / "tables" / f"sgd-{name}.tsv").unlink()
        report_again(done[2], show=lambda _: None)
        for name, text in before.items():
            assert (done[2] / "tables" / f"sgd-{name}.tsv").read_text() == text


class TestOtherRuns:
    def test_a_run_is_continued_where_it_ended(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        options = quick(workers=(1, 2), modes=("copies",), count_lost=False)
        calls = 0

        def three_times(*args: Any, **more: Any) -> dict[str, Any]:
            nonlocal calls
            calls += 1
            if calls > 3:  # the engine's warm-up and two cells
                raise RuntimeError("the power went out")
            return measured(*args, **more)

        monkeypatch.setattr(experiment, "measured", three_times)
        with pytest.raises(RuntimeError, match="power"):
            run(tmp_path / "run", options)
        monkeypatch.undo()
        before = (tmp_path / "run" / "results.jsonl").read_text().splitlines()
        frame, text = run(tmp_path / "run", options, resume=True)
        lines = (tmp_path / "run" / "results.jsonl").read_text().splitlines()
        assert lines[: len(before)] == before and "n=1 seed=1" not in text.split("sgd-data")[0]
        cells = [each["key"] for each in frame.records() if each["system"] == "copies"]
        assert cells == [f"micro copies n={n} seed={s}" for n in (1, 2) for s in (1, 2)]

    def test_a_file_of_examples(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.txt"
        lines = [
            f"{1 if n % 3 else -1} {n % 7 + 1}:{n % 5 + 1} {n % 11 + 9}:0.5" for n in range(40)
        ]
        path.write_text("\n".join(lines))
        options = quick(size=(), data=str(path), workers=(2,), repeats=1, modes=("shared",))
        frame, _ = run(tmp_path / "run", options)
        (facts,) = [each["data"] for each in frame.records() if each.get("data")]
        assert facts["origin"] == "mine.txt" and facts["rows"] == 36
        path.write_text("\n".join(lines[1:]))
        with pytest.raises(InvalidConfig, match=r"are not those that the run in .* began with"):
            run(tmp_path / "run", options, resume=True)
        (row,) = frame.records("data shared n=2 seed=1")
        assert row["accuracy"] is not None and row["updates"] == 4 * facts["nonzeros"]

    def test_what_does_not_fit_is_left_out_and_said(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def none_for_copies(examples: Any, workers: int, *, private: bool) -> str:
            return f"{workers} copies take 9 GB" if private else ""

        monkeypatch.setattr(experiment, "lack_of_memory", none_for_copies)
        options = quick(modes=("shared", "copies"), workers=(2,), repeats=1)
        frame, text = run(tmp_path / "run", options)
        assert "left out: 2 copies take 9 GB" in text
        left = rows_of(tmp_path / "run", "left-out")
        assert [row["key"] for row in left] == [
            "micro copies n=2 seed=1",
            "micro copies n=2 seed=1 counting",
        ]
        assert "train_s" in frame.records("micro shared n=2 seed=1")[0]

    @pytest.mark.processes
    def test_on_processes_instances_are_apart_and_nothing_stays(self, tmp_path: Path) -> None:
        options = quick(engine="slosched", workers=(2,), repeats=1)
        frame, _ = run(tmp_path / "run", options)
        by_mode = {each["system"]: each for each in frame.records() if each.get("batches")}
        assert set(by_mode) == set(MODES)
        lost = {
            each["system"]: each["updates_lost"] for each in frame.records() if each.get("counting")
        }
        assert lost["sum-delta"] == 0 <= lost["copies"] and lost["shared"] >= 0
        assert by_mode["shared"]["inputs_pulled_bytes"] <= by_mode["copies"]["inputs_pulled_bytes"]
        for each in by_mode.values():
            assert each["instances"] >= 1 and each["instance_peak_pss_mb"] > 0
        manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
        assert manifest["complete"] is True


class TestOptions:
    def test_the_scale_fills_in_what_was_not_given(self) -> None:
        made = Options().at_scale("quick")
        assert made.workers == (1, 2, 16) and made.size == ("micro", "small")
        assert made.modes == tuple(MODES) and len(made.seeds) == 5 and made.epochs == 20
        assert made.interval == 60_000
        assert Options().at_scale("published").size == ("micro", "full")
        kept = Options(workers=(4, 2, 4), size=("full",), modes=("copies",)).at_scale("quick")
        assert (kept.workers, kept.size, kept.modes) == ((2, 4), ("full",), ("copies",))
        assert set(SIZES) == {"micro", "small", "full"}

    @pytest.mark.parametrize(
        ("wrong", "words"),
        [
            ({"workers": (0,)}, "workers"),
            ({"workers": (65,)}, "at most 64 workers"),
            ({"size": ("huge",)}, "'huge' is not a size; known: micro"),
            ({"modes": ("sum",)}, "'sum' is not a mode"),
            ({"interval": 0}, "at least 1 update, or -1"),
            ({"interval": -2}, "interval"),
            ({"epochs": 0}, "epochs"),
            ({"data": "x", "size": ("micro",)}, "data or size, not both"),
            ({"held_out": 1.0}, "held_out"),
        ],
    )
    def test_what_cannot_be_is_refused(self, wrong: dict[str, Any], words: str) -> None:
        with pytest.raises(InvalidConfig, match=words):
            Options(**wrong)

    def test_an_unknown_engine_is_refused(self) -> None:
        with pytest.raises(UnknownName, match="dask, local, slosched"):
            Options(engine="ray")


class TestClaims:
    """Ratios of copies to shared, from records that are made up."""

    def record(self, system: str, workers: int, seconds: float, **more: Any) -> dict[str, Any]:
        return {
            "size": "small",
            "system": system,
            "workers": workers,
            "train_s": seconds,
            "target_s": seconds / 2,
            "epoch_ends_s": [seconds],
            "loss": 0.5,
            "syncs": 1,
            "inputs_pulled_bytes": 100,
            "weights_pulled_bytes": 0,
            "weights_pushed_bytes": 0,
            "gb_s_instances": seconds * 3,
            **more,
        }

    def test_are_of_the_most_workers_that_both_have(self) -> None:
        records = [self.record("shared", n, 1.0) for n in (2, 4, 8)]
        records += [self.record("copies", n, 3.0 + n, inputs_pulled_bytes=100 * n) for n in (2, 4)]
        found = {row["copies / shared"]: row for row in summary.claim_rows(records, ["small"])}
        assert {row["workers"] for row in found.values()} == {4}
        assert found["training time"]["found"] == 7 and found["bytes moved"]["found"] == 4
        assert found["memory of all processes, integral"]["found"] is None

    def test_a_target_that_is_missed_is_said(self) -> None:
        records = [self.record("shared", 2, 1.0)]
        records += [self.record("copies", 2, 1.0, target_s=None) for _ in range(3)]
        rows = {row["copies / shared"]: row for row in summary.claim_rows(records, ["small"])}
        row = rows["time to the target loss"]
        assert row["found"] is None and "missed in 3 of 3" in row["why it differs"]

    def test_times_are_medians_with_ratios_to_one_and_two_workers(self) -> None:
        records = [
            self.record("shared", workers, seconds)
            for workers, times in ((1, (4.0, 5.0, 9.0)), (2, (2.0, 2.5, 3.0)), (4, (1.0, 1.0, 1.0)))
            for seconds in times
        ]
        rows = {row["workers"]: row for row in summary.time_rows(records)}
        assert rows[1]["train_s"] == 5 and rows[1]["train_s_range"] == "4-9"
        assert (rows[4]["faster_than_1"], rows[4]["faster_than_2"]) == (5, 2.5)
        assert rows[2]["reached"] == "3/3" and rows[2]["seeds"] == 3
