"""What rows share: a worker for each GPU, controllers and clients beside them, and what a row says.

The same workers serve all rows, because starting one costs ten seconds on a GPU; one that has died is started
again by the next row that needs it. Every controller and client belongs to its row and is ended by it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from cpu_plan import CpuPlan, first_siblings, on_cpus, plan_cpus

from slosched.clock import now_ns
from slosched.config import GpuProfile, ModelProfile
from slosched.experiment.children import Child, ChildFailed, Children
from slosched.loadgen.results import RunResult
from slosched.units import NS_PER_S

_LOOPBACK = ("--bind", "127.0.0.1", "--port", "0")
#: A worker imports torch and opens the GPU before it says that it is ready.
_WORKER_READY_S = 120.0
_READY_S = 20.0
#: A worker takes another controller after a second of silence.
_JOINED_S = 8.0
#: Workers finish what runs and free their GPUs within this; what is left is killed.
_END_S = 6.0
#: Loading the copies, awaiting the last answers, leaving.
_CLIENT_EXTRA_S = 60.0
_HELP_S = 60.0
_TAIL_LINES = 12
SCHEDULE_AHEAD = "5ms"
MODEL = "resnet50"
#: What `--device cuda:N` is given, besides the config, where the worker has these options.
WORKER_OPTIONS = (
    "--dtype float16 --channels-last --weights-cache 20GiB --host-cache 8GiB --host-images 64 "
    "--busy-poll"
)
#: Batch 1 on the GPU that the rates of the rows are meant for. An emulated GPU gets rates in proportion.
_MEANT_FOR_B1_NS = 900_000


class RowFailed(Exception):
    """A row cannot be measured; the message says why."""


class NotHere(Exception):
    """A row has no meaning on this device; the message says why."""


@dataclass(frozen=True)
class Settings:
    """How everything is measured. `scale` below 1 shortens runs and shrinks counts, for a dry run.

    `device` is cuda:N, or for several GPUs cuda: the first `gpus` of the host.
    """

    device: str
    profile: str  # of an emulated device
    scale: float
    worker_options: tuple[str, ...]
    config: Path | None
    model: str = MODEL
    gpus: int = 1
    own_cpus: bool = False  # each worker, the controller and the client have CPUs of their own

    def device_of(self, gpu: int) -> str:
        """What the worker of the GPU with this number, from 0, is told."""
        return f"cuda:{gpu}" if self.device == "cuda" else self.device

    @property
    def emulated(self) -> bool:
        return self.device == "emulated"

    def seconds(self, seconds: float) -> float:
        """A run's length, scaled; at least half a second, so that something is sent."""
        return max(0.5, seconds * self.scale)

    def number(self, number: int, *, least: int = 1) -> int:
        """A count, scaled."""
        return max(least, round(number * self.scale))


@dataclass(frozen=True)
class Worker:
    """A worker that serves GPU number `gpu` on `port`."""

    child: Child
    port: int
    gpu: int


@dataclass(frozen=True)
class Served:
    """A controller that serves, and where its logs go."""

    address: str
    directory: Path
    run_dir: Path
    children: Children


