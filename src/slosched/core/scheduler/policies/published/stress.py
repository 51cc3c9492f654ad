"""STRESS: load of the controller's own making, for workers alone (reference code, StressTestController).

It serves no clients. Forty copies of resnet50 are prepared on each worker, and on its first two GPUs

- weights are loaded round and round, the copy that was evicted longest ago next, two outstanding; above
  twenty resident ones the one that was loaded longest ago is evicted;
- two Infers of batch 1 are outstanding, of the copies that were loaded seventh and eighth longest ago:
  warm, and a while from being evicted.

Each second a line per GPU and kind says what was measured: the executors' own times, the times from
decision to report, throughput, and which share of the second the executor worked.

Its Infers carry no requests, so no client is answered and the worker makes up their inputs. A GPU that
cannot hold twenty copies has as many as fit, and runs the ones in their middle; the published code
assumes that they fit, and two GPUs in every worker.
"""

from __future__ import annotations

from slosched.codes import ActionType, Code
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.interface import Note
from slosched.core.scheduler.policies.about import About
from slosched.core.scheduler.policies.base import Refusals
from slosched.core.scheduler.state import ActionState, Gpu, Instance, Request
from slosched.units import NS_PER_S, format_duration

_MODEL = "resnet50"
_COPIES = 40
_MAX_RESIDENT = 20
_MAX_LOADS = 2  # outstanding per GPU
_MAX_INFERS = 2
_GPUS = 2  # of each worker
_FROM_OLDEST = 6  # how many were loaded before the copy that runs first
_START_WITHIN_NS = 10 * NS_PER_S
_PRINT_EVERY_NS = NS_PER_S


class _Measured:
    """What one executor of one GPU reported since the last line."""

    __slots__ = ("durations_ns", "errors", "from_decision_ns")

    def __init__(self) -> None:
        self.errors = 0
        self.durations_ns: list[int] = []
        self.from_decision_ns: list[int] = []

    def line(self, profiled_ns: int, elapsed_ns: int) -> str:
        times_ns = self.durations_ns
        if not times_ns:
            return f"errors={self.errors} throughput=0"
        count = len(times_ns)
        named_ns = {
            "profiled": profiled_ns,
            "min": min(times_ns),
            "max": max(times_ns),
            "mean": sum(times_ns) / count,
            "e2e": sum(self.from_decision_ns) / count,
        }
        texts = [f"{name}={format_duration(time_ns)}" for name, time_ns in named_ns.items()]
        throughput, efficiency = count * NS_PER_S / elapsed_ns, sum(times_ns) / elapsed_ns
        return (
            f"errors={self.errors} {' '.join(texts)} throughput={throughput:.2f} "
            f"efficiency={efficiency:.2f}"
        )


