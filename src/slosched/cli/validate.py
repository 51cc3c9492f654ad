"""`slosched validate`: one spec live and in virtual time, and how far apart the two are."""

from __future__ import annotations

import contextlib
import json as json_text
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from slosched.cli.ask import Json
from slosched.cli.output import print_json, run_display, say, table_text, warn
from slosched.cli.values import duration_ns
from slosched.cli.workload import workload_of
from slosched.errors import InvalidConfig
from slosched.options import SCHEDULER
from slosched.output_files import utf8_document, write_file

if TYPE_CHECKING:
    from slosched.analysis.validation import Delays, StepDifference
    from slosched.cli.local_run import Cluster
    from slosched.loadgen.results import RunResult
    from slosched.sim.network import Network
    from slosched.workloads import Workload


class Meter(Protocol):
    """Says what disturbed the machine between two times (ns), in words; () if nothing did."""

    def reasons(self, start_ns: int, end_ns: int) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Plan:
    """What is validated. `words` are `workload` as the command takes it.

    The difference in satisfaction may be `tolerance` points from `from_slo` times b1 up (b1 of the slowest
    model where the SLO is a duration). A live run is made again, `tries` times at most, while the machine
    disturbed each try of a step from there up. The machine alone decides what is disturbed.
    """

    words: tuple[str, ...]
    workload: Workload
    cluster: Cluster
    duration_ns: int
    seed: int = 0
    tolerance: float = 3.0
    from_slo: float = 3.4
    tries: int = 3

    def held(self) -> list[bool]:
        """Which steps of the workload the tolerance holds. Raises InvalidConfig if it would hold none."""
        from slosched.analysis.validation import held_steps
        from slosched.config_file import load_profile

        profile = load_profile(self.cluster.profile)
        b1_ns = max(profile.model(use.name).exec_ns[1] for use in self.workload.models())
        steps = self.workload.steps()
        held = held_steps(steps, from_slo=self.from_slo, b1_ns=b1_ns)
        sent = [
            yes for step, yes in zip(steps, held, strict=True) if step.start_ns < self.duration_ns
        ]
        if not any(sent):
            raise InvalidConfig(
                f"no step has an SLO of {self.from_slo:g} times b1 or more, so that nothing would be held "
                "to the tolerance; take longer SLOs, a longer duration or a lower --from-slo"
            )
        return held


