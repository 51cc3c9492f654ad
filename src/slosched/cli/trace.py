"""`slosched trace`: a run as a trace for Perfetto or chrome://tracing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slosched.cli.ask import Json
from slosched.cli.output import print_json, say, warn
from slosched.errors import InvalidDuration
from slosched.units import format_duration, parse_duration_ns

if TYPE_CHECKING:
    from slosched.analysis.trace import Traced

_RunDir = Annotated[
    Path,
    typer.Argument(
        metavar="RUN_DIR", help="Directory with the controller's logs.", show_default=False
    ),
]
_Out = Annotated[
    Path | None,
    typer.Option(
        help="The file; compressed if its name ends in .gz. Default: trace.json in RUN_DIR."
    ),
]
_From = Annotated[
    str,
    typer.Option(
        "--from", help="Begin this long after the run's start; a bare number is in seconds."
    ),
]
_To = Annotated[
    str | None,
    typer.Option(
        "--to",
        help="End this long after the run's start. Default: the run's end, or after 100,000 "
        "actions, the most that a viewer handles easily.",
    ),
]
_Gpus = Annotated[
    list[str] | None,
    typer.Option(
        "--gpu", metavar="W0-GPU0", help="Only this GPU. Several: again, or with commas between."
    ),
]
_Requests = Annotated[
    int, typer.Option(min=0, help="Number of requests and calls to show, an even sample.")
]
_Flows = Annotated[
    bool,
    typer.Option(
        "--flows/--no-flows",
        help="Arrows from predictions to the actions, and between calls of functions.",
    ),
]


def trace(
    run_dir: _RunDir,
    *,
    out: _Out = None,
    from_: _From = "0s",
    to: _To = None,
    gpu: _Gpus = None,
    requests: _Requests = 200,
    flows: _Flows = True,
    json: Json = False,
) -> None:
    """Write a run, live or simulated, as a trace: open it at ui.perfetto.dev or in chrome://tracing.

    Each worker is a process; each GPU has a track for inferences and one for loads, with the
    predictions beside them. A slice is named by model and batch size, with a suffix if its requests
    were not in time. A refused or failed action is a mark with the reason. Counters show queued and
    unanswered requests, answers per second and goodput. Calls of functions have a track for each slot,
    with arrows from parent to child. docs/planning.md says more.

    \b
    Examples:
      slosched trace slosched-runs/20260101T120000Z-simulation
      slosched trace run --from 10s --to 12s --gpu W0-GPU0 --out trace.json.gz
    """
    from slosched.analysis.trace import Window, parse_gpus, write_trace

    window = Window(
        _time_ns("--from", from_),
        None if to is None else _time_ns("--to", to),
        parse_gpus(gpu or []),
    )
    traced = write_trace(
        run_dir, out or run_dir / "trace.json", window, requests=requests, flows=flows
    )
    if json:
        print_json(traced.as_dict())
    else:
        say(_summary(traced))
    if traced.shortened:
        warn(
            f"this run has {traced.of_actions} actions{_and_calls(traced)}, too many for a viewer: the "
            f"trace ends at {format_duration(traced.end_ns)} of {format_duration(traced.run_ns)}; --from "
            "and --to choose another part"
        )


def _and_calls(traced: Traced) -> str:
    return " and calls of functions" if traced.calls else ""


def _summary(traced: Traced) -> str:
    clipped = (
        f"; {traced.clipped} began within the one before by their worker's clock, and were clipped"
        if traced.clipped
        else ""
    )
    calls = f", {traced.calls} calls of functions" if traced.calls else ""
    return (
        f"{format_duration(traced.start_ns)} to {format_duration(traced.end_ns)} of a run of "
        f"{format_duration(traced.run_ns)}: {traced.actions} actions, {traced.requests} of the requests{calls}"
        f"{clipped}\nwrote {traced.path} ({traced.events} events); open it at https://ui.perfetto.dev"
    )


def _time_ns(option: str, text: str) -> int:
    """A time after the start, which may be 0."""
    try:
        return parse_duration_ns(text, bare_unit="s")
    except InvalidDuration as error:
        raise InvalidDuration(f"{option}: {error}") from None
