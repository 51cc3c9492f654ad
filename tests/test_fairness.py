"""What docs/fairness.md promises: weights, shares of clients, and a turn for every model, in virtual time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slosched.codes import ActionType, Code
from slosched.config import GpuProfile, ModelProfile, SchedulerConfig, WeightRule
from slosched.core.scheduler.anti_starvation import (
    LOOKED_AT,
    OTHERS_PER_TURN,
    PATIENCE_NS,
    AntiStarvation,
)
from slosched.core.scheduler.policies.infer5 import Infer5
from slosched.core.scheduler.shares import Shares
from slosched.core.scheduler.state import Client, Instance, Queue, Request
from slosched.sim.harness import CLIENT, Demand, Outcome, Simulation
from slosched.units import NS_PER_MS, NS_PER_S

MS = NS_PER_MS
PAGE = 2**24
NET_MS = 2.0


@dataclass(frozen=True)
class Load:
    """Poisson arrivals of `client` for the instance `index`."""

    rate: float
    slo_ms: float
    index: int = 0
    client: bytes = CLIENT


def profile(times_ms: Sequence[float]) -> GpuProfile:
    """The models m0, m1, ... of these batch-1 times; batching gains as much for each."""
    models = {
        f"m{place}": ModelProfile(
            f"m{place}",
            {b: round(ms * MS * b**0.72) for b in (1, 2, 4, 8)},
            weights_ns=50_000,
            weights_bytes=PAGE,
        )
        for place, ms in enumerate(times_ms)
    }
    return GpuProfile("gpu", models, weights_cache_bytes=1000 * PAGE, page_bytes=PAGE)


@dataclass
class World:
    """A finished run: what became of each load's requests, and the policy as it was at the end."""

    outcome: Outcome
    loads: Sequence[Load]
    by_load: list[list[bool]]  # of each request, in time
    policy: Infer5
    model_ids: list[int]

    def share(self, load: int) -> float:
        """The share of the load's requests that were in time."""
        return sum(self.by_load[load]) / len(self.by_load[load])

    def served(self, load: int) -> int:
        return sum(self.by_load[load])

    def exec_ns(self, index: int) -> list[tuple[int, int]]:
        """(sent, exec time) of the instance's batches, in the order in which they were sent."""
        model_id = self.model_ids[index]
        return sorted(
            (a.sent_ns, a.expected_duration_ns)
            for a in self.outcome.actions
            if a.model_id == model_id and a.action_type == ActionType.INFER
        )


def run(
    loads: Sequence[Load],
    *,
    times_ms: Sequence[float] = (NET_MS,),
    copies: int = 1,
    gpus: int = 1,
    seconds: float = 1.0,
    config: SchedulerConfig | None = None,
    clients: dict[bytes, float] | None = None,
    seed: int = 1,
    check: bool = False,
) -> World:
    """Offer `loads` to `copies` instances of each model (m0's first)."""
    simulation = Simulation(
        config or SchedulerConfig(max_exec_ns=NS_PER_S, max_batch=8),
        profile(times_ms),
        gpus_per_worker=(1,) * gpus,
        check=check,
        more_clients=clients,
    )
    models = tuple(m for i in range(len(times_ms)) for m in simulation.load(f"m{i}", copies))
    chance = random.Random(seed)
    demands: list[tuple[int, int, Load]] = []
    for place, load in enumerate(loads):
        at_ns = 0.0
        while (at_ns := at_ns + chance.expovariate(load.rate) * NS_PER_S) < seconds * NS_PER_S:
            demands.append((round(at_ns), place, load))
    demands.sort(key=lambda item: item[:2])
    simulation.outcome = Outcome()
    outcome = simulation.run(
        models,
        [
            Demand(at_ns, load.index, slo_ns=round(load.slo_ms * MS), client=load.client)
            for at_ns, _, load in demands
        ],
    )
    assert len(outcome.requests) == len(demands)
    by_load: list[list[bool]] = [[] for _ in loads]
    records = sorted(outcome.requests, key=lambda r: r.key)
    for (_, place, _), record in zip(demands, records, strict=True):
        by_load[place].append(record.deadline_met)
    policy = simulation.scheduler.policy
    assert isinstance(policy, Infer5)
    return World(outcome, loads, by_load, policy, [m.model_id for m in models])


