"""The README's picture: requests answered in time as the load grows, INFER5 beside FIFO and AIMD.

    .venv/bin/python analysis/under_load.py [--out docs]

Simulated: 12 copies of ResNet-50 on six V100s, Poisson arrivals, an SLO of 25 ms, the same arrivals for each
scheduler. Each point is one run: 0.5 s to fill the queues, 2 s that count and 0.5 s behind them. Writes
under_load.png and the numbers as under_load.json; about a minute and a half of one core.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from slosched.config import SchedulerConfig
from slosched.config_file import load_profile
from slosched.sim.run import simulate
from slosched.sim.spec import SimSpec
from slosched.units import NS_PER_MS, NS_PER_S
from slosched.workloads.base import Step
from slosched.workloads.mix import MixEntry, mix

ROOT = Path(__file__).resolve().parent.parent
POLICIES = ("INFER5", "FIFO", "AIMD")
RATES = (600, 1200, 1800, 2400, 3000, 3600, 4200, 4800, 6000)
SLO_NS = 25 * NS_PER_MS
_STARTS_NS = (0, NS_PER_S // 2, 5 * NS_PER_S // 2)
_END_NS = 3 * NS_PER_S


def goodput(policy: str, rate: float) -> float:
    """Requests per second that are in time for the client, from the scheduled send."""
    spec = SimSpec(
        workload=mix(
            [MixEntry("resnet50_v2", 12, rate, (0.0, SLO_NS))],
            _END_NS,
            tuple(Step(index, start_ns) for index, start_ns in enumerate(_STARTS_NS)),
        ),
        scheduler=SchedulerConfig(policy=policy, schedule_ahead_ns=5 * NS_PER_MS),
        profiles=(load_profile("v100"),),
        gpus=6,
        seed=1,
    )
    return simulate(spec).steps[1].goodput_rps


def draw(curves: Mapping[str, Sequence[float]], out: Path) -> Path:
    from slosched.analysis import style

    with style.look():
        figure = style.Figure(figsize=(7.6, 3.6), layout="constrained")
        ax = figure.subplots()
        ax.plot(RATES, RATES, color=style.PALE, linewidth=1.1, linestyle=(0, (4, 3)))
        ax.annotate(
            "all that is asked for",
            (RATES[2], RATES[2]),
            xytext=(-6, 8),
            textcoords="offset points",
            ha="right",
            color=style.PALE,
            fontsize=9,
        )
        for place, (policy, values) in enumerate(curves.items()):
            ax.plot(
                RATES, values, color=style.COLOURS[place], marker=style.MARKERS[place], label=policy
            )
        ax.set_xlabel("Requests sent per second")
        ax.set_ylabel("Answered within 25 ms, per second")
        ax.set_xlim(0, RATES[-1] * 1.03)
        ax.set_ylim(0, max(max(values) for values in curves.values()) * 1.25)
        ax.legend(loc="lower right", bbox_to_anchor=(1, 0.16))
        png, pdf = style.save(figure, out, "under_load")
    pdf.unlink()
    return png


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="default: docs/")
    out = parser.parse_args().out
    curves = {policy: [round(goodput(policy, rate), 1) for rate in RATES] for policy in POLICIES}
    numbers = {"rates": RATES, "goodput_rps": curves}
    (out / "under_load.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(numbers))
    print(f"wrote {draw(curves, out)}")


if __name__ == "__main__":
    main()