@dataclass(frozen=True)
class Validation:
    """The results of a plan: for each step the first undisturbed try, else the one that differs least.

    Only an undisturbed try counts: a machine that stalled can make the two differ, and can hide a difference.
    A step that is held and was disturbed each time is not decided.
    """

    plan: Plan
    differences: tuple[StepDifference, ...]
    delays: tuple[Delays, ...]  # of each try
    directory: Path

    @property
    def counted(self) -> tuple[StepDifference, ...]:
        """The steps that are held and were not disturbed."""
        return tuple(d for d in self.differences if d.held and not d.disturbed)

    @property
    def undecided(self) -> int:
        """How many held steps were disturbed each time."""
        return sum(d.held and bool(d.disturbed) for d in self.differences)

    @property
    def worst_points(self) -> float | None:
        """The largest difference of a step that is held and was not disturbed; None without one."""
        return max((d.points for d in self.counted), default=None)

    @property
    def verdict(self) -> str:
        """beyond: a step that counts is beyond the tolerance; else undecided: one was disturbed each
        time, or none was sent; else within."""
        if any(d.points > self.plan.tolerance for d in self.counted):
            return "beyond"
        return "within" if self.counted and not self.undecided else "undecided"

    @property
    def passed(self) -> bool:
        """Whether every step that is held was measured undisturbed, and is within the tolerance."""
        return self.verdict == "within"

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts and lists, for JSON. Times in ns, differences in points."""
        from slosched.core.scheduler.policies import resolved

        plan = self.plan
        return {
            "workload": plan.workload.describe(),
            "words": list(plan.words),
            "seed": plan.seed,
            "duration_ns": plan.duration_ns,
            "gpus": plan.cluster.gpus,
            "profile": plan.cluster.profile,
            "scheduler": asdict(resolved(plan.cluster.scheduler)),
            "tolerance_points": plan.tolerance,
            "from_slo": plan.from_slo,
            "passed": self.passed,
            "verdict": self.verdict,
            "held_steps": len(self.counted) + self.undecided,
            "undecided_steps": self.undecided,
            "worst_points": self.worst_points,
            "delays": [asdict(delays) for delays in self.delays],
            "steps": [difference.as_dict() for difference in self.differences],
        }


def run_plan(
    plan: Plan,
    directory: Path,
    watching: Callable[[], contextlib.AbstractContextManager[Meter]],
    *,
    show: Callable[[str], None] = warn,
) -> Validation:
    """Run `plan` both ways, in folders of `directory`; `watching` gives a meter for one live run.

    Raises ChildFailed if a process fails, InvalidConfig if nothing would be held or the live run cannot be
    compared.
    """
    plan.held()
    best: dict[tuple[int, str], StepDifference] = {}
    delays = []
    for attempt in range(1, plan.tries + 1):
        found, measured = _try(plan, directory / f"try-{attempt}", attempt, watching, show)
        delays.append(measured)
        for difference in found:
            place = (difference.live.index, difference.live.group)
            best[place] = _better(best.get(place), difference)
        if not any(difference.held and difference.disturbed for difference in best.values()):
            break
    ordered = tuple(best[place] for place in sorted(best, key=lambda place: place[0]))
    return Validation(plan, ordered, tuple(delays), directory)


def _better(old: StepDifference | None, new: StepDifference) -> StepDifference:
    if old is None or (old.disturbed and not new.disturbed):
        return new
    return new if old.disturbed and new.disturbed and new.points < old.points else old


def _try(
    plan: Plan,
    directory: Path,
    attempt: int,
    watching: Callable[[], contextlib.AbstractContextManager[Meter]],
    show: Callable[[str], None],
) -> tuple[list[StepDifference], Delays]:
    from slosched.analysis.validation import compare, measure_delays
    from slosched.cli.local_run import run_locally

    show(f"live, try {attempt} of {plan.tries}")
    with watching() as meter:
        live = run_locally(
            directory / "live",
            plan.cluster,
            plan.words,
            seed=plan.seed,
            duration_ns=plan.duration_ns,
        )
        disturbed = _disturbed(plan, live, meter)
    if live.run_dir is None or not live.steps:
        raise InvalidConfig("the live run sent nothing; give the workload more time")
    delays = measure_delays(live.run_dir)
    show(f"simulated, with the live run's delays: {delays.text}")
    simulated = _simulate(plan, delays, directory / "simulated")
    differences = compare(live, simulated, attempt=attempt, disturbed=disturbed, held=plan.held())
    return differences, delays


def _disturbed(plan: Plan, live: RunResult, meter: Meter) -> list[tuple[str, ...]]:
    """Why each step of the live run does not count, by its index."""
    from slosched.telemetry.client_log import FILE_NAME, read_client_log

    assert live.run_dir is not None
    # The first request is due within a gap of the start, which is close enough for stalls.
    start_ns = int(read_client_log(live.run_dir / FILE_NAME)["scheduled_ns"].min())
    late = {step.index for step in live.steps if step.sent_late}
    steps = plan.workload.steps()
    ends = [*(step.start_ns for step in steps[1:]), plan.duration_ns]
    found = []
    for step, end_ns in zip(steps, ends, strict=True):
        begin_ns = min(step.start_ns, plan.duration_ns)
        end_ns = min(end_ns, plan.duration_ns)
        reasons: tuple[str, ...] = ()
        if begin_ns < end_ns:
            reasons = meter.reasons(start_ns + begin_ns, start_ns + end_ns)
        if step.index in late:
            reasons = (*reasons, "the client sent late")
        found.append(reasons)
    return found


def network_like(delays: Delays) -> Network:
    """A network with the latencies of a live run.

    Only the sum of the client's two latencies is known; its variation is put into the second, to the client.
    """
    from slosched.sim.network import Network

    return Network(
        to_worker_ns=delays.to_worker_ns,
        from_worker_ns=delays.from_worker_ns,
        from_client_ns=delays.client_round_trip_ns // 2,
        to_client_ns=delays.client_round_trip_ns // 2,
        to_worker_spread_ns=delays.spreads_ns["to_worker"],
        from_worker_spread_ns=delays.spreads_ns["from_worker"],
        to_client_spread_ns=delays.spreads_ns["client"],
    )


def _simulate(plan: Plan, delays: Delays, out: Path) -> RunResult:
    from slosched.config_file import load_profile
    from slosched.sim.run import simulate
    from slosched.sim.spec import SimSpec

    cluster = plan.cluster
    spec = SimSpec(
        workload=plan.workload,
        scheduler=cluster.scheduler,
        profiles=(load_profile(cluster.profile),),
        gpus=cluster.gpus,
        gpus_per_worker=cluster.gpus,  # one process emulates them all
        network=network_like(delays),
        seed=plan.seed,
        duration_ns=plan.duration_ns,
    )
    with run_display("simulated") as display:
        return simulate(spec, out=out, progress=display)


# ---------------------------------------------------------------------------------- the command

_EXIT_CODES = {"within": 0, "beyond": 1, "undecided": 8}

_Words = Annotated[
    list[str],
    typer.Argument(metavar="WORKLOAD [VALUES]...|FILE.toml", hidden=True),
]
_Type = Annotated[
    str, typer.Option("--type", help="The scheduler: what `controller` takes; TYPE:paper too.")
]
_Fidelity = Annotated[
    str | None,
    typer.Option(
        help="best, or paper: the published code's behaviour. Default best.",
        rich_help_panel=SCHEDULER,
    ),
]
_ScheduleAhead = Annotated[
    str | None,
    typer.Option(
        help="As `controller` takes it. Default 5ms, as in the experiments.",
        rich_help_panel=SCHEDULER,
    ),
]
_Gpus = Annotated[int, typer.Option(min=1, help="Emulated GPUs, all in one worker.")]
_Profile = Annotated[str, typer.Option(help="Name or file of the GPUs' profile.")]
_Seed = Annotated[int, typer.Option(min=0, help="Chooses the arrivals, live and simulated.")]
_Duration = Annotated[
    str | None,
    typer.Option(help="End after this long (30s); needed for a workload that never ends."),
]
_Tolerance = Annotated[
    float, typer.Option(min=0.0, help="Points of satisfaction that the two may differ by.")
]
_FromSlo = Annotated[
    float, typer.Option(min=0.0, help="The tolerance holds from this multiple of b1 up.")
]
_Tries = Annotated[
    int,
    typer.Option(
        min=1, help="Maximum number of live runs: a run is repeated if the machine stalled."
    ),
]
_Out = Annotated[
    Path | None,
    typer.Option(help="Directory to make. Default ./slosched-runs/<time>-validate."),
]


def validate(
    words: _Words,
    type_: _Type = "INFER5",
    fidelity: _Fidelity = None,
    schedule_ahead: _ScheduleAhead = "5ms",
    gpus: _Gpus = 6,
    profile: _Profile = "v100",
    seed: _Seed = 0,
    duration: _Duration = None,
    tolerance: _Tolerance = 3.0,
    from_slo: _FromSlo = 3.4,
    tries: _Tries = 3,
    out: _Out = None,
    json: Json = False,
) -> None:
    """Run one workload live and simulated, and report the difference between the two.

    The live side is a worker with emulated GPUs, a controller and a client on this machine (free ports
    of 127.0.0.1; all are ended). The simulated side gets the same workload, seed and options, and the
    delays of the live run. For each step it prints both satisfactions and their difference in points,
    goodput (simulated over live), latencies, and what disturbed the machine. Steps from --from-slo up
    are held to --tolerance, and only in a try that nothing disturbed. The exit code is 1 if one of them
    is beyond it; else 8 if one was disturbed in each try, so that nothing is decided.

    The directory keeps both runs, validate.json and a figure.

    \b
    Examples:
      slosched validate slo-exp-1 resnet50_v2 12 poisson 600 1 100 1.5 mul 4
      slosched validate slo-exp-1 resnet50_v2 12 poisson 300 2 32 2 mul 4 --out checked --json
      slosched validate workloads/fig7-quick.toml --fidelity paper --schedule-ahead 10ms
    """
    from slosched.cli.local_run import Cluster
    from slosched.cli.sim_options import SimOptions
    from slosched.config_file import load_profile
    from slosched.experiment.children import ended_by_signals
    from slosched.telemetry.manifest import write_manifest
    from slosched.telemetry.run_dir import claim_run_dir, default_log_dir

    workload = workload_of(words)
    sim = SimOptions(scheduler_options={"fidelity": fidelity, "schedule_ahead": schedule_ahead})
    load_profile(profile)  # what is wrong with it is said before anything runs
    plan = Plan(
        words=tuple(words),
        workload=workload,
        cluster=Cluster(sim.scheduler(type_), gpus, profile),
        duration_ns=_sends_for_ns(workload, duration),
        seed=seed,
        tolerance=tolerance,
        from_slo=from_slo,
        tries=tries,
    )
    plan.held()
    directory = claim_run_dir(out or default_log_dir("validate"))
    write_manifest(directory, "validation", plan, {"arrivals": seed})
    with ended_by_signals():
        validation = run_plan(plan, directory, watch_machine)
    _write(validation, json)
    raise typer.Exit(_EXIT_CODES[validation.verdict])


@contextlib.contextmanager
def watch_machine() -> Iterator[Meter]:
    """A meter in this process, which has nothing else to do while the live run goes on."""
    from slosched.cli.machine import MachineWatch

    class _Watched:
        def reasons(self, start_ns: int, end_ns: int) -> tuple[str, ...]:
            return watch.between(start_ns, end_ns).reasons()

    with MachineWatch() as watch:
        yield _Watched()


def _sends_for_ns(workload: Workload, duration: str | None) -> int:
    limit_ns = None if duration is None else duration_ns("--duration", duration)
    ends = [end_ns for end_ns in (workload.duration_ns, limit_ns) if end_ns is not None]
    if not ends:
        raise InvalidConfig(
            f"{workload.name} never ends by itself: say how long it should run (--duration 60s)"
        )
    return min(ends)


def verdict_text(validation: Validation) -> str:
    """The verdict in words: how many steps were held, and how many of them counted."""
    plan, worst = validation.plan, validation.worst_points
    counted, undecided = len(validation.counted), validation.undecided
    bound = f"the tolerance of {plan.tolerance:g} points from {plan.from_slo:g}x up"
    start = {
        "within": f"within {bound}",
        "beyond": f"BEYOND {bound}",
        "undecided": f"UNDECIDED whether within {bound}",
    }[validation.verdict]
    if worst is None:
        return f"{start}: the machine disturbed all {undecided} steps in every try"
    disturbed = f"; the machine disturbed {undecided} in every try" if undecided else ""
    return (
        f"{start}: {counted} of {counted + undecided} steps were undisturbed, the worst of them {worst:.2f} "
        f"points apart{disturbed}"
    )


def _write(validation: Validation, json: bool) -> None:
    from slosched.analysis.validation import HEADINGS, plot_validation, row
    from slosched.errors import MissingPackage
    from slosched.telemetry.manifest import describe_host, finish_manifest
    from slosched.version import __version__

    directory, plan = validation.directory, validation.plan
    document = {"version": __version__, "host": describe_host(), **validation.as_dict()}
    text = json_text.dumps(utf8_document(document), indent=1) + "\n"
    write_file(directory / "validate.json", text.encode())
    files = [directory / "validate.json"]
    try:
        files += plot_validation(validation.differences, directory, title=plan.workload.describe())
    except MissingPackage as error:
        warn(f"no figure: {error}")
    finish_manifest(
        directory,
        {
            "passed": validation.passed,
            "verdict": validation.verdict,
            "worst_points": validation.worst_points,
        },
    )
    if json:
        print_json(document)
        return
    say(table_text(HEADINGS, [row(difference) for difference in validation.differences]))
    say("simulated: with the live run's delays; points: simulated less live; goodput: their ratio")
    for attempt, delays in enumerate(validation.delays, start=1):
        say(f"delays of try {attempt}: {delays.text}")
    say(verdict_text(validation))
    say("wrote " + ", ".join(str(file) for file in files))
