"""One turn of a brain and its lane: the shells of members and of virtual time call it."""

from __future__ import annotations

from collections.abc import Callable

from slosched.core.share.brain import ShareBrain
from slosched.core.share.interface import Lane, Start


def turn(brain: ShareBrain, lane: Lane, now: Callable[[], int]) -> None:
    """Call `step` until there is nothing more to do now: for lanes on which time does not pass in a start."""
    while step(brain, lane, now):
        pass


def step(brain: ShareBrain, lane: Lane, now: Callable[[], int]) -> bool:
    """Tell `brain` what ended on `lane`, and carry out what it decides. False if it decided nothing.

    `now` is read again for each effect: an eager lane's start lasts as long as the request.
    """
    now_ns = now()
    for ended in lane.poll(now_ns=now_ns):
        brain.ended(ended, now_ns=now_ns)
    effects = brain.schedule(now_ns=now_ns)
    for effect in effects:
        if isinstance(effect, Start):
            lane.start(effect, now_ns=now())
        else:
            brain.withdrawn(effect, lane.withdraw(effect), now_ns=now())
    return bool(effects)
