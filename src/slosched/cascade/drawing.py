"""The curves of runs over time, as measured or by the artifact's own transformations, and the two averages."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slosched.analysis.cascade_figures import FID, THRESHOLD, VIOLATIONS, Curve, draw_over_time
from slosched.analysis.drawn import Drawn, columns_text
from slosched.analysis.runs import distinct_names, policy_of, stated
from slosched.cascade.artifact_logs import thresholds
from slosched.cascade.outcome import Outcome, read_outcome
from slosched.cascade.published_transforms import CHUNK, PublishedSeries, published_series
from slosched.cascade.summary import HEADINGS, logs_of, rows_of, summarise
from slosched.cascade_spec import CascadeSpec, QualityCurve
from slosched.errors import InvalidConfig
from slosched.units import NS_PER_S

WINDOW_NS = 5 * NS_PER_S
#: What compare.py writes beside the folders of its runs.
COMPARISON = "compare.json"
PUBLISHED_NOTE = "by the artifact's transformations, not as measured"

Curves = dict[str, list[Curve]]


def draw_runs(
    runs: Mapping[str, Outcome],
    cascade: CascadeSpec,
    out: Path,
    *,
    published: bool = False,
    random_scores: Collection[str] = (),
) -> Drawn:
    """Draw `runs`, by their names, into three figures in `out`; the numbers are the averages.

    Those that `random_scores` names had scores that say nothing of the requests.

    As measured, these are the violation ratio of all requests and the FID at the share of light answers of
    the whole run; with `published` those of the artifact's plotter. Raises InvalidConfig, MissingPackage.
    """
    if published:
        return _draw_published(runs, cascade, out)
    curves: Curves = {THRESHOLD: [], VIOLATIONS: [], FID: []}
    for place, (name, outcome) in enumerate(runs.items()):
        blind = name in random_scores
        one = measured_curves(name, outcome, cascade.quality, place, random_scores=blind)
        for kind, lines in one.items():
            curves[kind] += lines
    files = draw_over_time(cascade.name, curves, out)
    summaries = [
        (name, summarise(outcome, cascade.quality, random_scores=name in random_scores))
        for name, outcome in runs.items()
    ]
    text = columns_text(["run", *HEADINGS], rows_of(summaries))
    for name, each in summaries:
        text += f"\n{name}: average SLO violation ratio {each.violation_ratio:.4f}, average FID "
        text += f"{each.fid:.2f} by the table, {each.pessimistic_fid:.2f} pessimistic"
    return Drawn(files, {"runs": {name: each.as_dict() for name, each in summaries}}, text)


def draw_directories(
    paths: Sequence[Path], cascade: CascadeSpec, out: Path, *, published: bool = False
) -> Drawn:
    """Draw the runs in the directories `paths`, each under its policy, or its own name if two have one.

    What their manifests say of random scores is heeded. Raises as `draw_runs` and `read_outcome` do.
    """
    for path in paths:
        if (path / COMPARISON).is_file():
            raise InvalidConfig(
                f"{path} is the folder of a comparison; name its runs, as {path}/POLICY/seed=0"
            )
    policies = [policy_of(path) or path.name for path in paths]
    names = policies if len(set(policies)) == len(policies) else distinct_names(paths)
    logs = {name: logs_of(path) for name, path in zip(names, paths, strict=True)}
    blind = [name for name, path in logs.items() if stated(path, "blind_scores") is True]
    runs = {name: read_outcome(path) for name, path in logs.items()}
    return draw_runs(runs, cascade, out, published=published, random_scores=blind)


def measured_curves(
    name: str,
    outcome: Outcome,
    quality: QualityCurve | None,
    colour: int = 0,
    *,
    random_scores: bool = False,
) -> Curves:
    """The threshold in force each second; violations and FID of the requests that arrived in each 5 s.

    Where the pessimistic FID differs from the table's, it is a dashed curve.
    """
    windows = outcome.arrival_ns // WINDOW_NS
    count = int(windows.max()) + 1 if len(outcome) else 0
    middles = (np.arange(count) + 0.5) * (WINDOW_NS / NS_PER_S)
    fids, pessimistic = _fids_of(outcome, windows, count, quality, random_scores)
    curves: Curves = {
        THRESHOLD: [
            Curve(
                name,
                np.arange(outcome.seconds).tolist(),
                thresholds(outcome),
                colour,
                steps=True,
            )
        ],
        VIOLATIONS: [
            Curve(name, middles.tolist(), _ratios(outcome, windows, count).tolist(), colour)
        ],
        FID: [Curve(name, middles.tolist(), fids.tolist(), colour)],
    }
    if np.nanmax(np.abs(pessimistic - fids), initial=0.0) > 0.005:
        dashed = Curve(f"{name}, pessimistic", middles.tolist(), pessimistic.tolist(), colour, True)
        curves[FID].append(dashed)
    return curves


def _ratios(outcome: Outcome, windows: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """Violations over requests of each window; NaN where none arrived."""
    arrived = np.bincount(windows, minlength=count)
    missed = np.bincount(windows[~outcome.ok], minlength=count)
    return np.where(arrived > 0, missed / np.maximum(arrived, 1), np.nan)


def _fids_of(
    outcome: Outcome,
    windows: NDArray[np.int64],
    count: int,
    quality: QualityCurve | None,
    random_scores: bool,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both FIDs of each window; NaN where nothing was answered."""
    fids, pessimistic = np.full(count, np.nan), np.full(count, np.nan)
    for window in range(count):
        part = outcome.part(windows == window)
        one = summarise(part, quality, random_scores=random_scores)
        fids[window], pessimistic[window] = one.fid, one.pessimistic_fid
    return fids, pessimistic


def _draw_published(runs: Mapping[str, Outcome], cascade: CascadeSpec, out: Path) -> Drawn:
    if cascade.quality is None:
        raise InvalidConfig(f"{cascade.name} has no quality curve, which --published needs")
    curves: Curves = {THRESHOLD: [], VIOLATIONS: [], FID: []}
    numbers: dict[str, dict[str, float]] = {}
    lines: list[str] = []
    for place, (name, outcome) in enumerate(runs.items()):
        series = published_series(outcome, cascade.name, cascade.quality)
        for kind, line in _published_curves(name, series, place).items():
            curves[kind].append(line)
        ratio, fid = series.mean_violation_ratio, series.mean_fid
        numbers[name] = {"mean_slo_violation_rate": ratio, "mean_fid": fid}
        lines += [f"{name}, {PUBLISHED_NOTE}:"]
        lines += [f"Mean SLO violation rate: {ratio}", f"Mean FID: {fid}"]
    files = draw_over_time(cascade.name, curves, out, note=PUBLISHED_NOTE)
    return Drawn(files, {"published": numbers}, "\n".join(lines))


def _published_curves(name: str, series: PublishedSeries, colour: int) -> dict[str, Curve]:
    def curve(values: Sequence[float]) -> Curve:
        times = [float(CHUNK * place) for place in range(len(values))]
        return Curve(name, times, list(values), colour)

    return {
        THRESHOLD: curve(series.threshold.tolist()),
        VIOLATIONS: curve(series.violation_ratio.tolist()),
        FID: curve(series.fid.tolist()),
    }
