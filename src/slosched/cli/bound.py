"""`slosched bound`: how good any scheduler could be at a workload."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slosched.cli.ask import Json
from slosched.cli.output import print_json, say, table_text, warn
from slosched.cli.sim_options import SimOptions, changed, takes_sim_options
from slosched.cli.values import duration_ns
from slosched.cli.workload import announce_trace, workload_of
from slosched.errors import InvalidConfig, UnknownName
from slosched.units import NS_PER_S, format_duration

if TYPE_CHECKING:
    from collections.abc import Sequence

    from slosched.bound.bounds import CellBounds, Effort
    from slosched.bound.problem import CellProblem, Cluster
    from slosched.sim.spec import SimSpec

_PLAIN_EVERY_S = 5.0

#: Options under which the bounds would not hold, and why.
_REFUSED = {
    "inputs": "bounds are for requests without inputs; leave out --inputs",
    "faults": "bounds are for clusters that work; leave out --faults",
    "exec_sigma": "exec times must be known; leave out --exec-sigma",
    "exec_like": "exec times must be known; leave out --exec-like",
}
#: Options that make a scheduler's life harder, and which the bounds leave out.
_IGNORED = (
    "jitter",
    "bandwidth",
    "stall",
    "pcie",
    "clock_offset",
    "clock_drift",
    "fidelity",
    "schedule_ahead",
    "weights_cache",
)

_Workload = Annotated[
    list[str],
    typer.Argument(
        metavar="WORKLOAD [VALUE]...",
        help="As `slosched client` takes it, open loops only; or a file.toml that describes it.",
    ),
]
_Seed = Annotated[int, typer.Option(min=0, help="Chooses the arrivals, as the client's.")]
_Duration = Annotated[
    str | None,
    typer.Option(
        help="End the sending after this much time (60s; a bare number is in seconds). Needed for a "
        "workload that never ends."
    ),
]
_Span = Annotated[str, typer.Option(help="Requests sent in this first part of each step count.")]
_Windows = Annotated[
    int,
    typer.Option(min=0, help="Windows of each step's span for the linear programme; 0: none."),
]
_Length = Annotated[
    str,
    typer.Option(
        "--window-length",
        help="Length of a window. Longer: tighter, but disproportionately slower.",
    ),
]
_Grid = Annotated[
    str,
    typer.Option(
        help="The linear programme's slots. Coarser: faster, looser; exec times should be multiples."
    ),
]
_Judge = Annotated[
    str,
    typer.Option(
        metavar="client|controller",
        help="Whose deadline: the client's, from the scheduled send to the answer there, or the "
        "controller's, from the arrival there, which is what a scheduler knows.",
    ),
]
_Width = Annotated[
    int,
    typer.Option(min=1, help="Schedules kept in the search for one. More: better, and slower."),
]


@takes_sim_options
def bound(
    words: _Workload,
    *,
    sim: SimOptions,
    seed: _Seed = 0,
    duration: _Duration = None,
    span: _Span = "2s",
    windows: _Windows = 3,
    window_length: _Length = "200ms",
    grid: _Grid = "100us",
    width: _Width = 24,
    judge: _Judge = "client",
    json: Json = False,
) -> None:
    """Say how many requests in time any scheduler could reach, for each step of a workload.

    This scheduler knows every arrival beforehand, finds all weights loaded, and pays nothing but
    exec times and the latencies to the GPU and back (--latency). The table has, as shares of the requests:

    \b
    capacity     an upper bound: every batch as full and as cheap as it can ever be
    upper bound  an upper bound by a linear programme, on a sample of windows
    achievable   a schedule that there is: it knew the future, and a scheduler does not
    loose by     how far the truth can be above that schedule, in points
    One GPU with one model and one SLO is solved exactly: then upper bound and achievable are the optimum.

    `slosched compare --bound` holds schedulers against these. docs/bounds.md says more. Needs
    slosched[bound].

    \b
    Examples:
      slosched bound slo-exp-1 resnet50_v2 12 poisson 2400 2.25 3.375 1.5 mul 2 --profile fig7
      slosched bound workloads/gamma.toml --gpus 2 --span 1s --windows 5 --window-length 100ms
      slosched bound slo-exp-1 resnet50_v2 1 poisson 300 10ms 40ms 2 mul 30 --gpus 1 --span 30s
      slosched bound workloads/fig7-quick.toml --profile v100:4,fig7:2 --json
    """
    from slosched.bound.problem import cells_of

    workload = workload_of(words)
    spec = sim.spec("INFER5", workload, seed=seed, duration=duration)
    cluster = cluster_of(spec, sim, judge)
    effort = _effort(span, windows, window_length, grid, width)
    if not json:
        say(
            f"{workload.describe()}; any scheduler on {spec.gpus} GPU(s) ({sim.profile}), seed {seed}"
        )
    announce_trace(workload)
    cells = cells_of(workload, cluster, seed=seed, duration_ns=spec.duration_ns)
    found = bounds_of(cells, effort)
    if json:
        print_json(document(workload.describe(), cluster, found, sim=sim, seed=seed))
    else:
        say(_table(found))
        for line in _legend(found, judge):
            say(line)
    tell(found, sim)


def cluster_of(spec: SimSpec, sim: SimOptions, judge: str) -> Cluster:
    """The GPUs and latencies of the simulation's options. Raises InvalidConfig if there is no bound for them.

    `judge` says whose deadlines count, "client" or "controller"; for the latter the latency between client
    and controller does not count.
    """
    from slosched.bound.problem import Cluster

    if judge not in ("client", "controller"):
        raise UnknownName("judge", judge, ["client", "controller"])
    for name in changed(sim):
        if name in _REFUSED:
            raise InvalidConfig(f"--{name.replace('_', '-')}: {_REFUSED[name]}")
    network = spec.network
    return Cluster(
        tuple(profile for profiles in spec.worker_profiles() for profile in profiles),
        lead_ns=network.to_worker_ns + (network.from_client_ns if judge == "client" else 0),
        tail_ns=network.from_worker_ns + (network.to_client_ns if judge == "client" else 0),
        default_slo_ns=spec.scheduler.default_slo_ns,
        max_batch=spec.scheduler.max_batch,
        max_exec_ns=spec.scheduler.max_exec_ns,
        preempt=spec.scheduler.preempt,
    )


def _effort(span: str, windows: int, length: str, grid: str, width: int) -> Effort:
    from slosched.bound.bounds import Effort

    return Effort(
        span_ns=duration_ns("--span", span),
        windows=windows,
        window_ns=duration_ns("--window-length", length),
        grid_ns=duration_ns("--grid", grid),
        width=width,
    )


def bounds_of(cells: Sequence[CellProblem], effort: Effort) -> list[CellBounds]:
    """The bounds of every step, with progress on stderr."""
    from slosched.bound.bounds import bound_cell

    with _Display(len(cells)) as display:
        found = []
        for cell in cells:
            found.append(bound_cell(cell, effort, display))
            display.done += 1
    return found


def document(
    workload: str, cluster: Cluster, found: Sequence[CellBounds], *, sim: SimOptions, seed: int
) -> dict[str, Any]:
    """Everything about the bounds, for JSON."""
    return {
        "workload": workload,
        "seed": seed,
        "gpus": {profile.name: count for profile, count in cluster.kinds()},
        "lead_ns": cluster.lead_ns,
        "tail_ns": cluster.tail_ns,
        "options": changed(sim),
        "ignored": _ignored(sim),
        "steps": [each.as_dict() for each in found],
    }


def _ignored(sim: SimOptions) -> list[str]:
    return [f"--{name.replace('_', '-')}" for name in changed(sim) if name in _IGNORED]


def tell(found: Sequence[CellBounds], sim: SimOptions) -> None:
    """Say on stderr what the bounds leave out."""
    ignored = _ignored(sim)
    if ignored:
        warn(f"the bounds leave out {', '.join(ignored)}")
    for note in dict.fromkeys(note for each in found for note in each.notes):
        warn(note)


def _table(found: Sequence[CellBounds]) -> str:
    headings = ["step", "deadline", "requests", "capacity %", "upper bound %", "achievable %"]
    rows = [
        [
            each.slo,
            format_duration(each.slo_ns),
            each.requests,
            f"{100 * each.capacity:.2f}",
            "-" if each.upper is None else f"{100 * each.best_upper:.2f}",
            f"{100 * each.achievable:.2f}",
            "exact" if each.exact else f"{100 * each.looseness:.2f}",
        ]
        for each in found
    ]
    return table_text([*headings, "loose by"], rows)


def _legend(found: Sequence[CellBounds], judge: str) -> list[str]:
    spans = list(dict.fromkeys(each.span_ns for each in found))
    lines = [
        "shares of the requests that are sent in the first "
        f"{', '.join(format_duration(s) for s in spans)} of each step, in time for the {judge}"
    ]
    looked_at = [each for each in found if each.windows and each.upper is not None]
    if looked_at:
        sampled = not all(each.in_every_window for each in looked_at)
        windows = looked_at[0].windows
        how = "estimated from" if sampled else "strict, over all"
        lines.append(
            f"upper bound: {how} {len(windows)} windows of {format_duration(windows[0].length_ns)}"
        )
    return lines


class _Display:
    """Shows on stderr which step is looked at, and how far: a line that is rewritten, or one in 5 s."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._next_ns = 0
        self._wrote = False
        self.done = 0

    def __enter__(self) -> _Display:
        return self

    def __exit__(self, *error: object) -> None:
        if self._wrote and sys.stderr.isatty():
            typer.echo("\r\033[K", err=True, nl=False)

    def __call__(self, what: str, cell: CellProblem, share: float) -> None:
        from slosched.clock import now_ns

        terminal = sys.stderr.isatty()
        if now_ns() < self._next_ns and not (terminal and share == 0):
            return
        every_s = _PLAIN_EVERY_S / 25 if terminal else _PLAIN_EVERY_S
        self._next_ns = now_ns() + round(every_s * NS_PER_S)
        self._wrote = True
        text = f"bounds: step {self.done + 1}/{self._steps} {cell.step.text}  {what} {100 * share:.0f} %"
        typer.echo(f"\r\033[K{text}" if terminal else text, err=True, nl=not terminal)
