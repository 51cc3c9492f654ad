"""`slosched share`: models that share one GPU, as Deft and HotCarbon-24 ran them, and in other modes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slosched.cli import share_results
from slosched.cli.ask import Json
from slosched.cli.config_options import Options
from slosched.cli.guard import SloschedGroup
from slosched.cli.help import SloschedTyper
from slosched.cli.output import beside, print_json, say, warn
from slosched.cli.share_log import ShareLog, share_log
from slosched.cli.share_options import (
    Described,
    Models,
    TakesCommand,
    described,
    describes_experiment,
)
from slosched.cli.stopping import stopped_by_signals
from slosched.errors import InvalidConfig
from slosched.output_files import check_folder

if TYPE_CHECKING:
    from slosched.share.experiment import Outcome

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
_LAYOUTS = ("slosched", "hotcarbon")


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
        bool, typer.Option("--again", help="Run what is there already once more.")
    ] = False,
    json: Json = False,
) -> None:
    """Load all models, let their clients begin together, and measure until the duration is over.

    Models come from Deft's JSON, a TOML file or the command line, as HotCarbon writes them. First each runs
    alone, then all together in each mode. What a model does wrong ends that model alone; the exit code is
    then not 0. A mode that this machine lacks is "unavailable", and the others run. Weights are random: only
    times and energy mean something. No root is needed: USE_SUDO and VENV have no effect.

    With Deft's JSON, each model's CSV also goes where the file says (output_file_path).

    Behind -- a program of your own runs beside the models, under tm or mps; it is started anew until the
    duration is over.

    \b
    Examples:
      slosched share run --device-type h200 diffusion-1 whisper-1 bert-1 bert-1
      slosched share run --device-type a100 --device-id 1 --modes tm,mps,preempt --duration 60 gpt-1 bert-8
      slosched share run -f input_controlsync.json --repeats 5 --out sync1
      slosched share run -f mine.toml --device cpu --duration 10s
      slosched share run --modes tm --device-type h200 bert-1 -- python train.py
    """
    if layout not in _LAYOUTS:
        raise InvalidConfig(f"--layout must be {' or '.join(_LAYOUTS)}, not {layout!r}")
    found = described(ctx, models, asked)
    check_folder(out)
    for warning in found.warnings:
        warn(warning)
    with share_log(beside if json else say) as log:
        log.note(f"{found.spec}")
        for warning in found.warnings:
            log.note(f"warning: {warning}")
        with stopped_by_signals() as stopping:
            from slosched.share.experiment import run_experiment

            outcome = run_experiment(
                found.spec,
                out,
                layout=layout,
                deft_compat=deft_compat,
                solo=not no_solo,
                resume=not again,
                say=log.say,
                stopped=stopping,
            )
            if stopping():
                raise KeyboardInterrupt
        _print_outcome(outcome, found, out, log, json=json)
        if outcome.error_code:
            raise typer.Exit(outcome.error_code)


def _print_outcome(
    outcome: Outcome, found: Described, out: Path, log: ShareLog, *, json: bool
) -> None:
    raise NotImplementedError


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


app.command("plot-jct", short_help="Deft's picture: latency of two models against time.")(
    share_results.plot_jct
)
