"""`slosched share`: models that share one GPU, as Deft and HotCarbon-24 ran them, and in other modes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from slosched.cli import share_carbon, share_results, share_sweep
from slosched.cli.ask import Json
from slosched.cli.config_options import Options
from slosched.cli.guard import SloschedGroup
from slosched.cli.help import SloschedTyper
from slosched.cli.output import beside, print_json, say, warn
from slosched.cli.share_calls import (
    check_deft_logs,
    check_models,
    copy_deft_logs,
    mix_dir,
    summaries,
)
from slosched.cli.share_log import ShareLog, share_log
from slosched.cli.share_options import (
    Described,
    Models,
    TakesCommand,
    described,
    describes_experiment,
)
from slosched.cli.share_table import off_table, run_line, runs_table, tuned_lines
from slosched.cli.stopping import stopped_by_signals
from slosched.errors import InvalidConfig
from slosched.output_files import check_folder

app = SloschedTyper(cls=SloschedGroup, name="share", rich_markup_mode=None, no_args_is_help=True)


@app.callback()
def share() -> None:
    """Models that share one GPU: latency, throughput, preemption, power, energy and carbon of each.

    run takes Deft's JSON files and HotCarbon-24's command line as they are, and TOML files; simulate does
    the same in virtual time. Each mode is another way to share:

    \b
      exclusive  each model alone, one after the other: the baseline
      tm         a process for each, under the driver's time slicing
      mps        a process for each, under CUDA's Multi-Process Service (also mps-uncap)
      streams    one process, a CUDA stream of its own priority for each
      preempt    one process, one lane: a model of higher priority interrupts between segments
      gate       a process for each; low ones pass a gate in shared memory at module boundaries

    \b
    Examples:
      slosched share run --device-type a100 --device-id 0 --modes tm --duration 20 diffusion-1 whisper-1
      slosched share run -f input_control.json
      slosched share plot-jct --model-A-jct-log logs/model_A.csv --model-B-jct-log logs/model_B.csv
      slosched share run --device emulated --modes tm,preempt bert-1 diffusion-1
      slosched share spec -f input_control.json > mine.toml
    """


_Out = Annotated[
    Path,
    typer.Option(
        metavar="DIR", help="Folder of all results; what is there already is not run again."
    ),
]
_Layout = Annotated[
    str,
    typer.Option(
        metavar="slosched|hotcarbon",
        help="hotcarbon: its seven files also where HotCarbon puts them, with a row for each mode.",
    ),
]
_DeftCompat = Annotated[
    bool,
    typer.Option("--deft-compat", help="Deft's CSV files with the warm-up as their first row."),
]
_NoSolo = Annotated[
    bool,
    typer.Option(
        "--no-solo",
        help="Without the runs of each model alone, with which the others are compared.",
    ),
]
_HONESTY = {
    "real": "random weights: outputs are meaningless, timings are real",
    "emulated": "nothing ran: times and energy are computed from profiles of each model alone",
}


@app.command("run", cls=TakesCommand, short_help="Run models on one GPU in each mode.")
@describes_experiment
def run(
    ctx: typer.Context,
    models: Models = None,
    *,
    asked: Options,
    out: _Out = Path("results"),
    layout: _Layout = "slosched",
    deft_compat: _DeftCompat = False,
    no_solo: _NoSolo = False,
    again: Annotated[
        bool, typer.Option("--again", help="Run again what is there already.")
    ] = False,
    json: Json = False,
) -> None:
    """Load all models, let their clients begin together, and measure until the duration is over.

    Models come from Deft's JSON, a TOML file or the command line, as HotCarbon writes them. First each runs
    alone, then all together in each mode. What a model does wrong ends that model alone; the exit code is
    then not 0. A mode that this machine lacks is "unavailable", and the others run. Weights are random: only
    times and energy mean something. No root is needed: USE_SUDO and VENV have no effect.

    With Deft's JSON, each model's CSV also goes where the file says (output_file_path).

    Behind -- a program of your own runs beside the models, under tm or mps, until the duration is over. Its
    own end before that is told with its exit code.

    \b
    Examples:
      slosched share run --device-type h200 diffusion-1 whisper-1 bert-1 bert-1
      slosched share run --device-type a100 --device-id 1 --modes tm,mps,preempt --duration 60 gpt-1 bert-8
      slosched share run -f input_controlsync.json --repeats 5 --out sync1
      slosched share run -f mine.toml --device cpu --duration 10s
      slosched share run --modes tm --device-type h200 bert-1 -- python train.py
    """
    _check_layout(layout)
    found = described(ctx, models, asked)
    check_models(found.spec)
    check_folder(out)
    check_deft_logs(found.deft_logs)
    with share_log(beside if json else say) as log:
        _begin(found, log)
        with stopped_by_signals() as stopping:
            from slosched.share.experiment import run_experiment

            outcome = run_experiment(
                found.spec,
                out,
                layout=layout,
                deft_compat=deft_compat,
                solo=not no_solo,
                resume=not again,
                say=log.follow,
                stopped=stopping,
            )
        # What was measured before Ctrl-C is shown, too.
        virtual = found.spec.device == "emulated"
        directories = [run.directory for run in outcome.runs]
        _print_results(found, directories, log, virtual=virtual, json=json)
        if stopping():
            raise typer.Exit(stopping.exit_code)
        if outcome.error_code:
            raise typer.Exit(outcome.error_code)
        log.say(f"Run success: results are stored in {mix_dir(found.spec, out)}")


def _check_layout(layout: str) -> None:
    from slosched.share.result_paths import LAYOUTS

    if layout not in LAYOUTS:
        raise InvalidConfig(f"--layout must be {' or '.join(LAYOUTS)}, not {layout!r}")


def _begin(found: Described, log: ShareLog) -> None:
    from slosched.share.spec_file import spec_text

    for warning in found.warnings:
        warn(warning)
        log.note(f"warning: {warning}")
    log.note(f"the experiment as TOML:\n{spec_text(found.spec)}")


def _print_results(
    found: Described, directories: Sequence[Path], log: ShareLog, *, virtual: bool, json: bool
) -> None:
    """Print what the runs in `directories` came to, and give Deft's logs their place."""
    import msgspec

    results = summaries(directories)
    metrics = [result.metrics for result in results]
    table = runs_table(metrics)
    if table:
        log.say(table)
    for each in metrics:
        log.say(run_line(each, metrics))
    for line in tuned_lines(metrics):
        log.say(line)
    if table:
        log.say(_HONESTY["emulated" if virtual else "real"])
    for file in copy_deft_logs(found.spec, directories, found.deft_logs):
        log.say(f"wrote {file}")
    if json:
        print_json([msgspec.to_builtins(result) for result in results])


