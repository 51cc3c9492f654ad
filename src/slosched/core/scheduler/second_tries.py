"""Requests whose action failed at the model's hands, and how they are tried again.

Two kinds of failure say that one request may be to blame for what befell the others of its batch:

- The action ended with its process (a crash, or its worker was lost): each of its requests is tried once
  more, alone on a GPU, and never again. A request that ends processes ends two at most.
- The model raised: the batch goes again as two halves, until only the culprit fails; only it reads the error.

What is tried again is a *lot*: requests of one model that go as one action, in which no other takes part. Lots
are sent here, for every policy alike, before the policy gives out what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from slosched.codes import Code, code_name
from slosched.core.scheduler.cluster import OVERDUE_SHARE, Cluster
from slosched.core.scheduler.openings import MAX_OUTSTANDING
from slosched.core.scheduler.policies.base import LAST_ONE_LOST, is_offered
from slosched.core.scheduler.state import ActionState, Gpu, Model, Request, RequestState
from slosched.units import NS_PER_MS

#: A lot that waits for a GPU or for weights is looked at again after this at the latest.
_LOOK_AGAIN_NS = NS_PER_MS
#: What the model itself, or its input, is at fault for: another try of the same batch would fail likewise.
MODEL_FAILED = frozenset(
    {
        Code.RUNTIME_ERROR,
        Code.INVALID_INPUT,
        Code.INVALID_BATCH_SIZE,
        Code.COPY_INPUT_INVALID_INPUT,
        Code.COPY_INPUT_BAD_SIZES,
    }
)
ONCE_MORE = "it was tried once more, alone, and the process ended again"

#: Answers a request: (request, code, words).
End = Callable[[Request, int, str], None]


class Lot:
    """`requests` of one model that go as one action. `alone`: a single one, with its GPU to itself."""

    __slots__ = ("alone", "asked_ns", "requests")

    def __init__(self, requests: Sequence[Request], *, alone: bool) -> None:
        self.requests = list(requests)
        self.alone = alone
        self.asked_ns = -1  # when its model's weights were last asked for

    @property
    def model(self) -> Model:
        return self.requests[0].model

    def order(self) -> tuple[int, int]:
        first = min(self.requests)
        return first.deadline_ns, first.key


class SecondTries:
    """The lots that wait. `end` answers a request; `wanted` is told of one whose weights are nowhere."""

    def __init__(
        self, cluster: Cluster, *, end: End, wanted: Callable[[Request, int], None]
    ) -> None:
        self._cluster, self._end, self._wanted = cluster, end, wanted
        self._lots: list[Lot] = []
        self._held: dict[int, Gpu] = {}  # GPUs kept free for what must run alone, by index
        self._lot_of: dict[int, Lot] = {}  # by request key

    @property
    def waiting(self) -> int:
        """Requests that wait here."""
        return len(self._lot_of)

    # -------------------------------------------------------------------------------- facts

    def process_ended(self, action: ActionState, code: int, reason: str) -> None:
        """The action ended with its process, or its worker was lost: each goes once more, alone."""
        for request in action.requests:
            if request.state is RequestState.ANSWERED:
                continue
            if request.tried_alone or not self._cluster.gpus:
                again = f"; {ONCE_MORE}" if request.tried_alone else ""
                self._end(request, code, _words(code, reason) + again)
                continue
            request.move(RequestState.ASIDE)
            request.tried_alone = True
            self._add(Lot((request,), alone=True))

    def model_failed(self, action: ActionState, code: int, reason: str) -> None:
        """The model raised: half of the batch each; one alone is the culprit, and reads the error."""
        left = [each for each in action.requests if each.state is not RequestState.ANSWERED]
        if len(action.requests) == 1:
            for request in left:
                self._end(request, code, _words(code, reason))
            return
        for request in left:
            request.move(RequestState.ASIDE)
        middle = (len(left) + 1) // 2
        for half in (left[:middle], left[middle:]):
            if half:
                self._add(Lot(half, alone=False))

    def again(self, request: Request) -> None:
        """What ran alone could not (it came too late, its weights were gone): alone still."""
        request.move(RequestState.ASIDE)
        self._add(Lot((request,), alone=True))

    def _add(self, lot: Lot) -> None:
        self._lots.append(lot)
        for request in lot.requests:
            self._lot_of[request.key] = lot

    def forget(self, request: Request) -> bool:
        """The request was answered by somebody else. True if it waited here."""
        lot = self._lot_of.pop(request.key, None)
        if lot is None:
            return False
        lot.requests.remove(request)
        if not lot.requests:
            self._lots.remove(lot)
        return True

    # ------------------------------------------------------------------------------- decisions

    def plan(self, *, now_ns: int) -> None:
        """Send what can go now; answer what cannot be in time any more."""
        if not self._lots and not self._held:
            return
        holds: dict[int, Gpu] = {}
        for lot in sorted(self._lots, key=Lot.order):
            self._drop_hopeless(lot, now_ns)
            if not lot.requests:
                continue
            if not lot.model.resident_on:
                self._ask_for_weights(lot, now_ns)
            elif lot.alone:
                self._try_alone(lot, holds, now_ns)
            else:
                self._try(lot, holds, now_ns)
        for index, gpu in [*self._held.items(), *holds.items()]:
            gpu.held = index in holds
            self._cluster.reopen(gpu)
        self._held = holds

    def next_wakeup_ns(self, now_ns: int) -> int | None:
        return now_ns + _LOOK_AGAIN_NS if self._lots else None

    def _drop_hopeless(self, lot: Lot, now_ns: int) -> None:
        """Answer those that could not be in time even alone, from now on, on the GPU that is best."""
        model = lot.model
        if not is_offered(self._cluster, model):
            self._give_up(lot.requests, Code.CANCELLED, LAST_ONE_LOST)
            return
        soonest_ns = min(
            (self._ends_ns(gpu, model, now_ns) for gpu in model.resident_on.values()),
            default=now_ns,
        )
        late = [each for each in lot.requests if each.deadline_ns < soonest_ns]
        if late:
            self._give_up(late, Code.TIMED_OUT, "its action failed, and no second try fits")

    def _give_up(self, requests: Sequence[Request], code: int, reason: str) -> None:
        for request in list(requests):
            self.forget(request)
            self._end(request, code, reason)

    def _ends_ns(self, gpu: Gpu, model: Model, now_ns: int) -> int:
        """When one request sent now would likely be answered."""
        start_ns = self._cluster.likely_start_ns(gpu, now_ns)
        return start_ns + gpu.exec_table(model).single.expected_ns + gpu.worker.returns.expected_ns

    def _ask_for_weights(self, lot: Lot, now_ns: int) -> None:
        if not lot.model.loading_on and now_ns - lot.asked_ns > _LOOK_AGAIN_NS:
            lot.asked_ns = now_ns
            self._wanted(lot.requests[0], now_ns)

    def _try_alone(self, lot: Lot, holds: dict[int, Gpu], now_ns: int) -> None:
        """Send the lot to a GPU where nothing is outstanding; one that works is kept free for it."""
        holders = [
            gpu
            for gpu in lot.model.resident_on.values()
            if gpu.index not in holds and not gpu.runs_alone and self._reports(gpu, now_ns)
        ]
        if not holders:
            return
        start_ns = self._cluster.earliest_start_ns
        gpu = min(holders, key=lambda g: (not g.held, start_ns(g, now_ns), g.index))
        if not gpu.exec.outstanding:
            action = self._send(gpu, lot, now_ns)
            if action is not None:
                action.alone = True
        elif 2 * len(holds) < len(lot.model.resident_on):  # the others go on serving
            holds[gpu.index] = gpu

    def _try(self, lot: Lot, holds: dict[int, Gpu], now_ns: int) -> None:
        holders = [
            gpu
            for gpu in lot.model.resident_on.values()
            if gpu.index not in holds
            and not gpu.runs_alone
            and len(gpu.exec.outstanding) < MAX_OUTSTANDING
            and self._reports(gpu, now_ns)
        ]
        if holders:
            start_ns = self._cluster.earliest_start_ns
            self._send(min(holders, key=lambda g: (start_ns(g, now_ns), g.index)), lot, now_ns)

    def _send(self, gpu: Gpu, lot: Lot, now_ns: int) -> ActionState | None:
        """Send those of the lot that can be in time together; None if none can on this GPU now."""
        table = gpu.exec_table(lot.model)
        requests = sorted(lot.requests)[: table.batches[-1]]
        returns_ns = gpu.worker.returns.expected_ns
        batch = expected_ns = 0
        while requests:
            batch = table.class_for(len(requests))
            expected_ns = table.estimators[batch].expected_ns
            ends_ns = self._cluster.likely_start_ns(gpu, now_ns) + expected_ns + returns_ns
            if requests[0].deadline_ns >= ends_ns:
                break
            requests = [each for each in requests if each.deadline_ns >= ends_ns]
        if not requests:
            return None
        for request in requests:
            self.forget(request)
        start_ns = self._cluster.earliest_start_ns(gpu, now_ns)
        last_ns = requests[-1].deadline_ns - expected_ns - returns_ns
        return self._cluster.send_infer(
            gpu,
            requests,
            batch,
            now_ns=now_ns,
            start_ns=start_ns,
            duration_ns=expected_ns,
            latest_ns=max(start_ns, last_ns),
        )

    def _reports(self, gpu: Gpu, now_ns: int) -> bool:
        """False if its report is overdue (openings.py): it is given nothing more until it reports."""
        outstanding = gpu.exec.outstanding
        if not outstanding:
            return True
        late_ns = now_ns - gpu.exec.busy_until_ns - gpu.worker.returns.margin_ns
        return late_ns <= outstanding[0].expected_duration_ns // OVERDUE_SHARE


def _words(code: int, reason: str) -> str:
    return f"{code_name(code)}: {reason}" if reason else code_name(code)
