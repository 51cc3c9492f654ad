"""Random clusters that serve cascades under random faults: nothing breaks, and service comes back."""

from __future__ import annotations

from itertools import islice

import msgspec
import pytest

from cascade_rig import CascadeRig, pair
from slosched.codes import Code, Verdict
from slosched.core.invariants import InvariantViolated
from slosched.core.scheduler import stages
from slosched.core.scheduler.policies import CASCADE_POLICIES
from slosched.messages import InferReply, StageReply
from slosched.sim.fuzz import run_seed
from slosched.sim.fuzz_case import SmallLoad, drawn_spec
from slosched.sim.spec import SimSpec
from slosched.sim.stage_truth import what_is_wrong

_SEEDS = 5
#: Seeds whose case under INFER5 has outputs that go on, two cascades, guests that ask one, or lengths.
_BESIDE = (2, 3, 6, 13)


@pytest.mark.parametrize("policy", CASCADE_POLICIES)
@pytest.mark.parametrize("seed", range(_SEEDS))
def test_a_cascade_survives_the_faults_of_a_seed(policy: str, seed: int) -> None:
    outcome = run_seed(seed, policy=policy)
    assert not outcome.failure
    assert outcome.sent > 0


def test_a_light_batch_does_not_interrupt_another_one() -> None:
    """The process of the program ended under the one, and took the weights of the other away."""
    outcome = run_seed(16, policy="CASCADE")
    assert outcome.spec.scheduler.preempt
    assert not outcome.failure and outcome.sent > 0


@pytest.mark.parametrize("seed", _BESIDE)
def test_cascades_beside_plain_models_survive_the_faults_of_a_seed(seed: int) -> None:
    outcome = run_seed(seed, policy="INFER5")
    assert outcome.spec.scheduler.cascades
    assert not outcome.failure
    assert outcome.sent > 0


# ------------------------------------------------------------------------------------ the cases


def test_cases_of_every_kind_are_drawn() -> None:
    specs = [drawn_spec(seed, policy="INFER5") for seed in range(200)]
    some = [spec for spec in specs if spec.scheduler.cascades]
    assert 40 < len(some) < 80
    two = [spec.scheduler.cascades for spec in some if len(spec.scheduler.cascades) == 2]
    assert len(two) > 10
    assert sum(a.light == b.light and a.heavy != b.heavy for a, b in two) > 2
    assert sum(a.light != b.light and a.heavy == b.heavy for a, b in two) > 2
    assert sum(spec.scheduler.cascades[0].passes_output for spec in some) > 4
    loads = [load for spec in some if isinstance(load := spec.workload, SmallLoad)]
    assert sum(load.lengths is not None for load in loads) > 5
    names = {name for spec in some for name in cascades_of(spec)}
    asked = [guest for load in loads for guest in load.guests if guest.model in names]
    assert len(asked) > 10 and not any(guest.force and guest.name == "guest 0" for guest in asked)
    others = [drawn_spec(seed, policy="FIFO") for seed in range(20)]
    assert not any(spec.scheduler.cascades for spec in others)


def cascades_of(spec: SimSpec) -> list[str]:
    return [cascade.name for cascade in spec.scheduler.cascades]


# -------------------------------------------------------------------------- what they are held to

LIGHT = StageReply("small", 0, 1, 5, 10, 1, 0.25, 0.5, int(Verdict.DEFERRED), 0, 0)
HEAVY = StageReply("large", 10, 20, 5, 30, 1, 0.25, 0.5, int(Verdict.HEAVY), 0, 0)


def reply(*stages: StageReply, code: Code = Code.OK, latency_ns: int = 30) -> InferReply:
    return InferReply(1, int(code), "", 0, 100, latency_ns, code == Code.OK, stages=stages)


def test_a_right_answer_has_nothing_wrong() -> None:
    lost = msgspec.structs.replace(
        HEAVY, exec_ns=0, start_ns=-1, batch_size=0, worker_id=-1, gpu_id=-1, verdict=9
    )
    assert what_is_wrong(reply(LIGHT, HEAVY), pair()) == ""
    assert what_is_wrong(reply(LIGHT, lost, code=Code.TIMED_OUT), pair()) == ""
    assert what_is_wrong(reply(code=Code.TIMED_OUT), pair()) == ""
    assert what_is_wrong(reply(), None) == ""


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        (reply(), "its code is 0"),
        (reply(LIGHT), "its stages ended deferred"),
        (reply(HEAVY, LIGHT), "its stages ended heavy, deferred"),
        (reply(LIGHT, HEAVY, code=Code.TIMED_OUT), "its code is 4"),
        (reply(LIGHT, HEAVY, latency_ns=31), "last from 0 to 30 of 31 ns"),
        (reply(LIGHT, msgspec.structs.replace(HEAVY, queued_ns=11)), "does not wait from the end"),
        (
            reply(LIGHT, msgspec.structs.replace(HEAVY, model="small")),
            "is of 'small', not of 'large'",
        ),
        (reply(LIGHT, msgspec.structs.replace(HEAVY, worker_id=-1)), "alike whether a stage ran"),
    ],
)
def test_a_wrong_answer_is_noticed(given: InferReply, wrong: str) -> None:
    assert wrong in what_is_wrong(given, pair())


def test_stages_of_a_plain_models_answer_are_noticed() -> None:
    assert what_is_wrong(reply(LIGHT, HEAVY), None) == "a plain model's answer has 2 stages"


def test_a_stage_that_does_not_follow_the_one_before_it_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = CascadeRig("INFER5", workers=1)
    rig.ask()
    rig.run("small", 0.25)
    made = stages._record

    def late(*args: object, **more: object) -> object:
        record = made(*args, **more)  # type: ignore[arg-type]
        return msgspec.structs.replace(record, queued_ns=record.queued_ns + 1)

    monkeypatch.setattr(stages, "_record", late)
    with pytest.raises(InvariantViolated, match="was to end next"):
        rig.run("large")


def test_a_deferred_request_without_an_end_of_its_heavy_stage_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The fuzzer finds it: a request is refused, and no row says what it waited for."""
    monkeypatch.setattr("slosched.core.scheduler.scheduler.StageDone", _Unseen)
    failures = (run_seed(seed, policy="INFER5").failure for seed in _BESIDE)
    assert any("has no end" in failure for failure in islice(failures, len(_BESIDE)))


class _Unseen:
    """An effect that no shell and no checker knows."""

    def __init__(self, record: object) -> None:
        self.record = record
