"""Why a request of a finished run ended as it did: what the run's logs say of it, in words.

The reason and the predictions come from `request_reasons.jsonl`, which has every request that the controller
did not answer in time; the request log and the client's log say the rest. Requests are named by the client's
number, which two clients may both use, so one number may stand for several.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from slosched.analysis.runs import find_log
from slosched.analysis.stage_rows import read_stages
from slosched.codes import Code, code_name
from slosched.errors import InvalidConfig
from slosched.telemetry import client_log, reason_log, request_log
from slosched.telemetry.client_log import NO_ANSWER
from slosched.telemetry.reason_log import Reason
from slosched.telemetry.table import LogTable
from slosched.units import format_duration

#: Limit of requests shown for one number; a number that more clients share says little.
MOST_TOLD = 20

_REQUEST_COLUMNS = (
    "t",
    "request_id",
    "result",
    "model_id",
    "user_id",
    "latency",
    "deadline",
    "deadline_met",
    "is_coldstart",
    "arrival_count",
)

_SCARCE = "add GPUs, allow more time, or send less (docs/planning.md)."
_ADVICE = {
    Code.CANCELLED: "Its client gave it up, or its worker went away and no other could be in time.",
    Code.RUNTIME_ERROR: "The model itself failed; the reason quotes it.",
    Code.SHUTTING_DOWN: "The controller was ending. Send it again when the controller is back.",
    Code.TIMED_OUT: f"More work arrived than the GPUs could do in time: {_SCARCE}",
    Code.SKIPPED: "A larger batch of younger requests was served instead, as more of them could be in time. "
    f"That happens under overload: {_SCARCE}",
    Code.COULD_NOT_START_IN_TIME: "The SLO was shorter than the start and the run that were predicted. If GPUs "
    "were busy, add GPUs or send less; if they were idle, the SLO is too short for this model.",
    Code.CALL_RAISED: "The function itself raised; the reason is its traceback.",
    Code.CALL_OVER_LIMIT: "The call reached a limit of its function, which the reason names, and was ended.",
    Code.TOO_MANY_CALLS: "Its worker had as many calls that have begun and not ended as it may have "
    "(--most-calls): calls that await children count.",
    Code.CONTROLLER_OVERLOADED: "Not the GPUs but the controller's own core was short. Give it a core of "
    "its own, or spread the load over several controllers.",
}
#: What no log of the controller has.
_OF_THE_DOOR = {Code.CONTROLLER_OVERLOADED: _ADVICE[Code.CONTROLLER_OVERLOADED]}
_ELSEWHERE = "The reason is in the controller's run directory."
_COLD = "No GPU had the model's weights when it arrived, so they had to be copied first."


@dataclass(frozen=True)
class Told:
    """One request: its number, model and code, and what the logs say about it, a line each."""

    request_id: int
    model_id: int
    code: int
    in_time: bool
    reason: str
    lines: list[str] = field(default_factory=list)
    #: The stages of a cascade's request, a clause each; the lines have them too.
    stages: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ReasonCount:
    """How many requests ended with `code` and were not in time, and one of them to look at."""

    code: int
    requests: int
    example: int
    reason: str


def explain(run_dir: Path, request_id: int) -> list[Told]:
    """Return what the logs in `run_dir` say of the requests with this number, in order of their answers.

    Raises InvalidConfig if the directory holds no run or no such request, MalformedLog for a damaged log.
    """
    reasons = [row for row in _reasons(run_dir) if row.request_id == request_id]
    requests = _rows(run_dir, request_log.FILE_NAME, request_id)
    clients = _rows(run_dir, client_log.FILE_NAME, request_id)
    found = [_of_reason(row, _client_of(clients, row.model_id)) for row in reasons]
    known = {(row.t, row.model_id) for row in reasons}
    others = [row for row in requests if (row["t"], row["model_id"]) not in known]
    found += [_of_request(row, _client_of(clients, row["model_id"])) for row in others]
    arrivals = [row.t - row.latency for row in reasons]
    arrivals += [row["t"] - row["latency"] for row in others]
    found = _with_stages(run_dir, request_id, found[:MOST_TOLD], arrivals[:MOST_TOLD])
    if not found:  # of a client's own directory, or never answered
        found = [_of_client(row) for row in clients]
    if not found:
        raise InvalidConfig(
            f"{run_dir} has no request {request_id}; `slosched explain {run_dir}` lists the reasons with a "
            "request of each. A request that was wrong in itself (code 6) is not logged: its answer says why"
        )
    return found[:MOST_TOLD]


def _with_stages(
    run_dir: Path, request_id: int, found: list[Told], arrivals: list[int]
) -> list[Told]:
    """Each request with its stages, which follow the line on its deadline."""
    by_request = read_stages(run_dir, [(request_id, arrival_ns) for arrival_ns in arrivals])
    if not by_request:
        return found
    explained = []
    for each, arrival_ns in zip(found, arrivals, strict=True):
        stages = [stage.words() for stage in by_request.get((request_id, arrival_ns), ())]
        after = next(n for n, line in enumerate(each.lines) if line.startswith("  deadline")) + 1
        lines = [f"  {f'stage {n}':10} {words}" for n, words in enumerate(stages, 1)]
        joined = [*each.lines[:after], *lines, *each.lines[after:]]
        explained.append(replace(each, lines=joined, stages=stages))
    return explained


def summary(run_dir: Path) -> list[ReasonCount]:
    """Return the codes of all requests that were not in time at the controller, the most frequent first."""
    counts: dict[int, int] = {}
    first: dict[int, Reason] = {}
    for row in _reasons(run_dir):
        counts[row.code] = counts.get(row.code, 0) + 1
        first.setdefault(row.code, row)
    return [
        ReasonCount(code, n, first[code].request_id, first[code].reason)
        for code, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]


def _reasons(run_dir: Path) -> Iterator[Reason]:
    path = find_log(run_dir, reason_log.FILE_NAME)
    if path is not None:
        yield from reason_log.read_reasons(path)
        return
    if find_log(run_dir, client_log.FILE_NAME) is None or find_log(run_dir, request_log.FILE_NAME):
        what = "does not exist" if not run_dir.exists() else f"has no {reason_log.FILE_NAME}"
        raise InvalidConfig(
            f"{run_dir} {what}; give the controller's directory, or one of a simulation, of this version"
        )


def _rows(run_dir: Path, name: str, request_id: int) -> list[dict[str, Any]]:
    path = find_log(run_dir, name)
    if path is None:
        return []
    table: LogTable
    if name == request_log.FILE_NAME:
        table = request_log.read_request_log(path, only=_REQUEST_COLUMNS)
    else:
        table = client_log.read_client_log(path)
    found = np.flatnonzero(table["request_id"] == request_id)[:MOST_TOLD]
    return [
        {column: values[place].item() for column, values in table.columns.items()}
        for place in found.tolist()
    ]


def _client_of(rows: list[dict[str, Any]], model_id: int) -> dict[str, Any] | None:
    return next((row for row in rows if row["model_id"] == model_id), None)


def _of_reason(row: Reason, client: dict[str, Any] | None) -> Told:
    late = row.code == Code.OK
    outcome = "answered, but late" if late else f"{code_name(row.code)} (code {row.code})"
    lines = [
        f"request {row.request_id} of model {row.model_id}, user {row.user_id}: {outcome}",
        f"  reason     {printable(row.reason) or 'the answer left after the deadline'}",
        f"  deadline   {_deadline(row.deadline, row.latency)}",
    ]
    if row.predicted_exec or row.predicted_start >= 0:
        lines.append(f"  predicted  {_span(row.predicted_start, row.predicted_exec)}")
    if row.start >= 0 or row.exec:
        where = f", in a batch of {row.batch_size} on worker {row.worker_id} GPU {row.gpu_id}"
        lines.append(f"  happened   {_span(row.start, row.exec)}{where if row.batch_size else ''}")
    if row.attempts > 1:
        lines.append(f"  attempts   {row.attempts}")
    lines += _client_lines(client)
    if row.arrival_count == 0:
        lines.append(f"  weights    {_COLD}")
    advice = _ADVICE.get(Code(row.code)) if row.code in set(Code) else None
    if late:
        advice = "Predictions were too short, or the answer waited: `slosched report` shows prediction errors."
    lines.append(f"  so         {advice or 'A worker could not run it; its log says more.'}")
    return Told(
        request_id=row.request_id,
        model_id=row.model_id,
        code=row.code,
        in_time=False,
        reason=row.reason,
        lines=lines,
    )


def _of_request(row: dict[str, Any], client: dict[str, Any] | None) -> Told:
    met = bool(row["deadline_met"])
    outcome = "answered in time" if met else f"{code_name(row['result'])} (code {row['result']})"
    lines = [
        f"request {row['request_id']} of model {row['model_id']}, user {row['user_id']}: {outcome}",
        f"  deadline   {_deadline(row['deadline'], row['latency'])}",
        *_client_lines(client),
    ]
    if row["is_coldstart"]:
        lines.append(f"  weights    {_COLD}")
    return Told(
        request_id=row["request_id"],
        model_id=row["model_id"],
        code=row["result"],
        in_time=met,
        reason="",
        lines=lines,
    )


def _of_client(row: dict[str, Any]) -> Told:
    code = row["code"]
    outcome = "never answered" if code == NO_ANSWER else f"{code_name(code)} (code {code})"
    lines = [
        f"request {row['request_id']} of model {row['model_id']}, user {row['user_id']}: {outcome}",
        *_client_lines(row),
        f"  so         {_OF_THE_DOOR.get(code, _ELSEWHERE)}",
    ]
    return Told(
        request_id=row["request_id"],
        model_id=row["model_id"],
        code=code,
        in_time=bool(row["in_time"]),
        reason="",
        lines=lines,
    )


def _client_lines(row: dict[str, Any] | None) -> list[str]:
    if row is None:
        return []
    sent = f"sent {format_duration(row['issue_delay_ns'])} after it was due"
    if row["code"] == NO_ANSWER:
        return [f"  client     {sent}; no answer came"]
    judged = "in time" if row["in_time"] else "not in time"
    latency = format_duration(row["latency_ns"])
    return [f"  client     {sent}, answered {latency} after it was due: {judged} for the client"]


def printable(text: str) -> str:
    """`text` on one line, without what a terminal would obey: a reason may quote a model's exception."""
    return "".join(c if c.isprintable() else " " for c in text)


def _deadline(deadline_ns: int, latency_ns: int) -> str:
    if deadline_ns <= 0:
        return f"none; answered {format_duration(latency_ns)} after it arrived"
    left_ns = deadline_ns - latency_ns
    rest = f"{format_duration(abs(left_ns))} {'before' if left_ns >= 0 else 'after'} it"
    return (
        f"{format_duration(deadline_ns)} after it arrived; answered after "
        f"{format_duration(latency_ns)}, {rest}"
    )


def _span(start_ns: int, exec_ns: int) -> str:
    start = f"start {format_duration(start_ns)} after it arrived" if start_ns >= 0 else ""
    run = f"run for {format_duration(exec_ns)}" if exec_ns else ""
    return ", ".join(text for text in (start, run) if text)
