"""What the driver says of one GPU, through NVML. It only asks: nothing here changes a setting of the card.

NVML comes as nvidia-ml-py (`slosched[gpu]`). Where that or the driver is missing, an `Nvml` says so in
`problem` and answers "unknown" to everything; a worker runs without it.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from typing import Any

from slosched.messages import GpuStats
from slosched.share_spec import PowerSample

#: NVML's names of errors after which a card answers nothing more to this process.
_GONE = ("NVML_ERROR_GPU_IS_LOST", "NVML_ERROR_RESET_REQUIRED")


class Nvml:
    """One card, found by its `uuid` ("GPU-5ad1..", the prefix may be missing) or its `pci_bus_id`.

    `gpu_id` is the worker's number of it and stands in each sample. Never raises: see `problem`.
    """

    def __init__(self, *, uuid: str = "", pci_bus_id: str = "", gpu_id: int = 0) -> None:
        self.gpu_id = gpu_id
        #: Why nothing is known, in words; empty while the card answers.
        self.problem = ""
        #: Why the card is gone, once NVML has said so; empty as long as it is there.
        self.lost = ""
        self.name = self.uuid = self.driver = ""
        self._nvml: Any = None
        self._error: type[Exception] = Exception
        self._handle: Any = None
        self._gone: tuple[int, ...] = ()
        #: What else the card is asked: a field of GpuStats, and who answers it.
        self._questions: list[tuple[str, Callable[[], int]]] = []
        self._read_clock_mhz: Callable[[], int] | None = None
        self._without: set[str] = set()  # questions of `power` to which this card has no answer
        try:
            import pynvml
        except ImportError as error:
            self.problem = f"nvidia-ml-py is missing ({error}): pip install 'slosched[gpu]'"
            return
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            self.problem = f"the driver does not answer NVML: {error}"
            return
        self._nvml, self._error = pynvml, pynvml.NVMLError
        try:
            self._open(uuid, pci_bus_id)
        except (pynvml.NVMLError, ValueError) as error:
            self.problem = (
                f"NVML does not find the GPU {uuid or pci_bus_id or '(unnamed)'}: {error}"
            )
            self.close()

    def _open(self, uuid: str, pci_bus_id: str) -> None:
        nvml = self._nvml
        if uuid:
            full = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
            handle = nvml.nvmlDeviceGetHandleByUUID(full)
        elif pci_bus_id:
            handle = nvml.nvmlDeviceGetHandleByPciBusId(pci_bus_id)
        else:
            raise ValueError("neither a UUID nor a PCI bus id was given")
        self._handle = handle
        self._gone = tuple(getattr(nvml, name) for name in _GONE if hasattr(nvml, name))
        self.name = _text(self._ask(nvml.nvmlDeviceGetName))
        self.uuid = _text(self._ask(nvml.nvmlDeviceGetUUID))
        with contextlib.suppress(self._error):
            self.driver = _text(nvml.nvmlSystemGetDriverVersion())
        sm, memory = nvml.NVML_CLOCK_SM, nvml.NVML_CLOCK_MEM
        clock = nvml.nvmlDeviceGetClockInfo
        # The older name, before driver 535.
        throttled = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None) or getattr(
            nvml, "nvmlDeviceGetCurrentClocksThrottleReasons", None
        )
        self._read_clock_mhz = lambda: int(clock(handle, sm))
        self._questions = [
            ("power_mw", lambda: nvml.nvmlDeviceGetPowerUsage(handle)),
            ("energy_mj", lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle)),
            ("temperature_c", lambda: _temperature(nvml, handle)),
            ("sm_clock_mhz", lambda: clock(handle, sm)),
            ("memory_clock_mhz", lambda: clock(handle, memory)),
        ]
        if throttled is not None:
            self._questions.append(("throttle_reasons", lambda: throttled(handle)))
        self.clock_mhz()  # the first read takes milliseconds

    # ---------------------------------------------------------------------------- questions

    def clock_mhz(self) -> int:
        """The SM clock now; 0 where it is unknown, as in the action log. One call: 3 us when warm."""
        read = self._read_clock_mhz
        if read is None:
            return 0
        try:
            return read()
        except self._error as error:
            if not self._note(error):
                self._read_clock_mhz = None  # it never will
            return 0

    def sample(self) -> GpuStats:
        """Everything at once, once a second at most and never between two starts: a dozen calls.

        What the card does not answer is -1.
        """
        if self._handle is None:
            return GpuStats(gpu_id=self.gpu_id)
        nvml = self._nvml
        known: dict[str, int] = {}
        used = self._ask(nvml.nvmlDeviceGetUtilizationRates)
        if used is not None:
            known["sm_percent"], known["memory_percent"] = int(used.gpu), int(used.memory)
        memory = self._ask(nvml.nvmlDeviceGetMemoryInfo)
        if memory is not None:
            known["memory_used_bytes"] = int(memory.used)
            known["memory_total_bytes"] = int(memory.total)
        for question in list(self._questions):
            field, answer = question
            try:
                known[field] = int(answer())
            except self._error as error:
                if not self._note(error):
                    self._questions.remove(question)
        return GpuStats(
            gpu_id=self.gpu_id, name=self.name, uuid=self.uuid, driver=self.driver, **known
        )

    def memory_used_bytes(self) -> int:
        """What is in use on the card, by all processes; -1 where it does not answer. One call."""
        nvml = self._nvml
        memory = None if nvml is None else self._known("memory", nvml.nvmlDeviceGetMemoryInfo)
        return -1 if memory is None else int(memory.used)

    def processes(self) -> dict[int, int]:
        """Bytes of the card's memory by process id, of those with a context on it, as the driver numbers them.

        A process whose memory the driver does not tell is left out. Empty where the card does not answer.
        """
        nvml = self._nvml
        if nvml is None:
            return {}
        found = self._known("processes", nvml.nvmlDeviceGetComputeRunningProcesses) or ()
        return {
            int(each.pid): int(each.usedGpuMemory)
            for each in found
            if each.pid and each.usedGpuMemory
        }

    def power(self, at_ns: int, *, counter: bool) -> PowerSample:
        """The power now and what goes with it; -1 is what the card does not answer.

        `counter` asks for the energy counter too, which takes 2.5 to 15 ms on an H200: not for a process that
        serves. Instant power is a field value; before driver 530 the average stands in its place.
        """
        nvml = self._nvml
        if nvml is None:
            return PowerSample(at_ns=at_ns, watts=-1.0)
        average = self._known("average", nvml.nvmlDeviceGetPowerUsage)
        instant = self._known("instant", self._instant_mw)
        used = self._known("utilization", nvml.nvmlDeviceGetUtilizationRates)
        memory = self._known("memory", nvml.nvmlDeviceGetMemoryInfo)
        throttled = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None) or getattr(
            nvml, "nvmlDeviceGetCurrentClocksThrottleReasons", None
        )
        energy = nvml.nvmlDeviceGetTotalEnergyConsumption
        watts = average if instant is None else instant
        return PowerSample(
            at_ns=at_ns,
            watts=-1.0 if watts is None else watts / 1000,
            watts_average=-1.0 if average is None else average / 1000,
            energy_mj=_integer(self._known("energy", energy)) if counter else -1,
            utilization=-1 if used is None else int(used.gpu),
            memory_utilization=-1 if used is None else int(used.memory),
            memory_used=-1 if memory is None else int(memory.used),
            memory_total=-1 if memory is None else int(memory.total),
            temperature=_integer(
                self._known("temperature", lambda handle: _temperature(nvml, handle))
            ),
            sm_mhz=self.clock_mhz() or -1,
            pstate=_integer(self._known("pstate", nvml.nvmlDeviceGetPerformanceState)),
            throttle=_integer(self._known("throttle", throttled)) if throttled else -1,
        )

    def _instant_mw(self, handle: Any) -> int | None:
        field = getattr(self._nvml, "NVML_FI_DEV_POWER_INSTANT", None)
        if field is None:
            return None
        value = self._nvml.nvmlDeviceGetFieldValues(handle, [field])[0]
        return int(value.value.uiVal) if value.nvmlReturn == 0 else None

    def _known(self, name: str, question: Callable[[Any], Any]) -> Any:
        """The card's answer; None if it gives none. What it can never answer is asked once."""
        if name in self._without or self._handle is None:
            return None
        try:
            return question(self._handle)
        except self._error as error:
            if not self._note(error):
                self._without.add(name)
            return None

    def close(self) -> None:
        """Let NVML go; everything is unknown from then on. Idempotent."""
        nvml = self._nvml
        self._handle, self._read_clock_mhz, self._questions = None, None, []
        if nvml is not None:
            self._nvml = None
            with contextlib.suppress(self._error):
                nvml.nvmlShutdown()

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        """What the card answers; None if it does not."""
        try:
            return question(self._handle)
        except self._error as error:
            self._note(error)
            return None

    def _note(self, error: Exception) -> bool:
        """Take note of an answer that was an error. False: this card has no answer to that at all."""
        number = getattr(error, "value", None)
        if number in self._gone:
            self.lost = self.lost or f"NVML says of {self.name or 'the GPU'}: {error}"
        return bool(number != self._nvml.NVML_ERROR_NOT_SUPPORTED)


def cuda_bus_id(ordinal: int) -> str:
    """The PCI bus id of the CUDA device `ordinal`, as this process sees them; "" if CUDA does not say.

    CUDA itself is asked, since its order is not NVML's and CUDA_VISIBLE_DEVICES changes it. No context is made.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        text = ctypes.create_string_buffer(32)
        if cuda.cuInit(0) or cuda.cuDeviceGetPCIBusId(text, len(text), ordinal):
            return ""
    except (OSError, AttributeError):
        return ""
    return text.value.decode(errors="replace")


def _integer(value: Any) -> int:
    return -1 if value is None else int(value)


def _temperature(nvml: Any, handle: Any) -> int:
    return int(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))


def _text(value: Any) -> str:
    """NVML's texts were bytes in older versions of the package."""
    if value is None:
        return ""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
