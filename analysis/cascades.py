"""Cascades: ours beside DiffServe and what it is compared with, in virtual time, over five seeds.

    .venv/bin/python analysis/cascades.py [--tables] [--seeds 5] [--only main,ablations,sizes,...]
    .venv/bin/python analysis/cascades.py --only sanity --recorded DIR

Traces and scores are ours (workloads/cascade_trace.py): every policy gets the same arrivals, prompts and
scores. Runs that are there already, complete and of the same settings, are not made again. With --recorded
the folder DIR has the artifact's trace (trace_4to32qps.txt) and scores (dist_CASCADE.txt), which are not part
of this repository: the rows "sanity" are then those of the sanity simulation that the page quotes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slosched.cascade.compare import Comparison, cells_of, compare
from slosched.cascade.presets import POLICIES, PRESETS, Variant
from slosched.cascade.run import Experiment
from slosched.cascade_spec import CascadeOptions
from slosched.cli.sim_display import JobsDisplay
from slosched.clock import now_ns
from slosched.sim.faults import Fault, FaultPlan
from slosched.units import NS_PER_S
from slosched.version import __version__

HERE = Path(__file__).resolve().parent
OURS = "cascade"
_SYSTEMS = "Systems"
#: A ratio to fewer violations than this share says nothing.
_NEXT_TO_NONE = 0.005
#: The cascades on 16 GPUs, each with a trace that its capacity can carry.
MAIN = (("sdturbo", "4to32"), ("sdxs", "4to32"), ("sdxlltn", "1to8"))
#: (GPUs, trace): the artifact's rule of thumb, a peak of twice the number of GPUs.
SIZES = ((4, "1to8"), (8, "2to16"), (12, "3to24"), (16, "4to32"), (32, "8to64"), (64, "16to128"))
_OPTIONS = CascadeOptions()
ABLATIONS = (
    Variant("diffserve", "DIFFSERVE"),
    Variant("diffserve, random routing", "DIFFSERVE", replace(_OPTIONS, routing="random")),
    Variant("diffserve, AIMD batches", "DIFFSERVE", replace(_OPTIONS, batching="aimd")),
    Variant("diffserve, no queueing term", "DIFFSERVE", replace(_OPTIONS, queue_term=False)),
    Variant("diffserve, threshold 0.1", "DIFFSERVE", replace(_OPTIONS, fixed_threshold=0.1)),
    Variant("diffserve, random scores", "DIFFSERVE", replace(_OPTIONS, blind_scores=True)),
    Variant(OURS, "CASCADE"),
    Variant("cascade, threshold 0.1", "CASCADE", replace(_OPTIONS, fixed_threshold=0.1)),
    Variant("cascade, random scores", "CASCADE", replace(_OPTIONS, blind_scores=True)),
)
#: The sanity simulation's violations and FID: all light, all heavy, static, random routing, least loaded.
SANITY = {
    "sdturbo": ((0, 22.77), (0.693, 18.55), (0.016, 18.30), (0.159, 16.92), (0.006, 16.91)),
    "sdxs": ((0, 24.86), (0.693, 18.55), (0.033, 18.70), (0.148, 17.44), (0.060, 17.39)),
    "sdxlltn": ((0, 33.27), (0.991, 23.31), (0.591, 32.28), (0.015, 32.56), (0.004, 32.44)),
}
_PAIR = (Variant(OURS, "CASCADE"), Variant("diffserve", "DIFFSERVE"))
#: What CASCADE defers, as a part of what it can serve, where it has at most the violations of DIFFSERVE.
DEFERRED_PARTS = {"sdturbo": 1.1, "sdxs": 1.1, "sdxlltn": 1.0}
#: (GPUs, trace) on which heavy batches are interrupted at their steps, and not.
BOUNDARIES = ((1, "0_25to2"), (2, "0_5to4"), (4, "1to8"), (16, "4to32"))


@dataclass(frozen=True)
class Section:
    """A table: its title, what it says about its rows, and its comparisons, each with a caption."""

    title: str
    text: str
    comparisons: tuple[tuple[str, Comparison], ...]


@dataclass(frozen=True)
class Bench:
    """Where runs go, and how they are made."""

    out: Path
    seeds: tuple[int, ...]
    processes: int

    def compared(
        self, name: str, base: Experiment, variants: Sequence[Variant], seeds: int = 0
    ) -> Comparison:
        chosen = self.seeds[: seeds or len(self.seeds)]
        cells = cells_of(base, variants, chosen, self.out / name)
        with_display = _Display()
        try:
            found = compare(cells, processes=self.processes, progress=with_display)
        finally:
            with_display.close()
        print(f"{name}:\n{found.text()}\n", flush=True)
        return found


class _Display:
    """Progress of one comparison's runs, if there are any."""

    def __init__(self) -> None:
        self._shown: JobsDisplay | None = None

    def __call__(self, names: list[str]) -> Callable[..., None]:
        self._shown = JobsDisplay(names)
        return self._shown.__enter__()

    def close(self) -> None:
        if self._shown is not None:
            self._shown.__exit__(None, None, None)


