"""Matrices with processes: emulated hosts, a run from end to end, products that are wrong."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import slosched.engines
from slosched.errors import InvalidConfig
from slosched.faasm.frame_run import Order, run_experiment
from slosched.faasm.matrices import baselines, blocks, functions, run, systems
from slosched.faasm.matrices.blocks import Truth
from slosched.faasm.matrices.options import MatricesOptions
from slosched.functions.state import folders
from slosched.functions.state.store import Limits

pytestmark = pytest.mark.processes


@pytest.fixture
def own_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The root of shared memory of this test alone."""
    name = f"slosched-test-{tmp_path.name}"
    monkeypatch.setenv(folders.PREFIX_VARIABLE, name)
    return name


@pytest.mark.parametrize("name", ["near", "anywhere"])
def test_hosts_that_are_apart_share_the_store_alone(
    name: str, own_root: str, tmp_path: Path
) -> None:
    system, store = systems.all_systems(2)[name], f"embedded:{tmp_path / 'store'}"
    with systems.opened(system, "numpy", "m", store, 10**7, tmp_path / "logs") as (engine, states):
        assert len(states) == 3
        plan = system.plan(64, 2, 1, "numpy", "p")
        report = functions.product(engine, plan)
        found = functions.product_of(states[0], plan)
        assert Truth(1, 64).error(found) <= blocks.tolerance(64)
        assert report["calls"] == 73
        # Each block is pushed once; blocks are pulled at the most once by each of two hosts.
        assert report["pushed_bytes"] == report["written_bytes"] == 28 * 64**2
        assert 0 < report["pulled_bytes"] <= blocks.stored_bytes(64, 2)
        assert 0 < report["found_here"] < report["reads"]
        functions.forget(states, plan)
        assert states[0].list() == []
        for state in states:
            assert not list(state._local.glob("[!.]*")), "a host keeps copies"
    assert not list(Path("/dev/shm").glob(f"{own_root}*"))


@pytest.mark.torch
def test_leaves_run_on_the_lane_of_a_gpu(own_root: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    system = systems.all_systems(2)["slots"]
    with systems.opened(
        system, "torch", "m", "embedded", 10**7, tmp_path / "logs", device="emulated"
    ) as (engine, states):
        plan = system.plan(64, 1, 1, "torch", "p")
        report = functions.product(engine, plan)
        assert Truth(1, 64).error(functions.product_of(states[0], plan)) <= blocks.tolerance(64)
    assert report["calls"] == 9 and report["device"]


def test_hosts_that_are_apart_need_a_store_that_both_reach(own_root: str) -> None:
    with pytest.raises(InvalidConfig, match="share no memory"):
        slosched.engines.open(
            "slosched", functions.offered("numpy"), workers=2, apart=True, state="embedded"
        )
    with pytest.raises(InvalidConfig, match="apart"):
        slosched.engines.open(
            "slosched", functions.offered("numpy"), address="127.0.0.1:9", apart=True
        )


def test_a_baseline_that_fails_says_why(tmp_path: Path) -> None:
    order = baselines.Order(
        kernel="blas",
        size=8,
        splits=0,
        seed=0,
        how="whole",
        repeats=1,
        product=str(tmp_path / "product.npy"),
        namespace="m",
    )
    with pytest.raises(baselines.BaselineFailed, match="blas"):
        baselines.measured_apart(order, tmp_path / "log")


def order(out: Path, **options: Any) -> Order:
    return Order(
        experiment="matrices",
        options=MatricesOptions(**options),
        scale="quick",
        out=out,
        layout="faasm",
    )


def test_a_run_measures_compares_and_leaves_nothing(tmp_path: Path) -> None:
    names = ["whole", "local", "slots"]
    if shutil.which("redis-server") or shutil.which("valkey-server"):
        pytest.importorskip("redis")
        names.append("instances")
    wanted = order(
        tmp_path / "run", sizes=(48,), splits=(1,), systems=tuple(names), repeats=1, workers=2
    )
    shown: list[str] = []
    frame = run_experiment(wanted, say=shown.append, show=shown.append)
    records = {each["system"]: each for each in frame.records()}
    assert set(records) == set(names) and set(frame.cells) == set(frame._expected)
    assert all(each["right"] for each in records.values())
    assert records["slots"]["calls"] == 9
    assert records["slots"]["pulled_bytes"] == 0
    if "instances" in records:
        moved = records["instances"]["pulled_bytes"] + records["instances"]["pushed_bytes"]
        assert moved == blocks.travelling_bytes(48, 1)
    text = (frame.directory / "report.md").read_text()
    assert "Nothing here is Faasm" in text and "one process" in text
    published = frame.directory / "python_mat_mul/SYSTEM_FAASM_MATRIX_48_SPLITS_1_WORKERS_2_logs"
    assert (published / "RUN_TIME.log").read_text().endswith("ms")
    assert (published / "NODE_0_MAT_MUL.log").is_file()


def test_a_wrong_product_fails_the_run_and_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "tolerance", lambda size: 0.0)
    shown: list[str] = []
    wanted = order(tmp_path / "run", sizes=(48,), splits=(1,), systems=("blocked",), repeats=1)
    with pytest.raises(run.WrongProduct, match="blocked size=48 splits=1"):
        run_experiment(wanted, say=shown.append, show=shown.append)
    assert '"right":false' in (tmp_path / "run" / "results.jsonl").read_text()
    assert (tmp_path / "run" / "tables" / "matrices-errors.txt").is_file()


def test_state_that_a_system_leaves_in_the_server_is_an_error(own_root: str) -> None:
    if not (shutil.which("redis-server") or shutil.which("valkey-server")):
        pytest.skip("there is no Redis server")
    pytest.importorskip("redis")
    stores = systems.Stores()
    try:
        assert stores.address(systems.all_systems(2)["slots"]) == "embedded"
        address = stores.address(systems.all_systems(2)["near"])
        stores.check()
        from slosched.functions.state.state import State

        with (
            State("left", address, own=True, limits=Limits(bytes=10**6)) as state,
            pytest.raises(slosched.errors.SloschedError, match="left"),
        ):
            state.array("x", 3).set([1, 2, 3])
            stores.check()
        stores.check()
    finally:
        stores.close()
