"""A real Triton beside slosched: requests in time under deadlines, on the same emulated device.

    .venv/bin/python benchmarks/triton_server/beside.py            # 13 minutes on quiet cores; writes triton.md
    .venv/bin/python benchmarks/triton_server/beside.py --quick    # does it work? a minute; writes nothing

Both serve one model whose batches take the times of the profile `v100-linear`, get the same arrivals from one
open-loop client, and take turns within each cell (an SLO and a rate). Triton's settings are searched first, in
short runs of each cell; what is compared is measured anew, with other arrivals. A run that the machine
disturbed is repeated once and counted as void (stall_meter.py). Each run is saved as it ends: after an
interruption the same command goes on where it was. Every process that is started is ended.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import uvloop

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import beside_page  # noqa: E402
from device_model import (  # noqa: E402
    BATCHERS,
    DOCUMENTED,
    INPUTS,
    RULES,
    lateness,
    model_name,
    profile_text,
    timeline_of,
    triton_model,
)
from oip_client import (  # noqa: E402
    FAILED,
    LOST,
    REFUSED,
    HttpTarget,
    NativeTarget,
    Offered,
    Target,
    infer_message,
    offer,
    poisson,
    quantile,
)
from serving_core import commit, machine_line  # noqa: E402
from stall_meter import BOUNDS, StallMeter  # noqa: E402
from triton_process import DEFAULT_CACHE, VERSION, Triton, serving  # noqa: E402

from slosched.clients.aio import AsyncClient, connect  # noqa: E402
from slosched.clients.inference import Model  # noqa: E402
from slosched.clock import monotonic_ns, now_ns  # noqa: E402
from slosched.errors import SloschedError  # noqa: E402
from slosched.experiment.children import Child, Children, ended_by_signals  # noqa: E402
from slosched.gpu_profile import ModelProfile  # noqa: E402
from slosched.output_files import write_file  # noqa: E402
from slosched.telemetry.manifest import describe_host  # noqa: E402
from slosched.units import NS_PER_MS, NS_PER_S  # noqa: E402
from slosched.version import __version__  # noqa: E402

RESULTS = HERE.parent / "results" / "triton.json"
PAGE = HERE.parent / "triton.md"
#: v100-linear's ResNet-50.
EXEC_NS = ModelProfile(
    name="device",
    exec_ns={1: 2_600_000, 2: 3_800_000, 4: 5_600_000, 8: 9_100_000, 16: 15_700_000},
    weights_ns=NS_PER_MS,
    weights_bytes=1,
).interpolated()
CAPACITY = 16 * NS_PER_S / EXEC_NS.exec_ns[16]
LOADS = (0.3, 0.6, 1.0, 1.5, 2.0)
SLOS_MS = (10, 25, 100)
INSTANCES = (1, 2)
#: Cells in which Triton as documented keeps as much in time are not searched.
_ENOUGH = 0.999
_READY_S = 20.0

Record = dict[str, Any]


@dataclass(frozen=True)
class Lengths:
    """Seconds of a run: of the search, and of what is compared; and what is not counted at its begin."""

    search_s: float = 0.7
    final_s: float = 2.2
    settle_s: float = 0.3


@dataclass(frozen=True)
class System:
    """What is measured: slosched by its gateway or its own client, or Triton with some settings.

    `hasty` is the gateway that is told an SLO of 1 ms less, for what the client's side takes.
    """

    kind: str  # gateway, hasty, native, triton
    instances: int = 0
    batcher: str = ""
    rule: str = ""

    @property
    def text(self) -> str:
        return "|".join([self.kind, str(self.instances), self.batcher, self.rule])


GATEWAY, HASTY, NATIVE = System("gateway"), System("hasty"), System("native")
_HASTE_NS = NS_PER_MS


@dataclass(frozen=True)
class Cell:
    slo_ms: int
    load: float

    @property
    def rate(self) -> float:
        return self.load * CAPACITY

    @property
    def text(self) -> str:
        return f"{self.slo_ms}|{self.load:g}"


@dataclass
class Servers:
    """All that runs during the benchmark."""

    directory: Path
    triton: Triton
    gateway_port: int
    children: dict[str, Child]
    client: AsyncClient
    model: Model
    meter: StallMeter

    def processes(self, system: System) -> dict[str, list[int]]:
        """The process ids behind a system, by the name of their part; the client's is our own."""
        ours = {name: [child.process.pid] for name, child in self.children.items()}
        if system.kind == "triton":
            found = {"tritonserver": [self.triton.process.pid], "stubs": self.triton.stubs()}
        elif system.kind != "native":
            found = ours
        else:
            found = {name: pids for name, pids in ours.items() if name != "gateway"}
        return found | {"client": [os.getpid()]}


