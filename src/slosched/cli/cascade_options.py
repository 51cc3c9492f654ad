"""How policies of cascades decide (`CascadeOptions`), as options of the commands of experiments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

import typer

from slosched.cascade_spec import BATCHINGS, ROUTINGS, TIES, CascadeOptions
from slosched.cli.config_options import Options, with_parameters
from slosched.cli.values import duration_ns
from slosched.options import SCHEDULER


def _option(*flags: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(
        *flags, help=help, metavar=metavar, rich_help_panel=SCHEDULER, show_default=False
    )


#: The seed is that of the experiment.
_HINTS: dict[str, Any] = {
    "plan_every": Annotated[
        str | None,
        _option("--plan-every", help="Time between plans. Default 5s.", metavar="DURATION"),
    ],
    "over_provision": Annotated[
        float | None,
        _option("--over-provision", help="Factor on the demand of a plan. Default 1.05."),
    ],
    "drop_at": Annotated[
        float | None,
        _option(
            "--drop-at",
            help="Published policies drop a request whose wait and exec exceed this many SLOs; 0: never. "
            "Default 1.",
        ),
    ],
    "routing": Annotated[
        str | None,
        _option(
            "--routing",
            help="Published policies: which GPU of a stage.",
            metavar="|".join(ROUTINGS),
        ),
    ],
    "batching": Annotated[
        str | None,
        _option(
            "--batching",
            help="Published policies: batch sizes of the plan, or AIMD's.",
            metavar="|".join(BATCHINGS),
        ),
    ],
    "ties": Annotated[
        str | None,
        _option(
            "--ties",
            help="DIFFSERVE: which of the plans with the greatest threshold.",
            metavar="|".join(TIES),
        ),
    ],
    "queue_term": Annotated[
        bool | None,
        _option(
            "--queue-term/--no-queue-term",
            help="Published policies: a plan leaves time for the queues. Default yes.",
        ),
    ],
    "fixed_threshold": Annotated[
        float | None,
        _option(
            "--fixed-threshold", help="One threshold for the whole run, 0..1. Default: planned."
        ),
    ],
    "rejected_answers": Annotated[
        bool | None,
        _option(
            "--rejected-answers/--no-rejected-answers",
            help="Ours: a light answer below the threshold where the heavy one cannot be in time; else it is "
            "refused. Default yes.",
        ),
    ],
    "deferred_part": Annotated[
        float | None,
        _option(
            "--deferred-part",
            help="Ours: the part of what the heavy program can take that is deferred. Default 1.",
        ),
    ],
    "blind_scores": Annotated[
        bool | None,
        _option(
            "--blind-scores/--true-scores",
            help="Random scores, which say nothing of the request. Default: true ones.",
        ),
    ],
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
