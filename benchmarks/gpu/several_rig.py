"""The rig of several_gpus.py: what its rows need besides workers, controllers and clients."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import exact_answers
import numpy as np
from cpu_plan import on_cpus
from exact_bare import BareController
from exact_rig import Rig, RowFailed, Served, Settings, Worker
from several_bare import with_loads

from slosched.clock import now_ns
from slosched.config_file import load_profile
from slosched.core.worker.emulated import MARK_BYTES
from slosched.gpu_profile import GpuProfile, ModelProfile
from slosched.units import NS_PER_S

#: What the rates of the experiment were meant for.
MEANT_FOR_GPUS = 6
_MEANT_FOR = "v100"
_REFERENCES_S = 60.0
#: After the client's end, until the last compared answers are there.
_ANSWERS_S = 30.0
#: The compared requests' own SLO. They do not count in a row's satisfaction.
_SLO_MS = "500"
#: Requests whose answers are compared: this share of the rate, on top of it, and at least this many a second.
_SHARE, _LEAST_PER_S = 0.005, 5.0
_SEED = 7
#: A worker that serves answers a hello in this time.
_HELLO_S = 3.0


class SeveralRig(Rig):
    """A rig of several GPUs, and the right answers of the model for a set of inputs."""

    def __init__(
        self,
        settings: Settings,
        directory: Path,
        rows: dict[str, dict[str, Any]],
        simulated: dict[str, dict[str, Any]],
    ) -> None:
        """`simulated` has the results of simulations that an earlier command ran, by name."""
        super().__init__(settings, directory, rows)
        self.simulated = simulated
        self._references: Path | None = None
        self._making: subprocess.Popen[bytes] | None = None

    def __exit__(self, *error: object) -> None:
        if self._making is not None:
            self._making.kill()
            self._making.wait()
        super().__exit__(*error)

    def workers(self) -> list[Worker]:
        # The workers take as long to start as the answers to be made.
        self._begin_references()
        return super().workers()

    def profile(self) -> GpuProfile:
        """What the row "profile" measured on GPU 0, with loads as long as the row "loads" found them."""
        return with_loads(super().profile(), self.rows, self.settings.model)

    def rate_for(self, rate: float, *, as_meant: bool) -> float:
        """`rate`; or as much more as these GPUs are faster and more than those that it was meant for."""
        if not as_meant:
            return rate
        meant_ns = load_profile(_MEANT_FOR).model(self.settings.model).exec_ns[1]
        speed = meant_ns / self.model().exec_ns[1]
        return max(1.0, round(rate * self.settings.gpus / MEANT_FOR_GPUS * speed))

    # ------------------------------------------------------------------------- right answers

    def _begin_references(self) -> None:
        if self._references is not None:
            return
        self._references = self.directory / "references.npz"
        if self.settings.emulated:
            write_marks(
                self._references, load_profile(self.settings.profile).model(self.settings.model)
            )
            return
        options = self.settings.worker_options
        dtype = options[options.index("--dtype") + 1] if "--dtype" in options else "float32"
        # On the CPU: the GPUs are measured meanwhile.
        making = [
            sys.executable,
            exact_answers.__file__,
            "references",
            str(self._references),
            "--models",
            self.settings.model,
            "--dtype",
            dtype,
            "--device",
            "cpu",
            *(["--config", str(self.settings.config)] if self.settings.config else []),
        ]
        with (self.directory / "references.log").open("wb") as log, on_cpus(self.cpus.rest):
            self._making = subprocess.Popen(making, stdout=log, stderr=subprocess.STDOUT)

    def references(self) -> Path:
        """Inputs and their right answers. Raises RowFailed if they could not be made."""
        self._begin_references()
        assert self._references is not None
        if self._making is not None:
            code = self._making.wait(_REFERENCES_S)
            if code != 0:
                raise RowFailed(f"the right answers could not be made: exit code {code}")
        return self._references

    # ------------------------------------------------------------------------- the kill

    def process_of(self, worker: Worker) -> int:
        """The process that drives the GPU: the supervisor's child, or the emulated worker itself."""
        parent = worker.child.process.pid
        if self.settings.emulated:
            return parent
        for status in Path("/proc").glob("[0-9]*/status"):
            with contextlib.suppress(OSError):
                if f"\nPPid:\t{parent}\n" in status.read_text():
                    return int(status.parent.name)
        raise RowFailed(f"the supervisor of GPU {worker.gpu} has no process")

    def kill(self, worker: Worker) -> int:
        """End the worker's process as a crash would, and return when. Its supervisor starts it again.

        An emulated worker has no supervisor: this rig starts it again, on the same port.
        """
        process = self.process_of(worker)
        killed_ns = now_ns()
        os.kill(process, signal.SIGKILL)
        if process == worker.child.process.pid:
            worker.child.process.wait()
            self.workers()
        return killed_ns

    def await_workers(self, within_s: float) -> None:
        """Until every worker serves. If one does not in time, all are ended; the next row starts them anew."""
        give_up_ns = min(now_ns() + round(within_s * NS_PER_S), self.until_ns - NS_PER_S)
        for worker in self.workers():
            while not _serves(worker.port):
                if now_ns() > give_up_ns:
                    print(f"  worker {worker.gpu} is not back; all are started anew", flush=True)
                    self.stop_workers()
                    return


