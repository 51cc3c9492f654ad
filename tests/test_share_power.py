"""The sampler of power: what it asks, how often, how it ends, and what it says without a GPU."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import msgspec
import pytest

from fake_nvml import FakeNvml
from slosched.daemon.backends.nvml import Nvml
from slosched.daemon.member import power
from slosched.share_spec import PowerSample

MS = 1_000_000


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    module = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


def test_a_sample_has_instant_power_beside_the_average(fake: FakeNvml) -> None:
    card = Nvml(uuid="GPU-11")
    assert card.power(7, counter=True) == PowerSample(
        at_ns=7,
        watts=701.0,
        watts_average=689.123,
        energy_mj=5_000_000,
        utilization=97,
        memory_utilization=41,
        memory_used=2**36,
        memory_total=2**37,
        temperature=61,
        sm_mhz=1980,
        pstate=0,
        throttle=4,
    )
    fake.called.clear()
    assert card.power(8, counter=False).energy_mj == -1
    assert "nvmlDeviceGetTotalEnergyConsumption" not in fake.called, "it takes up to 15 ms"


@pytest.mark.parametrize("how", ["field", "function", "constant"])
def test_without_instant_power_the_average_stands_in(fake: FakeNvml, how: str) -> None:
    if how == "field":
        fake.instant_return = 3
    elif how == "function":
        fake.errors["nvmlDeviceGetFieldValues"] = 3
    else:
        fake.NVML_FI_DEV_POWER_INSTANT = None  # type: ignore[assignment]
    found = Nvml(uuid="11").power(1, counter=False)
    assert found.watts == found.watts_average == 689.123


def test_what_a_card_never_answers_is_asked_once(fake: FakeNvml) -> None:
    fake.errors = dict.fromkeys(
        ["nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetPerformanceState"], 3
    )
    fake.errors["nvmlDeviceGetMemoryInfo"] = 999  # for once
    card = Nvml(uuid="11")
    first = card.power(1, counter=True)
    assert (first.energy_mj, first.pstate, first.memory_used) == (-1, -1, -1)
    del fake.errors["nvmlDeviceGetMemoryInfo"]
    assert card.power(2, counter=True).memory_used == 2**36
    assert fake.called.count("nvmlDeviceGetTotalEnergyConsumption") == 1
    card.close()
    assert card.power(3, counter=True) == PowerSample(at_ns=3, watts=-1.0)


def sampled(card: Nvml, waits: Sequence[int], interval_ms: int = 50) -> list[PowerSample]:
    """What is written if each wait takes `waits` ms, and the last one is the end."""
    clock = [0]
    left = list(waits)

    def wait(seconds: float) -> bool:
        assert 0 <= seconds <= interval_ms / 1000
        clock[0] += left.pop(0) * MS
        return not left

    file = BytesIO()
    power.sample(card, file, interval_ns=interval_ms * MS, now_ns=lambda: clock[0], wait=wait)
    return [msgspec.json.decode(line, type=PowerSample) for line in file.getvalue().splitlines()]


def test_the_counter_is_read_five_times_a_second_and_at_the_end(fake: FakeNvml) -> None:
    found = sampled(Nvml(uuid="11"), [50] * 10)
    assert [each.at_ns // MS for each in found] == list(range(0, 501, 50))
    assert [each.energy_mj > 0 for each in found] == [
        at in (0, 200, 400, 500) for at in range(0, 501, 50)
    ]


def test_a_late_sampler_catches_nothing_up(fake: FakeNvml) -> None:
    found = sampled(Nvml(uuid="11"), [50, 500, 50, 50])
    assert [each.at_ns // MS for each in found] == [0, 50, 550, 600, 650]


def test_a_lost_card_ends_it(fake: FakeNvml) -> None:
    card = Nvml(uuid="11")
    fake.errors = {"nvmlDeviceGetPowerUsage": 15}
    found = sampled(card, [50] * 5)
    assert len(found) == 1 and card.lost


def test_the_card_is_the_one_that_cuda_names(
    fake: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def bus_id(ordinal: int) -> str:
        asked.append(ordinal)
        return "0000:18:00.0" if ordinal == 1 else ""

    monkeypatch.setattr(power, "cuda_bus_id", bus_id)
    assert power.card_of("cuda:1").problem == ""
    assert power.card_of("cuda:3").problem == "CUDA has no device 3 for this process"
    assert "CUDA has no device 0" in power.card_of("cuda").problem
    assert asked == [1, 3, 0]
    assert "'cpu' is not a GPU" in power.card_of("cpu").problem
    assert "'cuda:-1' is not a GPU" in power.card_of("cuda:-1").problem
    fake.errors = {"nvmlInit": 9}
    assert power.card_of("cuda:0").problem.startswith("the driver does not answer NVML")


COMMAND = (sys.executable, "-m", "slosched.daemon.member.power")


@pytest.mark.processes
def test_without_a_gpu_it_says_so_and_ends_well(tmp_path: Path) -> None:
    file = tmp_path / "power.jsonl"
    done = subprocess.run(
        [*COMMAND, "--device", "emulated", "--file", str(file)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0 and not file.exists()
    assert "'emulated' is not a GPU" in json.loads(done.stdout)["problem"]


FAKED = """
import sys
from fake_nvml import FakeNvml
sys.modules["pynvml"] = FakeNvml()
from slosched.daemon.member import power
power.cuda_bus_id = lambda ordinal: "0000:18:00.0"
sys.exit(power.main(sys.argv[1:]))
"""


@pytest.mark.processes
@pytest.mark.parametrize("how", ["end of input", "SIGTERM"])
def test_it_ends_with_its_input_or_when_told(tmp_path: Path, how: str) -> None:
    file = tmp_path / "power.jsonl"
    child = subprocess.Popen(
        [sys.executable, "-c", FAKED, "--device=cuda:0", f"--file={file}", "--interval-ms=10"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent,
    )
    try:
        assert child.stdout is not None and child.stdin is not None
        about = json.loads(child.stdout.readline())
        assert about == {"problem": "", "gpu": "NVIDIA H200", "uuid": "GPU-11", "driver": "580.1"}
        child.stdin.write(b"what comes through the input is passed over\n")
        child.stdin.flush()
        if how == "SIGTERM":
            child.send_signal(signal.SIGTERM)
        else:
            child.stdin.close()
        assert child.wait(60) == 0
    finally:
        child.kill()
        child.wait(60)
        for pipe in (child.stdout, child.stdin):
            if pipe is not None:
                pipe.close()
    rows = [msgspec.json.decode(line, type=PowerSample) for line in file.read_bytes().splitlines()]
    assert len(rows) >= 2 and rows[0].energy_mj == rows[-1].energy_mj == 5_000_000
    assert all(row.watts == 701.0 for row in rows)
