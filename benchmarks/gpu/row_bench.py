"""One run of a benchmark made of rows: what is there already, what still fits the time, and what came out.

Each row is written to the work folder as soon as it is measured, and to the results; a row that is there
already is not measured again. One that fails says why, and the others go on; one that no longer fits the
budget is skipped and said.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import traceback
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import exact_table
from exact_rig import MODEL, WORKER_OPTIONS, NotHere, Rig, Row, Settings
from measured_on import gpu_facts, version_of
from serving_core import commit, machine_line
from stall_meter import BOUNDS, StallMeter

from slosched.clock import now_ns
from slosched.experiment.children import ended_by_signals
from slosched.output_files import write_file
from slosched.telemetry.manifest import describe_host
from slosched.units import NS_PER_S
from slosched.version import __version__

_LIBRARIES = ("torch", "transformers", "pyzmq", "msgspec", "uvloop", "numpy", "mosec")
#: Ending the workers and writing the results takes this long at most.
_RESERVE_S = 12.0


@dataclass(frozen=True)
class Plan:
    """A row: what measures it, how long that takes on a GPU, and how long it may take at most (s).

    The rows before it leave it `kept_s` of the budget, whatever becomes of them.
    """

    run: Row
    needs_s: float
    limit_s: float
    kept_s: float = 0.0


class OutOfTime(Exception):
    """The row's time limit has passed."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block after `seconds`; every wait in it is interrupted."""

    def handler(number: int, frame: FrameType | None) -> None:
        raise OutOfTime(f"it took longer than its {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


class Bench(ABC):
    """One run of the command: the rows that are there, those that are to come, and the clock."""

    #: What the files of results are called: NAME.json and NAME.md.
    NAME: ClassVar[str]

    def __init__(self, options: argparse.Namespace, settings: Settings) -> None:
        self.options, self.settings = options, settings
        self.work: Path = options.work or options.out
        self.begin_ns = now_ns()
        self.rows: dict[str, dict[str, Any]] = {}
        self.failed: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        self.gpu = {} if settings.emulated else gpu_facts(settings.device)
        self.host = {k: v for k, v in describe_host().items() if k != "hostname"}
        self.commit: str = options.commit or commit() or "no checkout"
        self.meter: dict[str, Any] = {}
        self.awake_cpus: list[int] = []
        self.options_not_offered: list[str] = []
        self.ran_at = datetime.now(UTC).isoformat(timespec="seconds")

    @property
    @abstractmethod
    def plans(self) -> Mapping[str, Plan]:
        """Every row by name, in the order in which they are measured."""

    @abstractmethod
    def page(self, document: Mapping[str, Any]) -> str:
        """The results as Markdown."""

    def open_rig(self) -> Rig:
        """What the rows run on. It is entered and left as a context."""
        return Rig(self.settings, self.work / "logs", self.rows)

    @property
    def spent_s(self) -> float:
        return (now_ns() - self.begin_ns) / NS_PER_S

    def take_up(self) -> None:
        """Read the rows that were measured before."""
        for path in (self.options.resume, self.options.out / f"{self.NAME}.json"):
            if path is not None and path.exists():
                self.rows |= exact_table.read_results(path)["rows"]
        for name in self.plans:
            file = self.work / "rows" / f"{name}.json"
            if file.exists():
                self.rows[name] = json.loads(file.read_text(encoding="utf-8"))

    def run(self) -> None:
        """Measure what is missing."""
        wanted = self.options.rows.split(",") if self.options.rows else list(self.plans)
        self.take_up()
        with self.open_rig() as rig, self._metered() as meter:
            awake = self.options.awake
            if awake or (awake is None and not self.settings.emulated):
                self.awake_cpus = rig.keep_awake()
            rig.divide_cpus()
            for name, plan in self.plans.items():
                if name not in wanted:
                    continue
                if name in self.rows:
                    print(f"{name}: there already", flush=True)
                    continue
                left_s = self._left_s(name, wanted)
                if left_s < plan.needs_s * min(1.0, self.settings.scale):
                    left = f"{max(0.0, left_s):.0f} s of the budget were left"
                    self.skipped[name] = f"{left}, and it takes about {plan.needs_s:g} s"
                    print(f"{name}: skipped, {self.skipped[name]}", flush=True)
                    continue
                self._measure(rig, meter, name, plan, left_s)
                self.options_not_offered = rig.options_not_offered
                self.write()

    def _left_s(self, name: str, wanted: Collection[str]) -> float:
        """What the row `name` may take of the budget."""
        names = list(self.plans)
        later = [other for other in names[names.index(name) + 1 :] if other in wanted]
        kept_s = sum(self.plans[other].kept_s for other in later if other not in self.rows)
        return float(self.options.budget_s - _RESERVE_S - self.spent_s - kept_s)

    def _measure(
        self, rig: Rig, meter: StallMeter | None, name: str, plan: Plan, left_s: float
    ) -> None:
        print(f"\n{name} (at {self.spent_s:.0f} s)", flush=True)
        begin_ns = now_ns()
        try:
            limit_s = min(plan.limit_s, left_s)
            rig.until_ns = begin_ns + round(limit_s * NS_PER_S)
            with limited(limit_s):
                found = plan.run(rig)
        except (KeyboardInterrupt, SystemExit):
            raise
        except NotHere as error:
            self.skipped[name] = str(error)
            return
        except Exception as error:
            # Whatever is wrong with a row, the others are worth the machine's time.
            traceback.print_exc(file=sys.stdout)
            reason = str(error).replace(str(self.work), "WORK")
            self.failed[name] = f"{type(error).__name__}: {reason}"
            print(rig.tails(), flush=True)
            rig.stop_workers()  # one may be what failed, or be full of what nothing waits for
            return
        end_ns = now_ns()
        row = {
            "row": name,
            "ran_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": (end_ns - begin_ns) / NS_PER_S,
            "gpu": self.gpu,
            "commit": self.commit,
            **found,
            **_disturbance(meter, begin_ns, end_ns),
        }
        self.rows[name] = row
        _write_json(self.work / "rows" / f"{name}.json", row)
        for check in row["checks"]:
            bound = f" (target {check['bound']} {check['unit']})" if check["bound"] else ""
            value = f"{exact_table.number(check['value'])} {check['unit']}"
            print(f"  {check['what']}: {value}{bound} {exact_table.verdict(check)}", flush=True)

    @contextlib.contextmanager
    def _metered(self) -> Iterator[StallMeter | None]:
        """The stall meter on two CPUs of its own, where there are enough; None if it cannot run."""
        cpus = sorted(os.sched_getaffinity(0))
        watched = cpus[-2:] if len(cpus) >= 8 else cpus
        rest = cpus[:-2] if len(cpus) >= 8 else cpus
        with contextlib.ExitStack() as stack:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="slosched-meter-"))
            meter: StallMeter | None
            try:
                meter = stack.enter_context(StallMeter(Path(directory), cpus=watched))
                self.meter = {"priority": meter.readings().priority, "cpus": watched}
            except Exception:
                traceback.print_exc(file=sys.stdout)
                meter = None
            # A ticker in the real-time class would stand in the way of the loop that is measured.
            os.sched_setaffinity(0, rest)
            stack.callback(os.sched_setaffinity, 0, cpus)
            yield meter

    def document(self) -> dict[str, Any]:
        """All that is known so far."""
        return {
            "format": exact_table.FORMAT,
            "ran_at": self.ran_at,
            "seconds": self.spent_s,
            "gpu": self.gpu,
            "machine": self.host,
            "versions": {
                "slosched": f"{__version__} ({self.commit})",
                **{name: version_of(name) for name in _LIBRARIES},
            },
            "settings": {
                "device": self.settings.device,
                "profile": self.settings.profile if self.settings.emulated else "",
                "scale": self.settings.scale,
                "model": self.settings.model,
                "gpus": self.settings.gpus,
                "worker_options": list(self.settings.worker_options),
                "budget_s": self.options.budget_s,
            },
            "options_not_offered": self.options_not_offered,
            "meter": self.meter,
            "awake_cpus": self.awake_cpus,
            "rows": {name: self.rows[name] for name in self.plans if name in self.rows},
            "failed": self.failed,
            "skipped": self.skipped,
        }

    def write(self) -> None:
        """Bring DIR/NAME.json and .md up to date."""
        document = self.document()
        _write_json(self.options.out / f"{self.NAME}.json", document)
        # Keys as a reader of the file will find them: text.
        text = self.page(json.loads(json.dumps(document)))
        write_file(self.options.out / f"{self.NAME}.md", text.encode())


