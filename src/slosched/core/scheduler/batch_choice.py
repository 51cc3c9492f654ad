"""Which batch INFER5 gives to a GPU: the one of the smallest key (rules 2 to 4 of policies/infer5.py)."""

from __future__ import annotations

import math
from collections.abc import Iterable

from slosched.core.scheduler.losses import Losses
from slosched.core.scheduler.queues import first_from
from slosched.core.scheduler.state import Gpu, Queue, Request
from slosched.core.scheduler.urgency import (
    CREDIT,
    CREDIT_SLOPE,
    PENALTY,
    PENALTY_SLOPE,
    ROUNDING_NS,
    WEIGHT,
    WEIGHT_SLOPE,
    Entry,
    Urgency,
)
from slosched.core.scheduler.weights import (
    standing_of,
    take_worth_most,
    value_aboard,
    value_of,
    worth_most,
)

#: A batch: queue, number of its requests that are skipped, number that are taken, batch class.
Choice = tuple[Queue, int, int, int]

#: A batch that leaves time for the client's network latency is preferred if it costs at most this times the
#: GPU time per request.
_SPARE_COST = 1.25
#: When no other model waits, splitting into a smaller full batch and a follow-up is possible, so a padded
#: batch must beat it by this factor.
_PADDING_GAIN = 1.07
#: Up to this number of waiting models are examined in any order.
_FEW_QUEUES = 3
_NO_KEY = math.inf


