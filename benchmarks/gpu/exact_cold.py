"""Row "cold": 3,000 instances over a cache that holds a tenth of them, asked for by Zipf popularity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from exact_live import actions_of, exec_ends, infers_of
from exact_rig import Rig, RowFailed, check, percentile, scaled, spread
from numpy.typing import NDArray

from slosched.codes import ActionType
from slosched.telemetry import client_log
from slosched.telemetry.table import LogTable
from slosched.units import NS_PER_MS, NS_PER_S

_INSTANCES = 3000
_RATE = 500
_EXPONENT = "0.9"
_SLO = "100ms"
#: What fills the free pages at first is no cold start of a full cache.
_SETTLE_NS = 3 * NS_PER_S


def cold(rig: Rig) -> dict[str, Any]:
    """Latency of cold requests less exec and load, and how busy PCIe was with loads."""
    instances = rig.settings.number(_INSTANCES, least=250)
    seconds = rig.settings.seconds(18)
    # An emulated GPU's loads take longer, too; on the real one 500/s keep PCIe below 30 % busy.
    words = ["zipf", rig.settings.model, str(instances), f"{rig.rate(_RATE):g}", _EXPONENT,
             f"{seconds:g}s", _SLO]  # fmt: skip
    with rig.serving("cold") as served:
        result = rig.client(served, words, seconds)
    figures = cold_figures(served.run_dir, min(_SETTLE_NS, round(seconds / 4 * NS_PER_S)))
    figures |= {
        "instances": instances,
        "rate": rig.rate(_RATE),
        "sent": result.sent,
        "satisfaction": result.satisfaction,
    }
    beyond = figures["beyond_exec_and_load_ns"]
    p99 = scaled(beyond["p99"], NS_PER_MS)
    return {
        "figures": figures,
        "checks": [
            check(f"{instances} instances: cold latency less exec and load, p99", p99, "ms", "< 2"),
            check("cold latency less exec and load, p50", scaled(beyond["p50"], NS_PER_MS), "ms"),
            check("PCIe busy with loads", 100 * figures["pcie_busy"], "%", "< 30"),
            check("cold requests served", float(figures["cold_served"]), ""),
            check("in time at 100 ms, all requests", 100 * result.satisfaction, "%"),
        ],
    }


def cold_figures(run_dir: Path, settle_ns: int) -> dict[str, Any]:
    """What the logs say of the cold requests after the first `settle_ns`. Raises RowFailed if there is none."""
    log = client_log.read_client_log(run_dir / client_log.FILE_NAME)
    actions = actions_of(run_dir)
    begin_ns = int(log["scheduled_ns"].min()) + settle_ns
    end_ns = int(log["scheduled_ns"].max())
    later = log["scheduled_ns"] >= begin_ns
    chosen = np.flatnonzero(later & (log["code"] == 0) & (log["cold"] == 1))
    if not len(chosen):
        raise RowFailed("no cold request was served")
    loads = (actions["action_type"] == int(ActionType.LOAD_WEIGHTS)) & (actions["status"] == 0)
    load_ns = load_of(log, chosen, actions, loads)
    known = load_ns > 0
    beyond = (log["latency_ns"][chosen] - log["exec_ns"][chosen] - load_ns)[known]
    ends = exec_ends(actions)
    counted = loads & (ends > begin_ns) & (ends <= end_ns)
    window_ns = max(1, end_ns - begin_ns)
    return {
        "window_ns": [begin_ns, end_ns],
        "beyond_exec_and_load_ns": spread(beyond),
        "p99.9_ns": percentile(beyond, 99.9),
        "load_ns": spread(actions["worker_exec_duration"][counted]),
        "loads_per_s": int(counted.sum()) / window_ns * NS_PER_S,
        "pcie_busy": int(actions["worker_exec_duration"][counted].sum()) / window_ns,
        "loads_failed": int(
            ((actions["action_type"] == int(ActionType.LOAD_WEIGHTS)) & (actions["status"] != 0)).sum()
        ),
        "gpu_busy": int(
            actions["worker_exec_duration"][
                infers_of(actions) & (ends > begin_ns) & (ends <= end_ns)
            ].sum()
        ) / window_ns,
        "cold_served": len(chosen),
        "cold_without_a_load": int((~known).sum()),
        "cold_not_served": int((later & (log["code"] != 0) & (log["cold"] == 1)).sum()),
        "not_served": int((later & (log["code"] != 0)).sum()),
        "requests": int(later.sum()),
    }  # fmt: skip


def load_of(
    log: LogTable,
    rows: Sequence[int] | NDArray[np.intp],
    actions: LogTable,
    loads: NDArray[np.bool_],
) -> NDArray[np.int64]:
    """For each of the client's `rows`: how long the last load before its answer took, ns; 0: none."""
    ends, spent = exec_ends(actions)[loads], actions["worker_exec_duration"][loads]
    by_model: dict[int, list[tuple[int, int]]] = {}
    models = actions["model_id"][loads]
    for model, end, ns in sorted(zip(models.tolist(), ends.tolist(), spent.tolist(), strict=True)):
        by_model.setdefault(model, []).append((end, ns))
    found = np.zeros(len(rows), dtype=np.int64)
    for place, row in enumerate(rows):
        answered = int(log["scheduled_ns"][row] + log["latency_ns"][row])
        for end, ns in reversed(by_model.get(int(log["model_id"][row]), [])):
            if end <= answered:
                found[place] = ns
                break
    return found
