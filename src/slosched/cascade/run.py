"""One experiment with a cascade: its settings, its run in virtual time, and the files that follow from the run.

A run directory gets, beside the logs of every run: `summary.json`, the artifact's three CSV files in
`logs/`, and the figures in `figures/`. live.py makes the same run in real time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from slosched.analysis.drawn import plain
from slosched.cascade.artifact_logs import write_artifact_logs
from slosched.cascade.bound import FluidBound, fluid_bound
from slosched.cascade.drawing import draw_runs
from slosched.cascade.outcome import Outcome, read_outcome
from slosched.cascade.summary import SUMMARY, Summary, summarise
from slosched.cascade_spec import CascadeOptions, CascadeSpec
from slosched.config import EmulationNoise, SchedulerConfig
from slosched.errors import InvalidConfig, MissingPackage, SloschedError
from slosched.loadgen.results import RunProgress, RunResult
from slosched.output_files import utf8_document, write_file
from slosched.sim.faults import FaultPlan
from slosched.sim.run import simulate, source_digest, spec_digest
from slosched.sim.spec import SimSpec
from slosched.units import format_duration
from slosched.version import __version__
from slosched.workloads import parse_workload
from slosched.workloads.base import Workload
from slosched.workloads.cascades import load_cascade, read_scores
from slosched.workloads.engine import Engine

LOGS = "logs"
FIGURES = "figures"
#: The policy that serves by a fixed plan of the cascade.
STATIC = "DIFFSERVE-STATIC"

Progress = Callable[[RunProgress], None]
Stop = Callable[[], bool]


@dataclass(frozen=True)
class Experiment:
    """The settings of one run. `cascade` is a built-in one or a file, `trace` as of the workload `cascade`.

    `scores` is a file of recorded scores by prompt (None: they are drawn from the cascade's distribution).
    `judge_ns` replaces the cascade's own. `exec_sigma` is the relative deviation of exec times. With `preempt`
    light batches may interrupt heavy ones; CASCADE alone does so.
    """

    cascade: str
    trace: str = "4to32"
    workers: int = 16
    policy: str = "CASCADE"
    options: CascadeOptions = field(default_factory=CascadeOptions)
    seed: int = 0
    scores: Path | None = None
    judge_ns: int | None = None
    duration_ns: int | None = None
    exec_sigma: float = 0.0
    faults: FaultPlan | None = None
    preempt: bool = False

    def spec(self) -> CascadeSpec:
        """The cascade as it is served. Raises UnknownName, InvalidConfig."""
        spec = load_cascade(self.cascade)
        if self.judge_ns is not None:
            spec = replace(spec, judge_ns=self.judge_ns)
        if self.scores is not None:
            spec = replace(spec, recorded=read_scores(self.scores))
        # Another seed has other scores too, as it has other arrivals.
        return replace(spec, seed=spec.seed + self.seed)

    def workload(self) -> Workload:
        """Raises UnknownName, InvalidConfig."""
        return parse_workload("cascade", [self.cascade, self.trace])

    def check(self) -> None:
        """Raise InvalidConfig, UnknownName for what only a run would show.

        That is a trace that cannot be read or ends before its first request, and a cascade without the fixed
        plan that the policy needs.
        """
        spec = self.spec()
        if self.policy == STATIC and not spec.static_plan:
            raise InvalidConfig(
                f"{STATIC.lower()} needs a fixed plan, and the cascade {spec.name!r} has none; write a table "
                "[static] into its file, or take another policy"
            )
        engine = Engine(self.workload(), seed=self.seed, duration_ns=self.duration_ns)
        if engine.next_ns() is None:
            raise InvalidConfig(
                f"the trace {self.trace} with seed {self.seed} has no request within "
                f"{format_duration(engine.end_ns)}; give a longer --duration, or another trace"
            )

    def scheduler(self, spec: CascadeSpec) -> SchedulerConfig:
        return SchedulerConfig(
            policy=self.policy,
            cascades=(spec,),
            cascade=replace(self.options, seed=self.options.seed + self.seed),
            max_gpus=max(100, self.workers),
            preempt=self.preempt,
        )

    def simulation(self) -> SimSpec:
        """The run in virtual time: one GPU for each worker. Raises UnknownName, InvalidConfig."""
        spec = self.spec()
        return SimSpec(
            workload=self.workload(),
            scheduler=self.scheduler(spec),
            profiles=(spec.profile(),),
            gpus=self.workers,
            noise=EmulationNoise(exec_sigma=self.exec_sigma),
            seed=self.seed,
            duration_ns=self.duration_ns,
            faults=self.faults,
        )

    def described(self) -> dict[str, Any]:
        """The settings for JSON."""
        return {
            "cascade": self.cascade,
            "trace": self.trace,
            "workers": self.workers,
            "policy": self.policy,
            "options": asdict(self.options),
            "seed": self.seed,
            "scores": "drawn from f(t)" if self.scores is None else f"recorded: {self.scores}",
            "judge_ns": self.judge_ns,
            "duration_ns": self.duration_ns,
            "exec_sigma": self.exec_sigma,
            "preempt": self.preempt,
            "faults": [] if self.faults is None else [each.text() for each in self.faults.faults],
        }


@dataclass(frozen=True)
class Report:
    """A run that is over: where it lies, what it came to, and which files were made of it."""

    run_dir: Path
    summary: Summary
    bound: FluidBound
    document: Mapping[str, Any]
    files: tuple[Path, ...] = ()
    text: str = ""
    warnings: tuple[str, ...] = ()


def run_simulated(
    experiment: Experiment,
    out: Path,
    *,
    progress: Progress | None = None,
    stop: Stop | None = None,
) -> RunResult:
    """Run `experiment` in virtual time into `out`; `finish_simulated` makes all further files.

    Raises what `simulate` raises, SloschedError if it was stopped before its end.
    """
    result = simulate(
        experiment.simulation(),
        out=out,
        progress=progress,
        stop=stop,
        manifest={"type": experiment.policy},
    )
    if not result.complete:
        raise SloschedError(
            f"the run ended early ({result.problem}); partial results are in {result.run_dir}"
        )
    return result


def finish_simulated(
    experiment: Experiment, result: RunResult, *, published: bool = False
) -> Report:
    """Make the files of a complete run in virtual time. See `finish`."""
    assert result.run_dir is not None
    digest = spec_digest(experiment.simulation())
    report = finish(
        experiment, result.run_dir, kind="simulated", digest=digest, published=published
    )
    return replace(report, warnings=(*result.warnings, *report.warnings))


def finish(
    experiment: Experiment,
    run_dir: Path,
    *,
    kind: str,
    digest: str = "",
    published: bool = False,
    figures: bool = True,
) -> Report:
    """Make the files of a run that is over: the CSV files, the figures and, last of all, the summary.

    `kind` is "simulated" or "live". Without matplotlib there are no figures, and a warning says so.
    """
    outcome = read_outcome(run_dir)
    report = report_of(experiment, outcome, kind=kind, digest=digest)
    files = write_artifact_logs(outcome, run_dir / LOGS)
    text, warnings = "", list(report.warnings)
    if figures:
        try:
            drawn = draw_runs(
                {experiment.policy: outcome},
                experiment.spec(),
                run_dir / FIGURES,
                published=published,
                random_scores=[experiment.policy] if experiment.options.blind_scores else (),
            )
            files, text = [*files, *drawn.files], drawn.text
        except MissingPackage as error:
            warnings.append(f"no figures: {error}")
    path = run_dir / SUMMARY
    write_json(path, report.document)
    return replace(report, files=(path, *files), text=text, warnings=tuple(warnings))


def report_of(experiment: Experiment, outcome: Outcome, *, kind: str, digest: str = "") -> Report:
    """Count `outcome` and hold it against the clairvoyant bound."""
    spec = experiment.spec()
    summary = summarise(outcome, spec.quality, random_scores=experiment.options.blind_scores)
    bound = fluid_bound(outcome.arrival_ns.tolist(), spec, experiment.workers)
    document = {
        **experiment.described(),
        "kind": kind,
        "slosched": __version__,
        "source": source_digest(),
        "slo_ns": spec.slo_ns,
        "quality": "FID by the published table, from the share of light answers; no image was scored",
        "summary": summary.as_dict(),
        "bound": bound.as_dict(),
        "above_bound": {
            "fid": plain(summary.fid - bound.fid),
            "pessimistic_fid": plain(summary.pessimistic_fid - bound.fid),
            "violation_ratio": plain(summary.violation_ratio - bound.lost / max(len(outcome), 1)),
        },
        "spec_sha256": digest,
    }
    return Report(outcome.path, summary, bound, document)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write `document` to `path`. Raises as `write_file` does."""
    text = json.dumps(utf8_document(plain(document)), indent=2, default=str)
    write_file(path, (text + "\n").encode())
