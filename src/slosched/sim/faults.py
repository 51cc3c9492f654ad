"""Faults by a plan: what breaks in a simulated run, when, and for how long.

A plan is plain data: drawn from a seed, printed, written as TOML and read back, and the same plan gives
the same run. `injector.py` carries one out. Times are ns after the run's first event.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from slosched.errors import InvalidConfig, UnknownName
from slosched.units import NS_PER_MS, NS_PER_S, NS_PER_US, format_duration


class Kind(NamedTuple):
    """A kind of fault: what it can befall, and which numbers it needs (`needs`) beside its time."""

    summary: str
    targets: str  # a pattern
    needs: tuple[str, ...] = ()


_WORKER, _GPU = r"worker \d+", r"worker \d+ GPU \d+"
_LINK = r"(to|from) (client|worker \d+)"

#: Every kind. A link is one direction of one connection, as the controller sees it.
KINDS: dict[str, Kind] = {
    "crash": Kind("the process dies; a new one, with empty memory, follows", _WORKER, ("for",)),
    "leave": Kind(
        "the process is told to end: it hands back what it has not begun; a new one follows",
        _WORKER,
        ("for",),
    ),
    "intrude": Kind(
        "a second controller asks for the worker, and acts where it gets it", _WORKER, ("for",)
    ),
    "restart": Kind(
        "the controller dies; a new one, which knows nothing, follows", "controller", ("for",)
    ),
    "drain": Kind(
        "the controller is told to end, and does; a new one follows. A worker: an operator drains it",
        rf"controller|{_WORKER}",
        ("for",),
    ),
    "pause": Kind(
        "the process stands still: what reaches it waits", f"{_WORKER}|controller|client", ("for",)
    ),
    "slow": Kind("a GPU's exec times are `factor` times as long", _GPU, ("for", "factor")),
    "raise": Kind(
        "an exec fails with `probability`, as when its model raises", _GPU, ("for", "probability")
    ),
    "end": Kind(
        "an exec ends with its model's process with `probability`", _GPU, ("for", "probability")
    ),
    "spoil": Kind(
        "a load of weights fails with `probability`, when its time is over",
        _GPU,
        ("for", "probability"),
    ),
    "jump": Kind("a worker's clock is put forward `by` (or back)", _WORKER, ("by",)),
    "partition": Kind(
        "nothing passes, either way; all of it is lost", f"{_WORKER}|client", ("for",)
    ),
    "hold": Kind("nothing passes this way; all of it arrives afterwards", _LINK, ("for",)),
    "lose": Kind("a message is lost with `probability`", _LINK, ("for", "probability")),
    "late": Kind(
        "a message is late by up to `by` with `probability`, and what follows it waits",
        _LINK,
        ("for", "probability", "by"),
    ),
    "twice": Kind(
        "a message comes a second time, up to `by` later, with `probability`",
        _LINK,
        ("for", "probability", "by"),
    ),
}


@dataclass(frozen=True)
class Fault:
    """One fault of `kind` on `target`, from `at_ns` on, for `for_ns`.

    `target` is "worker 1", "worker 1 GPU 0", "controller", "client", or a link: "to worker 1", "from
    client". The other fields are as KINDS says. Raises InvalidConfig for what cannot be, UnknownName
    for another kind.
    """

    kind: str
    target: str
    at_ns: int
    for_ns: int = 0
    by_ns: int = 0
    probability: float = 0.0
    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UnknownName("kind of fault", self.kind, list(KINDS))
        kind = KINDS[self.kind]
        if re.fullmatch(kind.targets, self.target) is None:
            raise InvalidConfig(
                f"{self.kind} cannot befall {self.target!r}; it wants {kind.targets}"
            )
        if self.at_ns < 0 or self.for_ns < 0:
            raise InvalidConfig(f"{self.kind} {self.target}: at and for must be at least 0")
        wrong = {
            "for": self.for_ns <= 0,
            "factor": not 0 < self.factor <= 1000 or self.factor == 1.0,
            "probability": not 0 < self.probability <= 1,
            "by": self.by_ns == 0 if self.kind == "jump" else self.by_ns <= 0,
        }
        for name in kind.needs:
            if wrong[name]:
                raise InvalidConfig(
                    f"{self.kind} {self.target} needs {name}: a time above 0, a probability within "
                    "0..1, a factor other than 1"
                )

    @property
    def end_ns(self) -> int:
        return self.at_ns + self.for_ns

    @property
    def worker_id(self) -> int:
        """The worker it is about; -1 where it is about none."""
        match = re.search(r"worker (\d+)", self.target)
        return -1 if match is None else int(match.group(1))

    @property
    def gpu_id(self) -> int:
        match = re.search(r"GPU (\d+)", self.target)
        return -1 if match is None else int(match.group(1))

    def text(self) -> str:
        """One human-readable line."""
        parts = [f"{self.at_ns / NS_PER_S:9.4f} s  {self.kind:9} {self.target}"]
        needs = KINDS[self.kind].needs
        if "for" in needs:
            parts.append(f"for {format_duration(self.for_ns)}")
        if "factor" in needs:
            parts.append(f"factor {self.factor:g}")
        if "probability" in needs:
            parts.append(f"probability {self.probability:g}")
        if "by" in needs:
            sign = "-" if self.by_ns < 0 else ""
            parts.append(f"by {sign}{format_duration(abs(self.by_ns))}")
        return " ".join(parts)


@dataclass(frozen=True)
class FaultPlan:
    """Faults in the order of their times. `seed` decides which messages are hit where chance says."""

    faults: tuple[Fault, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise InvalidConfig(f"a plan's seed must be at least 0, not {self.seed}")
        ordered = tuple(sorted(self.faults, key=lambda fault: fault.at_ns))
        object.__setattr__(self, "faults", ordered)

    @property
    def end_ns(self) -> int:
        """From then on nothing is wrong any more."""
        return max((fault.end_ns for fault in self.faults), default=0)

    def without(self, index: int) -> FaultPlan:
        """The same plan less one fault."""
        return FaultPlan((*self.faults[:index], *self.faults[index + 1 :]), self.seed)

    def text(self) -> str:
        """A line for each fault."""
        return "\n".join(fault.text() for fault in self.faults) or "no faults"

    def toml(self) -> str:
        """The plan as `load_plan` (fault_file.py) reads it."""
        parts = [f"seed = {self.seed}\n"]
        for fault in self.faults:
            needs = KINDS[fault.kind].needs
            lines = ["[[fault]]", f'kind = "{fault.kind}"', f'target = "{fault.target}"']
            lines.append(f'at = "{fault.at_ns}ns"')
            lines += [f'for = "{fault.for_ns}ns"'] if "for" in needs else []
            lines += [f'by = "{fault.by_ns}ns"'] if "by" in needs else []
            lines += [f"probability = {fault.probability!r}"] if "probability" in needs else []
            lines += [f"factor = {fault.factor!r}"] if "factor" in needs else []
            parts.append("\n".join(lines) + "\n")
        return "\n".join(parts)

    def check(self, gpus_per_worker: Sequence[int]) -> None:
        """Raise InvalidConfig if a fault is about a worker or a GPU that is not there."""
        for fault in self.faults:
            worker_id, gpu_id = fault.worker_id, fault.gpu_id
            if worker_id >= len(gpus_per_worker):
                raise InvalidConfig(
                    f"{fault.kind} {fault.target}: there are {len(gpus_per_worker)} workers, from 0 on"
                )
            if gpu_id >= 0 and gpu_id >= gpus_per_worker[worker_id]:
                raise InvalidConfig(
                    f"{fault.kind} {fault.target}: worker {worker_id} has {gpus_per_worker[worker_id]} "
                    "GPU(s), from 0 on"
                )

    @classmethod
    def random(
        cls,
        seed: int,
        gpus_per_worker: Sequence[int],
        *,
        until_ns: int,
        from_ns: int = 0,
        kinds: Sequence[str] = tuple(KINDS),
    ) -> FaultPlan:
        """A plan of random density for workers with these numbers of GPUs; every fault is over at `until_ns`.

        Raises InvalidConfig if that leaves no time.
        """
        if until_ns - from_ns < 10 * NS_PER_MS:
            raise InvalidConfig("faults need 10ms or more between their first and their end")
        draw = Random(f"{seed}/faults")
        count = draw.choice((1, 1, 2, 3, 4, 6, 9, 14))
        faults: list[Fault] = []
        for _ in range(count):
            at_ns = _moment(draw, faults, from_ns, until_ns)
            faults.append(_drawn(draw, draw.choice(kinds), gpus_per_worker, at_ns, until_ns))
        return cls(tuple(faults), seed)


def _moment(draw: Random, before: Sequence[Fault], from_ns: int, until_ns: int) -> int:
    """When one begins: at any time, in the first moments, or about when another begins or ends.

    What is being set up, or set right, is hurt more easily than what runs.
    """
    latest_ns = until_ns - 5 * NS_PER_MS
    any_ns = draw.randrange(from_ns, latest_ns)
    how = draw.random()
    if how < 0.15:
        any_ns = from_ns + _spread(draw, 100 * NS_PER_US, 20 * NS_PER_MS)
    elif how < 0.55 and before:
        other = draw.choice(before)
        near_ns = draw.choice((other.at_ns, other.end_ns))
        any_ns = near_ns + draw.choice((-1, 1)) * _spread(draw, 100 * NS_PER_US, NS_PER_S)
    return min(max(any_ns, from_ns), latest_ns)


def _drawn(
    draw: Random, kind: str, gpus_per_worker: Sequence[int], at_ns: int, until_ns: int
) -> Fault:
    """One fault of `kind`. Lengths are spread over orders of magnitude, as real ones are."""
    worker = draw.randrange(len(gpus_per_worker))
    target = f"worker {worker}"
    if (
        kind == "restart"
        or (kind == "drain" and draw.random() < 0.5)
        or (kind == "pause" and draw.random() < 0.3)
    ):
        target = "controller"
    elif kind in ("pause", "partition") and draw.random() < 0.2:
        target = "client"
    elif kind in ("slow", "raise", "end", "spoil"):
        target += f" GPU {draw.randrange(gpus_per_worker[worker])}"
    elif kind in ("hold", "lose", "late", "twice"):
        end = "client" if draw.random() < 0.3 else target
        target = f"{draw.choice(('to', 'from'))} {end}"
    longest_ns = until_ns - at_ns
    for_ns = min(_spread(draw, 2 * NS_PER_MS, 4 * NS_PER_S), longest_ns)
    needs = KINDS[kind].needs
    by_ns = _spread(draw, 50 * NS_PER_US, 500 * NS_PER_MS)
    if kind == "jump":
        by_ns *= draw.choice((-1, 1))
    return Fault(
        kind,
        target,
        at_ns,
        for_ns=for_ns if "for" in needs else 0,
        by_ns=by_ns if "by" in needs else 0,
        probability=draw.choice((0.01, 0.1, 0.5, 1.0)) if "probability" in needs else 0.0,
        factor=draw.choice((0.5, 1.5, 3.0, 10.0, 100.0)) if "factor" in needs else 1.0,
    )


def _spread(draw: Random, low_ns: int, high_ns: int) -> int:
    """Log-uniform, without the last bits that differ between mathematical libraries."""
    share = draw.randrange(65) / 64
    times: float = (high_ns / low_ns) ** share
    return round(low_ns * times / 1000) * 1000
