"""`slosched client max-rate` and `slosched max-rate`: the highest rate at which an SLO holds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from slosched.cli.ask import Inputs, Json, controller_address
from slosched.cli.output import print_json, say, warn
from slosched.cli.sim_options import SimOptions, takes_sim_options
from slosched.cli.stopping import Stopping, stopped_by_signals
from slosched.cli.values import duration_ns, inputs_enabled
from slosched.errors import InvalidConfig, PeerUnreachable
from slosched.units import NS_PER_MS
from slosched.workloads.values import read_count, read_model, read_slo

if TYPE_CHECKING:
    from slosched.cli.machine import MachineWatch
    from slosched.loadgen.max_rate import MaxRate, Probe, Search, Window
    from slosched.loadgen.results import RunResult
    from slosched.workloads import Workload
    from slosched.workloads.streams import Slo

#: Exit code: no rate met the SLO, or the search was interrupted without a signal.
_FAILED = 1
#: Exit code, as that of `validate`: the machine was disturbed, and not everything is decided.
_DISTURBED = 8
_POLL_S = 0.1
#: A live load's first request is due this long after its run begins, at most.
_SENDING_STARTS_NS = 100 * NS_PER_MS

_Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model's name, for example resnet50_v2.")
]
_Slo = Annotated[
    str, typer.Option(help="A duration (25ms), or a multiple of the model's batch-1 time (5.1).")
]
_Copies = Annotated[
    int, typer.Option(help="Instances of the model, each with its own stream of arrivals.")
]
_Low = Annotated[float, typer.Option(help="The lowest rate, requests/s over all copies.")]
_High = Annotated[float, typer.Option(help="The highest rate.")]
_Resolution = Annotated[float, typer.Option(help="Rates are tried in steps of this.")]
_Window = Annotated[
    str,
    typer.Option(
        help="How long a rate is sent before it is judged; longer where it would be under 2,000 "
        "requests. A bare number is in seconds."
    ),
]
_Repeats = Annotated[
    int, typer.Option(min=0, help="How often a disturbed window of one rate is repeated.")
]
_Seed = Annotated[int, typer.Option(min=0, help="Chooses the arrivals.")]


def max_rate_live(
    ctx: typer.Context,
    model: _Model,
    slo: _Slo,
    copies: _Copies = 1,
    low: _Low = 100.0,
    high: _High = 2000.0,
    resolution: _Resolution = 10.0,
    window: _Window = "10s",
    repeats: _Repeats = 3,
    inputs: Inputs = None,
    seed: _Seed = 0,
    json: Json = False,
) -> None:
    """Find the highest rate at which 99 % of a model's requests are in time, with 99 % confidence.

    Bisects between --low and --high with Poisson arrivals against a running controller. Each rate is
    sent for a second that does not count, then for a window; answers are awaited before the next one.
    An undecided rate gets up to three windows, which are judged together. A window in which this
    machine stalled, or the sends were late (p99 of the issue delay above a hundredth of the SLO, 2 ms at
    least), is repeated, unless the SLO held nevertheless.

    The client judges what is in time, from the scheduled send; a refused request is not in time. Exit
    code 1: not even the lowest rate holds; 8: the next rate above the result was disturbed too often.
    docs/verdicts.md has the rule.

    \b
    Examples:
      slosched client max-rate resnet50_v2 --slo 25ms
      slosched client cluster02:12346 max-rate resnet50_v2 --slo 5.1 --copies 12 --high 6000 --resolution 50
    """
    from slosched.cli.machine import MachineWatch

    search = _search(low, high, resolution, window, repeats)
    asked = _Asked(model, copies, slo)
    address = controller_address(ctx, None)
    with_inputs = inputs_enabled(inputs)
    if not json:
        say(f"{asked.text}, inputs {'on' if with_inputs else 'off'}, seed {seed}, at {address}")
    with stopped_by_signals() as stopping, MachineWatch() as watch:

        def send(workload: Workload, number: int) -> tuple[RunResult, tuple[str, ...]]:
            return _send_live(
                address,
                workload,
                inputs=with_inputs,
                seed=1000 * seed + number,
                stopping=stopping,
                watch=watch,
            )

        found = _found(asked.probe(send), search)
    raise typer.Exit(_report(found, stopping, json=json, cut_short=PeerUnreachable.exit_code))


@takes_sim_options
def max_rate_simulated(
    type_: Annotated[
        str, typer.Argument(metavar="TYPE", help="The scheduler, as `slosched simulate` takes it.")
    ],
    model: _Model,
    slo: _Slo,
    *,
    sim: SimOptions,
    copies: _Copies = 1,
    low: _Low = 100.0,
    high: _High = 2000.0,
    resolution: _Resolution = 10.0,
    window: _Window = "10s",
    seed: _Seed = 0,
    json: Json = False,
) -> None:
    """Find the highest rate at which 99 % of a model's requests are in time, in virtual time.

    What `slosched client max-rate` does live, on a simulated cluster: bisects between --low and --high,
    and judges each rate from up to three windows. Each window is a run of its own.

    \b
    Examples:
      slosched max-rate INFER5 resnet50_v2 --slo 25ms --gpus 1
      slosched max-rate FIFO resnet50_v2 --slo 3.4 --copies 12 --gpus 6 --high 6000 --resolution 50
    """
    from slosched.sim.run import simulate

    search = _search(low, high, resolution, window, 0)
    asked = _Asked(model, copies, slo)
    sim.scheduler(type_)  # what is wrong with the options is said before anything runs
    if not json:
        gpus = f"{sim.gpus} GPU{'s' if sim.gpus > 1 else ''}"
        say(f"{asked.text}; {type_} on {gpus} ({sim.profile}), seed {seed}")
    with stopped_by_signals() as stopping:

        def send(workload: Workload, number: int) -> tuple[RunResult, tuple[str, ...]]:
            spec = sim.spec(type_, workload, seed=1000 * seed + number)
            return simulate(spec, stop=stopping), ()

        found = _found(asked.probe(send), search)
    raise typer.Exit(_report(found, stopping, json=json, cut_short=_FAILED))


# ------------------------------------------------------------------------------------ in common

_Send = Callable[["Workload", int], "tuple[RunResult, tuple[str, ...]]"]


class _Asked:
    """The model whose rate is looked for. Raises InvalidConfig for what cannot be."""

    def __init__(self, model: str, copies: int, slo: str) -> None:
        self._model = read_model("MODEL", model)
        self._copies = read_count("--copies", str(copies))
        self._slo: Slo = read_slo("--slo", slo)
        if self._slo == (0.0, 0):
            raise InvalidConfig("--slo must be above 0: a duration (25ms) or a multiple (5.1)")
        self.text = (
            f"max-rate: {copies} x {model}, poisson, SLO {slo if self._slo[1] else f'{slo}x'}"
        )

    def probe(self, send: _Send) -> Probe:
        """A probe that runs its windows with `send`: a workload and its number to a result and stalls."""
        from slosched.loadgen.max_rate import window_of, window_workload

        def probe(rate: float, length_ns: int, number: int) -> Window:
            workload = window_workload(
                model=self._model,
                copies=self._copies,
                slo=self._slo,
                rate=rate,
                length_ns=length_ns,
            )
            window = window_of(*send(workload, number))
            if window.disturbed:
                warn(f"max-rate: {rate:.6g}/s: a disturbed window: {'; '.join(window.disturbed)}")
            return window

        return probe


def _search(low: float, high: float, resolution: float, window: str, repeats: int) -> Search:
    from slosched.loadgen.max_rate import Search

    window_ns = duration_ns("--window", window)
    return Search(low, high, resolution, window_ns, repeats)


def _found(probe: Probe, search: Search) -> MaxRate:
    from slosched.loadgen.max_rate import find_max_rate

    return find_max_rate(probe, search, on_tried=lambda tried: warn(f"max-rate: {tried.text}"))


def _report(found: MaxRate, stopping: Stopping, *, json: bool, cut_short: int) -> int:
    """Print the answer; return the exit code."""
    from slosched.loadgen.max_rate import End

    if json:
        print_json(found.as_dict())
    else:
        say(found.text)
    if stopping():
        return stopping.exit_code
    return {End.NONE_HOLDS: _FAILED, End.DISTURBED: _DISTURBED, End.STOPPED: cut_short}.get(
        found.end, 0
    )


# ----------------------------------------------------------------------------------------- live


def _send_live(
    address: str,
    workload: Workload,
    *,
    inputs: bool,
    seed: int,
    stopping: Stopping,
    watch: MachineWatch,
) -> tuple[RunResult, tuple[str, ...]]:
    """Run one window; return its result and what disturbed this machine meanwhile."""
    import uvloop

    from slosched.clients.run import run_workload
    from slosched.clock import now_ns
    from slosched.loadgen.max_rate import LEAD_IN_NS

    async def main() -> tuple[RunResult, int]:
        stop = asyncio.Event()

        async def look() -> None:
            while not stopping():
                await asyncio.sleep(_POLL_S)
            stop.set()

        looking = asyncio.ensure_future(look())
        try:
            result = await run_workload(address, workload, inputs=inputs, seed=seed, stop=stop)
            return result, now_ns()
        finally:
            looking.cancel()

    result, ended_ns = uvloop.run(main())
    # Only what counts: before the lead-in is over and after the last send this process may collect garbage.
    begun_ns = ended_ns - result.elapsed_ns
    counted_until_ns = begun_ns + (workload.duration_ns or 0) + _SENDING_STARTS_NS
    disturbance = watch.between(begun_ns + LEAD_IN_NS, min(ended_ns, counted_until_ns))
    # Only standing still counts: the controller and the workers may well be on this machine, and what the
    # host takes in short slices is a part of it.
    return result, replace(disturbance, foreign_cores=0.0, steal_cores=0.0).reasons()
