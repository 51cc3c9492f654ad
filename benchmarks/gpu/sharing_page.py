"""sharing.md: the page of sharing.py's results, beside what HotCarbon and Deft published. Needs no GPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from slosched.share.published_figures import PublishedRun, hotcarbon_sets

RESULTS = Path(__file__).resolve().parent.parent / "results" / "sharing.json"
PAGE = Path(__file__).resolve().parent / "sharing.md"
#: The four models of HotCarbon, shortest first, and its fourteen mixes.
MODELS = ("bert", "whisper", "gpt", "diffusion")
MIXES: tuple[tuple[str, ...], ...] = (
    *((each,) for each in MODELS),
    *((a, b) for place, a in enumerate(MODELS) for b in MODELS[place + 1 :]),
    *(tuple(each for each in MODELS if each != left_out) for left_out in reversed(MODELS)),
)
#: What makes a mode good enough for both: this part of MPS's STP.
_OF_MPS = 0.95
_HEAD = (
    "# Sharing one GPU\n"
    "\n"
    "Written by [sharing.py](sharing.py). Models have the originals' shapes and **random weights**: times, "
    "energy and the equality of answers are measured, and what answers mean is not. "
    "*Eager* models run as in the original, but without autograd; *graphs* are the serving worker's programs."
)

Cells = Mapping[str, Mapping[str, Any]]
Cell = Mapping[str, Any]


def mix_name(mix: Sequence[str]) -> str:
    return "+".join(mix)


def page(document: Mapping[str, Any], more: Sequence[str] = ()) -> str:
    """The results as Markdown. `more`: lines of a section of another module."""
    cells: Cells = document["cells"]
    lines = [_HEAD, "", *(f"*{each}*" for each in document["runs"])]
    for run in ("eager", "graphs"):
        modes = [mode for mode in document["modes"].get(run, ()) if _any_mix(cells, run, mode)]
        if modes:
            lines += _mixes(cells, run, modes)
            lines += _short_tails(cells, run, modes)
    lines += [*_verdict(cells, document["modes"]), *_demo(cells), *_pair(cells), *_checks(cells)]
    lines += [*more, *_prepared(cells)]
    missing = {**document["left_out"], **document["failed"]}
    if missing:
        lines += ["", "## Not measured", "", *(f"- {key}: {why}" for key, why in missing.items())]
    return "\n".join(lines) + "\n"


def _any_mix(cells: Cells, run: str, mode: str) -> bool:
    return any(key.startswith(f"mix/{run}/{mode}/") for key in cells)


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(headings)} |", f"| :-- |{' --: |' * (len(headings) - 1)}"]
    return ["", *lines, *(f"| {' | '.join(row)} |" for row in rows)]


def _number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def _percent(part: float | None) -> str:
    return "-" if part is None else f"{100 * part:+.1f} %"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


# ---------------------------------------------------------------------------------------- the mixes


def _mixes(cells: Cells, run: str, modes: Sequence[str]) -> list[str]:
    published = {
        (each.name, frozenset(run.models)): run for each in hotcarbon_sets() for run in each.runs
    }
    sets = [each.name for each in hotcarbon_sets()]
    lines = ["", f"## HotCarbon's mixes, {run}"]
    lines += [
        "",
        "The four models are loaded once for each mode, and a part of them is active in each window. STP is "
        "the sum of throughput / throughput alone; the energy ratio is the energy used / that of the same "
        "requests alone, on GPUs that count while they work: below 1 sharing saves.",
    ]
    for title, field in (("STP", "stp"), ("Energy ratio", "energy_ratio")):
        rows = []
        for mix in MIXES:
            measured = [_number(_value(cells, run, mode, mix, field)) for mode in modes]
            if all(each == "-" for each in measured):
                continue
            there = [
                _number(_of_set(published.get((name, frozenset(mix))), field)) for name in sets
            ]
            rows.append((mix_name(mix), *measured, *there))
        lines += ["", f"### {title}"]
        lines += _table(("mix", *(f"H200 {mode}" for mode in modes), *sets), rows)
    return lines


def _of_set(published: PublishedRun | None, field: str) -> float | None:
    if published is None:
        return None
    return published.stp if field == "stp" else published.energy_ratio


def _value(cells: Cells, run: str, mode: str, mix: Sequence[str], field: str) -> float | None:
    cell = cells.get(f"mix/{run}/{mode}/{mix_name(mix)}")
    return None if cell is None else cell.get(field)


def _short(cell: Cell | None) -> Cell | None:
    """The job of a mix that is shortest alone: bert, or whisper, or GPT-J."""
    if cell is None:
        return None
    jobs = [job for job in cell["jobs"] if job["n"]]
    return min(jobs, key=lambda job: MODELS.index(job["name"])) if jobs else None


def _short_tails(cells: Cells, run: str, modes: Sequence[str]) -> list[str]:
    rows = []
    for mix in MIXES:
        if len(mix) < 2:
            continue
        found = [_short(cells.get(f"mix/{run}/{mode}/{mix_name(mix)}")) for mode in modes]
        if not any(found):
            continue
        alone = _short(cells.get(f"mix/{run}/exclusive/{mix[0]}"))
        rows.append((mix_name(mix), _tail(alone), *(_tail(job) for job in found)))
    return [
        "",
        "### Latency of the mix's shortest model",
        "",
        "p50 / p99, ms; * where fewer than 100 requests ended, so that the maximum stands in place of p99.",
        *_table(("mix", "alone", *modes), rows),
    ]


def _tail(job: Cell | None) -> str:
    if job is None:
        return "-"
    return f"{_ms(job['p50_ms'])} / {_ms(job['p99_ms'])}{'*' if job['p99_is_maximum'] else ''}"


def verdicts(cells: Cells, run: str, modes: Sequence[str]) -> dict[str, dict[str, float]]:
    """By mode: its STP / MPS's and its short models' p99 / tm's (mean, worst), and the number of mixes in which
    both are good enough.
    """
    found: dict[str, dict[str, float]] = {}
    for mode in modes:
        stps: list[float] = []
        tails: list[float] = []
        for mix in MIXES:
            measured, mps, tm = (
                cells.get(f"mix/{run}/{each}/{mix_name(mix)}") for each in (mode, "mps", "tm")
            )
            if len(mix) < 2 or measured is None or mps is None or tm is None:
                continue
            if measured["stp"] and mps["stp"]:
                stps.append(measured["stp"] / mps["stp"])
            short, short_tm = _short(measured), _short(tm)
            if short and short_tm:
                tails.append(short["p99_ms"] / short_tm["p99_ms"])
        if stps and tails:
            found[mode] = {
                "stp": mean(stps),
                "worst_stp": min(stps),
                "tail": mean(tails),
                "worst_tail": max(tails),
                "mixes": len(stps),
                "both": sum(a >= _OF_MPS and b <= 1.0 for a, b in zip(stps, tails, strict=True)),
            }
    return found


def _verdict(cells: Cells, modes: Mapping[str, Sequence[str]]) -> list[str]:
    rows = []
    winners = []
    for run, names in modes.items():
        for mode, each in verdicts(cells, run, names).items():
            if each["both"] == each["mixes"] and mode not in ("tm", "mps"):
                winners.append(f"{mode} ({run})")
            rows.append(
                (
                    f"{run} {mode}",
                    f"{each['mixes']:.0f}",
                    f"{each['stp']:.2f} ({each['worst_stp']:.2f})",
                    f"{each['tail']:.2f} ({each['worst_tail']:.2f})",
                    f"{each['both']:.0f}",
                )
            )
    if not rows:
        return []
    words = (
        f"In every mix both hold for {', '.join(winners)}."
        if winners
        else "No mode has both in every mix; the last column says in how many it has."
    )
    return [
        "",
        "## Is there a mode with MPS's throughput and the short model's tail of time slicing?",
        "",
        f"Asked is an STP of at least {100 * _OF_MPS:.0f} % of MPS's and a p99 of the shortest model of "
        f"at most that under time slicing. {words}",
        *_table(
            (
                "mode",
                "mixes",
                "STP / MPS's (worst)",
                "p99 of the short model / tm's (worst)",
                "mixes with both",
            ),
            rows,
        ),
    ]


# ------------------------------------------------------------------------------ Deft's demo and a pair


def _two_jobs(cells: Cells, prefix: str, low: str, high: str) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for key, cell in cells.items():
        if not key.startswith(prefix):
            continue
        jobs = {job["name"]: job for job in cell["jobs"]}
        if high not in jobs or low not in jobs:
            continue
        a, b = jobs[low], jobs[high]
        wrong = sum(job["wrong"] for job in cell["jobs"])
        rows.append(
            (
                key.removeprefix(prefix),
                f"{b['n']}",
                f"{_ms(b['p50_ms'])} / {_ms(b['p99_ms'])}{'*' if b['p99_is_maximum'] else ''}",
                _percent(b["inflation"]),
                f"{a['n']}",
                _ms(a["mean_ms"]),
                _percent(a["inflation_apart"]),
                _ms(cell.get("boundary_ms")),
                f"{wrong}",
            )
        )
    return rows


def _pair_head(high: str, low: str) -> tuple[str, ...]:
    return (
        "how",
        f"{high} n",
        "p50 / p99 ms",
        "inflation",
        f"{low} n",
        "mean ms",
        "inflation where it does not overlap",
        "longest between boundaries ms",
        "wrong answers",
    )


def _alone(cells: Cells, prefix: str) -> str:
    parts = []
    for key, cell in cells.items():
        if key.startswith(prefix):
            parts += [
                f"{job['name']} {_ms(job['p50_ms'])} / {_ms(job['p99_ms'])} ms (n {job['n']})"
                for job in cell["jobs"]
            ]
    return ", ".join(parts)


def _demo(cells: Cells) -> list[str]:
    rows = _two_jobs(cells, "demo/", "model_A", "model_B")
    if not rows:
        return []
    return [
        "",
        "## Deft's demo",
        "",
        "Two Faster R-CNN (ResNet-50 FPN), eager, float32: A of 1440 x 2560 back to back, B of 720 x 1280 with "
        f"pauses and the higher priority. Alone: {_alone(cells, 'demo-alone/')}. Deft, on its own GPU: B "
        "105.7 ms without control, 43.3 ms with a wait after each launch, 45.1 ms after each twentieth.",
        *_table(_pair_head("B", "A"), rows),
    ]


def _pair(cells: Cells) -> list[str]:
    lines: list[str] = []
    for run in ("graphs", "eager"):
        rows = _two_jobs(cells, f"pair-{run}/", "vit_l", "resnet50")
        if rows:
            lines += [
                "",
                f"## A pair that saturates the card, {run}",
                "",
                "ViT-L/16 of batch 32 back to back, and ResNet-50 of batch 1 with the higher priority, in "
                f"random intervals. Alone: {_alone(cells, f'pair-{run}-alone/')}.",
                *_table(_pair_head("ResNet-50", "ViT-L"), rows),
            ]
    return lines


# ------------------------------------------------------------------------------------------- the rest


def _checks(cells: Cells) -> list[str]:
    lines: list[str] = []
    for name, found in cells.get("check/solo", {}).items():
        texts = ", ".join(f"{stp:.3f}" for stp in found)
        lines.append(
            f"- STP of {name} alone, in windows after a first one (1 +- 0.02 wanted): {texts}."
        )
    energy = cells.get("check/energy")
    if energy:
        lines.append(
            f"- Energy over {energy['window_s']:.0f} s under load: {energy['counter_j']:.0f} J by the counter, "
            f"{energy['integrated_j']:.0f} J by integrated power ({_percent(energy['difference'])}; 5 % "
            f"wanted), {energy['samples_per_s']:.0f} samples a second."
        )
    kill = cells.get("check/kill")
    if kill:
        lines.append(
            f"- kill -9 of one model's process under {kill['mode']}: {kill['status']!r} after "
            f"{kill['after_s']:.1f} s; the other's {kill['others_n']} requests are there; MPS daemon gone: "
            f"{kill['daemon_gone']}; memory {kill['memory_before_mb']:.0f} MB before and "
            f"{kill['memory_after_mb']:.0f} MB after."
        )
    for name, each in cells.get("check/overhead", {}).items():
        lines.append(
            f"- {name}, eager: p50 {each['member_ms']:.3f} ms in a member's loop and {each['plain_ms']:.3f} ms "
            "in a plain one, by turns in one process (within 1 % or 0.15 ms wanted)."
        )
    jobs = [job for cell in cells.values() for job in cell.get("jobs", ())]
    ended, wrong = sum(job["ended"] for job in jobs), sum(job["wrong"] for job in jobs)
    lines.append(
        f"- Requests in all tables: {ended}. Answers that differ from the one that the model gave alone: "
        f"{wrong} (compared are each eager one, each captured one of 20 ms and more, and one in 256 of "
        "shorter ones)."
    )
    return ["", "## Checks", "", *lines]


def _prepared(cells: Cells) -> list[str]:
    rows = []
    seen = set()
    for key, cell in cells.items():
        for job in cell.get("prepared", ()):
            how = f"{job['runs']}, {cell['mode']}"
            if (how, job["name"]) in seen or not key.startswith(("mix/", "demo/", "pair-")):
                continue
            seen.add((how, job["name"]))
            rows.append(
                (
                    how,
                    job["name"],
                    f"{job['load_s']:.1f}",
                    _ms(job["exec_ms"]),
                    f"{job['boundaries']}",
                    _ms(job["boundary_ms"]),
                    job["note"],
                )
            )
    if not rows:
        return []
    head = ("how", "model", "load s", "exec ms", "boundaries", "longest between them ms", "note")
    return ["", "## Preparation", *_table(head, rows)]
