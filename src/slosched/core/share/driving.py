"""One turn of a brain and its lane: the shells of members and of virtual time call it."""

from __future__ import annotations

from collections.abc import Callable

from slosched.core.share.brain import ShareBrain
from slosched.core.share.interface import Lane, Start


def turn(brain: ShareBrain, lane: Lane, now: Callable[[], int]) -> None:
    """Tell `brain` what ended on `lane`, and carry out what it decides until it decides nothing more.

    `now` is read again after each step: an eager lane's start lasts as long as the request.
    """
    while True:
        now_ns = now()
        for ended in lane.poll(now_ns=now_ns):
            brain.ended(ended, now_ns=now_ns)
        effects = brain.schedule(now_ns=now_ns)
        if not effects:
            return
        for effect in effects:
            if isinstance(effect, Start):
                lane.start(effect, now_ns=now())
            else:
                brain.withdrawn(effect, lane.withdraw(effect), now_ns=now())
