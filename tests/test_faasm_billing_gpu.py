"""Memory of GPUs in bills: by process where the driver names them, else by card."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from fake_nvml import FakeNvml
from slosched.clock import now_ns, sleep_ns
from slosched.errors import InvalidConfig
from slosched.faasm import billing_gpu, frame
from slosched.faasm.billing import Billing
from slosched.faasm.frame_run import Order, open_run
from slosched.faasm.sgd.options import Options

_GB = 10**9


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNvml]:
    """A card of 141 GB with 1 GB in use, and no process on it."""
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    fake.answers["nvmlDeviceGetComputeRunningProcesses"] = []
    used(fake, _GB)
    yield fake
    assert fake.open == 0, "NVML was not let go"


def used(card: FakeNvml, size: int, **processes: int | None) -> None:
    """Set what is in use; `processes` are p<pid>=bytes."""
    card.answers["nvmlDeviceGetMemoryInfo"] = SimpleNamespace(used=size, total=141 * _GB)
    card.answers["nvmlDeviceGetComputeRunningProcesses"] = [
        SimpleNamespace(pid=int(name[1:]), usedGpuMemory=held) for name, held in processes.items()
    ]


def sampled(billing: Billing) -> None:
    """Wait for a sample that begins from now on."""
    wanted, until_ns = billing.samples + 2, now_ns() + 30_000_000_000
    while billing.samples < wanted:
        assert now_ns() < until_ns
        sleep_ns(1_000_000)


def billed(**options: int) -> Billing:
    return Billing(own=True, every_s=0.01, host=False, gpus=["GPU-11"], **options)  # type: ignore[arg-type]


def test_memory_of_the_run_s_own_processes_is_billed(card: FakeNvml) -> None:
    own = f"p{os.getpid()}"
    with billed() as billing:
        used(card, 9 * _GB, **{own: 3 * _GB, "p1": 5 * _GB})
        sampled(billing)
    found = billing.record()
    assert (found["gpu_by"], found["gpu_peak_mb"]) == ("process", 3000)
    assert 0 < found["gpu_gb_s_integral"] <= found["gpu_gb_s_peak"]
    assert found["gpu_gb_s_peak"] == pytest.approx(3 * found["billed_s"])


def test_where_no_process_is_named_the_card_s_growth_is_billed(card: FakeNvml) -> None:
    with billed() as billing:
        used(card, 5 * _GB, p1=None)
        sampled(billing)
    found = billing.record()
    assert (found["gpu_by"], found["gpu_peak_mb"]) == ("card", 4000)
    with billed(
        gpu_idle_bytes=2 * _GB
    ) as later:  # what a system took before the bill began is its own
        sampled(later)
    assert later.record()["gpu_peak_mb"] == 3000


def test_the_integral_is_that_of_the_memory_over_time(card: FakeNvml) -> None:
    own = f"p{os.getpid()}"
    used(card, 2 * _GB, **{own: _GB})
    with billed() as billing:
        sampled(billing)
    found = billing.record()
    assert billing.bill is not None
    # All samples have 1 GB; the first one is behind the begin.
    assert 0 < found["gpu_gb_s_integral"] <= billing.bill.wall_ns / 1e9


def test_a_card_that_is_not_there_is_refused_by_its_name(card: FakeNvml) -> None:
    with pytest.raises(InvalidConfig, match="GPU GPU-99"):
        billing_gpu.GpuMemory(["GPU-99"])
    with Billing(own=True, host=False) as without:
        pass
    assert not [name for name in without.record() if name.startswith("gpu")]


def test_a_frame_bills_the_gpus_that_are_there(
    card: FakeNvml, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(frame, "uuids_here", lambda: ("GPU-11",))
    order = Order(experiment="sgd", options=Options(), scale="quick", out=tmp_path / "out")
    with open_run(order, say=_nothing, show=_nothing) as run:
        with run.bill(host=False) as before:
            pass
        run.bill_gpus()
        used(card, 6 * _GB)  # a system starts
        with run.bill(host=False) as bill:
            sampled(bill)
    assert "gpu_peak_mb" not in before.record()
    assert bill.record()["gpu_peak_mb"] == 5000


def test_a_host_without_gpus_has_none_to_bill(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(billing_gpu, "_gpu_count", lambda: 0)
    assert billing_gpu.uuids_here() == ()
    lines: list[str] = []
    order = Order(experiment="sgd", options=Options(), scale="quick", out=tmp_path / "out")
    with open_run(order, say=lines.append, show=_nothing) as run:
        run.bill_gpus()
    assert any("memory of GPUs is not billed" in line for line in lines)


def _nothing(line: str) -> None:
    """What a test does not look at."""
