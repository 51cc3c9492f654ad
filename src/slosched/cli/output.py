"""What commands print: lines, tables, JSON, and the progress of a run.

Answers go to stdout, so that they can be piped; progress and warnings go to stderr.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import typer

from slosched.descriptors import abandon
from slosched.loadgen.verdict import least_samples
from slosched.output_files import utf8, utf8_document
from slosched.units import format_duration, format_share

if TYPE_CHECKING:
    from rich.progress import TaskID

    from slosched.loadgen.results import RunProgress, RunResult, StepResult

#: Without a terminal: a line when the step changes, and at least one in this many seconds.
_PLAIN_EVERY_S = 5.0


def say(text: str) -> None:
    """Print one line of an answer."""
    # Within another program stdout may be strict, as `open_standard_streams` leaves it nowhere.
    typer.echo(utf8(text) if getattr(sys.stdout, "errors", "") == "strict" else text)


def warn(text: str) -> None:
    """Print one line beside the answer, on stderr."""
    beside(f"slosched: {text}")


def beside(text: str) -> None:
    """Print one line on stderr. A disk that is full there ends nothing: the answer is what counts."""
    try:
        typer.echo(text, err=True)
    except BrokenPipeError:
        raise
    except OSError:
        abandon(2)


class Announcer:
    """Prints a daemon's lines at once. A reader that goes away silences it, and ends nothing."""

    def __init__(self) -> None:
        self._closed = False

    def __call__(self, text: str) -> None:
        if self._closed:
            return
        try:
            print(text, flush=True)
        except (OSError, ValueError):  # the pipe, the terminal or the disk behind stdout is gone
            self._closed = True
            # What is left in the buffer would raise again at the interpreter's end.
            sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115


def print_json(document: object) -> None:
    """Print `document` as JSON, for programs. NaN and infinities become null, which JSON has."""
    say(json.dumps(_finite(utf8_document(document)), indent=2, default=str))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def table_text(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in aligned columns; numbers (and texts that begin with a digit) to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(headings), *cells]) for i in range(len(headings))]
    right = [bool(cells) and all(_is_number(row[i]) for row in cells) for i in range(len(headings))]
    lines = []
    for row in [list(headings), *cells]:
        parts = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def _is_number(text: str) -> bool:
    return text == "-" or text[:1].isdigit() or (text[:1] == "-" and text[1:2].isdigit())


# ------------------------------------------------------------------------------------ results


def print_result(result: RunResult) -> None:
    """Print the table of a run, live or simulated, and the remarks on it."""
    say(run_table(result))
    if result.slo_verdict:
        say(result.slo_verdict)
    say("in time: client, from the scheduled send; met: controller, from arrival there")
    say(
        f"in all {result.sent} requests, {format_share(result.satisfaction)} in time (client), "
        f"{format_share(result.controller_satisfaction)} met (controller)"
    )
    if result.random_weights:
        say("random weights: outputs are meaningless, timings are real")
    if not result.complete:
        say(f"this is a part of the run: {result.problem}")
    say(result.verdict)
    if result.run_dir is not None:
        say(f"written to {result.run_dir}")


def run_table(result: RunResult) -> str:
    """Return the run as a plain table: a row for each step, and for each group in it."""
    grouped = any(step.group for step in result.steps)
    headings = ["step", *(["group"] if grouped else []), "deadline", "sent"]
    headings += ["in time", "holds", "met", "goodput", "p50", "p99", "not served"]
    rows = [_row(step, grouped) for step in result.steps]
    return table_text(headings, rows)


def _row(step: StepResult, grouped: bool) -> list[object]:
    return [
        step.slo,
        *([step.group] if grouped else []),
        format_duration(step.slo_ns) if step.slo_ns else "-",
        step.sent,
        format_share(step.satisfaction),
        "sent late" if step.holds is None else step.holds.short,
        format_share(step.controller_satisfaction),
        f"{step.goodput_rps:.1f}/s",
        format_duration(step.latency_p50_ns) if step.latency_p50_ns else "-",
        _p99(step),
        ", ".join(f"{count} {name}" for name, count in step.codes.items() if name != "ok"),
    ]


def _p99(step: StepResult) -> str:
    if step.claimed_p99_ns is not None:
        return format_duration(step.claimed_p99_ns)
    return f"n<{least_samples()}" if step.succeeded else "-"


# ----------------------------------------------------------------------------------- progress


class RunDisplay(Protocol):
    """Shows the progress of a run; called about five times a second."""

    def __enter__(self) -> RunDisplay: ...

    def __exit__(self, *error: object) -> None: ...

    def __call__(self, progress: RunProgress) -> None: ...


def run_display(title: str) -> RunDisplay:
    """Return a bar on a terminal, plain lines elsewhere; both on stderr."""
    return _Bar(title) if sys.stderr.isatty() else _Lines(title)


def progress_text(progress: RunProgress) -> str:
    """Step, rate and satisfaction in one line."""
    return (
        f"step {progress.step}/{progress.steps}  {progress.label}  "
        f"{progress.rate_per_s:.0f} r/s  in time so far {format_share(progress.satisfaction, 1)}"
    )


class _Lines:
    def __init__(self, title: str) -> None:
        self._title = title
        self._step = 0
        self._next_s = 0.0

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *error: object) -> None:
        return

    def __call__(self, progress: RunProgress) -> None:
        if progress.step == self._step and progress.elapsed_s < self._next_s:
            return
        self._step = progress.step
        self._next_s = progress.elapsed_s + _PLAIN_EVERY_S
        ends = f" / {progress.total_s:.0f}" if math.isfinite(progress.total_s) else ""
        where = f"{progress.elapsed_s:5.0f}{ends} s"
        beside(f"{self._title}: {where}  {progress_text(progress)}")


class _Bar:
    def __init__(self, title: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.fields[title]}"),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=Console(stderr=True),
            # Drawn when told to, 0.4 ms each: a thread that draws would delay the sends.
            auto_refresh=False,
        )
        self._title = title
        self._task: TaskID | None = None

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def __call__(self, progress: RunProgress) -> None:
        text = progress_text(progress)
        if self._task is None:
            total_s = progress.total_s if math.isfinite(progress.total_s) else None
            self._task = self._bar.add_task(text, total=total_s, title=self._title)
        self._bar.update(self._task, completed=progress.elapsed_s, description=text, refresh=True)
