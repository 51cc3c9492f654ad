"""A workload on the rig's workers, live and then simulated with this run's profile, noise and delays.

The simulation starts as soon as the live run ended, in a process of its own, while further rows are measured;
a row that compares the two waits for it.

As a program: `live_and_simulated.py LIVE.json OUT.json` simulates the live run in the one and writes the other.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from exact_live import actions_of, classes_of, exec_ends, infers_of, prediction_errors
from exact_rig import Rig, RowFailed, Served, read_profile

from slosched.analysis.validation import Delays, measure_delays
from slosched.config import EmulationNoise, SchedulerConfig
from slosched.experiment.children import Child
from slosched.loadgen.results import RunResult, StepResult
from slosched.output_files import write_file
from slosched.telemetry import client_log
from slosched.telemetry.table import LogTable
from slosched.units import NS_PER_MS
from slosched.workloads import parse_workload

#: Where the simulator predicts _SURE or more, the live share must be _HELD or more; elsewhere the two may
#: differ by _POINTS points.
_SURE, _HELD, _POINTS = 0.9995, 0.999, 2.0
_QUANTILES = 201
_SIMULATED_WITHIN_S = 120.0

#: What runs beside the client, as a context.
Beside = Callable[[Served], contextlib.AbstractContextManager[Any]]


def run_live(
    rig: Rig,
    name: str,
    words: Sequence[str],
    seconds: float,
    *,
    inputs: bool = False,
    beside: Beside | None = None,
) -> dict[str, Any]:
    """Serve the workload `words` for `seconds`; return what `describe` says of it. `beside` runs meanwhile."""
    with rig.serving(name) as served, (beside or _nothing)(served):
        result = rig.client(served, words, seconds, inputs=inputs)
    return describe(rig, served.run_dir, words, result, inputs=inputs)


def _nothing(served: Served) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def describe(
    rig: Rig,
    run_dir: Path,
    words: Sequence[str],
    result: RunResult,
    *,
    inputs: bool = False,
) -> dict[str, Any]:
    """What the run in `run_dir` came to, and all that a simulation of it with the rig's profile needs."""
    actions = actions_of(run_dir)
    profile = rig.profile()
    exec_ns = profile.model(rig.settings.model).exec_ns
    sent_ns = client_log.read_client_log(run_dir / client_log.FILE_NAME)["scheduled_ns"]
    return {
        "words": list(words),
        "gpus": rig.settings.gpus,
        "inputs": inputs,
        "live": plain(result),
        "first_sent_ns": int(sent_ns.min()),
        "delays": asdict(measure_delays(run_dir)),
        "noise": noise_of(actions, exec_ns),
        "profile": asdict(profile),
        "gpu_busy": busy(actions) / rig.settings.gpus,
        "workers_that_ran": len(np.unique(actions["worker_id"][infers_of(actions)])),
        "prediction": _prediction(actions, exec_ns),
    }


def _prediction(actions: LogTable, exec_ns: Mapping[int, int]) -> dict[str, Any]:
    """The same errors as in the row "prediction", under this load; {} of too short a run."""
    try:
        return prediction_errors(actions, exec_ns)
    except RowFailed:
        return {}


def plain(result: RunResult) -> dict[str, Any]:
    """A result for JSON, without the path of its run."""
    return {**result.as_dict(), "run_dir": None}


