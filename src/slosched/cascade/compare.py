"""Policies of cascades on the same arrivals and scores over several seeds, with 95 % intervals.

A cell is one policy with one seed, in OUT/POLICY/seed=N. One whose `summary.json` is there, of the same
settings and the same source, is not run again. The simulations share processes; each cell gets its files when
all runs are over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slosched.analysis.cascade_figures import Point, draw_scatter
from slosched.analysis.compare import Estimate
from slosched.analysis.drawn import columns_text, plain
from slosched.cascade.drawing import COMPARISON, draw_runs
from slosched.cascade.outcome import read_outcome
from slosched.cascade.presets import Variant
from slosched.cascade.run import (
    FIGURES,
    Experiment,
    finish,
    write_json,
)
from slosched.cascade.summary import SUMMARY, logs_of, read_summary
from slosched.errors import InvalidConfig, MissingPackage, SloschedError
from slosched.loadgen.results import RunResult
from slosched.output_files import write_file
from slosched.sim.jobs import Job, OnProgress, Stop, run_many
from slosched.sim.run import source_digest, spec_digest
from slosched.version import __version__

TABLE = "compare.md"

#: The numbers of a summary that a comparison has: key, heading, digits.
MEASURES = (
    ("violation_ratio", "violations", 4),
    ("fid", "FID (table)", 2),
    ("pessimistic_fid", "FID (pessimistic)", 2),
    ("light_share", "light", 3),
    ("deferred_share", "deferred", 3),
    ("forced_share", "forced", 4),
    ("mean_threshold", "threshold", 3),
    ("gpu_changes", "GPU changes", 1),
)
#: Those that are compared seed by seed.
PAIRED = MEASURES[:3]
#: How far above the clairvoyant bound, from the same cell.
_DISTANCE = ("fid", "FID above bound", 2)


@dataclass(frozen=True)
class Cell:
    """One policy with one seed."""

    variant: Variant
    experiment: Experiment
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.variant.name} seed={self.experiment.seed}"


@dataclass(frozen=True)
class Comparison:
    """All cells' summaries by policy, in the order of the seeds, and the estimates over them."""

    cascade: str
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    summaries: dict[str, list[dict[str, Any]]]
    reused: int

    def estimate(self, variant: str, key: str, part: str = "summary") -> Estimate | None:
        """The mean of a number over the seeds that have it, and its 95 % interval (Student's t)."""
        values = [document[part][key] for document in self.summaries[variant]]
        return Estimate.of([float(value) for value in values if value is not None])

    @property
    def subject(self) -> str:
        """The policy whose differences to the others are shown: the first CASCADE, else the first one."""
        names = [each.name for each in self.variants if each.policy == "CASCADE"]
        return names[0] if names else self.variants[0].name

    def difference(self, variant: str, key: str) -> Estimate | None:
        """A number of the `subject` less that of `variant`: its mean and 95 % interval over the seeds.

        Both served the same arrivals with each seed, so the seeds' own differences count, and what the
        arrivals have in common cancels out. None if no seed has both numbers.
        """
        cells = zip(self.summaries[self.subject], self.summaries[variant], strict=True)
        pairs = [(ours["summary"][key], theirs["summary"][key]) for ours, theirs in cells]
        return Estimate.of([a - b for a, b in pairs if a is not None and b is not None])

    def as_dict(self) -> dict[str, Any]:
        """For JSON: for each policy its options, estimates and the cells' own numbers; and the differences."""
        return {
            "cascade": self.cascade,
            "seeds": list(self.seeds),
            "cells_reused": self.reused,
            "quality": "FID by the published table, from the share of light answers; no image was scored",
            "interval": "Student's t over seeds, 95 %, half width",
            "policies": {each.name: self._policy(each) for each in self.variants},
            "differences": {
                "of": self.subject,
                "less": {
                    name: {key: _document(self.difference(name, key)) for key, _, _ in PAIRED}
                    for name in self._others()
                },
            },
        }

    def _others(self) -> list[str]:
        return [each.name for each in self.variants if each.name != self.subject]

    def _policy(self, variant: Variant) -> dict[str, Any]:
        keys = [(key, "summary", key) for key, _, _ in MEASURES]
        keys += [("fid_above_bound", "above_bound", "fid"), ("bound_fid", "bound", "fid")]
        estimates = {name: self.estimate(variant.name, key, part) for name, part, key in keys}
        cells = self.summaries[variant.name]
        return {
            "policy": variant.policy,
            "options": cells[0]["options"],
            "estimates": {name: _document(each) for name, each in estimates.items()},
            "cells": [{"seed": cell["seed"], **cell["summary"]} for cell in cells],
        }

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """The headings of the table and a row for each policy. Behind +- is half of the interval."""
        headings = ["policy", *(heading for _, heading, _ in MEASURES), _DISTANCE[1]]
        rows = []
        for variant in self.variants:
            row = [variant.name]
            row += [
                estimate_text(self.estimate(variant.name, key), digits)
                for key, _, digits in MEASURES
            ]
            distance = self.estimate(variant.name, _DISTANCE[0], "above_bound")
            rows.append([*row, estimate_text(distance, _DISTANCE[2])])
        return headings, rows

    def difference_rows(self) -> tuple[list[str], list[list[str]]]:
        """The headings of the table of differences and a row for each policy but the `subject`."""
        headings = [self.subject, *(heading for _, heading, _ in PAIRED)]
        rows = []
        for name in self._others():
            row = [
                estimate_text(self.difference(name, key), digits, signed=True)
                for key, _, digits in PAIRED
            ]
            rows.append([f"less {name}", *row])
        return headings, rows

    def text(self) -> str:
        """Both tables, for a terminal."""
        return "\n\n".join(columns_text(headings, rows) for headings, rows in self._tables())

    def markdown(self) -> str:
        """Both tables."""
        return "\n".join(
            "".join(
                f"| {' | '.join(line)} |\n" for line in (headings, ["---"] * len(headings), *rows)
            )
            for headings, rows in self._tables()
        )

    def _tables(self) -> list[tuple[list[str], list[list[str]]]]:
        return [each for each in (self.rows(), self.difference_rows()) if each[1]]


