"""real_cascades.md: the page of real_cascades.py's results. Needs no GPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slosched.units import NS_PER_MS, NS_PER_S

RESULTS = Path(__file__).resolve().parent.parent / "results" / "real_cascades.json"
PAGE = Path(__file__).resolve().parent / "real_cascades.md"
#: The order of the page.
MODELS = (
    "diffusion/sd-turbo+judge",
    "diffusion/sdxs+judge",
    "diffusion/sd15",
    "diffusion/sdxl-lightning+judge",
    "diffusion/sdxl",
)
_HEAD = (
    "# Real cascades on one GPU\n"
    "\n"
    "Written by [real_cascades.py](real_cascades.py). Models are built from configs, with **random weights**; "
    "prompts are hashed or made up, **scores are replayed** by prompt and **FID is the published table's**. So "
    "times, violations and the equality of answers are measured, and quality is not."
)


def page(document: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    cells = document["cells"]
    models = {name: cells[key] for name in MODELS if (key := f"model/{name}") in cells}
    lines = [_HEAD, "", *(f"*{each}*" for each in document["runs"])]
    if models:
        lines += [*_times(models), *_predictions(models), *_answers(models)]
    if "live/setup" in cells:
        lines += _live(cells)
    lines += _missing(document, models)
    return "\n".join(lines) + "\n"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(headings)} |", f"| :-- |{' --: |' * (len(headings) - 1)}"]
    return ["", *lines, *(f"| {' | '.join(row)} |" for row in rows)]


def _ms(ns: float) -> str:
    return f"{ns / NS_PER_MS:.3g}" if ns < 1000 * NS_PER_MS else f"{ns / NS_PER_MS:.0f}"


def _percent(part: float | None) -> str:
    return "-" if part is None else f"{100 * part:+.2f}"


def _times(models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Parts of a pass by batch size, and the whole beside the published time."""
    rows = []
    for name, each in models.items():
        for place, (batch, exec_ns) in enumerate(each["exec_ns"].items()):
            parts = each.get("parts", {}).get(batch)
            published_ns = each["published_ns"].get(batch)
            rows.append(
                [
                    "" if place else f"{name.removeprefix('diffusion/')} ({each['steps']} steps)",
                    batch,
                    _ms(parts["begin_ns"]) if parts else "-",
                    _ms(each["step_ns"][batch]),
                    _ms(parts["finish_ns"]) if parts else "-",
                    _ms(exec_ns),
                    f"{int(batch) * NS_PER_S / exec_ns:.3g}",
                    _ms(published_ns) if published_ns else "-",
                    f"{published_ns / exec_ns:.2f}" if published_ns else "-",
                ]
            )
    headings = (
        "model",
        "batch",
        "begin ms",
        "step ms",
        "finish ms",
        "whole ms",
        "images/s",
        "A100 ms",
        "A100 / here",
    )
    text = (
        "One denoising step as a CUDA graph in float16; begin is the text encoder, the first latents and the "
        "copy of the weights, finish the VAE's decoder and, for a light model, the judge. The whole is "
        "predicted: begin + steps x step + finish. *A100 ms*: what DiffServe's artifact has, with 20 ms for "
        "the judge."
    )
    return ["", "## Times", "", text, *_table(headings, rows)]


