"""Rows over a controller: how well it predicts, what it adds to exec, and goodput in closed loops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from exact_rig import Rig, RowFailed, check, percentile, scaled, spread
from numpy.typing import NDArray

from slosched.codes import ActionType
from slosched.telemetry import action_log, client_log
from slosched.telemetry.table import LogTable
from slosched.units import NS_PER_MS, NS_PER_S

#: An estimator has seen this many execs of a (model, batch) before its prediction is judged.
_SAMPLES = 10
#: The beginning of a run in which weights are loaded; not counted.
_SETTLE_NS = NS_PER_S
COMPLETION_COLUMNS = "expected_exec_complete against worker_exec_complete"


def actions_of(run_dir: Path) -> LogTable:
    """The controller's action log. Raises RowFailed for one without a finished inference."""
    table = action_log.read_action_log(run_dir / action_log.FILE_NAME)
    if not infers_of(table).any():
        raise RowFailed("the action log has no finished inference")
    return table


def infers_of(actions: LogTable) -> NDArray[np.bool_]:
    """Which rows are inferences that ran."""
    return np.asarray((actions["action_type"] == int(ActionType.INFER)) & (actions["status"] == 0))


def exec_ends(actions: LogTable) -> NDArray[np.int64]:
    """When each action's exec (or load) ended, on the controller's clock, ns."""
    ends: NDArray[np.int64] = (
        actions["t"] - actions["controller_result_enqueue"] + actions["worker_exec_complete"]
    )
    return ends


def clocks_of(actions: LogTable) -> dict[str, int]:
    """The GPU's clock after each inference, MHz; 0 where the worker does not say."""
    clocks = actions["worker_gpu_clock"][infers_of(actions)]
    return {
        "least": int(clocks.min()),
        "median": int(np.median(clocks)),
        "greatest": int(clocks.max()),
    }


def classes_of(batches: NDArray[np.int64], sizes: Mapping[int, int]) -> NDArray[np.int64]:
    """The batch size that ran for each number of requests: the smallest of `sizes` that holds them."""
    known = np.array(sorted(sizes))
    return np.asarray(known[np.minimum(np.searchsorted(known, batches), len(known) - 1)])


def after_samples(keys: list[tuple[int, int]], least: int = _SAMPLES) -> NDArray[np.bool_]:
    """Which of `keys`, in order, come after `least` of the same."""
    seen: Counter[tuple[int, int]] = Counter()
    later = np.zeros(len(keys), dtype=np.bool_)
    for place, key in enumerate(keys):
        later[place] = seen[key] >= least
        seen[key] += 1
    return later


# ----------------------------------------------------------------------------------- prediction


def prediction(rig: Rig) -> dict[str, Any]:
    """Row "prediction": exec and completion of 12 copies under Poisson arrivals against what was expected."""
    rate, seconds = rig.rate(1200), rig.settings.seconds(10)
    words = ["mix", f"{rig.settings.model}:12:{rate:g}:100ms", f"{seconds:g}s"]
    with rig.serving("prediction") as served:
        result = rig.client(served, words, seconds)
    figures = prediction_errors(actions_of(served.run_dir), rig.model().exec_ns)
    figures |= {"rate": rate, "sent": result.sent, "satisfaction": result.satisfaction}
    exec_error, complete = figures["exec_error"], figures["completion_error_ns"]
    return {
        "figures": figures,
        "checks": [
            check(
                "exec prediction error, graph models, p50",
                scaled(exec_error["p50"], 0.01),
                "%",
                "<= 0.3",
            ),
            check(
                "exec prediction error, graph models, p99",
                scaled(exec_error["p99"], 0.01),
                "%",
                "<= 2",
            ),
            check(
                "completion prediction error, p99",
                scaled(complete["p99"], NS_PER_MS),
                "ms",
                "< 0.3",
            ),
            check("completion prediction error, p50", scaled(complete["p50"], NS_PER_MS), "ms"),
        ],
    }


def prediction_errors(actions: LogTable, sizes: Mapping[int, int]) -> dict[str, Any]:
    """How far expectations were off, after ten samples of each (model, batch). Raises RowFailed without any.

    Exec: expected_exec_duration against worker_exec_duration, over the latter. Completion: COMPLETION_COLUMNS,
    both on the controller's clock from the sending on.
    """
    chosen = infers_of(actions)
    order = np.argsort(exec_ends(actions)[chosen], kind="stable")
    columns = {name: actions[name][chosen][order] for name in actions.columns}
    classes = classes_of(columns["batch_size"], sizes)
    keys = list(zip(columns["model_id"].tolist(), classes.tolist(), strict=True))
    later = after_samples(keys)
    if not later.any():
        raise RowFailed(f"no (model, batch) ran more than {_SAMPLES} times")
    expected = columns["expected_exec_duration"][later].astype(np.float64)
    actual = columns["worker_exec_duration"][later].astype(np.float64)
    relative = (expected - actual) / actual
    completion = columns["expected_exec_complete"] - columns["worker_exec_complete"]
    return {
        "exec_error": spread(np.abs(relative)),
        "exec_error_signed": spread(relative),
        "completion_error_ns": spread(np.abs(completion[later])),
        "completion_error_signed_ns": spread(completion[later]),
        "completion_columns": COMPLETION_COLUMNS,
        "by_batch": {
            str(size): spread(np.abs(relative[classes[later] == size]))
            for size in sorted(set(classes[later].tolist()))
        },
        "actions": int(chosen.sum()),
        "gpu_clock_mhz": clocks_of(actions),
    }


# --------------------------------------------------------------------------------- client overhead