# ------------------------------------------------------------------------------------- starting


@contextlib.contextmanager
def started(
    directory: Path, cache: Path
) -> Iterator[tuple[Triton, Children, dict[str, Child], int]]:
    """Triton with a model for each setting; a worker, a controller and a gateway of slosched."""
    exec_ns = EXEC_NS.exec_ns
    models = [triton_model(b, n, exec_ns, directory) for b, n in product(BATCHERS, INSTANCES)]
    profile = directory / "profile.toml"
    write_file(profile, profile_text(exec_ns).encode())
    (directory / "triton").mkdir()
    with serving(directory / "triton", models, cache=cache) as triton, Children() as children:
        loopback = ["--bind", "127.0.0.1", "--port", "0"]
        worker = children.start(
            "worker",
            ["worker", "--device", "emulated", "--profile", str(profile), *loopback],
            directory / "worker.log",
        )
        port = children.wait_ready(worker, within_s=_READY_S)
        arguments = ["controller", "INFER5", "--workers", f"127.0.0.1:{port}", *loopback]
        arguments += ["--http-port", "-1", "--log-dir", str(directory / "controller")]
        controller = children.start("controller", arguments, directory / "controller.log")
        port = children.wait_ready(controller, within_s=_READY_S)
        arguments = ["gateway", "--controller", f"127.0.0.1:{port}", "--http-port", "0"]
        arguments += ["--grpc-port", "-1", "--load", "device"]
        gateway = children.start("gateway", arguments, directory / "gateway.log")
        children.wait_ready(gateway, within_s=_READY_S)
        found = {"gateway": gateway, "controller": controller, "worker": worker}
        yield triton, children, found, port


def http_port(gateway: Child) -> int:
    """The port for HTTP in the gateway's ready line."""
    found = re.search(r"ready on \S*:(\d+)", gateway.text())
    assert found is not None  # it was waited for
    return int(found[1])


# ------------------------------------------------------------------------------------ measuring


async def run(
    servers: Servers, system: System, cell: Cell, seconds: float, settle_s: float, seed: int
) -> Record:
    """One run of a system in a cell."""
    slo_ns = cell.slo_ms * NS_PER_MS
    arrivals = poisson(cell.rate, settle_s + seconds, seed)
    first = sum(each < settle_s * NS_PER_S for each in arrivals)
    timeline = timeline_of(servers.directory, _model_of(system))
    before = lateness(timeline, system.instances) if system.instances else []
    start_ns = now_ns()
    found = await _offered(servers, system, slo_ns, arrivals)
    end_ns = now_ns()
    counted = found.behind(first)
    record = _counts(counted) | {"start_ns": start_ns, "end_ns": end_ns, "all_sent": found.sent}
    if system.instances:
        after = lateness(timeline, system.instances)
        record["device_late"] = [b - a for a, b in zip(before, after, strict=True)]
    return record | {"system": system.text, "cell": cell.text, "seed": seed}


def _model_of(system: System) -> str:
    batcher = next((each for each in BATCHERS if each.name == system.batcher), BATCHERS[0])
    return model_name(batcher, system.instances)