def estimate_text(estimate: Estimate | None, digits: int, *, signed: bool = False) -> str:
    """A mean with `digits` decimals, and half of its interval behind +-; "-" where there is none."""
    if estimate is None:
        return "-"
    half = "" if estimate.half is None else f" +- {estimate.half:.{digits}f}"
    return f"{estimate.mean:{'+' if signed else ''}.{digits}f}{half}"


def _document(estimate: Estimate | None) -> dict[str, float | None] | None:
    return None if estimate is None else {"mean": estimate.mean, "half": estimate.half}


def cells_of(
    base: Experiment, variants: Sequence[Variant], seeds: Sequence[int], out: Path
) -> list[Cell]:
    """A cell for each policy and seed."""
    return [
        Cell(
            variant,
            replace(
                base,
                policy=variant.policy,
                options=variant.options,
                seed=seed,
                preempt=base.preempt if variant.preempt is None else variant.preempt,
            ),
            out / variant.name / f"seed={seed}",
        )
        for variant in variants
        for seed in seeds
    ]


def compare(
    cells: Sequence[Cell],
    *,
    processes: int = 1,
    progress: Callable[[list[str]], OnProgress] | None = None,
    stop: Stop | None = None,
) -> Comparison:
    """Run the cells that are missing, and read all. `progress` makes a display of the names of those that run.

    Raises what `run_many` raises, also KeyboardInterrupt soon after `stop` says True; InvalidConfig if a folder
    holds a run of other settings.
    """
    digests = [spec_digest(cell.experiment.simulation()) for cell in cells]
    found = [_complete(cell, digest) for cell, digest in zip(cells, digests, strict=True)]
    missing = [place for place, document in enumerate(found) if document is None]
    jobs = [Job(cells[place].experiment.simulation(), cells[place].folder) for place in missing]
    show = progress([cells[place].name for place in missing]) if progress and jobs else None
    results = run_many(jobs, processes=processes, progress=show, stop=stop) if jobs else []
    for place, result in zip(missing, results, strict=True):
        if stop is not None and stop():  # between the files of two runs, which are whole
            raise KeyboardInterrupt
        found[place] = _finished(cells[place], digests[place], result)
    documents = [document for document in found if document is not None]
    variants = tuple({cell.variant.name: cell.variant for cell in cells}.values())
    seeds = tuple(dict.fromkeys(cell.experiment.seed for cell in cells))
    summaries: dict[str, list[dict[str, Any]]] = {each.name: [] for each in variants}
    for cell, document in zip(cells, documents, strict=True):
        summaries[cell.variant.name].append(document)
    name = cells[0].experiment.spec().name
    return Comparison(name, variants, seeds, summaries, len(cells) - len(missing))


