"""Matrices without processes: blocks, kernels, the graph inline, options, tables and figures."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slosched.engines
from slosched.errors import InvalidConfig, MissingPackage, UnknownName
from slosched.faasm.matrices import baselines, blocks, functions, kernels, run, summary, systems
from slosched.faasm.matrices.blocks import NAMES, Plan, Truth
from slosched.faasm.matrices.options import MatricesOptions
from slosched.functions.state.state import State


def inline(plan: Plan) -> tuple[dict[str, Any], blocks.Matrix, int]:
    """The report of a product that was made inline, the product, and the number of keys that it had."""
    with (
        State(f"matrices-{plan.size}-{plan.splits}", own=True) as state,
        slosched.engines.open("local", functions.offered(plan.kernel), state=state) as engine,
    ):
        report = functions.product(engine, plan)
        found = functions.product_of(state, plan).copy()
        keys = {info.key for info in state.list()}
        assert keys == set(blocks.keys(plan))
        functions.forget([state], plan)
        assert state.list() == []
    return report, found, len(keys)


class TestBlocks:
    @pytest.mark.parametrize(("size", "level"), [(8, 3), (100, 3), (257, 2), (1001, 1)])
    def test_blocks_of_a_level_are_the_matrix(self, size: int, level: int) -> None:
        whole = blocks.block_values(5, "a", size, 0, 0, 0)
        width = range(2**level)
        parts = [[blocks.block_values(5, "a", size, level, r, c) for c in width] for r in width]
        assert np.array_equal(np.block(parts), whole)
        for row in width:
            for col in width:
                assert parts[row][col].shape == blocks.shape(size, level, row, col)

    def test_edges_nest(self) -> None:
        for size in (8, 100, 257):
            for place in range(4):
                assert blocks.edge(size, 2, place) == blocks.edge(size, 3, 2 * place)

    def test_values_are_uniform_and_differ_by_seed_and_matrix(self) -> None:
        a, b = (blocks.block_values(1, name, 400, 0, 0, 0) for name in NAMES)
        other = blocks.block_values(2, "a", 400, 0, 0, 0)
        for matrix in (a, b, other):
            assert matrix.dtype == np.float32
            assert 0 <= matrix.min() < 0.001 and 0.999 < matrix.max() < 1
            # 160,000 values: the mean of uniform ones is within 5 standard errors of a half.
            assert abs(float(matrix.mean()) - 0.5) < 5 * math.sqrt(1 / 12 / 160_000)
        for first, second in ((a, b), (a, other), (a[:, :-1], a[:, 1:]), (a[:-1], a[1:])):
            assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.02

    def test_what_travels_and_what_is_stored(self) -> None:
        assert [blocks.calls(splits) for splits in range(4)] == [1, 9, 73, 585]
        assert blocks.travelling_bytes(8000, 2) == 84 * 8000**2
        assert blocks.travelling_bytes(8000, 0) == 12 * 8000**2
        for splits in range(4):
            plan = Plan(size=16, splits=splits)
            matrices = 2 * 4 * 16**2
            products = sum(8**level * 4 * (16 >> level) ** 2 for level in range(splits + 1))
            assert blocks.stored_bytes(16, splits) == matrices + products
            assert len(list(blocks.keys(plan))) == 2 * 4**splits + blocks.calls(splits)


class TestTruth:
    def test_one_wrong_element_is_noticed(self) -> None:
        truth = Truth(3, 300)
        a, b = (blocks.block_values(3, name, 300, 0, 0, 0) for name in NAMES)
        right = a @ b
        assert truth.error(right) <= blocks.tolerance(300) / 4
        for wrong in (right.copy(), right.copy(), right.copy()):
            wrong[299, 17] *= 1.001
            assert truth.error(wrong) > blocks.tolerance(300)
            wrong[299, 17] = np.nan
            assert truth.error(wrong) == math.inf
        assert truth.error(right[:, :-1]) == math.inf
        assert truth.error(b @ a) > blocks.tolerance(300)


class TestGraph:
    @pytest.mark.parametrize("splits", [0, 1, 2, 3])
    @pytest.mark.parametrize("size", [64, 101])
    def test_the_product_is_right_at_every_split(self, size: int, splits: int) -> None:
        report, found, _ = inline(Plan(size=size, splits=splits, seed=9))
        assert Truth(9, size).error(found) <= blocks.tolerance(size)
        assert report["calls"] == blocks.calls(splits)
        if size == 64:
            travelled = report["read_bytes"] + report["written_bytes"]
            assert travelled == blocks.travelling_bytes(size, splits)
        assert report["reads"] == 2 * 8**splits + 8 * (blocks.calls(splits) - 8**splits)
        # One host shares all that its calls write.
        assert report["found_here"] == report["reads"]
        assert report["pulled_bytes"] == report["pushed_bytes"] == 0
        assert 0 < report["path_ns"] <= report["busy_ns"]

    def test_calls_that_share_nothing_move_all_that_they_read_and_write(self) -> None:
        report, found, _ = inline(Plan(size=64, splits=2, pushes=True, alone=True))
        assert Truth(0, 64).error(found) <= blocks.tolerance(64)
        assert report["pulled_bytes"] == report["read_bytes"]
        assert report["pushed_bytes"] == report["written_bytes"]
        assert report["pulled_bytes"] + report["pushed_bytes"] == blocks.travelling_bytes(64, 2)
        assert report["found_here"] == 0

    def test_a_leaf_that_fails_is_the_error_of_the_product(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails(*given: object) -> None:
            raise ArithmeticError("no more numbers")

        monkeypatch.setattr(kernels, "product", fails)
        plan = Plan(size=16, splits=1)
        # The kernel is made by the first leaf, which multiplies once for itself.
        monkeypatch.setattr(kernels, "kernel", lambda name: kernels._NumPy())
        with (
            State("matrices-failing", own=True) as state,
            slosched.engines.open("local", functions.offered("numpy"), state=state) as engine,
            pytest.raises(slosched.CallFailed, match="no more numbers"),
        ):
            functions.product(engine, plan)

    def test_calls_near_their_blocks_name_one_of_eight_places(self) -> None:
        plan = Plan(size=64, splits=3, prefix="x", near=True)
        assert functions.near_key(plan, 0, 0, 0, 0) is None
        width = range(8)
        keys = {functions.near_key(plan, 3, r, k, c) for r in width for k in width for c in width}
        assert len(keys) == 8
        # A merge has the place of all the products below it.
        assert functions.near_key(plan, 1, 1, 0, 1) == functions.near_key(plan, 3, 7, 3, 4)
        assert functions.near_key(Plan(size=64, splits=3), 3, 7, 3, 4) is None

    def test_calls_on_blocks_of_one_size_are_of_one_class(self) -> None:
        call = functions.argument(Plan(size=8000, splits=2))
        assert functions.leaf_class(call, 3, 3, 3) == functions.duration_class(call, 2, 0, 0, 0)
        assert functions.duration_class(call, 0) == functions.duration_class(call, 2) + 2
        assert functions.duration_class(functions.argument(Plan(size=31_000, splits=0)), 0) == 15


class TestKernels:
    @pytest.mark.parametrize("name", ["numpy", pytest.param("torch", marks=pytest.mark.torch)])
    def test_a_kernel_is_right(self, name: str) -> None:
        if name == "torch":
            pytest.importorskip("torch")
        by = kernels.kernel(name)
        assert by.device
        rng = np.random.default_rng(4)
        a, b = rng.random((31, 57), np.float32), rng.random((57, 23), np.float32)
        a.flags.writeable = False  # as views of the state are
        right = a.astype(np.float64) @ b.astype(np.float64)
        found, copied_ns, multiplied_ns = kernels.product(by, a, b)
        assert found.dtype == np.float32
        assert np.abs(found - right).max() <= blocks.tolerance(57) * right.max()
        assert copied_ns >= 0 and multiplied_ns > 0
        for splits in range(4):
            again = by.save(kernels.blocked(by, by.load(a), by.load(b), splits))
            assert np.abs(again - right).max() <= blocks.tolerance(57) * right.max()

    @pytest.mark.torch
    def test_leaves_by_torch_are_right(self) -> None:
        pytest.importorskip("torch")
        report, found, _ = inline(Plan(size=64, splits=1, kernel="torch"))
        assert Truth(0, 64).error(found) <= blocks.tolerance(64)
        assert report["device"]
        assert functions.LEAVES["torch"].gpu and functions.LEAVES["cupy"].gpu

    def test_cupy_is_imported_where_it_is_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "cupy", None)
        with pytest.raises(MissingPackage, match="cupy-cuda12x"):
            kernels.kernel("cupy")
        with pytest.raises(UnknownName):
            kernels.kernel("blas")
        with pytest.raises(UnknownName):
            functions.offered("blas")


class TestOptions:
    def test_a_scale_gives_what_was_not_given(self) -> None:
        quick = MatricesOptions().at_scale("quick")
        assert quick.sizes == (100, 1000, 2000) and quick.splits == (0, 1, 2, 3)
        published = MatricesOptions(repeats=1).at_scale("published")
        assert published.sizes == (100, *range(1000, 8001, 1000))
        assert published.splits == (2,) and published.repeats == 1
        assert MatricesOptions(sizes=(200, 50)).at_scale("quick").sizes == (50, 200)

    @pytest.mark.parametrize(
        "wrong",
        [
            {"sizes": (0,)},
            {"sizes": (40_000,)},
            {"sizes": (7,), "splits": (3,)},
            {"splits": (4,)},
            {"workers": 0},
            {"repeats": -1},
            {"seed": 2**32},
            {"kernel": "blas"},
        ],
    )
    def test_what_cannot_be_is_refused(self, wrong: dict[str, Any]) -> None:
        with pytest.raises((InvalidConfig, UnknownName)):
            MatricesOptions(**wrong)

    def test_a_size_too_small_for_the_splits_of_the_scale_is_refused(self) -> None:
        with pytest.raises(InvalidConfig, match="split 3 times"):
            MatricesOptions(sizes=(7,)).at_scale("quick")

    def test_systems_that_cannot_run_are_refused(self) -> None:
        assert [each.name for each in systems.chosen((), "numpy", 2)] == [*systems.all_systems(2)]
        assert "near" not in [each.name for each in systems.chosen((), "numpy", 1)]
        assert {each.name for each in systems.chosen((), "torch", 2)} == set(systems.ON_GPU)
        with pytest.raises(UnknownName):
            systems.chosen(("faasm",), "numpy", 2)
        with pytest.raises(InvalidConfig, match="does not run"):
            systems.chosen(("dask",), "cupy", 2)

    def test_every_stand_in_says_what_it_emulates(self) -> None:
        for each in systems.all_systems(3).values():
            assert ("EMULATED" in each.about) == each.pushes, each.name
            assert "{n}" not in each.about + each.title


class FakeFrame:
    """What an experiment uses of a frame."""

    scale, measures = "quick", True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kept: dict[str, list[dict[str, Any]]] = {}
        self.tables: dict[str, list[Mapping[str, Any]]] = {}
        self.said: list[str] = []
        self.expected: Mapping[str, float] = {}

    def expect(self, seconds: Mapping[str, float]) -> None:
        self.expected = seconds

    def has(self, key: str) -> bool:
        return key in self.kept

    @contextmanager
    def cell(self, key: str) -> Iterator[Any]:
        assert key not in self.kept
        rows: list[dict[str, Any]] = []

        class Cell:
            def __init__(self) -> None:
                self.key, self.row = key, rows.append

        yield Cell()
        self.kept[key] = [{"key": key, **row} for row in rows]

    @contextmanager
    def bill(self) -> Iterator[Any]:
        class Bill:
            def record(self) -> dict[str, Any]:
                fields = ("peak_pss_mb", "largest_pss_mb", "cpu_s", "gb_s_integral")
                return {"processes": 1, **dict.fromkeys(fields, 0.0)}

        yield Bill()

    def records(self) -> list[dict[str, Any]]:
        return [row for rows in self.kept.values() for row in rows]

    def raw(self, name: str) -> Path:
        return self.folder / name

    def figure(self, name: str) -> Path:
        return self.folder / name

    def new_namespace(self, store: str = "embedded") -> str:
        return f"matrices-fake-{len(self.kept)}"

    def say(self, line: str) -> None:
        self.said.append(line)

    def table(self, name: str, rows: list[Mapping[str, Any]], *, note: str = "") -> None:
        self.tables[name] = rows


def filled(folder: Path, options: MatricesOptions) -> Any:
    """A frame with records of every system: a row takes 10 ms in each, and 1 ms in one process."""
    frame: Any = FakeFrame(folder)
    for system in systems.all_systems(2).values():
        for size in options.sizes:
            for splits in run.splits_of(system, options):
                rows = []
                for repeat in range(2):
                    found: dict[str, Any] = {
                        "took_ns": size * (1 if system.name == "whole" else 10) * 1_000_000,
                        "error": 1e-7,
                        "tolerance": 1e-5,
                        "right": True,
                    }
                    if system.calls:
                        report = functions.Report(calls=blocks.calls(splits), reads=4, found_here=1)
                        report.read_bytes, report.written_bytes = 8 * size, 4 * size
                        report.pulled_bytes = 6 * size if system.pushes else 0
                        found |= asdict(report)
                    bill = FakeFrame.bill(frame)
                    with bill as made:
                        rows.append(run.record(system, size, splits, repeat, found) | made.record())
                frame.kept[run.cell_key(system, size, splits)] = rows
    return frame


class TestReport:
    def test_tables_say_where_one_process_wins(self, tmp_path: Path) -> None:
        options = MatricesOptions(sizes=(10, 20), splits=(0, 2))
        frame = filled(tmp_path, options)
        run.report(options, frame)
        rows = {
            (row["system"], row["size"], row["splits"]): row
            for row in frame.tables["matrices-duration"]
        }
        assert rows["slots", 20, 2]["times"] == pytest.approx(10)
        assert rows["slots", 20, 2]["faster"] == "one process"
        assert rows["whole", 20, 0]["faster"] == ""
        moved = {
            (row["system"], row["size"], row["splits"]): row
            for row in frame.tables["matrices-bytes"]
        }
        assert moved["slots", 20, 2]["moved"] == 0
        assert moved["near", 20, 2]["pulled"] == pytest.approx(6 * 20 / 1e6)
        assert moved["near", 20, 2]["of all"] == pytest.approx(0.5)
        assert moved["near", 20, 2]["found here"] == 0.25
        assert len(frame.tables["matrices-claims"]) == 4
        errors = frame.tables["matrices-errors"]
        assert sum(row["products"] for row in errors) == len(frame.records())

    def test_who_wins(self) -> None:
        slots = systems.all_systems(2)["slots"]
        cell = summary.Products(slots, 10, 2, [])
        assert summary.verdict(cell, 2.0) == "one process"
        assert summary.verdict(cell, 0.5) == "slots"
        assert summary.verdict(cell, 1.01) == "neither"
        assert summary.verdict(cell, None) == ""

    def test_figures_are_drawn(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        options = MatricesOptions(sizes=(10, 20), splits=(0, 2))
        frame = filled(tmp_path, options)
        run.report(options, frame)
        for name in ("matrices-duration", "matrices-bytes", "matrices-splits"):
            assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    def test_what_does_not_fit_is_left_out_and_said(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(systems, "_available_bytes", lambda: 10**6)
        frame: Any = FakeFrame(tmp_path)
        options = MatricesOptions(sizes=(64,), splits=(0, 1), systems=("whole", "slots"))
        run.run(options, frame)
        assert [*frame.expected] == [*frame.kept] and len(frame.kept) == 3
        assert {row["kind"] for row in frame.records()} == {"left out"}
        assert all("GB" in row["why"] for row in frame.records())
        run.report(options, frame)
        assert len(frame.tables["matrices-left-out"]) == 3

    def test_systems_that_are_not_installed_are_left_out_by_default(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(systems, "_available_bytes", lambda: 10**6)  # none is started
        monkeypatch.setattr("slosched.faasm.installed.find_spec", lambda name: None)
        frame: Any = FakeFrame(tmp_path)
        run.run(MatricesOptions(sizes=(64,), splits=(1,)), frame)
        left = [line for line in frame.said if "is left out: " in line]
        assert [line.split()[0] for line in left] == ["dask", "near", "anywhere", "instances"]
        assert "slosched[dask]" in left[0] and "slosched[state]" in left[1]
        assert {row["system"] for row in frame.records()} == set(systems.all_systems(2)) - {
            line.split()[0] for line in left
        }

    def test_nothing_is_measured_for_a_report(self, tmp_path: Path) -> None:
        frame: Any = FakeFrame(tmp_path)
        frame.measures = False
        run.run(MatricesOptions(sizes=(64,)), frame)
        assert not frame.kept


class TestBaselines:
    @pytest.mark.parametrize("how", ["whole", "blocked", "graph"])
    def test_a_process_writes_its_product(self, how: systems.How, tmp_path: Path) -> None:
        product = tmp_path / "product.npy"
        order = baselines.Order(
            kernel="numpy",
            size=40,
            splits=1,
            seed=2,
            how=how,
            repeats=1,
            product=str(product),
            namespace=f"matrices-baseline-{how}",
        )
        found = baselines.measure(order)
        assert 1 <= len(found) <= 20
        assert all(each["took_ns"] > 0 for each in found)
        assert Truth(2, 40).error(np.load(product)) <= blocks.tolerance(40)
        assert how != "graph" or found[0]["calls"] == 9


def test_calls_get_ready_without_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package no state is in a Redis: on a GPU machine without it every local run failed."""
    monkeypatch.delitem(sys.modules, "slosched.functions.state.redis_store", raising=False)
    monkeypatch.setitem(sys.modules, "redis", None)
    functions.ready()
    assert "slosched.functions.state.redis_store" not in sys.modules
