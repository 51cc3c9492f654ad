"""MLPerf's LoadGen decides as slosched does: Server scenario, early stopping, 20 seeds with both verdicts.

LoadGen runs on the machine's clock, so a stall makes more requests late than a test has chosen. Its verdict is
therefore compared with ours on what LoadGen itself recorded.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

from loadgen_rig import Asked, Chosen, Judged, Served, run
from slosched.codes import Code
from slosched.experiment.children import Children
from slosched.loadgen.verdict import Outcome, judge, least_sent, most_late, rank_of_bound
from slosched.units import NS_PER_MS, NS_PER_S

TARGET_NS = 100 * NS_PER_MS
RATE_PER_S = 10_000.0
SEEDS = 20
#: On a machine that stalls now and then, not all of them are disturbed.
TRIES = 10


def decided(asked: Asked, late: Collection[int], folder: Path) -> Judged:
    with Chosen(late, target_ns=asked.target_ns) as system:
        return run(system, asked, folder)


def check_same(asked: Asked, judged: Judged) -> None:
    """slosched's verdict on the latencies that LoadGen recorded is LoadGen's, at both sides' own percentile."""
    late = sum(latency > asked.target_ns for latency in judged.latencies_ns)
    assert (judged.queries, judged.late) == (len(judged.latencies_ns), late)
    ours = judge(judged.queries, late)
    assert (ours.outcome is Outcome.HOLDS) == judged.valid, (asked, judged.queries, late)
    if ours.outcome is not Outcome.HOLDS:
        assert judged.needs == least_sent(late) - judged.queries
        assert ours.needs in (0, judged.needs)  # 0: it fails, which LoadGen does not decide


def test_the_same_verdict_on_20_seeds_at_both_sides_of_the_border(tmp_path: Path) -> None:
    verdicts = set()
    for seed in range(SEEDS):
        draw = random.Random(seed)
        queries = draw.randrange(459, 1500)
        # One more than may be late, or as many as may; the first seeds are decided whatever the machine does.
        border = most_late(queries) + draw.choice((0, 1))
        late = {0: 0, 1: 5 * border + 5}.get(seed, border)
        target_ns = 30 * NS_PER_S if seed == 0 else TARGET_NS
        asked = Asked(queries, target_ns=target_ns, rate_per_s=RATE_PER_S, seed=seed)
        numbers = draw.sample(range(queries), late)
        judged = decided(asked, numbers, tmp_path / str(seed))
        assert judged.late >= late
        check_same(asked, judged)
        verdicts.add(judged.valid)
    assert verdicts == {True, False}


@pytest.mark.parametrize(("late", "least"), [(0, 459), (1, 662), (2, 838)])
def test_early_stopping_wants_as_many_queries(late: int, least: int, tmp_path: Path) -> None:
    """LoadGen is satisfied with `least` queries, and of one less it says that one is wanted."""
    assert least_sent(late) == least
    for queries, needs in ((least, 0), (least - 1, 1)):
        for attempt in range(TRIES):
            asked = Asked(queries, target_ns=TARGET_NS, rate_per_s=RATE_PER_S, seed=attempt)
            judged = decided(asked, range(late), tmp_path / f"{queries}-{attempt}")
            check_same(asked, judged)
            if judged.late == late:  # else the machine stalled
                break
        else:
            pytest.skip(
                f"the machine stalled for {TARGET_NS / NS_PER_MS:g} ms in each of {TRIES} tries"
            )
        assert (judged.valid, judged.needs) == (not needs, needs)


@pytest.mark.parametrize(
    ("percentile", "queries"), [(0.9, 64), (0.9, 1000), (0.99, 662), (0.99, 2000)]
)
def test_the_bound_on_a_percentile_is_its_estimate(
    percentile: float, queries: int, tmp_path: Path
) -> None:
    """The early-stopping estimate of its SingleStream scenario, from the latencies that it recorded."""
    judged = decided(Asked(queries, percentile=percentile), (), tmp_path / "run")
    rank = rank_of_bound(queries, percentile=percentile)
    assert rank is not None and judged.queries == queries
    assert judged.estimate_ns == sorted(judged.latencies_ns)[rank]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A controller of two emulated GPUs, so that each seed takes half a second."""
    folder = tmp_path_factory.mktemp("loadgen")
    loopback = ("--bind", "127.0.0.1", "--port", "0")
    with Children() as children:
        worker = children.start(
            "worker",
            ["worker", "--device", "emulated", "--gpus", "2", *loopback],
            folder / "worker.log",
        )
        port = children.wait_ready(worker, within_s=60)
        words = ["controller", "INFER5", "--workers", f"127.0.0.1:{port}", *loopback]
        words += ["--http-port", "-1", "--log-dir", str(folder / "run")]
        controller = children.start("controller", words, folder / "controller.log")
        yield f"127.0.0.1:{children.wait_ready(controller, within_s=60)}"


@pytest.mark.processes
def test_its_server_scenario_through_the_client(address: str, tmp_path: Path) -> None:
    """20 seeds, from a rate that is served with time to spare to one of which much is refused."""
    verdicts, refused = set(), 0
    with Served(address, "resnet50_v2", slo_ns=NS_PER_S) as system:
        for seed in range(SEEDS):
            draw = random.Random(seed)
            rate, slo_ns = 1200.0, NS_PER_S
            if seed % 2:
                rate, slo_ns = draw.uniform(1400.0, 4000.0), draw.randrange(6, 30) * NS_PER_MS
            system.forget(slo_ns)
            asked = Asked(draw.randrange(459, 700), target_ns=slo_ns, rate_per_s=rate, seed=seed)
            judged = run(system, asked, tmp_path / str(seed))
            check_same(asked, judged)
            # Each query was one request with one end, and each that was refused is late to LoadGen. This client
            # begins to count when LoadGen sends, which is at or after the scheduled time.
            assert sum(system.codes.values()) == judged.queries
            turned_away = judged.queries - system.codes[Code.OK]
            assert turned_away <= system.late <= judged.late
            if system.late == judged.late:
                ours = judge(judged.queries, system.late)
                assert (ours.outcome is Outcome.HOLDS) == judged.valid
            verdicts.add(judged.valid)
            refused += turned_away
    assert verdicts == {True, False} and refused