def _complete(cell: Cell, digest: str) -> dict[str, Any] | None:
    """The summary in a cell's folder; None if there is none, or another source made it.

    Raises InvalidConfig if it is of other settings.
    """
    document = read_summary(cell.folder)
    if document is None:
        return None
    same_source = (document.get("slosched"), document.get("source")) == (
        __version__,
        source_digest(),
    )
    others = _other_settings(document, cell.experiment.described())
    if not others and same_source and document.get("spec_sha256") != digest:
        others = ["another content of a file that it read"]
    if others:
        raise InvalidConfig(
            f"{cell.folder} holds a run of other settings ({'; '.join(others)}); choose another --out, or "
            "move that one away"
        )
    if same_source and _lacks_numbers(document):
        raise InvalidConfig(
            f"{cell.folder / SUMMARY} lacks numbers; remove it to make its files again"
        )
    return document if same_source else None


def _lacks_numbers(document: Mapping[str, Any]) -> bool:
    needed = {"summary": [key for key, _, _ in MEASURES], "bound": ["fid"], "above_bound": ["fid"]}
    return any(
        not isinstance(document[part].get(key, ""), int | float | None)
        if isinstance(document.get(part), dict)
        else True
        for part, keys in needed.items()
        for key in keys
    )


def _other_settings(document: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """What a summary says otherwise than `asked`, in words. Settings that one of them lacks do not count."""
    found = []
    for key, value in plain(asked).items():
        if isinstance(value, dict):
            found += _other_settings(document.get(key) or {}, value)
        elif key in document and document[key] != value:
            found.append(f"{key} is {document[key]}, not {value}")
    return found


def _finished(cell: Cell, digest: str, result: RunResult) -> dict[str, Any]:
    if result.run_dir is None or not result.complete:
        raise SloschedError(f"the run {cell.name} is not complete: {result.problem}")
    report = finish(cell.experiment, result.run_dir, kind="simulated", digest=digest, figures=False)
    if result.run_dir != cell.folder:  # beside an incomplete run, in a numbered folder
        place = str(result.run_dir.relative_to(cell.folder))
        write_json(cell.folder / SUMMARY, {**report.document, "run_dir": place})
    return dict(report.document)


def write_comparison(
    comparison: Comparison, cells: Sequence[Cell], out: Path, *, published: bool = False
) -> tuple[list[Path], str]:
    """Write JSON, the Markdown table and the figures into `out`: the first seed over time, and the scatter.

    Returns the paths, and why there are no figures ("": there are).
    """
    write_json(out / COMPARISON, comparison.as_dict())
    write_file(out / TABLE, comparison.markdown().encode())
    files = [out / COMPARISON, out / TABLE]
    try:
        return [*files, *_draw(comparison, cells, out / FIGURES, published)], ""
    except MissingPackage as error:
        return files, str(error)


def _draw(comparison: Comparison, cells: Sequence[Cell], out: Path, published: bool) -> list[Path]:
    first = [cell for cell in cells if cell.experiment.seed == comparison.seeds[0]]
    outcomes = {cell.variant.name: read_outcome(logs_of(cell.folder)) for cell in first}
    spec = first[0].experiment.spec()
    blind = {each.name for each in comparison.variants if each.options.blind_scores}
    files = draw_runs(outcomes, spec, out, published=published, random_scores=blind).files
    points, bounds = [], []
    for variant in comparison.variants:
        violations = comparison.estimate(variant.name, "violation_ratio")
        fid = comparison.estimate(variant.name, "fid")
        bound = comparison.estimate(variant.name, "fid", "bound")
        if violations is None or fid is None or bound is None:
            continue
        bounds.append(bound.mean)
        halves = (violations.half or 0.0, fid.half or 0.0)
        points.append(Point(variant.name, violations.mean, fid.mean, *halves))
    if not points:
        return files
    return [*files, *draw_scatter(spec.name, points, out, bound_fid=min(bounds))]
