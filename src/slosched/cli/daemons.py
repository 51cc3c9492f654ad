"""`slosched worker` and `slosched controller`: the long-running processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slosched.cli.output import Announcer
from slosched.cli.values import (
    duration_ns,
    flag,
    looks_like_address,
    size_bytes,
    whole_number,
    worker_addresses,
)
from slosched.config import CONTROLLER_PORT, FIDELITIES, WORKER_PORT, WorkerConfig
from slosched.errors import InvalidConfig, UnknownName

if TYPE_CHECKING:
    from slosched.config import ControllerConfig, SchedulerConfig

#: The seed's positional options of the controller, in its order.
POSITIONAL_OPTIONS = (
    "generate_inputs", "max_gpus", "schedule_ahead", "default_slo", "max_exec", "max_batch",
)  # fmt: skip

# ------------------------------------------------------------------------------------- worker


def worker(
    port: Annotated[
        int | None,
        typer.Option(help="Port to listen on; the first of several for several real GPUs. "
                          f"Default {WORKER_PORT}; 0 takes a free one."),
    ] = None,
    bind: Annotated[
        str | None, typer.Option(help="Address to listen on. Default 0.0.0.0, all interfaces.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="auto, cuda:N, cpu or emulated. Default auto: every GPU of the host, "
                          "else the CPU."),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(help="How many GPUs. Emulated: behind one address, default 1. "
                          "Real: one process each on consecutive ports, default all."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A worker.toml; options given here win over it."),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(help="What an emulated GPU is: a built-in profile or a TOML file of "
                          "`slosched profile`. Default v100."),
    ] = None,
    weights_cache: Annotated[
        str | None,
        typer.Option(help="GPU memory for weights, for example 10GiB. Default: the profile's, or "
                          "four fifths of the free memory."),
    ] = None,
    torch_threads: Annotated[
        int | None, typer.Option(help="CPU threads of one inference on the device cpu. Default 1.")
    ] = None,
) -> None:  # fmt: skip
    """Run a worker: it executes what a controller plans, each action at its exact time.

    One line says when it is ready. SIGTERM or Ctrl-C finishes what runs, answers the rest and exits 0.
    Without a GPU and without torch, `--device emulated` stands in for GPUs: inferences take the time
    that the profile says and compute nothing.

    \b
    Examples:
      slosched worker                                  # the device that is there, port 12345
      slosched worker --device emulated --gpus 6       # six V100s in one process
      slosched worker --device cuda:1 --port 12346
      slosched worker --config worker.toml             # own models; see daemon/worker.toml
    """
    base = WorkerConfig()
    if config is not None:
        from slosched.config_file import load_worker_config

        base = load_worker_config(config, base)
    given = _given(
        port=port,
        bind=bind,
        device=device,
        gpus=gpus,
        profile=profile,
        torch_threads=torch_threads,
        weights_cache_bytes=_maybe_bytes("--weights-cache", weights_cache),
    )
    resolved = replace(base, **given)
    _check_device(resolved.device)
    raise typer.Exit(_serve_worker(resolved, gpus))


def _check_device(device: str) -> None:
    kind, _, number = device.partition(":")
    if device in ("auto", "cpu", "emulated", "cuda") or (kind == "cuda" and number.isdigit()):
        return
    raise UnknownName("device", device, ["auto", "cuda:N", "cpu", "emulated"])


def _serve_worker(config: WorkerConfig, gpus: int | None) -> int:
    announce = Announcer()
    if config.device in ("auto", "cuda"):
        from slosched.daemon.supervisor import run_workers

        return run_workers(config, announce=announce, gpus=gpus)
    from slosched.daemon.worker import run_worker

    return run_worker(config, announce=announce)


# --------------------------------------------------------------------------------- controller


def controller(
    type_: Annotated[
        str,
        typer.Argument(metavar="TYPE", help="The scheduler: INFER5 (use this), FIFO or ECHO."),
    ],
    rest: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[WORKERS] [OPTION]...",
            help="Clockwork's form: host:port,... and then, in this order, generate_inputs (0 or 1), "
            "max_gpus, schedule_ahead, default_slo, max_exec and max_batch.",
        ),
    ] = None,
    workers: Annotated[
        list[str] | None,
        typer.Option(help="host:port,... or host:12345-12348; may be repeated."),
    ] = None,
    generate_inputs: Annotated[
        bool | None,
        typer.Option("--generate-inputs/--no-generate-inputs",
                     help="Make inputs here for requests that bring none, to load the network. "
                          "Default no."),
    ] = None,
    max_gpus: Annotated[
        int | None, typer.Option(help="Use at most this many GPUs. Default 100.")
    ] = None,
    schedule_ahead: Annotated[
        str | None,
        typer.Option(help="How far ahead work is committed to a GPU, at most. Bare number in ns. "
                          "Default 10ms."),
    ] = None,
    default_slo: Annotated[
        str | None,
        typer.Option(help="The SLO of requests that name none. Bare number in ns. Default 100ms."),
    ] = None,
    max_exec: Annotated[
        str | None,
        typer.Option(help="No batch above 1 that takes longer. Bare number in ns. Default 25ms "
                          "(paper: 250ms)."),
    ] = None,
    max_batch: Annotated[
        int | None, typer.Option(help="No larger batch. Default 16 (paper: 8).")
    ] = None,
    fidelity: Annotated[
        str | None,
        typer.Option(help="best, or paper: the published code's behaviour and constants. "
                          "Default best."),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(help=f"Port for clients. Default {CONTROLLER_PORT}; 0 takes a free one."),
    ] = None,
    bind: Annotated[
        str | None, typer.Option(help="Address to listen on. Default 0.0.0.0, all interfaces.")
    ] = None,
    http_port: Annotated[
        int | None,
        typer.Option(help="Loopback port of /healthz, /readyz and /status. Default 0: the next "
                          "one after --port; -1: none."),
    ] = None,
    log_dir: Annotated[
        str | None,
        typer.Option(help="Directory for the telemetry; a run in it is never overwritten. Default "
                          "$CLOCKWORK_LOG_DIR, else ./slosched-runs/<time>-controller."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A controller.toml; what is given here wins over it."),
    ] = None,
) -> None:  # fmt: skip
    """Run a controller: it plans every inference so that it ends before its deadline.

    Durations are written 5ms, 2.9ms or 30s; a bare number is in ns, as in Clockwork. A request that no
    plan can serve in time is refused at once. SIGTERM or Ctrl-C answers everything, completes the
    telemetry files and exits 0.

    \b
    TYPEs:
      INFER5   deadlines, batching, loading and eviction of weights (the published scheduler's place)
      FIFO     first come, first served, batch 1: a baseline
      ECHO     answers at once without a GPU: measures the network and the client

    \b
    Examples:
      slosched controller INFER5 --workers gpu01:12345,gpu02:12345 --schedule-ahead 5ms
      slosched controller INFER5 --workers gpu01:12345-12348 --default-slo 50ms --log-dir run1
      slosched controller INFER5 gpu01:12345,gpu02:12345 0 6 5000000    # Clockwork's own form
    """
    _check_type(type_)
    positional_workers, positional = _split_positionals(list(rest or []), bool(workers or config))
    addresses = worker_addresses([*positional_workers, *(workers or [])])
    options = _parse_positionals(positional)
    for name, value in (
        ("generate_inputs", generate_inputs),
        ("max_gpus", max_gpus),
        ("schedule_ahead_ns", _maybe_ns("--schedule-ahead", schedule_ahead)),
        ("default_slo_ns", _maybe_ns("--default-slo", default_slo)),
        ("max_exec_ns", _maybe_ns("--max-exec", max_exec)),
        ("max_batch", max_batch),
        ("fidelity", fidelity),
    ):
        if value is None:
            continue
        if name in options:
            written = name.removesuffix("_ns")
            raise InvalidConfig(
                f"{written} is given twice, as a positional value and as --{written.replace('_', '-')}"
            )
        options[name] = value
    base = _base_config(config)
    resolved = replace(
        base,
        scheduler=_scheduler(base.scheduler, type_, options),
        workers=addresses or base.workers,
        **_given(port=port, bind=bind, http_port=http_port, log_dir=log_dir),
    )
    if not resolved.workers:
        raise InvalidConfig("no worker is named; give --workers host:port[,host:port...]")
    if not 0 <= resolved.port <= 65535:
        raise InvalidConfig(f"port must be within 0..65535, not {resolved.port}")
    from slosched.daemon.controller import run_controller

    raise typer.Exit(run_controller(resolved, announce=Announcer()))


def _check_type(type_: str) -> None:
    from slosched.core.scheduler.policies import POLICIES

    if type_ not in POLICIES:
        raise UnknownName("controller TYPE", type_, list(POLICIES))


def _base_config(path: Path | None) -> ControllerConfig:
    from slosched.config import ControllerConfig, SchedulerConfig

    base = ControllerConfig(scheduler=SchedulerConfig(), workers=())
    if path is None:
        return base
    from slosched.config_file import load_controller_config

    return load_controller_config(path, base)


def _scheduler(base: SchedulerConfig, type_: str, options: dict[str, Any]) -> SchedulerConfig:
    fidelity = options.get("fidelity")
    if fidelity is not None and fidelity not in FIDELITIES:
        raise UnknownName("fidelity", str(fidelity), list(FIDELITIES))
    return replace(base, policy=type_, **options)


def _given(**values: object) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _maybe_ns(option: str, text: str | None) -> int | None:
    return None if text is None else duration_ns(option, text)


def _maybe_bytes(option: str, text: str | None) -> int | None:
    return None if text is None else size_bytes(option, text)


def _split_positionals(rest: list[str], workers_given: bool) -> tuple[list[str], list[str]]:
    """Split what follows TYPE into workers and options. Workers may have come by option already."""
    first = rest[0] if rest else ""
    if first and (looks_like_address(first.partition(",")[0]) or not workers_given):
        return [first], rest[1:]
    return [], rest


def _parse_positionals(texts: list[str]) -> dict[str, Any]:
    if len(texts) > len(POSITIONAL_OPTIONS):
        raise InvalidConfig(
            f"{len(texts)} positional options; there are {len(POSITIONAL_OPTIONS)}: "
            f"{' '.join(POSITIONAL_OPTIONS)}"
        )
    options: dict[str, Any] = {}
    for name, text in zip(POSITIONAL_OPTIONS, texts, strict=False):
        if name == "generate_inputs":
            options[name] = flag(name, text)
        elif name in ("max_gpus", "max_batch"):
            options[name] = whole_number(name, text)
        else:
            options[f"{name}_ns"] = duration_ns(name, text)
    return options