class Rig:
    """Processes for the rows. A context: leaving it ends the workers and the simulations.

    `rows` holds what the rows that were measured gave, by name. Files go to `directory`, one folder for
    each start.
    """

    def __init__(
        self, settings: Settings, directory: Path, rows: dict[str, dict[str, Any]]
    ) -> None:
        self.settings, self.directory, self.rows = settings, directory, rows
        self.background = Children((sys.executable,))
        self.options_not_offered: list[str] = []
        self.until_ns = 2**63  # when the row that is measured must have ended
        self._workers = Children()
        self._awake = Children()
        self._started: list[Child] = []  # workers, ready or not
        self._running: dict[int, Worker] = {}  # by GPU
        self.cpus = CpuPlan()
        self._numbers = count()
        self._options: list[str] | None = None

    def __enter__(self) -> Rig:
        self.directory.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.stop_workers()
        finally:
            self._awake.stop()
            self.background.stop()

    def keep_awake(self) -> list[int]:
        """Stay on one CPU of each physical core, and keep those that serve from halting. Returns these.

        Not their siblings: a loop there would slow down whatever works beside it.
        """
        cpus = first_siblings(sorted(os.sched_getaffinity(0)))
        os.sched_setaffinity(0, cpus)
        self.divide_cpus()
        awake = sorted(self.cpus.serving) or cpus
        arguments = ["awake", "--cores", ",".join(map(str, awake))]
        with on_cpus(cpus):
            self._awake.start("awake", arguments, self.new_directory("awake") / "awake.log")
        return awake

    def divide_cpus(self) -> None:
        """Give each worker, the controller and the client CPUs of their own, if the settings say so."""
        if self.settings.own_cpus and not self.cpus.rest:
            self.cpus = plan_cpus(sorted(os.sched_getaffinity(0)), self.settings.gpus)
            if self.cpus.rest:
                os.sched_setaffinity(0, self.cpus.rest)

    # ------------------------------------------------------------------------------- the workers

    def worker_port(self) -> int:
        """The port of GPU 0's worker, which lives. Raises ChildFailed if none becomes ready."""
        return self.workers()[0].port

    def workers(self) -> list[Worker]:
        """A worker that lives for each GPU, in order. Raises ChildFailed if one does not become ready."""
        dead = [
            gpu
            for gpu in range(self.settings.gpus)
            if gpu not in self._running or self._running[gpu].child.process.poll() is not None
        ]
        starting = {gpu: self._start_worker(gpu) for gpu in dead}
        for gpu, child in starting.items():
            port = self._workers.wait_ready(child, within_s=_WORKER_READY_S)
            print(f"  {child.last_line()}", flush=True)
            self._running[gpu] = Worker(child, port, gpu)
        return [self._running[gpu] for gpu in range(self.settings.gpus)]

    def _start_worker(self, gpu: int) -> Child:
        """On the port that it had before, if it had one: controllers know it there."""
        before = self._running.pop(gpu, None)
        if before is not None:
            self._workers.forget(before.child)
            self._started.remove(before.child)
        cpus = self.cpus.of_worker(gpu)
        arguments = [
            "worker",
            "--device",
            self.settings.device_of(gpu),
            "--bind",
            "127.0.0.1",
            "--port",
            str(before.port if before is not None else 0),
            *self._worker_options(),
            *(["--cpu", str(cpus[0])] if cpus else []),
        ]
        name = "worker" if self.settings.gpus == 1 else f"worker-{gpu}"
        with on_cpus(cpus):
            child = self._workers.start(name, arguments, self.new_directory(name) / "worker.log")
        self._started.append(child)
        return child

    def stop_workers(self) -> None:
        """End the workers, if there are any, all at once: their GPUs are free afterwards."""
        give_up_ns = now_ns() + round(_END_S * NS_PER_S)
        try:
            for child in self._started:
                if child.process.poll() is None:
                    child.process.terminate()
            for child in self._started:
                self._workers.wait(child, max(0.0, (give_up_ns - now_ns()) / NS_PER_S))
        finally:
            self._workers.stop()
            self._running.clear()
            self._started.clear()

    def tails(self) -> str:
        """The last lines of the workers' logs and of those in the newest folder: for a row that failed."""
        folders = sorted(path for path in self.directory.iterdir() if path.is_dir())
        logs = [worker.child.log for worker in self._running.values()]
        logs += [log for folder in folders[-1:] for log in sorted(folder.glob("*.log"))]
        return "\n".join(
            f"    {log.parent.name}/{log.name}: {line}"
            for log in dict.fromkeys(logs)
            for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[
                -_TAIL_LINES:
            ]
        )

    def _worker_options(self) -> list[str]:
        if self._options is None:
            wanted = ["--config", str(self.settings.config)] if self.settings.config else []
            if self.settings.emulated:
                self._options = [*wanted, "--profile", self.settings.profile]
            else:
                wanted += self.settings.worker_options
                self._options, self.options_not_offered = split_options(wanted, worker_help())
                if self.options_not_offered:
                    missing = " ".join(self.options_not_offered)
                    print(f"  THE WORKER DOES NOT OFFER: {missing}; measured without", flush=True)
        return self._options

    # ---------------------------------------------------------------- controllers and clients

    def new_directory(self, name: str) -> Path:
        """A place for one start's files."""
        path = self.directory / f"{next(self._numbers):02d}-{name}"
        while path.exists():
            path = self.directory / f"{next(self._numbers):02d}-{name}"
        path.mkdir(parents=True)
        return path

    @contextlib.contextmanager
    def serving(self, name: str, *options: str) -> Iterator[Served]:
        """A controller before the workers, ended at the end; its logs are complete then."""
        directory = self.new_directory(name)
        workers = ",".join(f"127.0.0.1:{worker.port}" for worker in self.workers())
        with Children() as children:
            with on_cpus(self.cpus.controller):
                controller = children.start(
                    "controller",
                    [
                        "controller",
                        "INFER5",
                        "--workers",
                        workers,
                        *_LOOPBACK,
                        "--http-port",
                        "-1",
                        "--schedule-ahead",
                        SCHEDULE_AHEAD,
                        *self._polling(),
                        "--log-dir",
                        str(directory / "run"),
                        *options,
                    ],
                    directory / "controller.log",
                )
            port = children.wait_ready(controller, within_s=_READY_S)
            if self.settings.gpus > 1:
                self._await_joined(controller.log)
            yield Served(f"127.0.0.1:{port}", directory, directory / "run", children)

    def _await_joined(self, log: Path) -> None:
        """Until every worker has joined the controller; a while at most: rows say which workers ran nothing."""
        give_up_ns = now_ns() + round(_JOINED_S * NS_PER_S)
        while log.read_text(encoding="utf-8").count(" joined: ") < self.settings.gpus:
            if now_ns() > give_up_ns:
                print("  NOT EVERY WORKER HAS JOINED", flush=True)
                return
            time.sleep(0.02)

    def _polling(self) -> list[str]:
        """A controller on a real GPU's host has a core to itself, and uses it."""
        return [] if self.settings.emulated else ["--busy-poll"]

    def client(
        self,
        served: Served,
        words: Sequence[str],
        seconds: float,
        *,
        inputs: bool = False,
        log: str = "run",
        meanwhile: Callable[[], None] = lambda: None,
    ) -> RunResult:
        """Run a workload to its end; its log goes to the folder `log`. Raises ChildFailed.

        `meanwhile` is called every 0.2 s.
        The default is the controller's own run directory, as a reader of both wants it.
        """
        summary = served.directory / f"{log}.client.json"
        arguments = [
            "client",
            served.address,
            *words,
            "--inputs" if inputs else "--no-inputs",
            "--duration",
            f"{seconds:g}s",
            "--json",
            "--out",
            str(served.directory / log),
        ]
        children = served.children
        with on_cpus(self.cpus.client):
            client = children.start("client", arguments, summary, stdout=summary)
        give_up_ns = now_ns() + round((seconds + _CLIENT_EXTRA_S) * NS_PER_S)
        code = None
        while code is None and now_ns() < give_up_ns:
            code = children.wait(client, 0.2)
            if code is None:
                children.check()
                meanwhile()
        if code is None:
            raise ChildFailed(f"the client did not end within {seconds + _CLIENT_EXTRA_S:.0f} s")
        children.forget(client)
        if code != 0:
            raise ChildFailed(f"the client ended with exit code {code}; its error stands above")
        return RunResult.from_dict(json.loads(summary.read_text(encoding="utf-8")))

    # --------------------------------------------------------------------------- this run's profile

    def profile(self) -> GpuProfile:
        """What the row "profile" measured. Raises RowFailed without it."""
        if "profile" not in self.rows:
            raise RowFailed("it needs the row 'profile', which is not there")
        return read_profile(self.rows["profile"]["figures"]["profile"])

    def model(self) -> ModelProfile:
        """The measured model's times."""
        return self.profile().model(self.settings.model)

    def rate(self, rate: float) -> float:
        """`rate` on a GPU; on an emulated one as much less as its batch 1 takes longer."""
        if not self.settings.emulated:
            return rate
        return max(1.0, round(rate * _MEANT_FOR_B1_NS / self.model().exec_ns[1]))