def config(**options: object) -> SchedulerConfig:
    """Options of these runs, and what `options` adds."""
    return SchedulerConfig(max_exec_ns=NS_PER_S, max_batch=8, **options)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------- weights

CAPACITY = 8 / (NET_MS * 8**0.72) * 1000  # requests/s of one GPU in full batches


def two(rate: float, weight: float, *, same_model: bool) -> World:
    """Clients a and b, each with half of `rate` times the capacity; a weighs `weight`, b 1."""
    half = CAPACITY * rate / 2
    loads = [Load(half, 30, 0, b"a"), Load(half, 30, 0 if same_model else 1, b"b")]
    return run(
        loads,
        copies=2,
        config=config(max_client_weight=100.0),
        clients={b"a": weight, b"b": 1.0},
    )


@pytest.mark.parametrize("same_model", [True, False])
def test_under_overload_the_heavier_is_served_first_and_in_light_load_nobody_notices(
    same_model: bool,
) -> None:
    plain, weighted = (two(3.0, weight, same_model=same_model) for weight in (1.0, 2.0))
    assert plain.served(0) == pytest.approx(plain.served(1), rel=0.35)
    # What is in time is worth more than without weights; hardly less is in time.
    worth = [2 * world.served(0) + world.served(1) for world in (plain, weighted)]
    total = [world.served(0) + world.served(1) for world in (plain, weighted)]
    assert worth[1] > 1.15 * worth[0] and total[1] > 0.93 * total[0]
    assert weighted.served(0) > 4 * weighted.served(1)
    light = [two(0.3, weight, same_model=same_model) for weight in (1.0, 2.0, 100.0)]
    assert light[0].by_load == light[1].by_load == light[2].by_load
    assert light[0].share(0) > 0.99


def test_a_small_weight_gives_way() -> None:
    """A flood of weight 0.05 beside what would fill half of the GPU."""
    loads = [Load(CAPACITY / 2, 30, 0, b"a"), Load(CAPACITY * 5, 30, 0, b"flood")]
    before = run(loads, config=config(), clients={b"a": 1.0, b"flood": 1.0})
    after = run(loads, config=config(), clients={b"a": 1.0, b"flood": 0.05})
    assert before.share(0) < 0.35 and after.share(0) > 0.85
    assert after.served(1) > 0.3 * CAPACITY


def test_only_ratios_of_weights_matter() -> None:
    """Once some are lost, each lost request counts as 1."""
    loads = [Load(CAPACITY * 1.5, 30, 0, b"a"), Load(CAPACITY * 1.5, 30, 1, b"b")]

    def of(a: float, b: float) -> World:
        options = config(max_client_weight=100.0)
        return run(loads, copies=2, config=options, clients={b"a": a, b"b": b}, seconds=2.0)

    for low, high in ((of(1.0, 3.0), of(20.0, 60.0)), (of(1.0, 1.0), of(30.0, 30.0))):
        assert low.share(0) == pytest.approx(high.share(0), abs=0.06)
        assert low.share(1) == pytest.approx(high.share(1), abs=0.06)


def test_a_client_cannot_raise_itself_above_what_the_operator_allows() -> None:
    loads = [Load(CAPACITY, 30, 0, b"a"), Load(CAPACITY, 30, 0, b"b")]

    def of(weight: float, **options: object) -> World:
        return run(loads, config=config(**options), clients={b"a": weight, b"b": 1.0})

    claimed, honest = of(100.0), of(1.0)
    assert claimed.by_load == honest.by_load
    allowed = of(100.0, max_client_weight=100.0)
    assert allowed.share(0) > 1.3 * honest.share(0)
    overruled = of(100.0, max_client_weight=100.0, weights=(WeightRule(1.0, client="a"),))
    assert overruled.by_load == honest.by_load


def test_classes_of_slos_have_weights() -> None:
    loads = [Load(CAPACITY * 1.5, 20, 0), Load(CAPACITY * 1.5, 40, 0)]
    worlds = [
        run(loads, config=config(weights=rules))
        for rules in (
            (),
            (WeightRule(5.0, slo_max_ns=20 * MS),),
            (WeightRule(0.2, slo_max_ns=20 * MS), WeightRule(1.0, slo_max_ns=40 * MS)),
        )
    ]
    plain, raised, lowered = (world.share(0) for world in worlds)
    assert raised > 1.5 * plain and lowered < 0.5 * plain


