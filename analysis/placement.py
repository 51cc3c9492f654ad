"""Rules of weight placement side by side: which share of the requests is in time when memory is short.

    .venv/bin/python analysis/placement.py [--seeds 3] [--seconds 10] [--jobs 1] [--tables]

`zipf`: 100 copies of ResNet-50 on two GPUs of the profile v100 whose memory holds 10, 30 and 70 % of them,
copy i asked for in proportion to 1 / i^0.9, Poisson arrivals; a load takes 8.33 ms, an exec 2.6 ms. The three
rates are about a fifth, a half and four fifths of what two GPUs do one by one (770 requests/s); at 10 % PCIe
(240 loads/s) is what is short. No load is in time for an SLO of 10 ms: there only what is resident counts.
`hot`: 20 copies with exponent 1.5 on four GPUs that hold three each: the first copy gets 43 % of the requests,
more than one GPU does one by one. `turns`: closed loops over more copies than one GPU holds. Counted is what
arrives after the first two seconds, from arrival at the controller.

Rules: `gain` is the default, `demand` Clockwork's, `lru` a plain cache. The figure after the +- is the
standard error over the seeds of the difference to `gain` (of `gain`: of itself).
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from slosched.clock import now_ns
from slosched.codes import ActionType
from slosched.config import GpuProfile, SchedulerConfig
from slosched.config_file import load_profile
from slosched.core.scheduler.interface import ActionRecord, Note, RequestRecord
from slosched.sim.client import Phase
from slosched.sim.spec import SimSpec
from slosched.sim.world import World
from slosched.units import NS_PER_MS, NS_PER_S
from slosched.version import __version__
from slosched.workloads import Workload, parse_workload
from slosched.workloads.base import ModelUse, Step
from slosched.workloads.engine import Engine
from slosched.workloads.streams import ClosedLoop

OUT = Path(__file__).parent / "placement"
MODEL = "resnet50"
COPIES, GPUS, EXPONENT = 100, 2, 0.9
SHARES = (0.1, 0.3, 0.7)
RATES = {"light": 150, "medium": 400, "near": 620}
SLOS_MS = (10, 25, 50, 100, 250)
RULES = ("gain", "demand", "lru")
SKIP_NS = 2 * NS_PER_S


@dataclass(frozen=True)
class Turns:
    """`loops` closed loops share `copies` copies evenly, each going round those of its own."""

    copies: int
    loops: int
    slo_ms: int
    name: str = "turns"
    duration_ns: int | None = None
    groups: tuple[str, ...] = ("",)

    def models(self) -> tuple[ModelUse, ...]:
        return (ModelUse(MODEL, self.copies),)

    def steps(self) -> tuple[Step, ...]:
        return (Step(0, 0, slo_ns=self.slo_ms * NS_PER_MS),)

    def streams(self, seed: int) -> Sequence[ClosedLoop]:
        return [
            ClosedLoop(1, range(loop, self.copies, self.loops), user_id=loop)
            for loop in range(self.loops)
        ]

    def describe(self) -> str:
        return f"{self.loops} closed loops over {self.copies} copies, SLO {self.slo_ms} ms"


@dataclass(frozen=True)
class Cell:
    """One row of the table: the workload (`rate` 0: closed loops), and copies that fit on a GPU."""

    rate: int
    slo_ms: int
    fit: int
    gpus: int = GPUS
    copies: int = COPIES
    exponent: float = EXPONENT
    loops: int = 0

    def __str__(self) -> str:
        if self.loops:
            return (
                f"turns: {self.loops} loops, {self.copies} copies, {self.fit} fit, {self.slo_ms} ms"
            )
        share = 100 * self.fit * self.gpus / self.copies
        name = "zipf" if self.exponent == EXPONENT else "hot"
        return f"{name}: {share:3.0f} % fit, {self.rate}/s, {self.slo_ms} ms"

    def workload(self) -> Workload:
        if self.loops:
            return Turns(self.copies, self.loops, self.slo_ms)
        values = (
            MODEL,
            str(self.copies),
            str(self.rate),
            str(self.exponent),
            "1h",
            f"{self.slo_ms}ms",
        )
        return parse_workload("zipf", values)


@dataclass(frozen=True)
class Outcome:
    """One run: requests counted, shares in time and answered late or not, loads, PCIe in use."""

    requests: int
    in_time: float
    loads: int
    pcie: float


def cells() -> list[Cell]:
    zipf = [
        Cell(rate, slo_ms, round(share * COPIES / GPUS))
        for share in SHARES
        for rate in RATES.values()
        for slo_ms in SLOS_MS
    ]
    turns = [
        Cell(0, slo_ms, 2, gpus=1, copies=copies, loops=loops)
        for copies, loops in ((5, 2), (6, 3), (9, 3))
        for slo_ms in (25, 50, 100)
    ]
    hot = [
        Cell(rate, slo_ms, 3, gpus=4, copies=20, exponent=1.5)
        for rate in (600, 1200, 2000)
        for slo_ms in (25, 50, 100)
    ]
    return zipf + hot + turns


def profile_that_holds(copies: int) -> GpuProfile:
    """A v100 with memory for `copies` copies of the model."""
    profile = load_profile("v100")
    pages = -(-profile.models[MODEL].weights_bytes // profile.page_bytes)
    return replace(profile, weights_cache_bytes=copies * pages * profile.page_bytes)


def simulated(cell: Cell, rule: str, seconds: float, seed: int) -> Outcome:
    """One run; the same arrivals whatever the rule (closed loops follow the answers)."""
    duration_ns = SKIP_NS + round(seconds * NS_PER_S)
    spec = SimSpec(
        workload=cell.workload(),
        scheduler=SchedulerConfig(placement=rule, schedule_ahead_ns=5 * NS_PER_MS),
        profiles=(profile_that_holds(cell.fit),),
        gpus=cell.gpus,
        seed=seed,
        duration_ns=duration_ns,
    )
    requests: list[RequestRecord] = []
    actions: list[ActionRecord] = []
    world = World(
        spec,
        Engine(spec.workload, seed=seed, duration_ns=duration_ns),
        on_request=requests.append,
        on_action=actions.append,
        on_note=_unheard,
        on_client=None,
    )
    world.client.start()
    while world.client.phase is not Phase.DONE:
        world.kernel.run_until(world.kernel.now_ns + NS_PER_S // 20)
    start_ns = min(record.arrival_ns for record in requests) + SKIP_NS
    counted = [record for record in requests if record.arrival_ns >= start_ns]
    loads = [
        action
        for action in actions
        if action.action_type is ActionType.LOAD_WEIGHTS and action.exec.begin_ns >= start_ns
    ]
    return Outcome(
        len(counted),
        sum(record.deadline_met for record in counted) / max(1, len(counted)),
        len(loads),
        sum(load.exec.duration_ns for load in loads) / (cell.gpus * seconds * NS_PER_S),
    )


def _unheard(note: Note) -> None:
    return


@dataclass(frozen=True)
class Row:
    """A cell, and for each rule its outcomes by seed."""

    cell: Cell
    outcomes: dict[str, list[Outcome]]

    def percent(self, rule: str) -> float:
        return 100 * fmean(outcome.in_time for outcome in self.outcomes[rule])

    def error(self, rule: str) -> float:
        """Standard error of the difference to `gain`, in points; of `gain`: of its own mean."""
        ours, theirs = self.outcomes[RULES[0]], self.outcomes[rule]
        values = [
            a.in_time - (b.in_time if rule != RULES[0] else 0.0)
            for a, b in zip(ours, theirs, strict=True)
        ]
        return 100 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def verdict(row: Row) -> str:
    """Which rule is ahead by more than twice the standard error of the difference."""
    behind = [
        rule
        for rule in RULES[1:]
        if row.percent(rule) - row.percent(RULES[0]) > max(0.05, 2 * row.error(rule))
    ]
    return f"behind {', '.join(behind)}" if behind else ""


def table(rows: Sequence[Row]) -> str:
    heads = "".join(f"{rule:>16}" for rule in RULES)
    lines = [f"{'in time, %':<40}{heads}   loads of each     PCIe of {RULES[0]}"]
    for row in rows:
        numbers = "".join(f"{row.percent(rule):9.2f} +-{row.error(rule):5.2f}" for rule in RULES)
        first = row.outcomes[RULES[0]]
        counts = [fmean(outcome.loads for outcome in row.outcomes[rule]) for rule in RULES]
        loads = " ".join(f"{count:6.0f}" for count in counts)
        pcie = 100 * fmean(outcome.pcie for outcome in first)
        lines.append(f"{row.cell!s:<40}{numbers}  {loads} {pcie:5.0f} %  {verdict(row)}".rstrip())
    return "\n".join(lines)


def _job(task: tuple[Cell, str, float, int]) -> Outcome:
    return simulated(*task)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--seeds", type=int, default=3, help="runs of each cell and rule; default 3"
    )
    parser.add_argument("--seconds", type=float, default=8.0, help="counted of each; default 8")
    parser.add_argument("--jobs", type=int, default=1, help="processes; default 1")
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    parser.add_argument(
        "--tables", action="store_true", help="keep the table in analysis/placement/"
    )
    options = parser.parse_args()
    began_ns = now_ns()
    chosen = [cell for cell in cells() if options.only in str(cell)]
    rows: list[Row] = []
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for cell in chosen:
            tasks = [
                (cell, rule, options.seconds, seed)
                for rule in RULES
                for seed in range(1, options.seeds + 1)
            ]
            found = list(pool.map(_job, tasks))
            split = {
                rule: found[i * options.seeds : (i + 1) * options.seeds]
                for i, rule in enumerate(RULES)
            }
            rows.append(Row(cell, split))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    text = table(rows)
    print(text)
    if options.tables:
        _keep(rows, text, options, (now_ns() - began_ns) / NS_PER_S)


def _keep(rows: Sequence[Row], text: str, options: argparse.Namespace, wall_s: float) -> None:
    OUT.mkdir(exist_ok=True)
    document = {
        "version": __version__,
        "seeds": options.seeds,
        "seconds": options.seconds,
        "rows": [
            {
                "cell": asdict(row.cell),
                "percent_in_time": {rule: round(row.percent(rule), 3) for rule in RULES},
                "standard_error": {rule: round(row.error(rule), 3) for rule in RULES},
                "loads": {rule: [o.loads for o in row.outcomes[rule]] for rule in RULES},
            }
            for row in rows
        ],
    }
    draw(document, OUT)
    (OUT / "placement.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    heading = (
        f"# Weight placement, simulated\n\n{__doc__ and __doc__.partition(chr(10))[0]}\n\n"
        f"```\n{text}\n```\n\n![In time by SLO](placement.png)\n\n"
        f"slosched {__version__}; {options.seeds} seeds of {options.seconds:g} s, {wall_s:.0f} s with "
        f"{options.jobs} process(es) of {os.cpu_count()} CPUs. Made by "
        f"`analysis/placement.py --seconds {options.seconds:g} --tables`.\n"
    )
    (OUT / "placement.md").write_text(heading, encoding="utf-8")


def draw(document: dict[str, Any], out: Path) -> None:
    """Shares in time by SLO into `out`, a panel for each memory and rate of the `zipf` rows."""
    from slosched.analysis import style

    rows = [
        row
        for row in document["rows"]
        if row["cell"]["exponent"] == EXPONENT and row["cell"]["rate"]
    ]
    fits = sorted({row["cell"]["fit"] for row in rows})
    rates = sorted({row["cell"]["rate"] for row in rows})
    with style.look():
        figure = style.Figure(figsize=(9.0, 7.0), layout="constrained")
        panels = figure.subplots(len(rates), len(fits), sharex=True, sharey=True, squeeze=False)
        for line, rate in enumerate(rates):
            for column, fit in enumerate(fits):
                panel = panels[line][column]
                measured = [
                    row for row in rows if (row["cell"]["fit"], row["cell"]["rate"]) == (fit, rate)
                ]
                slos_ms = [row["cell"]["slo_ms"] for row in measured]
                for place, rule in enumerate(RULES):
                    shares = [row["percent_in_time"][rule] for row in measured]
                    panel.plot(
                        slos_ms, shares, color=style.COLOURS[place], marker=style.MARKERS[place]
                    )
                panel.set_xscale("log")
                panel.xaxis.set_major_locator(style.FixedLocator(slos_ms))
                panel.xaxis.set_minor_locator(style.NullLocator())
                panel.xaxis.set_major_formatter(style.FuncFormatter(lambda ms, _: f"{ms:g}"))
                panel.set_ylim(0, 103)
                panel.set_title(f"{100 * fit * GPUS / COPIES:.0f} % fit, {rate}/s")
        for panel in panels[-1]:
            panel.set_xlabel("SLO, ms")
        for line in panels:
            line[0].set_ylabel("In time, %")
        panels[0][0].legend(panels[0][0].get_lines(), RULES)
        style.save(figure, out, "placement", dpi=110)[1].unlink()  # the PNG is enough


if __name__ == "__main__":
    main()
