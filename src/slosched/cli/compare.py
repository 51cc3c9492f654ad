"""`slosched compare`: several policies on the same arrivals, in virtual time."""

from __future__ import annotations

import json as json_text
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slosched.cli.ask import Json
from slosched.cli.output import print_json, say, warn
from slosched.cli.sim_options import SimOptions, changed, takes_sim_options
from slosched.cli.stopping import stopped_by_signals
from slosched.cli.workload import workload_of
from slosched.errors import InvalidConfig, MissingPackage
from slosched.output_files import check_folder, check_output, utf8_document, write_file

if TYPE_CHECKING:
    from slosched.analysis.compare import Comparison
    from slosched.loadgen.results import RunResult
    from slosched.sim.jobs import Job

FILE_NAME = "compare.json"

_Policies = Annotated[
    str,
    typer.Argument(
        metavar="TYPE,TYPE,...",
        help="Schedulers, as `slosched controller` takes them; TYPE:paper for that fidelity. The others are "
        "compared with the first.",
    ),
]
_Workload = Annotated[
    list[str],
    typer.Argument(
        metavar="WORKLOAD [VALUE]...",
        help="As `slosched client` takes it, or a file.toml that describes it.",
    ),
]
_Seed = Annotated[int, typer.Option(min=0, help="The first seed.")]
_Seeds = Annotated[
    int,
    typer.Option(min=1, help="Number of seeds, from --seed upwards: they give the intervals."),
]
_Jobs = Annotated[int, typer.Option(min=1, help="Processes that share the runs.")]
_Duration = Annotated[
    str | None,
    typer.Option(
        help="End the sending after this much virtual time (60s; a bare number is in seconds). Needed "
        "for a workload that never ends."
    ),
]
_Bound = Annotated[
    bool,
    typer.Option(
        "--bound",
        help="Hold the first seed's runs also against what any scheduler could reach, as `slosched bound` "
        "says (slower; open loops only; needs slosched[bound]).",
    ),
]
_Out = Annotated[
    Path | None,
    typer.Option(
        help="Folder for the runs' directories, compare.json and the figure. Complete runs in it are "
        "not run again. Default ./slosched-runs/<time>-compare."
    ),
]


@takes_sim_options
def compare(
    policies: _Policies,
    words: _Workload,
    *,
    sim: SimOptions,
    seed: _Seed = 0,
    seeds: _Seeds = 3,
    jobs: _Jobs = 1,
    duration: _Duration = None,
    bound: _Bound = False,
    out: _Out = None,
    json: Json = False,
) -> None:
    """Run several schedulers on the same workload in virtual time, and compare them with the first.

    For each seed every scheduler gets the same arrivals, GPUs and disturbances, so a difference is the
    scheduler's own. Prints a row for each step and scheduler: the share in time (client, from the
    scheduled send) and how many points it is ahead of the first, goodput and p99 of successes with
    their ratios to the first's. Behind +- stands half of a 95 % interval over the seeds. "holds" says
    whether 99 % are in time, with 99 % confidence (docs/verdicts.md), from all seeds together. Draws the
    share in time over the steps (PNG and PDF; needs slosched[plot]).

    With --bound a second table has, for the requests at the beginning of each step, a bound that no
    scheduler exceeds, the result of one that knows the future, and how close each scheduler comes; in
    the figure they are the dotted and the dashed line. In that table the controller judges.

    If it is stopped and started again with the same --out, it continues where it stopped.

    \b
    Examples:
      slosched compare INFER5,FIFO slo-exp-1 resnet50_v2 12 poisson 2400 1.5 17.1 1.5 mul 10
      slosched compare INFER5,INFER5:paper,FIFO,EDF,REJECT,AIMD workloads/fig7.toml \\
          --profile fig7 --seeds 3 --jobs 2 --out baselines
      slosched compare INFER5,FIFO slo-exp-1 resnet50_v2 12 poisson 2400 2.25 5 1.5 mul 2 --seeds 1 --bound
    """
    from slosched.cli.sim_display import JobsDisplay
    from slosched.sim.jobs import run_many
    from slosched.telemetry.run_dir import default_log_dir

    directory = out or default_log_dir("compare")
    check_folder(directory)
    check_output(directory / FILE_NAME)
    jobs_of = _jobs(_types(policies), words, sim, range(seed, seed + seeds), duration, directory)
    if bound:
        _check_bound(next(iter(jobs_of.values())), sim)
    names = [f"{type_} seed={each}" for type_, each in jobs_of]
    if not json:
        (first, *_) = jobs_of.values()
        count = f"{seeds} seed{'s' if seeds > 1 else ''}"
        say(f"{first.spec.workload.describe()}; {policies} on {sim.gpus} GPU(s), {count}")
    with stopped_by_signals() as stopping, JobsDisplay(names) as display:
        todo = list(jobs_of.values())
        results = run_many(todo, processes=jobs, progress=display, stop=stopping)
    runs: dict[str, dict[int, RunResult]] = {}
    for (type_, each), result in zip(jobs_of, results, strict=True):
        runs.setdefault(type_, {})[each] = result
    held = _held(next(iter(jobs_of.values())), runs, sim) if bound else None
    _conclude(runs, sim, directory, held, json=json)


