"""Random graphs of calls: functions, what they do, who calls them, and what a graph must come to.

A function asks only for functions behind it, so every graph ends. The choices come from a generator that the
caller gives: that of a seed (fuzz_calls.py), or hypothesis', which makes a failing graph small.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from random import Random

import msgspec

from slosched.codes import Code
from slosched.config import EmulationNoise, GpuProfile, ModelProfile
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
    TakeBack,
)
from slosched.messages import FunctionInfo
from slosched.sim.calls import CallArrival, CallSpec
from slosched.sim.faults import FaultPlan
from slosched.sim.hosts import HostPlan
from slosched.sim.network import Network
from slosched.units import NS_PER_MS, NS_PER_S, NS_PER_US

#: A graph with more calls than this loses arrivals until it fits.
MOST_CALLS_OF_A_CASE = 400
#: No graph of a case without faults takes this long, unless it does not go on at all.
LONG_NS = 600 * NS_PER_S
#: What may befall workers and the controller (faults.py). The caller goes on.
_KINDS = (
    "crash",
    "leave",
    "restart",
    "drain",
    "intrude",
    "jump",
    "pause",
    "slow",
    "raise",
    "end",
    "spoil",
    "partition",
    "hold",
    "lose",
    "late",
    "twice",
)
_FAULTS_NS = 2 * NS_PER_S


class Graph:
    """What the scripts of `functions` come to when nothing disturbs them."""

    def __init__(self, functions: tuple[EmulatedFunction, ...]) -> None:
        self.functions = {each.name: each for each in functions}
        self._known: dict[tuple[str, int], tuple[int, int, int, int]] = {}

    def calls(self, name: str, number: int) -> int:
        """How many calls the script makes, itself and all below it."""
        return self._of(name, number)[0]

    def all_calls(self, arrivals: Iterable[CallArrival]) -> int:
        """How many calls `arrivals` make; inferences are none."""
        known = [each for each in arrivals if each.function in self.functions]
        return sum(self.calls(each.function, each.number) for each in known)

    def run_ns(self, name: str, number: int) -> int:
        """How long they run in all."""
        return self._of(name, number)[1]

    def code(self, name: str, number: int) -> int:
        """The code with which it ends."""
        return self._of(name, number)[2]

    def depth(self, name: str, number: int) -> int:
        return self._of(name, number)[3]

    def _of(self, name: str, number: int) -> tuple[int, int, int, int]:
        key = name, number
        if key not in self._known:
            self._known[key] = self._found(self.functions[name].scripts[number])
        return self._known[key]

    def _found(self, script: Script) -> tuple[int, int, int, int]:
        calls, run_ns, depth = 1, script.host_ns, 1
        children: list[int] = []
        for step in script.steps:
            if isinstance(step, Run):
                run_ns += step.ns
            elif isinstance(step, Chain):
                for turn in range(step.n):
                    number = step.numbers[turn % len(step.numbers)]
                    more, ns, code, below = self._of(step.function, number)
                    calls, run_ns, depth = calls + more, run_ns + ns, max(depth, below + 1)
                    children.append(code)
            elif isinstance(step, AwaitAll):
                awaited = [children[c] for c in step.children] if step.children else children
                if any(awaited) and not step.catch:
                    return calls, run_ns, Code.CALL_RAISED, depth
            elif isinstance(step, Raise):
                return calls, run_ns, Code.CALL_RAISED, depth
            elif isinstance(step, Exit):
                return calls, run_ns, Code.MODEL_PROCESS_ENDED, depth
        return calls, run_ns, Code.OK, depth


#: Small GPUs, whose models hold each other's place.
_PROFILE = GpuProfile(
    "small",
    {
        name: ModelProfile(
            name=name,
            exec_ns={1: ns, 2: 2 * ns},
            weights_ns=4 * NS_PER_MS,
            weights_bytes=3,
            input_shape=(1,),
            output_shape=(1,),
        )
        for name, ns in (("net", 2 * NS_PER_MS), ("other", 5 * NS_PER_MS))
    },
    weights_cache_bytes=5,
    page_bytes=1,
)


class DrawnCalls:
    """The parts of one case, drawn by `draw`.

    A `calm` case has no faults, no call that is taken back, deadlines that nothing misses, and limits that
    nothing reaches; every call awaits its children before it ends, and none is idempotent. So it is known how
    each call ends.
    """

    def __init__(self, draw: Random, *, calm: bool) -> None:
        self._draw, self._calm = draw, calm
        self._gpus = draw.choice((0, 0, 1, 2))

    @cached_property
    def functions(self) -> tuple[EmulatedFunction, ...]:
        names = [f"f{place}" for place in range(self._draw.randint(1, 5))]
        return tuple(self._function(name, names[i + 1 :]) for i, name in enumerate(names))

    def _function(self, name: str, behind: list[str]) -> EmulatedFunction:
        draw = self._draw
        scripts = tuple(self._script(behind) for _ in range(draw.randint(1, 2)))
        longest_ns = max(script.run_ns for script in scripts)
        info = FunctionInfo(
            gpu=self._gpus > 0 and draw.random() < 0.4,
            slo_ns=LONG_NS if self._calm else draw.choice((20 * NS_PER_MS, NS_PER_S, 5 * NS_PER_S)),
            limit_ns=0 if self._calm or draw.random() < 0.7 else max(1, longest_ns // 2),
            idempotent=not self._calm and draw.random() < 0.2,
        )
        if info.gpu and draw.random() < 0.5:
            said_ns = draw.choice((10 * NS_PER_US, 10 * NS_PER_MS))
            info = msgspec.structs.replace(info, prepare_ns=said_ns)
            hosts_ns = (0, 100 * NS_PER_US, 8 * NS_PER_MS)
            scripts = tuple(replace(each, host_ns=draw.choice(hosts_ns)) for each in scripts)
        return EmulatedFunction(
            name=name,
            scripts=scripts,
            info=info,
            memory_bytes=draw.choice((0, 1)),
            cold_ns=draw.choice((NS_PER_MS, 30 * NS_PER_MS)),
            expected_ns=max(1, round(longest_ns * draw.choice((0.5, 1.0, 3.0)))),
        )

    def _script(self, behind: list[str]) -> Script:
        draw = self._draw
        steps: list[Step] = []
        asked = 0
        for _ in range(draw.randint(0, 5)):
            what = draw.choice(("run", "run", "chain", "chain", "await"))
            if what == "run":
                steps.append(Run(draw.choice((0, 10 * NS_PER_US, NS_PER_MS, 3 * NS_PER_MS))))
            elif what == "chain" and behind:
                chain = self._chain(behind, asked)
                steps.append(chain)
                asked += chain.n
            elif what == "await" and asked:
                steps.append(self._await(asked))
            if not self._calm and asked and draw.random() < 0.1:
                steps.append(TakeBack(draw.randrange(asked)))
        if asked and (self._calm or draw.random() < 0.9):
            steps.append(AwaitAll(catch=draw.random() < 0.5))
        steps += draw.choice(
            ((), (), (Return(0),), (Return(100_000),), (Raise("ValueError: x"),), (Exit(),))
        )
        return Script(tuple(steps))

    def _chain(self, behind: list[str], asked: int) -> Chain:
        draw = self._draw
        return Chain(
            draw.choice(behind),
            draw.choice((1, 1, 2, 3, 8)),
            slo_ns=0 if self._calm else draw.choice((0, 0, 5 * NS_PER_MS, NS_PER_S)),
            in_bytes=draw.choice((1 if self._calm else 0, 64, 64, 100_000)),
            near=draw.choice(("", "", "key")),
            near_child=draw.randrange(asked) if asked and draw.random() < 0.2 else -1,
        )

    def _await(self, asked: int) -> AwaitAll:
        draw = self._draw
        children = tuple(sorted({draw.randrange(asked) for _ in range(draw.randint(1, 3))}))
        some, catch = draw.random() < 0.5, draw.random() < 0.5
        # One that raises takes the children back that it does not await.
        return AwaitAll(children if some and (catch or not self._calm) else (), catch=catch)

    def _hosts(self, calls: int) -> tuple[HostPlan, ...]:
        draw = self._draw
        hosts: list[HostPlan] = []
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            most = calls + 1 if self._calm else draw.choice((calls + 1, 64, 3))
            offered = self.functions
            if hosts and draw.random() < 0.3:  # the first worker has them all
                offered = tuple(each for each in offered if draw.random() < 0.6)
            hosts.append(HostPlan(offered, slots=draw.randint(1, 8), most_calls=most))
        return tuple(hosts)

    def _arrivals(self, graph: Graph) -> tuple[CallArrival, ...]:
        draw = self._draw
        arrivals: list[CallArrival] = []
        left = MOST_CALLS_OF_A_CASE
        at_ns = 0
        for _ in range(draw.choice((1, 2, 5, 20))):
            if self._gpus and draw.random() < 0.3:
                slo_ns = LONG_NS if self._calm else 50 * NS_PER_MS
                name = draw.choice(tuple(_PROFILE.models))
                arrivals.append(CallArrival(at_ns=at_ns, function=name, slo_ns=slo_ns))
                continue
            function = draw.choice(self.functions)
            number = draw.randrange(len(function.scripts))
            left -= graph.calls(function.name, number)
            if left < 0:
                break
            at_ns += draw.choice((0, 0, 50 * NS_PER_US, 5 * NS_PER_MS, 200 * NS_PER_MS))
            arrival = CallArrival(
                at_ns=at_ns,
                function=function.name,
                number=number,
                slo_ns=LONG_NS if self._calm else draw.choice((0, 0, 8 * NS_PER_MS, NS_PER_S)),
                near=draw.choice(("", "key")),
                in_bytes=draw.choice((64, 1000)),
            )
            if not self._calm and draw.random() < 0.15:
                after_ns = draw.choice((0, 500 * NS_PER_US, 3 * NS_PER_MS, 100 * NS_PER_MS))
                arrival = replace(arrival, cancel_after_ns=after_ns)
            arrivals.append(arrival)
        return tuple(arrivals)

    def spec(self, seed: int = 0) -> CallSpec:
        """The case; `seed` is that of its faults and of the network."""
        graph, draw = Graph(self.functions), self._draw
        arrivals = self._arrivals(graph)
        calls = graph.all_calls(arrivals)
        hosts = self._hosts(calls)
        faults = None
        if not self._calm and draw.random() < 0.8:
            devices = [self._gpus + 1] * len(hosts)
            faults = FaultPlan.random(seed, devices, until_ns=_FAULTS_NS, kinds=_KINDS)
            faults = FaultPlan(tuple(f for f in faults.faults if "client" not in f.target), seed)
        return CallSpec(
            hosts=hosts,
            arrivals=arrivals,
            network=Network(jitter_ns=draw.choice((0, 0, 100 * NS_PER_US))),
            seed=seed,
            faults=faults,
            gpus=self._gpus,
            profile=_PROFILE,
            noise=EmulationNoise()
            if self._calm
            else EmulationNoise(exec_sigma=draw.choice((0.0, 0.3))),
            cluster_id=draw.choice(("", "cluster")),
            leave_ns=-1
            if self._calm or draw.random() < 0.8
            else draw.choice((NS_PER_MS, 30 * NS_PER_MS)),
            # Without faults all is over by then, and with them an answer that was lost is missed for this long.
            settle_ns=LONG_NS if self._calm else 100 * NS_PER_S,
        )


def calm_case(draw: Random, seed: int = 0) -> CallSpec:
    """A case of which it is known how each call ends."""
    return DrawnCalls(draw, calm=True).spec(seed)


def hard_case(draw: Random, seed: int = 0) -> CallSpec:
    """A case with faults, cancels, deadlines that are missed and limits that are reached."""
    return DrawnCalls(draw, calm=False).spec(seed)
