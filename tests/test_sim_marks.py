"""Whose answer was it? Marks in the simulator and the fuzzer, and bugs planted to see whether they notice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import pairwise

import pytest

from mutants import rewritten
from slosched.config import GpuProfile, ModelProfile, SchedulerConfig
from slosched.core.invariants import InvariantViolated
from slosched.core.scheduler.action_ends import ActionEnds
from slosched.core.scheduler.client_sessions import ClientSessions
from slosched.core.scheduler.interface import Effect, ToClient
from slosched.core.scheduler.scheduler import Scheduler
from slosched.core.scheduler.second_tries import SecondTries
from slosched.core.values import Value, ValueStore
from slosched.core.worker.emulated import MARK_BYTES, Echo
from slosched.sim.controller import SimController
from slosched.sim.faults import Fault, FaultPlan
from slosched.sim.fuzz import Outcome, run_case, run_seed
from slosched.sim.fuzz_case import SmallLoad, drawn_spec, with_plan
from slosched.sim.marks import Marks, Payload
from slosched.sim.run import simulate
from slosched.sim.spec import SimSpec
from slosched.units import NS_PER_MS, NS_PER_S
from slosched.workloads.base import ModelUse

#: A planted bug must be found among the first of the seeds.
FEW_SEEDS = 24

Plant = Callable[[pytest.MonkeyPatch], None]


# ------------------------------------------------------------------------------------ marks


def test_an_emulated_output_begins_as_its_input_did() -> None:
    echo = Echo()
    rows = [bytes(range(i, i + 40)) for i in (1, 2, 3)]
    echo.keep(7, [rows[0], memoryview(rows[1]), rows[2]])
    assert echo.take(7, [64, 0, 64, 4]) == [rows[0][:MARK_BYTES], rows[1][:MARK_BYTES], rows[2][:4]]
    assert echo.kept == 0
    echo.keep(8, rows)
    echo.drop(8)
    echo.drop(8)
    assert echo.kept == 0


def test_a_wrong_mark_is_told_with_both_requests_and_their_clients() -> None:
    asked: list[Sequence[int]] = []

    def story(request_ids: Sequence[int]) -> str:
        asked.append(request_ids)
        return "so it went"

    marks = Marks(story)
    mine, theirs = marks.input(b"me", 4, 100), marks.input(b"them", 9, 100)
    marks.compare(b"me", 4, [mine])
    marks.compare(b"me", 4, [Payload(mine.mark[:6], 6)])
    with pytest.raises(
        InvariantViolated, match=r"me got the output of them's request 9 for an"
    ) as e:
        marks.compare(b"me", 4, [theirs])
    assert "so it went" in str(e.value) and list(asked[-1]) == [4, 9]
    with pytest.raises(InvariantViolated, match="an output of no request"):
        marks.compare(b"me", 4, [Payload(b"", 100)])
    with pytest.raises(InvariantViolated, match="me got 2 outputs"):
        marks.compare(b"me", 4, [mine, mine])
    assert marks.compared == 5


def batches(*, inputs: bool = True, without_input: int = 3, duration_ns: int = NS_PER_S) -> SimSpec:
    """Requests for one model, eight at a time: batches of several."""
    exec_ns = {1: 2 * NS_PER_MS, 2: 3 * NS_PER_MS, 4: 4 * NS_PER_MS, 8: 6 * NS_PER_MS}
    model = ModelProfile("net", exec_ns, NS_PER_MS, 2**24, input_shape=(8,), output_shape=(8,))
    load = SmallLoad((ModelUse("net", 1),), (300.0,), 0, 100 * NS_PER_MS, bunch=8)
    return SimSpec(
        load,
        SchedulerConfig(),
        (GpuProfile("one", {"net": model}, 2**28),),
        gpus=2,
        inputs=inputs,
        without_input=without_input,
        duration_ns=duration_ns,
        check=True,
    )


def test_a_simulated_run_with_inputs_compares_each_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    compare = Marks.compare

    def noted(
        self: Marks, client: bytes, request_id: int, frames: Sequence[Payload], **more: bool
    ) -> None:
        compared.append(request_id)
        compare(self, client, request_id, frames, **more)

    monkeypatch.setattr(Marks, "compare", noted)
    result = simulate(batches())
    assert result.sent > 200 and result.satisfaction == 1.0
    assert len(compared) == len(set(compared)) == result.sent - result.sent // 3
    simulate(batches(inputs=False))
    assert len(compared) == result.sent - result.sent // 3, "nothing travels without inputs"


# --------------------------------------------------------------------------------- the fuzzer


def test_the_fuzzer_gets_into_what_is_hard() -> None:
    """Marks are compared, clients go while they have requests, and batches are lost with their workers."""
    seen: dict[str, int] = {}
    for seed in range(50):
        outcome = run_seed(seed)
        assert not outcome.failure, f"seed {seed}: {outcome.failure}"
        for name, count in asdict(outcome.sights).items():
            seen[name] = seen.get(name, 0) + count
    assert seen["marks_compared"] > 5_000 and seen["results_with_outputs"] > 2_000
    assert min(seen["left_by_goodbye"], seen["left_by_a_break"], seen["left_in_silence"]) > 50
    assert seen["second_tries"] > 5
    assert seen["infers_lost"] > 20 and seen["batches_lost"] > 10
    assert seen["unloads"] > 5 and seen["unloaded"] > 5


def test_cases_have_requests_with_and_without_inputs_and_several_clients() -> None:
    specs = [drawn_spec(seed) for seed in range(200)]
    with_inputs = [spec for spec in specs if spec.inputs]
    assert 100 < len(with_inputs) < 180
    assert sum(spec.without_input > 0 for spec in with_inputs) > 50
    assert sum(spec.scheduler.generate_inputs for spec in with_inputs) > 10
    loads = [spec.workload for spec in specs if isinstance(spec.workload, SmallLoad)]
    assert sum(len(load.guests) > 0 for load in loads) > 100
    assert sum(load.bunch > 1 for load in loads) > 50
    guests = [guest for load in loads for guest in load.guests]
    assert sum(guest.unloads_ns >= 0 for guest in guests) > 40
    assert sum(guest.force for guest in guests) > 15
    assert sum(guest.copies > 1 for guest in guests) > 25


# ------------------------------------------------------------------------------- planted bugs


def first_output_for_all(patch: pytest.MonkeyPatch) -> None:
    rewritten(patch, ActionEnds, "_answer_all", "outputs[taken]", "outputs[0]")


def outputs_reversed(patch: pytest.MonkeyPatch) -> None:
    rewritten(
        patch, SimController, "_take_frames", "for frame in frames", "for frame in frames[::-1]"
    )


def index_by_place(patch: pytest.MonkeyPatch) -> None:
    rewritten(
        patch,
        ActionEnds,
        "_answer_all",
        "outputs[taken] if taken < len(outputs)",
        "outputs[place] if place < len(outputs)",
    )


def outputs_of_two_clients_swapped(patch: pytest.MonkeyPatch) -> None:
    schedule = Scheduler.schedule

    def swapping(self: Scheduler, *, now_ns: int) -> list[Effect]:
        effects = schedule(self, now_ns=now_ns)
        places = [
            i for i, e in enumerate(effects) if isinstance(e, ToClient) and e.output is not None
        ]
        for a, b in pairwise(places):
            one, other = effects[a], effects[b]
            assert isinstance(one, ToClient) and isinstance(other, ToClient)
            if one.client != other.client:
                effects[a] = ToClient(one.client, one.message, other.output)
                effects[b] = ToClient(other.client, other.message, one.output)
        return effects

    patch.setattr(Scheduler, "schedule", swapping)


def answer_to_another_client(patch: pytest.MonkeyPatch) -> None:
    schedule = Scheduler.schedule

    def misdirecting(self: Scheduler, *, now_ns: int) -> list[Effect]:
        effects = schedule(self, now_ns=now_ns)
        clients = list(self.clients)
        for place, effect in enumerate(effects):
            if isinstance(effect, ToClient) and effect.output is not None and len(clients) > 1:
                other = next(c for c in clients if c != effect.client)
                effects[place] = ToClient(other, effect.message, effect.output)
        return effects

    patch.setattr(Scheduler, "schedule", misdirecting)


def latest_input_for_all(patch: pytest.MonkeyPatch) -> None:
    def inputs(
        self: ValueStore[Payload], values: Sequence[Value | None], sizes: Sequence[int]
    ) -> list[Payload]:
        latest = list(self._kept.values())[-1:]
        return [
            (latest[0] if latest and len(latest[0]) == size else self._made_of(size))
            for size in sizes
            if size
        ]

    patch.setattr(ValueStore, "inputs", inputs)


def output_of_another_action(patch: pytest.MonkeyPatch) -> None:
    get = ValueStore.get

    def another(self: ValueStore[Payload], value: Value | None) -> list[Payload]:
        if value is None or value.value_id not in self._passing:
            return get(self, value)
        others = [frame for i, frame in self._passing.items() if i != value.value_id]
        return others[:1] or get(self, value)

    patch.setattr(ValueStore, "get", another)


def input_dropped_when_sent(patch: pytest.MonkeyPatch) -> None:
    def get(self: ValueStore[Payload], value: Value | None) -> list[Payload]:
        if value is None:
            return []
        frames = [self._passing.get(value.value_id), self._kept.get(value.value_id)]
        if value.value_id in self._kept:
            self._kept[value.value_id] = None  # type: ignore[assignment]
        return [frame for frame in frames if frame is not None]

    patch.setattr(ValueStore, "get", get)


def output_lost(patch: pytest.MonkeyPatch) -> None:
    get = ValueStore.get

    def lost(self: ValueStore[Payload], value: Value | None) -> list[Payload]:
        passing = value is not None and value.value_id in self._passing
        return [] if passing else get(self, value)

    patch.setattr(ValueStore, "get", lost)


def inputs_kept_for_ever(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ValueStore, "release", lambda self, owner: None)


def inputs_of_failed_actions_kept(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Echo, "drop", lambda self, action_id: None)


def requests_of_who_left_kept(patch: pytest.MonkeyPatch) -> None:
    rewritten(
        patch,
        ClientSessions,
        "_leave",
        "while client.requests:",
        "while False:",
    )


def all_but_one_of_a_lost_batch_forgotten(patch: pytest.MonkeyPatch) -> None:
    rewritten(
        patch,
        SecondTries,
        "process_ended",
        "for request in action.requests:",
        "for request in action.requests[:1]:",
    )


MIX_UPS: list[Plant] = [
    first_output_for_all,
    outputs_reversed,
    index_by_place,
    outputs_of_two_clients_swapped,
    answer_to_another_client,
    latest_input_for_all,
    output_of_another_action,
    output_lost,
]
FORGOTTEN: list[Plant] = [
    inputs_kept_for_ever,
    requests_of_who_left_kept,
    all_but_one_of_a_lost_batch_forgotten,
]


def first_failure() -> Outcome:
    for seed in range(FEW_SEEDS):
        outcome = run_seed(seed)
        if outcome.failure:
            return outcome
    raise AssertionError(f"nothing was noticed in {FEW_SEEDS} seeds")


@pytest.mark.parametrize("plant", MIX_UPS, ids=lambda plant: plant.__name__)
def test_the_fuzzer_notices_whose_answer_it_was(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    failure = first_failure().failure
    assert (
        "got the output of" in failure
        or "got an output of no request" in failure
        or ("got no output for its request" in failure or "is answered more often" in failure)
    )


@pytest.mark.parametrize("plant", FORGOTTEN, ids=lambda plant: plant.__name__)
def test_the_fuzzer_notices_what_is_forgotten_or_kept(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    first_failure()


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (input_dropped_when_sent, "got an output of no request"),
        (inputs_of_failed_actions_kept, "inputs of ended actions"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_it_notices_what_goes_wrong_at_a_second_try_alone(
    plant: Plant, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Infers come too late, and fail: their requests are planned anew, with the same inputs."""
    plant(monkeypatch)
    failures = []
    for seed in range(FEW_SEEDS):
        spec = drawn_spec(seed, policy="INFER5")
        late = [
            Fault(
                "late",
                f"to worker {w}",
                NS_PER_S + w * 3 * NS_PER_MS,
                2 * NS_PER_S,
                probability=0.1,
                by_ns=100 * NS_PER_MS,
            )
            for w in range(len(spec.worker_profiles()))
        ]
        failures.append(run_case(seed, with_plan(spec, FaultPlan(tuple(late)))).failure)
        if words in failures[-1]:
            return
    raise AssertionError(f"not noticed: {failures}")


@pytest.mark.parametrize(
    "plant", [first_output_for_all, outputs_reversed, index_by_place], ids=lambda p: p.__name__
)
def test_a_plain_simulation_notices_it_too_and_tells_the_story(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises(InvariantViolated, match=r"client got .*output.* request \d+") as caught:
        simulate(batches())
    assert "sent in action" in str(caught.value) and "answered 0" in str(caught.value)


def test_a_case_without_faults_is_noticed_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    first_output_for_all(monkeypatch)
    spec = replace(batches(duration_ns=60 * NS_PER_S), faults=FaultPlan())
    assert "client got the output of client's request" in run_case(0, spec).failure
    plain = with_plan(replace(spec, inputs=False), FaultPlan())
    assert not run_case(0, plain).failure, "without inputs there is nothing to mix up"
