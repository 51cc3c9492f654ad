"""The cells of one system: opened once, warmed up, and sent each load that the run directory does not have."""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slosched.clock import now_ns
from slosched.errors import InvalidConfig, MissingPackage, OutOfResources, SloschedError
from slosched.faasm import layout
from slosched.faasm.frame import Frame
from slosched.faasm.frame_leaks import RUN_FOLDER
from slosched.faasm.frame_processes import available_bytes
from slosched.faasm.inference.choices import DASK, SYSTEMS, WARM
from slosched.faasm.inference.cold import cold_rule
from slosched.faasm.inference.load import Arrivals, Run, Sender
from slosched.faasm.inference.measures import record
from slosched.faasm.inference.options import InferenceOptions
from slosched.faasm.inference.plan import Image, Plan, given, images
from slosched.faasm.inference.requests import Reply, Request, System, write_outcomes
from slosched.faasm.inference.systems import Opening, Slosched, check_names, lacks, opened
from slosched.faasm.installed import check_installed, lack_of
from slosched.units import NS_PER_MS, NS_PER_S

#: Pictures that a run's requests have in turn.
PICTURES = 8
_WARM_UP = 4
_WARM_WITHIN_S = 180.0
_BESIDE_S = 0.6


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One cell: a load on a system. `arrivals` are made anew for each run.

    `loop` is "open", "closed" or "capacity"; `fields` go into the record, and `think_ms` and `connections` of a
    closed loop name the folder of `--layout faasm`.
    """

    system: str
    loop: str
    rule: str
    rung: str
    duration_ns: int
    slo_ns: int
    fields: dict[str, Any]
    connections: int = 0
    think_ns: int = -1
    label: str = ""

    @property
    def key(self) -> str:
        """The name of the cell."""
        return f"{self.system} {self.loop} cold={self.rule} {self.rung}{self.label}"

    @property
    def expected_s(self) -> float:
        """About how long it takes: its requests, the last of them, and a part of the system's start."""
        return self.duration_ns / NS_PER_S + _BESIDE_S


#: Makes the arrivals of a setting, when its turn has come; or tells why there are none.
MakeArrivals = Callable[[Setting], Arrivals | str]


def check(options: InferenceOptions) -> None:
    """Raise what a run would end by: MissingPackage, UnknownName."""
    check_names(options.systems)
    check_network(options.network)
    if DASK in options.systems:
        check_installed("the system dask", "distributed")


def check_network(network: str) -> None:
    """Raise MissingPackage without what the network needs."""
    check_installed("MobileNet", "torch", *(["timm"] if network == "timm" else []))


def systems_of(options: InferenceOptions, say: Callable[[str], None]) -> tuple[str, ...]:
    """The systems to measure, in their order. By default all that are installed; `say` tells of others."""
    if options.systems:
        return tuple(each for each in SYSTEMS if each in options.systems)
    lack = lack_of("distributed")
    if lack:
        say(f"{DASK} is left out: {lack}")
    return tuple(each for each in SYSTEMS if each != DASK or not lack)


def rungs_of(system: str, rule: str, options: InferenceOptions) -> list[str]:
    """The rungs on which a system is measured under a rule: L0 alone where nothing is cold."""
    if rule == "none":
        return [WARM]
    return [rung for rung in options.rungs if not lacks(system, rung)]


def length_of(system: str, rung: str) -> str:
    """The rung whose runs are as long as these: an emulated start takes as long as a new process."""
    return "L4" if system == "container" and rung != WARM else rung


