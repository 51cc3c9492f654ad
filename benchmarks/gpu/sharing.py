"""Models that share one GPU, in every mode: HotCarbon's mixes, Deft's demo, a pair that saturates the card.

    python3 benchmarks/gpu/sharing.py --out DIR             # all that is missing, within 540 s
    python3 benchmarks/gpu/sharing.py --out DIR --resume benchmarks/results --parts mix-eager-tm,demo
    python3 benchmarks/gpu/sharing.py --merge FILE... --out benchmarks/results   # several runs as one
    python3 benchmarks/gpu/sharing.py --table                               # sharing.md from the results
    python3 benchmarks/gpu/sharing.py --simulated    # the same, with what virtual time makes of each cell

Everything runs through the sessions of `slosched share`: real processes, MPS where the mode is mps. The four
models of HotCarbon are loaded once for each mode, and each mix is a window in which a part of them is active.
Answers are compared with the one that the same model gave alone. DIR/sharing.json is written after each cell,
and what it holds is not run again; a part that --seconds has no time for is left out, and the page says so.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import checkout_path  # noqa: F401  (before everything that lies in this checkout)
import msgspec
from measured_on import measured_on
from sharing_jobs import GATES, MODES, demo_jobs, mix_jobs, mode_of, pair_jobs, pair_ways
from sharing_page import MIXES, MODELS, PAGE, RESULTS, mix_name, page
from sharing_simulated import kept_lines, simulated_lines

from slosched.output_files import write_file
from slosched.share.figures import RunMetrics
from slosched.share.metrics import metrics_of
from slosched.share.session import Session
from slosched.share_spec import (
    Boundary,
    BoundaryKind,
    Job,
    Mode,
    Run,
    RunResult,
    ShareSpec,
)
from slosched.units import NS_PER_MS, NS_PER_S

#: The runs alone, which lie beside sharing.json so that a later run can go on with other modes.
SOLOS = "sharing_solos.json.gz"
#: The part of the time, s, that is kept for the last files.
_SPARE_S = 12.0
#: What a window costs beyond its length: what runs ends, and the next one begins.
_WINDOW_MORE_S = 3.0


class Results:
    """The document that grows, and the runs alone that ratios refer to."""

    def __init__(self, out: Path, about: str, before: Path | None, seconds: float) -> None:
        self._out, self._began, self._seconds = out, time.monotonic(), seconds
        self.document: dict[str, Any] = {
            "runs": [],
            "modes": {run: list(modes) for run, modes in MODES.items()},
            "cells": {},
            "left_out": {},
            "failed": {},
        }
        self.solos: dict[str, RunResult] = {}
        for folder in (before, out):
            if folder is not None and (folder / "sharing.json").is_file():
                self.document |= json.loads((folder / "sharing.json").read_text(encoding="utf-8"))
            if folder is not None and (folder / SOLOS).is_file():
                text = gzip.decompress((folder / SOLOS).read_bytes())
                self.solos |= msgspec.json.decode(text, type=dict[str, RunResult])
        self.document["runs"] = [*dict.fromkeys([*self.document["runs"], about])]
        self.document["modes"] = {run: list(modes) for run, modes in MODES.items()}

    def left(self) -> float:
        return self._seconds - _SPARE_S - (time.monotonic() - self._began)

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:.0f} s: {text}", flush=True)

    def has(self, key: str) -> bool:
        return key in self.document["cells"]

    def put(self, key: str, cell: dict[str, Any]) -> None:
        self.document["cells"][key] = cell
        for other in ("left_out", "failed"):
            self.document[other].pop(key, None)
        self.write()

    def keep_solo(self, key: str, result: RunResult) -> None:
        self.solos[key] = result
        text = msgspec.json.encode(self.solos)
        write_file(self._out / SOLOS, gzip.compress(text, mtime=0))

    def note(self, kind: str, key: str, why: str) -> None:
        self.document[kind][key] = why
        self.say(f"{key}: {why}")
        self.write()

    def write(self) -> None:
        text = json.dumps(self.document, indent=1) + "\n"
        write_file(self._out / "sharing.json", text.encode())
        write_file(self._out / "sharing.md", page(self.document).encode())


# ----------------------------------------------------------------------------------------- a cell


def cell_of(spec: ShareSpec, result: RunResult, solos: dict[int, RunResult]) -> dict[str, Any]:
    """What the page needs of one window."""
    found = metrics_of(spec, result, solos)
    cell: dict[str, Any] = {
        "mode": result.mode.value,
        "window_s": found.window_s,
        "stp": found.stp,
        "antt": found.antt,
        "jain": found.jain,
        "energy_ratio": found.energy_ratio,
        "energy_ratio_with_idle": found.energy_ratio_with_idle,
        "watts": found.energy.mean_watts,
        "idle_watts": found.energy.idle_watts,
        "counter_difference": found.energy.difference,
        "unavailable": found.unavailable,
        "pauses": msgspec.to_builtins(found.pauses),
        "jobs": _jobs(found, result),
    }
    prepared = [each.prepared for each in result.jobs if each.prepared is not None]
    low = [each for each in prepared if each.boundaries]
    cell["boundary_ms"] = max((each.boundary_ns for each in low), default=0) / NS_PER_MS or None
    cell["prepared"] = [
        {
            "name": spec.jobs[each.job].name,
            "load_s": each.load_ns / NS_PER_S,
            "exec_ms": each.exec_ns / NS_PER_MS,
            "boundaries": each.boundaries,
            "boundary_ms": each.boundary_ns / NS_PER_MS,
            "note": each.note,
            "answer": each.answer,
            "runs": each.runs.value,
        }
        for each in prepared
    ]
    return cell


def _jobs(found: RunMetrics, result: RunResult) -> list[dict[str, Any]]:
    rows = {each.job: [row for row in each.requests if not row.warmup] for each in result.jobs}
    jobs = []
    for each in found.jobs:
        latency = each.latency
        jobs.append(
            {
                "name": each.name,
                "model": each.model,
                "status": each.status.value,
                "reason": each.reason,
                "n": each.n,
                "throughput_per_s": each.throughput_per_s,
                "mean_ms": latency.mean_ms if latency else None,
                "p50_ms": latency.p50_ms if latency else None,
                "p90_ms": latency.p90_ms if latency else None,
                "p99_ms": latency.p99_ms if latency else None,
                "p99_is_maximum": bool(latency and latency.p99_is_maximum),
                "normalized": each.normalized,
                "inflation": each.inflation.all,
                "inflation_overlapping": each.inflation.overlapping,
                "inflation_apart": each.inflation.apart,
                "joules_per_request": each.joules_per_request,
                "ended": len(rows[each.job]),
                "wrong": sum(row.differs for row in rows[each.job]),
            }
        )
    return jobs


def spec_of(jobs: Sequence[Job], mode: Mode, seconds: float) -> ShareSpec:
    return ShareSpec(
        jobs=tuple(jobs),
        modes=(mode,),
        duration_ns=round(seconds * NS_PER_S),
        idle_ns=2 * NS_PER_S,
        prepare_within_ns=240 * NS_PER_S,
        finish_within_ns=30 * NS_PER_S,
    )


Window = tuple[str, tuple[int, ...], str]  # the cell, the places, and the key of a run alone or ""


#: Windows of a model alone, of which the first is what the others are held against.
_SOLO_TIMES = 4


def run_windows(
    results: Results,
    jobs: Sequence[Job],
    mode: Mode,
    windows: Sequence[Window],
    seconds: float,
    work: Path,
    solo_keys: Sequence[str],
) -> None:
    """Load `jobs` under `mode`, and run each window that is missing. `solo_keys`: the run alone of each job."""
    missing = [
        each
        for each in windows
        if not results.has(each[0]) or (each[2] and each[2] not in results.solos)
    ]
    if not missing:
        return
    spec = spec_of(jobs, mode, seconds)
    with Session(spec, mode, work, say=results.say, stopped=lambda: False) as session:
        for key, places, solo_key in missing:
            if results.left() < seconds + _WINDOW_MORE_S:
                results.note("left_out", key, "no time was left")
                continue
            result = session.window(places)
            if solo_key:
                results.keep_solo(solo_key, result)
            known = {p: results.solos[k] for p in places if (k := solo_keys[p]) in results.solos}
            cell = cell_of(spec, result, known)
            results.put(key, cell)
            parts = [f"{j['name']} {j['n']} p50 {j['p50_ms'] or 0:.2f}" for j in cell["jobs"]]
            wrong = sum(job["wrong"] for job in cell["jobs"])
            results.say(f"{key}: STP {cell['stp']}; {', '.join(parts)}; wrong {wrong}")


# ------------------------------------------------------------------------------------------- parts


def part_mix(
    run: str, mode: str, options: argparse.Namespace, results: Results, work: Path
) -> None:
    models = [each for each in MODELS if each in options.models.split(",")]
    mixes = [mix for mix in MIXES if set(mix) <= set(models)]
    windows: list[Window] = []
    for mix in mixes:
        places = tuple(models.index(each) for each in mix)
        if len(mix) > 1:
            windows.append((f"mix/{run}/{mode}/{mix_name(mix)}", places, ""))
        elif mode == MODES[run][0]:
            windows.append((f"mix/{run}/exclusive/{mix[0]}", places, f"{run}/{mix[0]}"))
    jobs = mix_jobs(Run(run), mode, models)
    keys = [f"{run}/{model}" for model in models]
    run_windows(results, jobs, mode_of(mode), windows, options.window, work, keys)


def part_solo(results: Results, options: argparse.Namespace, work: Path) -> None:
    """A model alone, in a process of its own, measured several times: the STP of each later time is 1."""
    key = "check/solo"
    done = dict(results.document["cells"].get(key, {}))
    for run in reversed(MODES):
        for job in mix_jobs(Run(run), "tm", ("bert", "whisper")):
            name = f"{run} {job.name}"
            if name in done:
                continue
            if results.left() < _SOLO_TIMES * options.window + 40:
                results.note("left_out", key, "no time was left for all of it")
                return
            done[name] = _solo_windows(results, job, options.window, work)
            results.say(f"{key}: {name} {done[name]}")
            results.put(key, done)


def _solo_windows(results: Results, job: Job, seconds: float, work: Path) -> list[float]:
    """The STP of each window but the first, which is the run alone that they are held against."""
    spec = spec_of((job,), Mode.EXCLUSIVE, seconds)
    with Session(spec, Mode.EXCLUSIVE, work, say=results.say, stopped=lambda: False) as session:
        first, *others = [session.window() for _ in range(_SOLO_TIMES)]
    found = [metrics_of(spec, each, {0: first}).stp for each in others]
    return [stp for stp in found if stp is not None]


def _alone_first(
    results: Results, prefix: str, jobs: Sequence[Job], seconds: float, work: Path
) -> list[str]:
    keys = [f"{prefix}{job.name}" for job in jobs]
    windows: list[Window] = [
        (f"{prefix}alone/{job.name}", (place,), keys[place]) for place, job in enumerate(jobs)
    ]
    plain = [
        msgspec.structs.replace(job, priority=0, boundary=Boundary(kind=BoundaryKind.NONE))
        for job in jobs
    ]
    run_windows(results, plain, Mode.TM, windows, seconds, work, keys)
    return keys


def part_demo(results: Results, options: argparse.Namespace, work: Path) -> None:
    """Deft's two detectors: A of 1440p back to back, B of 720p with the higher priority and pauses."""
    low, high = demo_jobs()
    seconds = options.window + 2
    keys = _alone_first(results, "demo-", (low, high), seconds, work)
    for name, (mode, boundary) in GATES.items():
        jobs = (msgspec.structs.replace(low, boundary=boundary), high)
        run_windows(results, jobs, mode, [(f"demo/{name}", (0, 1), "")], seconds, work, keys)


