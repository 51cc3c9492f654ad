"""Long work goes in slices: what one step does is counted, whatever there is to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from scheduler_rig import MS, T0, Rig
from slosched.codes import Code
from slosched.core.scheduler.interface import (
    ClientLost,
    Drain,
    Effect,
    Event,
    FromClient,
    RequestDone,
    ToClient,
)
from slosched.core.scheduler.slices import A_STEP, ANSWER, Slices, Work
from slosched.messages import Goodbye, InferReply

QUEUED = 20_000
#: Answers that one step may give for work in slices, beside what the policy answers.
MOST_ANSWERS = A_STEP // ANSWER + 8


def crowded(count: int = QUEUED) -> tuple[Rig, list[int]]:
    """A GPU, a client "c" and a client "many" with `count` queued requests, the last due first."""
    rig, (model, *_) = Rig.ready()
    rig.hello(b"many", 7)
    ids = [
        rig.infer(model, slo_ms=3_000_000 - 10 * place, client=b"many") for place in range(count)
    ]
    rig.step()
    return rig, ids


def done(effects: list[Effect]) -> list[RequestDone]:
    return [effect for effect in effects if isinstance(effect, RequestDone)]


def steps_until_idle(rig: Rig, step: Callable[[], list[Effect]]) -> list[int]:
    """How many requests were answered in each step; time moves by a tenth of a millisecond."""
    counts = []
    while True:
        effects = step()
        counts.append(len(done(effects)))
        if not rig.scheduler.slicing:
            return counts
        assert rig.scheduler.next_wakeup_ns() == rig.now_ns, "the rest must not wait"
        rig.now_ns += MS // 10


def test_slices_do_so_much_a_step_in_the_order_in_which_work_came() -> None:
    did: list[str] = []

    def work(name: str, parts: int, cost: int) -> Work:
        for _ in range(parts):
            did.append(name)
            yield cost

    slices = Slices()
    slices.begin(work("a", 5, A_STEP // 2))
    slices.begin(work("b", 1, 1))
    assert (did, slices.waiting) == (["a", "a"], True)
    slices.go_on()
    assert did == ["a", "a"], "the step has had its units"
    for _ in range(2):
        slices.renew()
        slices.go_on()
    assert (did, slices.waiting) == (["a"] * 5 + ["b"], False)


@pytest.mark.parametrize("fact", [FromClient(b"many", Goodbye()), ClientLost(b"many")])
def test_a_client_that_leaves_with_20000_requests_holds_no_step(fact: Event) -> None:
    rig, _ = crowded()
    rig.handle(fact)
    counts = steps_until_idle(rig, rig.step)
    rig.checker.recount()
    assert max(counts) <= MOST_ANSWERS
    assert sum(counts) > 0.99 * QUEUED and not rig.to_client(InferReply)
    assert not rig.scheduler.leaving


def test_others_are_served_between_the_slices() -> None:
    rig, _ = crowded(4_000)
    (infer,) = rig.outstanding()
    rig.handle(FromClient(b"many", Goodbye()))
    rig.step()
    rig.now_ns = T0 + 10 * MS
    rig.finish(infer, begin_ms=0.5)
    mine = rig.infer(slo_ms=30)
    rig.step()
    (infer,) = rig.outstanding()
    rig.now_ns = T0 + 20 * MS
    rig.finish(infer, begin_ms=10.5)
    rig.step()
    assert rig.reply(mine).code == Code.OK
    assert len(rig.scheduler.leaving[0].requests) > 3_000


def test_what_is_left_of_a_client_is_told_to_nobody_and_not_to_who_comes_back() -> None:
    rig, ids = crowded(2_000)
    (infer,) = rig.outstanding()
    rig.hello(b"many", 8)  # the same identity, restarted
    rig.step()
    (model,) = rig.load(client=b"many")
    again = rig.infer(model, slo_ms=100_000, client=b"many", request_id=ids[-1])
    rig.finish(infer, begin_ms=0.5)
    steps_until_idle(rig, rig.step)
    rig.checker.recount()
    assert not rig.answered(again) and not rig.to_client(InferReply)
    assert rig.scheduler.cluster.models[0].clients.keys() == {b"c", b"many"}


def test_the_end_is_answered_in_slices_and_to_everybody() -> None:
    rig, ids = crowded()

    def end() -> list[Effect]:
        effects = rig.scheduler.abandon(now_ns=rig.now_ns)
        rig.checker.check(effects, now_ns=rig.now_ns)
        rig.effects.extend(effects)
        return effects

    rig.handle(Drain())
    rig.step()
    counts = steps_until_idle(rig, end)
    assert max(counts) <= MOST_ANSWERS
    assert rig.scheduler.idle
    to_many = [e.message for e in rig.effects if isinstance(e, ToClient) and e.client == b"many"]
    replies = [message for message in to_many if isinstance(message, InferReply)]
    assert len(replies) == len(ids)
    assert {reply.code for reply in replies} == {Code.SHUTTING_DOWN}
