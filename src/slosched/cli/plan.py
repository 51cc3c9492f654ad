"""`slosched plan`: how many GPUs a mix of models needs."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slosched.cli.ask import Json
from slosched.cli.output import print_json, say, warn
from slosched.cli.sim_options import SimOptions, takes_sim_options
from slosched.cli.stopping import stopped_by_signals
from slosched.cli.values import duration_ns
from slosched.errors import InvalidConfig, MissingPackage
from slosched.units import format_duration

if TYPE_CHECKING:
    from slosched.sim.jobs import JobsProgress
    from slosched.sim.plan import Plan, PlanSpec, Point

#: No number of GPUs suffices: the question is answered, and a script may ask for this.
NONE_SUFFICES = 1

_DURATION = "20s"
_Models = Annotated[
    Path,
    typer.Option(
        help="TOML file of the models: copies, rates or shares, SLOs, arrivals; see "
        "workloads/plan-example.toml.",
        show_default=False,
    ),
]
_Rate = Annotated[
    float | None,
    typer.Option(help="Requests/s of all models together. Default: as the file says."),
]
_Slo = Annotated[
    str | None,
    typer.Option(
        help="SLO of every model: 25ms, or 5 times the batch-1 time. Default: the file's."
    ),
]
_Target = Annotated[float, typer.Option(help="The share of requests that must be in time.")]
_Each = Annotated[
    bool, typer.Option("--each-model", help="Every model must reach the target, not all together.")
]
_Policy = Annotated[
    str, typer.Option(metavar="TYPE", help="The scheduler; TYPE:paper for that fidelity.")
]
_Gpus = Annotated[
    str, typer.Option(metavar="LOW..HIGH", help="The range of numbers of GPUs to search.")
]
_Seed = Annotated[int, typer.Option(min=0, help="The first seed.")]
_Seeds = Annotated[
    int, typer.Option(min=1, help="Number of seeds that each number of GPUs is simulated with.")
]
_Duration = Annotated[
    str | None,
    typer.Option(
        help=f"Virtual time that counts, of each run. Default: the file's, else {_DURATION}."
    ),
]
_Warmup = Annotated[str, typer.Option(help="Virtual time before it that does not count.")]
_Jobs = Annotated[int, typer.Option(min=1, help="Processes that share the runs.")]
_Out = Annotated[
    Path | None,
    typer.Option(
        help="Folder for the runs, plan.json and the figure. Complete runs in it are not run again. "
        "Default ./slosched-runs/<time>-plan."
    ),
]


@takes_sim_options
def plan(
    *,
    models: _Models,
    rate: _Rate = None,
    slo: _Slo = None,
    target: _Target = 0.99,
    each_model: _Each = False,
    policy: _Policy = "INFER5",
    gpus: _Gpus = "1..64",
    sim: SimOptions,
    seed: _Seed = 0,
    seeds: _Seeds = 3,
    duration: _Duration = None,
    warmup: _Warmup = "1s",
    jobs: _Jobs = 1,
    out: _Out = None,
    json: Json = False,
) -> None:
    """Find how many GPUs of a profile keep the deadlines of a mix of models, by simulation.

    Numbers of GPUs are simulated, by bisection, each with several seeds. The answer is the smallest
    number for which the share in time, as clients see it, reaches the target with 95 % confidence; the
    smallest number by the point estimate is printed beside it. Neighbours are simulated too, to find
    cases where more GPUs did worse. If no number suffices, the command says why, and the exit code is
    1.

    If it is stopped and started again with the same --out, it continues where it stopped.
    docs/planning.md says more.

    \b
    Examples:
      slosched plan --models workloads/plan-example.toml --target 0.999 --jobs 2
      slosched plan --models workloads/plan-example.toml --rate 4800 --slo 25ms --gpus 4..32 --out plan
    """
    from slosched.output_files import check_folder, check_output
    from slosched.sim.plan import FILE_NAME
    from slosched.sim.plan import plan as find
    from slosched.telemetry.run_dir import default_log_dir

    spec = _spec(
        models, rate, slo, target, each_model, policy, gpus, sim, seed, seeds, duration, warmup
    )
    directory = out or default_log_dir("plan")
    check_folder(directory)
    check_output(directory / FILE_NAME)
    if not json:
        say(
            f"{spec.workload().describe()}; {policy} on {gpus} GPUs ({sim.profile}), target {target:g} "
            f"of {'each model' if each_model else 'all requests'}, {seeds} seed(s)"
        )
    with stopped_by_signals() as stopping, _Display(spec) as display:
        answer = find(
            spec,
            out=directory,
            processes=jobs,
            progress=display,
            on_point=display.point,
            stop=stopping,
        )
    raise typer.Exit(_conclude(answer, directory, json=json))


def _spec(
    models: Path,
    rate: float | None,
    slo: str | None,
    target: float,
    each_model: bool,
    policy: str,
    gpus: str,
    sim: SimOptions,
    seed: int,
    seeds: int,
    duration: str | None,
    warmup: str,
) -> PlanSpec:
    """The question that the options ask. Raises InvalidConfig with the option that is wrong."""
    from slosched.core.scheduler.policies import about
    from slosched.sim.plan import PlanSpec
    from slosched.workloads.mix_file import load_mix
    from slosched.workloads.values import read_rate, read_slo, read_wait

    low, high = _range(gpus)
    type_ = sim.scheduler(policy).policy
    why_not = about(type_).not_planned
    if why_not:
        raise InvalidConfig(f"--policy {policy}: {type_} {why_not}; plan with one that serves")
    if "," in sim.profile or sim.profile.rpartition(":")[2].isdigit():
        raise InvalidConfig(
            f"--profile {sim.profile}: planning takes one profile, which all GPUs have"
        )
    mix = load_mix(
        models,
        rate_per_s=None if rate is None else read_rate("--rate", str(rate)),
        slo=None if slo is None else read_slo("--slo", slo),
    )
    if duration is None:
        counted_ns = mix.duration_ns or duration_ns("--duration", _DURATION)
    else:
        counted_ns = duration_ns("--duration", duration)
    return PlanSpec(
        entries=mix.entries,
        base=sim.spec(policy, mix.workload(), seed=seed),
        target=target,
        low=low,
        high=high,
        seeds=seeds,
        duration_ns=counted_ns,
        warmup_ns=read_wait("--warmup", warmup),
        each_model=each_model,
    )


def _range(text: str) -> tuple[int, int]:
    low, dots, high = text.partition("..")
    if not low.isdigit() or not (high if dots else low).isdigit():
        raise InvalidConfig(f"--gpus {text!r}: write it as LOW..HIGH, for example 1..64")
    return int(low), int(high if dots else low)


class _Display:
    """Shows the runs of one number of GPUs after the other, and a line for each that is done."""

    def __init__(self, spec: PlanSpec) -> None:
        self._spec = spec
        self._open = ExitStack()
        self._gpus = 0

    def __enter__(self) -> _Display:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def __call__(self, gpus: int, progress: JobsProgress) -> None:
        from slosched.cli.sim_display import JobsDisplay

        if gpus != self._gpus:
            self._open.close()
            self._gpus = gpus
            first = self._spec.base.seed
            names = [f"seed={first + i}" for i in range(self._spec.seeds)]
            self._display = self._open.enter_context(JobsDisplay(names, title=f"{gpus} GPUs"))
        self._display(progress)

    def point(self, point: Point) -> None:
        """One number is done."""
        self._open.close()
        share = point.share
        typer.echo(
            f"{point.gpus} GPUs: {100 * share.point:.4g} % in time ({100 * share.low:.4g} to "
            f"{100 * share.high:.4g} %)",
            err=True,
        )


def _conclude(answer: Plan, directory: Path, *, json: bool) -> int:
    """Draw the curve and print the answer; returns the exit code."""
    from slosched.analysis.plan import plan_text, plot_plan
    from slosched.sim.plan import FILE_NAME

    document = answer.as_dict()
    files = [directory / FILE_NAME]
    if answer.points:
        try:
            files += plot_plan(document, directory).files
        except MissingPackage as error:
            warn(f"no figure: {error}")
    if json:
        print_json({**document, "files": [str(file) for file in files]})
    else:
        if answer.points:
            say(plan_text(document))
            say("in time: client, from the scheduled send; from, to: its 95 % interval")
        for line in _verdict(answer):
            say(line)
        for file in files:
            say(f"wrote {file}")
    return NONE_SUFFICES if answer.verdict.gpus is None else 0


def _verdict(answer: Plan) -> list[str]:
    spec, verdict = answer.spec, answer.verdict
    whose = "of each model" if spec.each_model else "of all requests"
    asked = f"{100 * spec.target:g} % {whose} in time"
    if verdict.gpus is None:
        where = f"no number of GPUs within {spec.low}..{spec.high} is sure to keep {asked}"
        by_point = (
            f"by the point estimate alone {verdict.gpus_by_point} would do"
            if verdict.gpus_by_point is not None
            else ""
        )
        return [where, *([by_point] if by_point else []), *(f"  {why}" for why in answer.why_none)]
    length = format_duration(spec.duration_ns)
    by_point = (
        "The point estimate agrees."
        if verdict.gpus_by_point == verdict.gpus
        else f"By the point estimate alone {verdict.gpus_by_point} would do."
    )
    seeds = "1 seed" if spec.seeds == 1 else f"{spec.seeds} seeds"
    lines = [
        f"{verdict.gpus} x {spec.profile.name} keep {asked} (95 % confidence, {seeds} x {length}). {by_point}"
    ]
    return lines + [f"  doubt: {doubt}" for doubt in verdict.doubts]
