"""A recorded graph of calls as scripts, so that the simulator runs the same graph on other slots and networks.

Each call has a script of its own: what it ran until it asked for each child, what it awaited, how it ended. A
call that did not begin, or was ended from outside, runs as long as its function's calls do at the median. Not
recorded, and so left out: when a call took a child back, and an await of children that were all answered by
then, in whose place the call awaits them before it returns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from statistics import fmean, median_low

from slosched.codes import Code
from slosched.config import PAGE_BYTES
from slosched.core.worker.calls import MOST_CALLS
from slosched.core.worker.emulated_calls import (
    AwaitAll,
    Chain,
    EmulatedFunction,
    Exit,
    Raise,
    Return,
    Run,
    Script,
    Step,
)
from slosched.errors import InvalidConfig
from slosched.messages import FunctionInfo
from slosched.sim.calls import CallArrival, CallSpec
from slosched.sim.hosts import HostPlan
from slosched.sim.network import Network
from slosched.telemetry.call_graph import CallGraph, RecordedCall
from slosched.units import NS_PER_MS, NS_PER_S

#: Deadlines that differ by no more than this are one: the child has its parent's.
_SAME_NS = 1_000
#: How long a function runs, and is loaded, of which no run or load is known.
_UNKNOWN_NS = NS_PER_MS
#: All calls are answered this much later than one slot would need for them.
_SETTLE_NS = 60 * NS_PER_S


@dataclass(frozen=True, kw_only=True)
class RecordedRoot:
    """A client's call: when it arrived after the first one, and the number of the script that it follows."""

    at_ns: int
    function: str
    number: int
    slo_ns: int
    size_class: int
    in_bytes: int
    near: str
    code: int  # as it ended


@dataclass(frozen=True)
class RecordedCalls:
    """What a simulation needs: `calls` scripts in all. `roots` are in the order of their arrival.

    `orphans` are left out, with what is below them: their parents have no row.
    """

    functions: tuple[EmulatedFunction, ...]
    roots: tuple[RecordedRoot, ...]
    calls: int
    orphans: int

    @property
    def for_gpus(self) -> bool:
        """True if a function runs on GPUs."""
        return any(each.info.gpu for each in self.functions)

    @property
    def run_ns(self) -> int:
        """How long all calls run, one after the other."""
        return sum(script.run_ns for each in self.functions for script in each.scripts)


def recorded_calls(
    graph: CallGraph,
    *,
    loads_ns: Mapping[int, Sequence[int]] | None = None,
) -> RecordedCalls:
    """Return the graph as scripts.

    `loads_ns` are the durations of loads by model id. Raises InvalidConfig for a graph without the call of a
    client.
    """
    roots = [root for root in graph.roots if not root.orphan]
    if not roots:
        raise InvalidConfig(
            "no call of a client has ended in this run; there is nothing to simulate"
        )
    calls = [call for root in roots for call in graph.below(root)]
    numbers, counts = dict[int, int](), Counter[str]()
    for call in calls:
        numbers[call.call_id] = counts[call.function]
        counts[call.function] += 1
    by_function: dict[str, list[RecordedCall]] = {}
    for call in calls:
        by_function.setdefault(call.function, []).append(call)
    functions = tuple(
        _function(name, of_it, numbers, loads_ns or {}) for name, of_it in by_function.items()
    )
    first_ns = min(root.arrival_ns for root in roots)
    return RecordedCalls(
        functions,
        tuple(
            RecordedRoot(
                at_ns=root.arrival_ns - first_ns,
                function=root.function,
                number=numbers[root.call_id],
                slo_ns=root.slo_ns,
                size_class=root.size_class,
                in_bytes=max(1, root.in_bytes),
                near=root.near,
                code=root.code,
            )
            for root in sorted(roots, key=lambda root: (root.arrival_ns, root.call_id))
        ),
        len(calls),
        len(graph.roots) - len(roots),
    )


