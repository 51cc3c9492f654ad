"""A live run beside a simulated one of the same spec and seed: delays, differences, and their figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slosched.codes import ActionType
from slosched.errors import InvalidConfig
from slosched.loadgen.results import RunResult, StepResult
from slosched.telemetry import action_log, client_log
from slosched.units import NS_PER_MS, format_duration, format_share
from slosched.workloads.base import Step

#: Number of evenly spaced quantiles that describe the spread of a latency.
_QUANTILES = 201


@dataclass(frozen=True)
class Delays:
    """The network latencies of a live run, ns: the constant part of each, and the spread of the rest.

    `client_round_trip_ns` is what a request takes besides the controller's own latency. Spreads are evenly
    spaced quantiles of a latency less its constant part. `medians_ns` are the measured ones, and
    `actions` how many they are of.
    """

    to_worker_ns: int
    from_worker_ns: int
    client_round_trip_ns: int
    spreads_ns: dict[str, tuple[int, ...]]
    medians_ns: dict[str, int]
    actions: int

    @property
    def text(self) -> str:
        """The delays in one line."""
        latencies = {
            "to_worker": "to the worker",
            "from_worker": "back",
            "client": "client and back",
        }
        parts = []
        for name, direction in latencies.items():
            tail_ns = self.medians_ns[name] + self._beyond_median_ns(name)
            median = format_duration(self.medians_ns[name])
            parts.append(f"{direction} {median} (p95 {format_duration(tail_ns)})")
        return f"{', '.join(parts)}; from {self.actions} live actions"

    def _beyond_median_ns(self, name: str) -> int:
        """How far the 95th percentile lies above the median."""
        spread_ns = self.spreads_ns[name]
        return spread_ns[(len(spread_ns) - 1) * 95 // 100] - spread_ns[(len(spread_ns) - 1) // 2]


def spread_of(values_ns: Sequence[int] | np.ndarray[Any, Any]) -> tuple[int, tuple[int, ...]]:
    """(the least, evenly spaced quantiles of what is above it) of delays, ns.

    The greatest quantile is not the greatest value but one that keeps the mean of the last interval: drawn
    linearly up to a single outlier, that interval would weigh far too much.
    """
    ordered = np.sort(np.maximum(np.asarray(values_ns, dtype=np.float64), 0.0))
    least = float(ordered[0])
    quantiles = np.quantile(ordered, np.linspace(0.0, 1.0, _QUANTILES))
    last = ordered[len(ordered) * (_QUANTILES - 2) // (_QUANTILES - 1) :]
    quantiles[-1] = max(quantiles[-2], 2.0 * float(last.mean()) - quantiles[-2])
    return round(least), tuple(round(q - least) for q in quantiles.tolist())


def measure_delays(run_dir: Path) -> Delays:
    """Measure the latencies of the live run in `run_dir` from its action log and client log.

    To a worker: `worker_action_received` (its clock is brought in line by heartbeats). Back: from the
    end of the exec to `controller_result_enqueue`. The clocks are brought in line as if both latencies were
    equal, so that only their sum is certain. Client: its latency from the real send, less the
    controller's. Raises InvalidConfig for a run in which nothing was inferred, MalformedLog for a damaged
    log.
    """
    actions = action_log.read_action_log(run_dir / action_log.FILE_NAME)
    infers = (actions["action_type"] == int(ActionType.INFER)) & (actions["status"] == 0)
    client = client_log.read_client_log(run_dir / client_log.FILE_NAME)
    served = client["code"] == 0
    if not infers.any() or not served.any():
        raise InvalidConfig(f"{run_dir}: no request was served, so there are no delays to measure")
    latencies = {
        "to_worker": actions["worker_action_received"][infers],
        "from_worker": (actions["controller_result_enqueue"] - actions["worker_exec_complete"])[
            infers
        ],
        "client": (
            client["latency_ns"] - client["issue_delay_ns"] - client["controller_latency_ns"]
        )[served],
    }
    found = {name: spread_of(values) for name, values in latencies.items()}
    return Delays(
        to_worker_ns=found["to_worker"][0],
        from_worker_ns=found["from_worker"][0],
        client_round_trip_ns=found["client"][0],
        spreads_ns={name: spread_ns for name, (_, spread_ns) in found.items()},
        medians_ns={name: round(float(np.median(values))) for name, values in latencies.items()},
        actions=int(np.count_nonzero(infers)),
    )


@dataclass(frozen=True)
class StepDifference:
    """One step (and group), live and simulated. `attempt` is the live run that it is from (1: the first).

    `disturbed` says why the machine voids the live side; empty if it counts. `held` is True if the
    tolerance applies to the step.
    """

    live: StepResult
    simulated: StepResult
    attempt: int
    disturbed: tuple[str, ...]
    held: bool

    @property
    def client_points(self) -> float:
        """Simulated less live satisfaction in points of a hundred; client, from the scheduled send."""
        return 100 * (self.simulated.satisfaction - self.live.satisfaction)

    @property
    def controller_points(self) -> float:
        """Simulated less live satisfaction in points; controller, from the arrival there."""
        return 100 * (self.simulated.controller_satisfaction - self.live.controller_satisfaction)

    @property
    def points(self) -> float:
        """The larger of both differences, without its sign."""
        return max(abs(self.client_points), abs(self.controller_points))

    @property
    def goodput_ratio(self) -> float:
        """Simulated over live goodput (client); NaN where the live one is 0."""
        live = self.live.goodput_rps
        return self.simulated.goodput_rps / live if live else math.nan

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts, for JSON. NaN becomes None."""
        ratio = self.goodput_ratio
        return {
            "step": self.live.slo,
            "group": self.live.group,
            "slo_factor": self.live.slo_factor,
            "held": self.held,
            "attempt": self.attempt,
            "disturbed": list(self.disturbed),
            "client_points": self.client_points,
            "controller_points": self.controller_points,
            "goodput_ratio": None if math.isnan(ratio) else ratio,
            "latency_p50_difference_ns": self.simulated.latency_p50_ns - self.live.latency_p50_ns,
            "latency_p99_difference_ns": self.simulated.latency_p99_ns - self.live.latency_p99_ns,
            "live": asdict(self.live),
            "simulated": asdict(self.simulated),
        }


