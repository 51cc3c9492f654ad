"""Exact time on a GPU: what issue 5 promises, measured in one command, in less than nine minutes.

    python3 benchmarks/gpu/exact_time.py --device cuda:0 --out DIR        # everything
    python3 benchmarks/gpu/exact_time.py --device cuda:0 --out DIR --rows profile,lateness
    python3 benchmarks/gpu/exact_time.py --device emulated --scale 0.1 --out DIR     # a dry run, without a GPU
    python3 benchmarks/gpu/exact_time.py --table                          # exact_time.md from the results

Each row is written to the work folder as soon as it is measured, and to DIR/exact_time.json; a row that is
there already (or in --resume FILE) is not measured again. One that fails says why, and the others go on; one
that no longer fits the budget is skipped and said. All processes are ended.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

HERE = Path(__file__).resolve().parent
_SRC = HERE.parent.parent / "src"
for _place in (HERE.parent, HERE, _SRC):
    if str(_place) not in sys.path:
        sys.path.insert(0, str(_place))
os.environ["PYTHONPATH"] = os.pathsep.join(
    dict.fromkeys(
        [str(_SRC), str(HERE.parent), str(HERE), *filter(None, [os.getenv("PYTHONPATH")])]
    )
)

import exact_answers  # noqa: E402
import exact_bare  # noqa: E402
import exact_cold  # noqa: E402
import exact_live  # noqa: E402
import exact_peers  # noqa: E402
import exact_sweep  # noqa: E402
import exact_table  # noqa: E402
from exact_rig import MODEL, WORKER_OPTIONS, NotHere, Rig, Row, Settings  # noqa: E402
from serving_core import commit, machine_line  # noqa: E402
from stall_meter import BOUNDS, StallMeter  # noqa: E402

from slosched.cli.children import ended_by_signals  # noqa: E402
from slosched.clock import now_ns  # noqa: E402
from slosched.telemetry.manifest import describe_host  # noqa: E402
from slosched.units import NS_PER_S  # noqa: E402
from slosched.version import __version__  # noqa: E402

_LIBRARIES = ("torch", "transformers", "pyzmq", "msgspec", "uvloop", "numpy", "mosec")
#: Ending the worker and writing the results takes this long at most.
_RESERVE_S = 12.0
_SMI_S = 15.0


@dataclass(frozen=True)
class Plan:
    """A row: what measures it, how long that takes on a GPU, and how long it may take at most (s)."""

    run: Row
    needs_s: float
    limit_s: float


def _sweep_at(rate: int) -> Row:
    return lambda rig: exact_sweep.live(rig, rate)


#: In the order of importance, which is also the one that starts the fewest workers.
ROWS: dict[str, Plan] = {
    "graphs": Plan(exact_peers.graphs, 20, 100),
    "profile": Plan(exact_bare.profile, 25, 150),
    "lateness": Plan(exact_bare.lateness, 15, 60),
    "prediction": Plan(exact_live.prediction, 18, 60),
    "client_overhead": Plan(exact_live.client_overhead, 17, 60),
    "goodput": Plan(exact_live.goodput, 24, 75),
    "answers": Plan(exact_answers.answers, 60, 140),
    "slo_exp_600": Plan(_sweep_at(600), 57, 90),
    "slo_exp_1200": Plan(_sweep_at(1200), 57, 90),
    "slo_exp_2400": Plan(_sweep_at(2400), 57, 90),
    "cold": Plan(exact_cold.cold, 48, 140),
    "slo_exp_1": Plan(exact_sweep.judge, 5, 90),
    "peer_slosched": Plan(exact_peers.of_slosched, 62, 110),
    "peer_asyncio": Plan(exact_peers.of_asyncio, 32, 90),
    "peer_mosec": Plan(exact_peers.of_mosec, 36, 100),
}


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


class Bench:
    """One run of the command: the rows that are there, those that are to come, and the clock."""

    def __init__(self, options: argparse.Namespace, settings: Settings) -> None:
        self.options, self.settings = options, settings
        self.work: Path = options.work or options.out
        self.begin_ns = now_ns()
        self.rows: dict[str, dict[str, Any]] = {}
        self.failed: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        self.gpu = gpu_facts(settings)
        self.host = {k: v for k, v in describe_host().items() if k != "hostname"}
        self.commit: str = options.commit or commit() or "no checkout"
        self.meter: dict[str, Any] = {}
        self.awake_cpus: list[int] = []
        self.options_not_offered: list[str] = []
        self.ran_at = datetime.now(UTC).isoformat(timespec="seconds")

    @property
    def spent_s(self) -> float:
        return (now_ns() - self.begin_ns) / NS_PER_S

    def take_up(self) -> None:
        """Read the rows that were measured before."""
        for path in (self.options.resume, self.options.out / "exact_time.json"):
            if path is not None and path.exists():
                self.rows |= exact_table.read_results(path)["rows"]
        for name in ROWS:
            file = self.work / "rows" / f"{name}.json"
            if file.exists():
                self.rows[name] = json.loads(file.read_text(encoding="utf-8"))

    def run(self) -> None:
        """Measure what is missing."""
        wanted = self.options.rows.split(",") if self.options.rows else list(ROWS)
        self.take_up()
        with Rig(self.settings, self.work / "logs", self.rows) as rig, self._metered() as meter:
            awake = self.options.awake
            if awake or (awake is None and not self.settings.emulated):
                self.awake_cpus = rig.keep_awake()
            for name, plan in ROWS.items():
                if name not in wanted:
                    continue
                if name in self.rows:
                    print(f"{name}: there already", flush=True)
                    continue
                left_s = self.options.budget_s - _RESERVE_S - self.spent_s
                if left_s < plan.needs_s * min(1.0, self.settings.scale):
                    self.skipped[name] = (
                        f"{left_s:.0f} s of the budget were left, and it takes about {plan.needs_s:g} s"
                    )
                    print(f"{name}: skipped, {self.skipped[name]}", flush=True)
                    continue
                self._measure(rig, meter, name, plan, left_s)
                self.options_not_offered = rig.options_not_offered
                self.write()

    def _measure(
        self, rig: Rig, meter: StallMeter | None, name: str, plan: Plan, left_s: float
    ) -> None:
        print(f"\n{name} (at {self.spent_s:.0f} s)", flush=True)
        begin_ns = now_ns()
        try:
            with limited(min(plan.limit_s, left_s)):
                found = plan.run(rig)
        except (KeyboardInterrupt, SystemExit):
            raise
        except NotHere as error:
            self.skipped[name] = str(error)
            return
        except Exception as error:
            # Whatever is wrong with a row, the others are worth the machine's time.
            traceback.print_exc(file=sys.stdout)
            said = str(error).replace(str(self.work), "WORK")
            self.failed[name] = f"{type(error).__name__}: {said}"
            print(rig.tails(), flush=True)
            rig.stop_worker()  # it may be what failed, or be full of what nobody waits for
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
            said = f"{exact_table.number(check['value'])} {check['unit']}"
            print(f"  {check['what']}: {said}{bound} {exact_table.verdict(check)}", flush=True)

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
                **{name: _version(name) for name in _LIBRARIES},
            },
            "settings": {
                "device": self.settings.device,
                "profile": self.settings.profile if self.settings.emulated else "",
                "scale": self.settings.scale,
                "model": self.settings.model,
                "worker_options": list(self.settings.worker_options),
                "budget_s": self.options.budget_s,
            },
            "options_not_offered": self.options_not_offered,
            "meter": self.meter,
            "awake_cpus": self.awake_cpus,
            "rows": {name: self.rows[name] for name in ROWS if name in self.rows},
            "failed": self.failed,
            "skipped": self.skipped,
        }

    def write(self) -> None:
        """Bring DIR/exact_time.json and .md up to date."""
        document = self.document()
        _write_json(self.options.out / "exact_time.json", document)
        # Keys as a reader of the file will find them: text.
        text = exact_table.page(json.loads(json.dumps(document)))
        (self.options.out / "exact_time.md").write_text(text, encoding="utf-8")


def _disturbance(meter: StallMeter | None, begin_ns: int, end_ns: int) -> dict[str, Any]:
    if meter is None:
        return {"void": ["the stall meter did not run"]}
    try:
        found = meter.readings(past_ns=end_ns).disturbance(begin_ns, end_ns)
    except Exception as error:  # a meter that died costs its words, not the row
        return {"void": [f"the stall meter: {error}"]}
    return {"disturbance": vars(found), "void": list(found.reasons(BOUNDS))}


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".new")
    draft.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def gpu_facts(settings: Settings) -> dict[str, str]:
    """Name, driver, clocks and limits as nvidia-smi tells them; {} without one."""
    if settings.emulated:
        return {}
    fields = "name driver_version memory.total clocks.sm clocks.max.sm clocks.mem power.limit temperature.gpu"
    names = fields.split()
    index = settings.device.partition(":")[2] or "0"
    try:
        done = subprocess.run(
            ["nvidia-smi", "-i", index, f"--query-gpu={','.join(names)}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=_SMI_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(names, values, strict=False))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cuda:0", help="cuda:N, or emulated (default cuda:0)")
    parser.add_argument("--profile", default="v100", help="what is emulated (default v100)")
    parser.add_argument("--out", type=Path, help="the folder for exact_time.json and .md")
    parser.add_argument("--work", type=Path, help="the folder for rows and logs (default: --out)")
    parser.add_argument("--resume", type=Path, help="an exact_time.json whose rows are kept")
    parser.add_argument("--rows", default="", help=f"with commas, of: {', '.join(ROWS)}")
    parser.add_argument("--budget-s", type=float, default=530.0, help="in all (default 530)")
    parser.add_argument("--scale", type=float, default=1.0, help="shorter runs, for a dry run")
    parser.add_argument(
        "--worker-options", default=WORKER_OPTIONS, help=f"(default {WORKER_OPTIONS})"
    )
    parser.add_argument(
        "--model", default=MODEL, help=f"(default {MODEL}; the goodput row's is always that)"
    )
    parser.add_argument(
        "--awake",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="`slosched awake` on one CPU of each core, where everything runs (default: on a real GPU)",
    )
    parser.add_argument("--config", type=Path, help="a worker.toml for the worker")
    parser.add_argument("--commit", default="", help="what was measured, where it is no checkout")
    parser.add_argument("--table", action="store_true", help="only write exact_time.md")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.rows.split(",") if name and name not in ROWS]
    if unknown:
        parser.error(f"no such row: {', '.join(unknown)}; there are {', '.join(ROWS)}")
    if not options.table and options.out is None:
        parser.error("--out is missing")
    if not 0 < options.scale <= 1 or options.budget_s <= 0:
        parser.error("--scale must be above 0 and at most 1, --budget-s above 0")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.table:
        document = exact_table.read_results(exact_table.RESULTS)
        exact_table.PAGE.write_text(exact_table.page(document), encoding="utf-8")
        return 0
    settings = Settings(
        device=options.device,
        profile=options.profile,
        scale=options.scale,
        worker_options=tuple(options.worker_options.split()),
        config=options.config,
        model=options.model,
    )
    options.out = options.out.resolve()
    options.work = (options.work or options.out).resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(options, settings)
    print(machine_line(bench.host), bench.gpu or "", flush=True)
    try:
        with ended_by_signals():
            bench.run()
    finally:
        bench.write()
        print(f"\n{(options.out / 'exact_time.md').read_text(encoding='utf-8')}", flush=True)
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
