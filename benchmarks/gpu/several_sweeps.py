"""slo-exp-1 on all GPUs, live and simulated: which runs there are, in which order, and how they compare.

A run is N copies, a rate, whether it is scaled to these GPUs, and whether requests bring inputs. The whole
sweep has ten steps; a short one has four, from 3.4x up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exact_rig import NotHere, Rig, RowFailed, check
from exact_sweep import SWEEP
from live_and_simulated import (
    await_simulation,
    compare,
    plain,
    run_live,
    simulate_beside,
    simulation_of,
)
from several_rig import Compared, SeveralRig

from slosched.clock import now_ns
from slosched.loadgen.results import RunResult
from slosched.units import NS_PER_S

SHORT = ("3.4", "60", "2.25", "mul")
_STEPS: dict[tuple[str, ...], int] = {SWEEP: 10, SHORT: 4}
PERIOD_S = 5.0
#: From this multiple of batch 1 up, live and simulated must agree.
HELD_FROM = 3.37
#: A simulation that has not ended by then is left out, so that the others are judged.
_BEFORE_END_S = 3.0


@dataclass(frozen=True)
class Run:
    """One run of slo-exp-1. `rate` is for six V100s if `scaled`, else what is sent (requests/s)."""

    copies: int
    rate: int
    scaled: bool
    inputs: bool = False
    whole: bool = False

    @property
    def name(self) -> str:
        parts = [f"n{self.copies}", f"r{self.rate}"]
        parts += ["scaled"] if self.scaled else []
        parts += ["inputs"] if self.inputs else []
        return "_".join(parts)

    @property
    def sweep(self) -> tuple[str, ...]:
        return SWEEP if self.whole else SHORT

    @property
    def steps(self) -> int:
        return _STEPS[self.sweep]

    @property
    def needs_s(self) -> float:
        """On a GPU, with the start of a controller and the loads."""
        return self.steps * PERIOD_S + 7.0


#: The most telling runs come first. With inputs, the scaled rates that come last are more than one client can
#: send to several fast GPUs: they show the limit of the host.
FIRST = (
    Run(12, 2400, scaled=True, whole=True),
    Run(12, 1200, scaled=True),
    Run(48, 2400, scaled=True),
)
SECOND = (
    Run(12, 2400, scaled=False),
    Run(12, 600, scaled=False, inputs=True),
    Run(12, 1200, scaled=False, inputs=True),
    Run(12, 600, scaled=True),
    Run(48, 1200, scaled=True),
    Run(48, 600, scaled=False, inputs=True),
    Run(48, 600, scaled=True),
    Run(12, 600, scaled=True, inputs=True),
    Run(12, 600, scaled=False),
    Run(12, 1200, scaled=False),
    Run(48, 600, scaled=False),
    Run(48, 1200, scaled=False),
    Run(48, 2400, scaled=False),
    Run(12, 2400, scaled=False, inputs=True),
    Run(48, 1200, scaled=False, inputs=True),
    Run(48, 2400, scaled=False, inputs=True),
    Run(48, 600, scaled=True, inputs=True),
    Run(12, 1200, scaled=True, inputs=True),
    Run(48, 1200, scaled=True, inputs=True),
    Run(12, 2400, scaled=True, inputs=True),
    Run(48, 2400, scaled=True, inputs=True),
)
RUNS = {run.name: run for run in (*FIRST, *SECOND)}


def several(rig: Rig) -> SeveralRig:
    """The rig that these rows are given."""
    assert isinstance(rig, SeveralRig)
    return rig


def live(rig: Rig, run: Run) -> dict[str, Any]:
    """The row of `run`: the sweep, live, beside compared answers; starts its simulation."""
    rig = several(rig)
    sent_rate = rig.rate_for(run.rate, as_meant=run.scaled)
    if run.scaled and sent_rate == run.rate:
        raise NotHere("on these GPUs the scaled rate is the absolute one")
    period_s = rig.settings.seconds(PERIOD_S)
    seconds = period_s * run.steps
    words = [
        "slo-exp-1",
        rig.settings.model,
        str(run.copies),
        "poisson",
        f"{sent_rate:g}",
        *run.sweep,
        f"{period_s:g}s",
    ]
    compared = Compared(rig, sent_rate, seconds, run.copies)
    found = run_live(rig, run.name, words, seconds, inputs=run.inputs, beside=compared.beside)
    found |= {
        "run": {"copies": run.copies, "rate": run.rate, "scaled": run.scaled, "inputs": run.inputs},
        "sent_rate": sent_rate,
        "period_s": period_s,
        "compared": compared.found,
    }
    if run.inputs:
        found["pcie_bytes_per_s"] = pcie_bytes_per_s(rig)
    simulate_beside(rig, run.name, found)
    return {"figures": found, "checks": live_checks(run.name, found)}


def pcie_bytes_per_s(rig: SeveralRig) -> int:
    """How fast weights are copied to a GPU: inputs take the same link."""
    model = rig.model()
    return round(model.weights_bytes / model.weights_ns * NS_PER_S)


def live_checks(name: str, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the table says of a live run before it is simulated."""
    steps = RunResult.from_dict(found["live"]).steps
    late_ns = max((step.issue_delay_p99_ns for step in steps), default=None)
    return [
        check(f"{name} ({found['sent_rate']:g}/s): GPUs busy", 100 * found["gpu_busy"], "%"),
        check(
            f"{name}: workers that ran inferences",
            float(found["workers_that_ran"]),
            "",
            f">= {found['gpus']}",
        ),
        check(
            f"{name}: the client's issue delay p99, worst step",
            None if late_ns is None else late_ns / 1e6,
            "ms",
            "< 2",
        ),
        *compared_checks(name, found["compared"]),
    ]


