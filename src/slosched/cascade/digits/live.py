"""The cascade of digits served live: the same trace under several policies, every answer kept and measured.

Workers with the CPU device, a controller and a client are processes of their own on 127.0.0.1, started by
their command line and ended here, whatever happens. Every wait has an end.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slosched.cascade.digits.files import CASCADE_FILE, NAME, WORKER_FILE, write_files
from slosched.cascade.digits.kept import Kept, read_kept
from slosched.cascade.digits.served import requests_of
from slosched.cascade.live import follow
from slosched.cascade_spec import CascadeSpec
from slosched.child_processes import computing_threads, environment
from slosched.errors import SloschedError
from slosched.experiment.children import Child, Children, ended_by_signals
from slosched.output_files import write_file
from slosched.units import NS_PER_S

POLICIES = ("CASCADE", "DIFFSERVE", "CLIPPER-LIGHT", "CLIPPER-HEAVY")

_READY_S = 120.0
#: Loading and checking both programs, the last answers and leaving, beyond the length of the trace.
_EXTRA_S = 180.0
#: Seeds of the requests of a trace: far from those that were measured or learnt from.
_FIRST_SEED = 1 << 42
#: The batch size whose throughput is called the capacity.
_CAPACITY_BATCH = 8
#: The lowest rate of a trace, as a part of its peak.
_LOWEST = 0.2

Show = Callable[[str], None]


@dataclass(frozen=True)
class Trace:
    """Requests that come as a Poisson process whose rate rises from a fifth of `peak_per_s` to it and falls
    again.

    `peak` is the peak as a part of `capacity_per_s`, what the workers could answer with the heavy program
    alone in batches of 8, by the exec times of the cascade's file.
    """

    peak: float
    duration_s: float
    capacity_per_s: float
    seed: int = 0

    @property
    def peak_per_s(self) -> float:
        return self.peak * self.capacity_per_s

    def at_ns(self) -> npt.NDArray[np.int64]:
        """The times of the requests, ns from the start, ascending."""
        random = np.random.default_rng(self.seed)
        count = random.poisson(self.peak_per_s * self.duration_s)
        times = np.sort(random.uniform(0, self.duration_s, count))
        height = _LOWEST + (1 - _LOWEST) * (1 - np.cos(2 * math.pi * times / self.duration_s)) / 2
        kept = times[random.uniform(size=count) < height]
        return np.asarray(kept * NS_PER_S, np.int64)


def capacity_per_s(spec: CascadeSpec, workers: int) -> float:
    """Requests/s that `workers` answer with the heavy program alone, in batches of 8."""
    return workers * _CAPACITY_BATCH * NS_PER_S / spec.heavy.exec_ns[_CAPACITY_BATCH]


def run_live(
    spec: CascadeSpec,
    trace: Trace,
    out: Path,
    *,
    workers: int = 2,
    policies: Sequence[str] = POLICIES,
    show: Show = lambda line: None,
) -> dict[str, Kept]:
    """Serve `trace` under each of `policies`, in folders of `out`; the kept answers by policy.

    Raises ChildFailed if a process does not start, fails or does not end in time, SloschedError for a trace
    without requests.
    """
    times = trace.at_ns()
    if not len(times):
        raise SloschedError(
            "the trace has no requests: give a longer --duration or a higher --peak"
        )
    labels, seeds = requests_of(len(times), _FIRST_SEED)
    labels = np.random.default_rng(trace.seed).permutation(labels)
    data = io.BytesIO()
    np.savez(data, at_ns=times, label=labels, seed=seeds)
    requests = out / "requests.npz"
    write_file(requests, data.getvalue())
    write_files(spec, out)
    found = {}
    # One thread each: the number of children is what the trace is scaled by.
    with ended_by_signals(), environment(computing_threads(1)):
        for policy in policies:
            show(f"{policy}: {len(times)} requests in {trace.duration_s:.0f} s")
            run = _Run(policy, workers, requests, out / policy.lower(), trace.duration_s, show)
            with Children() as children:
                run.all(children)
            found[policy] = read_kept(run.answers, labels[:, 0], seeds[:, 0])
    return found


class _Run:
    """One policy's run: workers, controller and client, from the first process to the last."""

    def __init__(
        self,
        policy: str,
        workers: int,
        requests: Path,
        folder: Path,
        duration_s: float,
        show: Show,
    ) -> None:
        self._policy = policy
        self._workers = workers
        self._requests = requests
        self._folder = folder
        self._within_s = duration_s + _EXTRA_S
        self._show = show
        self.answers = folder / "answers.npz"

    def all(self, children: Children) -> None:
        logs = self._folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        settings = self._requests.parent
        words = ["worker", "--device", "cpu", "--config", str(settings / WORKER_FILE)]
        words += ["--bind", "127.0.0.1", "--port", "0"]
        started = [
            children.start(f"worker {place}", words, logs / f"worker-{place}.log")
            for place in range(self._workers)
        ]
        ports = [children.wait_ready(each, within_s=_READY_S) for each in started]
        controller = self._controller(children, ports, settings / CASCADE_FILE, logs)
        port = children.wait_ready(controller, within_s=_READY_S)
        words = ["cascade", "digits", "client", f"127.0.0.1:{port}", NAME]
        words += ["--requests", str(self._requests), "--out", str(self.answers)]
        client = children.start("client", words, logs / "client.log")
        follow(children, client, self._within_s)
        children.end(controller)

    def _controller(
        self, children: Children, ports: Sequence[int], cascade: Path, logs: Path
    ) -> Child:
        workers = ",".join(f"127.0.0.1:{port}" for port in ports)
        words = ["controller", self._policy, "--workers", workers, "--cascade", str(cascade)]
        words += ["--bind", "127.0.0.1", "--port", "0", "--http-port", "-1"]
        words += ["--log-dir", str(self._folder / "run")]
        return children.start("controller", words, logs / "controller.log")


def described(trace: Trace, workers: int, spec: CascadeSpec) -> dict[str, Any]:
    """The settings of the runs for JSON."""
    return {
        "workers": workers,
        "slo_ns": spec.slo_ns,
        "duration_s": trace.duration_s,
        "peak": trace.peak,
        "capacity_per_s": trace.capacity_per_s,
        "peak_per_s": trace.peak_per_s,
        "seed": trace.seed,
        "requests": len(trace.at_ns()),
    }