# -------------------------------------------------------------------------------------- shares

SHARES = config(client_weights="shares", max_client_weight=100.0)


@pytest.mark.parametrize("same_model", [True, False])
@pytest.mark.parametrize("flood", [3.0, 10.0])
def test_a_flood_takes_nothing_from_a_light_client(same_model: bool, flood: float) -> None:
    light, index = 0.1 * CAPACITY, 0 if same_model else 3
    loads = [Load(light, 30, index, b"light")]
    loads += [Load(flood * CAPACITY / 3, 30, i, b"flood") for i in range(3)]
    clients = {b"light": 1.0, b"flood": 1.0}
    fair = run(loads, copies=4, gpus=2, config=SHARES, clients=clients)
    unfair = run(loads, copies=4, gpus=2, config=config(), clients=clients)
    assert fair.share(0) > 0.95, "a light client alone is always in time"
    assert unfair.share(0) < 0.8
    # The flood has the rest: it costs it no more than the light one's single requests take.
    got = [sum(world.served(i) for i in (1, 2, 3)) for world in (fair, unfair)]
    assert got[0] > 0.75 * got[1]


def given_ns(world: World, load: int) -> int:
    """Exec time that the requests of a load were given, where each has an instance of its own."""
    return sum(duration for _, duration in world.exec_ns(world.loads[load].index))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, 1.0), (1.0, 3.0)])
def test_floods_share_by_their_weights_and_not_by_their_rates(
    weights: tuple[float, float],
) -> None:
    loads = [Load(6 * CAPACITY, 30, 0, b"a"), Load(2 * CAPACITY, 30, 1, b"b")]
    world = run(
        loads, copies=2, seconds=3.0, config=SHARES, clients={b"a": weights[0], b"b": weights[1]}
    )
    ratio = given_ns(world, 0) / given_ns(world, 1)
    assert ratio == pytest.approx(weights[0] / weights[1], rel=0.2)


def test_accounts_count_exec_time_and_not_requests() -> None:
    """One client was given one request of 10 ms, the other one of 1 ms: the latter goes first."""
    shares = Shares()

    def request(name: str, key: int) -> Request:
        return Request(
            key=key,
            client=Client(name.encode(), 1, name),
            request_id=key,
            user_id=0,
            queue=Instance(0, "m0", 0).queue,
            slo_factor=0.0,
            slo_ns=100 * MS,
            arrival_ns=0,
            input=None,
        )

    long, short = request("long", 1), request("short", 2)
    shares.given([long], 10 * MS, now_ns=NS_PER_S)
    shares.given([short], MS, now_ns=NS_PER_S + 30 * MS)
    assert shares.value(short, loss=0.5) > 10 * shares.value(long, loss=0.5)
    assert shares.value(short, loss=0.0) == shares.value(long, loss=0.0)


def test_shares_change_nothing_while_nothing_is_lost() -> None:
    loads = [Load(0.2 * CAPACITY, 30, 0, b"a"), Load(0.1 * CAPACITY, 30, 0, b"b")]
    clients = {b"a": 1.0, b"b": 5.0}
    assert (
        run(loads, config=SHARES, clients=clients).outcome.actions
        == run(loads, config=config(), clients=clients).outcome.actions
    )


