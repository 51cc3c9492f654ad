"""INFER5 decides with heaps and orders exactly what looking at everything decides: the same effects.

Each world runs under the product's policy and under naive_infer5.py in lockstep; every step's effects and
wake-ups must be equal, and the invariants hold.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from naive_infer5 import NaiveInfer5
from slosched.codes import Code
from slosched.config import WeightRule
from slosched.core.scheduler import slices
from slosched.core.scheduler.policies.infer5 import Infer5
from twin_schedulers import Twins, World

MIXED = World(
    gpus=(1, 2, 3),
    speeds=(1.0, 0.5, 1.8),
    ways_us=(100, 900, 300),
    jitter_us=150,
    sigma=0.03,
    names=(("small", 1.3, 1), ("middle", 3.0, 2), ("large", 7.0, 3)),
    copies=5,
    skew=0.8,
)
MANY = World(gpus=(12,) * 2, copies=40, rate=6000.0, jitter_us=60, slos_ms=(5.0, 20.0), sigma=0.01)
WEIGHTED = World(
    clients=(("a", 1.0), ("b", 3.0), ("c", 0.2), ("d", 1.0)),
    rules=(WeightRule(2.0, client="d*"), WeightRule(0.5, slo_max_ns=5_000_000)),
    rate=5000.0,
)
WORLDS = {
    "equal": World(),
    "idle": World(rate=150.0),
    "overload": World(rate=5000.0, copies=30, slos_ms=(6.0, 12.0, 40.0)),
    "many-gpus": MANY,
    # So uneven that the GPU that will do stands far behind the first few that are free.
    "many-gpus-uneven": replace(
        MANY, jitter_us=500, sigma=0.2, deaths_s=0.2, failures=0.05, cancels=0.1
    ),
    "one-by-one": World(
        gpus=(1,) * 14,
        speeds=(1.0,) * 14,
        ways_us=(200,) * 14,
        jitter_us=80,
        copies=30,
        rate=4000.0,
        max_batch=1,
        slos_ms=(5.0, 9.0, 25.0),
    ),
    "mixed": MIXED,
    "mixed-overload": replace(MIXED, rate=3500.0, copies=12),
    "few-pages": replace(MIXED, pages=9, rate=900.0, slos_ms=(15.0, 40.0, 90.0)),
    "few-pages-overload": replace(MIXED, pages=9, rate=3000.0, copies=10, slos_ms=(15.0, 60.0)),
    "spread": replace(MIXED, gpus=(4, 4, 4), pages=6, copies=14, rate=2500.0, bursts=0.02),
    "failures": replace(MIXED, failures=0.05, cancels=0.1, pages=14),
    "deaths": replace(MIXED, failures=0.02, cancels=0.05, deaths_s=0.3, pages=14),
    "deaths-overload": replace(MIXED, deaths_s=0.2, rate=4000.0, cancels=0.05),
    "weights": WEIGHTED,
    "weights-many": replace(WEIGHTED, copies=25, rate=6000.0, slos_ms=(6.0, 12.0, 40.0)),
    "weights-mixed": replace(
        MIXED,
        clients=WEIGHTED.clients,
        rules=WEIGHTED.rules,
        rate=2500.0,
        copies=12,
        failures=0.03,
        cancels=0.05,
    ),
    "shares": replace(WEIGHTED, client_weights="shares", copies=12),
    # So much of the large model that some are held back and get their turns.
    "turns": replace(
        MIXED,
        gpus=(2,),
        speeds=(1.0,),
        ways_us=(300,),
        pages=100,
        rate=2500.0,
        skew=1.2,
        copies=4,
        slos_ms=(40.0, 90.0),
    ),
}


#: A plan that gives up too soon shows with half of the seeds; this is one of them.
SEEDS = {"many-gpus-uneven": 100}
#: Turns come after half a second.
SECONDS = {"turns": 0.9}


@pytest.fixture(autouse=True)
def without_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The full scan answers all that are hopeless in one step, however many."""
    monkeypatch.setattr(slices, "A_STEP_IN_ALL", 10**9)


@pytest.mark.parametrize("name", WORLDS)
def test_the_same_effects_as_the_full_scan(name: str) -> None:
    twins = Twins(WORLDS[name], SEEDS.get(name, 1), Infer5, NaiveInfer5)
    twins.run(SECONDS.get(name, 0.4))
    assert twins.codes.get(Code.OK, 0) > 30, twins.codes
    if name == "turns":
        policy = twins.twins[0].policy
        assert isinstance(policy, Infer5) and policy._anti_starvation.turns > 0


def test_the_worlds_reach_every_kind_of_answer() -> None:
    """Else the comparison says less than it seems to."""
    seen: dict[int, int] = {}
    for name in ("overload", "deaths-overload", "failures"):
        twins = Twins(WORLDS[name], 3, Infer5, NaiveInfer5, check=False)
        twins.run(0.2)
        for code, count in twins.codes.items():
            seen[code] = seen.get(code, 0) + count
    expected = {
        Code.OK,
        Code.CANCELLED,
        Code.TIMED_OUT,
        Code.SKIPPED,
        Code.COULD_NOT_START_IN_TIME,
    }
    assert expected <= set(seen), seen
