"""The calls of a run directory: their graph, and how long its functions took to be made ready."""

from __future__ import annotations

from pathlib import Path

from slosched.analysis.runs import find_log
from slosched.codes import ActionType
from slosched.errors import InvalidConfig
from slosched.telemetry import action_log, call_log, call_part_log
from slosched.telemetry.call_graph import CallGraph, read_call_graph

_LOADS = ("action_type", "status", "model_id", "worker_exec_duration")


def graph_of_run(run_dir: Path) -> CallGraph:
    """Every call of the run. Raises InvalidConfig if there is none, MalformedLog if a file is damaged."""
    path = find_log(run_dir, call_log.FILE_NAME)
    if path is None:
        what = "does not exist" if not run_dir.exists() else f"has no {call_log.FILE_NAME}"
        raise InvalidConfig(
            f"{run_dir} {what}; a controller writes it when the first call of a function ends"
        )
    graph = read_call_graph(path, find_log(run_dir, call_part_log.FILE_NAME))
    if not graph.calls:
        raise InvalidConfig(f"nothing to show: {path} holds no calls yet")
    return graph


def loads_of_run(run_dir: Path) -> dict[int, list[int]]:
    """The durations of the run's loads in ns, by model id; {} without an action log. Raises MalformedLog."""
    path = find_log(run_dir, action_log.FILE_NAME)
    if path is None:
        return {}
    log = action_log.read_action_log(path, only=_LOADS)
    rows = (log["action_type"] == ActionType.LOAD_WEIGHTS) & (log["status"] == 0)
    loads: dict[int, list[int]] = {}
    for model_id, took_ns in zip(
        log["model_id"][rows].tolist(), log["worker_exec_duration"][rows].tolist(), strict=True
    ):
        loads.setdefault(model_id, []).append(took_ns)
    return loads
