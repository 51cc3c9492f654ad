"""How policies of cascades decide (`CascadeOptions`), as options of the commands of experiments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any, cast

import typer

from slosched.cascade_spec import BATCHINGS, ROUTINGS, TIES, CascadeOptions
from slosched.cli.config_options import Options, with_parameters
from slosched.cli.values import duration_ns
from slosched.options import SCHEDULER


def _option(kind: Any, help: str, *flags: str, metavar: str | None = None) -> Any:
    """An option of `kind` that may be left out; without `flags` its flag is its name."""
    option = typer.Option(
        *flags, help=help, metavar=metavar, rich_help_panel=SCHEDULER, show_default=False
    )
    return cast(Any, Annotated)[kind | None, option]


def _one_of(names: Sequence[str], help: str) -> Any:
    return _option(str, help, metavar="|".join(names))


def _switch(flags: str, help: str) -> Any:
    return _option(bool, help, flags)


#: The seed is that of the experiment.
_HINTS: dict[str, Any] = {
    "plan_every": _option(str, "Time between plans. Default 5s.", metavar="DURATION"),
    "over_provision": _option(float, "Factor on the demand of a plan. Default 1.05."),
    "drop_at": _option(
        float,
        "Published policies drop a request whose wait and exec exceed this many SLOs; 0: never. Default 1.",
    ),
    "routing": _one_of(ROUTINGS, "Published policies: which GPU of a stage."),
    "batching": _one_of(BATCHINGS, "Published policies: batch sizes of the plan, or AIMD's."),
    "ties": _one_of(TIES, "DIFFSERVE: which of the plans with the greatest threshold."),
    "queue_term": _switch(
        "--queue-term/--no-queue-term",
        "Published policies: a plan leaves time for the queues. Default yes.",
    ),
    "fixed_threshold": _option(float, "One threshold for the whole run, 0..1. Default: planned."),
    "rejected_answers": _switch(
        "--rejected-answers/--no-rejected-answers",
        "Ours: a light answer below the threshold where the heavy one cannot be in time; else it is refused. "
        "Default yes.",
    ),
    "deferred_part": _option(
        float, "Ours: the part of what the heavy program can take that is deferred. Default 1."
    ),
    "blind_scores": _switch(
        "--blind-scores/--true-scores",
        "Random scores, which say nothing of the request. Default: true ones.",
    ),
}


def takes_cascade_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command` these options; its parameter `options` gets what was given, by name."""
    return with_parameters(command, _HINTS, {}, into="options", make=dict)


def cascade_options(base: CascadeOptions, given: Options) -> CascadeOptions:
    """`base` with what the command line says. Raises InvalidConfig."""
    values = {name: value for name, value in given.items() if value is not None}
    if "plan_every" in values:
        values["plan_every_ns"] = duration_ns("--plan-every", values.pop("plan_every"))
    return replace(base, **values)
