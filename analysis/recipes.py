"""What the recipes of figures share: a list of runs, simulated or live, and the files they leave.

A recipe (figure5.py to figure11.py) says which runs a figure needs at which scale and how it is drawn
from their directories. `main` makes them and draws; with --tables the figure and its numbers are kept
beside the recipe, in analysis/figureN/ (live: analysis/figureN/live/).

Simulated runs that are there already, complete and of the same spec and version, are not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from slosched.analysis.drawn import Drawn, plain
from slosched.cli.local_run import Cluster, run_locally
from slosched.clock import now_ns
from slosched.config import EmulationNoise, SchedulerConfig
from slosched.config_file import load_profile
from slosched.errors import SloschedError
from slosched.loadgen.results import RunResult
from slosched.sim.jobs import Job, JobsProgress, finished_run, run_many
from slosched.sim.network import Network
from slosched.sim.spec import SimSpec
from slosched.telemetry.manifest import describe_host, finish_manifest, write_manifest
from slosched.telemetry.run_dir import claim_run_dir
from slosched.units import NS_PER_MS, NS_PER_S, NS_PER_US
from slosched.version import __version__
from slosched.workloads import parse_workload

HERE = Path(__file__).resolve().parent
SCALES = ("quick", "published")

#: What every simulated run has: cards of 10 Gbit/s as on the published testbed, 0.2 ms and a little
#: each way, and execs that vary by about 0.3 %. The last two are assumptions.
NETWORK = Network(jitter_ns=20 * NS_PER_US, bandwidth_bits_per_s=10**10)
NOISE = EmulationNoise(exec_sigma=0.003)


@dataclass(frozen=True)
class Part:
    """One run of a figure: its directory's name, the workload's command, and what serves it.

    `duration_ns` ends a workload that would go on; a live run needs it always.
    """

    name: str
    workload: str
    scheduler: SchedulerConfig
    duration_ns: int
    gpus: int = 6
    profile: str = "v100"
    inputs: bool = False
    seed: int = 1


@dataclass(frozen=True)
class Recipe:
    """A figure: `parts` of a scale, and `draw` (run directories, scale, where to) -> what was drawn.

    `live_only` says that a simulation could not tell what the figure asks.
    """

    figure: int
    text: str
    parts: Callable[[str], Sequence[Part]]
    draw: Callable[[Sequence[Path], str, Path], Drawn]
    live_only: bool = False
    #: The figure whose runs these are, where it is another one.
    runs_of: int = 0
    #: Keys of the numbers that fill too much room in a committed table.
    left_out: tuple[str, ...] = field(default=())


def infer5(
    *,
    max_exec_ns: int = 250 * NS_PER_MS,
    slo_ns: int = 100 * NS_PER_MS,
    policy: str = "INFER5",
    fidelity: str = "best",
) -> SchedulerConfig:
    """The options of the published experiments: schedule_ahead 5 ms, max_exec 250 ms, max_batch 8.

    The last two are the published code's defaults; ours would batch 16, which serves more and lets
    nothing urgent pass for longer.
    """
    return SchedulerConfig(
        policy=policy,
        fidelity=fidelity,
        schedule_ahead_ns=5 * NS_PER_MS,
        default_slo_ns=slo_ns,
        max_exec_ns=max_exec_ns,
        max_batch=8,
        max_gpus=10_000,
    )


def main(recipe: Recipe) -> None:
    """Run a recipe as its command line says; the program ends with 1 if a run fails."""
    options = _options(recipe)
    live = recipe.live_only or options.live
    parts = recipe.parts(options.scale)
    out: Path = options.out or _default_out(recipe, options.scale, live)
    began_ns, load_before = now_ns(), os.getloadavg()[0]
    jobs = [] if live else [Job(_spec(part), out / part.name) for part in parts]
    reused = sum(finished_run(job) is not None for job in jobs)
    try:
        runs = _live(parts, out) if live else _simulated(parts, jobs, options.jobs)
        drawn = recipe.draw(runs, options.scale, out)
    except (SloschedError, KeyboardInterrupt) as error:
        sys.exit(f"figure {recipe.figure}: {str(error) or 'stopped'}")
    took = {
        "runs_reused": reused,
        "wall_s": round((now_ns() - began_ns) / NS_PER_S, 1),
        "cpu_s": round(sum(os.times()[:4]), 1),  # with what ended children used
    }
    if live:  # what else this machine did when the runs began
        took["load_average_before"] = round(load_before, 1)
    document = _document(recipe, options.scale, live, drawn) | took
    _write(recipe, document, drawn, out)
    if options.tables:
        place = HERE / f"figure{recipe.figure}"
        _write(recipe, document, drawn, place / "live" if live and not recipe.live_only else place)
    print(drawn.text)


def _options(recipe: Recipe) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=recipe.text)
    parser.add_argument("--scale", choices=SCALES, default="quick", help="default: quick")
    if not recipe.live_only:
        parser.add_argument(
            "--jobs", type=int, default=1, help="processes that simulate; default 1"
        )
        parser.add_argument(
            "--live", action="store_true", help="emulated workers on this machine, not simulated"
        )
    where = _default_out(recipe, "SCALE", recipe.live_only)
    parser.add_argument("--out", type=Path, help=f"directory of the runs; default {where}")
    parser.add_argument(
        "--tables", action="store_true", help=f"keep the figure in analysis/figure{recipe.figure}/"
    )
    return parser.parse_args()


def _default_out(recipe: Recipe, scale: str, live: bool) -> Path:
    name = f"figure{recipe.runs_of or recipe.figure}-{scale}"
    return Path("slosched-runs") / (f"{name}-live" if live else name)


def _simulated(parts: Sequence[Part], jobs: Sequence[Job], processes: int) -> list[Path]:
    shown: set[int] = set()

    def show(progress: JobsProgress) -> None:
        for place, run in progress.running.items():
            if place not in shown:
                shown.add(place)
                print(f"{parts[place].name}: {run.total_s:.0f} s to simulate", flush=True)

    results = run_many(jobs, processes=processes, progress=show)
    return [_directory(part, result) for part, result in zip(parts, results, strict=True)]


def _spec(part: Part) -> SimSpec:
    name, *values = part.workload.split()
    return SimSpec(
        workload=parse_workload(name, values),
        scheduler=part.scheduler,
        profiles=(load_profile(part.profile),),
        gpus=part.gpus,
        network=NETWORK,
        noise=NOISE,
        seed=part.seed,
        duration_ns=part.duration_ns,
        inputs=part.inputs,
    )


def _live(parts: Sequence[Part], out: Path) -> list[Path]:
    """One run after the other; only one at a time has the machine for itself."""
    out = claim_run_dir(out)
    write_manifest(out, "recipe", {"runs": [_described(part) for part in parts]})
    runs = []
    for part in parts:
        result = run_locally(
            out / part.name,
            Cluster(part.scheduler, part.gpus, part.profile),
            part.workload.split(),
            seed=part.seed,
            duration_ns=part.duration_ns,
            inputs=part.inputs,
        )
        runs.append(_directory(part, result))
        print(f"{part.name}: {result.sent} requests; {result.verdict}", flush=True)
    finish_manifest(out, {"runs": len(runs)})
    return runs


def _directory(part: Part, result: RunResult) -> Path:
    """Where the run is. Raises SloschedError if it did not go on to its end."""
    if not result.complete or result.run_dir is None:
        raise SloschedError(f"the run {part.name} is not complete: {result.problem}")
    return Path(result.run_dir)


# --------------------------------------------------------------------------------- what is left


def _described(part: Part) -> dict[str, Any]:
    scheduler = part.scheduler
    return {
        "name": part.name,
        "workload": part.workload,
        "scheduler": f"{scheduler.policy}:{scheduler.fidelity}",
        "max_batch": scheduler.max_batch,
        "gpus": part.gpus,
        "profile": part.profile,
        "seed": part.seed,
    }


def _document(recipe: Recipe, scale: str, live: bool, drawn: Drawn) -> dict[str, Any]:
    numbers = _without(plain(drawn.numbers), (*recipe.left_out, "run"))
    return {
        "figure": recipe.figure,
        "kind": "live" if live else "simulated",
        "scale": scale,
        "version": __version__,
        "host": {k: v for k, v in describe_host().items() if k != "hostname"},
        "runs": [_described(part) for part in recipe.parts(scale)],
        "numbers": numbers,
    }


def _without(value: Any, left_out: Sequence[str]) -> Any:
    """`value` less the keys `left_out`; numbers in six digits."""
    if isinstance(value, dict):
        return {k: _without(v, left_out) for k, v in value.items() if k not in left_out}
    if isinstance(value, list):
        return [_without(item, left_out) for item in value]
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.6g}")
    return value


def _write(recipe: Recipe, document: dict[str, Any], drawn: Drawn, place: Path) -> None:
    """The numbers as JSON, the table as text, and the figure where it is not yet."""
    place.mkdir(parents=True, exist_ok=True)
    stem = f"figure{recipe.figure}"
    host = document["host"]
    took = f"it took {document['wall_s']:.0f} s and {document['cpu_s']:.0f} s of CPU"
    if "load_average_before" in document:
        took += f", with a load average of {document['load_average_before']} before it"
    if document["runs_reused"]:
        took = f"{document['runs_reused']} runs were there already"
    heading = (
        f"# Figure {recipe.figure}, {document['kind']}, scale {document['scale']}\n\n"
        f"{recipe.text}\n\n```\n{drawn.text}\n```\n\n"
        f"slosched {__version__}, {host['cpu_model']}, {host['cpu_usable']} CPUs, Python "
        f"{host['python']}; {took}. Made by "
        f"`analysis/{stem}.py --scale {document['scale']}"
        f"{' --live' if document['kind'] == 'live' and not recipe.live_only else ''} --tables`.\n"
    )
    _text(place / f"{stem}.md", heading)
    _text(place / f"{stem}.json", _compact(document))
    for file in drawn.files:
        if file.suffix == ".png" and file.parent.resolve() != place.resolve():
            # A figure has few colours: with a palette it takes a third of the room.
            Image.open(file).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(
                place / file.name, optimize=True
            )
    print(f"wrote {place / f'{stem}.json'}, .md and the figure")


def _compact(document: dict[str, Any]) -> str:
    """JSON with one line for each list of numbers, so that a table of windows can be read."""
    text = json.dumps(document, indent=1)
    flat = re.sub(r"\[\s+([^][{}]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    return flat + "\n"


def _text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
