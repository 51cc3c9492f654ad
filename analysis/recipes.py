"""What the recipes of figures share: a list of runs, simulated or live, and the files they leave.

A recipe (figure5.py to figure11.py) says which runs a figure needs at which scale and how it is drawn
from their directories. `main` runs them one after another and draws; with --tables the figure and its
numbers are kept beside the recipe, in analysis/figureN/.
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

from slosched.analysis.drawn import Drawn, plain
from slosched.cli.local_run import Cluster, run_locally
from slosched.clock import now_ns
from slosched.config import EmulationNoise, SchedulerConfig
from slosched.config_file import load_profile
from slosched.errors import SloschedError
from slosched.loadgen.results import RunResult
from slosched.sim.network import Network
from slosched.sim.run import simulate
from slosched.sim.spec import SimSpec
from slosched.telemetry.manifest import describe_host, finish_manifest, write_manifest
from slosched.telemetry.run_dir import claim_run_dir
from slosched.units import NS_PER_MS, NS_PER_S, NS_PER_US, format_duration
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
    #: Keys of the numbers that fill too much room in a committed table.
    left_out: tuple[str, ...] = field(default=())


def infer5(
    *,
    ahead_ns: int = 5 * NS_PER_MS,
    slo_ns: int = 100 * NS_PER_MS,
    policy: str = "INFER5",
    fidelity: str = "best",
) -> SchedulerConfig:
    """The scheduler's options of the published experiments: schedule_ahead 5 ms."""
    return SchedulerConfig(
        policy=policy,
        fidelity=fidelity,
        schedule_ahead_ns=ahead_ns,
        default_slo_ns=slo_ns,
        max_gpus=10_000,
    )


def main(recipe: Recipe) -> None:
    """Run a recipe as its command line says; the program ends with 1 if a run fails."""
    options = _options(recipe)
    live = recipe.live_only or options.live
    kind = "live" if live else "simulated"
    parts = recipe.parts(options.scale)
    try:
        out = claim_run_dir(options.out or Path("slosched-runs") / f"figure{recipe.figure}")
        settings = {"scale": options.scale, "runs": [_said(part) for part in parts]}
        write_manifest(out, f"figure{recipe.figure}", {"kind": kind, **settings})
        began_ns = now_ns()
        directories = [_run(part, out / part.name, live) for part in parts]
        drawn = recipe.draw(directories, options.scale, out)
        finish_manifest(out, {"runs": len(parts), "wall_ns": now_ns() - began_ns})
        took_s = (now_ns() - began_ns) / NS_PER_S
        document = _document(recipe, kind, options.scale, drawn, took_s)
        _write(recipe, document, drawn, out)
        if options.tables:
            _write(recipe, document, drawn, HERE / f"figure{recipe.figure}")
    except SloschedError as error:
        sys.exit(f"figure {recipe.figure}: {error}")
    print(drawn.text)


def _options(recipe: Recipe) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=recipe.text)
    parser.add_argument("--scale", choices=SCALES, default="quick", help="default: quick")
    if not recipe.live_only:
        parser.add_argument(
            "--live", action="store_true", help="emulated workers on this machine, not simulated"
        )
    where = f"default: slosched-runs/figure{recipe.figure}"
    parser.add_argument("--out", type=Path, help=f"directory of the runs; {where}")
    parser.add_argument(
        "--tables", action="store_true", help=f"keep the figure in analysis/figure{recipe.figure}/"
    )
    return parser.parse_args()


def _run(part: Part, directory: Path, live: bool) -> Path:
    """Make one run and return its directory. Raises SloschedError if it did not run to its end."""
    began_ns = now_ns()
    result = _live(part, directory) if live else _simulated(part, directory)
    if not result.complete:
        raise SloschedError(f"the run {part.name} is not complete: {result.problem}")
    took = format_duration(now_ns() - began_ns)
    print(
        f"{part.name}: {result.sent} requests, {100 * result.controller_satisfaction:.2f} % in time "
        f"(controller), in {took}",
        flush=True,
    )
    assert result.run_dir is not None
    return Path(result.run_dir)


def _simulated(part: Part, directory: Path) -> RunResult:
    name, *values = part.workload.split()
    spec = SimSpec(
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
    return simulate(spec, out=directory)


def _live(part: Part, directory: Path) -> RunResult:
    return run_locally(
        directory,
        Cluster(part.scheduler, part.gpus, part.profile),
        part.workload.split(),
        seed=part.seed,
        duration_ns=part.duration_ns,
        inputs=part.inputs,
    )


# --------------------------------------------------------------------------------- what is left


def _said(part: Part) -> dict[str, Any]:
    scheduler = part.scheduler
    return {
        "name": part.name,
        "workload": part.workload,
        "scheduler": f"{scheduler.policy}:{scheduler.fidelity}",
        "gpus": part.gpus,
        "profile": part.profile,
        "seed": part.seed,
    }


def _document(
    recipe: Recipe, kind: str, scale: str, drawn: Drawn, seconds: float
) -> dict[str, Any]:
    numbers = _without(plain(drawn.numbers), (*recipe.left_out, "run"))
    return {
        "figure": recipe.figure,
        "kind": kind,
        "scale": scale,
        "version": __version__,
        "host": {k: v for k, v in describe_host().items() if k != "hostname"},
        "wall_s": round(seconds, 1),
        "cpu_s": round(sum(os.times()[:4]), 1),  # with what ended children used
        "runs": [_said(part) for part in recipe.parts(scale)],
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
    host, seconds = document["host"], document["wall_s"]
    heading = (
        f"# Figure {recipe.figure}, {document['kind']}, scale {document['scale']}\n\n"
        f"{recipe.text}\n\n```\n{drawn.text}\n```\n\n"
        f"slosched {__version__}, {host['cpu_model']}, {host['cpu_usable']} CPUs, Python "
        f"{host['python']}; runs and drawing took {seconds:.0f} s, {document['cpu_s']:.0f} s of CPU. Made by "
        f"`analysis/{stem}.py --scale {document['scale']}"
        f"{' --live' if document['kind'] == 'live' and not recipe.live_only else ''} --tables`.\n"
    )
    _text(place / f"{stem}.md", heading)
    _text(place / f"{stem}.json", _compact(document))
    for file in drawn.files:
        if file.suffix == ".png" and file.parent.resolve() != place.resolve():
            (place / file.name).write_bytes(file.read_bytes())
    print(f"wrote {place / f'{stem}.json'}, .md and the figure")


def _compact(document: dict[str, Any]) -> str:
    """JSON with one line for each list of numbers, so that a table of windows can be read."""
    text = json.dumps(document, indent=1)
    flat = re.sub(r"\[\s+([^][{}]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    return flat + "\n"


def _text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
