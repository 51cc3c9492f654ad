"""`slosched controller`, in our own form and in Clockwork's positional one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from slosched.cli.config_options import Options, takes_options, values_of
from slosched.cli.output import Announcer, warn
from slosched.cli.positional import PositionalCommand
from slosched.cli.values import (
    duration_ns,
    flag,
    looks_like_address,
    scheduler_type,
    whole_number,
    worker_addresses,
)
from slosched.config import ControllerConfig, SchedulerConfig
from slosched.errors import InvalidConfig
from slosched.options import ADDRESSES, row

#: The positional options in the order of Clockwork's controller (controller.cpp), as fields of SchedulerConfig.
POSITIONAL_OPTIONS = (
    "generate_inputs",
    "max_gpus",
    "schedule_ahead_ns",
    "default_slo_ns",
    "max_exec_ns",
    "max_batch",
)

#: Stands in the help for the lines of the TYPEs.
_TYPES = "{TYPES}"

_Type = Annotated[
    str,
    typer.Argument(
        metavar="TYPE",
        help="The scheduler: INFER5 (use this), or one of those below; TYPE:paper for that fidelity.",
    ),
]
_Rest = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[WORKERS] [OPTION]...",
        help="Clockwork's form: host:port,... and then, in this order, generate_inputs (0 or 1), "
        "max_gpus, schedule_ahead, default_slo, max_exec and max_batch.",
    ),
]
_Workers = Annotated[
    list[str] | None,
    typer.Option(
        help="host:port,... or host:12345-12348; may be repeated. Other workers may register.",
        rich_help_panel=ADDRESSES,
    ),
]
_Config = Annotated[
    Path | None, typer.Option(help="A controller.toml; options on the command line override it.")
]


class ControllerCommand(PositionalCommand):
    """Its help lists the policies as they describe themselves; importing them costs too much otherwise."""

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        from slosched.core.scheduler.policies import summaries

        lines = (f"{type_:<17}{summary}" for type_, summary in summaries())
        self.help = (self.help or "").replace(_TYPES, "\n  ".join(lines))
        super().format_help_text(ctx, formatter)


@takes_options(ControllerConfig, SchedulerConfig)
def controller(
    type_: _Type,
    rest: _Rest = None,
    workers: _Workers = None,
    *,
    options: Options,
    config: _Config = None,
) -> None:
    """Run a controller: it plans every inference so that it ends before its deadline.

    Durations are written 5ms, 2.9ms or 30s. A bare number is in seconds, but in ns among the
    positional options, as in Clockwork. A request that no plan can serve in time is refused at
    once. SIGTERM or Ctrl-C answers everything, completes the telemetry files and exits 0.

    \b
    TYPEs:
      {TYPES}

    An installed package may offer more, and module:class names a policy in the current folder
    (docs/my_own_policy.md).

    \b
    Examples:
      slosched controller INFER5 --workers gpu01:12345,gpu02:12345 --schedule-ahead 5ms
      slosched controller INFER5 --workers gpu01:12345-12348 --default-slo 50ms --log-dir run1
      slosched controller INFER5 gpu01:12345,gpu02:12345 0 6 5000000    # Clockwork's own form
      slosched controller INFER5 --join-key cluster.key    # workers register: worker --controller HOST:PORT
    """
    from slosched.core.scheduler.policies import about

    # A TYPE that cannot be used is refused before anything else.
    policy, fidelity = scheduler_type(type_, options["fidelity"])
    ignored = about(policy).ignored_options
    positional_workers, positional = _split_positionals(list(rest or []), bool(workers or config))
    addresses = worker_addresses([*positional_workers, *(workers or [])])
    base = _base_config(config)
    by_option = values_of(SchedulerConfig, {**options, **fidelity})
    scheduler = _merged(_parse_positionals(positional, ignored), by_option)
    resolved = replace(
        base,
        scheduler=replace(base.scheduler, policy=policy, **scheduler),
        workers=addresses or worker_addresses(list(base.workers)),
        **values_of(ControllerConfig, options),
    )
    _check(resolved)
    from slosched.daemon.controller import run_controller

    raise typer.Exit(run_controller(resolved, announce=Announcer()))


def _check(config: ControllerConfig) -> None:
    from slosched.core.scheduler.policies import resolved

    resolved(config.scheduler)


def _base_config(path: Path | None) -> ControllerConfig:
    base = ControllerConfig(scheduler=SchedulerConfig(), workers=())
    if path is None:
        return base
    from slosched.config_file import load_controller_config

    return load_controller_config(path, base)


def _split_positionals(rest: list[str], workers_given: bool) -> tuple[list[str], list[str]]:
    """Split what follows TYPE into workers and options. Workers may have come by option already."""
    first = rest[0] if rest else ""
    if first and (looks_like_address(first.partition(",")[0]) or not workers_given):
        return [first], rest[1:]
    return [], rest


def _parse_positionals(texts: list[str], ignored: tuple[str, ...]) -> dict[str, Any]:
    """Return SchedulerConfig's fields from the positional options; bare durations are in ns.

    `ignored` are further options that TYPE accepts behind them.
    """
    named = [row(SchedulerConfig, field) for field in POSITIONAL_OPTIONS]
    known = (*(each.name for each in named), *ignored)
    if len(texts) > len(known):
        raise InvalidConfig(
            f"{len(texts)} positional options; there are {len(known)}: {' '.join(known)}"
        )
    for name, text in zip(known[len(named) :], texts[len(named) :], strict=False):
        warn(f"{name} {text!r} is not used: the telemetry goes to --log-dir")
    options: dict[str, Any] = {}
    for each, text in zip(named, texts, strict=False):
        if each.plain is bool:
            options[each.field] = flag(each.name, text)
        elif each.unit == "ns":
            options[each.field] = duration_ns(each.name, text, bare_unit="ns")
        else:
            options[each.field] = whole_number(each.name, text)
    return options


def _merged(positional: dict[str, Any], by_option: dict[str, Any]) -> dict[str, Any]:
    for field in by_option:
        if field in positional:
            name = row(SchedulerConfig, field).name
            raise InvalidConfig(
                f"{name} is given twice, as a positional value and as --{name.replace('_', '-')}"
            )
    return {**positional, **by_option}