def held_steps(steps: Sequence[Step], *, from_slo: float, b1_ns: int) -> list[bool]:
    """Which of `steps` the tolerance holds: those whose SLO is `from_slo` times the batch-1 time or more.

    1 % less will do, because factors are shown rounded. An SLO that is a duration is divided by `b1_ns`;
    a step that has no SLO of its own is held.
    """
    factors = [step.slo_factor or step.slo_ns / b1_ns for step in steps]
    return [not factor or factor >= 0.99 * from_slo for factor in factors]


def compare(
    live: RunResult,
    simulated: RunResult,
    *,
    attempt: int,
    disturbed: Sequence[tuple[str, ...]],
    held: Sequence[bool],
) -> list[StepDifference]:
    """Lay the two runs side by side. `disturbed` and `held` are by step index.

    Raises InvalidConfig if the runs do not have the same steps.
    """
    theirs = {(step.index, step.group): step for step in simulated.steps}
    if sorted(theirs) != sorted((step.index, step.group) for step in live.steps):
        raise InvalidConfig(
            f"the live run has {len(live.steps)} steps with requests and the simulated one "
            f"{len(theirs)}: these are not two runs of one spec"
        )
    return [
        StepDifference(
            live=step,
            simulated=theirs[step.index, step.group],
            attempt=attempt,
            disturbed=disturbed[step.index],
            held=held[step.index],
        )
        for step in live.steps
    ]


HEADINGS = (
    "step",
    "sent",
    "in time live",
    "simulated",
    "points",
    "met live",
    "simulated",
    "points",
    "goodput",
    "p50 live",
    "simulated",
    "p99 live",
    "simulated",
    "try",
    "held",
    "machine",
)


