"""A live run on this machine: a worker with emulated GPUs, a controller and a client, all children.

Only free ports of 127.0.0.1 are used, and the caller ends every process.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slosched.cli.children import Child, ChildFailed, Children
from slosched.cli.config_options import command_line
from slosched.config import SchedulerConfig
from slosched.loadgen.results import RunResult
from slosched.units import NS_PER_S

_LOOPBACK = ("--bind", "127.0.0.1", "--port", "0")
_READY_S = 30.0
#: Loading all copies, awaiting the last answers, leaving.
_CLIENT_EXTRA_S = 180.0
_POLL_S = 0.5


@dataclass(frozen=True)
class Cluster:
    """What serves: one worker process with `gpus` emulated GPUs of `profile` (a name or a file)."""

    scheduler: SchedulerConfig
    gpus: int
    profile: str


def run_locally(
    directory: Path,
    cluster: Cluster,
    words: Sequence[str],
    *,
    seed: int,
    duration_ns: int,
    inputs: bool = False,
) -> RunResult:
    """Run a workload live and return what came of it; `directory` (made here) gets all files.

    `words` are the workload's command (a name and its values, or a TOML file); `duration_ns` is how
    long it sends at most. The run directory of controller and client is `RunResult.run_dir`. Raises
    ChildFailed if a process does not start, fails or does not end in time.
    """
    directory.mkdir(parents=True)
    run = directory / "run"
    with Children() as children:
        worker = ["worker", "--device", "emulated", "--gpus", str(cluster.gpus)]
        worker += ["--profile", cluster.profile, *_LOOPBACK]
        port = _serve(children, "worker", worker, directory)
        port = _serve(children, "controller", _controller(cluster.scheduler, port, run), directory)
        client = ["client", f"127.0.0.1:{port}", *words, "--seed", str(seed), "--json"]
        client += ["--inputs" if inputs else "--no-inputs", "--duration", f"{duration_ns}ns"]
        summary = directory / "client.json"
        started = children.start("client", [*client, "--out", str(run)], summary, stdout=summary)
        _await(children, started, duration_ns / NS_PER_S + _CLIENT_EXTRA_S)
    return RunResult.from_dict(json.loads(summary.read_text(encoding="utf-8")))


def _serve(children: Children, name: str, arguments: Sequence[str], directory: Path) -> int:
    child = children.start(name, arguments, directory / f"{name}.log")
    return children.wait_ready(child, within_s=_READY_S)


def _controller(scheduler: SchedulerConfig, worker_port: int, run: Path) -> list[str]:
    """The command of a controller with exactly these options."""
    from slosched.core.scheduler.policies import resolved

    scheduler = resolved(scheduler)
    return [
        "controller",
        scheduler.policy,
        "--workers",
        f"127.0.0.1:{worker_port}",
        *_LOOPBACK,
        "--http-port",
        "-1",
        "--log-dir",
        str(run),
        *command_line(scheduler),
    ]


def _await(children: Children, client: Child, within_s: float) -> None:
    for _ in range(int(within_s / _POLL_S)):
        code = children.wait(client, _POLL_S)
        if code is not None:
            break
        children.check()
    else:
        raise ChildFailed(f"the client did not end within {within_s:.0f} s")
    children.forget(client)
    if code != 0:
        raise ChildFailed(f"the client ended with exit code {code}; its error stands above")
