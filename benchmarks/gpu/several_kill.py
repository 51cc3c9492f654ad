"""Row "kill": one worker's process is killed under load; what becomes of its requests, and when it is back."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from exact_rig import Rig, RowFailed, check, scaled
from live_and_simulated import describe, simulate_beside
from numpy.typing import NDArray
from several_rig import Compared, SeveralRig
from several_sweeps import compared_checks, several

from slosched.clock import now_ns
from slosched.codes import ActionType, code_name
from slosched.telemetry import action_log, client_log
from slosched.telemetry.client_log import NO_ANSWER
from slosched.telemetry.table import LogTable
from slosched.units import NS_PER_MS, NS_PER_S

_COPIES = 12
_RATE = 1200
_SLO = "100ms"
_SECONDS = 32.0
_KILL_AFTER_S = 4.0
#: What the next row needs may take longer than the run.
_BACK_WITHIN_S = 25.0
_BIN_NS = 200 * NS_PER_MS
#: Served as before once every later bin has at least this share in time.
_REGAINED = 0.97


class Killer:
    """Kills the worker of the last GPU a while after the client's first requests. `killed_ns` says when.

    It has no thread: the kernel ends a worker with the thread that started it (PR_SET_PDEATHSIG).
    """

    def __init__(self, rig: SeveralRig, log: Path, after_s: float) -> None:
        """`log` is the client's."""
        self.rig, self.log, self.after_ns = rig, log, round(after_s * NS_PER_S)
        self.killed_ns: int | None = None
        self._begun_ns: int | None = None

    def look(self) -> None:
        """Kill if it is time."""
        if self._begun_ns is None and _has_rows(self.log):
            self._begun_ns = now_ns()
        due = self._begun_ns is not None and now_ns() >= self._begun_ns + self.after_ns
        if due and self.killed_ns is None:
            self.killed_ns = self.rig.kill(self.rig.workers()[-1])


def _has_rows(log: Path) -> bool:
    try:
        return bool(log.stat().st_size > len(client_log.HEADER) + 1)
    except OSError:
        return False


def kill(rig: Rig) -> dict[str, Any]:
    """The row: copies under Poisson arrivals on all GPUs, and one worker killed after some seconds."""
    rig = several(rig)
    seconds, victim = rig.settings.seconds(_SECONDS), rig.settings.gpus - 1
    rate = rig.rate_for(_RATE, as_meant=True)
    words = ["mix", f"{rig.settings.model}:{_COPIES}:{rate:g}:{_SLO}", f"{seconds:g}s"]
    compared = Compared(rig, rate, seconds, _COPIES)
    with rig.serving("kill") as served, compared.beside(served):
        log = served.run_dir / client_log.FILE_NAME
        killer = Killer(rig, log, rig.settings.seconds(_KILL_AFTER_S))
        result = rig.client(served, words, seconds, meanwhile=killer.look)
    if killer.killed_ns is None:
        raise RowFailed("no worker was killed: the run was too short")
    actions = action_log.read_action_log(served.run_dir / action_log.FILE_NAME)
    requests = client_log.read_client_log(served.run_dir / client_log.FILE_NAME)
    rig.await_workers(_BACK_WITHIN_S)
    figures = describe(rig, served.run_dir, words, result)
    found = fate(requests, actions, killer.killed_ns, victim)
    figures |= {"fate": found, "victim": victim, "sent_rate": rate, "compared": compared.found}
    figures["faults"] = [as_fault(found, victim, figures["first_sent_ns"], seconds)]
    simulate_beside(rig, "kill", figures)
    return {"figures": figures, "checks": _checks(found, result.satisfaction, compared.found)}


def as_fault(found: dict[str, Any], victim: int, first_ns: int, seconds: float) -> dict[str, Any]:
    """The same for the simulator: down until the worker's first inference after the kill."""
    at_ns = max(0, found["killed_ns"] - first_ns)
    down_ns = found["back_after_ns"] or max(1, round(seconds * NS_PER_S) - at_ns)
    return {"kind": "crash", "target": f"worker {victim}", "at_ns": at_ns, "for_ns": down_ns}


def fate(requests: LogTable, actions: LogTable, killed_ns: int, victim: int) -> dict[str, Any]:
    """What became of the requests, and when things were as before (ns after the kill; None: not in this run).

    `in_flight` has the outcomes of those that were sent before the kill and not answered at it, `failed` those
    of all that failed from then on.
    """
    sent, latency, codes = (requests[name] for name in ("scheduled_ns", "latency_ns", "code"))
    answered = sent + latency
    flying = (sent <= killed_ns) & ((answered > killed_ns) | (codes == NO_ANSWER))
    later = flying | (sent > killed_ns)
    begun = actions["t"] - actions["controller_result_enqueue"]
    served = (
        (actions["worker_id"] == victim)
        & (actions["status"] == 0)
        & (begun > killed_ns)
        & (actions["action_type"] == int(ActionType.INFER))
    )
    back = actions["t"][served]
    return {
        "killed_ns": killed_ns,
        "in_flight": outcomes(codes[flying]),
        "failed": outcomes(codes[later & (codes != 0)]),
        "never_answered": int((codes == NO_ANSWER).sum()),
        "late": int((later & (codes == 0) & (requests["in_time"] == 0)).sum()),
        "after": int(later.sum()),
        "back_after_ns": int(back.min()) - killed_ns if len(back) else None,
        "regained_after_ns": regained_after_ns(sent, requests["in_time"] == 1, killed_ns),
        "in_time_before": _share(requests["in_time"][sent <= killed_ns - NS_PER_S]),
    }


def outcomes(codes: NDArray[np.int64]) -> dict[str, int]:
    """Number of requests by what their code says."""
    counts = Counter(codes.tolist())
    return {
        "not answered" if code == NO_ANSWER else code_name(code): number
        for code, number in sorted(counts.items())
    }


def _share(in_time: NDArray[np.int64]) -> float | None:
    return float((in_time == 1).mean()) if len(in_time) else None


def regained_after_ns(
    sent: NDArray[np.int64], in_time: NDArray[np.bool_], killed_ns: int
) -> int | None:
    """From the kill to the end of the last bin of sends of which too few were in time; 0 if there is none.

    None if that is the last bin there is.
    """
    later = sent > killed_ns
    bins = (sent[later] - killed_ns) // _BIN_NS
    if not len(bins):
        return None
    good = np.bincount(bins, weights=in_time[later])
    number = np.bincount(bins)
    bad = np.flatnonzero((number > 0) & (good < _REGAINED * number))
    if not len(bad):
        return 0
    return None if bad[-1] == bins.max() else int((bad[-1] + 1) * _BIN_NS)


def _checks(
    found: dict[str, Any], satisfaction: float, compared: dict[str, Any]
) -> list[dict[str, Any]]:
    flying = found["in_flight"]
    ok = flying.get(code_name(0), 0)
    failed = sum(found["failed"].values())
    return [
        check(
            "kill: requests that were never answered", float(found["never_answered"]), "", "<= 0"
        ),
        check("kill: in flight then", float(sum(flying.values())), ""),
        check("kill: served of these all the same", float(ok), ""),
        check(f"kill: failed from then on, of {found['after']}", float(failed), ""),
        check("kill: served as before after", scaled(found["regained_after_ns"], NS_PER_S), "s"),
        check(
            "kill: the worker's first inference after",
            scaled(found["back_after_ns"], NS_PER_S),
            "s",
        ),
        check("kill: in time of all", 100 * satisfaction, "%"),
        *compared_checks("kill", compared),
    ]
