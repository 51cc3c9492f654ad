"""`slosched share` on what runs left behind: Deft's picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slosched.cli.ask import Json
from slosched.cli.output import print_json, say
from slosched.output_files import check_folder

if TYPE_CHECKING:
    from slosched.analysis.drawn import Drawn


def _print(drawn: Drawn, *, json: bool) -> None:
    if json:
        print_json({"files": [str(file) for file in drawn.files], **drawn.numbers})
        return
    say(f"{drawn.text}\n")
    for file in drawn.files:
        say(f"wrote {file}")


def plot_jct(
    *,
    model_a: Annotated[
        Path,
        typer.Option(
            "--model-A-jct-log",
            metavar="FILE",
            help="CSV of model A's requests.",
            show_default=False,
        ),
    ],
    model_b: Annotated[
        Path,
        typer.Option(
            "--model-B-jct-log",
            metavar="FILE",
            help="CSV of model B's requests.",
            show_default=False,
        ),
    ],
    save_dir: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of the picture.", show_default=False)
    ] = Path(),
    all_rows: Annotated[
        bool,
        typer.Option(
            "--all-rows", help="With the first row of each file, which is Deft's warm-up."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Draw the latency of two models against time, as Deft does: jct_vs_t.jpg.

    The files are Deft's, or those of `slosched share run`. This needs matplotlib: pip install slosched[plot].

    \b
    Examples:
      slosched share plot-jct --model-A-jct-log logs/model_A.csv --model-B-jct-log logs/model_B.csv
      slosched share plot-jct --model-A-jct-log a.csv --model-B-jct-log b.csv --save-dir figures
    """
    from slosched.analysis.share_figures import draw_jct

    check_folder(save_dir)
    _print(draw_jct(model_a, model_b, save_dir, first_row=all_rows), json=json)