def part_pair(results: Results, run: str, options: argparse.Namespace, work: Path) -> None:
    """ViT-L/16 of batch 32 back to back, and a ResNet-50 of batch 1 that arrives at random."""
    low, high = pair_jobs(Run(run))
    seconds = options.window + 2
    keys = _alone_first(results, f"pair-{run}-", (low, high), seconds, work)
    for name, (mode, boundary) in pair_ways(run).items():
        jobs = (msgspec.structs.replace(low, boundary=boundary), high)
        run_windows(results, jobs, mode, [(f"pair-{run}/{name}", (0, 1), "")], seconds, work, keys)


def part_energy(results: Results, options: argparse.Namespace, work: Path) -> None:
    """The energy counter beside integrated power, over 30 s under load."""
    if results.has("check/energy"):
        return
    job = Job(name="vit_l", model="vit_l_16", batch=32, dtype="float16", run=Run.GRAPHS)
    spec = spec_of((job,), Mode.EXCLUSIVE, 31)
    with Session(spec, Mode.EXCLUSIVE, work, say=results.say, stopped=lambda: False) as session:
        energy = metrics_of(spec, session.window()).energy
    results.put("check/energy", msgspec.to_builtins(energy))


def part_kill(results: Results, options: argparse.Namespace, work: Path) -> None:
    """SIGKILL for one of two models' processes under MPS, in the middle of a window."""
    if results.has("check/kill"):
        return
    jobs = mix_jobs(Run.EAGER, "mps", ("bert", "whisper"))
    spec = spec_of(jobs, Mode.MPS, 12)
    before_mb = _memory_mb()
    killed_at: list[float] = []
    with Session(spec, Mode.MPS, work, say=results.say, stopped=lambda: False) as session:
        victim = session._members.all[1]

        def kill() -> None:
            killed_at.append(time.monotonic())
            os.kill(victim.pid, signal.SIGKILL)

        timer = threading.Timer(4.0, kill)
        noticed: list[float] = []

        def say(text: str) -> None:
            results.say(text)

        session._say = say
        watcher = threading.Thread(target=_when_gone, args=(victim, noticed), daemon=True)
        timer.start()
        watcher.start()
        result = session.window()
        watcher.join(20)
    victim_result = next(each for each in result.jobs if each.job == 1)
    time.sleep(1)
    results.put(
        "check/kill",
        {
            "mode": "mps",
            "status": f"{victim_result.status.value}: {victim_result.reason}",
            "after_s": noticed[0] - killed_at[0] if noticed and killed_at else -1.0,
            "others_n": len(result.jobs[0].requests),
            "daemon_gone": not _daemon_runs(),
            "memory_before_mb": before_mb,
            "memory_after_mb": _memory_mb(),
        },
    )


