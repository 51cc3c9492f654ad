"""Overload: what is served in time while a cluster is asked for up to 20 times what it can do.

    .venv/bin/python analysis/overload.py [--tables] [--gpus 6]

Simulated: N = 12 and 48 copies of ResNet-50 on six GPUs of the profiles fig7 and v100, Poisson arrivals,
SLOs of 10, 25 and 100 ms. The load is a multiple of what the GPUs can do in full batches. Each run is 0.15 s
to fill the queues, 0.25 s that count and 0.1 s behind them; about a minute and a half in all.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from slosched.analysis.drawn import columns_text
from slosched.clock import now_ns
from slosched.config import SchedulerConfig
from slosched.config_file import load_profile
from slosched.sim.run import simulate
from slosched.sim.spec import SimSpec
from slosched.units import NS_PER_MS, NS_PER_S
from slosched.version import __version__
from slosched.workloads.base import Step
from slosched.workloads.mix import MixEntry, mix

HERE = Path(__file__).resolve().parent
PROFILES = ("fig7", "v100")
COPIES = (12, 48)
SLOS_MS = (10, 25, 100)
LOADS = (0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0)
_STARTS_NS = (0, 150 * NS_PER_MS, 400 * NS_PER_MS)
_END_NS = 500 * NS_PER_MS


@dataclass(frozen=True)
class Curve:
    """Goodput by load, as shares of what the GPUs can do in full batches."""

    profile: str
    copies: int
    slo_ms: int
    capacity_rps: float
    controller: tuple[float, ...]
    client: tuple[float, ...]

    def kept(self, load: float) -> float:
        """The client's goodput at `load` over the best at any load up to it."""
        place = LOADS.index(load)
        return self.client[place] / max(self.client[: place + 1])


def curve(profile: str, copies: int, slo_ms: int, gpus: int) -> Curve:
    """Simulate one cell at every load."""
    gpu = load_profile(profile)
    exec_ns = gpu.model("resnet50").exec_ns
    batch = max(exec_ns)
    capacity = gpus * batch / exec_ns[batch] * NS_PER_S
    counts: list[tuple[float, float]] = []
    for load in LOADS:
        entry = MixEntry("resnet50_v2", copies, load * capacity, (0.0, slo_ms * NS_PER_MS))
        steps = tuple(Step(index, start_ns) for index, start_ns in enumerate(_STARTS_NS))
        spec = SimSpec(
            workload=mix([entry], _END_NS, steps),
            scheduler=SchedulerConfig(schedule_ahead_ns=5 * NS_PER_MS),
            profiles=(gpu,),
            gpus=gpus,
            seed=1,
        )
        step = simulate(spec).steps[1]
        counts.append((step.controller_goodput_rps / capacity, step.goodput_rps / capacity))
    controller, client = zip(*counts, strict=True)
    return Curve(profile, copies, slo_ms, round(capacity, 1), controller, client)


def table(curves: Sequence[Curve]) -> str:
    """The client's goodput at every load, and what is kept of the best at ten and twenty times."""
    headings = ("goodput / capacity at", *(f"{load:g}x" for load in LOADS), "10x kept", "20x kept")
    rows = [
        (
            f"{c.profile} N={c.copies} {c.slo_ms}ms",
            *(f"{value:.3f}" for value in c.client),
            f"{100 * c.kept(10.0):.1f} %",
            f"{100 * c.kept(20.0):.1f} %",
        )
        for c in curves
    ]
    return columns_text(headings, rows)


def draw(curves: Sequence[Curve], out: Path) -> Path:
    """One panel for each profile."""
    from slosched.analysis import style

    with style.look():
        figure = style.Figure(figsize=(9.6, 3.8), layout="constrained")
        panels = figure.subplots(1, len(PROFILES), sharey=True)
        for ax, profile in zip(panels, PROFILES, strict=True):
            ax.set_title(f"Profile {profile}")
            for c in (c for c in curves if c.profile == profile):
                place = SLOS_MS.index(c.slo_ms)
                ax.plot(
                    LOADS,
                    c.client,
                    color=style.COLOURS[place],
                    marker=style.MARKERS[place],
                    markersize=4,
                    linestyle="-" if c.copies == COPIES[0] else "--",
                    label=f"{c.slo_ms} ms, N={c.copies}",
                )
            ax.set_xscale("log")
            ax.set_xticks(LOADS, [f"{load:g}" for load in LOADS])
            ax.minorticks_off()
            ax.set_xlabel("Load / capacity in full batches")
            ax.set_ylim(0, 1.15)
        panels[0].set_ylabel("In time for the client / capacity")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
        png, _ = style.save(figure, out, "overload")
    return png


def keep(curves: Sequence[Curve], text: str, png: Path, gpus: int, took_s: float) -> None:
    """The figure and its numbers beside this recipe."""
    place = HERE / "overload"
    place.mkdir(exist_ok=True)
    image = Image.open(png).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    image.save(place / "overload.png", optimize=True)
    document = {
        "version": __version__,
        "gpus": gpus,
        "loads": LOADS,
        "curves": [asdict(c) for c in curves],
    }
    rounded = json.loads(json.dumps(document), parse_float=lambda number: round(float(number), 4))
    lines = [json.dumps(c) for c in rounded.pop("curves")]
    head = json.dumps(rounded).removesuffix("}")
    (place / "overload.json").write_text(
        f'{head}, "curves": [\n ' + ",\n ".join(lines) + "\n]}\n", encoding="utf-8"
    )
    (place / "overload.md").write_text(
        f"# Overload, simulated\n\nRequests in time by the client's count, over what {gpus} GPUs can do in "
        "full batches. Kept: of the best goodput at that load or a lower one.\n\n"
        f"```\n{text}\n```\n\nslosched {__version__}; it took {took_s:.0f} s. Made by "
        "`analysis/overload.py --tables`.\n",
        encoding="utf-8",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gpus", type=int, default=6, help="default: 6")
    parser.add_argument("--out", type=Path, default=Path("slosched-runs") / "overload")
    parser.add_argument(
        "--tables", action="store_true", help="keep the figure in analysis/overload/"
    )
    options = parser.parse_args()
    if options.gpus < 1:
        parser.error(f"--gpus must be at least 1, not {options.gpus}")
    began_ns = now_ns()
    curves: list[Curve] = []
    for profile in PROFILES:
        for copies in COPIES:
            for slo_ms in SLOS_MS:
                curves.append(curve(profile, copies, slo_ms, options.gpus))
                kept = 100 * curves[-1].kept(10.0)
                print(f"{profile}, {copies} copies, {slo_ms} ms: {kept:.1f} % kept", flush=True)
    text = table(curves)
    png = draw(curves, options.out)
    if options.tables:
        keep(curves, text, png, options.gpus, (now_ns() - began_ns) / NS_PER_S)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