def compared_checks(name: str, compared: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Answers of a share of the requests against a direct forward pass."""
    if "error" in compared:
        return [check(f"{name}: answers compared ({compared['error'][:80]})", None, "", ">= 1")]
    return [
        check(
            f"{name}: answers compared with a direct forward pass", compared["compared"], "", ">= 1"
        ),
        check(f"{name}: answers that were wrong", compared["wrong"], "", "<= 0"),
    ]


# --------------------------------------------------------------------------------- simulated


def judge(rig: Rig) -> dict[str, Any]:
    """Row "simulated": each run beside its simulation. What is not simulated in time is said and left out."""
    rig = several(rig)
    simulated_rows = (*RUNS, "cold", "kill")
    runs = {name: rig.rows[name]["figures"] for name in simulated_rows if name in rig.rows}
    if not runs:
        raise RowFailed("no row was measured that could be simulated")
    results: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    children = {
        name: simulation_of(rig, name, found)
        for name, found in runs.items()
        if known_simulation(rig, name, found) is None
    }
    for name, found in runs.items():
        simulated = known_simulation(rig, name, found)
        try:
            if simulated is None:
                left_s = (rig.until_ns - now_ns()) / NS_PER_S - _BEFORE_END_S
                simulated = plain(
                    await_simulation(rig, name, children[name], max(0.1, min(left_s, 900.0)))
                )
        except RowFailed as error:
            missing[name] = str(error)
            continue
        results[name] = {
            "first_sent_ns": found["first_sent_ns"],
            "simulated": simulated,
            "steps": compare(
                RunResult.from_dict(found["live"]),
                RunResult.from_dict(simulated),
                held_from=HELD_FROM,
            ),
        }
    return {
        "figures": {"runs": results, "missing": missing},
        "checks": judge_checks(results, missing),
    }


def known_simulation(rig: SeveralRig, name: str, found: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an earlier command simulated of this very live run."""
    known = rig.simulated.get(name)
    if known is None or known["first_sent_ns"] != found["first_sent_ns"]:
        return None
    simulated: dict[str, Any] = known["simulated"]
    return simulated


def judge_checks(
    results: Mapping[str, Mapping[str, Any]], missing: Mapping[str, str]
) -> list[dict[str, Any]]:
    """How many steps hold of each run, of those that are held to something."""
    checks = []
    for name, result in results.items():
        held = [step for step in result["steps"] if step["rule"]]
        number = float(sum(step["holds"] for step in held))
        words = f"{name}: steps that hold beside the simulator, of {len(held)}"
        checks.append(check(words, number, "", f">= {len(held)}" if held else ""))
    checks += [
        check(f"{name}: not simulated ({words[:80]})", None, "", ">= 1")
        for name, words in missing.items()
    ]
    return checks