@app.command("simulate", cls=TakesCommand, short_help="The same in virtual time, without a GPU.")
@describes_experiment
def simulate(
    ctx: typer.Context,
    models: Models = None,
    *,
    asked: Options,
    out: _Out = Path("simulated"),
    layout: _Layout = "slosched",
    deft_compat: _DeftCompat = False,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Measured runs of the same models: say how far off the prediction is.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Predict an experiment from its models alone, and write the files that a run would.

    The decisions are those of a real run, over lanes in virtual time. How fast models are beside one another
    is computed from profiles of each alone: --profile names a device (a100, a6000, 4090, h200), a file or
    the folder of a finished run. With --against each figure is set beside the measured one.

    \b
    Examples:
      slosched share simulate --modes tm,mps,preempt --profile a6000 bert-1 whisper-1
      slosched share simulate -f input_controlevent.json
      slosched share simulate -f mine.toml --profile results --against results
    """
    _check_layout(layout)
    found = described(ctx, models, asked)
    with share_log(beside if json else say) as log:
        _begin(found, log)
        from slosched.share.simulate import simulate as run_virtual

        simulation = run_virtual(
            found.spec,
            out,
            against=against,
            layout=layout,
            deft_compat=deft_compat,
            say=log.follow,
        )
        found = replace(found, deft_logs=())
        _print_results(found, simulation.paths, log, virtual=True, json=json)
        if simulation.off:
            log.say(off_table(simulation.off))
        log.say(f"models alone: those of {simulation.device} ({simulation.measured})")
        if not simulation.fine:
            raise typer.Exit(1)
        log.say(f"Run success: results are stored in {mix_dir(found.spec, out)}")


@app.command("spec", cls=TakesCommand, short_help="Print an experiment as a TOML file.")
@describes_experiment
def spec(
    ctx: typer.Context,
    models: Models = None,
    *,
    asked: Options,
    json: Json = False,
) -> None:
    """Read Deft's JSON, HotCarbon's command line or a TOML file, and print the experiment as TOML.

    The file that comes out runs the same experiment with -f, and is the place to go on from: open loops,
    SLOs, boundaries, priorities (docs/share.md).

    \b
    Examples:
      slosched share spec -f input_control.json > mine.toml
      slosched share spec --device-type h200 --modes tm,preempt --duration 30 diffusion-1 whisper-1
      slosched share spec -f mine.toml --repeats 5 --json
    """
    import msgspec

    from slosched.share.spec_file import spec_text

    found = described(ctx, models, asked)
    for warning in found.warnings:
        warn(warning)
    if json:
        print_json(msgspec.to_builtins(found.spec))
        return
    say(spec_text(found.spec).rstrip("\n"))


app.command("sweep", short_help="Many experiments that differ in some keys.")(share_sweep.sweep)
app.command("plot-jct", short_help="Deft's picture: latency of two models against time.")(
    share_results.plot_jct
)
app.command("plot", short_help="Draw what a folder of runs allows.")(share_results.plot)
app.command("import", short_help="Read results of Deft or HotCarbon-24.")(share_results.import_)
app.command("compare", short_help="Mixes then and now: STP and energy.")(share_results.compare)
app.command("carbon", short_help="Carbon and cost, by constants of your own.")(share_carbon.carbon)