def client_overhead(rig: Rig) -> dict[str, Any]:
    """Row "client_overhead": latency of lone requests with an input, less exec."""
    model, seconds = rig.model(), rig.settings.seconds(10)
    words = ["mix", f"{rig.settings.model}:1:20:100ms", f"{seconds:g}s"]
    with rig.serving("client-overhead") as served:
        rig.client(served, words, seconds, inputs=True)
    log = client_log.read_client_log(served.run_dir / client_log.FILE_NAME)
    # The first request may meet weights that are still on their way.
    begin_ns = int(log["scheduled_ns"].min()) + min(_SETTLE_NS, round(seconds / 4 * NS_PER_S))
    lone = (log["code"] == 0) & (log["batch_size"] == 1) & (log["scheduled_ns"] >= begin_ns)
    if not lone.any():
        raise RowFailed("no request was served alone")
    over = (log["latency_ns"] - log["exec_ns"])[lone]
    item = np.dtype(model.input_dtype).itemsize
    input_bytes = int(np.prod(model.input_shape)) * item
    p50, p99 = (scaled(percentile(over, percent), NS_PER_MS) for percent in (50, 99))
    return {
        "figures": {
            "over_exec_ns": spread(over),
            "of_it_issue_delay_ns": spread(log["issue_delay_ns"][lone]),
            "controller_latency_less_exec_ns": spread(
                (log["controller_latency_ns"] - log["exec_ns"])[lone]
            ),
            "exec_ns": spread(log["exec_ns"][lone]),
            "input_bytes": input_bytes,
            "input_dtype": model.input_dtype,
            "requests": int(lone.sum()),
            "not_served": int((log["code"] != 0).sum()),
        },
        "checks": [
            check(
                f"client latency less exec, batch 1, {input_bytes / 1e3:.0f} kB in, p50",
                p50,
                "ms",
                "< 1",
            ),
            check("the same latency less exec, p99", p99, "ms", "< 2"),
        ],
    }


# -------------------------------------------------------------------------------------- goodput


def goodput(rig: Rig) -> dict[str, Any]:
    """Row "goodput": 15 copies, each in a closed loop of 16, at SLO 50 ms and 25 ms."""
    seconds = rig.settings.seconds(7)
    reference = _reference(rig)
    figures: dict[str, Any] = {"reference": reference}
    checks = []
    for slo in ("50ms", "25ms"):
        name = f"goodput-{slo}"
        with rig.serving(name, "--default-slo", slo, "--max-batch", "16") as served:
            rig.client(served, ["comparison_experiment2", "15", "16"], seconds)
        found = closed_loop(served.run_dir, reference["exec_ns"])
        figures[slo] = found
        figures[f"{slo}, against the profile"] = closed_loop(
            served.run_dir, dict(rig.model().exec_ns)
        )["of_graph_rate"]
        bound = slo == "50ms"
        checks += [
            check(
                f"goodput at SLO {slo} over the back-to-back graph rate ({reference['of']})",
                scaled(found["of_graph_rate"], 0.01),
                "%",
                ">= 90" if bound else "",
            ),
            check(f"GPU busy at SLO {slo}", 100 * found["gpu_busy"], "%", ">= 95" if bound else ""),
            check(f"goodput at SLO {slo}", found["goodput_per_s"], "/s"),
        ]
    return {"figures": figures, "checks": checks}


def _reference(rig: Rig) -> dict[str, Any]:
    """ns of each batch size, back to back: plain graphs where they were measured, else the profile."""
    graphs = rig.rows.get("graphs", {}).get("figures", {}).get("back_to_back_ns")
    if graphs:
        return {"of": "row graphs", "exec_ns": {int(size): ns for size, ns in graphs.items()}}
    return {"of": "row profile", "exec_ns": dict(rig.model().exec_ns)}


def closed_loop(run_dir: Path, exec_ns: Mapping[int, float]) -> dict[str, Any]:
    """Goodput and how busy the GPU was, without the run's first second. Raises RowFailed: too short a run."""
    log = client_log.read_client_log(run_dir / client_log.FILE_NAME)
    actions = actions_of(run_dir)
    first, last = int(log["scheduled_ns"].min()), int(log["scheduled_ns"].max())
    begin_ns = first + min(_SETTLE_NS, (last - first) // 4)
    if last <= begin_ns:
        raise RowFailed("the run was too short")
    done_ns = log["scheduled_ns"] + log["latency_ns"]
    counted = (done_ns > begin_ns) & (done_ns <= last)
    good = int((counted & (log["in_time"] == 1)).sum())
    ends_ns = exec_ends(actions)
    chosen = infers_of(actions) & (ends_ns > begin_ns) & (ends_ns <= last)
    aboard = actions["batch_size"][chosen]
    classes = classes_of(aboard, {int(size): 0 for size in exec_ns})
    graph_ns = sum(exec_ns[int(size)] for size in classes.tolist())
    rate = int(classes.sum()) / graph_ns * NS_PER_S if graph_ns else None
    seconds = (last - begin_ns) / NS_PER_S
    return {
        "window_ns": [begin_ns, last],
        "goodput_per_s": good / seconds,
        "served_per_s": int((counted & (log["code"] == 0)).sum()) / seconds,
        "graph_rate_per_s": rate,
        "of_graph_rate": None if rate is None else good / seconds / rate,
        "gpu_busy": int(actions["worker_exec_duration"][chosen].sum()) / (last - begin_ns),
        "batch_sizes": {str(k): v for k, v in sorted(Counter(classes.tolist()).items())},
        "aboard_of_slots": int(aboard.sum()) / max(1, int(classes.sum())),
        "codes": {str(k): v for k, v in sorted(Counter(log["code"][counted].tolist()).items())},
        "latency_ns": spread(log["latency_ns"][counted & (log["code"] == 0)]),
        "gpu_clock_mhz": clocks_of(actions),
    }
