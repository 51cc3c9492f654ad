"""How many requests the default policy satisfies on the grid of the policy study, and with noise.

    .venv/bin/python analysis/policy_grid.py --jobs 2 --tables     # five minutes of two cores
    .venv/bin/python analysis/policy_grid.py --only 12/2400 --seeds 2

Six GPUs of profile fig7 (or one of v100), N copies of one model resident on all of them, Poisson arrivals
at R requests/s in all, an Infer sent 0.9 ms before its exec can start, its end heard 0.25 ms after; judged
from arrival at the controller. Each cell is a run of its own from empty queues, once for each seed; the
interval is that of Student's t at 95 %. TARGETS are what a separate study of such policies found possible,
less a little; a cell below its target says so, beside what it has without early refusal, and the program ends
with 1.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from random import Random

from oracle_paper import AFTER_NS, BEFORE_NS, SlowInputNode

from slosched.codes import Code
from slosched.config import EmulationNoise, SchedulerConfig
from slosched.config_file import load_profile
from slosched.sim.harness import Demand, Network, Outcome, Simulation, SimulationFailed
from slosched.telemetry.manifest import describe_host
from slosched.units import NS_PER_MS, NS_PER_S
from slosched.version import __version__

OUT = Path(__file__).parent / "policy"
FACTORS = (1.5, 2.25, 3.375, 5.0625, 7.59375, 11.390625)
SLOS_MS = (10, 25, 100)
#: Exec times within 3 % of the profile's, and one in a thousand takes 5 ms more.
NOISE = EmulationNoise(exec_quantiles=(0.97, 1.03), stall_probability=0.001, stall_ns=5 * NS_PER_MS)
#: Student's t at 97.5 % by degrees of freedom; beyond, the normal's.
_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


@dataclass(frozen=True)
class Row:
    """One row of the grid. `slos` are factors of b1, or with `one_gpu` ms."""

    copies: int
    rate: int
    seconds: float
    targets: tuple[float, ...]
    one_gpu: bool = False
    noisy: bool = False

    @property
    def slos(self) -> tuple[float, ...]:
        return SLOS_MS if self.one_gpu else FACTORS

    @property
    def name(self) -> str:
        where = "one GPU, " if self.one_gpu else ""
        return f"{where}{self.copies}/{self.rate}" + (", noise" if self.noisy else "")

    def demands(self, slo: float, seed: int) -> list[Demand]:
        """Poisson arrivals from an empty start; the same ones whatever the SLO."""
        random, demands = Random(seed), []
        at_s = random.expovariate(self.rate)
        while at_s < self.seconds:
            model = int(random.random() * self.copies)
            factor, slo_ns = (0.0, round(slo * NS_PER_MS)) if self.one_gpu else (slo, 0)
            demands.append(Demand(round(at_s * NS_PER_S), model, factor, slo_ns))
            at_s += random.expovariate(self.rate)
        return demands


#: Targets in per cent, in the order of the SLOs. Long runs where few requests come, short in overload.
GRID = (
    Row(12, 2400, 8.0, (71.0, 87.0, 97.3, 99.9, 99.98, 100)),
    Row(48, 2400, 8.0, (71.0, 84.5, 91.5, 96.8, 99.7, 99.97)),
    Row(12, 1200, 8.0, (93.7, 99.8, 99.98, 100, 100, 100)),
    Row(48, 1200, 8.0, (93.7, 99.8, 99.98, 100, 100, 100)),
    Row(12, 600, 8.0, (99.4, 99.95, 100, 100, 100, 100)),
    Row(48, 600, 8.0, (99.4, 99.95, 100, 100, 100, 100)),
    Row(12, 4800, 4.0, (41.3, 50.0, 60.3, 75.0, 82.3, 92.3)),
    Row(12, 9600, 2.5, (21.3, 28.0, 36.2, 40.1, 47.5, 47.7)),
    Row(1, 600, 20.0, (83, 99.8, 100), one_gpu=True),
    Row(1, 1200, 20.0, (52.5, 72, 84.8), one_gpu=True),
    Row(1, 2000, 20.0, (34.3, 47.4, 50.9), one_gpu=True),
    Row(12, 2400, 8.0, (69, 85.5, 96.5, 99.9, 99.99), noisy=True),
)


@dataclass(frozen=True)
class Found:
    """One run of one cell, shares of its requests in per cent."""

    satisfied: float
    late: float
    requests: int


def simulate_cell(
    row: Row, slo: float, seed: int, *, fidelity: str = "best", early_refusal: float = 1.0
) -> Outcome:
    """Run one cell with every model resident everywhere. Raises SimulationFailed if that fails."""
    profile = load_profile("v100" if row.one_gpu else "fig7")
    gpus = 1 if row.one_gpu else 6
    config = SchedulerConfig(
        fidelity=fidelity,
        schedule_ahead_ns=5 * NS_PER_MS,
        max_batch=16,
        early_refusal=early_refusal,
    )
    network = Network(to_worker_ns=AFTER_NS, from_worker_ns=AFTER_NS)
    noise = None
    if row.noisy:
        noise = EmulationNoise(
            seed=seed,
            exec_quantiles=NOISE.exec_quantiles,
            stall_ns=NOISE.stall_ns,
            stall_probability=NOISE.stall_probability,
        )
    simulation = Simulation(
        config, profile, gpus_per_worker=(gpus,), network=network, noise=noise, check=False
    )
    simulation.kill_worker(0)
    node = SlowInputNode(profile, input_ns=BEFORE_NS - AFTER_NS, gpus=gpus, noise=noise)
    simulation.start_worker(0, node)
    models = simulation.load("resnet50", row.copies)
    simulation.run_until(simulation.now_ns + 2 * NS_PER_S)
    held = [len(gpu.resident) for gpu in simulation.scheduler.cluster.gpus.values()]
    if held != [row.copies] * gpus:
        raise SimulationFailed(f"{row.name}: models resident are {held}, not {row.copies} each")
    simulation.outcome = Outcome()
    return simulation.run(models, row.demands(slo, seed))


def run_cell(row: Row, slo: float, seed: int, early_refusal: float = 1.0) -> Found:
    requests = simulate_cell(row, slo, seed, early_refusal=early_refusal).requests
    count = len(requests)
    met = sum(r.deadline_met for r in requests)
    late = sum(r.code == Code.OK and not r.deadline_met for r in requests)
    return Found(100 * met / count, 100 * late / count, count)


def interval(values: list[float]) -> float:
    """Half the 95 % interval of the mean of `values` (Student's t); nan for one value."""
    count = len(values)
    if count < 2:
        return math.nan
    mean = sum(values) / count
    variance = sum((v - mean) ** 2 for v in values) / (count - 1)
    return _T.get(count - 1, 1.96) * math.sqrt(variance / count)


def run_grid(rows: list[Row], seeds: int, jobs: int) -> list[dict[str, object]]:
    """Every cell of `rows`, one line as it is done; the table's rows."""
    tasks = [
        (row, slo, seed) for row in rows for slo, _ in cells(row) for seed in range(1, seeds + 1)
    ]
    table: list[dict[str, object]] = []
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        done = iter(pool.map(run_cell, *zip(*tasks, strict=True)))
        for row in rows:
            found = []
            for slo, target in cells(row):
                runs = [next(done) for _ in range(seeds)]
                satisfied = [run.satisfied for run in runs]
                found.append(
                    {
                        "slo": slo,
                        "satisfied": sum(satisfied) / seeds,
                        "interval": interval(satisfied),
                        "late": sum(run.late for run in runs) / seeds,
                        "requests": sum(run.requests for run in runs),
                        "target": target,
                    }
                )
                if missed(found[-1]):
                    late = pool.map(
                        partial(run_cell, row, slo, early_refusal=0.0), range(1, seeds + 1)
                    )
                    found[-1]["refused_late"] = sum(run.satisfied for run in late) / seeds
            table.append({"name": row.name, "one_gpu": row.one_gpu, "cells": found})
            print(line_of(table[-1]), flush=True)
    return table


def cells(row: Row) -> list[tuple[float, float]]:
    """(SLO, target) of each cell of the row."""
    return list(zip(row.slos, row.targets, strict=False))


def missed(cell: dict[str, float]) -> bool:
    """Below its target by more than the rounding of the two digits shown."""
    return cell["satisfied"] < cell["target"] - 0.005


def line_of(row: dict[str, object]) -> str:
    """One row, human-readable: measured / target of each cell."""
    shown = []
    cells_found: list[dict[str, float]] = row["cells"]  # type: ignore[assignment]
    for cell in cells_found:
        mark = f" MISSED; refused late {cell['refused_late']:.2f}" if missed(cell) else ""
        shown.append(f"{cell['satisfied']:.2f} ±{cell['interval']:.2f} / {cell['target']:g}{mark}")
    late = max(cell["late"] for cell in cells_found)
    return f"| {row['name']} | " + " | ".join(shown) + f" | {late:.2f} |"


def page(table: list[dict[str, object]], seeds: int) -> str:
    """The tables as a page."""
    lines = [
        "# INFER5 on the grid of the policy study",
        "",
        f"Satisfied in per cent, mean of {seeds} seeds with its 95 % interval / target; N/R of each",
        "row. Written by `analysis/policy_grid.py`. *Late* is the greatest share that was answered after",
        "its deadline in any cell of the row. *Refused late*: a cell that misses its target has this without",
        "early refusal (`early_refusal = 0`), which is younger than the targets.",
    ]
    heads = {
        False: [f"{factor:.4g}x" for factor in FACTORS],
        True: [f"{slo} ms" for slo in SLOS_MS],
    }
    for one_gpu in (False, True):
        rows = [row for row in table if row["one_gpu"] == one_gpu]
        if not rows:
            continue
        lines += ["", f"| N/R | {' | '.join(heads[one_gpu])} | late |"]
        lines.append("|" + "---|" * (len(heads[one_gpu]) + 2))
        for row in rows:
            text = line_of(row)
            missing = len(heads[one_gpu]) + 3 - text.count("|")
            head, _, late = text[:-2].rpartition(" | ")
            lines.append(f"{head} | {'| ' * missing}{late} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--only", action="append", help="rows whose name holds this; repeatable")
    parser.add_argument("--tables", action="store_true", help="keep the table in analysis/policy/")
    options = parser.parse_args()
    rows = [r for r in GRID if not options.only or any(o in r.name for o in options.only)]
    table = run_grid(rows, options.seeds, options.jobs)
    if options.tables:
        OUT.mkdir(parents=True, exist_ok=True)
        document = {
            "version": __version__,
            "seeds": options.seeds,
            "host": describe_host(),
            "rows": table,
        }
        (OUT / "grid.json").write_text(json.dumps(document, indent=1) + "\n")
        (OUT / "grid.md").write_text(page(table, options.seeds))
    every = [cell for row in table for cell in row["cells"]]  # type: ignore[attr-defined]
    below = sum(missed(cell) for cell in every)
    print(f"{len(every)} cells, {below} below their target")
    sys.exit(1 if below else 0)


if __name__ == "__main__":
    main()