class BatchChoice:
    """Chooses among the queues that `urgency` knows, and takes the requests of a choice out of its queue."""

    def __init__(self, urgency: Urgency, losses: Losses) -> None:
        self._urgency, self._losses = urgency, losses
        #: More requests are hopeless than one step answers: those that cannot be in time with a start from this
        #: time on. 0: all are answered. The policy sets it.
        self.hopeless_ns = 0
        self.models_looked_at = 0  # the cost of choices

    def best(
        self, gpu: Gpu, start_ns: int, now_ns: int, *, only: Queue | None = None
    ) -> tuple[Choice | None, bool]:
        """Return the batch of the smallest key (of the queue `only` if given), and whether some resident model
        has only requests that are too old.
        """
        best: Choice | None = None
        best_key, best_since, all_late, looked_at = _NO_KEY, 0, False, 0
        loss = self._losses.share
        credit = CREDIT + CREDIT_SLOPE * loss
        weight = WEIGHT + WEIGHT_SLOPE * loss
        penalty = PENALTY + PENALTY_SLOPE * loss
        returns = gpu.worker.returns
        floor_ns = start_ns + returns.margin_ns
        resident, tables, weighted = gpu.resident, gpu.tables, self._urgency.weighted
        dearer = _PADDING_GAIN if len(self._urgency.waiting) == 1 else 1.0
        likely_floor_ns, spread_ns = _before(gpu, now_ns)
        for bound, since, queue in self._in_order(gpu) if only is None else ((-_NO_KEY, 0, only),):
            if bound > best_key + ROUNDING_NS:
                break
            looked_at += 1
            if queue.instance.model_id not in resident:
                continue
            requests, rest_ns = queue.requests, queue.rest_ns
            waiting = len(requests)
            table = tables[queue.program]
            single_ns = table.single.expected_ns
            hopeless = self._hopeless(gpu, queue) if self.hopeless_ns else 0
            if hopeless == waiting:
                continue
            first_ns = head_ns = requests[hopeless].due_ns
            left, skipped, smaller, smaller_ns = waiting - hopeless, hopeless, 0, 0
            for batch, estimator in table.classes:
                if left <= smaller:
                    break
                expected_ns = estimator.expected_ns
                if likely_floor_ns and smaller == 0:
                    needs_ns = likely_floor_ns + expected_ns
                elif spread_ns:
                    spare_ns = math.isqrt(spread_ns**2 + (estimator.margin_ns - expected_ns) ** 2)
                    needs_ns = floor_ns + expected_ns + spare_ns
                else:
                    needs_ns = floor_ns + estimator.margin_ns
                needs_ns -= rest_ns  # in time is what ends by the deadline, not by the due date
                if first_ns < needs_ns:
                    skipped = first_from(requests, needs_ns, skipped + 1)
                    first_ns = requests[skipped].due_ns if skipped < waiting else first_ns
                left = waiting - skipped
                taken = left if left < batch else batch
                # Padding must pay: as many requests per millisecond as the full smaller class, or more.
                if taken > smaller and (
                    taken == batch or taken * smaller_ns >= expected_ns * smaller * dearer
                ):
                    value, batch_ns = float(taken), first_ns
                    if weighted and queue.queue_id in weighted:
                        aboard = worth_most(requests, skipped, taken, credit * single_ns, loss)
                        value, batch_ns = value_aboard(aboard, loss), aboard[0].due_ns
                    key = (
                        batch_ns
                        + head_ns / 4
                        + weight * expected_ns
                        + (penalty * (skipped - hopeless) - credit * value) * single_ns
                    )
                    if key < best_key or (key == best_key and since < best_since):
                        best, best_key, best_since = (queue, skipped, taken, batch), key, since
                smaller, smaller_ns = batch, expected_ns
            all_late |= skipped == waiting
        self.models_looked_at += looked_at
        return best, all_late

    def with_time_to_spare(self, gpu: Gpu, choice: Choice, start_ns: int, now_ns: int) -> Choice:
        """A batch whose answers leave time for the client's network latency, if it costs little more."""
        worker = gpu.worker
        to_spare_ns = worker.transit.expected_ns + worker.returns.expected_ns
        sparing, _ = self.best(gpu, start_ns + to_spare_ns, now_ns)
        if sparing is None:
            return choice
        cost_ns, other_ns = (
            gpu.tables[queue.program].estimators[batch].expected_ns / taken
            for queue, _, taken, batch in (choice, sparing)
        )
        return choice if other_ns > cost_ns * _SPARE_COST else sparing

    def take(self, gpu: Gpu, choice: Choice) -> list[Request]:
        """Take the batch's requests out of the queue, and mark those that it skipped."""
        queue, skipped, taken, _ = choice
        waiting = queue.requests
        if queue.queue_id not in self._urgency.weighted:
            requests = waiting[skipped : skipped + taken]
            del waiting[skipped : skipped + taken]
        else:
            loss = self._losses.share
            credit = CREDIT + CREDIT_SLOPE * loss
            single_ns = gpu.tables[queue.program].single.expected_ns
            requests, skipped = take_worth_most(waiting, skipped, taken, credit * single_ns, loss)
            weighted = sum(value_of(request) != 1.0 for request in requests)
            self._urgency.weighs_no_more(queue, weighted)
        if queue.instance.function is not None:
            skipped = 0  # they were late, or others are near
        for request in waiting[self._hopeless(gpu, queue) if self.hopeless_ns else 0 : skipped]:
            (request.policy_data or standing_of(request)).stepped_over = True
        self._urgency.shrank(queue)
        self._losses.served(taken)
        return requests

    def _in_order(self, gpu: Gpu) -> Iterable[Entry]:
        """Waiting queues that `gpu` may serve, ascending by the bound on their keys."""
        urgency, loss = self._urgency, self._losses.share
        waiting = urgency.waiting
        if len(waiting) <= _FEW_QUEUES:
            return [(0.0, urgency.since[i], q) for i, q in waiting.items()]
        if len(gpu.resident) * 4 < len(waiting):
            return urgency.among(gpu.resident.values(), loss)
        return urgency.in_order(loss)

    def _hopeless(self, gpu: Gpu, queue: Queue) -> int:
        """The number of unanswered requests of `queue` that are hopeless by the times of `gpu`."""
        needs_ns = gpu.tables[queue.program].single.expected_ns + gpu.worker.returns.expected_ns
        return first_from(queue.requests, self.hopeless_ns + needs_ns - queue.rest_ns)


def _before(gpu: Gpu, now_ns: int) -> tuple[int, int]:
    """(when a request alone likely ends on an idle GPU, but for its exec; 0: not idle), and the spread
    of what runs before. An idle GPU loses nothing by trying a request that is likely in time, and its run is
    measured.
    """
    if len(gpu.exec.outstanding) >= gpu.exec.width:
        return 0, gpu.exec.outstanding[-1].spread_ns
    worker = gpu.worker
    return now_ns + worker.transit.expected_ns + worker.returns.expected_ns, 0
