"""What commands print: lines, tables, JSON, and the progress of a sweep.

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

if TYPE_CHECKING:
    from rich.progress import TaskID

    from slosched.clients.sweep import SweepProgress

#: Without a terminal: a line when the step changes, and at least one in this many seconds.
_PLAIN_EVERY_S = 5.0


def say(text: str) -> None:
    """Print one line of an answer."""
    typer.echo(text)


def warn(text: str) -> None:
    """Print one line beside the answer, on stderr."""
    typer.echo(f"slosched: {text}", err=True)


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
    say(json.dumps(_finite(document), indent=2, default=str))


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


# --------------------------------------------------------------------------------- progress


class SweepDisplay(Protocol):
    """Shows how a sweep goes on; called about five times a second."""

    def __enter__(self) -> SweepDisplay: ...

    def __exit__(self, *error: object) -> None: ...

    def __call__(self, progress: SweepProgress) -> None: ...


def sweep_display(title: str) -> SweepDisplay:
    """Return a bar on a terminal, plain lines elsewhere; both on stderr."""
    return _Bar(title) if sys.stderr.isatty() else _Lines(title)


def progress_text(progress: SweepProgress) -> str:
    """Rate, satisfaction and current SLO in one line."""
    return (
        f"step {progress.step}/{progress.steps}  SLO {progress.slo}  "
        f"{progress.rate_per_s:.0f} r/s  in time so far {100 * progress.satisfaction:.1f} %"
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

    def __call__(self, progress: SweepProgress) -> None:
        if progress.step == self._step and progress.elapsed_s < self._next_s:
            return
        self._step = progress.step
        self._next_s = progress.elapsed_s + _PLAIN_EVERY_S
        where = f"{progress.elapsed_s:5.0f} / {progress.total_s:.0f} s"
        typer.echo(f"{self._title}: {where}  {progress_text(progress)}", err=True)


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

    def __call__(self, progress: SweepProgress) -> None:
        text = progress_text(progress)
        if self._task is None:
            self._task = self._bar.add_task(text, total=progress.total_s, title=self._title)
        self._bar.update(self._task, completed=progress.elapsed_s, description=text, refresh=True)
