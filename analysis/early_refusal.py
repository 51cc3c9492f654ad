"""What it costs to refuse early: goodput against the age of refusals, over the policy cases.

    .venv/bin/python analysis/early_refusal.py --jobs 2 --tables     # eight minutes of two cores
    .venv/bin/python analysis/early_refusal.py --only zipf --seeds 1

Each case of policy_cases.py, and floods of 2, 3 and 5 times the capacity with an SLO of 100 ms, under INFER5
with every setting of `early_refusal`, from the same arrivals in virtual time. The cost is what fewer requests
are in time for the client than without, in points. The age of a refusal is how long after its arrival it was
answered, as a share of its SLO.

At 1, the default, a request is refused when its forecast comes too late; a higher setting refuses some too
that the forecast gives a chance. The default may cost at most 0.3 points, else the program ends with 1.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image
from policy_cases import CASES, OURS
from policy_grid import interval

from slosched.codes import REJECTIONS
from slosched.config import SchedulerConfig
from slosched.config_file import load_profile
from slosched.sim.jobs import Job, run_many
from slosched.sim.spec import SimSpec
from slosched.telemetry.reason_log import FILE_NAME, read_reasons
from slosched.units import NS_PER_MS, NS_PER_S
from slosched.version import __version__
from slosched.workloads.mix import MixEntry, mix

OUT = Path(__file__).parent / "early_refusal"
SETTINGS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
DEFAULT = SchedulerConfig().early_refusal
#: What the default may cost on average over the cases, points.
MAY_COST = 0.3
LOADS = (2, 3, 5)
FLOOD_SLO_MS, FLOOD_GPUS, FLOOD_NS = 100, 2, NS_PER_S
#: Fewer refusals than this say nothing of their ages.
FEW = 20


@dataclass(frozen=True)
class Cell:
    """One load, by setting: in time in per cent for each seed, and the ages of all its refusals."""

    name: str
    flood: int  # times the capacity; 0: one of the policy cases
    satisfied: dict[float, list[float]]
    median_age: dict[float, float]  # share of the SLO; nan: too few were refused
    mean_age: dict[float, float]

    def costs(self, setting: float) -> list[float]:
        """Points lost by `setting`, for each seed."""
        pairs = zip(self.satisfied[0.0], self.satisfied[setting], strict=True)
        return [without - with_it for without, with_it in pairs]


def loads(only: Sequence[str], seeds: int) -> dict[tuple[str, int], list[SimSpec]]:
    """The specs of every load by (name, flood), one for each seed."""
    found = {
        (f"{case.name} R={rate} SLO {slo} ms", 0): [
            case.spec(rate, slo, OURS, seed) for seed in range(1, seeds + 1)
        ]
        for case in CASES
        if not only or case.name in only
        for rate, slo in case.cells
    }
    for profile in ("fig7", "v100"):
        for copies in (12, 48):
            for load in LOADS if not only or "flood" in only else ():
                name = f"{profile} N={copies} {load}x SLO {FLOOD_SLO_MS} ms"
                found[name, load] = [
                    _flood(profile, copies, load, seed) for seed in range(1, seeds + 1)
                ]
    return found


def _flood(profile: str, copies: int, load: int, seed: int) -> SimSpec:
    """`load` times what the GPUs can do in full batches."""
    gpu = load_profile(profile)
    exec_ns = gpu.model("resnet50").exec_ns
    batch = max(exec_ns)
    rate = load * FLOOD_GPUS * batch / exec_ns[batch] * NS_PER_S
    entry = MixEntry("resnet50_v2", copies, rate, (0.0, FLOOD_SLO_MS * NS_PER_MS))
    return SimSpec(
        workload=mix([entry], FLOOD_NS),
        scheduler=SchedulerConfig(schedule_ahead_ns=5 * NS_PER_MS),
        profiles=(gpu,),
        gpus=FLOOD_GPUS,
        seed=seed,
    )


def measured(only: Sequence[str], seeds: int, jobs: int) -> list[Cell]:
    """Every load under every setting."""
    specs = loads(only, seeds)
    keys = [(key, setting) for key in specs for setting in SETTINGS]
    cells: dict[tuple[str, int], Cell] = {}
    with TemporaryDirectory() as folder:
        runs = [
            Job(
                replace(spec, scheduler=replace(spec.scheduler, early_refusal=setting)),
                Path(folder) / f"{place}-{seed}",
            )
            for place, (key, setting) in enumerate(keys)
            for seed, spec in enumerate(specs[key])
        ]
        results = iter(run_many(runs, processes=jobs))
        for key, setting in keys:
            cell = cells.setdefault(key, Cell(*key, {}, {}, {}))
            ages: list[float] = []
            for result in [next(results) for _ in range(seeds)]:
                cell.satisfied.setdefault(setting, []).append(100 * result.satisfaction)
                assert result.run_dir is not None
                rows = read_reasons(result.run_dir / FILE_NAME)
                ages += [row.latency / row.deadline for row in rows if row.code in REJECTIONS]
            few = len(ages) < FEW * seeds
            cell.median_age[setting] = math.nan if few else median(ages)
            cell.mean_age[setting] = math.nan if few else fmean(ages)
    return list(cells.values())


@dataclass(frozen=True)
class Point:
    """What one setting comes to over some cells. Costs in points, ages as shares of the SLO."""

    setting: float
    cost: float
    cost_interval: float
    worst: float
    worst_name: str
    median_age: float
    mean_age: float


def points(cells: Sequence[Cell]) -> list[Point]:
    """One for each setting; ages are means over the cells that refused more than a few in every setting."""
    aged = [cell for cell in cells if not any(map(math.isnan, cell.median_age.values()))]
    found = []
    for setting in SETTINGS:
        by_seed = [fmean(costs) for costs in zip(*(c.costs(setting) for c in cells), strict=True)]
        worst = max(cells, key=lambda cell: fmean(cell.costs(setting)))
        found.append(
            Point(
                setting=setting,
                cost=fmean(by_seed),
                cost_interval=interval(by_seed),
                worst=fmean(worst.costs(setting)),
                worst_name=worst.name,
                median_age=fmean(cell.median_age[setting] for cell in aged) if aged else math.nan,
                mean_age=fmean(cell.mean_age[setting] for cell in aged) if aged else math.nan,
            )
        )
    return found


def page(cells: Sequence[Cell], seeds: int) -> str:
    """The tables as a page."""
    lines = [
        "# What it costs to refuse early",
        "",
        f"INFER5 with every setting of `early_refusal`, {seeds} seeds, the same arrivals in virtual time.",
        "*Cost* is how many points fewer are in time for the client than at 0, which refuses when a request",
        "is hopeless. *Age* is the time from the arrival of a request that was refused to its answer, as a",
        f"share of its SLO: medians and means of each load, averaged over those with {FEW} refusals or more",
        f"a run. The default is {DEFAULT:g}. slosched {__version__}; written by `analysis/early_refusal.py`.",
    ]
    groups = (
        ("The policy cases", [cell for cell in cells if not cell.flood]),
        (f"Floods: {'x, '.join(map(str, LOADS))}x the capacity", [c for c in cells if c.flood]),
    )
    for heading, group in groups:
        if not group:
            continue
        lines += ["", f"## {heading} ({len(group)})", ""]
        lines += [
            "| early_refusal | cost | worst | where | median age | mean age |",
            "|--:|--:|--:|---|--:|--:|",
        ]
        for p in points(group):
            lines.append(
                f"| {p.setting:g} | {p.cost:+.2f} ±{p.cost_interval:.2f} | {p.worst:+.2f} | {p.worst_name} | "
                f"{p.median_age:.3f} | {p.mean_age:.3f} |"
            )
        lines += ["", f"By load, at 0 and at the default of {DEFAULT:g}:", ""]
        lines += [
            "| load | in time % | cost | median age | at 0 | mean age | at 0 |",
            "|---|" + "--:|" * 6,
        ]
        for cell in group:
            costs = cell.costs(DEFAULT)
            lines.append(
                f"| {cell.name} | {fmean(cell.satisfied[DEFAULT]):.2f} | {fmean(costs):+.2f} "
                f"±{interval(costs):.2f} | {_age(cell.median_age[DEFAULT])} | {_age(cell.median_age[0.0])} | "
                f"{_age(cell.mean_age[DEFAULT])} | {_age(cell.mean_age[0.0])} |"
            )
    return "\n".join(lines) + "\n"


def _age(share: float) -> str:
    return "" if math.isnan(share) else f"{share:.3f}"


def draw(cells: Sequence[Cell], out: Path) -> Path:
    """The cost against the age over the cases, and the age by load in floods."""
    from slosched.analysis import style

    found = points([cell for cell in cells if not cell.flood])
    with style.look():
        figure = style.Figure(figsize=(9.6, 3.9), layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_costs(left, cells, found)
        right.set_title(f"Floods, SLO {FLOOD_SLO_MS} ms")
        for place, load in enumerate(LOADS):
            group = [cell for cell in cells if cell.flood == load]
            right.plot(
                SETTINGS,
                [100 * fmean(c.median_age[s] for c in group) for s in SETTINGS],
                color=style.COLOURS[place],
                marker=style.MARKERS[place],
                label=f"{load}x, median",
            )
            right.plot(
                SETTINGS,
                [100 * fmean(c.mean_age[s] for c in group) for s in SETTINGS],
                color=style.COLOURS[place],
                linestyle=":",
                linewidth=1.4,
                label=f"{load}x, mean",
            )
        right.axvline(DEFAULT, color=style.PALE, linewidth=0.9, zorder=0)
        right.set_ylim(-4, 100)
        right.set_xlabel("early_refusal")
        right.set_ylabel("Age of refusals / SLO, %")
        right.legend(ncols=1)
        png, _ = style.save(figure, out, "early_refusal")
    return png


def _draw_costs(left: Any, cells: Sequence[Cell], found: Sequence[Point]) -> None:
    """Goodput lost against the age of refusals, a point for each setting."""
    from slosched.analysis import style

    left.set_title(f"{sum(not c.flood for c in cells)} policy cases")
    left.axhline(MAY_COST, color=style.PALE, linestyle=":")
    ages = [100 * p.mean_age for p in found]
    left.errorbar(
        ages,
        [p.cost for p in found],
        yerr=[p.cost_interval for p in found],
        color=style.COLOURS[0],
        marker="o",
        elinewidth=0.9,
        capsize=2.5,
    )
    for age, p in zip(ages, found, strict=True):
        chosen = p.setting == DEFAULT
        left.annotate(
            f"{p.setting:g}" + (" (default)" if chosen else ""),
            (age, p.cost),
            xytext=(-7, -5) if chosen else (7, 5),
            textcoords="offset points",
            ha="right" if chosen else "left",
            va="top" if chosen else "baseline",
            fontweight="bold" if chosen else "normal",
            color=style.INK,
        )
    left.text(
        0.99,
        MAY_COST,
        "what the default\nmay cost",
        transform=left.get_yaxis_transform(),
        color=style.PALE,
        fontsize=9,
        ha="right",
        va="bottom",
    )
    left.margins(x=0.12, y=0.18)
    left.set_xlabel("Mean age of refusals / SLO, %")
    left.set_ylabel("Goodput lost, points")


def keep(cells: Sequence[Cell], text: str, png: Path, seeds: int) -> None:
    """The figure and its numbers beside this recipe."""
    OUT.mkdir(exist_ok=True)
    image = Image.open(png).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    image.save(OUT / "early_refusal.png", optimize=True)
    document = {"version": __version__, "seeds": seeds, "cells": [asdict(cell) for cell in cells]}
    rounded = json.loads(json.dumps(document), parse_float=lambda number: round(float(number), 4))
    lines = [json.dumps(cell).replace("NaN", "null") for cell in rounded.pop("cells")]
    head = json.dumps(rounded).removesuffix("}")
    (OUT / "early_refusal.json").write_text(
        f'{head}, "cells": [\n ' + ",\n ".join(lines) + "\n]}\n", encoding="utf-8"
    )
    (OUT / "early_refusal.md").write_text(text, encoding="utf-8")


def kept() -> tuple[list[Cell], int]:
    """The numbers beside this recipe, and of how many seeds they are."""
    document = json.loads((OUT / "early_refusal.json").read_text(encoding="utf-8"))
    for cell in document["cells"]:
        for name in ("satisfied", "median_age", "mean_age"):
            by_setting = cell[name].items()
            cell[name] = {float(s): math.nan if v is None else v for s, v in by_setting}
    return [Cell(**cell) for cell in document["cells"]], document["seeds"]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--only", action="append", help="cases of this name, or flood; repeatable")
    parser.add_argument("--out", type=Path, default=Path("slosched-runs") / "early-refusal")
    parser.add_argument(
        "--tables", action="store_true", help="keep the table and figure in analysis/early_refusal/"
    )
    parser.add_argument("--kept", action="store_true", help="from the kept numbers; nothing is run")
    options = parser.parse_args()
    if options.kept:
        cells, seeds = kept()
    else:
        seeds = options.seeds
        cells = measured(options.only or (), seeds, options.jobs)
    text = page(cells, seeds)
    print(text)
    if options.only:
        return 0
    png = draw(cells, options.out)
    if options.tables:
        keep(cells, text, png, seeds)
    costs = {p.setting: p.cost for p in points([cell for cell in cells if not cell.flood])}
    print(f"the default of {DEFAULT:g} costs {costs[DEFAULT]:.2f} points, of at most {MAY_COST:g}")
    return 0 if costs[DEFAULT] <= MAY_COST else 1


if __name__ == "__main__":
    sys.exit(main())
