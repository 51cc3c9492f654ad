"""Requests whose model or process failed, and how they are tried again.

Two kinds of failure say that one request may be to blame for the failure of its whole batch:

- The action ended with its process (a crash, or its worker was lost): each of its requests is tried once
  more, alone on a GPU, and never again. A request that ends processes ends two at most.
- The model raised: the batch goes again as two halves, until only the culprit fails; only it reads the error.

What is tried again is a *lot*: requests of one model that form one action of their own. SecondTries sends lots
itself, under every policy, before the policy plans. It also loads the weights of a lot that no GPU holds,
because placement does not see lots.

A worker that reports the end of a process may be about to end, and fails every action until then. While other
GPUs are there it gets nothing for `_ENDING_NS`, so that no second try is lost on it.

Lots of one model wait in the order of their deadlines, and a step looks only at those at the front: as many
as can go, and the first that cannot.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Mapping, Sequence
from heapq import heapify, heappop, heappush

from slosched.codes import ActionType, Code, code_name
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.policies.base import LAST_ONE_LOST, is_offered
from slosched.core.scheduler.state import ActionState, Gpu, Instance, Queue, Request, RequestState
from slosched.units import NS_PER_MS, NS_PER_S

#: A lot that waits for a GPU or for weights is looked at again after this at the latest.
_LOOK_AGAIN_NS = NS_PER_MS
#: Longer than a process that lost its device takes to end, and its worker to be missed.
_ENDING_NS = NS_PER_S
#: A load for a lot is sent behind at most one other, as placement's are.
_MOST_LOADS = 2
#: How late a load may start.
_LOAD_WINDOW_NS = NS_PER_S
#: Codes of failures that the model itself or its input caused: the same batch would fail again.
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
    """`requests` of one instance that go as one action. `alone`: a single one, with its GPU to itself."""

    __slots__ = ("alone", "order", "queue", "requests")

    def __init__(self, requests: Sequence[Request], *, alone: bool) -> None:
        self.requests = sorted(requests)
        self.alone = alone
        #: The longest of its length classes, where requests of several ran together.
        self.queue = max([each.queue for each in self.requests], key=lambda queue: queue.length)
        self.order = self._order()

    def _order(self) -> tuple[int, int]:
        first = self.requests[0]
        return first.deadline_ns, first.key

    def remove(self, request: Request) -> None:
        self.requests.remove(request)
        if self.requests:
            self.order = self._order()


def _order_of(lot: Lot) -> tuple[int, int]:
    return lot.order


class _Holders:
    """The GPUs that hold one model's weights, as one step of `SecondTries` sees them: the soonest first.

    A lot that must run alone can get one of `idle` and `busy`; `open` is for the others.
    """

    __slots__ = ("busy", "idle", "open", "soonest_ns")

    def __init__(self) -> None:
        self.soonest_ns = -1  # when one request could be answered at the earliest; -1: it cannot
        self.idle: list[Gpu] = []
        self.busy: list[Gpu] = []
        self.open: list[Gpu] = []


class SecondTries:
    """The lots that wait.

    `end` answers a request. `wanted` is called for a queued request whose model was evicted for a lot. Devices
    in `full` get nothing (full_hosts.py).
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        end: End,
        wanted: Callable[[Request, int], None],
        full: Mapping[int, Gpu],
    ) -> None:
        self._cluster, self._end, self._wanted = cluster, end, wanted
        self._full = full
        #: By queue id and whether alone; each in its order, and none is empty.
        self._lots: dict[tuple[int, bool], list[Lot]] = {}
        #: GPUs kept free for lots that must run alone or whose weights must be loaded, by index.
        self._held: dict[int, Gpu] = {}
        self._loading: dict[int, Gpu] = {}  # model id -> the one of these that its weights go to
        self._ending: dict[int, tuple[Gpu, int]] = {}  # GPU index -> until when it gets nothing
        self._leaving: dict[int, Gpu] = {}  # whose workers said goodbye
        #: All of these, and the full ones; those that may end unless there are no others.
        self._shunned: dict[int, Gpu] = {}
        self._lot_of: dict[int, Lot] = {}  # by request key
        #: The cost of decisions: lots and GPUs examined.
        self.lots_looked_at = 0
        self.gpus_looked_at = 0

    @property
    def waiting(self) -> int:
        """Requests that wait here."""
        return len(self._lot_of)

    def of(self, model: Instance) -> list[Request]:
        """The requests for `model` that wait here."""
        lots = [lot for each in self._lots.values() for lot in each]
        return [r for lot in lots if lot.queue.instance is model for r in lot.requests]

    # -------------------------------------------------------------------------------- facts

    def process_ended(
        self, action: ActionState, code: int, reason: str, *, now_ns: int, ending: bool
    ) -> None:
        """The action ended with its process: each goes once more, alone. `ending`: so may its worker."""
        if ending:
            for gpu in action.gpu.worker.gpus:
                self._ending[gpu.index] = (gpu, now_ns + _ENDING_NS)
        for request in action.requests:
            if request.state is RequestState.ANSWERED:
                continue
            if request.tried_alone or not self._cluster.gpus:
                again = f"; {ONCE_MORE}" if request.tried_alone else ""
                self._end(request, code, _reason_text(code, reason) + again)
                continue
            request.move(RequestState.ASIDE)
            request.tried_alone = True
            request.excused += 1
            self._add(Lot((request,), alone=True))

    def model_failed(self, action: ActionState, code: int, reason: str) -> None:
        """The model raised: half of the batch each; one alone is the culprit, and reads the error."""
        left = [each for each in action.requests if each.state is not RequestState.ANSWERED]
        if len(action.requests) == 1:
            for request in left:
                self._end(request, code, _reason_text(code, reason))
            return
        for request in left:
            request.move(RequestState.ASIDE)
            request.excused += 1
        middle = (len(left) + 1) // 2
        for half in (left[:middle], left[middle:]):
            if half:
                self._add(Lot(half, alone=False))

    def again(self, request: Request) -> None:
        """What ran alone could not (it came too late, its weights were gone): alone still."""
        request.move(RequestState.ASIDE)
        self._add(Lot((request,), alone=True))

    def _add(self, lot: Lot) -> None:
        self._put(lot)
        for request in lot.requests:
            self._lot_of[request.key] = lot

    def _put(self, lot: Lot) -> None:
        lots = self._lots.setdefault((lot.queue.queue_id, lot.alone), [])
        insort(lots, lot, key=_order_of)

    def forget(self, request: Request) -> bool:
        """The request was answered elsewhere. True if it waited here."""
        lot = self._lot_of.pop(request.key, None)
        if lot is None:
            return False
        key = (lot.queue.queue_id, lot.alone)
        lots = self._lots[key]
        del lots[bisect_left(lots, lot.order, key=_order_of)]
        if not lots:
            del self._lots[key]
        lot.remove(request)
        if lot.requests:
            self._put(lot)
        return True

    def leaves(self, gpu: Gpu) -> None:
        """Its worker said goodbye: it gets nothing any more."""
        self._leaving[gpu.index] = gpu

    # ------------------------------------------------------------------------------- decisions

    def plan(self, *, now_ns: int) -> None:
        """Send what can go now; answer what cannot be in time any more."""
        if not (self._lots or self._held or self._ending or self._leaving or self._full):
            return
        self._shun(now_ns)
        holds = dict(self._shunned)
        if self._lots:
            self._give_out(holds, now_ns)
        for index, gpu in {**self._held, **holds}.items():
            if gpu.held != (index in holds):
                gpu.held = index in holds
                self._cluster.reopen(gpu)
        self._held = holds

    def next_wakeup_ns(self, now_ns: int) -> int | None:
        if self._lots:
            return now_ns + _LOOK_AGAIN_NS
        ends = (self._ending[index][1] for index in self._shunned if index in self._ending)
        return min(ends, default=None)

    def _shun(self, now_ns: int) -> None:
        """Find the GPUs to avoid: their workers are leaving, or may be about to end."""
        gpus = self._cluster.gpus
        for index, (gpu, until_ns) in list(self._ending.items()):
            if now_ns >= until_ns or gpus.get(index) is not gpu:
                del self._ending[index]
        self._leaving = {i: gpu for i, gpu in self._leaving.items() if gpus.get(i) is gpu}
        ending = {i: gpu for i, (gpu, _) in self._ending.items() if i not in self._leaving}
        others = len(ending) + len(self._leaving) < len(gpus)
        self._shunned = {**(ending if others else {}), **self._leaving, **self._full}

    def _give_out(self, holds: dict[int, Gpu], now_ns: int) -> None:
        """Look at the lots by deadline; of each model and kind no further than the first that must wait."""
        for model_id in [i for i in self._loading if not self._waits_for_weights(i)]:
            del self._loading[model_id]
        seen: dict[int, _Holders] = {}
        heads = [(lots[0].order, key, 0) for key, lots in self._lots.items()]
        heapify(heads)
        while heads:
            _, key, place = heappop(heads)
            lot = self._lots[key][place]
            self.lots_looked_at += 1
            holders = seen.get(key[0])
            if holders is None:
                holders = seen[key[0]] = self._look(lot.queue, holds, now_ns)
            left = len(lot.requests)
            self._drop_hopeless(lot, holders, now_ns)
            if len(lot.requests) == left:
                if holders.soonest_ns < 0:
                    self._load(lot.queue.instance, holds, now_ns)
                    continue
                sent = self._try_alone if lot.alone else self._try
                if not sent(lot, holders, holds, now_ns):
                    if not (lot.alone and self._hold(holders, holds)):
                        continue
                    place += 1
            lots = self._lots.get(key, ())
            if place < len(lots):
                heappush(heads, (lots[place].order, key, place))

    def _waits_for_weights(self, model_id: int) -> bool:
        model = self._cluster.models.get(model_id)
        if model is None:
            return False  # it is unloaded
        resident = model.resident_on.keys() - self._shunned.keys()
        keys = [(queue.queue_id, alone) for queue in model.queues for alone in (False, True)]
        return not resident and any(key in self._lots for key in keys)

    def _look(self, queue: Queue, holds: dict[int, Gpu], now_ns: int) -> _Holders:
        cluster, found = self._cluster, _Holders()
        ranked = []
        for index, gpu in queue.instance.resident_on.items():
            self.gpus_looked_at += 1
            if index in self._shunned:
                continue
            ends_ns = self._ends_ns(gpu, queue, now_ns)
            if found.soonest_ns < 0 or ends_ns < found.soonest_ns:
                found.soonest_ns = ends_ns
            if index not in holds and not gpu.runs_alone and self._cluster.reports(gpu, now_ns):
                ranked.append((cluster.earliest_start_ns(gpu, now_ns), index, gpu))
        ranked.sort()
        for _, _, gpu in sorted(ranked, key=lambda entry: not entry[2].held):
            # What runs alone may end calls, and a child waits for its parent's GPU.
            if not _has_calls(gpu):
                (found.busy if gpu.exec.outstanding else found.idle).append(gpu)
        found.open = [gpu for _, _, gpu in ranked]
        return found

    def _drop_hopeless(self, lot: Lot, holders: _Holders, now_ns: int) -> None:
        """Answer those that could not be in time even alone, from now on, on the GPU that is best."""
        instance = lot.queue.instance
        if not instance.resident_on and not is_offered(self._cluster, instance):
            self._give_up(lot.requests, Code.CANCELLED, LAST_ONE_LOST)
            return
        soonest_ns = holders.soonest_ns if holders.soonest_ns >= 0 else now_ns
        late = [each for each in lot.requests if each.deadline_ns < soonest_ns]
        if late:
            self._give_up(late, Code.TIMED_OUT, "its action failed, and no second try fits")

    def _give_up(self, requests: Sequence[Request], code: int, reason: str) -> None:
        for request in list(requests):
            self.forget(request)
            self._end(request, code, reason)

    def _ends_ns(self, gpu: Gpu, queue: Queue, now_ns: int) -> int:
        """When one request sent now would likely be answered."""
        start_ns = self._cluster.likely_start_ns(gpu, now_ns)
        return start_ns + gpu.exec_table(queue).single.expected_ns + gpu.worker.returns.expected_ns

    def _try_alone(self, lot: Lot, holders: _Holders, holds: dict[int, Gpu], now_ns: int) -> bool:
        """Send the lot to a GPU where nothing is outstanding."""
        for gpu in holders.idle:
            if gpu.exec.outstanding or gpu.suspended or gpu.index in holds:
                continue  # by another lot, meanwhile
            action = self._send(gpu, lot, now_ns)
            if action is not None:
                action.alone = True
                holders.idle.remove(gpu)
                return True
        return False

    def _hold(self, holders: _Holders, holds: dict[int, Gpu]) -> bool:
        """Keep a GPU that works free for what must run alone, if that may be."""
        while holders.busy and self._may_keep(holds):
            gpu = holders.busy.pop(0)
            if gpu.index not in holds and not gpu.runs_alone:
                holds[gpu.index] = gpu
                return True
        return False

    def _may_keep(self, holds: dict[int, Gpu]) -> bool:
        """Another GPU may be kept free: no more than half of them are, or one, so that others are served."""
        gpus = self._cluster.gpus
        there = len(gpus) - len(self._shunned)
        kept = sum(gpu.runs_alone for gpu in gpus.values()) + len(holds) - len(self._shunned)
        return 2 * kept < there

    def _try(self, lot: Lot, holders: _Holders, holds: dict[int, Gpu], now_ns: int) -> bool:
        """Send the lot, or those of it that can be in time together, to the GPU that starts it soonest."""
        able = [
            gpu
            for gpu in holders.open
            if gpu.index not in holds
            and not gpu.runs_alone
            and len(gpu.exec.outstanding) < gpu.exec.most
        ]
        holders.open = able
        start_ns = self._cluster.earliest_start_ns
        gpu = min(able, key=lambda g: (start_ns(g, now_ns), g.index), default=None)
        return gpu is not None and self._send(gpu, lot, now_ns) is not None

    def _send(self, gpu: Gpu, lot: Lot, now_ns: int) -> ActionState | None:
        """Send those of the lot that can be in time together; None if none can on this GPU now."""
        table = gpu.exec_table(lot.queue)
        requests = lot.requests[: table.batches[-1]]
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
            queue=lot.queue,
        )

    # --------------------------------------------------------------------------------- weights

    def _load(self, model: Instance, holds: dict[int, Gpu], now_ns: int) -> None:
        """No GPU holds `model`: keep one free, load it there over what was used longest ago."""
        gpu = self._loading.get(model.model_id)
        if gpu is None or not self._takes(gpu, model, holds, now_ns):
            if model.loading_on:
                return  # by placement
            gpu = self._choose(model, holds, now_ns) if self._may_keep(holds) else None
            if gpu is None:
                return
            self._loading[model.model_id] = gpu
        # Until the lot was sent: weights that no queue waits for are the first to be evicted.
        holds[gpu.index] = gpu
        if model.loading_on or gpu.exec.outstanding or len(gpu.loading) >= _MOST_LOADS:
            return
        free_pages, victims = gpu.free_pages, []
        for victim in sorted(gpu.resident.values(), key=_needed_here):
            if free_pages >= model.pages:
                break
            if not victim.pages or victim.on_host:
                continue
            victims.append(victim)
            free_pages += victim.pages
        if free_pages < model.pages:
            return  # the rest is being loaded
        for victim in victims:
            self._cluster.send_evict(gpu, victim, now_ns=now_ns)
        start_ns = max(now_ns + gpu.worker.transit.margin_ns, gpu.load.busy_until_ns)
        latest_ns = start_ns + _LOAD_WINDOW_NS
        self._cluster.send_load(gpu, model, now_ns=now_ns, start_ns=start_ns, latest_ns=latest_ns)
        for victim in victims:
            if _needed_elsewhere(victim):
                self._wanted(victim.waiting()[0], now_ns)

    def _takes(self, gpu: Gpu, model: Instance, holds: dict[int, Gpu], now_ns: int) -> bool:
        return (
            self._cluster.gpus.get(gpu.index) is gpu
            and gpu.index not in holds
            and gpu.can_load(model, now_ns)
        )

    def _choose(self, model: Instance, holds: dict[int, Gpu], now_ns: int) -> Gpu | None:
        able = [
            gpu
            for gpu in self._cluster.gpus.values()
            if self._takes(gpu, model, holds, now_ns)
            and not gpu.runs_alone
            and self._cluster.reports(gpu, now_ns)
        ]
        enough = {gpu.index: gpu.free_pages >= model.pages for gpu in able}
        return min(
            able,
            key=lambda g: (not enough[g.index], g.exec.busy_until_ns, g.index),
            default=None,
        )


def _has_calls(gpu: Gpu) -> bool:
    """Whether calls of functions run on `gpu`, or are suspended there."""
    return bool(gpu.suspended) or any(
        action.action_type is ActionType.CALL for action in gpu.exec.outstanding
    )


def _needed_here(model: Instance) -> bool:
    return model.waits and len(model.resident_on) == 1


def _needed_elsewhere(model: Instance) -> bool:
    return model.waits and not model.resident_on


def _reason_text(code: int, reason: str) -> str:
    return f"{code_name(code)}: {reason}" if reason else code_name(code)
