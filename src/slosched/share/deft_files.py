"""Deft's result files: a CSV of requests for each job, models_pid.json and the configurations.

Times in its CSV are of perf_counter_ns, which is CLOCK_MONOTONIC as ours are; a request counts from its
arrival, as Deft's did from before its wait.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from slosched.share_spec import BoundaryKind, Job, JobResult, Mode, Request, RunResult, ShareSpec
from slosched.units import NS_PER_MS, NS_PER_S

HEADER = (
    "start_timestamp_ns,end_timestamp_ns,jct_ms,"
    "max_allocated_gpu_memory_allocated_byte,max_reserved_gpu_memory_byte"
)
PIDS = "models_pid.json"
#: Names of other files in the same folder, which a job may have too.
_TAKEN = frozenset(
    (
        *("requests", "preemptions", "power", "summary", "run", "spec", "models_pid"),
        *("tput", "pwr", "total_p0", "total_p50", "total_p90", "total_p99", "total_p100"),
    )
)


def deft_files(spec: ShareSpec, result: RunResult, *, deft_compat: bool) -> dict[str, bytes]:
    """Their names and contents. With `deft_compat` the first row of a CSV is the warm-up, as in Deft's own.

    A job without a recorded warm-up then gets a row from its measured time, since Deft's plots drop the first.
    """
    files = {}
    for found in result.jobs:
        job = spec.jobs[found.job]
        files[f"{stem(job)}.csv"] = _csv(found, result, deft_compat=deft_compat)
        config = deft_model(job, gate=result.mode is Mode.GATE)
        files[f"{stem(job)}.json"] = _json(config)
    pids = [[config_name(spec.jobs[found.job]), found.pid] for found in result.jobs]
    files[PIDS] = _json(pids)
    return files


def stem(job: Job) -> str:
    """The job's name in file names: its own, unless another file has it."""
    return f"job-{job.name}" if job.name in _TAKEN else job.name


def config_name(job: Job) -> str:
    """model_HxW_batch_B_sleep_S, S in seconds; without HxW where the model's own size is used."""
    size = f"_{job.size[0]}x{job.size[1]}" if job.size != (0, 0) else ""
    return f"{job.model}{size}_batch_{job.batch}_sleep_{_seconds(job.clients.think_ns)}"


def deft_model(job: Job, *, gate: bool) -> dict[str, Any]:
    """The job in the keys of Deft's configuration: what of it Deft knows."""
    kind = job.boundary.kind
    sync, event = kind is BoundaryKind.SYNC, kind is BoundaryKind.EVENT
    return {
        "model_name": job.model,
        "model_weight": "",
        "sleep_time": _seconds(job.clients.think_ns),
        "input_file_path": "",
        "output_file_path": "./logs",
        "output_file_name": job.name,
        "priority": job.priority,
        "resize": job.size != (0, 0),
        **({"resize_size": list(job.size)} if job.size != (0, 0) else {}),
        "batch_size": job.batch,
        "control": {
            "control": gate,
            "controlsync": sync,
            "controlEvent": event,
            "queue_limit": {
                "sync": job.boundary.every if sync else 0,
                "event_group": job.boundary.every if event else 0,
            },
        },
        "sync_level": "layer" if kind is BoundaryKind.LAYER else "",
    }


def _csv(found: JobResult, result: RunResult, *, deft_compat: bool) -> bytes:
    memory = f"{found.memory_allocated},{found.memory_reserved}"
    rows = [row for row in found.requests if row.counts]
    if deft_compat:
        rows = [_warmup(found, result), *rows]
    lines = (
        f"{row.arrived_ns},{row.ended_ns},{row.latency_ns / NS_PER_MS!r},{memory}" for row in rows
    )
    return ("\n".join((HEADER, *lines)) + "\n").encode()


def _warmup(found: JobResult, result: RunResult) -> Request:
    warmups = [row for row in found.requests if row.warmup]
    if warmups:
        return warmups[-1]
    took = found.prepared.exec_ns if found.prepared else 0
    begin = min([result.begin_ns, *(row.arrived_ns for row in found.requests)]) - took
    return Request(
        job=found.job,
        number=-1,
        arrived_ns=begin,
        started_ns=begin,
        ended_ns=begin + took,
        warmup=True,
    )


def _seconds(duration_ns: int) -> int | float:
    seconds = duration_ns / NS_PER_S
    return int(seconds) if seconds.is_integer() else seconds


def _json(value: list[Any] | Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=4) + "\n").encode()
