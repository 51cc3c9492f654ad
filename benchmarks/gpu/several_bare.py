"""Rows over all GPUs at once without a controller: start lateness, and loads of weights alone and together."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cpu_plan import on_cpus
from exact_bare import LATENESS_COPIES
from exact_rig import Rig, RowFailed, check, percentile, scaled, spread

from slosched.clock import now_ns
from slosched.gpu_profile import GpuProfile
from slosched.units import NS_PER_MS

_DRIVER = Path(__file__).resolve().parent / "bare_driver.py"
#: Until what was ordered begins: all drivers have read their line by then.
_BEFORE_NS = 200 * NS_PER_MS
_STARTS = 5_000
#: Instances that are loaded one behind the other; their weights fit the cache.
_LOAD_COPIES = 24
_LOADS_S = 1.5
_END_S = 5.0


class Driver:
    """The bare_driver.py of one worker."""

    def __init__(self, process: subprocess.Popen[str], gpu: int) -> None:
        self.process, self.gpu = process, gpu

    def order(self, **words: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """The next line. Raises RowFailed if the driver has ended. A row's time limit interrupts it."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RowFailed(
                f"the driver of GPU {self.gpu} ended; its error stands above, or in the log"
            )
        found: dict[str, Any] = json.loads(line)
        return found


@contextlib.contextmanager
def drivers(rig: Rig, copies: int) -> Iterator[list[Driver]]:
    """A driver for each GPU's worker, with `copies` of the model loaded; all are ended."""
    started: list[Driver] = []
    try:
        for worker in rig.workers():
            arguments = [
                sys.executable,
                str(_DRIVER),
                str(worker.port),
                rig.settings.model,
                str(copies),
            ]
            with on_cpus(rig.cpus.rest):
                process = subprocess.Popen(
                    arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            started.append(Driver(process, worker.gpu))
        yield started
    finally:
        for driver in started:
            driver.process.kill()
        for driver in started:
            driver.process.communicate(timeout=_END_S)


def at_once(chosen: Sequence[Driver], **words: Any) -> list[dict[str, Any]]:
    """Have all `chosen` do the same at the same time; return their answers."""
    at_ns = now_ns() + _BEFORE_NS
    for driver in chosen:
        driver.order(at_ns=at_ns, **words)
    return [driver.answer() for driver in chosen]


# ------------------------------------------------------------------------------------- lateness


def lateness(rig: Rig) -> dict[str, Any]:
    """Row "lateness": how late planned inferences start on every GPU while all are 85 % busy."""
    count = rig.settings.number(_STARTS, least=50)
    with drivers(rig, LATENESS_COPIES) as all_drivers:
        ready = [driver.answer()["ready"] for driver in all_drivers]
        found = at_once(all_drivers, do="starts", count=count)
    gpus = [
        {
            "gpu": driver.gpu,
            "exec_1_ns": hello["exec_ns"]["1"],
            "late_ns": each["figures"]["late_ns"],
            "busy": each["figures"]["gpu_busy"],
            "failed": each["figures"]["failed"],
            "window_ns": each["window_ns"],
        }
        for driver, hello, each in zip(all_drivers, ready, found, strict=True)
    ]
    return {"figures": {"gpus": gpus}, "checks": _lateness_checks(gpus)}


def _lateness_checks(gpus: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    p99 = [each["late_ns"]["p99"] for each in gpus if each["late_ns"]["p99"] is not None]
    worst = max(p99) if len(p99) == len(gpus) else None
    b1 = [each["exec_1_ns"] for each in gpus]
    windows = [each["window_ns"] for each in gpus]
    common = min(end for _, end in windows) - max(begin for begin, _ in windows)
    longest = max(end - begin for begin, end in windows)
    return [
        check(
            "start lateness p99 of the worst GPU, all at once", scaled(worst, 1000), "us", "< 25"
        ),
        check("of that time all GPUs were busy in", 100 * common / longest, "%"),
        check("batch 1 on the slowest GPU over the fastest", max(b1) / min(b1), ""),
    ]


# ---------------------------------------------------------------------------------------- loads


def loads(rig: Rig) -> dict[str, Any]:
    """Row "loads": how long a load takes while no other GPU loads, and while 2, 4, ... and all do."""
    copies, seconds = _LOAD_COPIES, rig.settings.seconds(_LOADS_S)
    together = {}
    with drivers(rig, copies) as all_drivers:
        for driver in all_drivers:
            driver.answer()
        alone = [
            durations(at_once([driver], do="loads", seconds=seconds)) for driver in all_drivers
        ]
        for number in numbers_at_once(len(all_drivers)):
            found = at_once(all_drivers[:number], do="loads", seconds=seconds)
            together[number] = durations(found)
    size = rig.model().weights_bytes
    return {
        "figures": {
            "alone_ns": [spread(values) for values in alone],
            "together_ns": {str(number): spread(values) for number, values in together.items()},
            "weights_bytes": size,
        },
        "checks": load_checks(alone, together, size),
    }


def numbers_at_once(gpus: int) -> list[int]:
    """2, 4, 8 ... and all; [] with one GPU."""
    doubled = [2**power for power in range(1, 8) if 2**power < gpus]
    return [*doubled, gpus] if gpus > 1 else []


def durations(found: Sequence[Mapping[str, Any]]) -> list[int]:
    """Durations (ns) of the loads that lie wholly in the time in which every driver loaded.

    Raises RowFailed if a GPU loaded nothing.
    """
    spans = [each["spans"] for each in found]
    if not all(spans):
        raise RowFailed("a GPU loaded nothing")
    first = max(min(begin for begin, _, _ in each) for each in spans)
    last = min(max(end for _, end, _ in each) for each in spans)
    return [ns for each in spans for begin, end, ns in each if begin >= first and end <= last]


def load_checks(
    alone: Sequence[Sequence[int]], together: Mapping[int, Sequence[int]], size: int
) -> list[dict[str, Any]]:
    """What the table says of the loads."""
    by_gpu = [value for value in (percentile(values, 50) for values in alone) if value is not None]
    usual = percentile(by_gpu, 50)
    checks = [check("load of the weights, no other GPU loads, p50", scaled(usual, NS_PER_MS), "ms")]
    for number, values in together.items():
        value = percentile(values, 50)
        checks.append(
            check(f"the same, {number} GPUs load at once, p50", scaled(value, NS_PER_MS), "ms")
        )
        if value and usual:
            checks += [
                check(f"{number} GPUs at once over one", value / usual, ""),
                check(f"{number} GPUs at once, bytes in all", number * size / value, "GB/s"),
            ]
    return checks


def with_loads(profile: GpuProfile, rows: Mapping[str, Mapping[str, Any]], name: str) -> GpuProfile:
    """`profile`, in which the weights of `name` take as long as the row "loads" found while all GPUs load."""
    if "loads" not in rows:
        return profile
    weights_ns = contended_weights_ns(rows["loads"]["figures"])
    if weights_ns is None:
        return profile
    model = replace(profile.model(name), weights_ns=weights_ns)
    return replace(profile, models={**profile.models, name: model})


def contended_weights_ns(figures: Mapping[str, Any]) -> int | None:
    """The usual load while all GPUs load; None where the figures do not say."""
    numbers = sorted(figures["together_ns"], key=int)
    chosen = figures["together_ns"][numbers[-1]] if numbers else figures["alone_ns"][0]
    return round(chosen["p50"]) if chosen["p50"] else None
