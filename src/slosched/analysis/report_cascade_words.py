"""What a report says of each cascade, in words: a figure and two tables."""

from __future__ import annotations

import math
from collections.abc import Sequence

from slosched.analysis import report_figures as draw
from slosched.analysis.report_cascade import CascadeNumbers, StageTimes
from slosched.analysis.report_figures import Figure
from slosched.analysis.report_page import Content, Titled, time
from slosched.units import NS_PER_S, format_share
from slosched.verdicts import MEANINGS, verdict_name

_STAGES_NOTE = (
    "A wait lasts from the queue of the stage to its exec, a whole stage until its result is handled. Requests "
    "that left the heavy queue without a run are not among these."
)


def cascade_keys(cascades: Sequence[CascadeNumbers]) -> list[str]:
    """The key of each one's figure and tables: "cascade", or with a number where a run has several."""
    if len(cascades) == 1:
        return ["cascade"]
    return [f"cascade-{place}" for place in range(1, len(cascades) + 1)]


def cascade_figure(numbers: CascadeNumbers, key: str) -> Figure | None:
    """Threshold, light share and waits over time; None for a run that is too short for windows."""
    if numbers.over_time is None:
        return None
    answers = numbers.light + numbers.heavy
    share = (
        f"{format_share(numbers.light / answers)} of the answers are" if answers else "No answer is"
    )
    width = time(numbers.over_time.width_s * NS_PER_S)
    caption = (
        f"{share} from the light program. Values are of windows of {width}, by when stages ended."
    )
    label = "Threshold, share of light answers and waits for each stage, over time"
    title = f"Cascade {numbers.name}"
    return Figure(key, title, caption, draw.cascade(numbers.over_time, key, label))


def cascade_tables(numbers: CascadeNumbers) -> list[Titled]:
    """How often each verdict was given, and how long stages took."""
    return [
        (f"Verdicts of the cascade {numbers.name}", "", _verdicts(numbers)),
        (f"Stages of the cascade {numbers.name}", _STAGES_NOTE, _stages(numbers)),
    ]


def _verdicts(numbers: CascadeNumbers) -> Content:
    total = sum(count for _, count in numbers.verdicts)
    rows = [
        [
            verdict_name(verdict),
            f"{count:,}",
            f"{100 * count / total:.3g} %",
            MEANINGS.get(verdict, ""),
        ]
        for verdict, count in numbers.verdicts
    ]
    return ("verdict", "stages", "of all", "what it means"), rows, (0, 3)


def _stages(numbers: CascadeNumbers) -> Content:
    headings = (
        "stage",
        "runs",
        "GPUs",
        "mean batch",
        *(f"{w} {q}" for w in _WHAT for q in ("p50", "p99")),
    )
    return headings, [_row(stage) for stage in numbers.stages], (0,)


_WHAT = ("wait", "exec", "whole")


def _row(stage: StageTimes) -> list[str]:
    quantiles = (*stage.wait_ns, *stage.exec_ns, *stage.whole_ns)
    times = ["-" if math.isnan(value) else time(value) for value in quantiles]
    return [stage.name, f"{stage.runs:,}", f"{stage.gpus:,}", f"{stage.mean_batch:.2f}", *times]
