"""What an answer of a cascade says of its stages: in words, as properties, and as JSON."""

from __future__ import annotations

import json

import msgspec
import pytest

from fake_controller import model_info
from slosched.clients.inference import Inference, Model
from slosched.clients.one_shot import OneShot
from slosched.codes import Code, Verdict
from slosched.messages import InferReply, StageReply
from slosched.verdicts import MEANINGS, judged, stage_words, verdict_name

MS = 1_000_000
LIGHT = StageReply(
    "sd-turbo", 0, 12 * MS, 100 * MS, 113 * MS, 2, 0.41, 0.55, int(Verdict.DEFERRED), 0, 1
)
HEAVY = StageReply(
    "sd-v1-5", 113 * MS, 513 * MS, 1800 * MS, 2314 * MS, 4, 0.41, 0.55, int(Verdict.HEAVY), 2, 0
)
IN_VAIN = StageReply("sd-v1-5", 113 * MS, -1, 0, 1013 * MS, 0, 0.41, 0.55, int(Verdict.INSTEAD))


def answer(*stages: StageReply, code: Code = Code.OK) -> Inference:
    reply = InferReply(
        1,
        int(code),
        "",
        7,
        5000 * MS,
        2315 * MS,
        code == Code.OK,
        batch_size=4,
        worker_id=2,
        gpu_id=0,
        stages=stages,
    )
    return Inference(Model(model_info(7), 1), {}, reply, 2_316 * MS)


def test_an_answer_tells_the_story_of_its_stages_in_one_line() -> None:
    assert answer(LIGHT, HEAVY).explain() == (
        "ok after 2.31s of 5s; 2.69s left until the deadline; "
        "light sd-turbo on worker 0 GPU 1: waited 12ms, ran 100ms in a batch of 2, "
        "score 0.41 below 0.55: deferred; "
        "heavy sd-v1-5 on worker 2 GPU 0: waited 400ms, ran 1.8s in a batch of 4, the heavy answer"
    )


def test_a_stage_that_waited_in_vain_is_not_the_one_that_answers() -> None:
    given = answer(LIGHT, IN_VAIN)
    assert given.answered_by == LIGHT and given.verdict == "instead"
    assert "heavy sd-v1-5: waited 900ms in vain, the light answer instead" in given.explain()


def test_a_deferred_request_without_an_answer_says_how_long_it_waited() -> None:
    lost = msgspec.structs.replace(IN_VAIN, verdict=int(Verdict.UNANSWERED))
    given = answer(LIGHT, lost, code=Code.TIMED_OUT)
    assert given.answered_by is None and given.verdict == "unanswered"
    assert given.explain().endswith("heavy sd-v1-5: waited 900ms in vain, no answer")


@pytest.mark.parametrize(
    ("given", "by"),
    [
        (answer(LIGHT, HEAVY), HEAVY),
        (answer(LIGHT, code=Code.TIMED_OUT), None),
        (answer(LIGHT, IN_VAIN, code=Code.CANCELLED), None),
        (answer(LIGHT), None),
        (answer(), None),
    ],
)
def test_an_answer_names_the_stage_that_it_is_from(given: Inference, by: StageReply | None) -> None:
    assert given.answered_by == by


def test_score_and_threshold_are_none_where_no_judge_was_asked() -> None:
    blind = StageReply("sd-turbo", 0, 0, MS, MS, 1, -1.0, -1.0, int(Verdict.BLIND_LIGHT))
    assert (answer(blind).score, answer(blind).threshold) == (None, None)
    assert (answer(LIGHT, HEAVY).score, answer(LIGHT, HEAVY).threshold) == (0.41, 0.55)
    assert answer(blind).explain().count("without a judge") == 1
    assert (answer().score, answer().stages, answer().verdict) == (None, (), "")


def test_the_json_of_an_answer_names_stages_and_verdicts() -> None:
    document = json.loads(json.dumps(OneShot(answer(LIGHT, IN_VAIN), ()).as_dict()))
    light, heavy = document["stages"]
    assert light == {
        "stage": "light",
        "model": "sd-turbo",
        "verdict": "deferred",
        "score": 0.41,
        "threshold": 0.55,
        "queued_ns": 0,
        "start_ns": 12 * MS,
        "exec_ns": 100 * MS,
        "end_ns": 113 * MS,
        "batch_size": 2,
        "worker_id": 0,
        "gpu_id": 1,
    }
    assert (heavy["stage"], heavy["verdict"], heavy["exec_ns"]) == ("heavy", "instead", 0)
    assert (heavy["worker_id"], heavy["gpu_id"]) == (-1, -1)
    assert OneShot(answer(), ()).as_dict()["stages"] == []


def test_every_verdict_has_a_meaning_and_a_clause() -> None:
    assert set(MEANINGS) == {int(verdict) for verdict in Verdict} - {Verdict.NONE}
    for verdict in MEANINGS:
        said = stage_words(
            verdict,
            name="it",
            queued_ns=0,
            start_ns=1,
            exec_ns=1,
            end_ns=2,
            batch_size=1,
            score=0.5,
            threshold=0.25,
        )
        assert said.startswith("it: waited 1ns, ran 1ns in a batch of 1, ") and len(said) < 120
    assert verdict_name(99) == "verdict 99" and verdict_name(Verdict.BLIND_HEAVY) == "blind heavy"


def test_a_score_near_the_threshold_has_as_many_digits_as_tell_them_apart() -> None:
    assert judged(0.5, 0.25) == "score 0.50 at or above 0.25"
    assert judged(0.5461, 0.5462) == "score 0.5461 below 0.5462"
    assert judged(0.5, 0.5).endswith("at or above 0.500000")
    assert judged(-1, 0.5) == "no score for the threshold 0.50" and judged(-1, -1) == ""