def _serves(port: int) -> bool:
    """Whether a controller is welcome there."""
    try:
        with BareController(port) as bare:
            bare.hello(_HELLO_S)
    except RowFailed:
        return False
    return True


def write_marks(path: Path, model: ModelProfile) -> None:
    """Inputs and the answers of emulated GPUs, which begin as their inputs do (core/worker/emulated.py)."""
    draw = np.random.default_rng(_SEED)
    rows = draw.random((exact_answers.INPUTS, *model.input_shape), dtype=np.float32)
    rows = rows.astype(model.input_dtype)
    size = 4 * int(np.prod(model.output_shape))
    answers = np.stack(
        [
            np.frombuffer(row.tobytes()[:MARK_BYTES][:size].ljust(size, b"\0"), np.float32)
            for row in rows
        ]
    )
    arrays = {"inputs": rows, "answers": answers, "tolerance": np.array(1e-6)}
    np.savez(path, **{f"{model.name}/{key}": value for key, value in arrays.items()})  # type: ignore[arg-type]


class Compared:
    """A second client beside a row's own, whose answers are compared with a direct forward pass.

    `found` has what it found, or {"error": ...}: what is wrong with it does not end the row.
    """

    def __init__(self, rig: SeveralRig, rate: float, seconds: float, copies: int) -> None:
        self.rig, self.seconds, self.copies = rig, seconds, copies
        self.rate = max(_LEAST_PER_S, _SHARE * rate)
        self.found: dict[str, Any] = {"error": "it was not begun"}

    @contextlib.contextmanager
    def beside(self, served: Served) -> Iterator[None]:
        """Send and compare while the block runs, and wait for the last answers."""
        log = served.directory / "compared.log"
        try:
            references = self.rig.references()
        except (RowFailed, subprocess.TimeoutExpired) as error:
            self.found = {"error": str(error)}
            yield
            return
        command = [
            sys.executable,
            exact_answers.__file__,
            "load",
            served.address,
            str(references),
            "--rates",
            f"{self.rate:g}:{self.seconds:g}",
            "--copies",
            str(self.copies),
            "--slo-ms",
            _SLO_MS,
        ]
        with log.open("wb") as out, on_cpus(self.rig.cpus.rest):
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            yield
            with contextlib.suppress(subprocess.TimeoutExpired):
                left_s = (self.rig.until_ns - now_ns()) / NS_PER_S
                process.wait(max(0.1, min(_ANSWERS_S, left_s - 5.0)))
        finally:
            process.kill()
            process.wait()
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [
            "nothing"
        ]
        self.found = {"error": f"exit code {process.returncode}: {lines[-1]}"}
        if process.returncode == 0:
            self.found = json.loads(lines[-1])
