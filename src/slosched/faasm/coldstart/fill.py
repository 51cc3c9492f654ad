"""How many instances fit, by starting them: until a bound, or until memory is nearly used up.

What fits is also computed from the memory of one instance (ladder.py). Here each instance is started, stays,
and answers together with all others, so that one that cannot work does not count. At the end all are ended.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from slosched.clock import now_ns
from slosched.faasm.coldstart import ladder
from slosched.faasm.frame_processes import available_bytes
from slosched.faasm.inference import wire
from slosched.faasm.inference.measures import TOLERANCE, Truth, answer_error
from slosched.faasm.inference.plan import Image, Plan, images
from slosched.faasm.inference.process import InstanceFailed, InstanceProcess
from slosched.units import NS_PER_S

#: Memory that is left alone: this part of what was there, and at least 1 GB; 2 GB of the GPU, for kernels and
#: their libraries.
_SPARE_PART, _SPARE_BYTES = 0.1, 10**9
_GPU_SPARE_BYTES = 2 * 10**9
_FIRST_FORKS, _MOST_AT_ONCE = 8, 16
BOUND, HOST, GPU = "the bound", "the host's memory", "the GPU's memory"


@dataclass(frozen=True, kw_only=True)
class Room:
    """Bytes that are free of the host, and of the GPU (None without one), less what is left alone."""

    host: int
    gpu: int | None = None

    def fits(self, wanted: int, host_each: float, gpu_each: float) -> tuple[int, str]:
        """How many of `wanted` more instances there is room for, and what stops the others ("" for nothing)."""
        found, stopped_by = wanted, ""
        for room, each, name in ((self.host, host_each, HOST), (self.gpu, gpu_each, GPU)):
            if room is not None and each > 0 and room // each < found:
                found, stopped_by = max(0, int(room // each)), name
        return found, stopped_by


@dataclass
class _Held:
    """The instances that were started, and what they take."""

    processes: list[InstanceProcess] = field(default_factory=list)
    pss_bytes: int = 0
    gpu_first_bytes: int = 0
    gpu_bytes: int = 0
    gpu_total_bytes: int = 0

    def weigh(self, on_gpu: bool) -> None:
        """Look at the memory of all."""
        self.pss_bytes = ladder.pss_of([each.pid for each in self.processes])
        if on_gpu and self.processes:
            weighed = self.processes[0].ask(wire.Weigh(), wire.Weighed)
            self.gpu_bytes, self.gpu_total_bytes = weighed.gpu_used_bytes, weighed.gpu_total_bytes
            self.gpu_first_bytes = self.gpu_first_bytes or self.gpu_bytes

    @property
    def gpu_each(self) -> float:
        """The GPU's memory for one instance; with one alone, all that the card has in use."""
        more = len(self.processes) - 1
        return (self.gpu_bytes - self.gpu_first_bytes) / more if more > 0 else self.gpu_bytes

    def room(self, on_gpu: bool, spare_bytes: int) -> Room:
        gpu = self.gpu_total_bytes - self.gpu_bytes - _GPU_SPARE_BYTES
        return Room(
            host=available_bytes() - spare_bytes,
            gpu=gpu if on_gpu and self.processes else None,
        )

    def close(self) -> None:
        """End all of them, side by side."""
        for each in self.processes:
            each.interrupt()
        for each in self.processes:
            each.close()


