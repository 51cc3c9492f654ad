"""The stages of a cascade's request in words, as answers, `slosched explain` and traces have them."""

from __future__ import annotations

from slosched.codes import Verdict
from slosched.units import format_duration

_LIGHT_AFTER_ALL = frozenset({Verdict.INSTEAD, Verdict.OUTRANKED})
_IN_VAIN = _LIGHT_AFTER_ALL | {Verdict.UNANSWERED}
_HEAVY = _IN_VAIN | {Verdict.HEAVY, Verdict.BLIND_HEAVY}
_NO_ANSWER = _IN_VAIN | {Verdict.NONE, Verdict.DEFERRED}

#: What a verdict means, in a sentence.
MEANINGS: dict[int, str] = {
    Verdict.ACCEPTED: "The judge's score reached the threshold: the light answer.",
    Verdict.DEFERRED: "The score was below the threshold: the heavy program came next.",
    Verdict.FORCED: "The score was below it, but the heavy program could not be in time: the light answer.",
    Verdict.INSTEAD: "It was deferred, and the heavy program no longer fitted: the light answer.",
    Verdict.HEAVY: "The heavy program's answer.",
    Verdict.BLIND_LIGHT: "No judge was asked: the light answer.",
    Verdict.BLIND_HEAVY: "No judge was asked: the heavy program's answer.",
    Verdict.OUTRANKED: "It was deferred, and all that went before it scored lower: the light answer.",
    Verdict.UNANSWERED: "It was deferred, and got no answer: refused, dropped, failed or cancelled.",
}
_ENDINGS: dict[int, str] = {
    Verdict.FORCED: "forced, as the heavy program could not be in time",
    Verdict.INSTEAD: "the light answer instead, as it no longer fitted",
    Verdict.HEAVY: "the heavy answer",
    Verdict.BLIND_LIGHT: "the light answer, without a judge",
    Verdict.BLIND_HEAVY: "the heavy answer, without a judge",
    Verdict.OUTRANKED: "the light answer, as lower scores went first",
    Verdict.UNANSWERED: "no answer",
}


def verdict_name(verdict: int) -> str:
    """Return the verdict in words ("blind light"), or "verdict N" for an unknown number."""
    try:
        return Verdict(verdict).name.lower().replace("_", " ")
    except ValueError:
        return f"verdict {verdict}"


def is_heavy(verdict: int) -> bool:
    """True if a stage that ended so is the heavy one."""
    return verdict in _HEAVY


def stage_name(verdict: int, stage: int) -> str:
    """ "light" or "heavy", or the number of a stage (from 0) that is of no cascade."""
    if verdict == Verdict.NONE:
        return f"stage {stage}"
    return "heavy" if is_heavy(verdict) else "light"


def gives_light_after_all(verdict: int) -> bool:
    """True if a heavy stage ended without a run, and the light answer from before it is given."""
    return verdict in _LIGHT_AFTER_ALL


def gives_answer(verdict: int) -> bool:
    """True if the output of a stage that ended so is the answer."""
    return verdict not in _NO_ANSWER


def judged(score: float, threshold: float) -> str:
    """The judge's score and the threshold ("score 0.41 below 0.55"); empty where no judge was asked."""
    if threshold < 0:
        return ""
    if score < 0:
        return f"no score for the threshold {threshold:.2f}"
    digits = 2
    while f"{score:.{digits}f}" == f"{threshold:.{digits}f}" and digits < 6:
        digits += 1
    relation = "below" if score < threshold else "at or above"
    return f"score {score:.{digits}f} {relation} {threshold:.{digits}f}"


def ending(verdict: int, score: float, threshold: float) -> str:
    """How a stage ended, with the judge's score of a light one: "score 0.41 below 0.55: deferred".

    Empty for a stage that is of no cascade.
    """
    if verdict == Verdict.NONE:
        return ""
    end = _ENDINGS.get(verdict) or verdict_name(verdict)
    score_words = "" if is_heavy(verdict) else judged(score, threshold)
    return f"{score_words}: {end}" if score_words else end


def stage_words(
    verdict: int,
    *,
    name: str,
    queued_ns: int,
    start_ns: int | None,
    exec_ns: int,
    end_ns: int,
    batch_size: int,
    score: float,
    threshold: float,
) -> str:
    """A stage in a clause; `start_ns` is None of one that waited in vain.

    "light sd-turbo: waited 12ms, ran 100ms in a batch of 2, score 0.41 below 0.55: deferred"
    """
    if start_ns is None:
        waited = f"waited {format_duration(end_ns - queued_ns)} in vain"
    else:
        waited = (
            f"waited {format_duration(max(0, start_ns - queued_ns))}, ran {format_duration(exec_ns)} in a "
            f"batch of {batch_size}"
        )
    return ", ".join(filter(None, (f"{name}: {waited}", ending(verdict, score, threshold))))
