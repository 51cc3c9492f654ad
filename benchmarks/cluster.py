"""Real daemons on loopback, as child processes of a benchmark: started, loaded, measured, ended."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from slosched.experiment.children import Child, ChildFailed, Children
from slosched.telemetry.client_log import FILE_NAME, read_client_log
from slosched.telemetry.table import LogTable

_LOOPBACK = ("--bind", "127.0.0.1", "--port", "0")
_WORKER_READY_S = 20.0
_CONTROLLER_READY_S = 20.0
#: Loading the copies, awaiting the last answers, leaving.
_CLIENT_EXTRA_S = 60.0
#: As in the published experiment (`0 6 5000000`).
SCHEDULE_AHEAD = "5ms"
PROFILE = "v100"


@dataclass(frozen=True)
class Load:
    """One run of slo-exp-1. SLOs are as the command takes them: "1.5", or "25ms"."""

    rate: float
    copies: int
    slo_start: str
    slo_end: str
    period_s: float
    slo_factor: str = "1.5"
    inputs: bool = False
    seed: int = 0
    steps: int = 1

    def arguments(self) -> list[str]:
        """The command's words after the controller's address."""
        return [
            "slo-exp-1",
            "resnet50_v2",
            str(self.copies),
            "poisson",
            f"{self.rate:g}",
            self.slo_start,
            self.slo_end,
            self.slo_factor,
            "mul",
            f"{self.period_s:g}s",
            "--inputs" if self.inputs else "--no-inputs",
            "--seed",
            str(self.seed),
        ]


@dataclass
class Cluster:
    """A worker and a controller that serve, and the clients that load them."""

    directory: Path
    gpus: int
    children: Children
    worker: Child
    controller: Child
    address: str
    _runs: Iterator[int] = field(default_factory=count)

    def run_client(self, load: Load) -> tuple[LogTable, int]:
        """Run a load to its end; return its log and the client's process id. Raises ChildFailed."""
        client, out = self.start_client(load)
        code = self.children.wait(client, load.period_s * load.steps + _CLIENT_EXTRA_S)
        if code != 0:
            what = "did not end in time" if code is None else f"ended with exit code {code}"
            raise ChildFailed(f"the client {what}: {client.last_line()}")
        self.children.forget(client)
        self.children.check()
        return read_client_log(out / FILE_NAME), client.process.pid

    def start_client(self, load: Load) -> tuple[Child, Path]:
        """Start a load; return the client and its run directory."""
        out = self.directory / f"client-{next(self._runs)}"
        arguments = ["client", self.address, *load.arguments(), "--out", str(out)]
        return self.children.start("client", arguments, self.directory / f"{out.name}.log"), out


@contextlib.contextmanager
def serving(directory: Path, *, gpus: int, profile: str = PROFILE) -> Iterator[Cluster]:
    """A worker with `gpus` emulated GPUs and its controller, on free ports; both ended at the end.

    Raises ChildFailed if one of them does not become ready.
    """
    directory.mkdir(parents=True)
    with Children() as children:
        worker = children.start(
            "worker",
            [
                "worker",
                "--device",
                "emulated",
                "--gpus",
                str(gpus),
                "--profile",
                profile,
                *_LOOPBACK,
            ],
            directory / "worker.log",
        )
        port = children.wait_ready(worker, within_s=_WORKER_READY_S)
        controller = children.start(
            "controller",
            controller_arguments(port, directory / "controller"),
            directory / "controller.log",
        )
        port = children.wait_ready(controller, within_s=_CONTROLLER_READY_S)
        yield Cluster(directory, gpus, children, worker, controller, f"127.0.0.1:{port}")


def controller_arguments(worker_port: int, log_dir: Path) -> list[str]:
    """The words of the controller that every part measures."""
    return [
        "controller",
        "INFER5",
        "--workers",
        f"127.0.0.1:{worker_port}",
        *_LOOPBACK,
        "--http-port",
        "-1",
        "--schedule-ahead",
        SCHEDULE_AHEAD,
        "--log-dir",
        str(log_dir),
    ]
