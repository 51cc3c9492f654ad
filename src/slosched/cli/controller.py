"""`slosched controller`, in our own form and in Clockwork's positional one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slosched.cli.output import Announcer, warn
from slosched.cli.positional import PositionalCommand
from slosched.cli.values import (
    duration_ns,
    flag,
    given,
    looks_like_address,
    size_bytes,
    weight_rules,
    whole_number,
    worker_addresses,
)
from slosched.cli.worker import Bind
from slosched.config import CONTROLLER_PORT, EARLY_REFUSAL
from slosched.errors import InvalidConfig

if TYPE_CHECKING:
    from slosched.config import ControllerConfig

#: The positional options in the order of Clockwork's controller (controller.cpp).
POSITIONAL_OPTIONS = (
    "generate_inputs", "max_gpus", "schedule_ahead", "default_slo", "max_exec", "max_batch",
)  # fmt: skip
_DURATIONS = ("schedule_ahead", "default_slo", "max_exec")

#: Stands in the help for the lines of the TYPEs.
_TYPES = "{TYPES}"

_Type = Annotated[
    str,
    typer.Argument(metavar="TYPE", help="The scheduler: INFER5 (use this), or one of those below."),
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
    list[str] | None, typer.Option(help="host:port,... or host:12345-12348; may be repeated.")
]
_GenerateInputs = Annotated[
    bool | None,
    typer.Option(
        "--generate-inputs/--no-generate-inputs",
        help="Generate inputs in the controller for requests without one, to load the network. "
        "Default no.",
    ),
]
_MaxGpus = Annotated[int | None, typer.Option(help="Use at most this many GPUs. Default 100.")]
_ScheduleAhead = Annotated[
    str | None,
    typer.Option(
        help="How far ahead work is committed to a GPU, at most. A bare number is in seconds. Default 10ms."
    ),
]
_DefaultSlo = Annotated[
    str | None,
    typer.Option(
        help="The SLO of requests that name none. A bare number is in seconds. Default 100ms."
    ),
]
_MaxExec = Annotated[
    str | None,
    typer.Option(
        help="No batch above 1 that takes longer. A bare number is in seconds. Default 25ms (paper: 250ms)."
    ),
]
_MaxBatch = Annotated[int | None, typer.Option(help="No larger batch. Default 16 (paper: 8).")]
_Fidelity = Annotated[
    str | None,
    typer.Option(
        help="best, or paper: the published code's behaviour and constants. Default best."
    ),
]
_Weights = Annotated[
    str | None,
    typer.Option(
        metavar="NAME=WEIGHT,...",
        help="What requests are worth under overload (docs/fairness.md): by client, 'batch-*=0.2', and by "
        "SLO, 'slo<=10ms=2'. Default 1 for all.",
    ),
]
_MaxClientWeight = Annotated[
    float | None,
    typer.Option(
        help="The highest weight that a client without a rule may give itself. Default 1."
    ),
]
_ClientWeights = Annotated[
    str | None,
    typer.Option(
        help="value: a client's weight is that of each of its requests; shares: its share of the GPUs, "
        "which no other client can take. Default value."
    ),
]
_EarlyRefusal = Annotated[
    float | None,
    typer.Option(
        help="How early INFER5 refuses what a forecast of its queue gives no chance: how many times the wait "
        "that is forecast must fit before the deadline; 0: only when it is hopeless. "
        f"Default {EARLY_REFUSAL:g}."
    ),
]
_Placement = Annotated[
    str | None,
    typer.Option(
        help="Which weights are loaded over which: gain (requests in time gained for each ms of PCIe), "
        "demand (Clockwork's rule) or lru. Default gain. Not for paper, nor for a TYPE with its own."
    ),
]
_MaxSlo = Annotated[
    str | None, typer.Option(help="Refuse requests with a longer SLO. Default 48h.")
]
_MaxRequests = Annotated[
    int | None,
    typer.Option(
        help="Maximum number of unanswered requests; further ones are refused. Default 500000."
    ),
]
_MaxClientRequests = Annotated[
    int | None,
    typer.Option(help="Maximum number of unanswered requests of one client. Default 100000."),
]
_MaxBytes = Annotated[
    str | None,
    typer.Option(help="Maximum total size of the inputs of unanswered requests. Default 8GiB."),
]
_MaxClientBytes = Annotated[
    str | None,
    typer.Option(help="The same for one client. Default 2GiB."),
]
_MaxClientLoads = Annotated[
    int | None, typer.Option(help="Maximum number of waiting loads of one client. Default 256.")
]
_MaxInstances = Annotated[
    int | None,
    typer.Option(help="Maximum number of model instances, of all names. Default 200000."),
]
_KeepUnused = Annotated[
    str | None,
    typer.Option(help="Unload instances that no client has used for so long. Default 1h."),
]
_Port = Annotated[
    int | None,
    typer.Option(help=f"Port for clients. Default {CONTROLLER_PORT}; 0 takes a free one."),
]
_BusyPoll = Annotated[
    bool | None,
    typer.Option(
        "--busy-poll/--sleep",
        help="Busy-poll: at light load a request is planned about 0.1 ms sooner, at the cost of a "
        "whole core. Default --sleep.",
    ),
]
_HttpPort = Annotated[
    int | None,
    typer.Option(
        help="Loopback port of /healthz, /readyz and /status. Default 0: "
        f"{CONTROLLER_PORT + 1} beside the default --port, else a free one; -1: none."
    ),
]
_LogSize = Annotated[
    str | None,
    typer.Option(
        help="Rotate each log at this size; the older file becomes NAME.1. Default: no rotation."
    ),
]
_LogKeep = Annotated[
    int | None,
    typer.Option(help="With --log-size: number of older files kept of each log. Default 8."),
]
_LogDir = Annotated[
    str | None,
    typer.Option(
        help="Directory for the telemetry; a run in it is never overwritten. Default "
        "$CLOCKWORK_LOG_DIR, else ./slosched-runs/<time>-controller."
    ),
]
_Config = Annotated[
    Path | None, typer.Option(help="A controller.toml; options on the command line override it.")
]


class ControllerCommand(PositionalCommand):
    """Its help lists the policies as they describe themselves; importing them costs too much otherwise."""

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        from slosched.core.scheduler.policies import summaries

        lines = (f"{type_:<9}{summary}" for type_, summary in summaries())
        self.help = (self.help or "").replace(_TYPES, "\n  ".join(lines))
        super().format_help_text(ctx, formatter)


def controller(
    type_: _Type,
    rest: _Rest = None,
    workers: _Workers = None,
    generate_inputs: _GenerateInputs = None,
    max_gpus: _MaxGpus = None,
    schedule_ahead: _ScheduleAhead = None,
    default_slo: _DefaultSlo = None,
    max_exec: _MaxExec = None,
    max_batch: _MaxBatch = None,
    fidelity: _Fidelity = None,
    weights: _Weights = None,
    max_client_weight: _MaxClientWeight = None,
    client_weights: _ClientWeights = None,
    early_refusal: _EarlyRefusal = None,
    placement: _Placement = None,
    max_slo: _MaxSlo = None,
    max_requests: _MaxRequests = None,
    max_client_requests: _MaxClientRequests = None,
    max_bytes: _MaxBytes = None,
    max_client_bytes: _MaxClientBytes = None,
    max_client_loads: _MaxClientLoads = None,
    max_instances: _MaxInstances = None,
    keep_unused: _KeepUnused = None,
    port: _Port = None,
    bind: Bind = None,
    busy_poll: _BusyPoll = None,
    http_port: _HttpPort = None,
    log_dir: _LogDir = None,
    log_size: _LogSize = None,
    log_keep: _LogKeep = None,
    config: _Config = None,
) -> None:
    """Run a controller: it plans every inference so that it ends before its deadline.

    Durations are written 5ms, 2.9ms or 30s. A bare number is in seconds, but in ns among the
    positional options, as in Clockwork. A request that no plan can serve in time is refused at
    once. SIGTERM or Ctrl-C answers everything, completes the telemetry files and exits 0.

    \b
    TYPEs:
      {TYPES}

    \b
    Examples:
      slosched controller INFER5 --workers gpu01:12345,gpu02:12345 --schedule-ahead 5ms
      slosched controller INFER5 --workers gpu01:12345-12348 --default-slo 50ms --log-dir run1
      slosched controller INFER5 gpu01:12345,gpu02:12345 0 6 5000000    # Clockwork's own form
    """
    from slosched.core.scheduler.policies import about

    ignored = about(type_).ignored_options  # an unknown TYPE is refused before anything else
    positional_workers, positional = _split_positionals(list(rest or []), bool(workers or config))
    addresses = worker_addresses([*positional_workers, *(workers or [])])
    by_option = given(
        generate_inputs=generate_inputs,
        max_gpus=max_gpus,
        schedule_ahead_ns=_maybe_ns("--schedule-ahead", schedule_ahead),
        default_slo_ns=_maybe_ns("--default-slo", default_slo),
        max_exec_ns=_maybe_ns("--max-exec", max_exec),
        max_batch=max_batch,
        fidelity=fidelity,
        weights=None if weights is None else weight_rules("--weights", weights),
        max_client_weight=max_client_weight,
        client_weights=client_weights,
        early_refusal=early_refusal,
        placement=placement,
        max_slo_ns=_maybe_ns("--max-slo", max_slo),
        max_requests=max_requests,
        max_client_requests=max_client_requests,
        max_bytes=None if max_bytes is None else size_bytes("--max-bytes", max_bytes),
        max_client_bytes=(
            None if max_client_bytes is None else size_bytes("--max-client-bytes", max_client_bytes)
        ),
        max_client_loads=max_client_loads,
        max_instances=max_instances,
        keep_unused_ns=_maybe_ns("--keep-unused", keep_unused),
    )
    base = _base_config(config)
    options = _merged(_parse_positionals(positional, ignored), by_option)
    resolved = replace(
        base,
        scheduler=replace(base.scheduler, policy=type_, **options),
        workers=addresses or worker_addresses(list(base.workers)),
        **given(
            port=port,
            bind=bind,
            http_port=http_port,
            log_dir=log_dir,
            busy_poll=busy_poll,
            log_bytes=None if log_size is None else size_bytes("--log-size", log_size),
            log_keep=log_keep,
        ),
    )
    _check(resolved)
    from slosched.daemon.controller import run_controller

    raise typer.Exit(run_controller(resolved, announce=Announcer()))


def _check(config: ControllerConfig) -> None:
    from slosched.core.scheduler.policies import resolved

    resolved(config.scheduler)
    if not config.workers:
        raise InvalidConfig("no worker is named; give --workers host:port[,host:port...]")


def _base_config(path: Path | None) -> ControllerConfig:
    from slosched.config import ControllerConfig, SchedulerConfig

    base = ControllerConfig(scheduler=SchedulerConfig(), workers=())
    if path is None:
        return base
    from slosched.config_file import load_controller_config

    return load_controller_config(path, base)


def _maybe_ns(option: str, text: str | None) -> int | None:
    return None if text is None else duration_ns(option, text)


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
    known = (*POSITIONAL_OPTIONS, *ignored)
    if len(texts) > len(known):
        raise InvalidConfig(
            f"{len(texts)} positional options; there are {len(known)}: {' '.join(known)}"
        )
    used = len(POSITIONAL_OPTIONS)
    for name, text in zip(known[used:], texts[used:], strict=False):
        warn(f"{name} {text!r} is not used: the telemetry goes to --log-dir")
    options: dict[str, Any] = {}
    for name, text in zip(POSITIONAL_OPTIONS, texts, strict=False):
        if name == "generate_inputs":
            options[name] = flag(name, text)
        elif name in _DURATIONS:
            options[f"{name}_ns"] = duration_ns(name, text, bare_unit="ns")
        else:
            options[name] = whole_number(name, text)
    return options


def _merged(positional: dict[str, Any], by_option: dict[str, Any]) -> dict[str, Any]:
    for field in by_option:
        if field in positional:
            name = field.removesuffix("_ns")
            raise InvalidConfig(
                f"{name} is given twice, as a positional value and as --{name.replace('_', '-')}"
            )
    return {**positional, **by_option}
