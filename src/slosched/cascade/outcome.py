"""What became of each request of a cascade: read from the logs of one run directory."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slosched.analysis.runs import find_log, read_requests
from slosched.codes import Code, Verdict
from slosched.errors import InvalidConfig
from slosched.telemetry import plan_log, stage_log
from slosched.telemetry.table import LogTable, read_table
from slosched.units import NS_PER_S

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

_REQUEST_COLUMNS = ("t", "request_id", "result", "latency", "deadline", "deadline_met")
_READ_OF_STAGES = ("t", "request_id", "verdict", "score", "threshold", "cascade")

#: The answer is the light program's.
LIGHT = (
    Verdict.ACCEPTED,
    Verdict.FORCED,
    Verdict.INSTEAD,
    Verdict.BLIND_LIGHT,
    Verdict.OUTRANKED,
)
#: The answer is the heavy program's.
HEAVY = (Verdict.HEAVY, Verdict.BLIND_HEAVY)
#: The clock and not the judge's threshold chose the light answer; also where lower scores went first.
FORCED = (Verdict.FORCED, Verdict.INSTEAD, Verdict.OUTRANKED)
#: The policy asked no judge.
BLIND = (Verdict.BLIND_LIGHT, Verdict.BLIND_HEAVY)
_JUDGED = (Verdict.ACCEPTED, Verdict.DEFERRED, Verdict.FORCED)


@dataclass(frozen=True)
class Plans:
    """The plans of a run, in order of time. `t_ns` counts from the first request and may be negative."""

    t_ns: Ints
    threshold: Floats
    light_gpus: Ints
    heavy_gpus: Ints
    role_changes: Ints
    feasible: Flags

    def __len__(self) -> int:
        return len(self.t_ns)


@dataclass(frozen=True)
class Outcome:
    """One run: an element for each request, in order of arrival. Times are ns from the first arrival.

    `answered` is True for code 0, late or not; `ok` for code 0 within the SLO, and what is not `ok` is a
    violation: late, refused, dropped or failed. `verdict` is that of the answer (0: no answer), `stage`
    that of its program (0 light, 1 heavy, -1 none). `score` and `threshold` are those of its light stage;
    NaN where it has none. `judged` ended its light stage before a judge; `deferred` was then sent to the
    heavy program, at `heavy_ns` (-1: never; a policy without a judge sends it at its arrival).
    """

    path: Path
    arrival_ns: Ints
    end_ns: Ints
    slo_ns: Ints
    answered: Flags
    ok: Flags
    verdict: Ints
    stage: Ints
    score: Floats
    threshold: Floats
    judged: Flags
    deferred: Flags
    heavy_ns: Ints
    plans: Plans

    def __len__(self) -> int:
        return len(self.arrival_ns)

    @property
    def seconds(self) -> int:
        """How many whole ticks of one second, from the first request on, hold all that happened."""
        if not len(self):
            return 0
        return int(max(self.end_ns.max(), self.arrival_ns.max())) // NS_PER_S + 1

    def is_in(self, verdicts: tuple[Verdict, ...]) -> Flags:
        """True for requests whose answer has one of `verdicts`."""
        return np.isin(self.verdict, [int(each) for each in verdicts])

    @property
    def light(self) -> Flags:
        return self.is_in(LIGHT)

    @property
    def heavy(self) -> Flags:
        return self.is_in(HEAVY)

    @property
    def blind(self) -> bool:
        """True if a policy without a judge chose every stage that was chosen."""
        answered = self.verdict[self.verdict != 0]
        return bool(len(answered)) and bool(self.is_in(BLIND)[self.verdict != 0].all())

    def part(self, chosen: Flags) -> Outcome:
        """The same run with the requests of `chosen` alone."""
        columns = {
            field.name: getattr(self, field.name)[chosen]
            for field in fields(self)
            if field.name not in ("path", "plans")
        }
        return replace(self, **columns)

    def threshold_at(self, times_ns: Ints) -> Floats:
        """The threshold in force at each time: that of the last plan; before the first plan the first one's.

        Without plans it is the threshold of the last request to end its light stage; NaN if there is none.
        """
        if len(self.plans):
            at, values = self.plans.t_ns, self.plans.threshold
        else:
            known = np.flatnonzero(~np.isnan(self.threshold))
            known = known[np.argsort(self.end_ns[known], kind="stable")]
            at, values = self.end_ns[known], self.threshold[known]
        if not len(at):
            return np.full(len(times_ns), np.nan)
        places = np.searchsorted(at, times_ns, side="right") - 1
        return values[np.maximum(places, 0)]


def read_outcome(path: Path) -> Outcome:
    """Read the logs of the run directory `path`.

    Raises InvalidConfig if there is no run or it served no cascade, or several: which of them a request was for
    that was refused is not logged. Raises MalformedLog if a log is damaged.
    """
    requests = read_requests(path, only=_REQUEST_COLUMNS)
    at = find_log(path, stage_log.FILE_NAME)
    if at is None:
        raise InvalidConfig(
            f"{path} has no {stage_log.FILE_NAME}: its requests had no stages, so it served no cascade"
        )
    stages = read_table(at, stage_log.COLUMNS, only=_READ_OF_STAGES)
    cascades = sorted(set(stages["cascade"][stages["verdict"] != 0]))
    if len(cascades) > 1:
        raise InvalidConfig(
            f"{path} served the cascades {', '.join(map(repr, cascades))}; give a run of one cascade alone "
            "(`slosched report` counts each of them)"
        )
    return _outcome(path, requests, stages)


def _outcome(path: Path, requests: LogTable, stages: LogTable) -> Outcome:
    arrivals = requests["t"] - requests["latency"]
    order = np.lexsort((requests["request_id"], arrivals))
    column = {name: requests[name][order] for name in _REQUEST_COLUMNS}
    first_ns = int(arrivals[order[0]])
    arrival_ns = arrivals[order] - first_ns
    end_ns = column["t"] - first_ns
    answered = column["result"] == int(Code.OK)
    by_request = _stages_by_request(column["request_id"], stages, first_ns)
    by_request["verdict"][~answered] = 0
    by_request["stage"][~answered] = -1
    return Outcome(
        path=path,
        arrival_ns=arrival_ns,
        end_ns=end_ns,
        slo_ns=column["deadline"],
        answered=answered,
        ok=answered & (column["deadline_met"] == 1),
        plans=_read_plans(path, first_ns),
        **_blind_from_arrival(by_request, arrival_ns),
    )


def _stages_by_request(ids: Ints, stages: LogTable, first_ns: int) -> dict[str, Any]:
    """The columns of an Outcome that come from the rows of the stages; rows of other requests are left out."""
    by_id = np.argsort(ids, kind="stable")
    found = np.searchsorted(ids[by_id], stages["request_id"])
    found[found == len(ids)] = 0
    of = by_id[found]
    rows = np.flatnonzero(ids[of] == stages["request_id"])
    # In order of time, so that of several rows of one request the last one counts.
    rows = rows[np.argsort(stages["t"][rows], kind="stable")]
    count = len(ids)
    verdict, stage = np.zeros(count, np.int64), np.full(count, -1, np.int64)
    score, threshold = np.full(count, np.nan), np.full(count, np.nan)
    judged, deferred = np.zeros(count, np.bool_), np.zeros(count, np.bool_)
    heavy_ns = np.full(count, -1, np.int64)

    whose = of[rows]
    given = stages["verdict"][rows]
    final = np.isin(given, [int(each) for each in (*LIGHT, *HEAVY)])
    verdict[whose[final]] = given[final]
    stage[whose[final]] = np.isin(given[final], [int(each) for each in HEAVY])
    before = np.isin(given, [int(each) for each in _JUDGED])
    judged[whose[before]] = True
    for values, name in ((score, "score"), (threshold, "threshold")):
        logged = stages[name][rows]
        known = before & (logged >= 0)
        values[whose[known]] = logged[known]
    sent = given == int(Verdict.DEFERRED)
    deferred[whose[sent]] = True
    heavy_ns[whose[sent]] = stages["t"][rows][sent] - first_ns
    return {
        "verdict": verdict,
        "stage": stage,
        "score": score,
        "threshold": threshold,
        "judged": judged,
        "deferred": deferred,
        "heavy_ns": heavy_ns,
    }


def _blind_from_arrival(columns: dict[str, Any], arrival_ns: Ints) -> dict[str, Any]:
    """Requests that went straight to the heavy program reached it when they arrived."""
    straight = columns["verdict"] == int(Verdict.BLIND_HEAVY)
    columns["heavy_ns"] = np.where(straight, arrival_ns, columns["heavy_ns"])
    return columns


def _read_plans(path: Path, first_ns: int) -> Plans:
    at = find_log(path, plan_log.FILE_NAME)
    if at is None:
        nothing = np.empty(0, np.int64)
        return Plans(nothing, np.empty(0), nothing, nothing, nothing, np.empty(0, np.bool_))
    table = plan_log.read_plan_log(at)
    return Plans(
        t_ns=table["t"] - first_ns,
        threshold=table["threshold"],
        light_gpus=table["light_gpus"],
        heavy_gpus=table["heavy_gpus"],
        role_changes=table["role_changes"],
        feasible=table["feasible"] == 1,
    )