# --------------------------------------------------------------------------------------- turns


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    slow_ms=st.lists(st.floats(8.0, 60.0), min_size=1, max_size=2),
    flood_ms=st.floats(1.0, 4.0),
    flood_models=st.integers(1, 3),
    overload=st.floats(2.0, 6.0),
    flood_slo_ms=st.floats(12.0, 50.0),
    slack_ms=st.floats(30.0, 120.0),
    gpus=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_no_model_with_feasible_requests_is_starved(
    slow_ms: list[float],
    flood_ms: float,
    flood_models: int,
    overload: float,
    flood_slo_ms: float,
    slack_ms: float,
    gpus: int,
    seed: int,
) -> None:
    """A model that always has a feasible request gets a batch within the time that is promised."""
    slow = len(slow_ms)
    rate = overload * gpus * 8 / (flood_ms * 8**0.72) * 1000 / flood_models
    loads = [Load(8000 / slack_ms, ms + slack_ms, i) for i, ms in enumerate(slow_ms)]
    loads += [Load(rate, flood_slo_ms, slow + i) for i in range(flood_models)]
    times = [*slow_ms, *[flood_ms] * flood_models]
    seconds = 2.5
    world = run(loads, times_ms=times, gpus=gpus, seconds=seconds, seed=seed)
    batches = [world.exec_ns(index) for index in range(slow)]
    # What a turn of each may cost: the largest of its batches.
    turns_ns = sum(max((ns for _, ns in each), default=0) for each in batches)
    for index, each in enumerate(batches):
        begin_ns = world.outcome.requests[0].arrival_ns
        end_ns = begin_ns + round(seconds * NS_PER_S)
        slo_ns = round(loads[index].slo_ms * MS)
        # Until one is lost; patience; the turns of all models, with GPUs not quite busy; what runs already.
        bound_ns = (
            slo_ns
            + PATIENCE_NS
            + 1.15 * turns_ns * (1 + OTHERS_PER_TURN) / gpus
            + turns_ns
            + round(flood_ms * 8**0.72 * MS)
            + 20 * MS
        )
        sent = [begin_ns, *[at_ns for at_ns, _ in each], end_ns]
        gaps = [after - before for before, after in pairwise(sent)]
        assert max(gaps) <= bound_ns, f"m{index}: {max(gaps) / MS:.0f} ms of {bound_ns / MS:.0f}"


def test_turns_are_needed_and_cost_no_more_than_their_part(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = [Load(10, 150, 0), Load(6000, 20, 1)]
    with_turns = run(loads, times_ms=(50.0, 2.0), seconds=3.0)
    monkeypatch.setattr("slosched.core.scheduler.anti_starvation.PATIENCE_NS", 10**15)
    without = run(loads, times_ms=(50.0, 2.0), seconds=3.0)
    assert without.served(0) <= 1 and without.policy._anti_starvation.turns == 0
    assert with_turns.served(0) >= 3 and with_turns.policy._anti_starvation.turns >= 2
    slow_ns = sum(duration for _, duration in with_turns.exec_ns(0))
    assert slow_ns <= 0.055 * 3 * NS_PER_S + 50 * MS
    assert with_turns.served(1) > 0.93 * without.served(1)


def test_batch_work_beside_a_flood_with_tight_deadlines_ends_in_time_or_has_turns() -> None:
    world = run([Load(100, 600, 0), Load(4000, 15, 1)], times_ms=(5.0, 2.0), seconds=2.0)
    sent = [at_ns for at_ns, _ in world.exec_ns(0)]
    gaps = [after - before for before, after in pairwise(sent)]
    assert len(sent) > 2 and max(gaps) < 600 * MS + PATIENCE_NS + 22 * 5 * 8**0.72 * MS


def test_who_loses_nothing_is_never_held_back() -> None:
    world = run([Load(100, 60, 0), Load(100, 60, 1)], times_ms=(5.0, 2.0), seconds=1.0, gpus=2)
    assert world.policy._anti_starvation.turns == 0
    assert {record.code for record in world.outcome.requests} == {Code.OK}


def test_of_many_that_are_held_back_each_is_looked_at_in_time() -> None:
    anti_starvation = AntiStarvation()
    queues = [Instance(number, "net", number).queue for number in range(2 * LOOKED_AT + 3)]
    for queue in queues:
        anti_starvation.lost(queue, now_ns=queue.queue_id)
        anti_starvation.lost(queue, now_ns=10**12)  # the first loss counts
    assert anti_starvation.due(PATIENCE_NS - 1) == []
    assert anti_starvation.due(PATIENCE_NS + 1) == queues[:2], "two are due, the longest wait first"
    now_ns = 2 * PATIENCE_NS
    seen: list[Queue] = []
    for _ in range(3):
        due = anti_starvation.due(now_ns)
        assert len(due) == LOOKED_AT
        seen += due
        anti_starvation.none_fits(due)
    assert set(seen) == set(queues)
    turn = anti_starvation.due(now_ns)[0]
    anti_starvation.served(turn, 5 * MS, turn=True)
    assert anti_starvation.due(now_ns) == [], "others come first"
    anti_starvation.served(queues[0], OTHERS_PER_TURN * 5 * MS - 1, turn=False)
    assert anti_starvation.due(now_ns) == []
    anti_starvation.served(queues[0], 1, turn=False)
    assert turn not in anti_starvation.due(now_ns) != []
