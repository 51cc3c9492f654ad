"""What a decision costs as clusters grow: scheduler and worker by themselves, in CPU time.

    .venv/bin/python benchmarks/scaling.py                 # about 4 minutes; writes results/scaling.json
    .venv/bin/python benchmarks/scaling.py --only gpus     # one part; keeps the others' results
    .venv/bin/python benchmarks/scaling.py --quick         # whether it works; writes nothing

Ratios come first: they are the same on any machine. Microseconds are CPU time on the machine named in
the results, without the simulator, the sockets and the telemetry (core_rig.py says how they are taken).
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from core_rig import SCHEDULER, WORKER, Parts, Rig, poisson, zoo

from slosched.config import GpuProfile, SchedulerConfig
from slosched.config_file import load_profile
from slosched.units import NS_PER_MS

RESULTS = Path(__file__).resolve().parent / "results" / "scaling.json"
FORMAT = 1
_PAGE = 2**24
Record = dict[str, Any]


def config(max_batch: int = 16) -> SchedulerConfig:
    return SchedulerConfig(max_gpus=1000, schedule_ahead_ns=5 * NS_PER_MS, max_batch=max_batch)


def record(point: Record, parts: Parts) -> Record:
    """One line of the results."""
    done = {
        **point,
        "requests": parts.requests,
        "actions": parts.actions,
        "met": round(parts.met / max(1, parts.requests), 4),
        "scheduler_us_per_request": round(parts.us_per_request(*SCHEDULER), 2),
        "scheduler_us_per_action": round(parts.us_per_action(*SCHEDULER), 2),
        "worker_us_per_request": round(parts.us_per_request(*WORKER), 2),
        "checker_us_per_request": round(parts.us_per_request("check"), 2),
        "all_us_per_request": round(parts.us_per_request(), 2),
        "undisturbed": round(parts.undisturbed, 3),
        "by_part_us_per_request": {
            part: round(parts.us_per_request(part), 2) for part in sorted(parts.spent_ns)
        },
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    shown = ", ".join(f"{key} {value}" for key, value in point.items())
    print(
        f"  {shown}: scheduler {done['scheduler_us_per_request']} us a request, "
        f"{done['scheduler_us_per_action']} an action; worker {done['worker_us_per_request']}; "
        f"all {done['all_us_per_request']} (in time {done['met']})",
        flush=True,
    )
    return done


class Point:
    """One point of a curve: a cluster, and the load that is offered to it in several rounds."""

    def __init__(self, point: Record, rig: Rig, models: Sequence[int], rate: float, slo_ms: int):
        self.point, self.rig, self.models = point, rig, models
        self.rate, self.slo_ns = rate, slo_ms * NS_PER_MS
        self.parts = Parts()

    def offer(self, seconds: float, *, seed: int, into: Parts | None) -> None:
        weights = [1.0] * len(self.models)
        arrivals = poisson(self.models, weights, self.rate, self.slo_ns, seed=seed)
        self.rig.offer(arrivals, seconds, into)


def curve(points: Sequence[Point], *, warm_s: float, requests: int, quick: bool) -> list[Record]:
    """Measure all points in turn, round after round, so that a neighbour slows none of them alone."""
    rounds = 2 if quick else 8
    for point in points:
        point.offer(0.02 if quick else warm_s, seed=1000, into=None)
    for seed in range(1, rounds + 1):
        for point in points:
            seconds = (600 if quick else requests) / rounds / point.rate
            point.offer(seconds, seed=seed, into=point.parts)
    return [record(point.point, point.parts) for point in points]


# --------------------------------------------------------------------------------------- parts


def slo_exp_1(quick: bool) -> list[Record]:
    """12 copies of ResNet-50 on six GPUs at 2,400 requests/s, from 1.5x to 25x, also checked."""
    found = []
    for check in (False, True):
        for factor in (1.5, 3.375, 25.6):
            rig = Rig(config(), load_profile("v100"), gpus_per_worker=(6,), check=check)
            models = rig.load("resnet50", 12)
            slo_ns = round(factor * 2_600_000)
            arrivals = poisson(models, [1.0] * 12, 2400, slo_ns)
            rig.offer(poisson(models, [1.0] * 12, 2400, slo_ns, seed=2), 0.3)
            parts = rig.offer(arrivals, 0.5 if quick else 5.0)
            found.append(record({"slo_factor": factor, "checked": check}, parts))
    return found


def azure(quick: bool) -> list[Record]:
    """4,026 models of 61 kinds on 100 GPUs with room for 200 each, 9,600 requests/s, most to a few."""
    profile = zoo(61, weights_bytes=6 * _PAGE, cache_bytes=1200 * _PAGE)
    rig = Rig(config(max_batch=8), profile, gpus_per_worker=(4,) * 25)
    models = [model for name in profile.models for model in rig.load(name, 66)]
    weights = [1 / (rank + 10) for rank in range(len(models))]
    random.Random(5).shuffle(weights)
    found = []
    for second in range(1 if quick else 3):  # the first ones fill the memory by demand
        arrivals = poisson(models, weights, 9600, 100 * NS_PER_MS, seed=second)
        parts = rig.offer(arrivals, 0.1 if quick else 1.0)
        found.append(record({"second": second}, parts))
        found[-1]["simulated_s_per_cpu_s"] = round(1e6 / 9600 / parts.us_per_request(), 3)
    return found


def _gpus(quick: bool, *, spread: bool) -> list[Record]:
    points = []
    for gpus in (6, 150) if quick else (6, 12, 25, 50, 100, 150):
        copies, profile = 100, load_profile("v100")
        if spread:  # room for six on each GPU, so that each is on three
            copies = 2 * gpus
            profile = GpuProfile("small", profile.models, 6 * 7 * profile.page_bytes)
        rig = Rig(config(), profile, gpus_per_worker=(1,) * gpus)
        models = rig.load("resnet50", copies)
        point = {"gpus": gpus, "models": copies}
        points.append(Point(point, rig, models, 250 * gpus, 100 if spread else 25))
    # Warm: every worker's latencies are known from a full window of samples.
    return curve(points, warm_s=0.6, requests=12_288, quick=quick)


def gpus_everywhere(quick: bool) -> list[Record]:
    """6 to 150 GPUs, each a worker, 250 requests/s for each; 100 models, all resident everywhere."""
    return _gpus(quick, spread=False)


def gpus_spread(quick: bool) -> list[Record]:
    """The same with two models a GPU and room for six on each, loaded by demand."""
    return _gpus(quick, spread=True)


def _models(quick: bool, *, share: float) -> list[Record]:
    points = []
    for count in (12, 1000) if quick else (12, 100, 1000, 4026):
        # On each of six GPUs: for all of them, or so that all GPUs together hold `share`.
        room = count if share == 1 else max(1, round(count * share / 6))
        profile = zoo(1, weights_bytes=_PAGE, cache_bytes=room * _PAGE)
        rig = Rig(config(max_batch=1), profile, gpus_per_worker=(6,))
        models = rig.load("model000", count)
        rate = 1200 if share == 1 else 300  # loads take 8 ms, and nearly every request needs one
        points.append(Point({"models": count, "room": room}, rig, models, rate, 100))
    return curve(points, warm_s=2.0, requests=8_192, quick=quick)


def models_resident(quick: bool) -> list[Record]:
    """12 to 4,026 models on six GPUs, batch 1, 1,200 requests/s in all, all resident."""
    return _models(quick, share=1.0)


def models_tenth(quick: bool) -> list[Record]:
    """The same at 300 requests/s where all GPUs together have room for a tenth of them."""
    return _models(quick, share=0.1)


PARTS: dict[str, Callable[[bool], list[Record]]] = {
    "slo-exp-1": slo_exp_1,
    "azure": azure,
    "gpus": gpus_everywhere,
    "gpus-spread": gpus_spread,
    "models": models_resident,
    "models-tenth": models_tenth,
}
#: What grows, per what, and its limit.
CURVES = {
    "gpus": ("scheduler_us_per_action", "6 to 150 GPUs, models everywhere"),
    "gpus-spread": ("scheduler_us_per_action", "6 to 150 GPUs, models spread"),
    "models": ("scheduler_us_per_request", "12 to 4,026 models, all resident"),
    "models-tenth": ("scheduler_us_per_action", "12 to 4,026 models, room for a tenth"),
}
GROWTH_LIMIT = 1.5


def ratios(parts: dict[str, list[Record]]) -> list[str]:
    """The curves' growth in words, the worst point against the first."""
    lines = []
    for name, (key, words) in CURVES.items():
        if points := parts.get(name):
            worst = max(point[key] for point in points) / points[0][key]
            verdict = "met" if worst < GROWTH_LIMIT else "missed"
            lines.append(f"{words}: {worst:.2f}x (target < {GROWTH_LIMIT}x, {verdict})")
    for point in parts.get("azure", [])[-1:]:
        speed = point["simulated_s_per_cpu_s"]
        lines.append(f"azure-like: {speed} simulated s per CPU s, {point['peak_rss_mib']} MiB")
    return lines


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", choices=PARTS, action="append", help="run this part alone")
    parser.add_argument("--quick", action="store_true", help="run briefly and write nothing")
    options = parser.parse_args(arguments)
    results: Record = {"format": FORMAT, "parts": {}}
    if RESULTS.exists():
        results = json.loads(RESULTS.read_text())
    results["machine"] = f"{platform.machine()}, CPython {platform.python_version()}"
    for name in options.only or PARTS:
        print(f"{name}: {PARTS[name].__doc__}", flush=True)
        results["parts"][name] = PARTS[name](options.quick)
    print(*ratios(results["parts"]), sep="\n")
    if not options.quick:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
