"""Real diffusion models on one GPU: times by the step, answers, and a cascade of them served live.

    python3 benchmarks/gpu/real_cascades.py --out DIR                    # all of it, within 510 s
    python3 benchmarks/gpu/real_cascades.py --out DIR --parts models     # the five models alone
    python3 benchmarks/gpu/real_cascades.py --out DIR --parts live --resume real_cascades.json
    python3 benchmarks/gpu/real_cascades.py --table                      # real_cascades.md from the results

*models*: for each model of DiffServe's three cascades, in float16, the time of one denoising step and of what
comes before and after it by batch size; 200 steps and more against the prediction; whole passes; and answers
served alone, interrupted and beside others, against a direct pass of the same module. *live*: SD-Turbo with its
judge before SD v1.5 on one GPU, through worker, controller and client, under four policies. Weights are random:
this measures time and exactness, never quality.

DIR/real_cascades.json is written after each part, and what it holds is not run again. What --seconds has no
time for is left out, the largest first, and the page says so.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import checkout_path  # noqa: F401  (before everything that lies in this checkout)
from cascade_page import PAGE, RESULTS, page
from measured_on import measured_on

from slosched.cascade.real import Programs, programs_of
from slosched.experiment.children import Children
from slosched.output_files import write_file

PARTS = ("models", "live")
#: The part of the time, s, that is kept for the last files.
_SPARE_S = 8.0


class Results:
    """The document that grows: one entry for each key, written to the disk at once."""

    def __init__(self, out: Path, about: str, before: Path | None) -> None:
        self._path, self._out = out / "real_cascades.json", out
        self.document: dict[str, Any] = {"runs": [], "cells": {}, "left_out": {}, "failed": {}}
        for path in (before, self._path):
            if path is not None and path.is_file():
                self.document |= json.loads(path.read_text(encoding="utf-8"))
        self.document["runs"] = [*dict.fromkeys([*self.document["runs"], about])]

    def has(self, key: str) -> bool:
        return key in self.document["cells"]

    def get(self, key: str) -> Any:
        return self.document["cells"][key]

    def put(self, key: str, value: Any) -> None:
        self.document["cells"][key] = value
        for other in ("left_out", "failed"):
            self.document[other].pop(key, None)
        self._write()

    def left_out(self, key: str, why: str = "no time was left") -> None:
        self.document["left_out"][key] = why
        self._write()

    def failed(self, key: str, why: str) -> None:
        self.document["failed"][key] = why
        self._write()

    def _write(self) -> None:
        text = json.dumps(self.document, indent=1) + "\n"
        write_file(self._path, text.encode())
        write_file(self._out / "real_cascades.md", page(self.document).encode())


class Clock:
    """Seconds since the start, and until the end."""

    def __init__(self, seconds: float) -> None:
        self._began, self._seconds = time.monotonic(), seconds

    def spent(self) -> float:
        return time.monotonic() - self._began

    def left(self) -> float:
        return self._seconds - _SPARE_S - self.spent()

    def say(self, text: str) -> None:
        print(f"{self.spent():.0f} s: {text}", flush=True)


# --------------------------------------------------------------------------------------- models


def run_models(results: Results, clock: Clock, device: str, names: Sequence[str]) -> None:
    """Measure each model that is missing, with as many batch sizes as there is time for."""
    from cascade_models import SUBJECTS, Models, batches_within, measure

    subjects = [each for each in SUBJECTS if short(each.name) in names or not names]
    missing = [each for each in subjects if not results.has(f"model/{each.name}")]
    if not missing:
        return
    bed = Models(device)
    clock.say("the device is ready")
    slower = 1.0
    for place, subject in enumerate(missing):
        key = f"model/{subject.name}"
        # Every model that follows shall have its smallest plan.
        rest_s = sum(each.least_s for each in missing[place + 1 :]) * slower
        batches = batches_within(subject, clock.left() - rest_s, slower)
        batches = batches or batches_within(subject, clock.left(), slower)
        if not batches:
            results.left_out(key)
            clock.say(f"{subject.name} is left out")
            continue
        began = clock.spent()
        try:
            found = measure(bed, subject, batches, clock.left)
        except Exception as error:  # the others are measured all the same
            results.failed(key, repr(error))
            clock.say(f"{subject.name} failed: {error!r}")
            bed.forget(subject.name)
            continue
        planned_s = next(each_s for those, each_s in subject.plans if those == batches)
        slower = max(0.3, min(3.0, (clock.spent() - began) / planned_s))
        results.put(key, found)
        clock.say(
            f"{subject.name}: {json.dumps(found['exec_ns'])} {json.dumps(found.get('answers'))}"
        )
        bed.forget(subject.name)
    bed.backend.close()


def short(name: str) -> str:
    return name.removeprefix("diffusion/").removesuffix("+judge")


# ----------------------------------------------------------------------------------------- live


def run_live(results: Results, clock: Clock, options: argparse.Namespace, work: Path) -> None:
    """The policies that are missing, each on the same trace."""
    from cascade_live import Live, measure

    cpu = not options.device.startswith("cuda")
    programs: Programs = programs_of("sdturbo", cpu=cpu)
    with Children() as children:
        live = Live(
            work,
            children,
            device=options.device,
            programs=programs,
            cascade="sdturbo",
            dtype="float32" if cpu else "float16",
            seconds=options.live_seconds,
        )
        measure(live, results, clock.left, clock.say)


def attempt(key: str, results: Results, clock: Clock, part: Callable[[], None]) -> None:
    """Run one part; if it fails, what is there stays and the others go on."""
    try:
        part()
    except Exception as error:
        results.failed(key, repr(error))
        clock.say(f"{key} failed: {error!r}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="where real_cascades.json and .md go")
    parser.add_argument("--device", default="cuda:0", help="cpu: the live part, with small models")
    parser.add_argument("--seconds", type=float, default=510, help="in all (default 510)")
    parser.add_argument(
        "--live-seconds", type=int, default=70, help="of each live run (default 70)"
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="with commas (default: both)")
    parser.add_argument("--models", default="", help="as sd-turbo,sd15 (default: all five)")
    parser.add_argument("--resume", type=Path, help="a real_cascades.json to go on with")
    parser.add_argument("--work", type=Path, help="the folder for logs (default: a temporary one)")
    parser.add_argument("--commit", default="", help="what was measured, outside a checkout")
    parser.add_argument("--table", action="store_true", help="only write real_cascades.md")
    options = parser.parse_args(arguments)
    if options.table:
        document = json.loads(RESULTS.read_text(encoding="utf-8"))
        write_file(PAGE, page(document).encode())
        return 0
    parts = options.parts.split(",")
    if not set(parts) <= set(PARTS):
        parser.error(f"--parts {options.parts}: choose from {', '.join(PARTS)}, with commas")
    if options.out is None:
        parser.error("--out is missing")
    clock = Clock(options.seconds)
    options.out.mkdir(parents=True, exist_ok=True)
    about = measured_on(options.device, options.commit)
    results = Results(options.out, about, options.resume)
    names = [each for each in options.models.split(",") if each]
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        if "models" in parts:
            attempt(
                "models", results, clock, lambda: run_models(results, clock, options.device, names)
            )
        if "live" in parts:
            attempt("live", results, clock, lambda: run_live(results, clock, options, work))
    clock.say(f"left out: {results.document['left_out']}; failed: {results.document['failed']}")
    return 1 if results.document["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
