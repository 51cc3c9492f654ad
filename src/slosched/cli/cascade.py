"""`slosched cascade`: experiments with model cascades, and the commands of DiffServe's artifact."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slosched.cli import cascade_artifact, cascade_digits, cascade_real
from slosched.cli.ask import Json
from slosched.cli.cascade_experiment import (
    directory_of,
    experiment_of,
    policy_type,
    variants_of,
)
from slosched.cli.cascade_options import takes_cascade_options
from slosched.cli.cascade_real import is_real, serve_real, takes_real_options
from slosched.cli.config_options import Options
from slosched.cli.guard import SloschedGroup
from slosched.cli.help import SloschedTyper
from slosched.cli.output import beside, print_json, say, table_text, warn
from slosched.cli.stopping import stopped_by_signals
from slosched.errors import SloschedError
from slosched.units import format_duration

if TYPE_CHECKING:
    from slosched.cascade.presets import Variant
    from slosched.cascade.run import Experiment, Report

app = SloschedTyper(cls=SloschedGroup, name="cascade", rich_markup_mode=None, no_args_is_help=True)


@app.callback()
def cascade() -> None:
    """A light model with a judge before a heavy one: experiments, and DiffServe's own commands.

    run makes one experiment, compare several policies over several seeds. Both run in virtual time and
    draw the published graphs. The other commands have the names, flags and ports of DiffServe's artifact
    (MLSys'25), for its step-by-step guide (docs/cascades.md).

    \b
    Examples:
      slosched cascade run sdturbo --trace 4to32 --workers 16
      slosched cascade run sdxs --policy diffserve --live --out live
      slosched cascade compare sdturbo --seeds 5 --jobs 4
      slosched cascade run sdturbo --real
      slosched cascade controller -ap 5 -c sdturbo
      slosched plot cascade --cascade sdturbo out
    """


_Cascade = Annotated[
    str,
    typer.Argument(
        metavar="CASCADE", help="sdturbo, sdxs, sdxlltn, or a file.toml.", show_default=False
    ),
]
_Trace = Annotated[
    str,
    typer.Option(
        metavar="NAME|FILE",
        help="LOtoHI requests/s as 4to32, with or without qps; or a file with MS,PROMPT a line.",
    ),
]
_Workers = Annotated[
    int, typer.Option(min=1, max=4096, metavar="N", help="Number of workers, one GPU each.")
]
_WORKERS = 16
_FewOrAll = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=4096,
        metavar="N",
        help=f"Number of workers, one GPU each. Default {_WORKERS}; with --real all GPUs of this machine.",
        show_default=False,
    ),
]
_Policy = Annotated[
    str,
    typer.Option(
        metavar="POLICY",
        help="cascade (ours), diffserve, diffserve-static, clipper-light, clipper-heavy or proteus.",
    ),
]
_Scores = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Recorded scores by prompt, in a format of the artifact. Default: drawn from the cascade's f(t).",
    ),
]
_Preset = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="sanity: the settings of a sanity simulation (factor 1.2, drop at 1.5 SLO, no judge's time).",
    ),
]
_Published = Annotated[
    bool,
    typer.Option(
        "--published",
        help="Draw with the artifact's own transformations, which do not show what was measured.",
    ),
]
_Duration = Annotated[
    str | None,
    typer.Option(help="End the trace after this time (60s; a bare number is in seconds)."),
]
_Sigma = Annotated[
    float, typer.Option(min=0, max=0.49, help="Relative standard deviation of exec times.")
]
_Faults = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Break what FILE says (docs/faults.md); in virtual time."),
]
_Preempt = Annotated[
    bool,
    typer.Option(
        "--preempt/--no-preempt",
        help="Ours: light batches may interrupt heavy ones between two of their steps, so that no GPU is kept "
        "free for them.",
    ),
]
_Jobs = Annotated[int, typer.Option(min=1, help="Processes that share the runs.")]


@app.command("run", short_help="One experiment, in virtual or in real time.")
@takes_cascade_options
@takes_real_options
def run(
    name: _Cascade,
    *,
    options: Options,
    machine: Options,
    trace: _Trace = "4to32",
    workers: _FewOrAll = None,
    policy: _Policy = "cascade",
    preset: _Preset = None,
    scores: _Scores = None,
    seed: Annotated[int, typer.Option(min=0, help="Chooses arrivals, prompts and scores.")] = 0,
    duration: _Duration = None,
    exec_sigma: _Sigma = 0.0,
    faults: _Faults = None,
    preempt: _Preempt = False,
    live: Annotated[
        bool,
        typer.Option(
            "--live", help="In real time: a worker, a controller and a client on 127.0.0.1."
        ),
    ] = False,
    published: _Published = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Run directory. Default ./slosched-runs/<time>-cascade."),
    ] = None,
    json: Json = False,
) -> None:
    """Serve a trace of prompts with a cascade, and say what it came to.

    In virtual time six minutes take seconds, and the same arguments give the same bytes. Prints SLO
    violations and quality by two counts: FID by the published table, which holds where the judge chose the
    light answers, and a pessimistic FID where the clock or chance did (docs/cascades.md). No image is
    made or scored. The run directory gets summary.json, the three CSV files of DiffServe's artifact in
    logs/ and its three graphs in figures/ (needs slosched[plot]).

    \b
    Examples:
      slosched cascade run sdturbo
      slosched cascade run sdturbo --policy diffserve --routing random --over-provision 1.2
      slosched cascade run sdxs --trace double_8to16 --workers 8 --seed 3 --out doubled
      slosched cascade run sdturbo --trace trace.txt --scores dist.txt --preset sanity --policy diffserve
      slosched cascade run sdturbo --trace 1to8 --workers 4 --live --duration 60s
      slosched cascade run sdturbo --real --policy diffserve --duration 120s
      slosched cascade run sdturbo --real --device cpu --peak 20
    """
    base = experiment_of(
        name,
        trace,
        workers or _WORKERS,
        preset,
        options,
        scores,
        duration,
        exec_sigma,
        faults,
        published,
    )
    experiment = replace(base, policy=policy_type(policy), seed=seed, preempt=preempt)
    if is_real(machine, live=live):
        experiment, report = serve_real(experiment, machine, directory_of(out, "cascade"), workers)
        _print_report(report, experiment, json=json)
        return
    experiment.check()
    if live:
        _check_live(experiment)
    directory = directory_of(out, "cascade")
    if not json:
        say(_title(experiment, live=live))
    report = (_live if live else _simulated)(experiment, directory, published)
    _print_report(report, experiment, json=json)


def _simulated(experiment: Experiment, directory: Path, published: bool) -> Report:
    from slosched.cascade.run import finish_simulated, run_simulated
    from slosched.cli.sim_display import SimDisplay

    with stopped_by_signals() as stopping, SimDisplay("cascade") as display:
        try:
            result = run_simulated(experiment, directory, progress=display, stop=stopping)
        except SloschedError as error:
            if stopping():
                warn(str(error))
                raise KeyboardInterrupt from None
            raise
    # The run is whole; from here on Ctrl-C ends the command at once.
    return finish_simulated(experiment, result, published=published)


def _check_live(experiment: Experiment) -> None:
    from slosched.cascade.live import check_live

    check_live(experiment)


def _live(experiment: Experiment, directory: Path, published: bool) -> Report:
    from slosched.cascade.live import run_live

    return run_live(experiment, directory, show=beside, published=published)


def _title(experiment: Experiment, *, live: bool) -> str:
    kind = "in real time" if live else "in virtual time"
    return (
        f"{experiment.spec().name} under {experiment.policy}, {_settings(experiment)}, seed {experiment.seed}, "
        f"{kind}"
    )


def _title_of_all(base: Experiment, variants: Sequence[Variant], seeds: range) -> str:
    count = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    names = ", ".join(each.name for each in variants)
    return f"{base.spec().name} under {names}; {_settings(base)}, {count}, in virtual time"


def _settings(experiment: Experiment) -> str:
    scores = "drawn" if experiment.scores is None else f"of {experiment.scores}"
    return (
        f"trace {experiment.trace}, {_counted(experiment.workers, 'worker')}, SLO "
        f"{format_duration(experiment.spec().slo_ns)}, scores {scores}"
    )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _print_report(report: Report, experiment: Experiment, *, json: bool) -> None:
    for warning in report.warnings:
        warn(warning)
    files = [str(file) for file in report.files]
    if json:
        print_json({**report.document, "run_dir": str(report.run_dir), "files": files})
        return
    from slosched.cascade.drawing import PUBLISHED_NOTE
    from slosched.cascade.summary import HEADINGS, rows_of

    summary, bound = report.summary, report.bound
    say(table_text(["policy", *HEADINGS], rows_of([(experiment.policy, summary)])))
    say(
        f"{_counted(summary.requests, 'request')}: {_counted(summary.violations, 'violation')} ("
        f"{summary.late} late, {summary.dropped} without an answer); answers: {summary.light} light, "
        f"{summary.heavy} heavy"
    )
    quality = ""
    if summary.fid == summary.fid:  # the cascade has a table of it
        quality = (
            f", FID {bound.fid:.2f}; this run's FID is {summary.fid - bound.fid:+.2f} from it by the table, "
            f"{summary.pessimistic_fid - bound.fid:+.2f} pessimistic"
        )
    lost = f"at least {_counted(bound.lost, 'violation')}, " if bound.lost else ""
    say(f"clairvoyant fluid bound: {lost}heavy share {bound.heavy_share:.3f}{quality}")
    if PUBLISHED_NOTE in report.text:
        say(report.text)
    if "real" in report.document:
        say(f"{report.document['device']}: {report.document['real']}")
    elif quality:
        say(_HONESTY)
    say(f"written to {report.run_dir}")


_HONESTY = (
    "FID is that of the cascade's table at the share of light answers; no image was made or scored"
)


@app.command("compare", short_help="Several policies on the same arrivals, over several seeds.")
@takes_cascade_options
def compare(
    name: _Cascade,
    *,
    options: Options,
    policies: Annotated[
        str | None,
        typer.Option(
            metavar="POLICY,...",
            help="Policies, each with options of its own as diffserve:routing=random. Default: all, or the "
            "preset's.",
        ),
    ] = None,
    trace: _Trace = "4to32",
    workers: _Workers = 16,
    preset: _Preset = None,
    scores: _Scores = None,
    seed: Annotated[int, typer.Option(min=0, help="The first seed.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, from --seed upwards.")] = 5,
    jobs: _Jobs = 1,
    duration: _Duration = None,
    exec_sigma: _Sigma = 0.0,
    faults: _Faults = None,
    preempt: _Preempt = False,
    published: _Published = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of all runs, where complete ones are not run again. Default "
            "./slosched-runs/<time>-cascade-compare.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Serve the same traces with several policies in virtual time, and compare them.

    For each seed every policy gets the same arrivals, prompts and scores. Behind +- stands half of a 95 %
    interval over the seeds (Student's t). The second table has ours less each other policy, seed by seed;
    without ours, the first policy less the others. Writes compare.json, compare.md, graphs of the first
    seed's runs and quality against violations. If it is stopped, the same --out continues it.

    \b
    Examples:
      slosched cascade compare sdturbo --seeds 5 --jobs 4 --out sdturbo
      slosched cascade compare sdxs --policies cascade,diffserve,diffserve:routing=random
      slosched cascade compare sdturbo --policies diffserve,diffserve:batching=aimd,diffserve:blind_scores=true
      slosched cascade compare sdxlltn --preset sanity --seeds 1 --trace trace.txt --scores dist.txt
    """
    from slosched.cascade.compare import cells_of, write_comparison
    from slosched.cascade.compare import compare as run_cells
    from slosched.cli.sim_display import JobsDisplay

    base = experiment_of(
        name, trace, workers, preset, options, scores, duration, exec_sigma, faults, published
    )
    base = replace(base, preempt=preempt)
    variants = variants_of(policies, preset, base, options)
    directory = directory_of(out, "cascade-compare")
    several = range(seed, seed + seeds)
    cells = cells_of(base, variants, several, directory)
    for cell in cells:
        cell.experiment.check()
    if not json:
        say(_title_of_all(base, variants, several))
    with stopped_by_signals() as stopping, ExitStack() as displays:
        try:
            comparison = run_cells(
                cells,
                processes=jobs,
                progress=lambda names: displays.enter_context(JobsDisplay(names)),
                stop=stopping,
            )
        except KeyboardInterrupt:
            warn(f"complete runs are kept; --out {directory} continues the comparison")
            raise
    files, problem = write_comparison(comparison, cells, directory, published=published)
    if problem:
        warn(f"no figures: {problem}")
    if json:
        print_json({**comparison.as_dict(), "files": [str(file) for file in files]})
        return
    say(comparison.text())
    if comparison.reused:
        say(f"{comparison.reused} of {len(cells)} runs were there")
    if base.spec().quality is not None:
        say(_HONESTY)
    for file in files:
        say(f"wrote {file}")


app.add_typer(
    cascade_digits.app, name="digits", short_help="A small cascade that is really measured."
)
app.command("profile", short_help="Measure a cascade's real models, and write its file.")(
    cascade_real.profile
)
app.command("controller", short_help="The artifact's controller (port 50050).")(
    cascade_artifact.controller
)
app.command("load-balancer", short_help="The artifact's load balancer, which is not needed.")(
    cascade_artifact.load_balancer
)
app.command("worker", short_help="The artifact's worker: one emulated GPU.")(
    cascade_artifact.worker
)
app.command("sink", short_help="The artifact's sink, which is not needed.")(cascade_artifact.sink)
app.command("client", short_help="The artifact's client: replays a trace.")(cascade_artifact.client)
