"""What `slosched status` shows: the scheduler's state as plain dicts and lists.

A view: these functions read the scheduler and change nothing. `slosched status`, GET /status and GET /healthz
are answered from here (long_replies.py, http.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from slosched.codes import code_name
from slosched.core.scheduler.policies import POLICY_TYPES
from slosched.core.scheduler.scheduler import Scheduler
from slosched.core.scheduler.state import Client, Gpu, Instance, ModelState, Worker, WorkerState
from slosched.daemon.cascade_status import cascade_reports
from slosched.daemon.function_status import function_reports, slots_of
from slosched.options import status_options

#: What the shell counted since it started (Tally.report), for the report's `counted`.
Counted = Callable[[], dict[str, Any]]
#: Clients, or model instances, in one part: some hundred microseconds.
A_PART = 50


def status_report(
    scheduler: Scheduler, *, now_ns: int, brief: bool = False, counted: Counted = dict
) -> dict[str, Any]:
    """The whole report. Times in ns on the controller's clock.

    A `brief` one leaves out the model instances and some fields of workers and GPUs, so that it costs little
    for a large cluster.
    """
    report: dict[str, Any] = {}
    for _ in status_parts(report, scheduler, now_ns=now_ns, brief=brief, counted=counted):
        pass
    return report


def status_parts(
    report: dict[str, Any],
    scheduler: Scheduler,
    *,
    now_ns: int,
    brief: bool = False,
    counted: Counted,
) -> Iterator[None]:
    """Fill `report` with what `status_report` returns, a part before each yield.

    The scheduler may go on between two parts; each part then shows the state of its own moment.
    """
    report.update(_head(scheduler, now_ns), counted=counted())
    if scheduler.cluster.cascades.by_name:
        of_cascades = report["counted"].get("cascades", {})
        report["cascades"] = cascade_reports(scheduler, of_cascades)
    yield
    clients: list[dict[str, Any]] = []
    workers: list[dict[str, Any]] = []
    models: list[dict[str, Any]] = []
    report.update(clients=clients, workers=workers, model_instances=0, models=models)
    everyone = list(scheduler.clients.values())
    for at in range(0, len(everyone), A_PART):
        clients += [_client(client) for client in everyone[at : at + A_PART]]
        yield
    for worker in list(scheduler.cluster.workers.values()):
        workers.append(_brief_worker(worker) if brief else _worker(worker, now_ns))
        yield
    instances = list(scheduler.cluster.models.values())
    report["model_instances"] = sum(m.function is None for m in instances)
    of_functions = report["counted"].get("functions", {})
    functions: list[dict[str, Any]] = []
    for at in range(0, 0 if brief else len(instances), A_PART):
        some = instances[at : at + A_PART]
        models += _models([m for m in some if m.function is None])
        functions += function_reports(some, of_functions)
        yield
    if functions:
        report["functions"] = functions


def _head(scheduler: Scheduler, now_ns: int) -> dict[str, Any]:
    config = scheduler.cluster.config
    origin = POLICY_TYPES.origin(config.policy)
    return {
        "now_ns": now_ns,
        "incarnation": scheduler.incarnation,
        "cluster_id": scheduler.cluster_id,
        "policy": config.policy,
        "policy_package": "" if origin is None else origin.text,
        "fidelity": config.fidelity,
        "options": status_options(config),
        "client_weights": config.client_weights,
        "weights": [
            {"client": r.client, "slo_max_ns": r.slo_max_ns, "weight": r.weight}
            for r in config.weights
        ],
        "draining": scheduler.draining,
        "ready": scheduler.ready(),
        "requests": _requests(scheduler, now_ns),
    }


def _client(client: Client) -> dict[str, Any]:
    return {
        "name": client.name,
        "unanswered": len(client.requests),
        "models": len(client.models),
        "weight": client.weight,
    }


def _requests(scheduler: Scheduler, now_ns: int) -> dict[str, Any]:
    # A request counts as in flight until its action ends, also when it was cancelled meanwhile.
    in_flight = sum([len(action.requests) for action in scheduler.cluster.actions.values()])
    return {
        "arrived": scheduler.arrived,
        "invalid": scheduler.invalid,
        "refused_at_door": scheduler.door.refused,
        "answered": scheduler.answered,
        "by_code": {f"{c} {code_name(c)}": n for c, n in sorted(scheduler.by_code.items())},
        "queued": max(0, scheduler.arrived - scheduler.answered - in_flight),
        "in_flight": in_flight,
        "oldest_unanswered_ns": now_ns - oldest_arrival_ns(scheduler, now_ns=now_ns),
    }


def _models(models: Iterable[Instance]) -> list[dict[str, Any]]:
    return [
        {
            "model_id": m.model_id,
            "name": m.name,
            "copy": m.copy,
            "state": m.state.name.lower(),
            "b1_ns": m.b1_ns,
            "queued": m.queued,
            "gpus_resident": len(m.resident_on),
            "clients": len(m.clients),
        }
        for m in models
        if m.state is not ModelState.FAILED
    ]


def oldest_arrival_ns(scheduler: Scheduler, *, now_ns: int) -> int:
    """Arrival of the request that has waited longest for its answer; `now_ns` without any."""
    oldest_ns = now_ns
    for client in scheduler.clients.values():
        for request in client.requests.values():  # in the order of their arrival
            oldest_ns = min(oldest_ns, request.arrival_ns)
            break
    return oldest_ns


def health_report(scheduler: Scheduler) -> dict[str, Any]:
    """The answer to a health probe. Its cost does not grow with the number of models."""
    workers = scheduler.cluster.present()
    missing = [w.worker_id for w in workers if w.state is WorkerState.SILENT]
    return {
        "status": "degraded" if missing else "ok",
        "ready": scheduler.ready(),
        "draining": scheduler.draining,
        "workers_missing": missing,
        "workers": len(workers),
    }


def _worker(worker: Worker, now_ns: int) -> dict[str, Any]:
    return {
        "worker_id": worker.worker_id,
        "name": worker.name,
        "address": worker.address,
        "state": worker.standing,
        "host": worker.host,
        "pid": worker.pid,
        "device": worker.device,
        "version": worker.version,
        "activity": worker.beat.activity,
        "times_lost": worker.times_lost,
        "clock_offset_ns": worker.beat.clock_offset_ns,
        "clock_error_ns": worker.beat.clock_error_ns,
        "transit_ns": worker.transit.expected_ns,
        "transit_margin_ns": worker.transit.margin_ns,
        "return_ns": worker.returns.expected_ns,
        "return_margin_ns": worker.returns.margin_ns,
        "errors": worker.beat.errors,
        "dropped": worker.beat.dropped,
        "put_aside": _not_used(worker),
        "left_out": worker.left_out,
        "leaving": worker.leaving,
        "spare_gpus": len(worker.spare),
        "gpus": [_gpu(g, now_ns) for g in worker.gpus],
    }


def _not_used(worker: Worker) -> dict[str, str]:
    """Models that are not used on this worker: name -> reason."""
    if not worker.unlike:
        return worker.put_aside
    return worker.put_aside | {name: each.reason for name, each in worker.unlike.items()}


def _brief_worker(worker: Worker) -> dict[str, Any]:
    return {
        "worker_id": worker.worker_id,
        "name": worker.name,
        "state": worker.standing,
        "host": worker.host,
        "activity": worker.beat.activity,
        "times_lost": worker.times_lost,
        "clock_error_ns": worker.beat.clock_error_ns,
        "put_aside": _not_used(worker),
        "left_out": worker.left_out,
        "leaving": worker.leaving,
        "spare_gpus": len(worker.spare),
        "gpus": [
            {
                "gpu_id": g.gpu_id,
                "pages": g.pages,
                "free_pages": g.free_pages,
                "resident": len(g.resident),
                "outstanding": len(g.exec.outstanding),
                "busy_ns": g.busy_ns,
                **_slots(g),
            }
            for g in worker.gpus
        ],
    }


def _gpu(gpu: Gpu, now_ns: int) -> dict[str, Any]:
    return {
        "gpu_id": gpu.gpu_id,
        "pages": gpu.pages,
        "free_pages": gpu.free_pages,
        "resident": len(gpu.resident),
        "loading": len(gpu.loading),
        "outstanding": len(gpu.exec.outstanding),
        "busy_ns": gpu.busy_ns,
        "clock_mhz": gpu.clock_mhz,
        "stats": _stats(gpu, now_ns),
        **_slots(gpu),
    }


def _slots(gpu: Gpu) -> dict[str, Any]:
    """How the slots of a host are used, and a GPU by calls."""
    return slots_of(gpu) if gpu.host or gpu.suspended else {}


def _stats(gpu: Gpu, now_ns: int) -> dict[str, Any] | None:
    """The driver's last report, with None for a value that it does not report; None without a driver.

    `energy_mj` counts since the worker joined.
    """
    stats = gpu.driver.stats
    if stats is None:
        return None
    numbers = {
        "sm_percent": stats.sm_percent,
        "memory_percent": stats.memory_percent,
        "memory_used_bytes": stats.memory_used_bytes,
        "memory_total_bytes": stats.memory_total_bytes,
        "power_mw": stats.power_mw,
        "energy_mj": -1
        if stats.energy_mj < 0
        else stats.energy_mj - max(0, gpu.driver.joined_energy_mj),
        "temperature_c": stats.temperature_c,
        "sm_clock_mhz": stats.sm_clock_mhz,
        "memory_clock_mhz": stats.memory_clock_mhz,
        "throttle_reasons": stats.throttle_reasons,
    }
    return {
        "name": stats.name,
        "uuid": stats.uuid,
        "driver": stats.driver,
        "age_ns": now_ns - gpu.driver.stats_ns,
        **{field: None if value < 0 else value for field, value in numbers.items()},
    }