async def _offered(
    servers: Servers, system: System, slo_ns: int, arrivals: Sequence[int]
) -> Offered:
    inputs = bytes(4 * INPUTS)
    if system.kind == "native":
        target: Target = NativeTarget(servers.client, servers.model, slo_ns, inputs)
        return await offer(target, arrivals, slo_ns)
    timeout_ns = slo_ns - _HASTE_NS * (system.kind == "hasty")
    name, port = "device", servers.gateway_port
    if system.kind == "triton":
        batcher = next(each for each in BATCHERS if each.name == system.batcher)
        rule = next(each for each in RULES if each.name == system.rule)
        timeout_ns = rule.timeout_ns(slo_ns, batcher, EXEC_NS.exec_ns)
        name, port = _model_of(system), servers.triton.http_port
    message = infer_message(name, inputs, (1, INPUTS), timeout_ns // 1000)
    async with HttpTarget(port, message) as target:
        return await offer(target, arrivals, slo_ns)


def _counts(found: Offered) -> Record:
    return {
        "sent": found.sent,
        "in_time": found.in_time,
        "refused": found.count(REFUSED),
        "failed": found.count(FAILED),
        "lost": found.count(LOST),
        "p50_ns": found.latency(0.5),
        "p99_ns": found.latency(0.99),
        "issue_delay_p99_ns": quantile(found.issue_delay_ns, 0.99),
    }


def watched(servers: Servers, system: System, record: Record) -> Record:
    """The record with the CPU that each process took, and what disturbed the run."""
    start_ns, end_ns = record["start_ns"], record["end_ns"]
    readings = servers.meter.readings(past_ns=end_ns)
    cpu = {
        part: sum(readings.cpu_s(pid, start_ns, end_ns) for pid in pids)
        for part, pids in servers.processes(system).items()
    }
    reasons = list(readings.disturbance(start_ns, end_ns).reasons(BOUNDS))
    return record | {"cpu_s": cpu, "void": reasons}


# -------------------------------------------------------------------------------------- the plan


class Plan:
    """Which runs there are, and what is known of them already."""

    def __init__(self, options: argparse.Namespace, path: Path | None) -> None:
        self.lengths = Lengths(0.3, 0.5, 0.2) if options.quick else Lengths()
        self.cells = [
            Cell(slo, load)
            for slo in SLOS_MS
            for load in LOADS
            if not options.quick or (slo == 25 and load in (0.6, 1.5))
        ]
        self._path = path
        self.document: Record = {
            "format": beside_page.FORMAT,
            "slosched": __version__,
            "commit": commit(),
            "triton": VERSION,
            "machine": machine_line(describe_host()),
            "capacity": CAPACITY,
            "lengths": vars(self.lengths),
            "complete": False,
            "seconds": 0.0,
            "search": {},
            "final": {},
        }
        old = _read(path)
        same = all(old.get(key) == self.document[key] for key in ("format", "commit", "lengths"))
        if same and not old.get("complete") and not options.anew:
            self.document = old
            say(f"goes on with {len(old['search'])} + {len(old['final'])} runs of {path}")

    def save(self) -> None:
        if self._path is not None:
            write_file(self._path, f"{json.dumps(self.document, indent=1)}\n".encode())

    async def search(self, servers: Servers) -> None:
        """Try Triton's settings in each cell."""
        settings = [(b.name, r.name) for b, r in product(BATCHERS, RULES)]
        settings.sort(key=lambda each: each != DOCUMENTED)  # that one first
        for number, cell in enumerate(self.cells):
            for instances in INSTANCES:
                say(f"search, cell {number + 1} of {len(self.cells)}, {instances} instance(s)")
                for batcher, rule in settings:
                    system = System("triton", instances, batcher, rule)
                    key = f"{cell.text}|{system.text}"
                    if key not in self.document["search"]:
                        lengths = self.lengths
                        seed = 1000 + number
                        self.document["search"][key] = await run(
                            servers, system, cell, lengths.search_s, lengths.settle_s, seed
                        )
                    found = self.document["search"][key]
                    if (batcher, rule) == DOCUMENTED and found["in_time"] >= _ENOUGH * found[
                        "sent"
                    ]:
                        break
                self.save()

    def share(self, cell: Cell, system: System) -> float:
        """In time in the search. What was not tried, as the documented setting is good enough, is as good."""
        tried = self.document["search"]
        record = tried.get(f"{cell.text}|{system.text}")
        if record is None:
            documented = System("triton", system.instances, *DOCUMENTED)
            record = tried[f"{cell.text}|{documented.text}"]
        return float(record["in_time"] / max(1, record["sent"]))

    def best(self, cells: Sequence[Cell], instances: int) -> System:
        """The setting with the greatest mean share over these cells."""
        systems = [System("triton", instances, b.name, r.name) for b, r in product(BATCHERS, RULES)]
        return max(systems, key=lambda each: sum(self.share(cell, each) for cell in cells))

    def finals(self, cell: Cell) -> list[System]:
        """What is compared in a cell."""
        found = [GATEWAY, HASTY, NATIVE]
        for instances in INSTANCES:
            documented = System("triton", instances, *DOCUMENTED)
            for each in (
                documented,
                self.best(self.cells, instances),
                self.best([cell], instances),
            ):
                if each not in found:
                    found.append(each)
        return found

    async def compare(self, servers: Servers) -> None:
        """Measure what is compared; systems take turns, and each cell begins with another one."""
        for number, cell in enumerate(self.cells):
            systems = self.finals(cell)
            turn = number % len(systems)
            say(f"compared, cell {number + 1} of {len(self.cells)}: {len(systems)} systems")
            for system in systems[turn:] + systems[:turn]:
                key = f"{cell.text}|{system.text}"
                if key not in self.document["final"]:
                    self.document["final"][key] = await self._final(servers, system, cell, number)
                    self.save()

    async def _final(self, servers: Servers, system: System, cell: Cell, number: int) -> Record:
        lengths, voids = self.lengths, []
        for _ in range(2):
            record = await run(
                servers, system, cell, lengths.final_s, lengths.settle_s, 2000 + number
            )
            record = watched(servers, system, record)
            voids.append(record["void"])
            servers.triton.check()
            if not record["void"]:
                break
        return record | {"voids": voids}


async def measure(plan: Plan, directory: Path, cache: Path) -> None:
    meter_folder = directory / "meter"
    meter_folder.mkdir()
    with (
        started(directory, cache) as (triton, children, parts, port),
        StallMeter(meter_folder) as meter,
    ):
        async with connect(f"127.0.0.1:{port}", name="beside") as client:
            [model] = await client.load("device")
            servers = Servers(
                directory=directory,
                triton=triton,
                gateway_port=http_port(parts["gateway"]),
                children=parts,
                client=client,
                model=model,
                meter=meter,
            )
            await plan.search(servers)
            await plan.compare(servers)
            children.check()


def _read(path: Path | None) -> Record:
    try:
        found = json.loads(path.read_text()) if path is not None else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


_begun_ns = monotonic_ns()


def say(text: str) -> None:
    """One line about what comes next, with the seconds since the begin."""
    print(f"{(monotonic_ns() - _begun_ns) / NS_PER_S:5.0f} s: {text}", file=sys.stderr, flush=True)


def arguments(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Triton beside slosched, on one emulated device.")
    parser.add_argument(
        "--cache", type=Path, default=DEFAULT_CACHE, help="folder of Triton's files"
    )
    parser.add_argument("--out", type=Path, help="file of results (default: the committed ones)")
    parser.add_argument("--anew", action="store_true", help="do not go on with an unfinished run")
    parser.add_argument("--quick", action="store_true", help="does it work? writes only with --out")
    return parser.parse_args(given)


def main(given: Sequence[str]) -> int:
    options = arguments(given)
    plan = Plan(options, options.out or (None if options.quick else RESULTS))
    try:
        with (
            ended_by_signals(),
            tempfile.TemporaryDirectory(prefix="slosched-beside-") as folder,
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            runner.run(measure(plan, Path(folder), options.cache))
    except SloschedError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    plan.document["seconds"] += (monotonic_ns() - _begun_ns) / NS_PER_S
    plan.document["complete"] = True
    plan.save()
    print(beside_page.tables(plan.document))
    if not options.quick and not options.out:
        write_file(PAGE, beside_page.page(plan.document, PAGE).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
