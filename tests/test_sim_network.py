"""Virtual time and the simulated network: order, latency, jitter, cards, clocks."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from slosched.errors import InvalidConfig
from slosched.sim.kernel import Kernel
from slosched.sim.network import SMALL_MESSAGE_BYTES, Card, Network, Wire
from slosched.sim.node import WorkerClock
from slosched.sim.spec import sub_seed
from slosched.units import NS_PER_MS, NS_PER_S, NS_PER_US

INPUT_BYTES = 602_112  # 3 x 224 x 224 float32


def wire(kernel: Kernel, got: list[tuple[int, Any]], **given: Any) -> Wire:
    options: dict[str, Any] = {"latency_ns": 200_000, "jitter_ns": 0, "card": None, "seed": 1}
    return Wire(kernel, lambda m: got.append((kernel.now_ns, m)), **(options | given))


def test_what_is_due_at_one_instant_happens_in_order_and_late_ones_last() -> None:
    kernel, seen = Kernel(0), list[str]()
    kernel.at_end_of(5, seen.append, "end")
    kernel.at(5, seen.append, "first")
    kernel.at(5, lambda _: kernel.at(5, seen.append, "from within"), None)
    kernel.at(4, seen.append, "before")
    kernel.at(6, seen.append, "after")
    kernel.run_until(5)
    assert seen == ["before", "first", "from within", "end"]
    assert kernel.now_ns == 5 and kernel.events == 6 and kernel.next_ns() == 6


def test_a_time_that_has_passed_is_now_and_stop_ends_a_run_at_its_event() -> None:
    kernel, seen = Kernel(0), list[int]()
    kernel.run_until(10)
    kernel.at(3, lambda _: seen.append(kernel.now_ns))
    kernel.at(20, lambda _: kernel.stop())
    kernel.at(30, lambda _: seen.append(kernel.now_ns))
    kernel.run_until(100)
    assert seen == [10] and kernel.now_ns == 20
    kernel.run_until(100)
    assert seen == [10, 30] and kernel.now_ns == 100


def test_a_plain_wire_takes_its_latency() -> None:
    kernel, got = Kernel(0), list[tuple[int, Any]]()
    plain = wire(kernel, got)
    plain.send("a", INPUT_BYTES)
    plain.send("b")
    kernel.run_until(NS_PER_S)
    assert got == [(200_000, "a"), (200_000, "b")]
    assert plain.messages_sent == 2
    assert plain.bytes_sent == INPUT_BYTES + SMALL_MESSAGE_BYTES


def test_a_card_sends_one_message_after_the_other() -> None:
    """An input of 602 kB takes 0.48 ms at 10 Gbit/s, and what leaves by the same card waits for it."""
    kernel, got = Kernel(0), list[tuple[int, Any]]()
    card = Card(10**10)
    one, other = wire(kernel, got, card=card), wire(kernel, got, card=card)
    one.send("input", INPUT_BYTES)
    other.send("small", 125)
    kernel.run_until(NS_PER_MS)
    one.send("later", 125)
    kernel.run_until(2 * NS_PER_MS)
    takes_ns = INPUT_BYTES * 8 // 10
    assert takes_ns == 481_689
    assert got == [
        (takes_ns + 200_000, "input"),
        (takes_ns + 100 + 200_000, "small"),
        (NS_PER_MS + 100 + 200_000, "later"),
    ]


def test_jitter_is_exponential_seeded_and_keeps_the_order() -> None:
    def arrivals(seed: int, apart_ns: int) -> list[int]:
        kernel, got = Kernel(0), list[tuple[int, Any]]()
        jittery = wire(kernel, got, jitter_ns=50 * NS_PER_US, seed=seed)
        for index in range(4000):
            kernel.at(index * apart_ns, jittery.send, index)
        kernel.run_until(4000 * NS_PER_S)
        assert [message for _, message in got] == list(range(4000))
        return [at_ns for at_ns, _ in got]

    far = NS_PER_S
    delays = [at - index * far - 200_000 for index, at in enumerate(arrivals(1, far))]
    mean = sum(delays) / len(delays)
    assert 47_000 < mean < 53_000  # 4,000 draws: standard error 790 ns
    assert 0.62 < sum(delay < 50_000 for delay in delays) / len(delays) < 0.645  # 1 - 1/e
    close = arrivals(1, 1000)
    assert all(a <= b for a, b in pairwise(close))
    assert close == arrivals(1, 1000) and close != arrivals(2, 1000)


def test_a_spread_is_drawn_evenly_between_its_quantiles() -> None:
    kernel, got = Kernel(0), list[tuple[int, Any]]()
    spread = wire(kernel, got, spread_ns=(0, 10_000, 10_000, 90_000), seed=3)
    for index in range(3000):
        kernel.at(index * NS_PER_S, spread.send, index)
    kernel.run_until(3000 * NS_PER_S)
    delays = [at_ns - index * NS_PER_S - 200_000 for index, (at_ns, _) in enumerate(got)]
    assert min(delays) >= 0 and max(delays) < 90_000
    for low, high in ((0, 10_000), (10_000, 10_001), (10_001, 90_000)):  # a third each
        assert 0.3 < sum(low <= delay < high for delay in delays) / 3000 < 0.37
    assert sum(d for d in delays if d > 10_000) / 1000 == pytest.approx(50_000, rel=0.1)


@pytest.mark.parametrize("spread", [(1,), (2, 1), (-1, 1)])
def test_a_spread_that_cannot_be_is_refused(spread: tuple[int, ...]) -> None:
    with pytest.raises(InvalidConfig, match="to_worker_spread_ns must be two or more quantiles"):
        Network(to_worker_spread_ns=spread)


def test_a_disturbed_wire_loses_delays_and_doubles() -> None:
    kernel, got = Kernel(0), list[tuple[int, Any]]()
    faulty = wire(kernel, got)
    copies: dict[str, tuple[int, ...]] = {"lost": (), "late": (7,), "twice": (0, 9), "usual": (0,)}
    faulty.disturb = copies.__getitem__
    for message in copies:
        faulty.send(message)
    kernel.run_until(NS_PER_S)
    in_order = [(200_007, "late"), (200_007, "twice"), (200_007, "usual")]
    assert got == [*in_order, (200_016, "twice")]


def test_what_a_wire_holds_back_arrives_at_once_and_in_order() -> None:
    kernel, got = Kernel(0), list[tuple[int, Any]]()
    held = wire(kernel, got)
    held.disturb = lambda _: (max(0, NS_PER_S - kernel.now_ns),)
    for index in range(4):
        kernel.at(index * NS_PER_S // 3, held.send, index)
    kernel.run_until(2 * NS_PER_S)
    assert got == [(NS_PER_S + 200_000, index) for index in range(4)]


def test_a_network_cannot_be_negative() -> None:
    with pytest.raises(InvalidConfig, match="jitter_ns must be at least 0, not -1"):
        Network(jitter_ns=-1)


@pytest.mark.parametrize("drift_ppb", [-50_000, 0, 3, 50_000])
def test_a_workers_clock_and_its_inverse_agree(drift_ppb: int) -> None:
    clock = WorkerClock(123_456_789, drift_ppb, since_ns=NS_PER_S)
    for true_ns in (NS_PER_S, NS_PER_S + 1, 360 * NS_PER_S + 17, 10**18 + 3):
        local_ns = clock.local_ns(true_ns)
        first_ns = clock.true_ns(local_ns)
        assert clock.local_ns(first_ns) >= local_ns > clock.local_ns(first_ns - 1)
        assert abs(first_ns - true_ns) <= 1
    assert (
        clock.local_ns(61 * NS_PER_S) - clock.local_ns(NS_PER_S) == 60 * NS_PER_S + 60 * drift_ppb
    )
    clock.jump(-5)
    assert clock.local_ns(NS_PER_S) == NS_PER_S + 123_456_784


def test_sub_seeds_are_far_apart() -> None:
    seeds = [sub_seed(s, name) for s in range(50) for name in ("network", "durations", "clocks")]
    assert len({seed >> 8 for seed in seeds}) == len(seeds)
