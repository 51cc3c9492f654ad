"""One training on an engine, as a record: times, losses, bytes moved, lost updates, and what it was billed."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from slosched.engines.engine import Engine
from slosched.errors import SloschedError
from slosched.faasm.sgd import functions, replica
from slosched.faasm.sgd.examples import Examples
from slosched.faasm.sgd.kernel import hinge, loss_of
from slosched.faasm.sgd.reference import Curve
from slosched.faasm.sgd.training import Training, instance_bytes
from slosched.functions.state.state import State
from slosched.units import NS_PER_S

#: A training that takes longer is given up.
TRAINING_S = 3600
_LEAVE_S = 30
#: Rounds in which all instances are asked to give up their copies.
_ROUNDS = 10


class NotAsAsked(SloschedError):
    """A run did not have the workers that it was to have, so its numbers are of something else."""


class Bill(Protocol):
    """What faasm/billing.py has once its block has ended."""

    @property
    def processes(self) -> dict[Any, Any]: ...
    def record(self) -> dict[str, Any]: ...


#: Begins a bill.
Billed = Callable[[], AbstractContextManager[Any]]


def measured(
    engine: Engine,
    state: State,
    training: Training,
    examples: Examples,
    *,
    truth: Curve,
    target: float,
    billed: Billed,
) -> dict[str, Any]:
    """Upload, train, look at what arrived, and clear the training's keys. `truth` is the sequential training.

    Raises CallFailed, TimeoutError, what the state raises, and NotAsAsked if other workers trained than those
    asked for.
    """
    uploaded = replica.upload(state, training, examples)
    try:
        with billed() as bill:
            call = engine.call(functions.train, training.message(), slo=TRAINING_S)
            found = call.result(TRAINING_S + 60)
        weights, noted = replica.arrived(state, training)
        left = _leave(engine, training, [int(pid) for pid in found["steps"]])
    finally:
        replica.drop(state, training)
    steps = sum(found["steps"].values())
    wanted = len(training.batches) * training.epochs
    if steps != wanted:
        raise NotAsAsked(f"{training.id}: {steps} batches were trained, and {wanted} asked for")
    record = _outcome(training, examples, found, weights, truth, target)
    record |= {"uploaded_bytes": uploaded, "copies_left": left}
    record |= _lost(training, found["totals"], noted)
    return record | _bill(bill, training, found["steps"], found["epochs"][-1]["ns"])


def _outcome(
    training: Training,
    examples: Examples,
    found: dict[str, Any],
    weights: np.ndarray[Any, np.dtype[np.float64]],
    truth: Curve,
    target: float,
) -> dict[str, Any]:
    losses = [loss_of(each["hinge"], training.rows) for each in found["epochs"]]
    ends_s = [each["ns"] / NS_PER_S for each in found["epochs"]]
    totals = found["totals"]
    alone = len(training.batches) == 1 and training.epochs == len(truth.losses)
    return {
        "train_s": ends_s[-1],
        "epoch_ends_s": ends_s,
        "losses": losses,
        "loss": losses[-1],
        **judged(examples, weights),
        "target": target,
        "target_s": reached_s(losses, ends_s, target),
        "batches": len(training.batches),
        "instances": len(found["steps"]),
        "equal_to_sequential": bool(alone and losses == truth.losses and same_bits(weights, truth)),
        "largest_difference": float(np.abs(weights - truth.weights).max()) if alone else None,
        "updates": totals["updates"],
        "syncs": totals["syncs"],
        "inputs_pulled_bytes": totals["inputs_pulled"],
        "weights_pulled_bytes": totals["weights_pulled"],
        "weights_pushed_bytes": totals["weights_pushed"],
        "ledger_bytes": totals["ledger"],
        "instance_copy_bytes": instance_bytes(examples),
    }


def judged(
    examples: Examples, weights: np.ndarray[Any, np.dtype[np.float64]]
) -> dict[str, float | None]:
    """The loss of these weights over all rows, and their accuracy on those held out (None without any)."""
    train, held = examples.train, examples.held_out
    total, _ = hinge(train.offsets, train.columns, train.values, train.labels, weights)
    accuracy = None
    if len(held):
        _, right = hinge(held.offsets, held.columns, held.values, held.labels, weights)
        accuracy = right / len(held)
    return {"arrived_loss": loss_of(total, len(train)), "accuracy": accuracy}


def reached_s(losses: list[float], ends_s: list[float], target: float) -> float | None:
    """Seconds until the end of the first epoch whose loss is at most `target`; None if none has it."""
    return next((end for loss, end in zip(losses, ends_s, strict=True) if loss <= target), None)


def same_bits(weights: np.ndarray[Any, np.dtype[np.float64]], truth: Curve) -> bool:
    return bool(np.array_equal(weights.view(np.int64), truth.weights.view(np.int64)))


def _lost(training: Training, totals: dict[str, int], arrived: int) -> dict[str, Any]:
    """How many of the updates that changed a weight did not arrive in the global tier."""
    if not training.count_lost:
        return {}
    made = totals["noted"]
    return {
        "updates_noted": made,
        "updates_arrived": arrived,
        "updates_lost": made - arrived,
        "lost_share": (made - arrived) / made if made else 0.0,
    }


def _bill(bill: Bill, training: Training, steps: dict[int, int], train_ns: int) -> dict[str, Any]:
    """The bill of all processes, and the same of the instances alone, which are those that trained."""
    found = bill.record()
    peaks = [p.peak_pss_bytes for p in bill.processes.values() if p.pid in set(map(int, steps))]
    if not peaks:
        return found
    # The paper's formula: peak memory of a function x number of functions x time.
    paper = max(peaks) * len(training.batches) * train_ns / 1e9 / NS_PER_S
    return found | {
        "instance_peak_pss_mb": max(peaks) / 1e6,
        "instances_pss_mb": sum(peaks) / 1e6,
        "gb_s_instances": paper,
        "gb_s_instances_sum": sum(peaks) * train_ns / 1e9 / NS_PER_S,
    }


def _leave(engine: Engine, training: Training, pids: list[int]) -> int:
    """Ask the instances to give up what they hold of the training. Returns how many could not be reached."""
    waiting = set(pids)
    for _ in range(_ROUNDS):
        if not waiting:
            break
        message = training.message()
        calls = [
            engine.call(functions.step, message, 0, 0, 0, 0, leave=True, slo=_LEAVE_S)
            for _ in range(max(1, len(waiting)))
        ]
        waiting -= {int(call.result(_LEAVE_S + 10)["pid"]) for call in calls}
    return len(waiting)


def lack_of_memory(examples: Examples, workers: int, *, private: bool) -> str:
    """Why `workers` instances do not fit this host; empty if they do. They may take 0.8 of what is free."""
    copies = workers if private else 1
    # The global tier and the engine's copy of the weights beside those of the instances.
    needed = copies * instance_bytes(examples) + examples.nbytes
    free = _free_bytes()
    if needed <= 0.8 * free:
        return ""
    return f"{copies} copies take {needed / 1e9:.1f} GB of shared memory, and {free / 1e9:.1f} GB are free"


def _free_bytes() -> int:
    """Free memory, of which shared memory may be less."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
        place = os.statvfs("/dev/shm")
        free = min(free, place.f_bavail * place.f_frsize)
    except OSError:
        pass
    return free