def noise_of(actions: LogTable, exec_ns: Mapping[int, int]) -> list[float]:
    """Evenly spaced quantiles of measured over profiled exec, as EmulationNoise takes them.

    The greatest keeps the mean of the last interval: up to a single outlier it would weigh far too much.
    """
    chosen = infers_of(actions)
    classes = classes_of(actions["batch_size"][chosen], exec_ns)
    usual = np.array([exec_ns[int(size)] for size in classes.tolist()], dtype=np.float64)
    ratios = np.sort(np.maximum(actions["worker_exec_duration"][chosen] / usual, 0.01))
    quantiles = np.quantile(ratios, np.linspace(0.0, 1.0, _QUANTILES))
    last = ratios[len(ratios) * (_QUANTILES - 2) // (_QUANTILES - 1) :]
    quantiles[-1] = max(quantiles[-2], 2.0 * float(last.mean()) - quantiles[-2])
    return [round(float(value), 6) for value in np.maximum.accumulate(quantiles)]


def busy(actions: LogTable) -> float:
    """Exec time of all GPUs over the time from the first end to the last."""
    chosen = infers_of(actions)
    ends = exec_ends(actions)[chosen]
    return int(actions["worker_exec_duration"][chosen].sum()) / max(1, int(ends.max() - ends.min()))


# ------------------------------------------------------------------------------------ simulated


def _files(rig: Rig, name: str) -> tuple[Path, Path]:
    """What the simulation of the live run `name` reads, and what it writes."""
    return rig.directory / f"{name}.live.json", rig.directory / f"{name}.simulated.json"


def simulate_beside(rig: Rig, name: str, found: Mapping[str, Any]) -> Child:
    """Start the simulation of the live run `name`."""
    source, out = _files(rig, name)
    write_file(source, json.dumps(found).encode())
    out.unlink(missing_ok=True)
    return rig.background.start(
        f"simulation of {name}",
        [str(Path(__file__).resolve()), str(source), str(out)],
        rig.directory / f"{name}.simulation.log",
    )


def simulation_of(rig: Rig, name: str, found: Mapping[str, Any]) -> Child:
    """The simulation of the live run `name`, begun by this command or now."""
    for child in list(rig.background._children):
        if child.name == f"simulation of {name}":
            return child
    return simulate_beside(rig, name, found)


def await_simulation(
    rig: Rig, name: str, child: Child, within_s: float = _SIMULATED_WITHIN_S
) -> RunResult:
    """The simulation's result. Raises RowFailed if it fails, or does not end in time."""
    code = rig.background.wait(child, within_s)
    if code != 0:
        ended = f"ended with exit code {code}" if code is not None else "did not end in time"
        raise RowFailed(f"the {child.name} {ended}: {child.last_line()}")
    return RunResult.from_dict(json.loads(_files(rig, name)[1].read_text(encoding="utf-8")))


def simulate(found: Mapping[str, Any]) -> RunResult:
    """The live run in virtual time: same arrivals, this run's profile, noise and delays.

    Each GPU has a worker and a PCIe link of its own. Inputs take time on the link, if its speed is given; their
    time on the way through the host is in the measured delays.
    """
    from slosched.cli.validate import network_like
    from slosched.sim.faults import Fault, FaultPlan
    from slosched.sim.run import simulate as run
    from slosched.sim.spec import SimSpec

    words = found["words"]
    raw = found["delays"]
    spreads = {name: tuple(values) for name, values in raw["spreads_ns"].items()}
    faults = tuple(Fault(**fault) for fault in found.get("faults", ()))
    spec = SimSpec(
        workload=parse_workload(words[0], words[1:]),
        scheduler=SchedulerConfig(schedule_ahead_ns=5 * NS_PER_MS),
        profiles=(read_profile(found["profile"]),),
        gpus=found.get("gpus", 1),
        network=network_like(Delays(**{**raw, "spreads_ns": spreads})),
        noise=EmulationNoise(
            exec_quantiles=tuple(found["noise"]),
            pcie_bytes_per_s=found.get("pcie_bytes_per_s", 0),
        ),
        seed=0,
        inputs=found.get("inputs", False),
        faults=FaultPlan(faults) if faults else None,
    )
    return run(spec)


def compare(
    live_result: RunResult, simulated: RunResult, *, held_from: float = 0.0
) -> list[dict[str, Any]]:
    """Each step's two satisfactions (client, from the scheduled send), the rule and whether it holds.

    A step with an SLO below `held_from` times batch 1 is held to nothing.
    """
    theirs = {step.index: step for step in simulated.steps}
    return [
        _step(step, theirs[step.index], held_from)
        for step in live_result.steps
        if step.index in theirs
    ]


def _step(live_step: StepResult, simulated: StepResult, held_from: float) -> dict[str, Any]:
    predicted, measured = simulated.satisfaction, live_step.satisfaction
    sure = predicted >= _SURE
    free = not sure and 0 < live_step.slo_factor < held_from
    points = 100 * (measured - predicted)
    rule = f">= {100 * _HELD:g} %" if sure else f"within {_POINTS:g} points"
    return {
        "slo": live_step.slo,
        "sent": live_step.sent,
        "live": measured,
        "live_controller": live_step.controller_satisfaction,
        "simulated": predicted,
        "points": points,
        "rule": "" if free else rule,
        "holds": free or (measured >= _HELD if sure else abs(points) <= _POINTS + 1e-9),
        "latency_p99_ns": live_step.latency_p99_ns,
        "issue_delay_p99_ns": live_step.issue_delay_p99_ns,
    }


def main() -> int:
    source, out = (Path(argument) for argument in sys.argv[1:])
    os.nice(10)
    result = simulate(json.loads(source.read_text(encoding="utf-8")))
    write_file(out, json.dumps(plain(result)).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