def part_overhead(results: Results, options: argparse.Namespace, work: Path) -> None:
    """A request in a member's loop beside the same model in a plain loop, in one process and by turns."""
    key = "check/overhead"
    done = dict(results.document["cells"].get(key, {}))
    for name, seconds, turns in (("bert", 2, 5), ("whisper", 2, 3), ("resnet50", 1, 5)):
        if name in done:
            continue
        script = str(Path(__file__).with_name("plain_loop.py"))
        ended = subprocess.run(
            [sys.executable, script, name, str(seconds), str(turns)],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        done[name] = json.loads(ended.stdout.splitlines()[-1])
        results.say(f"{key}: {name} {done[name]}")
        results.put(key, done)


def _when_gone(member: Any, noticed: list[float]) -> None:
    give_up = time.monotonic() + 30
    while not member.gone and time.monotonic() < give_up:
        time.sleep(0.05)
    noticed.append(time.monotonic())


def _daemon_runs() -> bool:
    """True if an MPS daemon or server of this user still runs."""
    for each in Path("/proc").glob("[0-9]*/comm"):
        try:
            if each.read_text().startswith("nvidia-cuda-mps"):
                return True
        except OSError:
            continue
    return False


def _memory_mb() -> float:
    """Memory in use on the GPU, by nvidia-smi; -1 without it."""
    if shutil.which("nvidia-smi") is None:
        return -1.0
    index = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    done = subprocess.run(
        ["nvidia-smi", "-i", index, "--query-gpu=memory.used", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    return float(done.stdout.strip() or -1)


# -------------------------------------------------------------------------------------------- main


def parts_of(options: argparse.Namespace) -> dict[str, Callable[[Results, Path], None]]:
    """Every part by its name, in the order in which they run."""
    parts: dict[str, Callable[[Results, Path], None]] = {}
    for run, modes in MODES.items():
        for mode in modes:
            parts[f"mix-{run}-{mode}"] = partial(part_mix, run, mode, options)
    parts["demo"] = lambda results, work: part_demo(results, options, work)
    parts["pair-graphs"] = lambda results, work: part_pair(results, "graphs", options, work)
    parts["pair-eager"] = lambda results, work: part_pair(results, "eager", options, work)
    parts["solo"] = lambda results, work: part_solo(results, options, work)
    parts["energy"] = lambda results, work: part_energy(results, options, work)
    parts["overhead"] = lambda results, work: part_overhead(results, options, work)
    parts["kill"] = lambda results, work: part_kill(results, options, work)
    return parts


def merge(files: Sequence[Path], out: Path) -> None:
    """One sharing.json of several, of which later ones go before."""
    document: dict[str, Any] = {}
    for file in files:
        each = json.loads(file.read_text(encoding="utf-8"))
        if not document:
            document = each
            continue
        document["runs"] = [*dict.fromkeys([*document["runs"], *each["runs"]])]
        for field in ("cells", "left_out", "failed"):
            document[field] |= each[field]
    for field in ("left_out", "failed"):
        document[field] = {k: v for k, v in document[field].items() if k not in document["cells"]}
    write_file(out / "sharing.json", (json.dumps(document, indent=1) + "\n").encode())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="where sharing.json and .md go")
    parser.add_argument("--seconds", type=float, default=540, help="in all (default 540)")
    parser.add_argument("--window", type=float, default=8, help="of each mix, s (default 8)")
    parser.add_argument("--models", default=",".join(MODELS), help="of the mixes, with commas")
    parser.add_argument("--parts", default="", help="with commas (default: all)")
    parser.add_argument("--resume", type=Path, help="a folder with sharing.json to go on with")
    parser.add_argument("--work", type=Path, help="the folder for logs (default: a temporary one)")
    parser.add_argument("--commit", default="", help="what was measured, outside a checkout")
    parser.add_argument("--table", action="store_true", help="only write sharing.md")
    parser.add_argument(
        "--simulated", action="store_true", help="write sharing.md with a simulation of each cell"
    )
    parser.add_argument("--merge", type=Path, nargs="+", help="results to put together")
    options = parser.parse_args(arguments)
    if options.table or options.simulated:
        document = json.loads(RESULTS.read_text(encoding="utf-8"))
        more = simulated_lines(document) if options.simulated else kept_lines(PAGE)
        write_file(PAGE, page(document, more).encode())
        return 0
    if options.out is None:
        parser.error("--out is missing")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.merge:
        merge(options.merge, options.out)
        return 0
    parts = parts_of(options)
    chosen = [each for each in options.parts.split(",") if each] or list(parts)
    if unknown := set(chosen) - set(parts):
        parser.error(f"--parts {', '.join(unknown)}: choose from {', '.join(parts)}")
    about = measured_on("cuda:0", options.commit)
    results = Results(options.out, about, options.resume, options.seconds)
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)) / "logs"
        for name in chosen:
            if results.left() < 30:
                results.note("left_out", name, "no time was left")
                continue
            try:
                parts[name](results, work / name)
            except Exception as error:  # what is there stays, and the other parts run
                results.note("failed", name, repr(error))
    results.write()
    return 1 if results.document["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