def _disturbance(meter: StallMeter | None, begin_ns: int, end_ns: int) -> dict[str, Any]:
    if meter is None:
        return {"void": ["the stall meter did not run"]}
    try:
        found = meter.readings(past_ns=end_ns).disturbance(begin_ns, end_ns)
    except Exception as error:  # a meter that died costs its words, not the row
        return {"void": [f"the stall meter: {error}"]}
    return {"disturbance": vars(found), "void": list(found.reasons(BOUNDS))}


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    write_file(path, (json.dumps(document, indent=1) + "\n").encode())


# ------------------------------------------------------------------------------- the command


def add_options(parser: argparse.ArgumentParser, name: str, rows: Mapping[str, Plan]) -> None:
    """The options of every benchmark of rows; `name` is that of its files."""
    parser.add_argument("--profile", default="v100", help="what is emulated (default v100)")
    parser.add_argument("--out", type=Path, help=f"the folder for {name}.json and .md")
    parser.add_argument("--work", type=Path, help="the folder for rows and logs (default: --out)")
    parser.add_argument("--resume", type=Path, help=f"a {name}.json whose rows are kept")
    parser.add_argument("--rows", default="", help=f"with commas, of: {', '.join(rows)}")
    parser.add_argument("--budget-s", type=float, default=530.0, help="in all (default 530)")
    parser.add_argument("--scale", type=float, default=1.0, help="shorter runs, for a dry run")
    parser.add_argument(
        "--worker-options", default=WORKER_OPTIONS, help=f"(default {WORKER_OPTIONS})"
    )
    parser.add_argument("--model", default=MODEL, help=f"(default {MODEL})")
    parser.add_argument(
        "--awake",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="`slosched awake` on one CPU of each core, where everything runs (default: on a real GPU)",
    )
    parser.add_argument("--config", type=Path, help="a worker.toml for the worker")
    parser.add_argument("--commit", default="", help="what was measured, outside a checkout")
    parser.add_argument("--table", action="store_true", help=f"only write {name}.md")


