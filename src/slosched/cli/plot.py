"""`slosched plot`: figures from the telemetry files of runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slosched.cli.ask import Json
from slosched.cli.guard import SloschedGroup
from slosched.cli.help import SloschedTyper
from slosched.cli.output import print_json, say
from slosched.cli.values import duration_ns
from slosched.errors import InvalidConfig
from slosched.output_files import check_folder

if TYPE_CHECKING:
    from slosched.analysis.drawn import Drawn


class PlotGroup(SloschedGroup):
    noun = "figure"


app = SloschedTyper(
    cls=PlotGroup,
    name="plot",
    rich_markup_mode=None,
    no_args_is_help=True,
    subcommand_metavar="FIGURE RUN_DIR...",
)


@app.callback()
def plot() -> None:
    """Draw a published figure from run directories.

    Figures are drawn from the telemetry files alone, live or simulated. Windows of time are the
    published ones; a run that is too short for them says so, and takes shorter ones by option.
    `slosched experiment` makes the runs of a figure and draws it. This needs matplotlib: pip install
    slosched[plot].
    """


RunDirs = Annotated[
    list[Path],
    typer.Argument(
        metavar="RUN_DIR...", help="Directories with the logs of a run.", show_default=False
    ),
]
RunDir = Annotated[
    Path,
    typer.Argument(
        metavar="RUN_DIR", help="Directory with both logs of a run.", show_default=False
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(help="Where the files go. Default: figures/ in the first run directory."),
]
Window = Annotated[
    str | None,
    typer.Option(help="Width of a window, for example 2s; a bare number is in seconds."),
]
Table = Annotated[
    bool, typer.Option("--table/--no-table", help="Print the numbers too. Default yes.")
]


def _directory(out: Path | None, run_dirs: Sequence[Path]) -> Path:
    """Where the figure goes. Raises InvalidConfig unless every run directory is one."""
    if out is not None:
        check_folder(out)
    for run_dir in run_dirs:
        if not run_dir.is_dir():
            raise InvalidConfig(f"{run_dir} is not a directory; give the directory of a run")
    return out or run_dirs[0] / "figures"


def _span_ns(option: str, text: str | None, published_ns: int, *, may_be_0: bool = False) -> int:
    if text is None:
        return published_ns
    return 0 if may_be_0 and text in ("0", "0s") else duration_ns(option, text)


def _print(drawn: Drawn, *, table: bool, json: bool) -> None:
    if json:
        print_json({"files": [str(file) for file in drawn.files], **drawn.numbers})
        return
    if table:
        say(f"{drawn.text}\n")
    for file in drawn.files:
        say(f"wrote {file}")


@app.command("fig5")
def fig5(
    run_dirs: RunDirs,
    out: Out = None,
    window: Window = None,
    margin: Annotated[
        str | None, typer.Option(help="What is left out at the end of a run. Default 60s.")
    ] = None,
    table: Table = True,
    json: Json = False,
) -> None:
    """Goodput and latency of closed loops for several SLOs (OSDI'20, Figure 5).

    One run for each SLO; runs of several schedulers are drawn side by side. The 10 minutes
    of each run count that end one minute before its end. Latencies are those of all requests, refused ones too.

    \b
    Examples:
      slosched plot fig5 run-10ms run-25ms run-50ms run-100ms run-250ms run-500ms
      slosched plot fig5 run-* --window 20s --margin 1s --out figures
    """
    from slosched.analysis.fig5 import MARGIN_NS, WINDOW_NS, plot_fig5

    place = _directory(out, run_dirs)
    drawn = plot_fig5(
        run_dirs,
        place,
        window_ns=_span_ns("--window", window, WINDOW_NS),
        margin_ns=_span_ns("--margin", margin, MARGIN_NS, may_be_0=True),
    )
    _print(drawn, table=table, json=json)


@app.command("fig6")
def fig6(
    run_dir: RunDir,
    out: Out = None,
    window: Window = None,
    minor: Annotated[
        int | None,
        typer.Option(help="User id of the minor stream. Default: that of the first request."),
    ] = None,
    table: Table = True,
    json: Json = False,
) -> None:
    """Thousands of models that wake one by one on one GPU (OSDI'20, Figure 6).

    In windows of 10 s from the first request to a major model: goodput, latency, cold starts, and
    how busy the GPU and the link to it were.

    \b
    Example:
      slosched plot fig6 run-bursty --window 5s
    """
    from slosched.analysis.fig6 import WINDOW_NS, plot_fig6

    place = _directory(out, [run_dir])
    window_ns = _span_ns("--window", window, WINDOW_NS)
    _print(plot_fig6(run_dir, place, window_ns=window_ns, minor=minor), table=table, json=json)


@app.command("fig7")
def fig7(
    run_dirs: RunDirs,
    out: Out = None,
    published: Annotated[
        bool,
        typer.Option("--published", help="The 4 s windows and the look of the published plot."),
    ] = False,
    table: Table = True,
    json: Json = False,
) -> None:
    """Satisfaction, goodput and latency for each step of an SLO sweep (OSDI'20, Figure 7).

    Writes PNG and PDF, and prints where. Satisfaction counts from arrival at the controller, as
    published, and where a client log is there also from the scheduled send.

    \b
    Examples:
      slosched plot fig7 slosched-runs/20260101T120000Z-controller
      slosched plot fig7 run-n12-r600 run-n12-r1200 run-n12-r2400 --published --out figures
    """
    place = _directory(out, run_dirs)
    from slosched.analysis.fig7 import plot_fig7
    from slosched.analysis.runs import invalid_verdict
    from slosched.analysis.tables import as_json, render_text, summarise_steps

    files = plot_fig7(run_dirs, place, published=published)
    if json:
        steps = {str(run_dir): as_json(summarise_steps(run_dir)) for run_dir in run_dirs}
        print_json({"files": [str(file) for file in files], "runs": steps})
        return
    if table:
        for run_dir in run_dirs:
            invalid = invalid_verdict(run_dir)
            notice = f"\n{invalid}" if invalid else ""
            say(f"{run_dir}\n{render_text(summarise_steps(run_dir))}{notice}\n")
    for file in files:
        say(f"wrote {file}")


@app.command("fig8")
def fig8(
    run_dirs: RunDirs,
    out: Out = None,
    window: Window = None,
    foreground: Annotated[
        int | None,
        typer.Option(
            help="Instances in the foreground: user ids below this. Default: as the manifest says, else 6."
        ),
    ] = None,
    table: Table = True,
    json: Json = False,
) -> None:
    """Deadlines in the foreground beside closed loops in the background (OSDI'20, Figure 8).

    One run for each background. The foreground's satisfaction and the background's throughput in
    windows of 5 s, closed as the published plotter does it.

    \b
    Example:
      slosched plot fig8 run-alone run-m12-c16 run-m48-c4
    """
    from slosched.analysis.fig8 import WINDOW_NS, plot_fig8

    place = _directory(out, run_dirs)
    window_ns = _span_ns("--window", window, WINDOW_NS)
    drawn = plot_fig8(run_dirs, place, window_ns=window_ns, foreground=foreground)
    _print(drawn, table=table, json=json)


@app.command("fig9")
def fig9(
    run_dir: RunDir,
    out: Out = None,
    window: Window = None,
    skip: Annotated[
        str | None, typer.Option(help="What is left out at the start of the run. Default 600s.")
    ] = None,
    table: Table = True,
    json: Json = False,
) -> None:
    """A cluster under a trace of thousands of functions (OSDI'20, Figure 9).

    In windows of 60 s after the first 600 s: throughput and goodput, latency, batch size, models with
    a cold start, and cold starts per second.

    \b
    Example:
      slosched plot fig9 run-azure --skip 10s --window 2s
    """
    from slosched.analysis.fig9 import SKIP_NS, WINDOW_NS, plot_fig9

    place = _directory(out, [run_dir])
    drawn = plot_fig9(
        run_dir,
        place,
        window_ns=_span_ns("--window", window, WINDOW_NS),
        skip_ns=_span_ns("--skip", skip, SKIP_NS, may_be_0=True),
    )
    _print(drawn, table=table, json=json)


@app.command("fig10")
def fig10(run_dir: RunDir, out: Out = None, table: Table = True, json: Json = False) -> None:
    """How far predictions of inferences and loads were off (OSDI'20, Figure 10).

    Tails of two errors, of how long an action took and of when it ended. What took longer than
    predicted was under-predicted (the published plotter calls that side "Overpredict").

    \b
    Example:
      slosched plot fig10 run-azure
    """
    from slosched.analysis.fig10 import plot_fig10

    _print(plot_fig10(run_dir, _directory(out, [run_dir])), table=table, json=json)


@app.command("fig11")
def fig11(
    run_dirs: RunDirs,
    out: Out = None,
    window: Window = None,
    at: Annotated[
        int | None,
        typer.Option(help="Number of GPUs that is shown over time. Default 40, else the most."),
    ] = None,
    table: Table = True,
    json: Json = False,
) -> None:
    """How much load one controller can carry, by the number of GPUs (OSDI'20, Figure 11).

    One run for each number of GPUs and each trial. Left the load, goodput and batch size of one run in
    windows of 60 s, right the best window of each.

    \b
    Example:
      slosched plot fig11 run-n2-* run-n4-* run-n8-* --window 5s --at 8
    """
    from slosched.analysis.fig11 import WINDOW_NS, plot_fig11

    place = _directory(out, run_dirs)
    window_ns = _span_ns("--window", window, WINDOW_NS)
    _print(plot_fig11(run_dirs, place, window_ns=window_ns, at=at), table=table, json=json)


@app.command("calls")
def calls(
    run_dir: RunDir,
    out: Out = None,
    call: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="The call, by its call_id. Default: that of a client with the most calls below it.",
        ),
    ] = None,
    table: Table = True,
    json: Json = False,
) -> None:
    """A call of a function with all calls below it: their graph, and what each of them did in time.

    Each call is a node and a row; in large graphs, calls of one function with one parent are one node.
    A row is thin where the call waits or is suspended, and thick where it runs. The critical path is what
    no number of slots makes shorter. `slosched trace` shows all calls of a run in time.

    \b
    Examples:
      slosched plot calls slosched-runs/20260101T120000Z-controller
      slosched plot calls run --call 17 --out figures
    """
    from slosched.analysis.call_figure import plot_calls

    place = _directory(out, [run_dir])
    _print(plot_calls(run_dir, place, call_id=call), table=table, json=json)


@app.command("cascade")
def cascade(
    run_dirs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RUN_DIR]...",
            help="Runs of `slosched cascade`. Default: the last one of the artifact's commands, in logs/.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--cascade",
            metavar="NAME|FILE",
            help="The cascade that the runs served. Default: what they say, else sdturbo.",
        ),
    ] = None,
    published: Annotated[
        bool,
        typer.Option(
            "--published",
            help="Draw with the transformations of the artifact's plotter; the titles say so.",
        ),
    ] = False,
    out: Out = None,
    table: Table = True,
    json: Json = False,
) -> None:
    """Threshold, violations and FID of cascades over time (DiffServe, MLSys'25, Figure 5).

    Three graphs of what was measured, and the two averages: violations of all requests, and FID by the
    table at the share of light answers of the whole run. The artifact's plotter scales the threshold to
    0..1 and divides the heavy share by its maximum before it reads a FID; --published does that too.

    \b
    Examples:
      slosched plot cascade --cascade sdturbo
      slosched plot cascade --cascade sdxs runs/cascade/seed=0 runs/diffserve/seed=0 --out figures
      slosched plot cascade --cascade sdturbo runs/diffserve --published
    """
    from slosched.cascade.drawing import draw_directories
    from slosched.workloads.cascades import load_cascade

    chosen = run_dirs or [_last_run(Path("logs"))]
    spec = load_cascade(_served(chosen, name))
    place = _directory(out, chosen)
    _print(draw_directories(chosen, spec, place, published=published), table=table, json=json)


def _last_run(logs: Path) -> Path:
    """The last run of `slosched cascade controller`. Raises InvalidConfig if there is none."""
    found = {path: _number(path.name.removeprefix("run_")) for path in logs.glob("run_*")}
    runs = sorted(
        (path for path, at in found.items() if at is not None), key=lambda p: found[p] or 0
    )
    if not runs:
        raise InvalidConfig(f"{logs} holds no run of `slosched cascade controller`; name a RUN_DIR")
    return runs[-1]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _served(runs: Sequence[Path], given: str | None) -> str:
    """The cascade that the runs say they served. Raises InvalidConfig if `given` is another."""
    from slosched.cascade.summary import read_summary

    named = {
        str(document["cascade"])
        for run in runs
        if (document := read_summary(run)) is not None and "cascade" in document
    }
    if len(named) > 1:
        raise InvalidConfig(f"the runs served different cascades: {', '.join(sorted(named))}")
    served = next(iter(named), None)
    if given is not None and served is not None and given != served:
        raise InvalidConfig(f"the runs served {served}, not {given}; leave --cascade out")
    return given or served or "sdturbo"