def processes(plan: Plan | None, most: int) -> dict[str, Any]:
    """Start up to `most` processes of an instance, and have all that are there answer at the same time.

    They start in groups of as many as there are cores. Returns the fields of a record: `held` stayed, and
    `right` of them answered the plan's first picture rightly (without a plan: answered).
    """
    on_gpu = plan is not None and plan.device == "cuda"
    group = max(1, min(_MOST_AT_ONCE, len(os.sched_getaffinity(0))))
    spare = max(_SPARE_BYTES, int(_SPARE_PART * available_bytes()))
    picture, truth = _picture(plan)
    held = _Held()
    began_ns = now_ns()
    try:
        stopped_by = ""
        while not stopped_by and len(held.processes) < most:
            count = len(held.processes)
            wanted = min(group if count else 1, most - count)
            each = held.pss_bytes / count if count else 0.0
            fitting, short = held.room(on_gpu, spare).fits(wanted, each, held.gpu_each)
            stopped_by = _start(plan, fitting, held.processes) or short
            held.weigh(on_gpu)
        started_ns = now_ns()
        right = _answering(held.processes, picture, truth)
        held.weigh(on_gpu)
        return {
            "most": most,
            "held": len(held.processes),
            "right": right,
            "stopped_by": stopped_by or BOUND,
            "start_s": (started_ns - began_ns) / NS_PER_S,
            "pss_mb": held.pss_bytes / 1e6,
            "gpu_mb": held.gpu_each * len(held.processes) / 1e6 if on_gpu else None,
        }
    finally:
        held.close()


def _picture(plan: Plan | None) -> tuple[Image | None, Truth | None]:
    """The plan's first picture, and its right answer."""
    if plan is None:
        return None, None
    from slosched.faasm.inference import network

    found = images(plan, 1)
    return found[0], network.truths(plan, found)[0].tolist()


def _start(plan: Plan | None, count: int, held: list[InstanceProcess]) -> str:
    """Start `count` instances side by side. Returns why fewer came, "" if all did."""
    new: list[InstanceProcess] = []
    problem = ""
    try:
        while len(new) < count:
            new.append(InstanceProcess(plan))
    except OSError as error:
        problem = f"no more processes start: {error}"
    held += new
    for each in new:
        try:
            each.ready()
        except InstanceFailed as error:
            problem = problem or f"an instance did not start: {' '.join(str(error).split())[:200]}"
            held.remove(each)
            each.close()
    return problem


def _answering(held: Sequence[InstanceProcess], picture: Image | None, truth: Truth | None) -> int:
    """How many instances answer rightly while all of them are asked."""

    def right(process: InstanceProcess) -> bool:
        try:
            if picture is None or truth is None:
                return len(process.ask(wire.Measure("L0", 1), wire.Measured).wall_ns) == 1
            rows, columns, channels = picture.shape
            order = wire.Answering(picture.tobytes(), (rows, columns, channels), "L0")
            answer = process.ask(order, wire.Answered).answer
        except InstanceFailed:
            return False
        return answer_error(answer["top"], answer["scores"], truth) <= TOLERANCE

    if not held:
        return 0
    with ThreadPoolExecutor(len(held), thread_name_prefix="slosched fill") as pool:
        return sum(pool.map(right, held))


def forks(process: InstanceProcess, most: int) -> dict[str, Any]:
    """Fork a process up to `most` times; each fork answers as its template does, and stays.

    The number is doubled until the bound is reached or memory is short. Returns the fields of a record.
    """
    spare = max(_SPARE_BYTES, int(_SPARE_PART * available_bytes()))
    began_ns = now_ns()
    count = right = 0
    pss = alone = ladder.pss_of([process.pid])
    stopped_by = ""
    while not stopped_by and count < most:
        each = (pss - alone) / count if count else alone
        # All that are there end before the next ones start.
        room = Room(host=available_bytes() + (pss - alone if count else 0) - spare)
        wanted, short = room.fits(min(most, max(_FIRST_FORKS, 2 * count)), max(0.0, each), 0.0)
        if wanted <= count:
            stopped_by = short
            break
        try:
            held = process.ask(wire.Hold(wanted), wire.Held)
        except InstanceFailed as error:
            stopped_by = f"a fork did not come: {' '.join(str(error).split())[:200]}"
            break
        count, right, stopped_by = wanted, held.right, short
        pss = ladder.pss_of([process.pid, *held.pids])
    started_ns = now_ns()
    return {
        "most": most,
        "held": count,
        "right": right,
        "stopped_by": stopped_by or BOUND,
        "start_s": (started_ns - began_ns) / NS_PER_S,
        "pss_mb": pss / 1e6,
        "gpu_mb": None,
    }