def _predictions(models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Steps and whole passes beside what is predicted of them."""
    rows = []
    for name, each in models.items():
        batches = [*each.get("step_times", {}), *each.get("passes", {})]
        for batch in dict.fromkeys(batches):
            steps = each.get("step_times", {}).get(batch)
            passes = each.get("passes", {}).get(batch)
            rows.append(
                [
                    name.removeprefix("diffusion/"),
                    batch,
                    str(steps["n"]) if steps else "-",
                    _ms(steps["predicted_ns"]) if steps else "-",
                    *(
                        [_percent(steps[f"error_{which}"]) for which in ("p50", "p99", "worst")]
                        if steps
                        else ["-"] * 3
                    ),
                    str(len(passes["ns"])) if passes else "-",
                    _ms(passes["predicted_ns"]) if passes else "-",
                    _percent(passes["error_worst"]) if passes else "-",
                ]
            )
    headings = (
        "model",
        "batch",
        "steps",
        "predicted ms",
        "error p50 %",
        "p99 %",
        "worst %",
        "passes",
        "predicted ms",
        "worst error %",
    )
    text = (
        "Errors are measured / predicted - 1. Steps run back to back; passes are the worker's own, cut at each "
        "step so that they can be interrupted. The prediction has the copy of the weights in it, which the "
        "GPU skips where the same model ran before: some ms, so that short passes take less than predicted."
    )
    return ["", "## Prediction", "", text, *_table(headings, rows)]


def _answers(models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows = []
    for name, each in models.items():
        for batch, found in each.get("answers", {}).items():
            apart = found["apart_mean"]
            rows.append(
                [
                    name.removeprefix("diffusion/"),
                    batch,
                    str(found["images"]),
                    str(found["equal"]),
                    f"{found['worst']:.2g}",
                    f"{found['mean']:.2g}",
                    "-" if apart is None else f"{apart:.2g}",
                    str(found["beside_equal"]),
                    str(found["interrupted"]),
                ]
            )
    if not rows:
        return []
    headings = (
        "model",
        "batch",
        "images",
        "equal to a direct pass",
        "greatest difference",
        "mean difference",
        "mean between images",
        "equal when interrupted",
        "runs interrupted",
    )
    text = (
        "Images served by the graphs of steps beside a direct pass of the same module from the same seeds "
        "(pixels are 0 to 1; equal means every byte), and the same requests again while urgent runs interrupt "
        "them between steps and other programs run before the output is copied: those must equal what was "
        "served alone. *Mean between images* is how far apart images of different seeds are."
    )
    return ["", "## Answers", "", text, *_table(headings, rows)]


# ----------------------------------------------------------------------------------------- live


def _live(cells: Mapping[str, Any]) -> list[str]:
    setup = cells["live/setup"]
    runs = {
        key.removeprefix("live/"): row
        for key, row in cells.items()
        if key.startswith("live/") and key != "live/setup"
    }
    light, heavy = setup["programs"]
    times = "; ".join(
        f"{name} "
        + ", ".join(f"{batch}: {_ms(ns)}" for batch, ns in setup["times_ns"][stage].items())
        for stage, name in (("light", light), ("heavy", heavy))
    )
    text = (
        f"{light} before {heavy} on one GPU, in real processes: exec ms by batch size {times}. SLO "
        f"{setup['slo_ns'] / NS_PER_S:.3g} s: the published one, scaled as the heavy batch of 1. Trace "
        f"{setup['trace']}, the same for all; its peak is 0.9 of what the published plan is feasible for "
        "here. On one GPU that plan is all light. *Busy*: exec time over the length of the trace."
    )
    headings = (
        "policy",
        "requests",
        "violations %",
        "FID (table)",
        "FID (pessimistic)",
        "deferred %",
        "heavy %",
        "p50 ms",
        "p99 ms",
        "GPU busy %",
    )
    rows = []
    for name, row in runs.items():
        summary, latency = row["summary"], row["latency_ns"]
        rows.append(
            [
                name,
                str(summary["requests"]),
                _share(summary["violation_ratio"]),
                _digits(summary["fid"]),
                _digits(summary["pessimistic_fid"]),
                _share(summary["deferred_share"]),
                _share(None if summary["light_share"] is None else 1 - summary["light_share"]),
                _ms(latency["p50"]) if latency["p50"] else "-",
                _ms(latency["p99"]) if latency["p99"] else "-",
                _share(row["gpu"]["busy"]),
            ]
        )
    lines = ["", "## Served live", "", text, *_table(headings, rows)]
    for name, row in runs.items():
        if "note" in row:
            lines += ["", f"{name} was measured {row['note']}."]
    return [*lines, *_compared(runs)]


def _compared(runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows = []
    for name, row in runs.items():
        found = row["compared"]
        rows.append(
            [
                name,
                *(
                    cell
                    for stage in ("light", "heavy")
                    for cell in (
                        str(found[stage]),
                        f"{found[f'{stage}_mean']:.2g}" if found[stage] else "-",
                        f"{found[f'{stage}_worst']:.2g}" if found[stage] else "-",
                    )
                ),
                str(found["mixed"]),
            ]
        )
    headings = (
        "policy",
        "light answers",
        "mean difference",
        "greatest",
        "heavy answers",
        "mean difference",
        "greatest",
        "nearer to another's",
    )
    text = (
        "Answers to four prompts that were sent meanwhile, beside direct passes of batch 1. Batches of other "
        "sizes take other kernels, so they are near and not equal; an answer of another request would be "
        "nearer to that one's."
    )
    return ["", text, *_table(headings, rows)]


def _share(part: float | None) -> str:
    return "-" if part is None else f"{100 * part:.1f}"


def _digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


# -------------------------------------------------------------------------------------- missing


def _missing(document: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What was not run, and why; how long the rest took."""
    lines = [f"- {key}: {why}" for key, why in document["left_out"].items()]
    lines += [f"- {key} failed: {why}" for key, why in document["failed"].items()]
    lines += [
        f"- {name}: {', '.join(each['left_out'])}: no time was left"
        for name, each in models.items()
        if each["left_out"]
    ]
    took = [
        f"- {name}: prepared in {each['prepared_s']:.0f} s, {each['weights_bytes'] / 1e9:.2f} GB of weights"
        for name, each in models.items()
    ]
    found = ["", "## Not run", "", *lines] if lines else []
    return [*found, *(["", "## Preparation", "", *took] if took else [])]
