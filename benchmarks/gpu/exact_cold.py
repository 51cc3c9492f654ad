"""Row "cold": 3,000 instances over a cache that holds a tenth of them, asked for by Zipf popularity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from exact_live import actions_of, exec_ends, infers_of
from exact_rig import Rig, RowFailed, check, scaled, spread
from numpy.typing import NDArray

from slosched.codes import ActionType
from slosched.telemetry import client_log
from slosched.telemetry.table import LogTable
from slosched.units import NS_PER_MS, NS_PER_S

INSTANCES = 3000
#: Requests/s and seconds: a light load, and one whose loads keep PCIe nearly as busy as they may (30 %).
_RUNS = {"light": (150, 18), "heavy": (500, 12)}
EXPONENT = "0.9"
SLO = "100ms"
#: The first loads fill free pages: they are not cold starts of a full cache.
_SETTLE_NS = 3 * NS_PER_S


def cold(rig: Rig) -> dict[str, Any]:
    """Latency of cold requests less exec and load, and how busy PCIe was with loads, at two rates."""
    instances = rig.settings.number(INSTANCES, least=250)
    figures: dict[str, Any] = {"instances": instances}
    checks = []
    with rig.serving("cold") as served:
        for name, (rate, seconds_meant) in _RUNS.items():
            seconds, sent_rate = rig.settings.seconds(seconds_meant), rig.rate(rate)
            words = [
                "zipf",
                rig.settings.model,
                str(instances),
                f"{sent_rate:g}",
                EXPONENT,
                f"{seconds:g}s",
                SLO,
            ]
            result = rig.client(served, words, seconds, log=name)
            figures[name] = {
                "rate": sent_rate,
                "seconds": seconds,
                "sent": result.sent,
                "satisfaction": result.satisfaction,
            }
    for name in _RUNS:
        found = figures[name]
        settle_ns = min(_SETTLE_NS, round(found["seconds"] / 4 * NS_PER_S))
        found |= cold_figures(served.run_dir, served.directory / name, settle_ns)
        beyond = found["beyond_exec_and_load_ns"]
        p50, p99 = (scaled(beyond[percent], NS_PER_MS) for percent in ("p50", "p99"))
        where = f"{instances} instances, {found['rate']:g}/s"
        checks += [
            check(f"{where}: cold latency less exec and load, p99", p99, "ms", "< 2"),
            check(f"{where}: the same, p50", p50, "ms"),
            check(f"{where}: PCIe busy with loads", 100 * found["pcie_busy"], "%", "< 30"),
            check(f"{where}: GPU busy", 100 * found["gpu_busy"], "%"),
            check(f"{where}: cold requests served", float(found["cold_served"]), ""),
            check(f"{where}: in time at 100 ms, of all", 100 * found["satisfaction"], "%"),
        ]
    return {"figures": figures, "checks": checks}


def cold_figures(run_dir: Path, client_dir: Path, settle_ns: int) -> dict[str, Any]:
    """What the logs say of the cold requests after the first `settle_ns`. Raises RowFailed if there is none.

    `run_dir` has the controller's log, `client_dir` the client's.
    """
    log = client_log.read_client_log(client_dir / client_log.FILE_NAME)
    actions = actions_of(run_dir)
    begin_ns = int(log["scheduled_ns"].min()) + settle_ns
    end_ns = int(log["scheduled_ns"].max())
    later = log["scheduled_ns"] >= begin_ns
    chosen = np.flatnonzero(later & (log["code"] == 0) & (log["cold"] == 1))
    if not len(chosen):
        raise RowFailed("no cold request was served")
    is_load = actions["action_type"] == int(ActionType.LOAD_WEIGHTS)
    loads, infers = is_load & (actions["status"] == 0), infers_of(actions)
    load_end, load_ns = last_before(log, chosen, actions, loads)
    infer_end, infer_ns = last_before(log, chosen, actions, infers)
    known = (load_ns > 0) & (infer_ns > 0)
    scheduled, latency = log["scheduled_ns"][chosen], log["latency_ns"][chosen]
    ends, spent = exec_ends(actions), actions["worker_exec_duration"]
    window = (ends > begin_ns) & (ends <= end_ns)
    window_ns = max(1, end_ns - begin_ns)
    return {
        "window_ns": [begin_ns, end_ns],
        "beyond_exec_and_load_ns": spread((latency - log["exec_ns"][chosen] - load_ns)[known]),
        "of_it_before_the_load_ns": spread((load_end - load_ns - scheduled)[known]),
        "of_it_between_load_and_exec_ns": spread((infer_end - infer_ns - load_end)[known]),
        "of_it_after_exec_ns": spread((scheduled + latency - infer_end)[known]),
        "load_ns": spread(spent[loads & window]),
        "loads_per_s": int((loads & window).sum()) / window_ns * NS_PER_S,
        "loads_failed": int((is_load & (actions["status"] != 0) & window).sum()),
        "pcie_busy": int(spent[loads & window].sum()) / window_ns,
        "gpu_busy": int(spent[infers & window].sum()) / window_ns,
        "cold_served": len(chosen),
        "cold_without_a_load": int((~known).sum()),
        "cold_not_served": int((later & (log["code"] != 0) & (log["cold"] == 1)).sum()),
        "not_served": int((later & (log["code"] != 0)).sum()),
        "requests": int(later.sum()),
    }


def last_before(
    log: LogTable, rows: NDArray[np.intp], actions: LogTable, chosen: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each of the client's `rows`: its model's last `chosen` action before the answer, end and duration.

    In ns; 0 and 0 where there is none.
    """
    columns = (actions["model_id"], exec_ends(actions), actions["worker_exec_duration"])
    by_model: dict[int, list[tuple[int, int]]] = {}
    for model, end, ns in sorted(zip(*(c[chosen].tolist() for c in columns), strict=True)):
        by_model.setdefault(model, []).append((end, ns))
    ends, spent = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=np.int64)
    for place, row in enumerate(rows.tolist()):
        answered = int(log["scheduled_ns"][row] + log["latency_ns"][row])
        for end, ns in reversed(by_model.get(int(log["model_id"][row]), [])):
            if end <= answered:
                ends[place], spent[place] = end, ns
                break
    return ends, spent