def check_options(
    parser: argparse.ArgumentParser, options: argparse.Namespace, rows: Mapping[str, Plan]
) -> None:
    """Ends the program for values that cannot be."""
    unknown = [name for name in options.rows.split(",") if name and name not in rows]
    if unknown:
        parser.error(f"no such row: {', '.join(unknown)}; there are {', '.join(rows)}")
    if not options.table and options.out is None:
        parser.error("--out is missing")
    if not 0 < options.scale <= 1 or options.budget_s <= 0:
        parser.error("--scale must be above 0 and at most 1, --budget-s above 0")


def place_files(options: argparse.Namespace) -> None:
    """Make `options.out`, and both folders absolute."""
    options.out = options.out.resolve()
    options.work = (options.work or options.out).resolve()
    options.out.mkdir(parents=True, exist_ok=True)


def run_and_print(bench: Bench) -> int:
    """Run the rows, write what there is whatever happens, and print the page. Returns the exit code."""
    print(machine_line(bench.host), bench.gpu or "", flush=True)
    try:
        with ended_by_signals():
            bench.run()
    finally:
        bench.write()
        page = bench.options.out / f"{bench.NAME}.md"
        print(f"\n{page.read_text(encoding='utf-8')}", flush=True)
    return 1 if bench.failed else 0
