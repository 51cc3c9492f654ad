"""A stand-in for nvidia-ml-py's module `pynvml`: one card, whose answers a test sets."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any


class NVMLError(Exception):
    """As the real one: `value` is NVML's number."""

    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.value = value

    def __str__(self) -> str:
        return {3: "Not Supported", 6: "Not Found", 9: "Driver Not Loaded", 15: "GPU is lost"}.get(
            self.value, f"NVML Error with code {self.value}"
        )


class FakeNvml(ModuleType):
    """`sys.modules["pynvml"] = FakeNvml()`. `errors[name]` is the code that the function then raises.

    `called` holds every function that was called, in order; `open` how often NVML is initialised.
    """

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    NVML_FI_DEV_POWER_INSTANT = 186
    NVML_ERROR_NOT_SUPPORTED, NVML_ERROR_GPU_IS_LOST, NVML_ERROR_RESET_REQUIRED = 3, 15, 16

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.called: list[str] = []
        self.errors: dict[str, int] = {}
        self.open = 0
        self.uuids = {"GPU-11": "handle"}
        self.clocks = {self.NVML_CLOCK_SM: 1980, self.NVML_CLOCK_MEM: 3201}
        self.energy_mj = 5_000_000
        self.instant_mw = 701_000
        self.instant_return = 0  # a field value has an error of its own
        self.answers: dict[str, Any] = {
            "nvmlSystemGetDriverVersion": b"580.1",  # bytes, as in older versions
            "nvmlDeviceGetName": "NVIDIA H200",
            "nvmlDeviceGetUUID": "GPU-11",
            "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=97, memory=41),
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=2**36, total=2**37, free=2**36),
            "nvmlDeviceGetPowerUsage": 689_123,
            "nvmlDeviceGetCurrentClocksEventReasons": 4,
            "nvmlDeviceGetPerformanceState": 0,
        }

    def __getattr__(self, name: str) -> Any:
        answers = self.__dict__["answers"]
        if name not in answers:
            raise AttributeError(name)
        return lambda *handle: self._answer(name, answers[name])

    def _answer(self, name: str, value: Any) -> Any:
        self.called.append(name)
        if name in self.errors:
            raise NVMLError(self.errors[name])
        return value

    def nvmlInit(self) -> None:  # noqa: N802
        self._answer("nvmlInit", None)
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid not in self.uuids:
            raise NVMLError(6)
        return self.uuids[uuid]

    def nvmlDeviceGetHandleByPciBusId(self, bus_id: str) -> str:  # noqa: N802
        if bus_id != "0000:18:00.0":
            raise NVMLError(6)
        return "handle"

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:  # noqa: N802
        return int(self._answer("nvmlDeviceGetClockInfo", self.clocks[kind]))

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        return int(self._answer("nvmlDeviceGetTotalEnergyConsumption", self.energy_mj))

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:  # noqa: N802
        return int(self._answer("nvmlDeviceGetTemperature", 61))

    def nvmlDeviceGetFieldValues(self, handle: str, fields: list[int]) -> list[Any]:  # noqa: N802
        assert fields == [self.NVML_FI_DEV_POWER_INSTANT]
        value = SimpleNamespace(uiVal=self._answer("nvmlDeviceGetFieldValues", self.instant_mw))
        return [SimpleNamespace(value=value, nvmlReturn=self.instant_return)]
