"""What may follow a stage of a request: the nouns of stages.py and of cascades."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from slosched.codes import Verdict
from slosched.core.scheduler.state import Queue


class Reply(Enum):
    """How a request is answered when it goes no further."""

    OUTPUT = "the output of the stage that ended"
    BEST = "its best answer so far"


class GoOn(NamedTuple):
    """The request goes on in `queue`, its next stage.

    `keeps_output`: the output of the stage that ended is its best answer from now on. `passes_output`: that
    output, and not the request's own input, is the input of the next stage.
    """

    queue: Queue
    keeps_output: bool = True
    passes_output: bool = False


class Judgement(NamedTuple):
    """What follows a stage of a cascade, and why. `score` and `threshold` are -1 where no judge was asked."""

    follows: Reply | GoOn
    verdict: Verdict
    score: float = -1.0
    threshold: float = -1.0


#: What an `After` (state.py) says.
Follows = Reply | GoOn | Judgement
