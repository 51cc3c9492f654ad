"""What an answer may say of the stages of its request, whatever the policy."""

from __future__ import annotations

from itertools import pairwise

from slosched.cascade_spec import CascadeSpec
from slosched.codes import Code, Verdict
from slosched.message_types import StageReply
from slosched.messages import InferReply
from slosched.verdicts import is_heavy, verdict_name

_AT_ONCE = (Verdict.ACCEPTED, Verdict.FORCED, Verdict.BLIND_LIGHT, Verdict.BLIND_HEAVY)
_IN_VAIN = (Verdict.INSTEAD, Verdict.OUTRANKED, Verdict.UNANSWERED)
_AFTER_DEFERRED = (Verdict.HEAVY, *_IN_VAIN)
#: How the stages of a request may end, in order. A request that ended before its first stage did has none.
_STORIES = {
    (),
    *((int(end),) for end in _AT_ONCE),
    *((int(Verdict.DEFERRED), int(end)) for end in _AFTER_DEFERRED),
}


def what_is_wrong(reply: InferReply, cascade: CascadeSpec | None) -> str:
    """What is wrong with the stages of `reply`; "" if nothing is. `cascade` is None of a plain model."""
    stages = reply.stages
    if cascade is None:
        return f"a plain model's answer has {len(stages)} stages" if stages else ""
    story = tuple(stage.verdict for stage in stages)
    if story not in _STORIES:
        return f"its stages ended {', '.join(map(verdict_name, story))}"
    if (reply.code == Code.OK) != (bool(story) and story[-1] != Verdict.UNANSWERED):
        return (
            f"its code is {reply.code}, and its stages ended {', '.join(map(verdict_name, story))}"
        )
    if not stages:
        return ""
    if stages[0].queued_ns or stages[-1].end_ns != reply.latency_ns:
        return f"its stages last from {stages[0].queued_ns} to {stages[-1].end_ns} of {reply.latency_ns} ns"
    if any(before.end_ns != after.queued_ns for before, after in pairwise(stages)):
        return f"a stage does not wait from the end of the one before it on: {stages}"
    return next(filter(None, (_wrong_stage(stage, cascade) for stage in stages)), "")


def _wrong_stage(stage: StageReply, cascade: CascadeSpec) -> str:
    program = (cascade.heavy if is_heavy(stage.verdict) else cascade.light).model
    if stage.model != program:
        return f"its stage {verdict_name(stage.verdict)} is of {stage.model!r}, not of {program!r}"
    ran = stage.verdict not in _IN_VAIN
    if {stage.exec_ns > 0, stage.batch_size > 0, stage.worker_id >= 0, stage.gpu_id >= 0} != {ran}:
        return f"it does not say alike whether a stage ran: {stage}"
    return ""
