"""Models that share one GPU, in virtual time: Deft's sweep and demo, and HotCarbon's fourteen mixes.

    .venv/bin/python analysis/share.py              # half a minute of CPU; prints the page
    .venv/bin/python analysis/share.py --tables     # and keeps page, tables and figures in analysis/share/

Nothing here ran on a GPU. Times of models alone are those of share/profiles/h200.toml; what sharing does to
them is a model (share/contention.py). The same sweeps run on a GPU by `slosched share sweep NAME`.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from slosched.clock import now_ns
from slosched.share.drawing import draw_all
from slosched.share.outputs import read_summary
from slosched.share.presets import Wanted, preset
from slosched.share.simulate import simulate
from slosched.share.solos import load_profile
from slosched.share.sweep import TABLE, run_sweep
from slosched.units import NS_PER_S

HERE = Path(__file__).resolve().parent
PROFILE = "h200"
#: SDXL takes 3.7 s alone, so a window has eight.
WINDOW_S = 30
#: The figures that are kept: preset, kind, a part of the file's name, and its name here.
FIGURES = (
    ("sweep-sync", "trade-off", "trade-off_", "sweep_trade_off.png"),
    ("sweep-sync", "knob", "knob_", "sweep_knob.png"),
    ("sweep-sync", "overhead", "overhead_", "sweep_overhead.png"),
    ("deft-demo", "methods", "methods_", "demo_methods.png"),
    ("deft-demo", "lanes", "gate_gate-event-2", "demo_lanes.png"),
    ("hotcarbon", "mixes", "mixes", "mixes.png"),
    ("hotcarbon", "dedicated", "dedicated_mps", "dedicated_mps.png"),
    ("hotcarbon", "modes", "bert+diffusion+whisper", "modes.png"),
    ("hotcarbon", "queue", "queue_bert+diffusion+gpt_preempt", "queue.png"),
    ("hotcarbon", "segments", "segments_bert+diffusion+gpt_preempt", "segments.png"),
)
#: Columns of each table: of the sweep's, and how they are called.
COLUMNS = {
    "sweep-sync": (
        ("jobs.model_A.boundary.every", "modules between waits"),
        ("job1_mean_ms", "high, ms"),
        ("job1_inflation", "high, above alone"),
        ("job0_apart_mean_ms", "low without overlap, ms"),
        ("job0_inflation_apart", "low, above alone"),
        ("job1_deft_miss_share", "high, SLO missed"),
        ("preemption_p99_ms", "to start, p99 ms"),
    ),
    "deft-demo": (
        ("method", "method"),
        ("job1_mean_ms", "high, ms"),
        ("job1_inflation", "high, above alone"),
        ("job0_mean_ms", "low, ms"),
        ("job0_inflation_apart", "low without overlap, above alone"),
        ("job1_deft_miss_share", "high, SLO missed"),
    ),
    "hotcarbon": (
        ("mix", "mix"),
        ("mode", "mode"),
        ("stp", "STP"),
        ("jain", "Jain"),
        ("energy_ratio", "energy / alone"),
        ("job0_p99_ms", "first model, p99 ms"),
        ("mean_watts", "W"),
    ),
}
TITLES = {
    "sweep-sync": "Deft's sweep: the low model waits for the device after each N modules",
    "deft-demo": "Deft's demo: no gate, a gate, bounded queues",
    "hotcarbon": "HotCarbon's fourteen mixes",
}
NOTES = {
    "deft-demo": (
        "In virtual time a wait for the device changes nothing without a gate, so the bounded queues equal "
        "`gate-off` here; on a GPU they need not."
    ),
    "hotcarbon": (
        "Clients do not think. Under `preempt` the model with the highest priority therefore leaves almost "
        "nothing to the others: STP is about 1 there, and its p99 is that of a run alone. Published values "
        "stand in grey beside ours; the devices differ, and STP and the energy ratio are each relative to the "
        "same device alone. The first model is the one with the highest priority."
    ),
}
SHARES = ("inflation", "share", "above")


def run(out: Path, window_s: int, say: bool) -> None:
    """Run the three presets in virtual time below `out`."""
    wanted = Wanted(device="emulated", label="emulated-h200", duration_ns=window_s * NS_PER_S)
    for name in COLUMNS:
        run_sweep(
            preset(name, wanted).points,
            out / name,
            run=lambda spec, place: [
                read_summary(path / "summary.json").metrics
                for path in simulate(spec, place, profile=PROFILE).paths
            ],
            say=print if say else lambda _: None,
            draw=False,
        )


def draw(out: Path, target: Path) -> list[Path]:
    """Draw the figures of FIGURES into `target`."""
    kept = []
    for name in COLUMNS:
        wanted = [each for each in FIGURES if each[0] == name]
        folder = out / name / "figures"
        files = draw_all(
            out / name, folder, say=lambda _: None, singles=10, only=[each[1] for each in wanted]
        )
        for _, _, part, stem in wanted:
            found = next((f for f in files if part in f.name and f.suffix == ".png"), None)
            if found is not None:
                target.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(found, target / stem)
                kept.append(target / stem)
    return kept


def page(out: Path) -> str:
    """The page: what was assumed, a table for each preset, and the figures."""
    profile = load_profile(PROFILE)
    parts = [
        "# Sharing one GPU, in virtual time",
        "Written by [share.py](../share.py). **Nothing here was measured while models shared a GPU.** Times of "
        f"models alone: {profile.device}, {profile.measured}. What sharing does to them is a model, fitted to "
        "HotCarbon's published pairs ([share/contention.py](../../src/slosched/share/contention.py)); weights "
        "play no part. [docs/share.md](../../docs/share.md) says how to run the same on a GPU.",
    ]
    for name, columns in COLUMNS.items():
        parts.append(f"## {TITLES[name]}")
        if name in NOTES:
            parts.append(NOTES[name])
        parts.append(table(out / name / TABLE, columns))
        parts += [f"![]({stem})" for preset_, _, _, stem in FIGURES if preset_ == name]
    return "\n\n".join(parts) + "\n"


def table(path: Path, columns: Sequence[tuple[str, str]]) -> str:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [
        "| " + " | ".join(title for _, title in columns) + " |",
        "|" + "|".join("---" if place == 0 else "--:" for place in range(len(columns))) + "|",
    ]
    lines += [
        "| " + " | ".join(cell(key, row.get(key, "")) for key, _ in columns) + " |" for row in rows
    ]
    return "\n".join(lines)


def cell(key: str, value: str) -> str:
    if not value:
        return "-"
    try:
        number = float(value)
    except ValueError:
        return value
    if any(word in key for word in SHARES):
        return f"{100 * number + 0.0:.1f} %".replace("-0.0 %", "0.0 %")
    if key.endswith("every"):
        return f"{int(number):,}"
    return f"{number:.3f}" if abs(number) < 10 else f"{number:,.1f}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--window", type=int, default=WINDOW_S, help="seconds of each run")
    parser.add_argument("--out", type=Path, default=Path("slosched-runs") / "share")
    parser.add_argument("--tables", action="store_true", help="keep the page and the figures here")
    parser.add_argument("--quiet", action="store_true", help="no line for each point")
    options = parser.parse_args(arguments)
    if options.window < 1:
        parser.error(f"--window must be at least 1, not {options.window}")
    began_ns = now_ns()
    run(options.out, options.window, not options.quiet)
    text = page(options.out)
    print(text)
    target = HERE / "share" if options.tables else options.out / "page"
    files = draw(options.out, target)
    (target / "share.md").write_text(text)
    for name in COLUMNS:
        shutil.copyfile(options.out / name / TABLE, target / f"{name}.csv")
    print(
        f"{(now_ns() - began_ns) / NS_PER_S:.0f} s; the page and {len(files)} figures are in {target}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
