"""Random graphs of calls of functions under random faults: what must hold while they last, and in the end.

Every call of a client is answered once. No body begins twice, unless its function is idempotent. No more calls
run than there are slots, and no more are unfinished than the worker allows. No result reaches another call. In
the end nothing of any call is kept: no process, no frame, no request. All invariants of the scheduler hold at
every step.

Every second case is calm: nothing disturbs it, so it is known how each of its calls ends, how many bodies run,
and how long it takes at most. A graph that stands still, each call waiting for another's slot, would be seen
there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from slosched.core.invariants import InvariantViolated
from slosched.errors import SloschedError
from slosched.sim.calls import CallOutcome, CallSimulation, CallSpec, codes
from slosched.sim.calls_case import Graph, calm_case, hard_case
from slosched.sim.faults import FaultPlan
from slosched.units import NS_PER_MS, format_duration

#: What a call may take in a calm case besides what it runs: messages there and back, decisions, a cold start.
_BESIDES_NS = 5 * NS_PER_MS
_COLD_NS = 200 * NS_PER_MS
#: What an inference may take, with a load of its weights.
_INFERENCE_NS = 40 * NS_PER_MS


@dataclass(frozen=True)
class CallsOutcome:
    """What became of one seed. `failure` is empty if all held."""

    seed: int
    spec: CallSpec
    failure: str
    log: tuple[str, ...]
    codes: dict[int, int]
    bodies: int
    events: int

    @property
    def command(self) -> str:
        """What runs the seed again, in words for a shell."""
        return f"slosched fuzz --calls --seeds 1 --first {self.seed} --verbose"

    def text(self) -> str:
        """The case and its story, human-readable."""
        spec = self.spec
        hosts = ", ".join(f"{host.slots} slots (most {host.most_calls})" for host in spec.hosts)
        gpus = f", and {spec.gpus} GPUs each" if spec.gpus else ""
        lines = [f"seed {self.seed}: {len(spec.hosts)} workers with {hosts}{gpus}"]
        for function in spec.hosts[0].functions:
            lines.append(f"  {function.name}: {function.info}")
            lines += [
                f"    {number}: {' '.join(map(str, script.steps))}"
                for number, script in enumerate(function.scripts)
            ]
        lines += [f"  {arrival}" for arrival in spec.arrivals]
        if spec.faults is not None:
            lines.append(spec.faults.text())
        lines += [f"  {line}" for line in self.log]
        lines.append(f"  codes {self.codes}, {self.bodies} bodies")
        return "\n".join(lines)


def is_calm(seed: int) -> bool:
    return seed % 2 == 0


def drawn_calls(seed: int) -> CallSpec:
    """The case of `seed`."""
    draw = Random(f"{seed}/calls")
    return calm_case(draw, seed) if is_calm(seed) else hard_case(draw, seed)


def run_calls_seed(seed: int) -> CallsOutcome:
    """Draw the case of `seed` and run it."""
    return run_calls(seed, drawn_calls(seed), calm=is_calm(seed))


def run_calls(seed: int, spec: CallSpec, *, calm: bool) -> CallsOutcome:
    """Run `spec` and check everything."""
    log: list[str] = []
    failure = ""
    simulation = CallSimulation(spec, log=log.append)
    try:
        outcome = simulation.run()
        if calm:
            check_calm(spec, outcome)
    except (InvariantViolated, SloschedError) as error:
        failure = str(error)
    except (AssertionError, LookupError, ValueError) as error:
        failure = f"{type(error).__name__}{_place(error)}: {error}"
    outcome = simulation.outcome
    return CallsOutcome(
        seed=seed,
        spec=spec,
        failure=failure,
        log=tuple(log),
        codes=codes(outcome),
        bodies=sum(outcome.bodies.values()),
        events=simulation.kernel.events,
    )


def _place(error: BaseException) -> str:
    place, trace = "", error.__traceback__
    while trace is not None:
        place = f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def check_calm(spec: CallSpec, outcome: CallOutcome) -> None:
    """Raise InvariantViolated unless every call of a calm case ended as its script says, and soon."""
    graph = Graph(spec.hosts[0].functions)
    calls, run_ns = graph.all_calls(spec.arrivals), 0
    for answered in outcome.answers:
        arrival = answered.arrival
        if arrival.function in graph.functions:
            run_ns += graph.run_ns(arrival.function, arrival.number)
            wanted = graph.code(arrival.function, arrival.number)
        else:
            run_ns += _INFERENCE_NS
            wanted = 0
        if answered.code != wanted:
            reason = answered.replies[0].reason
            raise InvariantViolated(
                f"a call of {arrival.function!r} ends with code {answered.code} instead of {wanted}: {reason}"
            )
    bodies = sum(outcome.bodies.values())
    if bodies != calls:
        raise InvariantViolated(f"{bodies} bodies ran for {calls} calls")
    if len(outcome.calls) != calls:
        raise InvariantViolated(f"{len(outcome.calls)} records for {calls} calls")
    last_ns = max((arrival.at_ns for arrival in spec.arrivals), default=0)
    most_ns = last_ns + run_ns + calls * _BESIDES_NS + _COLD_NS
    if outcome.end_ns > most_ns:
        raise InvariantViolated(
            f"{calls} calls that run for {format_duration(run_ns)} took {format_duration(outcome.end_ns)}, "
            f"and not {format_duration(most_ns)} at most"
        )


def shrink_calls(outcome: CallsOutcome, *, tries: int = 60) -> CallsOutcome:
    """A failing outcome with as few faults and arrivals as `tries` runs find."""
    best, calm = outcome, is_calm(outcome.seed)
    index = 0
    while tries > 0 and best.spec.faults is not None and index < len(best.spec.faults.faults):
        tries -= 1
        faults: FaultPlan = best.spec.faults.without(index)
        smaller = run_calls(best.seed, replace(best.spec, faults=faults), calm=calm)
        best, index = (smaller, index) if smaller.failure else (best, index + 1)
    index = 0
    while tries > 0 and index < len(best.spec.arrivals):
        tries -= 1
        arrivals = (*best.spec.arrivals[:index], *best.spec.arrivals[index + 1 :])
        smaller = run_calls(best.seed, replace(best.spec, arrivals=arrivals), calm=calm)
        best, index = (smaller, index) if smaller.failure else (best, index + 1)
    return best
