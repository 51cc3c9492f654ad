"""`slosched share carbon`: carbon and cost of runs that are there, by constants of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slosched.cli.ask import Json
from slosched.cli.output import print_json, say, table_text, warn

if TYPE_CHECKING:
    from slosched.share.carbon import Footprint

_HEADINGS = (
    *("run", "mode", "GPU s", "kWh", "operational g", "embodied g", "total g", "USD"),
    *("alone: g", "USD"),
)


def carbon(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder of results.", show_default=False)
    ],
    constants: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="TOML file with constants of your own: the grid's g/kWh (also by the hour), PUE, "
            "lifetime, devices, prices.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Carbon and cost of each run, shared and (alone) of the same requests on a GPU for each model.

    Operational carbon is energy x the grid's g/kWh x PUE; embodied carbon is that of making the GPU by the
    share of its lifetime. What was used is printed below the table.

    \b
    Examples:
      slosched share carbon results
      slosched share carbon results --constants sweden.toml
    """
    from slosched.share.carbon import read_constants
    from slosched.share.found_runs import find_runs
    from slosched.share.outputs import carbon_of

    used = read_constants(constants)
    found = [
        (run, *carbon_of(run.spec, run.result, run.metrics, used))
        for run in find_runs(directory, warn)
        if run.counts
    ]
    if json:
        import msgspec

        print_json(
            [
                {
                    "run": str(run.folder),
                    "carbon": msgspec.to_builtins(shared),
                    "carbon_alone": msgspec.to_builtins(alone),
                }
                for run, shared, alone in found
            ]
        )
        return
    rows = [
        (
            f"{run.point}/{run.mix}".lstrip("/"),
            f"{run.result.mode} r{run.result.repeat}",
            f"{run.metrics.window_s:.4g}",
            *_cells(shared),
            *(map(_number, (alone.total_g, alone.usd)) if alone is not None else ("-", "-")),
        )
        for run, shared, alone in found
    ]
    say(table_text(_HEADINGS, rows))
    for line in dict.fromkeys(_used(shared) for _, shared, _ in found):
        say(line)


def _cells(found: Footprint) -> tuple[str, ...]:
    numbers = (found.kwh, found.operational_g, found.embodied_g, found.total_g, found.usd)
    return tuple(map(_number, numbers))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _used(found: Footprint) -> str:
    """The constants of a footprint in one line."""
    named = ", ".join(
        f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in found.constants.items()
    )
    return f"{found.device or 'unknown device'}: {named}" + (
        f" ({found.problem})" if found.problem else ""
    )
