"""`slosched fuzz`: random clusters under random faults, and what must hold then."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import partial
from multiprocessing import get_context
from typing import TYPE_CHECKING, Annotated

import typer

from slosched.cli.output import beside, say
from slosched.clock import now_ns
from slosched.errors import InvalidConfig, UnknownName
from slosched.units import NS_PER_S, format_share

if TYPE_CHECKING:
    from slosched.sim.fuzz import Outcome
    from slosched.sim.fuzz_calls import CallsOutcome

_Seeds = Annotated[int, typer.Option(min=1, help="Number of seeds, from --first upwards.")]
_First = Annotated[int, typer.Option(min=0, help="The first seed.")]
_Jobs = Annotated[int, typer.Option(min=1, help="Processes.")]
_Policy = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE", help="This scheduler for every seed, such as FIFO or INFER5:paper."
    ),
]
_Calls = Annotated[
    bool, typer.Option("--calls", help="Graphs of calls of functions instead of inferences.")
]
_Verbose = Annotated[
    bool, typer.Option("--verbose", help="Print each seed's cluster, faults and events.")
]

_SHOWN_EVERY_NS = 5 * NS_PER_S
_WAIT_S = 1.0
#: Number of failures after which the rest is not run: they rarely differ.
_MOST_FAILURES = 5


def fuzz(
    *,
    seeds: _Seeds = 200,
    first: _First = 0,
    jobs: _Jobs = 1,
    policy: _Policy = None,
    calls: _Calls = False,
    verbose: _Verbose = False,
) -> None:
    """Inject random faults into simulated clusters, and check every promise of the scheduler.

    Each seed draws a small cluster (1 to 4 workers, models that may not fit), a scheduler, a load and
    a plan of faults: crashes, restarts, pauses, slow GPUs, clock jumps, partitions, and messages that are
    lost, late or doubled. At every step nothing may be answered twice, overlap on a GPU, start outside
    its window or need memory that is not there, by the books and by what the workers really do. After the
    faults everything must work again as if they had not been. docs/faults.md has the whole list.

    With --calls each seed draws functions that call one another, hosts with 1 to 8 slots, and faults of
    both: every call is answered once, no body begins twice, no graph stands still, and nothing is left.

    A seed that fails is reported with its story, the fewest faults that still make it fail, and the
    command that repeats it; the exit code is 1.

    \b
    Examples:
      slosched fuzz --seeds 200 --jobs 2
      slosched fuzz --seeds 1 --first 4711 --verbose
      slosched fuzz --seeds 50 --policy FIFO
      slosched fuzz --seeds 500 --calls
    """
    if calls and policy is not None:
        raise InvalidConfig("--calls has a scheduler of its own (INFER5); leave --policy out")
    _check_policy(policy)
    begun_ns = shown_ns = now_ns()
    done = events = failures = 0
    run = run_calls_one if calls else partial(run_one, policy=policy)
    for outcome in _outcomes(range(first, first + seeds), jobs, run):
        done += 1
        events += outcome.events
        if outcome.failure:
            failures += 1
            _tell_failure(outcome, policy)
        elif verbose:
            _tell(outcome)
        if now_ns() - shown_ns >= _SHOWN_EVERY_NS:
            shown_ns = now_ns()
            beside(f"fuzz: {done}/{seeds} seeds, {failures} failed")
        if failures >= _MOST_FAILURES:
            break
    rest = f"; {seeds - done} not run" if done < seeds else ""
    say(
        f"{done} seeds from {first} on, {events} events in {(now_ns() - begun_ns) / NS_PER_S:.1f} s: "
        f"{failures or 'none'} failed{rest}"
    )
    raise typer.Exit(1 if failures else 0)


def _check_policy(policy: str | None) -> None:
    from slosched.core.scheduler.policies import (
        CASCADE_POLICIES,
        POLICIES,
        policy_class,
        type_and_fidelity,
    )
    from slosched.sim.fuzz_case import TYPES

    if policy is None or policy in TYPES:
        return
    type_, fidelity = type_and_fidelity(policy)
    if type_ in POLICIES:
        raise UnknownName("TYPE that can be fuzzed", policy, [*TYPES, *CASCADE_POLICIES])
    policy_class(type_, fidelity or "best")  # raises UnknownName, ExtensionError


def _outcomes(
    seeds: range, jobs: int, run: Callable[[int], Outcome | CallsOutcome]
) -> Iterator[Outcome | CallsOutcome]:
    """The outcome of every seed, as they come; one that failed is shrunk."""
    if jobs == 1 or len(seeds) == 1:
        for seed in seeds:
            yield run(seed)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), _worker_starts, (os.getpid(),)) as pool:
        waiting = iter(seeds)
        running: set[Future[Outcome | CallsOutcome]] = set()
        try:
            while True:
                # Few are handed out ahead, so that the last ones are not left to one process.
                for seed in waiting:
                    running.add(pool.submit(run, seed))
                    if len(running) >= 2 * jobs:
                        break
                if not running:
                    return
                finished, running = wait(running, _WAIT_S, FIRST_COMPLETED)
                yield from sorted((f.result() for f in finished), key=lambda o: o.seed)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _worker_starts(parent: int) -> None:
    """In each process: the parent hears Ctrl-C, and ends us."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.getppid() != parent:
        raise InvalidConfig("the command that started this process is gone")


def run_one(seed: int, policy: str | None) -> Outcome:
    """One seed; if it fails, with as few faults as make it fail. In any process."""
    from slosched.sim.fuzz import run_seed, shrink

    outcome = run_seed(seed, policy=policy)
    return shrink(outcome) if outcome.failure else outcome


def run_calls_one(seed: int) -> CallsOutcome:
    """One seed of --calls; if it fails, as small as it gets. In any process."""
    from slosched.sim.fuzz_calls import run_calls_seed, shrink_calls

    outcome = run_calls_seed(seed)
    return shrink_calls(outcome) if outcome.failure else outcome


def command(seed: int, policy: str | None) -> str:
    """What runs that seed again, in words for a shell."""
    with_policy = f" --policy {policy}" if policy else ""
    return f"slosched fuzz --seeds 1 --first {seed}{with_policy} --verbose"


def _tell_failure(outcome: Outcome | CallsOutcome, policy: str | None) -> None:
    say(f"seed {outcome.seed} FAILED: {outcome.failure}")
    _tell(outcome)
    again = getattr(outcome, "command", "") or command(outcome.seed, policy)
    say(f"again: {again}\n")


def _tell(outcome: Outcome | CallsOutcome) -> None:
    from slosched.sim.fuzz_calls import CallsOutcome

    if isinstance(outcome, CallsOutcome):
        say(outcome.text())
        return
    spec = outcome.spec
    config, faults = spec.scheduler, spec.faults
    fidelity = ":paper" if config.fidelity == "paper" else ""
    workers = [len(each) for each in spec.worker_profiles()]
    say(
        f"seed {outcome.seed}: {config.policy}{fidelity}, workers with {workers} GPUs of "
        f"{spec.profiles[0].pages} pages; {spec.workload.describe()}"
    )
    if faults is not None:
        say(faults.text())
    for line in outcome.log:
        say(f"  {line}")
    say(
        f"  {outcome.sent} requests; after the recovery {format_share(outcome.tail, 1)} were in time"
    )
