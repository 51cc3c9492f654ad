"""`slosched functions simulate`: the calls of a run again, in virtual time, on other slots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slosched.cli.ask import Json
from slosched.cli.output import print_json, say, table_text, warn
from slosched.cli.values import duration_ns, whole_numbers
from slosched.codes import code_name
from slosched.errors import InvalidConfig
from slosched.units import format_duration

if TYPE_CHECKING:
    from slosched.sim.calls import CallOutcome
    from slosched.telemetry.call_graph import CallGraph

_RunDir = Annotated[
    Path,
    typer.Argument(metavar="RUN_DIR", help="Directory with a run's calls.tsv.", show_default=False),
]
_Slots = Annotated[
    str, typer.Option(metavar="N[,N...]", help="Slots of each worker; a run for each number.")
]
_Workers = Annotated[int, typer.Option(min=1, max=1_000, metavar="N", help="Number of workers.")]
_Gpus = Annotated[
    int | None,
    typer.Option(
        min=1, max=64, help="GPUs of each worker, for the functions that run there. Default 1."
    ),
]
_MostCalls = Annotated[int, typer.Option(min=1, help="Unfinished calls that a worker has at most.")]
_Slo = Annotated[
    str | None,
    typer.Option(
        metavar="DURATION",
        help="SLO of each client's call, which its children inherit (50ms; a bare number is in "
        "seconds). Default: as recorded.",
    ),
]
_Call = Annotated[
    int | None, typer.Option(min=0, help="Only this call and what is below it, by its call_id.")
]
_Seed = Annotated[int, typer.Option(min=0, help="Chooses the delays of the network.")]
_Out = Annotated[
    Path | None,
    typer.Option(help="Write a run directory for each number of slots into this folder."),
]


@dataclass(frozen=True)
class _Row:
    """What became of the calls in one run. Times in ns; latencies are those of clients' calls."""

    name: str
    slots: int  # of all workers; 0: not known
    calls: int
    codes: dict[str, int]
    duration_ns: int
    p50_ns: int
    p99_ns: int
    ran_ns: int

    def cells(self) -> tuple[object, ...]:
        busy = f"{self.ran_ns / (self.slots * self.duration_ns):.0%}" if self.slots else "-"
        codes = ", ".join(f"{n} {code}" for code, n in self.codes.items())
        times = (self.duration_ns, self.p50_ns, self.p99_ns)
        return (self.name, self.calls, *(format_duration(ns) for ns in times), busy, codes)


def simulate(
    run_dir: _RunDir,
    *,
    slots: _Slots = "1,2,4,8",
    workers: _Workers = 1,
    gpus: _Gpus = None,
    most_calls: _MostCalls = 256,
    slo: _Slo = None,
    call: _Call = None,
    seed: _Seed = 0,
    out: _Out = None,
    json: Json = False,
) -> None:
    """Run the recorded calls of a run again in virtual time, on other numbers of slots and workers.

    Clients send when they did. Each call runs as long as it did until it asks for a child or awaits some,
    and ends as it ended; what it waits for is new. So a graph that was recorded on two slots shows what
    eight would make of it, and how much of its time no number of slots can save. docs/functions.md says
    more.

    \b
    Examples:
      slosched functions simulate slosched-runs/20260101T120000Z-controller
      slosched functions simulate run --slots 2,16 --workers 4 --slo 10s --out again
    """
    from slosched.sim.calls import simulate_calls
    from slosched.sim.recorded_calls import recorded_calls, replay_spec
    from slosched.telemetry.call_graph import facts_of

    numbers = whole_numbers("--slots", slots)
    slo_ns = None if slo is None else duration_ns("--slo", slo)
    graph, loads_ns = _read(run_dir, call)
    recorded = recorded_calls(graph, loads_ns=loads_ns)
    rows = [_recorded_row(graph)]
    directories: list[Path] = []
    for number in numbers:
        spec = replay_spec(
            recorded,
            workers=workers,
            slots=number,
            gpus=gpus if recorded.for_gpus else 0,
            most_calls=most_calls,
            slo_ns=slo_ns,
            seed=seed,
        )
        outcome = simulate_calls(spec)
        rows.append(_simulated_row(outcome, number, workers))
        if out is not None:
            about = {"of": str(run_dir), "slots": number, "workers": workers, "slo_ns": slo_ns}
            directories.append(_write(out / f"slots-{number}", outcome, about))
    critical_ns = max(facts_of(graph, root).critical_ns for root in graph.roots if not root.orphan)
    if json:
        print_json(_document(rows, critical_ns, recorded.orphans, directories))
        return
    headings = ("run", "calls", "duration", "p50", "p99", "slots busy", "calls that ended so")
    say(table_text(headings, [row.cells() for row in rows]))
    say("p50, p99: latency of clients' calls")
    say(f"no number of slots makes the longest call shorter than {format_duration(critical_ns)}")
    for directory in directories:
        say(f"wrote {directory}")
    if recorded.orphans:
        warn(
            f"{recorded.orphans} calls are left out, as their parents have no row: the recorded run ended "
            "before these did"
        )


