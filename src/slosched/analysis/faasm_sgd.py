"""The figure of `slosched exp sgd`, from its records: losses over epochs and time, and what N workers cost.

After Faasm's figure 6 (training time, network transfers and billable memory against the parallelism).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from slosched.analysis import style
from slosched.analysis.legends import legend_below, look_of, size_with_legend
from slosched.errors import InvalidConfig

Record = Mapping[str, Any]
#: The order of the systems, which gives each the same colour in every figure.
SYSTEMS = ("shared", "copies", "sum-delta", "sequential")
_LABELS = {
    "shared": "shared: one copy of the state per host",
    "copies": "copies: one per instance, pushes overwrite",
    "sum-delta": "sum-delta: one per instance, pushes add",
    "sequential": "sequential: one process, no calls",
}
_TIME, _BYTES, _BILL, _MEMORY = (
    "Training time (s)",
    "Bytes exchanged (MB)",
    "Billed memory (GB s)",
    "Memory of all instances (MB)",
)


def draw(records: Sequence[Record], title: str, path: Path, *, note: str = "") -> list[Path]:
    """Draw the records of one size as PATH.png and PATH.pdf, with `note` below the title; return the paths.

    Each record is of one training: "system", "workers", "train_s", "losses", "epoch_ends_s", and except of the
    sequential ones the bytes and the bill. Raises InvalidConfig without any.
    """
    shown = [name for name in SYSTEMS if any(each["system"] == name for each in records)]
    if not shown:
        raise InvalidConfig("nothing to draw: no training is complete")
    names = [_LABELS[name] for name in shown]
    most = max(int(each["workers"]) for each in records)
    with style.look():
        figure = style.Figure(figsize=size_with_legend(11.0, 6.4, names), layout="constrained")
        axes = figure.subplots(2, 3)
        _curves(axes[0][0], records, shown, most, by_time=False)
        _curves(axes[0][1], records, shown, most, by_time=True)
        values: tuple[tuple[Any, str, Callable[[Record], float | None]], ...] = (
            (axes[0][2], _TIME, lambda each: float(each["train_s"])),
            (axes[1][0], _BYTES, _megabytes),
            (axes[1][1], _BILL, lambda each: each.get("gb_s_instances")),
            (axes[1][2], _MEMORY, lambda each: each.get("instances_pss_mb")),
        )
        for ax, label, value in values:
            _against_workers(ax, records, shown, label, value)
        lines = [f"{title}: medians and ranges over seeds", *([note] if note else [])]
        figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=9.5)
        legend_below(figure, axes[0][0], names)
        return style.save(figure, path.parent, path.name)


def _curves(
    ax: Any, records: Sequence[Record], shown: Sequence[str], most: int, *, by_time: bool
) -> None:
    """Each system's losses with the most workers, of the seed whose time is the median."""
    target = None
    for place, name in enumerate(SYSTEMS):
        found = [
            each
            for each in records
            if each["system"] == name and (each["workers"] == most or name == "sequential")
        ]
        if name not in shown or not found:
            # The legend names all that are shown anywhere.
            if name in shown:
                ax.plot(
                    [], [], color=look_of(place)[0], marker=look_of(place)[1], label=_LABELS[name]
                )
            continue
        found.sort(key=lambda each: float(each["train_s"]))
        middle = found[len(found) // 2]
        target = middle.get("target")
        losses = middle["losses"]
        xs = middle["epoch_ends_s"] if by_time else range(1, len(losses) + 1)
        colour, marker = look_of(place)
        every = max(1, len(losses) // 8)
        ax.plot(xs, losses, color=colour, marker=marker, markevery=every, label=_LABELS[name])
    if target is not None:
        ax.axhline(target, color="#8a8a8a", linewidth=1.0, linestyle=":")
        ax.annotate(
            "target",
            (0.01, target),
            xycoords=("axes fraction", "data"),
            ha="left",
            va="top",  # the losses begin above it, so there is room at the left
            fontsize=8.5,
            color="#8a8a8a",
        )
    ax.set_xlabel("Time (s)" if by_time else "Epochs")
    ax.set_ylabel("Loss (root of the mean hinge)")
    ax.set_title(f"{most} workers")
    if by_time:
        ax.set_xscale("log")
        style.write_out(ax.xaxis)
    else:
        ax.set_xlim(left=0)
        ax.xaxis.set_major_locator(style.WholeLocator(5, integer=True))


def _against_workers(
    ax: Any,
    records: Sequence[Record],
    shown: Sequence[str],
    label: str,
    value: Callable[[Record], float | None],
) -> None:
    """A line for each system: medians, with bars from the least to the most."""
    counts = sorted({int(each["workers"]) for each in records})
    for place, name in enumerate(SYSTEMS):
        points: dict[int, list[float]] = {}
        for each in records:
            found = value(each)
            if each["system"] == name and found is not None:
                points.setdefault(int(each["workers"]), []).append(float(found))
        if name not in shown or not points:
            continue
        colour, marker = look_of(place)
        xs = sorted(points)
        middles = [median(points[x]) for x in xs]
        if name == "sequential":  # it has one worker, and is drawn for comparison with all numbers
            ax.axhline(middles[0], color=colour, linestyle="--", linewidth=1.2)
            ax.annotate(
                "sequential",
                (0.99, middles[0]),
                xycoords=("axes fraction", "data"),
                xytext=(0, 2),
                textcoords="offset points",
                ha="right",
                va="bottom",
                fontsize=8.5,
                color=colour,
            )
            continue
        below = [m - min(points[x]) for x, m in zip(xs, middles, strict=True)]
        above = [max(points[x]) - m for x, m in zip(xs, middles, strict=True)]
        ax.errorbar(
            xs, middles, yerr=[below, above], color=colour, marker=marker, capsize=3, elinewidth=1
        )
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(style.FixedLocator(counts))
    ax.xaxis.set_minor_locator(style.NullLocator())
    ax.xaxis.set_major_formatter(style.FuncFormatter(lambda at, _: f"{at:.0f}"))
    ax.set_ylim(bottom=0)
    ax.set_xlabel("Workers")
    ax.set_ylabel(label)


def _megabytes(record: Record) -> float | None:
    names = ("inputs_pulled_bytes", "weights_pulled_bytes", "weights_pushed_bytes")
    if any(name not in record for name in names):
        return None
    return sum(int(record[name]) for name in names) / 1e6