def row(difference: StepDifference) -> list[str]:
    """A table's row under `HEADINGS`. "goodput" is simulated over live."""
    live, simulated = difference.live, difference.simulated
    ratio = difference.goodput_ratio
    return [
        f"{live.slo} {live.group}".rstrip(),
        str(live.sent) if live.sent == simulated.sent else f"{live.sent}/{simulated.sent}",
        format_share(live.satisfaction),
        format_share(simulated.satisfaction),
        f"{difference.client_points:+.2f}",
        format_share(live.controller_satisfaction),
        format_share(simulated.controller_satisfaction),
        f"{difference.controller_points:+.2f}",
        "-" if math.isnan(ratio) else f"{ratio:.3f}",
        *(
            format_duration(value) if value else "-"
            for value in (
                live.latency_p50_ns,
                simulated.latency_p50_ns,
                live.claimed_p99_ns,
                simulated.claimed_p99_ns,
            )
        ),
        str(difference.attempt),
        "yes" if difference.held else "",
        "; ".join(difference.disturbed),
    ]


# ---------------------------------------------------------------------------------- the figure


def plot_validation(differences: Sequence[StepDifference], out: Path, *, title: str) -> list[Path]:
    """Draw live and simulated satisfaction, goodput and latency into `out`, as PNG and PDF.

    Raises InvalidConfig if there is nothing to draw, MissingPackage without matplotlib.
    """
    if not differences:
        raise InvalidConfig("nothing to draw: the runs have no steps")
    from slosched.analysis import style

    factors = all(d.live.slo_factor > 0 for d in differences)
    groups = sorted({d.live.group for d in differences})
    with style.look():
        figure = style.Figure(figsize=(10.0, 3.6), layout="constrained")
        axes = figure.subplots(1, 3)
        for place, group in enumerate(groups):
            chosen = [d for d in differences if d.live.group == group]
            _draw(axes, chosen, group, style.COLOURS[2 * place % len(style.COLOURS)], factors)
        for ax, heading in zip(
            axes, ("in time (client)", "goodput (requests/s)", "latency p50, p99 (ms)"), strict=True
        ):
            ax.set_title(heading)
            ax.set_xlabel("SLO multiplier (times b1)" if factors else "step")
            if factors:
                _scale_x(ax, sorted({d.live.slo_factor for d in differences}))
        axes[0].legend(loc="lower right")
        figure.suptitle(title, fontsize=9)
        return style.save(figure, out, "validate")


def _scale_x(ax: Any, factors: Sequence[float]) -> None:
    from slosched.analysis.style import FixedLocator, FuncFormatter, NullLocator

    ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator(factors[:: math.ceil(len(factors) / 7)]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


def _draw(
    axes: Any, differences: Sequence[StepDifference], group: str, colour: str, factors: bool
) -> None:
    x = [d.live.slo_factor if factors else float(d.live.index) for d in differences]
    solid: dict[str, Any] = {"color": colour}
    dashed: dict[str, Any] = {
        "color": "#000000",
        "linestyle": "--",
        "marker": "x",
        "linewidth": 1.2,
        "zorder": 4,
    }
    for name, look in (("live", solid), ("simulated", dashed)):
        steps: list[StepResult] = [getattr(d, name) for d in differences]
        p50, p99 = (
            [getattr(step, field) / NS_PER_MS or math.nan for step in steps]
            for field in ("latency_p50_ns", "latency_p99_ns")
        )
        shares, goodputs = [s.satisfaction for s in steps], [s.goodput_rps for s in steps]
        for ax, values in zip((*axes, axes[2]), (shares, goodputs, p50, p99), strict=True):
            ax.plot(x, values, label=f"{group} {name}".lstrip(), **look)
            if name == "live":
                _mark(ax, x, values, differences, colour)


def _mark(
    ax: Any,
    x: Sequence[float],
    y: Sequence[float],
    differences: Sequence[StepDifference],
    colour: str,
) -> None:
    """Put the live side's marks: filled, and hollow where the machine disturbed the step."""
    for hollow in (False, True):
        places = [place for place, d in enumerate(differences) if bool(d.disturbed) is hollow]
        ax.plot(
            [x[place] for place in places],
            [y[place] for place in places],
            marker="o",
            linestyle="",
            markerfacecolor="white" if hollow else colour,
            markeredgecolor=colour,
        )
