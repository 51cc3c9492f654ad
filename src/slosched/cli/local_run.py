"""A live run on this machine: a worker with emulated GPUs, a controller and a client, all children.

Only free ports of 127.0.0.1 are used, and every process is ended.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slosched.config import SchedulerConfig
from slosched.experiment.figures import Part
from slosched.experiment.hosts import this_host
from slosched.experiment.run import run_part
from slosched.loadgen.results import RunResult


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
    part = Part(
        name=directory.name,
        workload=shlex.join(words),
        scheduler=cluster.scheduler,
        duration_ns=duration_ns,
        gpus=cluster.gpus,
        profile=cluster.profile,
        inputs=inputs,
        seed=seed,
    )
    return run_part(part, this_host(gpus=cluster.gpus), directory)
