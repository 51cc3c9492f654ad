"""`slosched plot`: figures from the telemetry files of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slosched.cli.ask import Json
from slosched.cli.guard import SloschedGroup
from slosched.cli.output import print_json, say
from slosched.errors import InvalidConfig


class PlotGroup(SloschedGroup):
    noun = "figure"


app = typer.Typer(
    cls=PlotGroup,
    name="plot",
    rich_markup_mode=None,
    no_args_is_help=True,
    subcommand_metavar="FIGURE RUN_DIR...",
)


@app.callback()
def plot() -> None:
    """Draw a published figure from run directories.

    Figures are drawn from the telemetry files alone. This needs matplotlib: pip install slosched[plot].
    """


@app.command("fig7")
def fig7(
    run_dirs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN_DIR...",
            help="Directories with clockwork_request_log.tsv or client_log.tsv.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Where the files go. Default: figures/ in the first run directory."),
    ] = None,
    published: Annotated[
        bool,
        typer.Option("--published", help="The 4 s windows and the look of the published plot."),
    ] = False,
    table: Annotated[
        bool, typer.Option("--table/--no-table", help="Print each run's numbers too. Default yes.")
    ] = True,
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
    for run_dir in run_dirs:
        if not run_dir.is_dir():
            raise InvalidConfig(f"{run_dir} is no directory; give the directory of a run")
    from slosched.analysis.fig7 import plot_fig7
    from slosched.analysis.tables import as_json, render_text, summarise_steps

    files = plot_fig7(run_dirs, out or run_dirs[0] / "figures", published=published)
    if json:
        steps = {str(run_dir): as_json(summarise_steps(run_dir)) for run_dir in run_dirs}
        print_json({"files": [str(file) for file in files], "runs": steps})
        return
    if table:
        for run_dir in run_dirs:
            say(f"{run_dir}\n{render_text(summarise_steps(run_dir))}\n")
    for file in files:
        say(f"wrote {file}")
