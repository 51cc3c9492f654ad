"""The functions of the experiment: one call trains, with a call for each batch of each epoch below it.

Every engine runs them. Worker processes import this module, so it imports numba where it is needed.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import msgspec

import slosched
from slosched.clock import now_ns, sleep_ns
from slosched.faasm.sgd.training import NO_INTERVAL, Training, training_of
from slosched.functions.context import Context

if TYPE_CHECKING:
    from slosched.faasm.sgd.replica import Instance

#: A process that is told to leave stays busy for that long, so that the next such call goes to another one.
_LEAVING_NS = 20_000_000


def _instance() -> Instance:
    """What a process needs before its first step: the compiled loops."""
    from slosched.faasm.sgd.kernel import warm_up
    from slosched.faasm.sgd.replica import Instance

    warm_up()
    return Instance()


def _size_class(
    training: dict[str, Any], epoch: int, number: int, start: int, stop: int, *, leave: bool = False
) -> int:
    """Batches of about the same number of rows share a forecast."""
    return min(15, max(1, (stop - start).bit_length() - 4)) if not leave else 0


@slosched.function(
    name="sgd_step", init=_instance, limit="30m", expected="5ms", slo="1h", size=_size_class
)
def step(
    ctx: Context,
    training: dict[str, Any],
    epoch: int,
    number: int,
    start: int,
    stop: int,
    *,
    leave: bool = False,
) -> dict[str, Any]:
    """Train on rows [start, stop), which are batch `number` of the epoch, in a random order.

    Returns the process, the sum of the hinge losses of these rows with the weights that it sees at its end,
    the numbers of updates made and noted in the ledger, and what was exchanged (replica.Exchanged). With
    `leave` the process gives up its replica instead.
    """
    instance: Instance = ctx.init
    if leave:
        had = instance.leave()
        sleep_ns(_LEAVING_NS)
        return {"pid": os.getpid(), "had": had}
    return _step(ctx, instance, training_of(training), epoch, start, stop)


def _step(
    ctx: Context, instance: Instance, training: Training, epoch: int, start: int, stop: int
) -> dict[str, Any]:
    from slosched.faasm.sgd.kernel import NEVER, advance, hinge
    from slosched.faasm.sgd.randomness import shuffled

    replica = instance.replica(ctx.state, training)
    rows = replica.rows(start, stop)
    order = shuffled(stop - start, training.seed, epoch, start)
    budget = NEVER if training.interval == NO_INTERVAL else training.interval
    data = rows.offsets, rows.columns, rows.values, rows.labels
    weights, ledger = replica.weights, replica.ledger
    position = updates = noted = 0
    while position < len(order):
        position, made, counted = advance(
            order,
            position,
            *data,
            replica.counts,
            weights,
            ledger,
            training.rate,
            training.mu,
            budget,
        )
        updates, noted = updates + made, noted + counted
        replica.exchange()
    total, _ = hinge(*data, weights)
    return {
        "pid": os.getpid(),
        "hinge": float(total),
        "updates": int(updates),
        "noted": int(noted),
        "exchanged": msgspec.to_builtins(replica.taken()),
    }


@slosched.function(name="sgd_train", limit="30m", expected="10ms", slo="1h")
async def train(ctx: Context, training: dict[str, Any]) -> dict[str, Any]:
    """All epochs, one after the other. In each, a call for each batch, begun in a random order.

    Returns for each epoch the time in ns since the training began and the sum of the hinge losses, and the
    steps' other numbers by process.
    """
    spec = training_of(training)
    batches = list(enumerate(spec.batches))
    began_ns = now_ns()
    epochs: list[dict[str, Any]] = []
    pids: dict[int, int] = {}
    totals: dict[str, int] = {}
    for epoch in range(spec.epochs):
        refs = {
            number: ctx.chain(step, training, epoch, number, *batches[number][1])
            for number in _order(spec, epoch)
        }
        results = dict(zip(refs, await slosched.gather(*refs.values()), strict=True))
        # Added in the order of the batches, so that the sum does not depend on who was first.
        loss = sum(results[number]["hinge"] for number, _ in batches)
        epochs.append({"ns": now_ns() - began_ns, "hinge": loss})
        for each in results.values():
            pids[each["pid"]] = pids.get(each["pid"], 0) + 1
            for name in ("updates", "noted"):
                totals[name] = totals.get(name, 0) + each[name]
            for name, moved in each["exchanged"].items():
                totals[name] = totals.get(name, 0) + moved
    return {"epochs": epochs, "steps": pids, "totals": totals}


def _order(training: Training, epoch: int) -> list[int]:
    """The batches in the order in which they are begun in this epoch: by a mix of seed, epoch and number."""
    import random

    order = list(range(len(training.batches)))
    random.Random(f"{training.seed} {epoch}").shuffle(order)
    return order
