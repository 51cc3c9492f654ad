"""What follows when a stage of a request ends: its answer, or its next stage.

    QUEUED -> IN_FLIGHT --after()--> answered, with the output of this stage (Reply.OUTPUT)
                          |          or of an earlier one (Reply.BEST)
                          +--------> QUEUED, in the queue of its next stage (GoOn)

A queue's `after` decides, and sends nothing; a plain model has none, and its output is the answer. A request
with a best answer that comes too late for its rest gets that answer in place of a refusal (`best_instead`).
The answer of a cascade (cascades.py) says its stages as well.
"""

from __future__ import annotations

from collections.abc import Callable

from slosched.codes import Code, Verdict, code_name
from slosched.core.scheduler.actions.kind import Outcome
from slosched.core.scheduler.after import GoOn, Judgement, Reply
from slosched.core.scheduler.interface import Effect, Keep, StageDone, StageRecord
from slosched.core.scheduler.stage_ends import BestAnswer, StageEnd
from slosched.core.scheduler.state import ActionState, Request, RequestState
from slosched.core.values import Value
from slosched.messages import NO_SPAN, Span, StageReply

#: A request that ends with this was not one that could be asked. With any other code but its client's wish it
#: gets its best answer, if it has one: the rest did not fit, or failed.
_NO_ANSWER = Code.INVALID_REQUEST
_NOT_JUDGED = Judgement(Reply.OUTPUT, Verdict.NONE)


class Stages:
    """Moves requests from stage to stage. `enqueue` hands one to the policy, at its new queue; `keeps`
    counts the bytes of an output that is kept."""

    def __init__(
        self,
        emit: Callable[[Effect], None],
        enqueue: Callable[[Request, int], None],
        keeps: Callable[[Request, int], None],
    ) -> None:
        self._emit, self._enqueue, self._keeps = emit, enqueue, keeps

    def ended(
        self,
        request: Request,
        action: ActionState,
        outcome: Outcome,
        output: Value | None,
        scalars: tuple[float, ...],
        now_ns: int,
    ) -> Value | GoOn | None:
        """A stage of `request` ended with `output`. Return the value that answers it, or how it goes on."""
        after = request.queue.after
        follows = (
            Reply.OUTPUT if after is None else after(request, StageEnd(now_ns, output, scalars))
        )
        judged = _NOT_JUDGED
        if isinstance(follows, Judgement):
            judged, follows = follows, follows.follows
        goes_on = isinstance(follows, GoOn)
        if request.stage or goes_on or judged.verdict:
            answers = follows is Reply.OUTPUT
            record = _record(request, judged, now_ns, action, outcome.span, answers=answers)
            self._emit(StageDone(record))
            if judged.verdict:
                request.trail = (*request.trail, _stage_reply(request, record))
        if isinstance(follows, GoOn):
            return follows
        if follows is Reply.BEST and request.best_answer is not None:
            return request.best_answer.output
        return output

    def go_on(self, request: Request, goes: GoOn, output: Value | None, now_ns: int) -> None:
        """Put `request`, whose action has ended, into the queue of its next stage."""
        # A request that brought no input gets no output either.
        best = output if request.input is not None else None
        if goes.keeps_output:
            request.best_answer = BestAnswer(best, request.stage)
        if output is not None and (goes.passes_output or (goes.keeps_output and best is not None)):
            self._emit(Keep(output.value_id, request.key))
            self._keeps(request, output.size)
        request.brings = output if goes.passes_output else request.input
        request.stage += 1
        request.excused = request.attempts  # the tries of a stage are its own
        request.tried_alone = False  # what ended with a process before has run well now
        request.queued_ns = now_ns
        request.queue, request.instance = goes.queue, goes.queue.instance
        request.due_ns = request.deadline_ns - goes.queue.rest_ns
        request.move(RequestState.QUEUED)
        self._enqueue(request, now_ns)


def gave_up(request: Request, code: int, now_ns: int, *, answered: bool) -> StageRecord:
    """A deferred request of a cascade ends before its next stage has run: note that it waited for it in vain.

    `code` is what ended it; `answered` says that it gets its best answer.
    """
    before = request.trail[-1]
    if not answered:
        verdict = Verdict.UNANSWERED
    elif request.queue.by_score and code == Code.SKIPPED:
        verdict = Verdict.OUTRANKED
    else:
        verdict = Verdict.INSTEAD  # the clock decided
    judged = Judgement(Reply.BEST, verdict, before.score, before.threshold)
    record = _record(request, judged, now_ns)
    request.trail = (*request.trail, _stage_reply(request, record))
    return record


def best_instead(request: Request, code: int, reason: str) -> tuple[int, str, Value | None]:
    """Return (code, reason, output): of the request's best answer where `code` allows it, else as given."""
    best = request.best_answer
    if best is None or code == _NO_ANSWER:
        return code, reason, None
    text = f"answered by stage {best.stage}: stage {request.stage} ended with {code_name(code)}"
    return Code.OK, f"{text}: {reason}" if reason else text, best.output


def _stage_reply(request: Request, record: StageRecord) -> StageReply:
    """What the answer says of a stage."""
    arrival_ns = request.arrival_ns
    return StageReply(
        model=record.program,
        queued_ns=record.queued_ns - arrival_ns,
        start_ns=record.start_ns - arrival_ns if record.exec_ns else -1,
        exec_ns=record.exec_ns,
        end_ns=record.end_ns - arrival_ns,
        batch_size=record.batch_size,
        score=record.score,
        threshold=record.threshold,
        verdict=int(record.verdict),
        worker_id=record.worker_id,
        gpu_id=record.gpu_id,
    )


def _record(
    request: Request,
    judged: Judgement,
    now_ns: int,
    action: ActionState | None = None,
    span: Span = NO_SPAN,
    *,
    answers: bool = False,
) -> StageRecord:
    """The stage of `request` that ends now. It ran in `action` for `span`; without one it waited in vain."""
    gpu = None if action is None else action.gpu
    return StageRecord(
        key=request.key,
        request_id=request.request_id,
        user_id=request.user_id,
        stage=request.stage,
        model_id=request.instance.model_id,
        program=request.queue.program,
        queued_ns=request.queued_ns,
        due_ns=request.due_ns,
        # -1 in the log: it did not run.
        start_ns=request.queued_ns - 1 if action is None else span.begin_ns,
        exec_ns=span.duration_ns,
        end_ns=now_ns,
        batch_size=0 if action is None else len(action.requests),
        worker_id=-1 if gpu is None else gpu.worker.worker_id,
        gpu_id=-1 if gpu is None else gpu.gpu_id,
        answers=answers,
        verdict=judged.verdict,
        score=judged.score,
        threshold=judged.threshold,
        cascade=request.queue.cascade,
    )
