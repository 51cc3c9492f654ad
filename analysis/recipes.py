"""What the recipes of figures share: they make a figure's runs, simulated or live, and keep what is committed.

Which runs a figure needs, and how it is drawn, is in `slosched.experiment.figures`. `main` makes the runs and
draws; with --tables the figure and its numbers are kept beside the recipe, in analysis/figureN/ (live:
analysis/figureN/live/).

Simulated runs that are there already, complete and of the same spec and version, are not made again.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from slosched.analysis.drawn import Drawn
from slosched.cli.local_run import Cluster, run_locally
from slosched.clock import now_ns
from slosched.errors import SloschedError
from slosched.experiment.figures import SCALES, Figure, Part
from slosched.experiment.result import document, write_result
from slosched.experiment.simulated import simulate_parts
from slosched.loadgen.results import RunResult
from slosched.telemetry.manifest import finish_manifest, write_manifest
from slosched.telemetry.run_dir import claim_run_dir
from slosched.units import NS_PER_S

HERE = Path(__file__).resolve().parent


def main(figure: Figure) -> None:
    """Make the runs of a figure as the command line says; the program ends with 1 if a run fails."""
    options = _options(figure)
    live = figure.live_only or options.live
    parts = figure.parts(options.scale)
    out: Path = options.out or _default_out(figure, options.scale, live)
    began_ns, load_before = now_ns(), os.getloadavg()[0]
    reused = 0
    try:
        if live:
            results = _live(parts, out)
        else:
            results, reused = simulate_parts(parts, out, processes=options.jobs, show=print)
        runs = [_directory(part, result) for part, result in zip(parts, results, strict=True)]
        drawn = figure.draw(parts, runs, options.scale, out)
    except (SloschedError, KeyboardInterrupt) as error:
        sys.exit(f"figure {figure.number}: {str(error) or 'stopped'}")
    more: dict[str, Any] = {
        "runs_reused": reused,
        "wall_s": round((now_ns() - began_ns) / NS_PER_S, 1),
        "cpu_s": round(sum(os.times()[:4]), 1),  # with what ended children used
    }
    if live:  # what else this machine did when the runs began
        more["load_average_before"] = round(load_before, 1)
    kind = "live" if live else "simulated"
    numbers = document(figure, parts, drawn, kind=kind, scale=options.scale, more=more)
    made_by = _made_by(figure, options.scale, numbers)
    write_result(numbers, figure, drawn, out, made_by=made_by)
    if options.tables:
        place = HERE / f"figure{figure.number}"
        place = place / "live" if live and not figure.live_only else place
        write_result(numbers, figure, drawn, place, made_by=made_by)
        _keep_pictures(drawn, place)
    print(drawn.text)


def _options(figure: Figure) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=figure.text)
    parser.add_argument("--scale", choices=SCALES, default="quick", help="default: quick")
    if not figure.live_only:
        parser.add_argument(
            "--jobs", type=int, default=1, help="processes that simulate; default 1"
        )
        parser.add_argument(
            "--live", action="store_true", help="emulated workers on this machine, not simulated"
        )
    where = _default_out(figure, "SCALE", figure.live_only)
    parser.add_argument("--out", type=Path, help=f"directory of the runs; default {where}")
    parser.add_argument(
        "--tables", action="store_true", help=f"keep the figure in analysis/figure{figure.number}/"
    )
    return parser.parse_args()


def _default_out(figure: Figure, scale: str, live: bool) -> Path:
    name = f"figure{figure.runs_of or figure.number}-{scale}"
    return Path("slosched-runs") / (f"{name}-live" if live else name)


def _live(parts: Sequence[Part], out: Path) -> list[RunResult]:
    """One run after the other; only one at a time has the machine for itself."""
    out = claim_run_dir(out)
    write_manifest(out, "recipe", {"runs": [part.described() for part in parts]})
    results = []
    for part in parts:
        result = run_locally(
            out / part.name,
            Cluster(part.scheduler, part.gpus, part.profile),
            part.words,
            seed=part.seed,
            duration_ns=part.duration_ns,
            inputs=part.inputs,
        )
        results.append(result)
        print(f"{part.name}: {result.sent} requests; {result.verdict}", flush=True)
    finish_manifest(out, {"runs": len(results)})
    return results


def _directory(part: Part, result: RunResult) -> Path:
    """Where the run is. Raises SloschedError if it did not continue to its end."""
    if not result.complete or result.run_dir is None:
        raise SloschedError(f"the run {part.name} is not complete: {result.problem}")
    return Path(result.run_dir)


# --------------------------------------------------------------------------------- what is left


def _made_by(figure: Figure, scale: str, numbers: dict[str, Any]) -> str:
    """How long the runs took, and the command."""
    took = f"it took {numbers['wall_s']:.0f} s and {numbers['cpu_s']:.0f} s of CPU"
    if "load_average_before" in numbers:
        took += f", with a load average of {numbers['load_average_before']} before it"
    if numbers["runs_reused"]:
        took = f"{numbers['runs_reused']} runs were there already"
    live = " --live" if numbers["kind"] == "live" and not figure.live_only else ""
    return f"{took}. Made by `analysis/figure{figure.number}.py --scale {scale}{live} --tables`"


def _keep_pictures(drawn: Drawn, place: Path) -> None:
    for file in drawn.files:
        if file.suffix == ".png":
            # A figure has few colours: with a palette it takes a third of the room.
            Image.open(file).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(
                place / file.name, optimize=True
            )
    print(f"kept in {place}")
