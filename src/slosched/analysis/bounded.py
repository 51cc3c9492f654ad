"""Policies held against the bounds: the same requests, from the client logs of their runs.

A bound counts the requests that are sent in the first part of each step (its span). So do these shares,
judged by the controller, from the arrival there: that is the deadline which a scheduler knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slosched.analysis.drawn import columns_text
from slosched.errors import InvalidConfig
from slosched.telemetry.client_log import FILE_NAME, read_client_log
from slosched.units import format_duration


@dataclass(frozen=True)
class Held:
    """One policy in one step: its share in time of the span's requests, and that over the bounds.

    `of_upper` over the least upper bound, `of_achievable` over the clairvoyant schedule's share; None
    where the bound is 0.
    """

    policy: str
    step: int
    share: float
    of_achievable: float | None
    of_upper: float | None


def hold_against(
    run_dirs: Mapping[str, Path], bounds: Sequence[Mapping[str, Any]], *, first_ns: int
) -> list[Held]:
    """`run_dirs` are the policies' runs on the bounds' arrivals. `bounds` are dicts of CellBounds.

    `first_ns` is when the first request is due, after the start. Raises MalformedLog, and InvalidConfig
    for a run that sent other requests.
    """
    found = []
    for policy, run_dir in run_dirs.items():
        log = read_client_log(run_dir / FILE_NAME, only=("scheduled_ns", "deadline_met"))
        scheduled = log["scheduled_ns"]
        offsets = scheduled - (scheduled.min() if len(scheduled) else 0) + first_ns
        for bound in bounds:
            inside = offsets >= bound["start_ns"]
            inside &= offsets < bound["start_ns"] + bound["span_ns"]
            sent = int(inside.sum())
            if sent != bound["requests"]:
                raise InvalidConfig(
                    f"{run_dir} sent {sent} requests in the first part of step {bound['slo']}, the bound "
                    f"is for {bound['requests']}: it is not a run of this workload, or not complete"
                )
            share = int(log["deadline_met"][inside].sum()) / sent
            found.append(
                Held(
                    policy,
                    bound["index"],
                    share,
                    _share_of(share, bound["achievable"]),
                    _share_of(share, bound["best_upper"]),
                )
            )
    return found


def _share_of(share: float, bound: float) -> float | None:
    return share / bound if bound else None


def held_document(
    held: Sequence[Held], bounds: Sequence[Mapping[str, Any]], *, seed: int
) -> dict[str, Any]:
    """The bounds and what was held against them, for JSON."""
    return {
        "seed": seed,
        "judged": "by the controller, from the arrival there",
        "steps": list(bounds),
        "policies": [asdict(each) for each in held],
    }


def held_text(held: Sequence[Held], bounds: Sequence[Mapping[str, Any]]) -> str:
    """A table: for each step the bounds, then each policy with its ratios to them, in per cent."""
    headings = ["", "step", "deadline", "met %", "of achievable %", "of upper bound %"]
    rows: list[list[object]] = []
    for bound in bounds:
        place = [bound["slo"], format_duration(bound["slo_ns"]) if bound["slo_ns"] else "-"]
        upper, achievable = bound["best_upper"], bound["achievable"]
        rows.append(["upper bound", *place, _percent(upper), "-", "-"])
        rows.append(
            [
                "achievable",
                *place,
                _percent(achievable),
                "-",
                _percent(_share_of(achievable, upper)),
            ]
        )
        rows += [
            [
                each.policy,
                *place,
                _percent(each.share),
                _percent(each.of_achievable),
                _percent(each.of_upper),
            ]
            for each in held
            if each.step == bound["index"]
        ]
    return columns_text(headings, rows)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"
