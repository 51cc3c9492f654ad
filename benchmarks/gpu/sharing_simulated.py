"""What virtual time makes of the cells of sharing.json: measured, simulated and their difference. Needs no GPU.

Each cell is run again by the model of `slosched share simulate` over the H200's solo profile, as long as its
window. Cells that the model cannot run are named.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import msgspec
from sharing_jobs import GATES, demo_jobs, mix_jobs, mode_of, pair_jobs, pair_ways
from sharing_page import MODELS

from slosched.errors import SloschedError
from slosched.share.figures import RunMetrics
from slosched.share.metrics import metrics_of
from slosched.share.solos import Profile, load_profile
from slosched.share.virtual import run_mode_virtual
from slosched.share_spec import Job, Mode, Run, RunResult, ShareSpec
from slosched.units import NS_PER_S

HEADING = "## Measured and simulated"
_WORDS = (
    "Each window again in virtual time, over the latencies of the models alone (profile h200). Cells show "
    "measured / simulated; means of the absolute differences stand below. Fewer than 100 requests: p99 is "
    "the maximum. Rows of models alone say how well the profile fits this run. Waits in the model are means, "
    "so tails under mps and streams are not in it. Eager models wait for the device at boundaries of kind sync "
    "for longer than Deft's fit says, which the model uses."
)
#: A p50 of fewer requests is not compared: one more or less changes it, and it may have run alone at the end.
_FEW = 3


class Cell(NamedTuple):
    """What one cell of sharing.json ran: the places in `jobs`, in `mode`."""

    jobs: tuple[Job, ...]
    places: tuple[int, ...]
    mode: Mode


def cell_of(key: str) -> Cell | None:
    """The jobs of a cell by its key; None: it is of a check, or not known."""
    part, _, rest = key.partition("/")
    if part == "mix":
        run, mode, mix = rest.split("/")
        jobs = tuple(mix_jobs(Run(run), "tm" if mode == "exclusive" else mode, MODELS))
        places = tuple(MODELS.index(name) for name in mix.split("+"))
        return Cell(jobs, places, mode_of(mode))
    if part.startswith("pair-") or part in ("demo", "demo-alone"):
        run = part.removesuffix("-alone").removeprefix("pair-")
        low, high = demo_jobs() if run == "demo" else pair_jobs(Run(run))
        if part.endswith("-alone"):
            names = [low.name, high.name]
            return Cell((low, high), (names.index(rest),), Mode.EXCLUSIVE)
        ways = GATES if run == "demo" else pair_ways(run)
        if rest not in ways:
            return None
        mode_there, boundary = ways[rest]
        return Cell((msgspec.structs.replace(low, boundary=boundary), high), (0, 1), mode_there)
    return None


class Both(NamedTuple):
    """A cell measured and simulated; `problem`: why it was not simulated."""

    key: str
    measured: Mapping[str, Any]
    simulated: RunMetrics | None
    problem: str = ""


def simulate_cells(cells: Mapping[str, Mapping[str, Any]], profile: Profile) -> Iterator[Both]:
    """Each cell with jobs, in virtual time for as long as its window."""
    alone: dict[tuple[Job, int], RunResult] = {}
    for key, measured in cells.items():
        cell = cell_of(key) if measured.get("jobs") else None
        if cell is None:
            continue
        seconds = measured["window_s"]
        spec = ShareSpec(
            jobs=cell.jobs,
            modes=(cell.mode,),
            duration_ns=round(seconds * NS_PER_S),
            profile="h200",
        )
        try:
            for place in cell.places:
                known = (cell.jobs[place], spec.duration_ns)
                if known not in alone:
                    alone[known] = run_mode_virtual(
                        spec, Mode.EXCLUSIVE, 0, solos=profile, jobs=(place,)
                    )
            solos = {place: alone[cell.jobs[place], spec.duration_ns] for place in cell.places}
            result = (
                solos[cell.places[0]]
                if cell.mode is Mode.EXCLUSIVE
                else run_mode_virtual(spec, cell.mode, 0, solos=profile, jobs=cell.places)
            )
            yield Both(key, measured, metrics_of(spec, result, solos))
        except SloschedError as error:
            yield Both(key, measured, None, str(error))


def _figures(both: Both) -> Iterator[tuple[str, str, float, float]]:
    """(job or "", figure, measured, simulated) of all that both have."""
    found = both.simulated
    if found is None:
        return
    if both.measured["stp"] is not None and found.stp is not None:
        yield "", "STP", both.measured["stp"], found.stp
    if both.measured.get("watts") and found.energy.mean_watts:
        yield "", "W", both.measured["watts"], found.energy.mean_watts
    jobs = {job.name: job for job in found.jobs}
    for job in both.measured["jobs"]:
        ours = jobs.get(job["name"])
        if ours is None:
            continue
        if job["throughput_per_s"] and ours.throughput_per_s is not None:
            yield job["name"], "requests/s", job["throughput_per_s"], ours.throughput_per_s
        if ours.latency is not None and job["n"] >= _FEW:
            yield job["name"], "p50 ms", job["p50_ms"], ours.latency.p50_ms
            yield job["name"], "p99 ms", job["p99_ms"], ours.latency.p99_ms


def _off(measured: float, simulated: float) -> str:
    return f"{measured:.4g} / {simulated:.4g} ({100 * (simulated / measured - 1):+.0f} %)"


def _rows(found: Sequence[Both]) -> Iterator[tuple[str, ...]]:
    for both in found:
        figures = list(_figures(both))
        whole = {figure: (a, b) for job, figure, a, b in figures if not job}
        alone = len(both.measured["jobs"]) < 2
        first = True
        for name in dict.fromkeys(job for job, *_ in figures if job):
            of_job = {figure: (a, b) for job, figure, a, b in figures if job == name}
            cells = [
                _off(*of_job[figure]) if figure in of_job else "-"
                for figure in ("requests/s", "p50 ms", "p99 ms")
            ]
            stp = f"{whole['STP'][0]:.2f} / {whole['STP'][1]:.2f}" if "STP" in whole else "-"
            watts = _off(*whole["W"]) if "W" in whole else "-"
            head = (both.key, "-" if alone else stp, watts) if first else ("", "", "")
            first = False
            yield (*head, name, *cells)


def _means(found: Iterable[Both]) -> Iterator[tuple[str, ...]]:
    """By mode and way of running: the mean absolute difference of each figure, and the number of values."""
    groups: dict[str, dict[str, list[float]]] = {}
    for both in found:
        part = both.key.split("/")[0]
        run = both.key.split("/")[1] if part == "mix" else part.removeprefix("pair-")
        run = "eager" if run.startswith("demo") else run.removesuffix("-alone")
        cell = cell_of(both.key)
        if cell is None:
            continue
        group = groups.setdefault(f"{run}, {cell.mode.value}", {})
        for _, figure, a, b in _figures(both):
            off = abs(b - a) if figure == "STP" else abs(b / a - 1)
            group.setdefault(figure, []).append(off)
    for name, figures in groups.items():
        cells = [name]
        for figure in ("STP", "requests/s", "p50 ms", "p99 ms", "W"):
            values = figures.get(figure)
            if not values:
                cells.append("-")
            elif figure == "STP":
                cells.append(f"{fmean(values):.3f} ({len(values)})")
            else:
                cells.append(f"{100 * fmean(values):.1f} % ({len(values)})")
        yield tuple(cells)


def _lines(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    head = [f"| {' | '.join(headings)} |", f"| :-- |{' --: |' * (len(headings) - 1)}"]
    return ["", *head, *(f"| {' | '.join(row)} |" for row in rows)]


def simulated_lines(document: Mapping[str, Any]) -> list[str]:
    """The section of the page: empty where no cell can be simulated."""
    found = list(simulate_cells(document["cells"], load_profile("h200")))
    if not found:
        return []
    lines = ["", HEADING, "", _WORDS]
    lines += _lines(
        ("mean of the absolute differences", "STP", "requests/s", "p50", "p99", "power"),
        _means(found),
    )
    lines += _lines(
        ("cell", "STP", "power W", "model", "requests/s", "p50 ms", "p99 ms"), _rows(found)
    )
    problems = [f"- {both.key}: {both.problem}" for both in found if both.problem]
    return [*lines, *(["", *problems] if problems else [])]


def kept_lines(path: Path) -> list[str]:
    """The section that the page has, so that a new table of measurements does not lose it."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if HEADING not in lines:
        return []
    begin = lines.index(HEADING)
    end = next((i for i in range(begin + 1, len(lines)) if lines[i].startswith("## ")), len(lines))
    while not lines[end - 1]:
        end -= 1
    return ["", *lines[begin:end]]
