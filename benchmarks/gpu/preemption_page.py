"""preemption.md from what gpu_preemption.py measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slosched.units import NS_PER_MS, NS_PER_US

#: What is committed.
RESULTS = Path(__file__).resolve().parent.parent / "results" / "gpu_preemption.json"
PAGE = Path(__file__).resolve().parent / "preemption.md"
#: Wanted: p99 at most the one alone + the segments in flight + this.
SPARE_NS = 200 * NS_PER_US


def table(found: Mapping[str, Any]) -> str:
    lines = [
        "| long model | how | urgent p50 / p99 ms | wanted | long alone ms | slower | wanted | interrupted |",
        "| :-- | :-- | --: | --: | --: | --: | --: | --: |",
    ]
    for name, row in found["models"].items():
        if "answers" not in row:
            lines.append(f"| {name} | {row['failed']} | | | | | | |")
            continue
        lines.append(f"| {name} | urgent alone | {_ms(row['alone'])} | | | | | |")
        lines.append(f"| {name} | priority streams alone | {_ms(row['streams'])} | | | | | |")
        for in_flight in (1, 2):
            each = row[f"in_flight_{in_flight}"]
            tuned = " (tuned)" if row["tuned_in_flight"] == in_flight else ""
            lines.append(
                f"| {name} | {row['segments']} segments of at most {row['longest_segment_ns'] / 1e6:.3f} ms, "
                f"{in_flight} in flight{tuned} | {_ms(each)} | <= {each['p99_wanted_at_most_ns'] / 1e6:.3f} | "
                f"{each['run_ns'] / 1e6:.3f} (whole {each['whole_ns'] / 1e6:.3f}) | {each['slower']:+.2%} | "
                f"<= {row['slower_wanted_at_most']:.0%} | {each['interrupted']} |"
            )
    return "\n".join(lines)


def answers_table(found: Mapping[str, Any]) -> str:
    lines = [
        "| long model | answers compared | urgent ones | wrong | runs interrupted | different answers |",
        "| :-- | --: | --: | --: | --: | --: |",
    ]
    for name, row in found["models"].items():
        if "answers" in row:
            of = row["answers"]
            lines.append(
                f"| {name} | {of['long']:,} | {of['urgent']:,} | {of['wrong']} | {of['interrupted']} | "
                f"{of['different_answers']} |"
            )
    return "\n".join(lines)


def page(found: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    return f"""# Urgent inferences beside a long model on one GPU

Written by [gpu_preemption.py](gpu_preemption.py), which [preemption.sh](preemption.sh) runs. An urgent
ResNet-50 of batch 1 arrives at random while ResNet-50 of batch 64 or ViT-L/16 of batch 32 runs back to back
(float16, on the worker's own device, no worker's loop). Latency counts from the arrival to the noticed end. The
wanted p99 is the one alone, the segments in flight and {SPARE_NS / NS_PER_MS:g} ms. *Slower* is the long model
alone in segments, beside whole graphs measured before and after. *Priority streams alone*: whole graphs of both
on two streams of different priority.

{table(found)}

Answers, byte for byte those of the same program when it runs alone, which are compared with plain execution:

{answers_table(found)}

What preparing said:

{chr(10).join(f"    {note}" for note in found["notes"])}

*{found["measured_on"]}. {found["seconds"]:.0f} s in all.*
"""


def _ms(row: dict[str, Any]) -> str:
    return f"{row['p50'] / 1e6:.3f} / {row['p99'] / 1e6:.3f}"