def _slo_verdicts(comparison: Comparison) -> dict[str, str]:
    """At which steps the SLO holds under each scheduler, in words."""
    from slosched.loadgen.verdict import sentence

    return {
        policy: sentence(
            policy,
            [
                (f"{step.slo} {step.group}".rstrip(), cell.holds)
                for step in comparison.swept
                for cell in step.cells
                if cell.policy == policy
            ],
        )
        for policy in comparison.policies
    }


def _types(policies: str) -> list[str]:
    types = [part.strip() for part in policies.split(",")]
    for place, type_ in enumerate(types):
        if not type_:
            raise InvalidConfig(f"{policies!r}: write the TYPEs as INFER5,FIFO with commas between")
        if type_ in types[:place]:
            raise InvalidConfig(f"the TYPE {type_} is named twice")
    return types


def _jobs(
    types: list[str],
    words: list[str],
    sim: SimOptions,
    seeds: range,
    duration: str | None,
    directory: Path,
) -> dict[tuple[str, int], Job]:
    """A job for each policy and seed, in the order of the table."""
    from slosched.sim.jobs import Job

    workload = workload_of(words)
    return {
        (type_, seed): Job(
            sim.spec(type_, workload, seed=seed, duration=duration),
            directory / type_.replace(":", "-") / f"seed={seed}",
        )
        for type_ in types
        for seed in seeds
    }


def _check_bound(job: Job, sim: SimOptions) -> None:
    """Before anything runs: are there bounds? Raises InvalidConfig, MissingPackage if not."""
    from slosched.bound.problem import check_open
    from slosched.bound.solver import check_scipy
    from slosched.cli.bound import cluster_of

    check_scipy()
    cluster_of(job.spec, sim, "controller")
    check_open(job.spec.workload, job.spec.seed)


def _held(job: Job, runs: dict[str, dict[int, RunResult]], sim: SimOptions) -> dict[str, Any]:
    """The bounds for the first seed's arrivals, and each policy's run on them held against those."""
    from slosched.analysis.bounded import held_document, hold_against
    from slosched.bound.bounds import Effort
    from slosched.bound.problem import cells_of
    from slosched.cli.bound import bounds_of, cluster_of, tell

    spec = job.spec
    cells = cells_of(
        spec.workload,
        cluster_of(spec, sim, "controller"),
        seed=spec.seed,
        duration_ns=spec.duration_ns,
    )
    found = bounds_of(cells, Effort())
    bounds = [each.as_dict() for each in found]
    first_ns = min(cell.step.start_ns + cell.offsets_ns[0] for cell in cells)
    run_dirs = {type_: by_seed[spec.seed].run_dir for type_, by_seed in runs.items()}
    tell(found, sim)
    held = hold_against(
        {type_: path for type_, path in run_dirs.items() if path is not None},
        bounds,
        first_ns=first_ns,
    )
    return held_document(held, bounds, seed=spec.seed)


def _conclude(
    runs: dict[str, dict[int, RunResult]],
    sim: SimOptions,
    directory: Path,
    held: dict[str, Any] | None,
    *,
    json: bool,
) -> None:
    """Write compare.json and the figure, and print the comparison."""
    from slosched.analysis.bounded import Held, held_text
    from slosched.analysis.compare import compare_runs, comparison_text

    comparison = compare_runs(runs)
    document = {
        **comparison.as_dict(),
        "slo_verdicts": _slo_verdicts(comparison),
        "options": changed(sim),
        "runs": {
            type_: {str(seed): str(result.run_dir) for seed, result in by_seed.items()}
            for type_, by_seed in runs.items()
        },
        **({} if held is None else {"bounds": held}),
    }
    path = directory / FILE_NAME
    write_file(
        path, (json_text.dumps(utf8_document(document), indent=2, default=str) + "\n").encode()
    )
    files = [path, *_draw(comparison, directory, held)]
    if json:
        print_json({**document, "files": [str(file) for file in files]})
    else:
        say(comparison_text(comparison))
        for verdict in _slo_verdicts(comparison).values():
            say(verdict)
        if held is not None:
            say("")
            say(held_text([Held(**each) for each in held["policies"]], held["steps"]))
            say(
                "met: controller, from the arrival there; the requests at the beginning of each step"
            )
        for file in files:
            say(f"wrote {file}")
    for warning in dict.fromkeys(w for d in runs.values() for r in d.values() for w in r.warnings):
        warn(warning)


def _draw(comparison: Comparison, directory: Path, held: dict[str, Any] | None) -> list[Path]:
    from slosched.analysis.compare import draw_comparison

    try:
        return draw_comparison(comparison, directory, () if held is None else held["steps"])
    except MissingPackage as error:
        warn(f"no figure: {error}")
        return []
