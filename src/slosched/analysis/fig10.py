"""Figure 10: how far predictions were off, as tails of the errors (OSDI'20, §6.5).

Two errors of each load and inference that succeeded: of its *duration* (measured - expected), and of
its *completion* (when it ended - when it was expected to end, both from its sending). Above 0 it took
longer than predicted: the controller **under**-predicted. The artifact's plotter labels that side
"Overpredict"; here each side is named after the prediction. An action that was exactly as predicted (an
emulated load) is on neither side; its share is printed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slosched.analysis.drawn import Drawn, columns_text, plain
from slosched.analysis.runs import read_actions
from slosched.analysis.tails import named_quantiles, tail, tail_axis
from slosched.codes import ActionType
from slosched.errors import InvalidConfig
from slosched.units import NS_PER_MS

COLUMNS = (
    "action_type",
    "status",
    "expected_exec_duration",
    "worker_exec_duration",
    "expected_exec_complete",
    "worker_exec_complete",
)
_KINDS = {"INFER": ActionType.INFER, "LOAD": ActionType.LOAD_WEIGHTS}
_ERRORS = {
    "duration": ("worker_exec_duration", "expected_exec_duration"),
    "completion": ("worker_exec_complete", "expected_exec_complete"),
}
_UNDER, _OVER, EXACT = (
    "under-predicted (took longer)",
    "over-predicted (was sooner)",
    "exactly as predicted",
)
#: What is smaller is drawn at this: a logarithmic axis has no 0, and errors of 100 ns do not matter.
_LEAST_MS = 1e-3


@dataclass(frozen=True)
class ErrorSide:
    """The errors of one kind of action on one side, as sizes in ms. `share` is of all such actions."""

    kind: str
    error: str
    side: str
    actions: int
    share: float
    errors_ms: NDArray[np.float64]


def plot_fig10(run_dir: Path, out: Path) -> Drawn:
    """Draw the run into the directory `out` as fig10.png and .pdf.

    Raises InvalidConfig if no inference or load succeeded or there is no action log, MalformedLog,
    MissingPackage.
    """
    log = read_actions(run_dir, only=COLUMNS)
    sides = error_sides(log.columns)
    if not sides:
        raise InvalidConfig(f"nothing to draw: in {run_dir} no load and no inference succeeded")
    numbers = [_numbers(side) for side in sides]
    from slosched.analysis import style

    with style.look():
        files = style.save(error_figure(sides), out, "fig10")
    return Drawn(files, {"sides": plain(numbers)}, _text(numbers))


def error_sides(log: Mapping[str, NDArray[Any]]) -> list[ErrorSide]:
    """Return the errors of an action log's columns (COLUMNS), by kind of action, error and side."""
    return [side for kind in _KINDS for error in _ERRORS for side in _sides(log, kind, error)]


def _sides(log: Mapping[str, NDArray[Any]], kind: str, error: str) -> list[ErrorSide]:
    chosen = (log["action_type"] == _KINDS[kind]) & (log["status"] == 0)
    actual, expected = (log[name][chosen] for name in _ERRORS[error])
    errors_ms = (actual - expected) / NS_PER_MS
    sides = []
    for name, sizes in (
        (_UNDER, errors_ms[errors_ms > 0]),
        (_OVER, -errors_ms[errors_ms < 0]),
        (EXACT, errors_ms[errors_ms == 0]),
    ):
        if len(sizes):
            share = len(sizes) / len(errors_ms)
            sides.append(
                ErrorSide(
                    kind=kind,
                    error=error,
                    side=name,
                    actions=len(sizes),
                    share=share,
                    errors_ms=sizes,
                )
            )
    return sides


def error_figure(sides: Sequence[ErrorSide], *, width_in: float = 9.6) -> Any:
    """Return the figure of at least one side. To be made and saved within `style.look()`."""
    from slosched.analysis import style

    kinds = [kind for kind in _KINDS if any(side.kind == kind for side in sides)]
    figure = style.Figure(figsize=(width_in, 3.3 * len(kinds) + 0.4), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)
    axes = figure.subplots(len(kinds), len(_ERRORS), squeeze=False)
    for row, kind in enumerate(kinds):
        for column, error in enumerate(_ERRORS):
            chosen = [s for s in sides if (s.kind, s.error) == (kind, error)]
            _draw_panel(axes[row][column], chosen)
            axes[row][column].set_title(f"{kind}: {error}")
    return figure


def _draw_panel(ax: Any, sides: list[ErrorSide]) -> None:
    from slosched.analysis.style import COLOURS, PALE, FuncFormatter

    most_nines = 1.0
    if all(side.side == EXACT for side in sides):
        # An axis with nothing on it would look like a figure that failed.
        ax.set_axis_off()
        text = f"all {sum(side.actions for side in sides):,} exactly as predicted"
        ax.text(0.5, 0.5, text, ha="center", va="center", color=PALE, transform=ax.transAxes)
        return
    for side in sides:
        if side.side == EXACT:
            ax.plot([], [], color=PALE, linestyle="", marker=".", label=_legend(side))
            continue
        nines, errors = tail(side.errors_ms)
        most_nines = max(most_nines, nines[-1])
        ax.plot(
            [max(error, _LEAST_MS) for error in errors],
            nines,
            color=COLOURS[1 if side.side == _UNDER else 0],
            linestyle="-" if side.side == _UNDER else (0, (3, 1.2)),
            label=_legend(side),
        )
    ax.set_xscale("log")
    largest = max(float(side.errors_ms.max()) for side in sides)
    ax.set_xlim(_LEAST_MS * 0.9, max(2 * largest, 1.0))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    tail_axis(ax, most_nines)
    ax.set_ylim(top=1.3 * most_nines)  # room for the legend
    ax.set_ylabel("Percentile of its side")
    ax.set_xlabel("Size of the error (ms)")
    ax.legend(loc="upper left", fontsize=8)


def _legend(side: ErrorSide) -> str:
    return f"{side.side}: {100 * side.share:.3g} %"


def _numbers(side: ErrorSide) -> dict[str, Any]:
    return {
        "kind": side.kind,
        "error": side.error,
        "side": side.side.partition(" ")[0],
        "actions": side.actions,
        "share": side.share,
        "error_ms": named_quantiles(side.errors_ms),
    }


def _text(numbers: list[dict[str, Any]]) -> str:
    named = ("p50", "p99", "p99.9", "p99.99", "max")
    headings = ("action", "error of its", "side", "actions", "share %")
    rows = [
        (
            n["kind"],
            n["error"],
            n["side"],
            n["actions"],
            100 * n["share"],
            *(n["error_ms"].get(name) for name in named),
        )
        for n in numbers
    ]
    note = "under-predicted: it took longer, or ended later, than predicted; over-predicted: sooner"
    return columns_text((*headings, *(f"{name} ms" for name in named)), rows) + "\n" + note
