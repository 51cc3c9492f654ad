"""Requests with more than one stage: going on, the best answer, due dates, and the file of stages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from made_messages import an_infer_result
from scheduler_rig import EXEC_MS, MS, T0, Rig
from slosched.codes import Code
from slosched.core.scheduler.after import GoOn, Reply
from slosched.core.scheduler.interface import FromWorker, Keep, StageDone, StageRecord, ToClient
from slosched.core.scheduler.stage_ends import StageEnd
from slosched.core.scheduler.state import After, Instance, Queue, Request
from slosched.core.values import Value
from slosched.messages import Infer, InferReply, ModelInfo, Span
from slosched.sim.fuzz_case import SmallLoad
from slosched.sim.run import simulate
from slosched.sim.run_files import RunFiles
from slosched.telemetry.stage_log import read_stage_log
from slosched.workloads.base import ModelUse
from test_sim_marks import batches

_REST_MS = 8


def two_stages(after: After, *, shape: tuple[int, ...] = ()) -> tuple[Rig, Queue, Queue]:
    """A light model "net" whose requests go on to a second instance of it when `after` says so."""
    rig = Rig()
    rig.hello()
    rig.join()
    light, heavy = (rig.scheduler.cluster.models[m.model_id] for m in rig.load(copies=2))
    light.queue.after = after
    light.queue.rest_ns = _REST_MS * MS
    return rig, light.queue, heavy.queue


def go_to(queue: list[Queue], *, keeps: bool = True, passes: bool = False) -> After:
    def after(request: Request, end: StageEnd) -> Reply | GoOn:
        return GoOn(queue[0], keeps_output=keeps, passes_output=passes)

    return after


def run_last(rig: Rig) -> None:
    """Report the last Infer that was sent as run by now."""
    infer = rig.to_worker(Infer)[-1]
    begin_ms = (rig.now_ns - T0) / MS
    rig.now_ns += round(EXEC_MS[infer.batch_size] * MS)
    rig.finish(infer, begin_ms=begin_ms)
    rig.step()


def ask(rig: Rig, queue: Queue, slo_ms: float) -> int:
    info: ModelInfo = queue.instance.info()
    return rig.infer(info, slo_ms=slo_ms)


def test_a_request_goes_on_to_its_next_stage_and_is_answered_there() -> None:
    heavy: list[Queue] = []
    rig, light, second = two_stages(go_to(heavy))
    heavy.append(second)
    request_id = ask(rig, light, 100)
    rig.step()
    (first,) = rig.to_worker(Infer)
    assert first.model_id == light.instance.model_id
    run_last(rig)
    last = rig.to_worker(Infer)[-1]
    assert last.model_id == second.instance.model_id and not rig.to_client(InferReply)
    run_last(rig)
    (reply,) = rig.to_client(InferReply)
    assert (reply.request_id, reply.code, reply.attempts) == (request_id, Code.OK, 2)
    records = [e.record for e in rig.effects if isinstance(e, StageDone)]
    assert [(r.stage, r.answers) for r in records] == [(0, False), (1, True)]
    assert [r.model_id for r in records] == [0, 1]


def test_a_request_is_due_that_much_earlier_as_its_rest_takes() -> None:
    rig, light, _ = two_stages(lambda request, end: Reply.OUTPUT)
    ask(rig, light, 50)
    (request,) = light.requests or [
        r for a in rig.scheduler.cluster.actions.values() for r in a.requests
    ]
    assert request.deadline_ns - request.due_ns == _REST_MS * MS


def test_only_the_deadline_makes_a_request_hopeless() -> None:
    """A light answer that fits is given, although the rest would not fit."""
    rig, light, _ = two_stages(lambda request, end: Reply.OUTPUT)
    ask(rig, light, 6)  # less than the rest
    rig.step()
    run_last(rig)
    (reply,) = rig.to_client(InferReply)
    assert (reply.code, reply.deadline_met) == (Code.OK, True)


def test_what_cannot_go_on_in_time_gets_its_best_answer() -> None:
    heavy: list[Queue] = []
    rig, light, second = two_stages(go_to(heavy))
    heavy.append(second)
    ask(rig, light, 4)
    rig.step()
    run_last(rig)
    (reply,) = rig.to_client(InferReply)
    assert reply.code == Code.OK and reply.deadline_met
    assert reply.reason.startswith("answered by stage 0: stage 1 ended with")


def test_the_output_of_a_stage_lives_until_its_request_is_answered_with_it() -> None:
    heavy: list[Queue] = []
    rig, light, second = two_stages(go_to(heavy, passes=True))
    heavy.append(second)
    info: ModelInfo = light.instance.info()
    rig.infer(info, slo_ms=4, shape=(4,), dtype="float32", input_bytes=16)
    rig.step()
    infer = rig.to_worker(Infer)[-1]
    rig.now_ns += round(EXEC_MS[1] * MS)
    span = Span(rig.now_ns - round(EXEC_MS[1] * MS), rig.now_ns, round(EXEC_MS[1] * MS))
    result = an_infer_result(
        infer.session, infer.action_id, span, received_ns=T0, sent_ns=rig.now_ns, output_sizes=(16,)
    )
    output = Value(99, 16)
    rig.handle(FromWorker(0, result, (output,)))
    rig.step()
    (answer,) = [e for e in rig.effects if isinstance(e, ToClient) and e.output is not None]
    assert answer.output == output, "too late for its rest: the best answer, and its own"
    (record,) = [e.record for e in rig.effects if isinstance(e, StageDone)]
    kept = [e.owner for e in rig.effects if isinstance(e, Keep) and e.value_id == 99]
    assert kept == [record.key]


def test_without_a_best_answer_it_is_refused() -> None:
    heavy: list[Queue] = []
    rig, light, second = two_stages(go_to(heavy, keeps=False))
    heavy.append(second)
    ask(rig, light, 4)
    rig.step()
    run_last(rig)
    (reply,) = rig.to_client(InferReply)
    assert reply.code == Code.TIMED_OUT or reply.code == Code.COULD_NOT_START_IN_TIME


@pytest.mark.parametrize(("slo_ms", "seen"), [(6, {0}), (100, {0, 1})])
def test_under_load_each_request_gets_its_own_answer_through_both_stages(
    slo_ms: int, seen: set[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The light stage's output is the heavy one's input: a mark that comes back went through both.

    The simulated client compares the mark of every answer with its request's.
    """
    copies: dict[int, Instance] = {}
    made = Instance.__post_init__

    def after(request: Request, end: StageEnd) -> Reply | GoOn:
        if request.instance.copy or len(copies) < 2:
            return Reply.OUTPUT
        return GoOn(copies[1].queue, passes_output=True)

    def noted(instance: Instance) -> None:
        made(instance)
        copies[instance.copy] = instance
        instance.queue.after = after

    monkeypatch.setattr(Instance, "__post_init__", noted)
    spec = batches(without_input=0)
    load = SmallLoad((ModelUse("net", 2),), (300.0,), 0, slo_ms * MS, bunch=8)
    result = simulate(replace(spec, workload=load), out=tmp_path / "run")
    stages = read_stage_log(tmp_path / "run" / "stages.tsv")
    assert result.complete and sum(step.sent for step in result.steps) > 200
    assert set(stages["stage"].tolist()) == seen, "with 6 ms the rest never fits: the best answers"


def test_a_stage_log_is_made_for_requests_of_several_stages_alone(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    files.close()
    assert not (tmp_path / "stages.tsv").exists()
    (tmp_path / "staged").mkdir()
    files = RunFiles(tmp_path / "staged")
    record = StageRecord(
        key=1,
        request_id=2,
        user_id=3,
        stage=1,
        model_id=4,
        program="net",
        queued_ns=T0,
        due_ns=T0 + 5,
        start_ns=T0 + 6,
        exec_ns=7,
        end_ns=T0 + 20,
        batch_size=8,
        worker_id=9,
        gpu_id=10,
        answers=True,
        cascade="one, two",
    )
    files.on_stage(record)
    assert files.close()["stage_rows"] == 1
    table = read_stage_log(tmp_path / "staged" / "stages.tsv")
    (row,) = zip(*(column.tolist() for column in table.columns.values()), strict=True)
    assert row == (T0 + 20, 2, 3, 1, 4, 20, 5, 6, 7, 8, 9, 10, 1, 0, -1.0, -1.0, "one, two")