def worker_help() -> str:
    """What `slosched worker --help` prints; "" if it fails."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "slosched", "worker", "--help"],
            capture_output=True,
            text=True,
            timeout=_HELP_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def split_options(words: Sequence[str], offered: str) -> tuple[list[str], list[str]]:
    """`words` without the options (and their values) that `offered`, a help page, does not have; and those.

    A help page that could not be read drops nothing: the worker will say itself what it does not know.
    """
    kept: list[str] = []
    dropped: list[str] = []
    target = kept
    for word in words:
        if word.startswith("--"):
            target = kept if not offered or word.partition("=")[0] in offered else dropped
        target.append(word)
    return kept, dropped


def read_profile(document: Mapping[str, Any]) -> GpuProfile:
    """The profile that a row holds, fresh or out of its JSON, where batch sizes have become text."""
    return msgspec.convert(document, GpuProfile, strict=False)


# ---------------------------------------------------------------------------------- what a row says


def check(what: str, value: float | None, unit: str, bound: str = "") -> dict[str, Any]:
    """One line of the table. `bound` is "< 5" or ">= 90"; "" for what is only reported."""
    return {"what": what, "value": value, "unit": unit, "bound": bound}


def percentile(values: Sequence[float] | np.ndarray[Any, Any], percent: float) -> float | None:
    """None of nothing."""
    return float(np.percentile(np.asarray(values), percent)) if len(values) else None


def spread(values: Sequence[float] | np.ndarray[Any, Any]) -> dict[str, float | int | None]:
    """The usual percentiles and how many values they are of."""
    found: dict[str, float | int | None] = {
        f"p{percent:g}": percentile(values, percent) for percent in (1, 50, 90, 99, 99.9)
    }
    return found | {"max": percentile(values, 100), "n": len(values)}


def scaled(value: float | None, by: float) -> float | None:
    """`value / by`; None stays None."""
    return None if value is None else value / by


Row = Callable[[Rig], dict[str, Any]]
