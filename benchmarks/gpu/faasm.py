"""Faasm's experiments and functions on one GPU, each part by a command of its own, in less than nine minutes.

    python3 benchmarks/gpu/faasm.py --out DIR                     # everything that is missing, within 530 s
    python3 benchmarks/gpu/faasm.py --out DIR --resume benchmarks/results/faasm.json --parts sgd,latency
    python3 benchmarks/gpu/faasm.py --out DIR --device cpu        # a trial with small sizes, without a GPU
    python3 benchmarks/gpu/faasm.py --merge FILE... --out benchmarks/results      # several runs as one
    python3 benchmarks/gpu/faasm.py --table                       # faasm.md from the results

The parts are commands of `slosched exp` and the functions' tests (faasm_parts.py). A part that fails or reaches
its limit says so, keeps the cells that were complete, and does not stop the others; one that no longer fits the
time is left out and said. The GPU's memory in use is read before and after each part: what is left behind is
a finding of the page. DIR/faasm.json is written after each part; a part that is complete there is not run
again.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import checkout_path  # noqa: F401  (before everything that lies in this checkout)
from faasm_page import PAGE, RESULTS, page
from faasm_parts import PARTS, Part, command
from measured_on import measured_on

from slosched.clock import now_ns, sleep_ns
from slosched.errors import InvalidConfig
from slosched.faasm.billing_gpu import GpuMemory, uuids_here
from slosched.faasm.frame_results import RESULTS as RECORDS
from slosched.faasm.frame_results import read_results
from slosched.faasm.layout import PUBLISHED
from slosched.output_files import write_file
from slosched.units import NS_PER_S

NAME = "faasm.json"
#: Fields of records that the page does not need.
_LEFT_OUT = (PUBLISHED, "answers", "data", "bill_samples")
#: A part is asked to end this long before it is killed; the last files take as long.
_END_S, _SPARE_S = 20.0, 8.0
#: How long memory of ended processes may take to be free, and what may differ.
_SETTLE_NS, _EQUAL_BYTES = 15 * NS_PER_S, 16 << 20
_LINES = 25
_CHECKOUT = Path(__file__).resolve().parents[2]


class Bench:
    """One run of this program. `document` grows, and is what the page is made from."""

    def __init__(self, out: Path, work: Path, device: str, budget_s: float, commit: str) -> None:
        self._out, self._work, self._gpu = out, work, device.startswith("cuda")
        self._began_ns, self._budget_s = now_ns(), budget_s
        self._about = measured_on(device, commit)
        self.document: dict[str, Any] = {"parts": {}, "left_out": {}}
        self._uuids = uuids_here() if self._gpu else ()

    def take_up(self, files: Sequence[Path]) -> None:
        """Parts that were measured before."""
        for path in files:
            if path.is_file():
                self.document["parts"] |= json.loads(path.read_text(encoding="utf-8"))["parts"]

    @property
    def left_s(self) -> float:
        return self._budget_s - _SPARE_S - (now_ns() - self._began_ns) / NS_PER_S

    def say(self, text: str) -> None:
        print(f"{(now_ns() - self._began_ns) / NS_PER_S:.0f} s: {text}", flush=True)

    def run(self, names: Sequence[str], parts: Mapping[str, Part] = PARTS) -> None:
        """Run what is missing of these parts. Raises KeyboardInterrupt once the part has been ended."""
        for name in names:
            part = parts[name]
            if self.document["parts"].get(name, {}).get("complete"):
                self.say(f"{name}: there already")
                continue
            left_s = self.left_s - _END_S
            if left_s < (part.needs_s if self._gpu else 1.0):
                self.document["left_out"][name] = (
                    f"{max(0.0, left_s):.0f} s were left, and it takes about {part.needs_s:.0f} s"
                )
                self.say(f"{name}: left out, {self.document['left_out'][name]}")
                self.write()
                continue
            self.document["left_out"].pop(name, None)
            self.document["parts"][name] = self._part(name, part, min(part.limit_s, left_s))
            self.write()

    def _part(self, name: str, part: Part, limit_s: float) -> dict[str, Any]:
        run = self._work / name
        words = command(part, str(run), gpu=self._gpu, resume=(run / "manifest.json").is_file())
        self.say(f"{name}: {' '.join(words[1:])}")
        before = self._used()
        began_ns = now_ns()
        why = _ran(words, self._work / f"{name}.log", limit_s)
        seconds = (now_ns() - began_ns) / NS_PER_S
        after = self._settled(before)
        records = _records(run) if part.experiment else []
        found = {
            "about": self._about,
            "command": " ".join(["slosched" if part.experiment else "pytest", *words[3:]]).replace(
                str(self._work), "WORK"
            ),
            "experiment": part.experiment,
            "complete": not why,
            "why": why.replace(str(self._work), "WORK"),
            "seconds": seconds,
            "gpu_before_bytes": before,
            "gpu_after_bytes": after,
            "gpu_equal": None if before is None or after is None else _equal(before, after),
            "records": records,
        }
        self.say(f"{name}: {why or 'done'}, {seconds:.0f} s, {len(records)} records")
        if found["gpu_equal"] is False:
            self.say(f"{name}: the GPU had {before:,} bytes in use before and {after:,} after")
        return found

    def _used(self) -> int | None:
        """Bytes of GPU memory in use; None without a GPU that says."""
        if not self._uuids:
            return None
        with suppress(InvalidConfig), closing(GpuMemory(self._uuids)) as cards:
            return cards.used(()).by_card
        return None

    def _settled(self, before: int | None) -> int | None:
        """The same, once what ended has given its memory back, or after some seconds."""
        until_ns = now_ns() + _SETTLE_NS
        while True:
            after = self._used()
            if before is None or after is None or _equal(before, after) or now_ns() > until_ns:
                return after
            sleep_ns(NS_PER_S // 4)

    def write(self) -> None:
        """Bring faasm.json and faasm.md up to date."""
        text = json.dumps(self.document, indent=1, sort_keys=True) + "\n"
        write_file(self._out / NAME, text.encode())
        write_file(self._out / "faasm.md", page(self.document).encode())


def _equal(before: int, after: int) -> bool:
    return after - before <= _EQUAL_BYTES


def _records(run: Path) -> list[dict[str, Any]]:
    """The records of the complete cells, without what the page does not need."""
    return [
        {key: value for key, value in record.items() if key not in _LEFT_OUT}
        for cell in read_results(run / RECORDS).values()
        for record in cell
    ]


def _ran(words: Sequence[str], log: Path, limit_s: float) -> str:
    """Run a command in a process group of its own. Returns why it did not complete, "" if it did."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            words, cwd=_CHECKOUT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    tail = log.read_text(errors="replace").strip().splitlines()[-_LINES:]
    print("\n".join(f"    {line[:200]}" for line in tail), flush=True)
    if code is None:
        return f"it was ended after its {limit_s:.0f} s"
    last = next((line.strip() for line in reversed(tail) if line.strip()), "")
    return f"it ended with {code}: {last[:300]}" if code else ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the command, which then clears up; kill its group if it does not."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _merged(files: Sequence[Path]) -> dict[str, Any]:
    """Several results as one: a part counts as it was measured last, a complete one before any other."""
    parts: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for path in files:
        document = json.loads(path.read_text(encoding="utf-8"))
        for name, part in document["parts"].items():
            if part["complete"] or not parts.get(name, {}).get("complete"):
                parts[name] = part
        left_out |= document["left_out"]
    kept = {name: why for name, why in left_out.items() if name not in parts}
    return {"parts": parts, "left_out": kept}


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--work", type=Path, help="folder of the run directories (default OUT)")
    parser.add_argument("--device", default="cuda:0", help="cuda:0, or cpu for a trial")
    parser.add_argument("--parts", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--resume", type=Path, help="results whose complete parts are kept")
    parser.add_argument("--seconds", type=float, default=530.0, help="the time for all of it")
    parser.add_argument("--commit", default="", help="what runs, if this is not a checkout")
    parser.add_argument("--merge", type=Path, nargs="+", help="results to write as one")
    parser.add_argument("--table", action="store_true", help="write the page and end")
    options = parser.parse_args(arguments)
    unknown = set(options.parts.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    if options.out is None and not options.table:
        parser.error("--out is missing")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.table:
        document = json.loads(RESULTS.read_text(encoding="utf-8"))
        write_file(PAGE, page(document).encode())
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    if options.merge:
        text = json.dumps(_merged(options.merge), indent=1, sort_keys=True) + "\n"
        write_file(options.out / NAME, text.encode())
        return 0
    work = options.work or options.out
    work.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, _stop)
    bench = Bench(options.out, work, options.device, options.seconds, options.commit)
    bench.take_up([path for path in (options.resume, options.out / NAME) if path is not None])
    try:
        bench.run(options.parts.split(","))
    except KeyboardInterrupt:
        bench.say("interrupted")
        return 130
    finally:
        bench.write()
    wanted = options.parts.split(",")
    return 0 if all(bench.document["parts"].get(x, {}).get("complete") for x in wanted) else 1


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