class _StressedGpu:
    """One GPU: its copies in the order in which they were loaded, and those it lacks."""

    __slots__ = ("absent", "done", "gpu", "infers", "loads", "present")

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.present: list[Instance] = []
        self.absent: list[Instance] = []
        self.done: list[ActionState] = []  # reported, and not yet in `loads` or `infers`
        self.loads = _Measured()
        self.infers = _Measured()

    @property
    def offset(self) -> int:
        """How many of the oldest copies are too near their eviction to run."""
        pages = self.present[0].pages if self.present else 1
        return min(_FROM_OLDEST, min(_MAX_RESIDENT, self.gpu.pages // pages) // 2)


class Stress:
    """See the head of this file."""

    about = About(
        type="STRESS",
        rank=33,
        summary="loads workers by itself, prints what they did each second; serves no clients",
        takes_placement=False,
        unloads_unused=False,
        published=True,
        not_planned="is a test of workers, and serves no clients",
        length_classes=False,
    )

    replans = False

    def __init__(self, cluster: Cluster, refusals: Refusals) -> None:
        self._cluster = cluster
        self._refusals = refusals
        self._gpus: dict[int, _StressedGpu] = {}  # by index
        self._printed_ns = 0
        self._now_ns = 0
        cluster.own_models[_MODEL] = _COPIES

    # -------------------------------------------------------------------------------- facts

    def enqueue(self, request: Request, *, now_ns: int) -> None:
        reason = "STRESS makes its own load and serves no clients; start the controller as INFER5"
        self._refusals.refuse(request, Code.INVALID_REQUEST, reason)

    def forget(self, request: Request) -> None:
        """Nothing is ever queued."""

    def gpu_added(self, gpu: Gpu) -> None:
        if gpu in gpu.worker.gpus[:_GPUS]:
            self._gpus[gpu.index] = _StressedGpu(gpu)

    def gpu_removed(self, gpu: Gpu) -> None:
        self._gpus.pop(gpu.index, None)

    def model_loaded(self, model: Instance, gpus: list[Gpu], *, now_ns: int) -> None:
        if model.name != _MODEL or model.copy >= _COPIES:
            return  # a client's, which cannot be used here
        for gpu in gpus:
            if gpu.index in self._gpus:
                self._gpus[gpu.index].absent.append(model)

    def settled(self, model: Instance) -> bool:
        return True

    def action_done(
        self, action: ActionState, *, code: int, end_ns: int, duration_ns: int, clock_mhz: int
    ) -> None:
        stressed = self._gpus.get(action.gpu.index)
        if stressed is None or action.action_type is ActionType.EVICT_WEIGHTS:
            return
        loaded = action.action_type is ActionType.LOAD_WEIGHTS
        measured = stressed.loads if loaded else stressed.infers
        if code != Code.OK:
            measured.errors += 1
            if loaded:
                stressed.absent.append(action.instance)
            elif (
                action.instance in stressed.present
                and action.instance.model_id not in action.gpu.resident
            ):
                stressed.present.remove(action.instance)  # the worker did not have it
                stressed.absent.append(action.instance)
            return
        if loaded:
            stressed.present.append(action.instance)
        measured.durations_ns.append(duration_ns)
        stressed.done.append(action)

    # ----------------------------------------------------------------------------- decisions

    def plan(self, *, now_ns: int) -> None:
        self._now_ns = now_ns
        for stressed in self._gpus.values():
            for action in stressed.done:
                loaded = action.action_type is ActionType.LOAD_WEIGHTS
                measured = stressed.loads if loaded else stressed.infers
                measured.from_decision_ns.append(now_ns - action.sent_ns)
            stressed.done.clear()
            self._evict(stressed, now_ns)
            while self._load(stressed, now_ns):
                pass
            while self._infer(stressed, now_ns):
                pass
        if self._gpus and now_ns >= self._printed_ns + _PRINT_EVERY_NS:
            if self._printed_ns:
                self._print(now_ns - self._printed_ns)
            self._printed_ns = now_ns

    def _evict(self, stressed: _StressedGpu, now_ns: int) -> None:
        """Make room: at most twenty stay, and a page shortage must not stop the loads."""
        gpu, present = stressed.gpu, stressed.present
        while present and not self._cluster.in_use(gpu, present[0]):
            next_pages = stressed.absent[0].pages if stressed.absent else 0
            short = len(gpu.loading) == 0 and gpu.free_pages < next_pages
            if len(present) <= _MAX_RESIDENT and not short:
                return
            model = present.pop(0)
            self._cluster.send_evict(gpu, model, now_ns=now_ns)
            stressed.absent.append(model)

    def _load(self, stressed: _StressedGpu, now_ns: int) -> bool:
        gpu = stressed.gpu
        if not stressed.absent or len(gpu.loading) >= _MAX_LOADS:
            return False
        model = stressed.absent[0]
        if gpu.free_pages < model.pages or not gpu.may_load(model, now_ns):
            return False
        del stressed.absent[0]
        start_ns = max(now_ns + gpu.worker.transit.expected_ns, gpu.load.busy_until_ns)
        latest_ns = now_ns + _START_WITHIN_NS
        self._cluster.send_load(gpu, model, now_ns=now_ns, start_ns=start_ns, latest_ns=latest_ns)
        return True

    def _infer(self, stressed: _StressedGpu, now_ns: int) -> bool:
        gpu = stressed.gpu
        outstanding = len(gpu.exec.outstanding)
        position = stressed.offset + outstanding
        if outstanding >= _MAX_INFERS or position >= len(stressed.present):
            return False
        model = stressed.present[position]
        self._cluster.send_infer(
            gpu,
            (),
            1,
            now_ns=now_ns,
            start_ns=self._cluster.likely_start_ns(gpu, now_ns),
            duration_ns=gpu.exec_table(model.queue).single.expected_ns,
            latest_ns=now_ns + _START_WITHIN_NS,
            queue=model.queue,
        )
        return True

    def _print(self, elapsed_ns: int) -> None:
        for kind in ("LoadWeights", "Infer"):
            for stressed in self._gpus.values():
                prepared = stressed.gpu.worker.prepared.get(_MODEL)
                if prepared is None:
                    continue
                if kind == "LoadWeights":
                    text = stressed.loads.line(prepared.weights_ns, elapsed_ns)
                    stressed.loads = _Measured()
                else:
                    text = stressed.infers.line(prepared.exec_ns[0], elapsed_ns)
                    stressed.infers = _Measured()
                self._cluster.emit(Note("info", f"{stressed.gpu.name} {kind} {text}"))

    def next_wakeup_ns(self) -> int | None:
        if not self._gpus:
            return None
        times = [self._printed_ns + _PRINT_EVERY_NS]
        for stressed in self._gpus.values():
            # A load that failed is tried again after a pause.
            if stressed.absent and len(stressed.gpu.loading) < _MAX_LOADS:
                model = stressed.absent[0]
                times.append(stressed.gpu.load_pauses.until_ns(model.model_id))
        return min((t for t in times if t > self._now_ns), default=None)
