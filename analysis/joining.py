"""What joining a running batch at a step would bring to the heavy stage of a cascade, in virtual time.

    .venv/bin/python analysis/joining.py --jobs 2 --tables     # five minutes of two cores
    .venv/bin/python analysis/joining.py --kept               # from the kept numbers; nothing is run

The heavy programs of sdturbo (SD v1.5, SLO 5 and 10 s) and sdxlltn (SDXL, SLO 15 s) in 50 equal steps, on 1 and
on 8 GPUs, with the times that DiffServe's artifact has for an A100. src/slosched/cascade/joining.py says what
the rules do and what the model leaves out. Every rule gets the same arrivals: Poisson at 0.3 to 1.2 times the
capacity, or those of a day's curve from an eighth of its peak.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import takewhile
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from PIL import Image

from slosched.analysis.compare import Estimate
from slosched.cascade.joining import (
    AT_START,
    JOINING,
    RULES,
    WITH_ROOM,
    Stage,
    StepTimes,
    capacity,
    simulate,
)
from slosched.clock import now_ns
from slosched.units import NS_PER_S
from slosched.version import __version__
from slosched.workloads.arrivals import PoissonArrivals
from slosched.workloads.cascade_trace import DAY_S, Day
from slosched.workloads.cascades import load_cascade
from slosched.workloads.processes import poisson_pieces

HERE = Path(__file__).resolve().parent
STEPS = 50
#: (cascade, SLO in seconds, heavy program).
SETTINGS = (("sdturbo", 5, "SD v1.5"), ("sdturbo", 10, "SD v1.5"), ("sdxlltn", 15, "SDXL"))
GPUS = (1, 8)
LOADS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
#: Peaks of the day's curve, as loads; its lowest rate is an eighth of its peak, as in DiffServe's 4to32.
PEAKS, DAY_GPUS, DAY_PART = (0.8, 1.0, 1.2), 8, 8
#: As CASCADE: a light batch takes at most this part of the SLO.
LIGHT_PART = 8
#: A run lasts at least this many SLOs, and what arrives in the first three is not counted.
LEAST_SLOS, SKIPPED_SLOS = 30, 3
KEYS = ("in_time", "mean_s", "p99_s", "gpu_s")


@dataclass(frozen=True)
class Case:
    """One row: a heavy program, whether its light stage runs on the same GPUs, and the load."""

    cascade: str
    slo_s: int
    gpus: int
    load: float
    with_light: bool = False
    day: bool = False

    @property
    def title(self) -> str:
        heavy = next(name for cascade, _, name in SETTINGS if cascade == self.cascade)
        gpus = "1 GPU" if self.gpus == 1 else f"{self.gpus} GPUs"
        return f"{heavy}, SLO {self.slo_s} s, {gpus}"


def cases() -> list[Case]:
    """Every row, in the order of the page."""
    found = [
        Case(cascade, slo_s, gpus, load, with_light)
        for with_light in (False, True)
        for cascade, slo_s, _ in SETTINGS
        for gpus in GPUS
        for load in LOADS
    ]
    return found + [
        Case(cascade, slo_s, DAY_GPUS, peak, day=True)
        for cascade, slo_s, _ in SETTINGS
        for peak in PEAKS
    ]


def stage_of(case: Case) -> tuple[Stage, float]:
    """The stage, and its arrivals/s at the load (of a day: at its peak).

    With the light stage, the best share of heavy answers is deferred; a request comes to the heavy stage behind
    one light batch, and the light batches take their part of the GPU at this load.
    """
    spec = load_cascade(case.cascade)
    profile = spec.profile(memory_bytes=2**40, page_bytes=2**24)
    times = StepTimes.of(profile.models[spec.heavy.model], STEPS)
    slo_ns, light_ns = case.slo_s * NS_PER_S, 0.0
    if case.with_light:
        assert spec.quality is not None
        lights = profile.models[spec.light.model].exec_ns
        batch = max(size for size, ns in lights.items() if ns <= slo_ns // LIGHT_PART)
        slo_ns -= lights[batch]
        light_ns = lights[batch] / batch / (1 - spec.quality.best_light_share)
    best = capacity(times, slo_ns, light_ns)
    stage = Stage(times, slo_ns, case.gpus, light_share=case.load * best.light_share)
    return stage, case.load * case.gpus * best.per_s


def run(work: tuple[Case, int, int]) -> dict[str, dict[str, float]]:
    """The numbers of one case with one seed, by rule."""
    case, seed, requests = work
    stage, rate = stage_of(case)
    since_ns = SKIPPED_SLOS * stage.slo_ns
    if case.day:
        arrivals_ns, since_ns = list(poisson_pieces(Day(rate / DAY_PART, rate).pieces(), seed)), 0
    else:
        length_ns = max(requests / rate * NS_PER_S, (LEAST_SLOS + SKIPPED_SLOS) * stage.slo_ns)
        arrivals_ns = list(takewhile(lambda at_ns: at_ns < length_ns, PoissonArrivals(rate, seed)))
    found = {}
    for rule in RULES:
        served = simulate(stage, arrivals_ns, rule, since_ns=since_ns)
        assert round(served.in_time * served.offered) == len(served.answers), "late answers"
        found[rule] = {
            "in_time": served.in_time,
            "mean_s": served.mean_ns / NS_PER_S,
            "p99_s": served.p99_ns / NS_PER_S,
            "gpu_s": served.gpu_ns / NS_PER_S,
        }
    return found


@dataclass(frozen=True)
class Row:
    """A case with the numbers of every seed: rule -> number -> values."""

    case: Case
    values: dict[str, dict[str, list[float]]]

    def estimate(self, rule: str, key: str, *, less: str = "") -> Estimate:
        """The mean over seeds of a number, or of how much more it is than with the rule `less`."""
        values = self.values[rule][key]
        if less:
            values = [a - b for a, b in zip(values, self.values[less][key], strict=True)]
        found = Estimate.of(values)
        assert found is not None
        return found


def measured(chosen: Sequence[Case], seeds: int, requests: int, jobs: int) -> list[Row]:
    """Every case with every seed, in `jobs` processes."""
    works = [(case, seed, requests) for case in chosen for seed in range(seeds)]
    if jobs > 1:
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            results = list(pool.map(run, works, chunksize=4))
    else:
        results = [run(work) for work in works]
    rows = []
    for place, case in enumerate(chosen):
        own = results[place * seeds : (place + 1) * seeds]
        values = {rule: {key: [each[rule][key] for each in own] for key in KEYS} for rule in RULES}
        rows.append(Row(case, values))
    return rows


# ------------------------------------------------------------------------------------ results


def text_of(estimate: Estimate, places: int, *, signed: bool = False) -> str:
    mean = f"{estimate.mean:{'+' if signed else ''}.{places}f}"
    return mean if estimate.half is None else f"{mean} ±{estimate.half:.{places}f}"


def table(rows: Sequence[Row], load: str) -> list[str]:
    """In per cent of the requests offered, and seconds."""
    lines = [
        f"| {load} | rule | in time % | more than at start, points | mean s | p99 s | GPU s an answer |",
        "|--:|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        for rule in RULES:
            share = row.estimate(rule, "in_time")
            more = row.estimate(rule, "in_time", less=AT_START)
            cells = [
                f"{row.case.load:g}",
                rule,
                text_of(_per_cent(share), 2),
                "" if rule == AT_START else text_of(_per_cent(more), 2, signed=True),
                *(text_of(row.estimate(rule, key), 2) for key in KEYS[1:]),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _per_cent(share: Estimate) -> Estimate:
    return Estimate(100 * share.mean, None if share.half is None else 100 * share.half)


def greatest_load(rows: Sequence[Row], rule: str, share: float) -> float:
    """The greatest load, of those up to which every one has at least `share` in time; NaN: not the first."""
    good = takewhile(lambda row: row.estimate(rule, "in_time").mean >= share, rows)
    return max((row.case.load for row in good), default=math.nan)


def summary(groups: dict[str, list[Row]]) -> list[str]:
    """A line for each program, SLO and number of GPUs."""
    loads = (0.8, 1.0, 1.2)
    lines = [
        "| | 99 % in time up to load: at start | joining | with room | "
        + " | ".join(f"at {load:g}: at start | joining | with room" for load in loads)
        + " |",
        "|---|" + "--:|" * (3 + 3 * len(loads)),
    ]
    for title, rows in groups.items():
        by_load = {row.case.load: row for row in rows}
        greatest = (greatest_load(rows, rule, 0.99) for rule in RULES)
        cells = ["-" if math.isnan(load) else f"{load:g}" for load in greatest]
        cells += [
            f"{100 * by_load[load].estimate(rule, 'in_time').mean:.1f}"
            for load in loads
            for rule in RULES
            if load in by_load
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def grouped(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.case.title, []).append(row)
    return found


def page(rows: Sequence[Row], seeds: int) -> str:
    parts = {
        "The heavy stage alone": [r for r in rows if not r.case.with_light and not r.case.day],
        "With pauses for the light stage": [r for r in rows if r.case.with_light],
    }
    lines = [
        "# Joining at a step",
        "",
        "Written by [joining.py](../joining.py). Virtual time, Poisson arrivals; load 1 is what the GPUs can",
        "answer in full batches of the best size that is in time. Latencies are of answers, all of which",
        "are in time: a rule that serves more may have a higher mean, because it answers what another one",
        f"refuses. Means and 95 % intervals over {seeds} seeds. The rules, and what is left out, are in",
        "[cascade/joining.py](../../src/slosched/cascade/joining.py).",
        "",
        "![](joining.png)",
    ]
    for heading, own in parts.items():
        if own:
            groups = grouped(own)
            lines += ["", f"## {heading}", "", *summary(groups)]
            for title, group in groups.items():
                lines += ["", f"**{title}**", "", *table(group, "load")]
    day = grouped([row for row in rows if row.case.day])
    if day:
        low = f"from an eighth of the peak to the peak and back in {DAY_S} s, none left out"
        lines += ["", "## On a day's curve", "", f"The heavy stage alone; {low}."]
        for title, group in day.items():
            lines += ["", f"**{title}**", "", *table(group, "peak")]
    return "\n".join(lines) + f"\n\nslosched {__version__}.\n"


def draw(rows: Sequence[Row], out: Path) -> Path:
    """In time and mean latency by load, a column for each program, SLO and number of GPUs."""
    from slosched.analysis import style

    groups = grouped([row for row in rows if not row.case.with_light and not row.case.day])
    looks = {AT_START: (0, "--"), JOINING: (1, ":"), WITH_ROOM: (2, "-")}
    with style.look():
        figure = style.Figure(figsize=(2.45 * len(groups) + 0.6, 5.2), layout="constrained")
        panels = figure.subplots(2, len(groups), sharex=True, squeeze=False)
        for column, (title, group) in enumerate(groups.items()):
            loads = [row.case.load for row in group]
            for rule, (colour, line) in looks.items():
                for panel, key, factor in ((0, "in_time", 100.0), (1, "mean_s", 1.0)):
                    found = [row.estimate(rule, key) for row in group]
                    panels[panel, column].errorbar(
                        loads,
                        [factor * each.mean for each in found],
                        yerr=[factor * (each.half or 0.0) for each in found],
                        color=style.COLOURS[colour],
                        marker=style.MARKERS[colour],
                        markersize=3.5,
                        linestyle=line,
                        linewidth=1.5,
                        elinewidth=0.8,
                        label=rule,
                    )
            panels[0, column].set_title(title.replace(", SLO", ",\nSLO"), fontsize=9)
            panels[0, column].set_ylim(50, 102)
            panels[1, column].set_ylim(bottom=0)
            panels[1, column].set_xlabel("Load / capacity")
        panels[0, 0].set_ylabel("In time, % of offered")
        panels[1, 0].set_ylabel("Mean latency of answers, s")
        handles = panels[0, 0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=len(looks))
        png, _ = style.save(figure, out, "joining")
    return png


def keep(rows: Sequence[Row], text: str, png: Path, seeds: int, requests: int) -> None:
    """The page, the figure and the numbers beside this recipe."""
    place = HERE / "joining"
    place.mkdir(exist_ok=True)
    image = Image.open(png).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    image.save(place / "joining.png", optimize=True)
    (place / "joining.md").write_text(text, encoding="utf-8")
    lines = [json.dumps(_rounded(_document(row))) for row in rows]
    head = json.dumps({"version": __version__, "seeds": seeds, "requests": requests})
    (place / "joining.json").write_text(
        head.removesuffix("}") + ', "rows": [\n ' + ",\n ".join(lines) + "\n]}\n", encoding="utf-8"
    )


def kept() -> tuple[list[Row], int, int]:
    """The numbers beside this recipe, and their seeds and requests."""
    document = json.loads((HERE / "joining" / "joining.json").read_text(encoding="utf-8"))
    rows = [Row(values=row.pop("rules"), case=Case(**row)) for row in document["rows"]]
    return rows, document["seeds"], document["requests"]


def _document(row: Row) -> dict[str, Any]:
    return {**asdict(row.case), "rules": row.values}


def _rounded(document: dict[str, Any]) -> Any:
    return json.loads(json.dumps(document), parse_float=lambda number: round(float(number), 5))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=1000, help="of a run, at least")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--out", type=Path, default=Path("slosched-runs") / "joining")
    parser.add_argument("--tables", action="store_true", help="keep the page and the numbers here")
    parser.add_argument("--kept", action="store_true", help="from the kept numbers; nothing is run")
    options = parser.parse_args(arguments)
    for name in ("seeds", "requests", "jobs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(options, name)}")
    began_ns = now_ns()
    if options.kept:
        rows, seeds, requests = kept()
    else:
        seeds, requests = options.seeds, options.requests
        rows = measured(cases(), seeds, requests, options.jobs)
    text = page(rows, seeds)
    print(text)
    png = draw(rows, options.out)
    if options.tables:
        keep(rows, text, png, seeds, requests)
    print(f"{(now_ns() - began_ns) / NS_PER_S:.0f} s; the figure is {png}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
