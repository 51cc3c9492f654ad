"""The pictures of docs/policy.md: what INFER5 does in thirty milliseconds, the grid, and the cases.

    .venv/bin/python analysis/policy_figures.py      # from analysis/policy/grid.json and cases.json

The timeline is a simulation of its own: two GPUs of profile fig7, three models, an overload.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from oracle_paper import AFTER_NS, BEFORE_NS
from policy_cases import OURS, POLICIES
from policy_grid import FACTORS

from slosched.analysis import style
from slosched.codes import ActionType, Code
from slosched.config import SchedulerConfig
from slosched.config_file import load_profile
from slosched.sim.harness import Demand, Network, Outcome, Simulation
from slosched.units import NS_PER_MS, NS_PER_S

HERE = Path(__file__).parent
OUT = HERE / "policy"
GPUS, COPIES, RATE, SLO_MS = 2, 3, 1500.0, 20.0
#: What part of the timeline's run is shown, ms.
FROM_MS, TO_MS = 60.0, 92.0


def capacity_rps(factor: float, gpus: int = 6) -> float:
    """Requests/s that GPUs of the grid serve in batches of the best size that fits an SLO of `factor` b1.

    No schedule serves more: a batch needs its exec time, and the latencies before and after it.
    """
    exec_ns = load_profile("fig7").model("resnet50").exec_ns
    room_ns = factor * exec_ns[1] - BEFORE_NS - AFTER_NS
    fitting = [batch / ns for batch, ns in exec_ns.items() if ns <= room_ns]
    return gpus * NS_PER_S * max(fitting, default=0.0)


def timeline_run() -> tuple[Outcome, int]:
    """A short run, and when its first request was due (absolute ns)."""
    config = SchedulerConfig(schedule_ahead_ns=5 * NS_PER_MS)
    network = Network(to_worker_ns=450_000, from_worker_ns=250_000)
    simulation = Simulation(config, load_profile("fig7"), gpus_per_worker=(GPUS,), network=network)
    models = simulation.load("resnet50", COPIES)
    simulation.run_until(simulation.now_ns + NS_PER_S)
    simulation.outcome = Outcome()
    random, at_s, demands = Random(5), 0.0, []
    while at_s < 0.12:
        at_s += random.expovariate(RATE)
        model = int(random.random() * COPIES)
        demands.append(Demand(round(at_s * NS_PER_S), model, slo_ns=round(SLO_MS * NS_PER_MS)))
    start_ns = simulation.now_ns + network.from_client_ns
    return simulation.run(models, demands), start_ns


def draw_timeline() -> None:
    outcome, start_ns = timeline_run()
    first_model = min(r.model_id for r in outcome.requests)

    def ms(at_ns: int) -> float:
        return (at_ns - start_ns) / NS_PER_MS

    with style.look(axes_grid=False):
        figure = style.Figure(figsize=(9.4, 3.9), layout="constrained")
        ax = figure.subplots()
        for action in outcome.actions:
            if action.action_type != ActionType.INFER or action.code != Code.OK:
                continue
            begin, end = ms(action.exec.begin_ns), ms(action.exec.end_ns)
            if end < FROM_MS or begin > TO_MS:
                continue
            colour = style.COLOURS[action.model_id - first_model]
            lane = GPUS - 1 - action.gpu_id
            ax.barh(lane, end - begin, left=begin, height=0.5, color=colour, edgecolor="white")
            if FROM_MS < (begin + end) / 2 < TO_MS:
                ax.text(
                    (begin + end) / 2,
                    lane,
                    f"{action.batch_size}",
                    ha="center",
                    va="center",
                    color="white",
                    fontsize=10,
                    fontweight="bold",
                )
            sent = ms(action.sent_ns)
            ax.plot([sent, begin], [lane + 0.42, lane + 0.27], color=style.PALE, linewidth=0.9)
            ax.plot([sent], [lane + 0.42], marker="o", markersize=3.4, color=style.INK)
        for request in outcome.requests:
            at = ms(request.arrival_ns)
            height = GPUS + 0.15 + 0.28 * (request.model_id - first_model)
            served = request.code == Code.OK
            ax.plot(
                [at],
                [height],
                marker="v" if served else "x",
                linestyle="none",
                markersize=5.5,
                color=style.COLOURS[request.model_id - first_model],
            )
        ax.set_xlim(FROM_MS, TO_MS)
        ax.set_ylim(-0.45, GPUS + 1.0)
        ax.set_yticks([*range(GPUS), GPUS + 0.43])
        ax.set_yticklabels([*(f"GPU {GPUS - 1 - lane}" for lane in range(GPUS)), "arrivals"])
        ax.set_xlabel("Time (ms)")
        ax.set_title(
            "Three models (colours) on two GPUs: batches and sizes; dot: decided; cross: refused"
        )
        style.save(figure, OUT, "timeline")


def draw_grid() -> None:
    rows = {row["name"]: row["cells"] for row in _read("grid.json")["rows"]}
    paper = {
        (row["copies"], row["rate"]): row["ours"]
        for row in json.loads((HERE / "oracle" / "paper.json").read_text())["rows"]
        if row["ahead_ms"] == 5
    }
    shown = [(12, 1200), (12, 2400), (48, 2400), (12, 4800), (12, 9600)]
    with style.look():
        figure = style.Figure(figsize=(11.0, 3.2), layout="constrained")
        axes = figure.subplots(1, len(shown), sharey=True)
        for ax, (copies, rate) in zip(axes, shown, strict=True):
            bound = [min(100.0, 100.0 * capacity_rps(factor) / rate) for factor in FACTORS]
            ax.plot(FACTORS, bound, color=style.PALE, linestyle=":", label="capacity bound")
            ours = [cell["satisfied"] for cell in rows[f"{copies}/{rate}"]]
            ax.plot(FACTORS, ours, color=style.COLOURS[0], marker="o", label="INFER5")
            if (copies, rate) in paper:
                published = paper[copies, rate][1 : 1 + len(FACTORS)]
                ax.plot(
                    FACTORS,
                    published,
                    color=style.COLOURS[1],
                    marker="s",
                    label="as published (--fidelity paper)",
                )
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(style.FixedLocator(FACTORS))
            ax.xaxis.set_minor_locator(style.NullLocator())
            ax.set_xticklabels(["1.5", "2.25", "3.4", "5.1", "7.6", "11"], fontsize=8)
            ax.set_title(f"N={copies}, R={rate:,}/s", fontsize=10)
            ax.set_xlabel("SLO / b1")
            ax.set_ylim(0, 102)
        axes[0].set_ylabel("In time (%)")
        lines, names = axes[0].get_legend_handles_labels()
        figure.legend(lines, names, loc="outside lower center", ncols=3)
        style.save(figure, OUT, "grid")


def draw_cases() -> None:
    cells = _read("cases.json")["cells"]
    names = list(dict.fromkeys(cell["case"] for cell in cells))
    with style.look():
        figure = style.Figure(figsize=(11.0, 5.6), layout="constrained")
        axes = figure.subplots(2, (len(names) + 1) // 2, squeeze=False).flatten()
        for ax, name in zip(axes, names, strict=False):
            of_case = [cell for cell in cells if cell["case"] == name]
            for place, policy in enumerate(POLICIES):
                means = [_mean(cell["satisfied"][policy]) for cell in of_case]
                width = 0.8 / len(POLICIES)
                lefts = [i - 0.4 + (place + 0.5) * width for i in range(len(of_case))]
                ax.bar(
                    lefts,
                    means,
                    width,
                    color=style.COLOURS[place],
                    label=policy,
                    alpha=1.0 if policy == OURS else 0.6,
                )
            ax.set_xticks(range(len(of_case)))
            ax.set_xticklabels([_load(cell) for cell in of_case], fontsize=8)
            ax.set_title(name)
            ax.set_ylim(0, 101)
        for ax in axes[len(names) :]:
            ax.set_visible(False)
        axes[0].set_ylabel("In time (%)")
        lines, labels = axes[0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside lower center", ncols=len(POLICIES))
        style.save(figure, OUT, "cases")


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _load(cell: dict[str, Any]) -> str:
    slo = f"{cell['slo_ms']} ms" if cell["slo_ms"].count("/") < 2 else "mixed SLOs"
    return f"{cell['rate']:,}/s\n{slo}"


def _read(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((OUT / name).read_text())
    return document


if __name__ == "__main__":
    draw_timeline()
    draw_grid()
    draw_cases()
    print(f"wrote timeline, grid and cases into {OUT}")