def replay_spec(
    recorded: RecordedCalls,
    *,
    workers: int,
    slots: int,
    gpus: int | None = None,
    most_calls: int = MOST_CALLS,
    slo_ns: int | None = None,
    seed: int = 0,
    network: Network | None = None,
) -> CallSpec:
    """A run of the recorded calls on `workers` hosts with `slots` each; clients send when they did.

    Each worker has `gpus` GPUs for the functions that need one (None: one, if there are such functions).
    With `slo_ns` each client's call has that one and its children inherit it, instead of the recorded ones.
    Raises InvalidConfig for what cannot be.
    """
    functions = recorded.functions
    if slo_ns is not None:
        functions = tuple(_without_slos(function) for function in functions)
    pages = sum(-(-each.memory_bytes // PAGE_BYTES) for each in functions)
    host = HostPlan(functions, slots=slots, most_calls=most_calls, pages=max(1024, pages))
    return CallSpec(
        hosts=(host,) * workers,
        arrivals=tuple(
            CallArrival(
                at_ns=root.at_ns,
                function=root.function,
                slo_ns=root.slo_ns if slo_ns is None else slo_ns,
                number=root.number,
                size_class=root.size_class,
                near=root.near,
                in_bytes=root.in_bytes,
            )
            for root in recorded.roots
        ),
        gpus=int(recorded.for_gpus) if gpus is None else gpus,
        network=network or Network(),
        seed=seed,
        check=False,
        settle_ns=recorded.run_ns + _SETTLE_NS,
    )


def _without_slos(function: EmulatedFunction) -> EmulatedFunction:
    """Its calls ask for children whose deadlines are theirs."""
    scripts = tuple(
        Script(
            tuple(
                replace(step, slo_ns=0) if isinstance(step, Chain) else step
                for step in script.steps
            )
        )
        for script in function.scripts
    )
    return replace(function, scripts=scripts)


def _function(
    name: str,
    calls: Sequence[RecordedCall],
    numbers: Mapping[int, int],
    loads_ns: Mapping[int, Sequence[int]],
) -> EmulatedFunction:
    ran = [call.exec_ns for call in calls if call.code == 0 and call.start_ns is not None]
    usual_ns = median_low(ran) if ran else _UNKNOWN_NS
    loads = [
        ns for model_id in {call.model_id for call in calls} for ns in loads_ns.get(model_id, ())
    ]
    classes = 1 + max(call.size_class for call in calls)
    return EmulatedFunction(
        name=name,
        scripts=tuple(script_of(call, numbers, usual_ns) for call in calls),
        info=FunctionInfo(gpu=any(call.on_gpu for call in calls), size_classes=classes),
        cold_ns=round(fmean(loads)) if loads else _UNKNOWN_NS,
        expected_ns=max(1, usual_ns),
    )


def script_of(call: RecordedCall, numbers: Mapping[int, int], usual_ns: int) -> Script:
    """What `call` did. `numbers` are those of its children's scripts, by call id.

    One that was ended from outside runs for `usual_ns` at least. A child whose row is lost is left out, and the
    next ones have lower numbers.
    """
    places = {number: place for place, number in enumerate(sorted(call.children))}
    steps: list[Step] = []
    awaited: set[int] = set()
    ran_ns = 0
    for part, asked in zip(call.parts, call.asked_in_parts(), strict=True):
        ends_ns = ran_ns + part.ran_ns
        for at_ns, together in groupby(asked, key=lambda child: child.asked_ns):
            at_ns = min(max(at_ns, ran_ns), ends_ns)
            steps += _run(at_ns - ran_ns)
            steps += _chains(call, list(together), numbers, places)
            ran_ns = at_ns
        steps += _run(ends_ns - ran_ns)
        ran_ns = ends_ns
        known = [number for number in part.awaited() if number in call.children]
        if known:
            awaited.update(known)
            children = tuple(places[number] for number in known)
            steps.append(AwaitAll(children, catch=_caught(call, known)))
    if not call.parts:
        # A call whose only part is not known asked for its children at some time of it.
        for child in (call.children[n] for n in sorted(call.children)):
            steps += _run(max(0, child.asked_ns - ran_ns))
            steps += _chains(call, [child], numbers, places)
            ran_ns = max(ran_ns, child.asked_ns)
    steps += _end(call, places, awaited, ran_ns, usual_ns)
    return Script(tuple(steps))


def _run(ns: int) -> Iterator[Run]:
    if ns > 0:
        yield Run(ns)


def _chains(
    call: RecordedCall,
    children: Iterable[RecordedCall],
    numbers: Mapping[int, int],
    places: Mapping[int, int],
) -> Iterator[Chain]:
    """Steps for children that were asked for at one time; those that are alike are one step."""
    for (function, slo_ns, size_class, in_bytes, near, near_child), alike in groupby(
        children,
        key=lambda c: (
            c.function,
            _own_slo_ns(call, c),
            c.size_class,
            max(1, c.in_bytes),  # the arguments say which script it follows
            c.near,
            places.get(c.near_child, -1),
        ),
    ):
        scripts = tuple(numbers[child.call_id] for child in alike)
        yield Chain(
            function,
            len(scripts),
            slo_ns=slo_ns,
            size_class=size_class,
            numbers=scripts,
            in_bytes=in_bytes,
            near=near,
            near_child=near_child,
        )


def _own_slo_ns(parent: RecordedCall, child: RecordedCall) -> int:
    """0 for a child that had its parent's deadline, which it then has in another run, too."""
    due_ns = child.arrival_ns + child.slo_ns
    inherited = abs(parent.arrival_ns + parent.slo_ns - due_ns) <= _SAME_NS
    return 0 if inherited else child.slo_ns


def _caught(call: RecordedCall, awaited: Iterable[int]) -> bool:
    """True if one of the children failed, and the call went on all the same."""
    failed = any(call.children[number].code != 0 for number in awaited)
    return failed and call.code != Code.CALL_RAISED


def _end(
    call: RecordedCall,
    places: Mapping[int, int],
    awaited: set[int],
    ran_ns: int,
    usual_ns: int,
) -> Iterator[Step]:
    """The last steps of a call that has run for `ran_ns` so far."""
    if call.code == 0:
        yield from _run(call.exec_ns - ran_ns)
        late = [
            place
            for number, place in places.items()
            if number not in awaited and call.children[number].code == 0
        ]
        if late:
            yield AwaitAll(tuple(late), catch=True)
        yield Return(call.out_bytes)
        return
    if call.code == Code.CALL_RAISED:
        yield from _run(call.exec_ns - ran_ns)
        yield Raise("as recorded")
        return
    if call.code == Code.MODEL_PROCESS_ENDED:
        yield from _run(max(call.exec_ns, usual_ns) - ran_ns)
        yield Exit()
        return
    yield from _run(max(call.exec_ns, usual_ns) - ran_ns)
    yield Return(call.out_bytes)
