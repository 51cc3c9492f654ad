"""What a worker asks the driver: complete, cheap where it must be, and silent about what is not there."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import slosched.daemon.backends.nvml as nvml_module
from fake_nvml import FakeNvml
from slosched.daemon.backends.nvml import Nvml
from slosched.messages import GpuStats

NOTHING = GpuStats(gpu_id=2)
#: Fields of answers, which are named like functions.
FIELDS = {"nvmlReturn"}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    module = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


def test_a_sample_says_everything(fake: FakeNvml) -> None:
    card = Nvml(uuid="GPU-11", gpu_id=3)
    assert (card.problem, card.lost) == ("", "")
    assert card.sample() == GpuStats(
        gpu_id=3,
        name="NVIDIA H200",
        uuid="GPU-11",
        driver="580.1",
        sm_percent=97,
        memory_percent=41,
        memory_used_bytes=2**36,
        memory_total_bytes=2**37,
        power_mw=689_123,
        energy_mj=5_000_000,
        temperature_c=61,
        sm_clock_mhz=1980,
        memory_clock_mhz=3201,
        throttle_reasons=4,
    )
    fake.energy_mj += 700
    assert card.sample().energy_mj == 5_000_700


@pytest.mark.parametrize(
    "named", [{"uuid": "GPU-11"}, {"uuid": "11"}, {"pci_bus_id": "0000:18:00.0"}]
)
def test_the_card_is_found_by_either_of_its_names(fake: FakeNvml, named: dict[str, str]) -> None:
    card = Nvml(**named)  # type: ignore[arg-type]
    assert card.problem == "" and card.clock_mhz() == 1980


def test_the_clock_is_warm_and_costs_one_call(fake: FakeNvml) -> None:
    card = Nvml(uuid="11")
    assert fake.called.count("nvmlDeviceGetClockInfo") == 1, "warmed when it was opened"
    fake.called.clear()
    assert card.clock_mhz() == 1980
    assert fake.called == ["nvmlDeviceGetClockInfo"]


def test_what_the_card_does_not_answer_is_unknown_and_asked_no_more(fake: FakeNvml) -> None:
    fake.errors = {
        "nvmlDeviceGetTotalEnergyConsumption": 3,
        "nvmlDeviceGetUtilizationRates": 3,
        "nvmlDeviceGetPowerUsage": 999,  # for once
    }
    card = Nvml(uuid="11")
    sample = card.sample()
    assert (sample.energy_mj, sample.sm_percent, sample.memory_percent) == (-1, -1, -1)
    assert sample.power_mw == -1 and sample.temperature_c == 61
    del fake.errors["nvmlDeviceGetPowerUsage"]
    assert card.sample().power_mw == 689_123
    assert fake.called.count("nvmlDeviceGetTotalEnergyConsumption") == 1
    assert card.lost == ""


def test_a_card_without_a_clock_is_not_asked_for_each_action(fake: FakeNvml) -> None:
    fake.errors = {"nvmlDeviceGetClockInfo": 3}
    card = Nvml(uuid="11")
    asked = len(fake.called)
    assert card.clock_mhz() == 0 and len(fake.called) == asked


def test_an_older_driver_has_another_name_for_its_throttling(fake: FakeNvml) -> None:
    del fake.answers["nvmlDeviceGetCurrentClocksEventReasons"]
    assert Nvml(uuid="11").sample().throttle_reasons == -1
    fake.answers["nvmlDeviceGetCurrentClocksThrottleReasons"] = 8
    assert Nvml(uuid="11").sample().throttle_reasons == 8


def test_a_card_that_fell_off_the_bus_is_noticed(fake: FakeNvml) -> None:
    card = Nvml(uuid="11", gpu_id=2)
    fake.errors = dict.fromkeys([*fake.answers, "nvmlDeviceGetClockInfo"], 15)
    assert card.clock_mhz() == 0
    assert card.lost == "NVML says of NVIDIA H200: GPU is lost"
    assert card.sample().power_mw == -1


def test_without_the_package_a_worker_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it raises ImportError
    card = Nvml(uuid="11", gpu_id=2)
    assert "nvidia-ml-py is missing" in card.problem and "slosched[gpu]" in card.problem
    assert (card.clock_mhz(), card.sample()) == (0, NOTHING)
    card.close()


def test_without_a_driver_or_the_card_it_says_which(fake: FakeNvml) -> None:
    fake.errors = {"nvmlInit": 9}
    card = Nvml(uuid="11", gpu_id=2)
    assert card.problem == "the driver does not answer NVML: Driver Not Loaded"
    assert (card.clock_mhz(), card.sample()) == (0, NOTHING)
    fake.errors = {}
    card = Nvml(uuid="GPU-7", gpu_id=2)
    assert card.problem == "NVML does not find the GPU GPU-7: Not Found"
    assert (card.clock_mhz(), card.sample()) == (0, NOTHING)
    assert "neither a UUID nor a PCI bus id" in Nvml().problem
    assert fake.open == 0, "what could not be used was closed"


def test_closing_twice_lets_nvml_go_once(fake: FakeNvml) -> None:
    card = Nvml(uuid="11", gpu_id=2)
    card.close()
    card.close()
    assert fake.open == 0
    assert (card.clock_mhz(), card.sample()) == (0, NOTHING)


def test_no_setting_of_the_card_is_ever_changed(fake: FakeNvml) -> None:
    card = Nvml(uuid="11")
    card.sample()
    card.clock_mhz()
    source = Path(str(nvml_module.__file__)).read_text()
    named = (set(re.findall(r"\bnvml[A-Z]\w+", source)) | set(fake.called)) - FIELDS
    assert "nvmlDeviceGetPowerUsage" in named
    allowed = re.compile(r"nvml(Init|Shutdown|(Device|System)Get\w+)$")
    assert {name for name in named if not allowed.match(name)} == set()
    slow = {"nvmlDeviceGetPcieThroughput"}  # 20 ms
    assert not named & slow


def test_the_real_library_answers_the_same_questions() -> None:
    """On a machine with a GPU and nvidia-ml-py; the names of the functions, at least, with the latter."""
    real: ModuleType = pytest.importorskip("pynvml")
    source = Path(str(nvml_module.__file__)).read_text()
    older = {"nvmlDeviceGetCurrentClocksThrottleReasons"} | FIELDS
    for name in set(re.findall(r"\bnvml[A-Z]\w+", source)) - older:
        assert callable(getattr(real, name)), name
    try:
        real.nvmlInit()
    except real.NVMLError as error:
        pytest.skip(f"no driver: {error}")
    uuid = real.nvmlDeviceGetUUID(real.nvmlDeviceGetHandleByIndex(0))
    card = Nvml(uuid=uuid)
    sample = card.sample()
    assert card.problem == "" and sample.uuid == card.uuid
    assert sample.memory_total_bytes > sample.memory_used_bytes > 0
    assert card.clock_mhz() > 0
    card.close()
    real.nvmlShutdown()
