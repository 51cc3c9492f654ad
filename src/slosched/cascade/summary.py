"""What a run of a cascade came to, in numbers: violations, shares, and quality by two counts.

FID by the table holds for light answers that a judge chose (`QualityCurve`). Where the clock chose a light
answer (forced), or a policy asked no judge (blind), that table says too much; the pessimistic FID counts a
forced light answer as one of an all-light system, and blind answers on the line from all heavy to all
light.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slosched.analysis.drawn import plain
from slosched.cascade.outcome import BLIND, FORCED, Outcome
from slosched.cascade_spec import QualityCurve
from slosched.codes import Verdict
from slosched.errors import InvalidConfig
from slosched.units import NS_PER_S

SUMMARY = "summary.json"

#: The columns of each table. Both counts of quality stand in every one.
HEADINGS = (
    "violations",
    "light",
    "deferred",
    "forced",
    "FID (table)",
    "FID (pessimistic)",
    "threshold",
    "GPU changes",
)


@dataclass(frozen=True)
class Summary:
    """One run. `violation_ratio` is of all requests, shares of light and forced answers are of all answers, and
    `deferred_share` is of the requests that a judge saw (of all answers, where none was asked).

    NaN where there is nothing to count; the FIDs are NaN without a quality curve. `mean_threshold` is over
    time.
    """

    requests: int
    answered: int
    violations: int
    late: int
    dropped: int
    violation_ratio: float
    light: int
    heavy: int
    forced: int
    blind: int
    deferred: int
    light_share: float
    deferred_share: float
    forced_share: float
    fid: float
    pessimistic_fid: float
    mean_threshold: float
    gpu_changes: int
    plans: int
    infeasible_plans: int
    verdicts: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """The numbers for JSON: None where there is nothing to count."""
        document = plain(asdict(self))
        assert isinstance(document, dict)
        return document

    def cells(self) -> list[str]:
        """A row under HEADINGS."""
        return [
            _text(self.violation_ratio, 4),
            _text(self.light_share, 3),
            _text(self.deferred_share, 3),
            _text(self.forced_share, 3),
            _text(self.fid, 2),
            _text(self.pessimistic_fid, 2),
            _text(self.mean_threshold, 3),
            str(self.gpu_changes),
        ]


def _text(value: float, digits: int) -> str:
    return "-" if np.isnan(value) else f"{value:.{digits}f}"


def summarise(
    outcome: Outcome, quality: QualityCurve | None, *, random_scores: bool = False
) -> Summary:
    """Count `outcome`. With `random_scores` scores say nothing of the requests, so every answer is blind."""
    answered = int(outcome.answered.sum())
    light, heavy = outcome.light, outcome.heavy
    forced = outcome.is_in(FORCED)
    blind = (light | heavy) if random_scores else outcome.is_in(BLIND)
    judged = int(outcome.judged.sum())
    # Without a judge, what went to the heavy program counts instead.
    deferred = int(outcome.deferred.sum()) if judged else int(heavy.sum())
    fid, pessimistic = _fids(light, heavy, forced, blind, quality)
    violations = int((~outcome.ok).sum())
    return Summary(
        requests=len(outcome),
        answered=answered,
        violations=violations,
        late=int((outcome.answered & ~outcome.ok).sum()),
        dropped=len(outcome) - answered,
        violation_ratio=_share(violations, len(outcome)),
        light=int(light.sum()),
        heavy=int(heavy.sum()),
        forced=int(forced.sum()),
        blind=int(blind.sum()),
        deferred=deferred,
        light_share=_share(int(light.sum()), int((light | heavy).sum())),
        deferred_share=_share(deferred, judged or answered),
        forced_share=_share(int(forced.sum()), answered),
        fid=fid,
        pessimistic_fid=pessimistic,
        mean_threshold=_mean_threshold(outcome),
        gpu_changes=int(outcome.plans.role_changes.sum()),
        plans=len(outcome.plans),
        infeasible_plans=int((~outcome.plans.feasible).sum()),
        verdicts={
            each.name.lower(): int((outcome.verdict == each).sum())
            for each in Verdict
            if each is not Verdict.NONE and (outcome.verdict == each).any()
        },
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def _fids(
    light: Any, heavy: Any, forced: Any, blind: Any, quality: QualityCurve | None
) -> tuple[float, float]:
    """FID by the table at the light share of all answers, and the pessimistic one."""
    total = int((light | heavy).sum())
    if quality is None or not total:
        return float("nan"), float("nan")
    by_table = quality.fid(int(light.sum()) / total)
    blind_light, blind_heavy = int((light & blind).sum()), int((heavy & blind).sum())
    judged_light = int((light & ~blind & ~forced).sum())
    judged_forced = int((forced & ~blind).sum())
    judged_heavy = int((heavy & ~blind).sum())
    blind_count = blind_light + blind_heavy
    pessimistic = 0.0
    if blind_count:
        pessimistic += blind_count / total * quality.blind_fid(blind_light / blind_count)
    if blind_count < total:
        rest = quality.pessimistic_fid(judged_light, judged_forced, judged_heavy)
        pessimistic += (total - blind_count) / total * rest
    return by_table, pessimistic


def _mean_threshold(outcome: Outcome) -> float:
    """The mean of the thresholds in force at the end of each second in which requests arrived or ran."""
    ticks = np.arange(1, outcome.seconds + 1, dtype=np.int64) * NS_PER_S
    values = outcome.threshold_at(ticks)
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """The summary that a complete run left; None if there is none. Raises InvalidConfig if it is damaged."""
    path = run_dir / SUMMARY
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise InvalidConfig(
            f"{path} cannot be read ({error}); remove it to make the run again"
        ) from None
    if not isinstance(document, dict) or not isinstance(document.get("summary"), dict):
        raise InvalidConfig(f"{path} is not the summary of a run; remove it to make the run again")
    return document


def logs_of(run_dir: Path) -> Path:
    """Where the logs of the summary in `run_dir` lie: a run that was made again has them in a folder in it."""
    document = read_summary(run_dir) or {}
    return run_dir / str(document.get("run_dir", ""))


def rows_of(summaries: Sequence[tuple[str, Summary]]) -> list[list[str]]:
    """A row for each named summary: the name, then what HEADINGS say."""
    return [[name, *summary.cells()] for name, summary in summaries]
