"""`slosched simulate`: a workload on a cluster in virtual time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slosched.cli.ask import Json
from slosched.cli.output import print_json, print_result, say, table_text, warn
from slosched.cli.sim_options import SimOptions, sim_spec, takes_sim_options
from slosched.cli.stopping import stopped_by_signals
from slosched.cli.workload import announce_trace
from slosched.errors import InvalidConfig
from slosched.units import NS_PER_S, format_duration, format_share

if TYPE_CHECKING:
    from slosched.loadgen.results import RunResult
    from slosched.sim.spec import SimSpec

_Type = Annotated[
    str,
    typer.Argument(
        metavar="TYPE",
        help="The scheduler, as `slosched controller` takes it.",
    ),
]
_Workload = Annotated[
    list[str],
    typer.Argument(
        metavar="WORKLOAD [VALUE]...",
        help="As `slosched client` takes it, or a file.toml that describes it.",
    ),
]
_Seed = Annotated[
    int,
    typer.Option(
        min=0, help="Chooses arrivals (as the client's), exec times, jitter, clocks, faults."
    ),
]
_Seeds = Annotated[int, typer.Option(min=1, help="Number of seeds, from --seed upwards.")]
_Vary = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=V1,V2,...",
        help="Run each value of an option: --vary gpus=4,6,8. Given twice: every combination.",
    ),
]
_Jobs = Annotated[int, typer.Option(min=1, help="Processes for several runs.")]
_Duration = Annotated[
    str | None,
    typer.Option(
        help="End the sending after this much virtual time (60s; a bare number is in seconds). Needed "
        "for a workload that never ends."
    ),
]
_Out = Annotated[
    Path | None,
    typer.Option(
        help="Run directory; for several runs, the folder of all, where complete ones are not run "
        "again. Default ./slosched-runs/<time>-simulation."
    ),
]


@takes_sim_options
def simulate(
    type_: _Type,
    words: _Workload,
    *,
    sim: SimOptions,
    seed: _Seed = 0,
    seeds: _Seeds = 1,
    vary: _Vary = None,
    jobs: _Jobs = 1,
    duration: _Duration = None,
    out: _Out = None,
    json: Json = False,
) -> None:
    """Run a workload on a simulated cluster: the same scheduler, workers and client, in virtual time.

    Nothing waits, so a quiet hour takes seconds; no GPU is needed, and nothing else on the machine can
    disturb the result. The same arguments give the same bytes. The run directory is like a live run's:
    request, action and client logs, and a manifest; `slosched plot` and every other reader take it.

    What is modelled: the client's and the network's delays, the workers' four executors and their exec
    times with noise and stalls, copies over PCIe, drifting clocks. What is not: the CPU time of client,
    controller and worker. docs/simulation.md says more.

    \b
    Examples:
      slosched simulate INFER5 slo-exp-1 resnet50_v2 12 poisson 2400 1 100 1.5 mul 30
      slosched simulate INFER5:paper slo-exp-1 resnet50_v2 12 poisson 600 1.5 17.1 1.5 mul 5 --gpus 6
      slosched simulate FIFO workloads/fig7.toml --seeds 3 --jobs 2 --out fifo
      slosched simulate INFER5 workloads/fig7.toml --vary gpus=4,6,8 --jobs 2 --json
      slosched simulate INFER5 workloads/fig7.toml --exec-sigma 0.01 --stall 0.0001:50ms --jitter 50us
    """
    specs: dict[str, SimSpec] = {}
    for name, options, each in _variants(sim, vary or [], range(seed, seed + seeds)):
        if name in specs:
            raise InvalidConfig(f"--vary: two runs would be called {name}; name each value once")
        specs[name] = sim_spec(words, type_, options, seed=each, duration=duration)
    announce_trace(next(iter(specs.values())).workload)  # all of them have the same one
    from slosched.telemetry.run_dir import default_log_dir

    directory = out or default_log_dir("simulation")
    if len(specs) == 1:
        (spec,) = specs.values()
        raise typer.Exit(_run_one(type_, spec, directory, json=json))
    raise typer.Exit(_run_all(specs, directory, jobs=jobs, json=json))


def _variants(
    sim: SimOptions, vary: Sequence[str], seeds: Sequence[int]
) -> Iterator[tuple[str, SimOptions, int]]:
    """Every combination: its name, which is its folder's too, its options and its seed."""
    axes: list[list[tuple[str, str]]] = []
    for text in vary:
        name, equals, values = text.partition("=")
        if not equals or not values:
            raise InvalidConfig(f"--vary {text!r}: write it as NAME=V1,V2,... (gpus=4,6,8)")
        if any(_same_option(name, other) for (other, _), *_ in axes):
            raise InvalidConfig(
                f"--vary {text!r}: {name} is varied twice; write its values as one list"
            )
        axes.append([(name, value.strip()) for value in values.split(",")])
    for choice in itertools.product(*axes):
        options = sim
        for name, value in choice:
            options = options.with_text(name, value)
        parts = [f"{name}={value}".replace("/", "_") for name, value in choice]
        for seed in seeds:
            named = [*parts, f"seed={seed}"] if len(seeds) > 1 or not parts else parts
            yield ",".join(named), options, seed


