"""How a stage of a request ended, and what a request may be answered with already."""

from __future__ import annotations

from typing import NamedTuple

from slosched.core.values import Value


class BestAnswer(NamedTuple):
    """What a request is answered with when the rest no longer fits: the output of an earlier stage."""

    output: Value | None
    stage: int


class StageEnd(NamedTuple):
    """What `after` is told: when the stage ended, its output, and the scalars that its result carries."""

    now_ns: int
    output: Value | None
    scalars: tuple[float, ...] = ()
