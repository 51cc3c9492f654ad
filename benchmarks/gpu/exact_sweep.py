"""slo-exp-1 on one GPU, live and simulated (live_and_simulated.py).

The simulation of each rate starts as soon as its live run ended; the row "slo_exp_1" waits for all of them and
judges.
"""

from __future__ import annotations

from typing import Any

from exact_rig import Rig, RowFailed, check
from live_and_simulated import (
    await_simulation,
    compare,
    plain,
    run_live,
    simulate_beside,
    simulation_of,
)

from slosched.loadgen.results import RunResult

RATES = (600, 1200, 2400)
_COPIES = 12
SWEEP = ("1.5", "60", "1.5", "mul")  # ten steps, from 1.5 to 57.7 times b1
_STEPS = 10


def live(rig: Rig, rate: int) -> dict[str, Any]:
    """Row "slo_exp_R": the sweep at one rate, live; starts its simulation."""
    period_s, sent_rate = rig.settings.seconds(5), rig.rate(rate)
    words = [
        "slo-exp-1",
        rig.settings.model,
        str(_COPIES),
        "poisson",
        f"{sent_rate:g}",
        *SWEEP,
        f"{period_s:g}s",
    ]
    found = run_live(rig, _name(rate), words, period_s * _STEPS)
    found |= {"rate": rate, "sent_rate": sent_rate, "period_s": period_s}
    simulate_beside(rig, _name(rate), found)
    return {"figures": found, "checks": []}


def _name(rate: int) -> str:
    return f"slo-exp-1-{rate}"


def judge(rig: Rig) -> dict[str, Any]:
    """Row "slo_exp_1": each step's live satisfaction against the simulated one."""
    live_runs = {
        rate: rig.rows[f"slo_exp_{rate}"]["figures"]
        for rate in RATES
        if f"slo_exp_{rate}" in rig.rows
    }
    if not live_runs:
        raise RowFailed("no rate of slo-exp-1 was measured")
    children = {rate: simulation_of(rig, _name(rate), found) for rate, found in live_runs.items()}
    figures: dict[str, Any] = {}
    checks = []
    for rate, found in live_runs.items():
        simulated = await_simulation(rig, _name(rate), children[rate])
        steps = compare(RunResult.from_dict(found["live"]), simulated)
        held = sum(step["holds"] for step in steps)
        figures[str(rate)] = {"steps": steps, "simulated": plain(simulated)}
        words = f"slo-exp-1 R={rate}: steps that hold, of {len(steps)}"
        checks.append(check(words, float(held), "", f">= {len(steps)}"))
    return {"figures": figures, "checks": checks}
