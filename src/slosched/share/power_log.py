"""The sampler of power that runs beside a run: a process of its own, started before the idle time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import msgspec

from slosched import child_processes
from slosched.share_spec import PowerSample
from slosched.units import NS_PER_MS

COMMAND = (sys.executable, "-m", "slosched.daemon.member.power")
_END_WITHIN_S = 5.0
#: It says in its first line what it measures; a driver may take seconds to answer.
_LONGEST_FILE = 256 << 20
#: The intervals that the sampler takes, in ms.
_SHORTEST_MS, _LONGEST_MS = 10, 10_000

_decode = msgspec.json.Decoder(PowerSample).decode


class _Said(msgspec.Struct, frozen=True):
    """The first line of the sampler."""

    problem: str = ""
    gpu: str = ""
    uuid: str = ""
    driver: str = ""


class PowerLog:
    """Use it as a context. Where power cannot be measured, `problem` says why and there are no samples."""

    def __init__(
        self,
        device: str,
        folder: Path,
        *,
        every_ns: int = 50 * NS_PER_MS,
        command: Sequence[str] = COMMAND,
    ) -> None:
        interval_ms = min(max(every_ns // NS_PER_MS, _SHORTEST_MS), _LONGEST_MS)
        self._samples, self._answer = folder / "power.jsonl", folder / "power.txt"
        self._errors = folder / "power.log"
        options = {"device": device, "file": self._samples, "interval-ms": interval_ms}
        words = (word for name, value in options.items() for word in (f"--{name}", str(value)))
        self._command = (*command, *words)
        self._process: subprocess.Popen[bytes] | None = None
        self._failed = ""
        if not device.startswith("cuda"):
            self._failed = f"{device} is not a GPU; power is measured on cuda:N"

    def __enter__(self) -> Self:
        if self._failed:
            return self
        self._samples.unlink(missing_ok=True)
        try:
            with self._answer.open("wb") as answer, self._errors.open("wb") as errors:
                self._process = child_processes.start(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=answer.fileno(),
                    stderr=errors.fileno(),
                )
        except OSError as error:
            self._failed = f"the sampler of power does not start: {error.strerror}"
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the sampler; what it has written stays."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() not in (None, 0):
            self._failed = self._failed or f"the sampler of power ended with {process.returncode}"
        with suppress(OSError):
            if process.stdin is not None:
                process.stdin.close()
        child_processes.end(process, within_s=_END_WITHIN_S, ask=False)

    @property
    def begun(self) -> bool:
        """True once there is a sample."""
        with suppress(OSError):
            return self._samples.stat().st_size > 0
        return False

    @property
    def about(self) -> dict[str, str]:
        """The GPU's name, its UUID and the driver, where they are known."""
        first = self._first()
        known = {"gpu": first.gpu, "uuid": first.uuid, "driver": first.driver}
        return {name: text for name, text in known.items() if text}

    @property
    def problem(self) -> str:
        """Why there are no samples, or none any more; "" while there are."""
        if self._failed or self._first().problem:
            return self._failed or self._first().problem
        process = self._process
        if process is not None and process.poll() not in (None, 0):
            return f"the sampler of power ended with {process.returncode}"
        return ""

    def _first(self) -> _Said:
        with suppress(OSError, msgspec.MsgspecError):
            with self._answer.open("rb") as file:
                line = file.readline(4096)
            if line.endswith(b"\n"):
                return msgspec.json.decode(line, type=_Said)
        return _Said()

    def samples(self, begin_ns: int, end_ns: int) -> tuple[PowerSample, ...]:
        """The samples from `begin_ns` to `end_ns`. A line that is not whole yet is passed over."""
        found = []
        with suppress(OSError), self._samples.open("rb") as file:
            for line in file.read(_LONGEST_FILE).split(b"\n"):
                with suppress(msgspec.MsgspecError):
                    sample = _decode(line)
                    if begin_ns <= sample.at_ns <= end_ns:
                        found.append(sample)
        return tuple(found)