def _same_option(name: str, other: str) -> bool:
    return name.replace("_", "-").lstrip("-") == other.replace("_", "-").lstrip("-")


def _title(type_: str, spec: SimSpec) -> str:
    gpus = f"{spec.gpus} GPU{'s' if spec.gpus > 1 else ''}"
    names = list(dict.fromkeys(profile.name for profile in spec.profiles))
    for_ = "" if spec.duration_ns is None else f", for at most {format_duration(spec.duration_ns)}"
    faults = "" if spec.faults is None else f", {len(spec.faults.faults)} fault(s)"
    return (
        f"{spec.workload.describe()}; {type_} on {gpus} ({', '.join(names)}), inputs "
        f"{'on' if spec.inputs else 'off'}, seed {spec.seed}{for_}{faults}"
    )


def _run_one(type_: str, spec: SimSpec, directory: Path, *, json: bool) -> int:
    from slosched.cli.sim_display import SimDisplay
    from slosched.sim.run import simulate as run

    if not json:
        say(_title(type_, spec))
    with stopped_by_signals() as stopping, SimDisplay(spec.workload.name) as display:
        result = run(
            spec,
            out=directory,
            progress=display,
            manifest={"type": type_},
            stop=stopping,
        )
    if json:
        print_json(result.as_dict())
    else:
        print_result(result)
    for warning in result.warnings:
        warn(warning)
    return stopping.exit_code


def _run_all(specs: dict[str, SimSpec], directory: Path, *, jobs: int, json: bool) -> int:
    from slosched.cli.sim_display import JobsDisplay
    from slosched.sim.jobs import Job, run_many

    names = list(specs)
    todo = [Job(spec, directory / name) for name, spec in specs.items()]
    with stopped_by_signals() as stopping, JobsDisplay(names) as display:
        results = run_many(todo, processes=jobs, progress=display, stop=stopping)
    if json:
        print_json([{"run": n, **r.as_dict()} for n, r in zip(names, results, strict=True)])
    else:
        say(_runs_table(names, results))
        for name, result in zip(names, results, strict=True):
            if result.slo_verdict:
                say(f"{name}: {result.slo_verdict}")
        say("in time: client, from the scheduled send; met: controller, from arrival there")
        say(f"written to {directory}")
    return 0


def _runs_table(names: Sequence[str], results: Sequence[RunResult]) -> str:
    """A row for each run, over all its steps."""
    rows: list[list[Any]] = []
    for name, result in zip(names, results, strict=True):
        seconds = sum({step.index: step.duration_ns for step in result.steps}.values()) / NS_PER_S
        good = sum(step.in_time for step in result.steps)
        rows.append(
            [
                name,
                result.sent,
                format_share(result.satisfaction),
                format_share(result.controller_satisfaction),
                f"{good / seconds:.1f}/s" if seconds else "-",
            ]
        )
    return table_text(["run", "sent", "in time", "met", "goodput"], rows)