# ----------------------------------------------------------------------------------- sections


def main_table(bench: Bench) -> Section:
    variants = tuple(Variant(policy.lower(), policy) for policy in POLICIES)
    found = tuple(
        (
            f"{cascade}, {trace}",
            bench.compared(f"main-{cascade}", Experiment(cascade, trace), variants),
        )
        for cascade, trace in MAIN
    )
    text = "16 GPUs. Every system has its own settings, drops at the SLO, and routes to the least loaded GPU."
    return Section(_SYSTEMS, text, found)


def at_violations(bench: Bench) -> Section:
    """Ours with as many violations as the published policy, or fewer: what the judge rejected is refused."""
    found = []
    for cascade, trace in MAIN:
        part = DEFERRED_PARTS[cascade]
        strict = replace(_OPTIONS, rejected_answers=False, deferred_part=part)
        variants = (Variant(f"cascade, strict {part:g}", "CASCADE", strict), _PAIR[1])
        compared = bench.compared(f"strict-{cascade}", Experiment(cascade, trace), variants)
        found.append((f"{cascade}, {trace}", compared))
    text = (
        "The published policy drops what it cannot serve in time, and so its FID is of fewer answers. Here "
        "CASCADE does the same: it refuses what the judge rejected and the heavy program cannot serve in time "
        "(`rejected_answers=false`), and defers more than it can serve (`deferred_part`). All light "
        "answers are the judge's choice then."
    )
    return Section("At the published policy's violations", text, tuple(found))


def boundaries(bench: Bench) -> Section:
    """Heavy batches that can be interrupted between two steps, and that cannot."""
    variants = (
        Variant(f"{OURS}, step boundaries", "CASCADE", preempt=True),
        Variant(OURS, "CASCADE"),
        _PAIR[1],
    )
    found = tuple(
        (
            f"{gpus} GPU{'s' * (gpus > 1)}, {trace}",
            bench.compared(f"boundaries-{gpus}", Experiment("sdturbo", trace, gpus), variants),
        )
        for gpus, trace in BOUNDARIES
    )
    text = (
        "sdturbo. With `preempt` no GPU stays free for light batches: they interrupt heavy ones between two of "
        "their 50 steps."
    )
    return Section("Step boundaries", text, found)


def ablations(bench: Bench) -> Section:
    found = tuple(
        (
            f"{cascade}, {trace}",
            bench.compared(f"ablations-{cascade}", Experiment(cascade, trace), ABLATIONS),
        )
        for cascade, trace in MAIN
    )
    return Section("One part at a time", "16 GPUs, as above, with one part changed.", found)


def sizes(bench: Bench) -> Section:
    found = tuple(
        (
            f"{gpus} GPUs, {trace}",
            bench.compared(f"sizes-{gpus}", Experiment("sdturbo", trace, gpus), _PAIR),
        )
        for gpus, trace in SIZES
    )
    return Section("4 to 64 GPUs", "sdturbo, a peak of two requests/s for each GPU.", found)


def events(bench: Bench) -> Section:
    """Demand that doubles within a second, and workers that die."""
    dead = FaultPlan(
        tuple(
            Fault(
                "crash",
                f"worker {worker}",
                at_ns=(150 + 5 * worker) * NS_PER_S,
                for_ns=60 * NS_PER_S,
            )
            for worker in (0, 3)
        )
    )
    cases = {
        "8 to 16 requests/s within a second": Experiment("sdturbo", "double_8to16", 16),
        "12 to 24 requests/s within a second": Experiment("sdturbo", "double_12to24", 16),
        "two of 16 workers die for a minute, 4to32": Experiment(
            "sdturbo", "4to32", 16, faults=dead
        ),
    }
    found = tuple(
        (caption, bench.compared(f"events-{place}", base, _PAIR))
        for place, (caption, base) in enumerate(cases.items())
    )
    return Section("When something happens", "sdturbo, 16 GPUs.", found)


