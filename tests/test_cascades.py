"""Cascades in the scheduler: loading one, each verdict, scores, and what happens when something is lost."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from cascade_rig import SLO_MS, CascadeRig, pair
from made_messages import an_error
from scheduler_rig import MS, T0, Rig
from slosched.cascade_spec import CascadeOptions
from slosched.codes import Code, Verdict
from slosched.config import SchedulerConfig
from slosched.core.scheduler.cascades import uniform
from slosched.core.scheduler.interface import ClientLost, FromClient
from slosched.errors import InvalidConfig
from slosched.messages import (
    CancelRequest,
    Infer,
    InferReply,
    ListModelsReply,
    ListModelsRequest,
    UnloadModelRequest,
)

ONE_CASCADE = ["CASCADE", "DIFFSERVE", "DIFFSERVE-STATIC", "CLIPPER-LIGHT", "PROTEUS"]
#: A fixed plan, which DIFFSERVE-STATIC needs.
STATIC = pair(static_gpus=2, static_plan=(0.5, 1.0, 1.0, 4.0, 2.0))


def listed(rig: CascadeRig) -> ListModelsReply:
    rig.handle(FromClient(b"c", ListModelsRequest(9_000)))
    rig.steps()
    return rig.to_client(ListModelsReply)[-1]


# ------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("policy", ["INFER5", *ONE_CASCADE])
def test_a_cascade_is_loaded_by_its_name_in_one_reply(policy: str) -> None:
    rig = CascadeRig(policy, STATIC, load=False)
    assert not rig.cascade.ready
    reply = rig.ask_to_load("pair")
    assert (reply.code, len(reply.models)) == (Code.OK, 1)
    info = reply.models[0]
    assert (info.name, info.copy, info.b1_ns) == ("pair", 0, 2 * MS)
    assert info.weights_bytes == 2 * 2**24 and "cascade" in info.labels
    assert {m.name for m in rig.scheduler.cluster.models.values()} == {"small", "large"}
    assert info.model_id not in rig.scheduler.cluster.models
    assert rig.cascade.ready


@pytest.mark.parametrize("program", ["small", "large"])
def test_a_program_that_fails_fails_the_cascade(program: str) -> None:
    rig = CascadeRig(load=False)
    rig.broken[program] = "no such file"
    reply = rig.ask_to_load("pair")
    assert reply.code == Code.RUNTIME_ERROR and not reply.models
    assert program in reply.reason and "no such file" in reply.reason
    assert not rig.cascade.ready and "pair" not in [m.name for m in listed(rig).models]


def test_a_cascade_is_loaded_once_and_not_in_copies() -> None:
    reply = CascadeRig(load=False).ask_to_load("pair", copies=2)
    assert reply.code == Code.INVALID_REQUEST and "ask for 1 copy" in reply.reason


def test_a_name_that_no_worker_has_lists_the_cascade() -> None:
    reply = CascadeRig(load=False).ask_to_load("pear")
    assert reply.code == Code.UNKNOWN_MODEL and "pair" in reply.reason


def test_a_cascade_is_offered_where_both_programs_are() -> None:
    rig = CascadeRig(load=False, workers=2)
    assert listed(rig).loadable == ("large", "pair", "small")
    assert listed(rig).models == ()
    rig.load_named("pair")
    assert [m.name for m in listed(rig).models] == ["small", "large", "pair"]
    for worker_id in range(2):
        rig.join_pair(worker_id, session=70 + worker_id, loadable=("small",))
    assert listed(rig).loadable == ("small",)


@pytest.mark.parametrize(
    ("program", "tensors", "words"),
    [("large", "outputs", "different tensors"), ("large", "inputs", "the heavy program takes")],
)
def test_programs_that_do_not_go_together_are_refused(
    program: str, tensors: str, words: str
) -> None:
    rig = CascadeRig(load=False)
    getattr(rig, tensors)[program] = (7,)
    reply = rig.ask_to_load("pair")
    assert reply.code == Code.INVALID_REQUEST and words in reply.reason
    assert "(7,)" in reply.reason or "7" in reply.reason
    assert not rig.cascade.ready


def test_a_heavy_program_may_take_the_light_output() -> None:
    rig = CascadeRig(spec=pair(passes_output=True), load=False)
    rig.inputs["large"] = (2,)
    assert rig.ask_to_load("pair").code == Code.OK
    assert CascadeRig(spec=pair(passes_output=True), load=False).ask_to_load("pair").code != Code.OK


def test_the_programs_can_be_used_alone_beside_the_cascade() -> None:
    rig = CascadeRig()
    small = rig.load_named("small")
    alone = rig.infer(small, slo_ms=100)
    both = rig.ask()
    rig.step()
    while rig.waiting("small"):
        rig.run("small", *[0.9] * len(rig.waiting("small")[0].lengths or (1, 1)))
    assert rig.reply(alone).code == Code.OK and rig.reply(alone).stages == ()
    assert rig.verdicts(both) == [Verdict.ACCEPTED]


def test_two_cascades_may_share_a_program() -> None:
    other = replace(pair(), name="other", threshold=0.0)
    rig = CascadeRig(more=(other,), options=CascadeOptions(), workers=2)
    second = rig.load_named("other")
    assert second.model_id != rig.pair.model_id
    first = rig.ask()
    rig.run("small", 0.2)
    third = rig.infer(second, slo_ms=100)
    rig.step()
    rig.run("small", 0.2)
    assert rig.verdicts(third) == [Verdict.ACCEPTED], "its threshold is 0"
    rig.run("large")
    assert rig.verdicts(first) == [Verdict.DEFERRED, Verdict.HEAVY]


def test_a_cascade_that_is_not_loaded_is_refused() -> None:
    rig = CascadeRig(load=False)
    request_id = rig.infer(rig.cascade.model_id, slo_ms=100)
    rig.step()
    reply = rig.reply(request_id)
    assert reply.code == Code.INVALID_REQUEST and "load one first" in reply.reason


def test_loading_a_cascade_whose_programs_are_there_needs_no_room_for_more() -> None:
    rig = CascadeRig(max_instances=2)
    assert rig.ask_to_load("pair").code == Code.OK


# ------------------------------------------------------------------------------------ verdicts


def test_the_slo_is_the_cascades_unless_a_request_has_its_own() -> None:
    rig = CascadeRig()
    rig.ask()
    rig.ask(slo_ms=77)
    actions = rig.scheduler.cluster.actions.values()
    waiting = [*(rig.cascade.light.requests if rig.cascade.light else [])]
    slos = {r.slo_ns // MS for a in actions for r in a.requests} | {r.slo_ns // MS for r in waiting}
    assert slos == {SLO_MS, 77}


@pytest.mark.parametrize("policy", ["INFER5", *ONE_CASCADE[:3]])
def test_a_good_light_answer_is_accepted(policy: str) -> None:
    rig = CascadeRig(policy, STATIC, workers=2)
    request_id = rig.ask()
    rig.cascade.threshold = 0.5
    rig.run("small", 0.5)
    reply = rig.reply(request_id)
    (stage,) = reply.stages
    assert (reply.code, stage.model, stage.verdict) == (Code.OK, "small", Verdict.ACCEPTED)
    assert (stage.score, stage.threshold, stage.batch_size) == (0.5, 0.5, 1)
    assert (stage.queued_ns, stage.exec_ns) == (0, 2 * MS)
    assert stage.start_ns + stage.exec_ns <= stage.end_ns


@pytest.mark.parametrize("policy", ["INFER5", *ONE_CASCADE[:3]])
def test_a_bad_light_answer_goes_to_the_heavy_program(policy: str) -> None:
    rig = CascadeRig(policy, STATIC, workers=2)
    request_id = rig.ask()
    rig.cascade.threshold = 0.5
    rig.run("small", 0.25)
    assert not rig.answered(request_id)
    rig.run("large")
    light, heavy = rig.reply(request_id).stages
    assert [light.verdict, heavy.verdict] == [Verdict.DEFERRED, Verdict.HEAVY]
    assert (heavy.model, heavy.score, heavy.threshold) == ("large", 0.25, 0.5)
    assert heavy.queued_ns == light.end_ns and heavy.exec_ns == 20 * MS
    assert [(r.stage, r.answers) for r in rig.stage_records()] == [(0, False), (1, True)]


@pytest.mark.parametrize("policy", ["INFER5", "CASCADE"])
def test_where_the_heavy_program_cannot_be_in_time_the_light_answer_is_forced(policy: str) -> None:
    rig = CascadeRig(policy)
    request_id = rig.ask(slo_ms=15)
    rig.run("small", 0.25)
    reply = rig.reply(request_id)
    assert rig.verdicts(request_id) == [Verdict.FORCED] and reply.deadline_met
    assert (reply.stages[0].score, reply.stages[0].threshold) == (0.25, 0.5)


def test_what_waited_too_long_for_the_heavy_program_gets_its_light_answer() -> None:
    rig = CascadeRig("CASCADE", workers=2)
    _, request_id = rig.ask(slo_ms=100), rig.ask(slo_ms=60)
    rig.run("small", 0.25)
    rig.run("small", 0.25)
    # One GPU runs the first one's heavy stage, the other is kept for light work.
    assert [
        len(rig.scheduler.cluster.actions[i.action_id].requests) for i in rig.waiting("large")
    ] == [1]
    rig.step(45)
    reply = rig.reply(request_id)
    assert rig.verdicts(request_id) == [Verdict.DEFERRED, Verdict.INSTEAD]
    assert (reply.code, reply.deadline_met) == (Code.OK, True)
    in_vain = reply.stages[1]
    assert (in_vain.model, in_vain.start_ns, in_vain.exec_ns) == ("large", -1, 0)
    assert in_vain.batch_size == 0 and in_vain.score == 0.25


@pytest.mark.parametrize(("second", "verdict"), [(0.4, Verdict.OUTRANKED), (0.1, Verdict.INSTEAD)])
def test_what_only_lower_scores_went_before_is_outranked(second: float, verdict: Verdict) -> None:
    """Two are deferred, and only one of them is sent: the other waits in vain."""
    rig = CascadeRig("CASCADE", workers=2)
    ids = [rig.ask(slo_ms=100), rig.ask(slo_ms=42)]
    rig.run("small", 0.2)
    assert len(rig.waiting("large")) == 1
    rig.run("small", second)
    rig.step(40)
    assert rig.verdicts(ids[1]) == [Verdict.DEFERRED, Verdict.INSTEAD], "nothing since it waits"
    policy = rig.scheduler.policy
    sent = policy._sent  # type: ignore[attr-defined]
    third = rig.ask(slo_ms=42)
    rig.run("small", second)
    sent.append((rig.now_ns, 0.2))
    rig.step((rig.now_ns - T0) / MS + 25)
    assert rig.verdicts(third) == [Verdict.DEFERRED, verdict]


# -------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("scores", [(math.nan,), ()])
@pytest.mark.parametrize("policy", ["INFER5", "CASCADE"])
def test_a_judge_without_a_number_accepts_nothing(policy: str, scores: tuple[float, ...]) -> None:
    rig = CascadeRig(policy, workers=2)
    request_id = rig.ask()
    rig.run("small", *scores)
    rig.run("large")
    assert rig.verdicts(request_id) == [Verdict.DEFERRED, Verdict.HEAVY]
    assert [stage.score for stage in rig.reply(request_id).stages] == [-1, -1]


def test_each_request_of_a_batch_has_its_own_score() -> None:
    rig = CascadeRig()
    first = rig.ask()
    for _ in range(2):
        rig.infer(rig.pair, slo_ms=100)
    rig.step()
    rig.run("small", 0.9)
    infer = rig.waiting("small")[0]
    assert infer.batch_size == 2
    rig.run("small", 0.75, 0.25)
    assert rig.reply(first).stages[0].score == 0.9
    light = [r for r in rig.stage_records() if r.stage == 0]
    assert [(r.score, r.verdict) for r in light[1:]] == [
        (0.75, Verdict.ACCEPTED),
        (0.25, Verdict.DEFERRED),
    ]


def score_given(rig: CascadeRig, user_id: int, score: float = 0.123) -> float:
    request_id = rig.ask(user_id=user_id)
    rig.run("small", score)
    if not rig.answered(request_id):
        rig.run("large")
    return rig.reply(request_id).stages[0].score


def test_recorded_scores_are_looked_up_by_user_id() -> None:
    rig = CascadeRig(spec=pair(live_scores=False, recorded=(0.6, 0.7, 0.8)))
    assert [score_given(rig, user_id) for user_id in (1, 2, 3, 4, 1)] == [0.7, 0.8, 0.6, 0.7, 0.7]


def test_drawn_scores_belong_to_the_user_id() -> None:
    spec = pair(live_scores=False, seed=3)
    rig = CascadeRig(spec=spec)
    first = [score_given(rig, user_id) for user_id in (5, 6, 5)]
    assert first[0] == first[2] != first[1]
    assert first[0] == pytest.approx(uniform(3, 5)), "f(t) = t"
    again = CascadeRig(spec=spec)
    score_given(again, 77)
    assert score_given(again, 5) == first[0], "whatever came before"
    assert score_given(CascadeRig(spec=replace(spec, seed=4)), 5) != first[0]


def test_blind_scores_say_nothing_of_the_request() -> None:
    rig = CascadeRig(options=CascadeOptions(fixed_threshold=0.5, blind_scores=True, seed=1))
    drawn = [score_given(rig, 5, score=0.75) for _ in range(8)]
    assert len(set(drawn)) == 8 and 0.75 not in drawn
    assert {score < 0.5 for score in drawn} == {True, False}


def test_uniform_numbers_are_uniform() -> None:
    numbers = sorted(uniform(7, number) for number in range(4000))
    worst = max(abs(x - (place + 0.5) / 4000) for place, x in enumerate(numbers))
    assert numbers[0] >= 0 and numbers[-1] < 1 and worst < 1.63 / math.sqrt(4000)  # 1 %
    pairs = [(uniform(1, n) < 0.5, uniform(1, n + 1) < 0.5) for n in range(4000)]
    assert abs(sum(a == b for a, b in pairs) / 4000 - 0.5) < 0.03


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("policy", ONE_CASCADE)
def test_a_plain_models_request_is_refused_with_a_reason(policy: str) -> None:
    rig = CascadeRig(policy, STATIC)
    small = rig.load_named("small")
    request_id = rig.infer(small, slo_ms=100)
    rig.step()
    reply = rig.reply(request_id)
    assert reply.code == Code.INVALID_REQUEST
    assert reply.reason.startswith(f"{policy} serves the requests of one cascade alone")


@pytest.mark.parametrize("policy", ONE_CASCADE)
@pytest.mark.parametrize("count", [0, 2])
def test_a_policy_of_one_cascade_needs_exactly_one(policy: str, count: int) -> None:
    cascades = tuple(pair(name=f"pair{number}") for number in range(count))
    with pytest.raises(InvalidConfig, match=rf"{policy} serves one cascade.*given: {count}"):
        Rig(SchedulerConfig(policy=policy, cascades=cascades))


def test_cascades_of_one_name_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="a name of its own"):
        SchedulerConfig(cascades=(pair(), pair()))


@pytest.mark.parametrize("policy", ["INFER5", *ONE_CASCADE[:2]])
@pytest.mark.parametrize("stage", [0, 1])
def test_a_request_can_be_cancelled_in_either_stage(policy: str, stage: int) -> None:
    rig = CascadeRig(policy, workers=2)
    request_id = rig.ask()
    rig.cascade.threshold = 0.5
    if stage:
        rig.run("small", 0.25)
    rig.handle(FromClient(b"c", CancelRequest(request_id)))
    rig.step()
    assert rig.reply(request_id).code == Code.CANCELLED
    rig.run("large" if stage else "small", 0.25)
    assert rig.scheduler.answered == rig.scheduler.arrived == 1
    assert not rig.waiting("small") and not rig.waiting("large")
    rig.checker.recount()


@pytest.mark.parametrize("policy", ["INFER5", *ONE_CASCADE[:2]])
@pytest.mark.parametrize("queued", [False, True])
def test_a_client_that_goes_leaves_nothing_behind(policy: str, queued: bool) -> None:
    rig = CascadeRig(policy, workers=1)
    rig.cascade.threshold = 0.5
    for _ in range(4):
        rig.ask()
    rig.cascade.threshold = 0.5
    rig.run("small", 0.25)
    if queued:
        rig.handle(ClientLost(b"c"))
        rig.steps()
    while rig.waiting("small") or rig.waiting("large"):
        rig.run("small" if rig.waiting("small") else "large", 0.25, 0.25, 0.25)
        if not queued and rig.waiting("large"):
            rig.handle(ClientLost(b"c"))
            rig.steps()
            queued = True
    if not queued:
        rig.handle(ClientLost(b"c"))
        rig.steps()
    rig.checker.recount()
    assert rig.scheduler.answered == rig.scheduler.arrived == 4
    assert not any(m.queued for m in rig.scheduler.cluster.models.values())


# ----------------------------------------------------------------------------- what is lost


def lose(rig: CascadeRig, infer: Infer) -> None:
    """The worker of `infer` begins anew, with empty memory."""
    gpu = rig.scheduler.cluster.actions[infer.action_id].gpu
    worker_id = gpu.worker.worker_id
    rig.join_pair(worker_id, session=gpu.worker.session + 100)
    for _ in range(4):
        rig.prepare_all()


@pytest.mark.parametrize("policy", ["INFER5", *ONE_CASCADE[:2]])
@pytest.mark.parametrize("lost", ["small", "large"])
def test_a_worker_that_is_lost_in_either_stage_loses_no_request(policy: str, lost: str) -> None:
    rig = CascadeRig(policy, workers=2)
    request_id = rig.ask()
    rig.cascade.threshold = 0.5
    if lost == "large":
        rig.run("small", 0.25)
    lose(rig, rig.waiting(lost)[0])
    assert not rig.answered(request_id), "it is tried once more"
    rig.cascade.threshold = 0.5
    if lost == "small":
        rig.run("small", 0.25)
    rig.run("large")
    assert rig.verdicts(request_id) == [Verdict.DEFERRED, Verdict.HEAVY]
    assert rig.reply(request_id).attempts == 3


def test_after_a_second_try_in_the_light_stage_the_heavy_one_shares_its_batch() -> None:
    """It ran well in the end, so its next stage is an action like others; the checker agrees."""
    rig = CascadeRig(workers=2)
    rig.ask()
    lose(rig, rig.waiting("small")[0])
    rig.run("small", 0.25)
    busy = rig.waiting("large")[0]
    (key,) = [k for k, r in enumerate(rig.scheduler.cluster.actions[busy.action_id].requests)]
    request = rig.scheduler.cluster.actions[busy.action_id].requests[key]
    assert not request.tried_alone and request.stage == 1
    rig.run("large")
    assert rig.scheduler.answered == 1


def test_a_heavy_program_that_raises_leaves_the_light_answer() -> None:
    rig = CascadeRig()
    request_id = rig.ask()
    rig.run("small", 0.25)
    infer = rig.waiting("large")[0]
    rig.from_worker(an_error(infer.session, infer.action_id, Code.RUNTIME_ERROR, "it broke"))
    rig.step()
    reply = rig.reply(request_id)
    assert reply.code == Code.OK and "it broke" in reply.reason
    assert rig.verdicts(request_id) == [Verdict.DEFERRED, Verdict.INSTEAD]


def test_a_best_answer_brings_no_output_to_a_request_without_an_input() -> None:
    rig = CascadeRig(generate_inputs=True)
    request_id = rig.ask(slo_ms=30)
    rig.run("small", 0.25)
    rig.step(200)
    for effect in rig.effects:
        message = getattr(effect, "message", None)
        if isinstance(message, InferReply) and message.request_id == request_id:
            assert getattr(effect, "output", None) is None


@pytest.mark.parametrize("program", ["small", "large"])
@pytest.mark.parametrize("policy", ["INFER5", "CASCADE"])
def test_a_program_that_was_unloaded_and_loaded_again_serves(policy: str, program: str) -> None:
    rig = CascadeRig(policy, workers=2, operators=("c",))
    before = rig.scheduler.cluster.models.copy()
    rig.handle(FromClient(b"c", UnloadModelRequest(8_000, program, force=True)))
    rig.steps()
    assert not rig.cascade.ready
    request_id = rig.ask()
    assert rig.reply(request_id).code == Code.INVALID_REQUEST
    for at_ms in range(500, 2000, 250):
        rig.step(at_ms)
        rig.beat()
        rig.evict_all()
    rig.pair = rig.load_named("pair")
    after = {m.name: m for m in rig.scheduler.cluster.models.values()}
    assert rig.cascade.light is not None and rig.cascade.heavy is not None
    assert rig.cascade.light.instance is after["small"]
    assert rig.cascade.heavy.instance is after["large"]
    assert after[program] not in before.values(), "it is another instance"
    request_id = rig.ask()
    rig.run("small", 0.25)
    rig.run("large")
    assert rig.verdicts(request_id) == [Verdict.DEFERRED, Verdict.HEAVY]