@contextmanager
def planned(options: InferenceOptions) -> Iterator[Plan]:
    """The plan of a run, whose weights are in a file that is removed at the end. Raises MissingPackage."""
    try:
        from slosched.faasm.inference import network
    except ImportError as error:
        raise MissingPackage(
            f"MobileNet needs torch ({error}): pip install 'slosched[torch]'"
        ) from error
    network.check_device(options.device)
    chosen = options.network
    if chosen == "auto":
        chosen = "timm" if network.has_timm() and options.size != "micro" else "own"
    if chosen == "timm" and not network.has_timm():
        raise MissingPackage("the network timm needs timm, which is not installed; take own")
    if chosen == "timm" and options.size == "micro":
        raise InvalidConfig("timm has no MobileNet of size micro; take the network own")
    with tempfile.TemporaryDirectory(prefix=f"{RUN_FOLDER}{os.getpid()}-") as folder:
        weights = Path(folder) / "weights.npy"
        plan = Plan(
            network=chosen,
            size=options.size,
            device=options.device,
            weights=str(weights),
            seed=options.seed,
        )
        network.write_weights(plan)
        with given(plan):
            yield plan


class Campaign:
    """Measures settings into a frame. `options` are those at scale."""

    def __init__(self, options: InferenceOptions, frame: Frame, plan: Plan) -> None:
        self._options, self._frame, self._plan = options, frame, plan
        self._images: list[Image] = images(plan, PICTURES)
        self._truths: list[Any] = []
        if options.device == "cuda":
            frame.bill_gpus()

    def measure(self, name: str, settings: Sequence[Setting], arrivals: MakeArrivals) -> None:
        """The settings of one system, as far as they are missing, on processes started for them."""
        todo = [each for each in settings if not self._frame.has(each.key)]
        if not todo or not self._frame.measures:
            return
        check_memory(self._options.workers, self._options.device, "--workers")
        rungs = list(dict.fromkeys(each.rung for each in todo))
        if not self._truths:
            from slosched.faasm.inference import network

            self._truths = [each.tolist() for each in network.truths(self._plan, self._images)]
        opening = Opening(
            plan=self._plan,
            instances=self._options.workers,
            slo_ns=self._options.timeout_ns,
            logs=self._frame.raw(f"{name}-logs"),
            with_new="L4" in rungs,
            with_rebuilt="L3" in rungs,
        )
        began_ns = now_ns()
        with opened(name, opening) as system:
            warm_up(system, self._images, self._options.workers, rungs)
            self._frame.say(
                f"{name}: started and warm after {(now_ns() - began_ns) / NS_PER_S:.1f} s"
            )
            for setting in todo:
                made = arrivals(setting)
                if isinstance(made, str):
                    self._frame.say(f"{setting.key} is left out: {made}")
                else:
                    self._cell(system, setting, made)

    def _cell(self, system: System, setting: Setting, arrivals: Arrivals) -> None:
        options = self._options
        with self._frame.cell(setting.key) as cell:
            if not cell:
                return
            if isinstance(system, Slosched):
                system.slo_ns = setting.slo_ns
            rule = cold_rule(setting.rule, instances=options.workers, seed=options.seed)
            run = Run(
                arrivals=arrivals,
                rule=rule,
                rung=setting.rung,
                duration_ns=setting.duration_ns,
                timeout_ns=options.timeout_ns,
                seed=options.seed,
                container_ns=options.delay_ns if setting.system == "container" else 0,
            )
            with self._frame.bill(own=setting.system == "loop") as bill:
                loaded = Sender(system, self._images).run(run)
            raw = f"{setting.key.replace(' ', '_').replace(':', '').replace('%', 'pct').replace('=', '-')}.tsv"
            write_outcomes(self._frame.raw(raw), loaded.outcomes)
            measured = record(loaded, self._truths)
            fields: dict[str, Any] = {
                "system": setting.system,
                "loop": setting.loop,
                "cold": setting.rule,
                "rung": setting.rung,
                "instances": options.workers,
                "device": options.device,
                "network": self._plan.network,
                "slo_ms": setting.slo_ns / NS_PER_MS if setting.system == "slosched" else None,
                **setting.fields,
                **measured,
                **bill.record(),
                "raw": raw,
            }
            if setting.loop == "closed":
                fields[layout.PUBLISHED] = layout.inference(
                    published_name(setting, options.rules),
                    cold=rule.interval,
                    threads=1,
                    connections=setting.connections,
                    delay_ms=setting.think_ns / NS_PER_MS,
                    run_ns=setting.duration_ns,
                    latencies_ns=[
                        each.latency_ns for each in loaded.outcomes if each.status == "ok"
                    ],
                )
            cell.row(fields)
        self._frame.say(
            f"  {measured['ok']} of {measured['n']} answered, {measured['achieved_per_s']:.1f}/s, p50 "
            f"{_shown(measured['p50_ms'])} ms, p99 {_shown(measured['p99_ms'])} ms, "
            f"cold {measured['cold_ratio']:.1%}"
        )


