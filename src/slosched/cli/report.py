"""`slosched report`: the results of runs, as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slosched.cli.ask import Json
from slosched.cli.output import print_json, say, warn
from slosched.clock import now_ns
from slosched.errors import InvalidDuration
from slosched.units import NS_PER_S, parse_duration_ns

_RunDirs = Annotated[
    list[Path],
    typer.Argument(
        metavar="RUN_DIR...",
        help="Directory with the logs of a run, live or simulated; several: a section each.",
        show_default=False,
    ),
]
_Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="The page. Default: report.html in the first RUN_DIR."),
]
_Window = Annotated[
    str | None,
    typer.Option(
        metavar="START,LENGTH",
        help="What the timeline of actions shows, counted from the first request: 12s,100ms. A bare number "
        "is in seconds. Default: a length that can be read, where the GPUs were busiest.",
    ),
]
_Force = Annotated[bool, typer.Option("--force", help="Replace the page if it is there.")]


def report(
    run_dirs: _RunDirs,
    *,
    out: _Out = None,
    window: _Window = None,
    force: _Force = False,
    json: Json = False,
) -> None:
    """Write the results of a run as one self-contained HTML page.

    It shows the share in time and its confidence, satisfaction and latency by SLO and over time, the
    distribution of latencies up to p99.9, the reasons why requests were not in time, prediction errors,
    the utilisation of each GPU, a window of predicted and actual GPU activity, the models, the worst
    actions, and the manifest. The page is made only from the files in the run directory; sections
    without data (no client log, no action log) are omitted, and the page says so. docs/report.md says
    how to read it. This needs matplotlib: pip install slosched[plot].

    \b
    Examples:
      slosched report slosched-runs/20260101T120000Z-simulation
      slosched report run --window 12s,100ms --out report.html --force
      slosched report infer5 fifo edf --out compared.html
    """
    from slosched.analysis.report import write_report

    written = write_report(
        run_dirs,
        out,
        window=None if window is None else parse_window(window),
        force=force,
        say=_Progress(),
    )
    if json:
        print_json(written.as_dict())
    else:
        runs = f"{len(written.runs)} runs" if len(written.runs) > 1 else "1 run"
        say(f"{runs}, {len(written.figures)} figures, {written.bytes / 1e6:.1f} MB")
        say(f"wrote {written.path}; open it in a browser")


class _Progress:
    """Says on stderr what is being done, once it has taken more than a second."""

    def __init__(self) -> None:
        self._begun_ns = now_ns()

    def __call__(self, text: str) -> None:
        seconds = (now_ns() - self._begun_ns) / NS_PER_S
        if seconds > 1:
            warn(f"{seconds:4.0f} s  {text}")


def parse_window(text: str) -> tuple[int, int]:
    """(start, length) in ns from "12s,100ms". Raises InvalidDuration."""
    start, comma, length = text.partition(",")
    if not comma:
        raise InvalidDuration(
            f"--window {text!r}: write a start and a length with a comma between, as 12s,100ms"
        )
    try:
        window = (
            parse_duration_ns(start.strip(), bare_unit="s"),
            parse_duration_ns(length.strip(), bare_unit="s"),
        )
    except InvalidDuration as error:
        raise InvalidDuration(f"--window {text!r}: {error}") from None
    if window[1] == 0:
        raise InvalidDuration(f"--window {text!r}: the length must be above 0")
    return window