def _read(run_dir: Path, only: int | None) -> tuple[CallGraph, dict[int, list[int]]]:
    """The recorded graph, and the durations of loads by model id."""
    from slosched.analysis.call_runs import graph_of_run, loads_of_run
    from slosched.telemetry.call_graph import CallGraph

    graph = graph_of_run(run_dir)
    if only is not None:
        root = graph.calls.get(only)
        if root is None:
            raise InvalidConfig(f"{run_dir} has no call {only}")
        root.orphan = False
        graph = CallGraph({each.call_id: each for each in graph.below(root)}, [root])
    return graph, loads_of_run(run_dir)


def _recorded_row(graph: CallGraph) -> _Row:
    roots = [root for root in graph.roots if not root.orphan]
    calls = [each for root in roots for each in graph.below(root)]
    return _Row(
        name="recorded",
        slots=0,
        calls=len(calls),
        codes=_codes([each.code for each in calls]),
        duration_ns=max(root.end_ns for root in roots) - min(root.arrival_ns for root in roots),
        p50_ns=_share([root.latency_ns for root in roots], 0.5),
        p99_ns=_share([root.latency_ns for root in roots], 0.99),
        ran_ns=sum(each.exec_ns for each in calls),
    )


def _simulated_row(outcome: CallOutcome, slots: int, workers: int) -> _Row:
    latencies = [each.answered_ns - each.sent_ns for each in outcome.answers]
    of_workers = f" on each of {workers} workers" if workers > 1 else ""
    return _Row(
        name=f"{slots} {'slot' if slots == 1 else 'slots'}{of_workers}",
        slots=slots * workers,
        calls=len(outcome.calls),
        codes=_codes([record.code for record in outcome.calls]),
        duration_ns=max(1, outcome.end_ns),
        p50_ns=_share(latencies, 0.5),
        p99_ns=_share(latencies, 0.99),
        ran_ns=sum(record.exec_ns for record in outcome.calls if not record.gpu),
    )


def _codes(codes: Sequence[int]) -> dict[str, int]:
    return {code_name(code): count for code, count in sorted(Counter(codes).items())}


def _share(values: Sequence[int], share: float) -> int:
    """The smallest value that at least `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1)]


def _write(directory: Path, outcome: CallOutcome, about: dict[str, Any]) -> Path:
    """Write the logs of a simulated run; return where."""
    from slosched.sim.run_files import RunFiles
    from slosched.telemetry.manifest import finish_manifest, write_manifest
    from slosched.telemetry.run_dir import claim_run_dir

    place = claim_run_dir(directory)
    write_manifest(place, "simulation", about)
    files = RunFiles(place)
    for request in outcome.requests:
        files.on_request(request)
    for action in outcome.actions:
        files.on_action(action)
    for part in outcome.parts:
        files.on_call_part(part)
    for record in outcome.calls:
        files.on_call(record)
    finish_manifest(place, files.close())
    return place


def _document(
    rows: Sequence[_Row], critical_ns: int, orphans: int, directories: Sequence[Path]
) -> dict[str, Any]:
    return {
        "runs": [vars(row) for row in rows],
        "critical_ns": critical_ns,
        "orphans": orphans,
        "directories": [str(directory) for directory in directories],
    }