#: Memory of one instance on a CPU, and of the host where it is on a GPU: torch and its libraries, mostly.
INSTANCE_BYTES = {"cpu": 300_000_000, "cuda": 1_500_000_000}


def check_memory(count: int, device: str, what: str) -> None:
    """Raise OutOfResources, with the sum, if that many instances do not fit into this host's free memory."""
    needed, free = count * INSTANCE_BYTES[device], available_bytes()
    if needed > free:
        raise OutOfResources(
            f"{count} instances take about {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free; "
            f"take fewer ({what})"
        )


class WrongAnswer(SloschedError):
    """A system's answers are not those of the network: its times mean nothing."""


def check_answers(frame: Frame) -> None:
    """Raise WrongAnswer if an answer of the run differs from the truth by more than rounding can."""
    wrong = {each["key"]: each["wrong"] for each in frame.records() if each.get("wrong")}
    if wrong:
        cells = ", ".join(f"{key} ({count})" for key, count in wrong.items())
        raise WrongAnswer(f"answers that are wrong, by cell: {cells[:1000]}")


def warm_up(
    system: System, pictures: Sequence[Image], instances: int, rungs: Sequence[str]
) -> None:
    """Have each instance answer, and a cold request of each rung, one after the other and all at once.

    Raises SloschedError if one of them fails: a system that cannot answer is not measured.
    """
    asked = [WARM] * (_WARM_UP * instances) + [each for each in rungs if each != WARM]
    asked += [each for each in rungs if each not in (WARM, "L4")] * 2
    for number, rung in enumerate(asked):
        if system.lacks(rung):
            continue
        burst = instances if rung == WARM else 1
        replies = [_asked(system, pictures[number % len(pictures)], rung) for _ in range(burst)]
        for ended, got in replies:
            if not ended.wait(_WARM_WITHIN_S):
                raise SloschedError(
                    f"{system.name} did not answer a first request within {_WARM_WITHIN_S:.0f} s"
                )
            if got[0].status != "ok":
                raise SloschedError(
                    f"{system.name} did not answer a first request: {got[0].reason}"
                )


def _asked(system: System, picture: Image, rung: str) -> tuple[threading.Event, list[Reply]]:
    over, got = threading.Event(), list[Reply]()

    def done(reply: Reply) -> None:
        got.append(reply)
        over.set()

    request = Request(number=0, user=0, intended_ns=now_ns(), picture=0, image=picture, rung=rung)
    system.submit(request, done)
    return over, got


def published_name(setting: Setting, rules: Sequence[str]) -> str:
    """FAASM and NATIVE stand for what replaces them: warm slots, and the emulated container.

    The published folders name the interval of cold starts alone. A rule that has none (each user's first), or
    that of a rule before it in `rules`, is in the system's name.
    """
    name = {"slosched": layout.WARM, "container": layout.NATIVE}.get(setting.system, setting.system)
    if setting.rung not in (WARM, "L3"):
        name = f"{name}-{setting.rung}"
    intervals = {each: cold_rule(each, instances=1, seed=0).interval for each in rules}
    same = [each for each in rules if intervals[each] == intervals[setting.rule]]
    by_name = setting.rule == "user" or setting.rule != same[0]
    return f"{name}-{re.sub('[^a-z0-9.]+', '', setting.rule)}" if by_name else name


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