def sanity(bench: Bench, recorded: Path | None) -> Section:
    """The preset beside the sanity simulation. With a recorded trace a seed is that of the routing alone."""
    preset = PRESETS["sanity"]
    variants = (*preset.variants, Variant(OURS, "CASCADE"))
    found = []
    for cascade in SANITY:
        base = Experiment(cascade, "4to32", judge_ns=preset.judge_ns, options=preset.options)
        if recorded is not None:
            trace = str(recorded / "trace_4to32qps.txt")
            base = replace(base, trace=trace, scores=recorded / f"dist_{cascade}.txt")
        wanted = "; ".join(f"{violations} / {fid}" for violations, fid in SANITY[cascade])
        name = f"sanity-{'made' if recorded is None else 'recorded'}-{cascade}"
        found.append((f"{cascade}, 4to32 (wanted: {wanted})", bench.compared(name, base, variants)))
    how = "our trace and scores" if recorded is None else "the artifact's recorded trace and scores"
    text = f"Factor 1.2, a drop at 1.5 SLOs, no time for the judge, no cost of role changes; {how}."
    return Section("The sanity simulation's settings", text, tuple(found))


# ------------------------------------------------------------------------------------ results


def claims(comparisons: Sequence[tuple[str, Comparison]]) -> list[str]:
    """The abstract's claims beside these runs: per cent that a system is better than each of the others."""
    lines = [
        "The paper's abstract: up to 24 % better quality and 19 to 70 % fewer violations than other systems. "
        "Here, FID by the table and violations, in per cent less than the row's system (means over seeds); -: "
        "that system has violations of fewer than one in 200 requests.",
        "",
        "| cascade | less than | FID, DiffServe | FID, ours | violations, DiffServe | violations, ours |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for caption, comparison in comparisons:
        for variant in comparison.variants:
            if variant.name in ("diffserve", OURS):
                continue
            cells = [
                _less(comparison, name, variant.name, key)
                for key in ("fid", "violation_ratio")
                for name in ("diffserve", OURS)
            ]
            lines.append(f"| {caption} | {variant.name} | {' | '.join(cells)} |")
    return lines


def _less(comparison: Comparison, name: str, than: str, key: str) -> str:
    """By how many per cent a number of `name` is less than that of `than`."""
    ours, theirs = comparison.estimate(name, key), comparison.estimate(than, key)
    if ours is None or theirs is None or (key == "violation_ratio" and theirs.mean < _NEXT_TO_NONE):
        return "-"
    return f"{100 * (1 - ours.mean / theirs.mean):+.1f} %"


def page(sections: Sequence[Section], seeds: int) -> str:
    lines = [
        "# Cascades",
        "",
        "Written by [cascades.py](../cascades.py). Virtual time, no noise; FID is a table's value at the run's "
        "share of light answers, and the pessimistic FID says what forced and unjudged answers may cost "
        f"([docs/cascades.md](../../docs/cascades.md)). Means and 95 % intervals over {seeds} seeds; the "
        "second table of each pair has the differences seed by seed.",
    ]
    for section in sections:
        lines += ["", f"## {section.title}", "", section.text]
        for caption, comparison in section.comparisons:
            lines += ["", f"**{caption}**", "", comparison.markdown().rstrip()]
        if section.title == _SYSTEMS:
            lines += ["", *claims(section.comparisons)]
    return "\n".join(lines) + "\n"


SECTIONS: dict[str, Callable[[Bench], Section]] = {
    "main": main_table,
    "at-violations": at_violations,
    "boundaries": boundaries,
    "ablations": ablations,
    "sizes": sizes,
    "events": events,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = [*SECTIONS, "sanity"]
    parser.add_argument("--only", default=",".join(names), help=f"of {', '.join(names)}")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--out", type=Path, default=Path("cascade-runs"), help="where the runs go")
    parser.add_argument("--recorded", type=Path, help="the artifact's trace and scores, for sanity")
    parser.add_argument("--tables", action="store_true", help="keep the page and the numbers here")
    options = parser.parse_args(arguments)
    began_ns = now_ns()
    bench = Bench(options.out, tuple(range(options.seeds)), options.jobs)
    sections = []
    for name in options.only.split(","):
        if name not in names:
            parser.error(f"there is no section {name!r}; there are {', '.join(names)}")
        made = sanity(bench, options.recorded) if name == "sanity" else SECTIONS[name](bench)
        sections.append(made)
    print(f"{(now_ns() - began_ns) / NS_PER_S:.0f} s")
    if options.tables:
        place = HERE / "cascades"
        place.mkdir(exist_ok=True)
        document: dict[str, Any] = {"version": __version__, "seeds": options.seeds, "sections": {}}
        for section in sections:
            document["sections"][section.title] = {
                caption: comparison.as_dict() for caption, comparison in section.comparisons
            }
        (place / "cascades.md").write_text(page(sections, options.seeds), encoding="utf-8")
        text = json.dumps(
            json.loads(json.dumps(document), parse_float=lambda n: round(float(n), 5))
        )
        (place / "cascades.json").write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
