"""A lane with one eager model: a request runs to its end in the call that starts it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import msgspec
import torch

from slosched import clock
from slosched.core.share.interface import Ended, Start, Withdraw
from slosched.daemon.backends.eager.device import OutOfDeviceMemory, open_timeline
from slosched.daemon.backends.eager.hooks import Boundaries
from slosched.daemon.backends.eager.measuring import measure_pieces
from slosched.daemon.backends.eager.model import EagerModel
from slosched.daemon.backends.eager.models import open_model
from slosched.daemon.backends.eager.profiling import Kernels, kernels_of
from slosched.daemon.member.gate import GateMember
from slosched.share_spec import BoundaryKind, Job, Pieces, Prepared, Run, kept_segments


class EagerLane:
    """Runs the requests of `job`, which is number `number` of the experiment, one at a time.

    With a `gate`, lower jobs wait at their boundaries while this one runs, and this one at its own while
    higher ones do; the highest one has no boundaries. A boundary of the kinds sync, event and layer bounds what
    is in flight without a gate and in the highest job, too: these are baselines with bounded queues, and
    Deft's configurations that name one for a high job. `small` makes a model of few and narrow layers.

    Requests run in torch's inference mode. Deft's models and HotCarbon's bert ran outside it, so that each of
    their requests also built the graph for gradients.
    """

    takes = 1
    preemptive = False

    def __init__(
        self,
        number: int,
        job: Job,
        *,
        device: str,
        seed: int,
        gate: GateMember | None = None,
        stream_priority: int | None = None,
        small: bool = False,
    ) -> None:
        self.number, self.job, self._seed, self._small = number, job, seed, small
        self._gate = gate
        self._timeline = open_timeline(device, stream_priority)
        self._boundaries = Boundaries(job.boundary, self._timeline, gate)
        self._model: EagerModel | None = None
        self._ended: list[Ended] = []
        self._first: tuple[torch.Tensor, ...] = ()
        self._last: tuple[torch.Tensor, ...] = ()
        self._marks: tuple[Any, Any] = (None, None)  # of the last request, which have passed
        self.warmups: tuple[Ended, ...] = ()  # in order; the first one compiles and allocates

    # ------------------------------------------------------------------------------ preparation

    def prepare(self) -> Prepared:
        """Make the model, warm it up and measure its boundaries.

        Raises UnknownName, InvalidConfig, MissingPackage, OutOfDeviceMemory, and what the model raises.
        """
        began_ns = clock.now_ns()
        try:
            with torch.inference_mode(), self._timeline.entered():
                return self._prepare(began_ns)
        except torch.OutOfMemoryError as error:
            self.close()
            raise OutOfDeviceMemory(_first_line(error)) from None

    def _prepare(self, began_ns: int) -> Prepared:
        _settle(self._timeline.device)
        model = open_model(self.job, self._timeline.device, self._seed, small=self._small)
        self._model = model
        self._timeline.synchronize()
        self._timeline.forget_peak()  # making a model may take more than running it
        load_ns = clock.now_ns() - began_ns
        for number in range(max(1, self.job.warmups)):
            start = Start(self.number, -1 - number)
            self._ended.append(self._run(start, began_ns=clock.now_ns()))
            self._differs()
        self.warmups = tuple(self.poll(now_ns=0))
        boundaries, segments_ns = 0, list[int]()
        if self._gate is not None or self._bounded:
            self._boundaries.attach(model.module)
            boundaries, segments_ns = self._boundaries.measured(self._compute)
        # The least: the first request compiles, and where there are two, half of them would be such.
        exec_ns = min(each.ended_ns - each.started_ns for each in self.warmups[-3:])
        return Prepared(
            job=self.number,
            pid=os.getpid(),
            runs=Run.EAGER,
            load_ns=load_ns,
            exec_ns=exec_ns,
            boundaries=boundaries,
            boundary_ns=max(segments_ns, default=0),
            segments_ns=kept_segments(segments_ns),
            note=f"random weights; inference mode; {model.note}",
            answer=self.answer_digest(),
        )

    @property
    def _bounded(self) -> bool:
        """True if the job says itself how its work is bounded."""
        return self.job.boundary.kind not in (BoundaryKind.NONE, BoundaryKind.SEGMENT)

    def measure(self) -> Pieces:
        """What the tuner of boundaries needs of this job, which is prepared and alone. No request runs."""
        model = self._model
        assert model is not None, "prepare() comes first"
        self._boundaries.detach()
        with torch.inference_mode(), self._timeline.entered():
            return measure_pieces(
                self.job.boundary,
                model.module,
                self._timeline,
                self._compute,
                self.profile,
            )

    # --------------------------------------------------------------------------------- requests

    def start(self, start: Start, *, now_ns: int) -> None:
        """Run the request to its end: the answer is on the host when this returns."""
        gate, began_ns, beside_lower = self._gate, now_ns, False
        try:
            if gate is not None:
                _, began_ns, beside_lower = gate.enter()
                if self._boundaries.attached and gate.is_highest and not self._bounded:
                    self._boundaries.detach()  # no job is above it, so it need not stop
            else:
                began_ns = clock.now_ns()
            with torch.inference_mode(), self._timeline.entered():
                ended = self._run(start, began_ns=began_ns)
        except Exception as error:
            ended = self._failed(start, began_ns, error)
        finally:
            if gate is not None:
                gate.leave()
        if not ended.reason and self._differs():
            ended = msgspec.structs.replace(ended, differs=True)
        if beside_lower:
            ended = msgspec.structs.replace(ended, beside_lower=True)
        self._ended.append(ended)

    def _run(self, start: Start, *, began_ns: int) -> Ended:
        assert self._model is not None, "prepare() comes first"
        timeline, (first, last) = self._timeline, self._marks
        self._boundaries.begin()
        first = timeline.mark(first)
        answer = self._model.run(self._boundaries.between)
        last = timeline.mark(last)
        self._last = tuple(each.cpu() for each in answer)
        timeline.wait(
            last
        )  # it has passed, unless the answer was on the host before the work ended
        ended_ns = clock.now_ns()
        self._marks = first, last
        paused_ns = self._boundaries.paused_ns
        return Ended(
            job=start.job,
            number=start.number,
            started_ns=began_ns,
            ended_ns=ended_ns,
            device_ns=max(0, timeline.between_ns(first, last) - paused_ns),
            paused_ns=paused_ns,
            pauses=tuple(self._boundaries.pauses),
        )

    def _compute(self, boundaries: Boundaries | None = None) -> None:
        """One request: its answer on the host is `_last`."""
        assert self._model is not None, "prepare() comes first"
        answer = self._model.run((boundaries or self._boundaries).between)
        self._last = tuple(each.cpu() for each in answer)

    def _differs(self) -> bool:
        """True if the last answer is not, byte for byte, the first one. As fast as memory is read."""
        first = self._first = self._first or self._last
        return len(first) != len(self._last) or not all(
            one.shape == other.shape and torch.equal(_bytes(one), _bytes(other))
            for one, other in zip(first, self._last, strict=True)
        )

    def _failed(self, start: Start, began_ns: int, error: Exception) -> Ended:
        memory = isinstance(error, torch.OutOfMemoryError)
        with suppress(Exception):  # nothing of it may be left on the device when lower jobs resume
            self._timeline.synchronize()
        if memory and self._timeline.device.type == "cuda":
            with suppress(Exception):
                torch.cuda.empty_cache()
        return Ended(
            job=start.job,
            number=start.number,
            started_ns=began_ns,
            ended_ns=clock.now_ns(),
            paused_ns=self._boundaries.paused_ns,
            pauses=tuple(self._boundaries.pauses),
            reason=f"{type(error).__name__}: {_first_line(error)}",
            fatal=memory or "CUDA error" in str(error),
            out_of_memory=memory,
        )

    def withdraw(self, withdraw: Withdraw) -> bool:
        """False: a request that was started has run."""
        return False

    def poll(self, *, now_ns: int) -> Sequence[Ended]:
        """The requests that ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def next_event_ns(self) -> int | None:
        """0 while an end waits for `poll`."""
        return 0 if self._ended else None

    def pass_time(self, until_ns: int | None) -> bool:
        """False: nothing runs between two calls, so the loop may sleep."""
        return False

    # ----------------------------------------------------------------------------------- results

    def answer_digest(self) -> str:
        """A digest of the last answer: the same for each request of a job, however it was interrupted."""
        digest = hashlib.sha256()
        for each in self._last:
            digest.update(f"{each.dtype}{tuple(each.shape)}".encode())
            digest.update(_bytes(each).numpy().tobytes())
        return digest.hexdigest()[:16]

    def profile(self) -> Kernels:
        """Run one request under torch's profiler and count the kernels: for the tuner."""
        with torch.inference_mode(), self._timeline.entered():
            return kernels_of(self._compute, self._timeline)

    def memory(self) -> tuple[int, int]:
        """Bytes that this process had allocated and reserved on the device at most; (0, 0) on the CPU.

        Lanes of one process share these numbers.
        """
        return self._timeline.memory()

    def close(self) -> None:
        """Give the model's memory back."""
        self._boundaries.detach()
        self._model, self._first, self._last = None, (), ()
        if self._timeline.device.type == "cuda":
            with suppress(Exception):
                torch.cuda.empty_cache()


def _settle(device: torch.device) -> None:
    """Settings of the process by which the same input gives the same answer."""
    torch.backends.cudnn.benchmark = False
    # Hooks would switch attention from this path to the other one, whose last bits differ.
    mha: Any = torch.backends.mha
    mha.set_fastpath_enabled(False)
    if device.type == "cpu":
        torch.set_num_threads(1)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of `tensor`, in which a number that is none equals itself."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:500]
