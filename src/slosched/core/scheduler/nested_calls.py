"""What the controller keeps about one call of a function while it is not answered: chains.py uses it."""

from __future__ import annotations

from typing import Generic, TypeVar

R = TypeVar("R")  # a request
A = TypeVar("A")  # an action


class Nested(Generic[R, A]):
    """A call's place among calls, its children, and how it ran so far. Times in ns, on the controller's clock.

    A client's call has a `child` of -1 and a `depth` of 0; `root_id` is the request id of the client's call at
    the root. The parent had run for `asked_ran_ns` when it asked for the call.
    """

    __slots__ = (
        "action",
        "asked",
        "asked_ran_ns",
        "begin_ns",
        "child",
        "children",
        "depth",
        "near",
        "near_child",
        "part",
        "part_ns",
        "places",
        "prepares",
        "ran_ns",
        "root_id",
        "stuck_ticks",
        "suspended_at_ns",
        "suspended_ns",
    )

    def __init__(
        self,
        root_id: int,
        *,
        child: int = -1,
        depth: int = 0,
        near: str = "",
        near_child: int = -1,
        asked_ran_ns: int = 0,
    ) -> None:
        self.root_id, self.child, self.depth = root_id, child, depth
        self.asked_ran_ns = asked_ran_ns
        self.near, self.near_child = near, near_child
        self.action: A | None = None  # that it is in
        self.asked = 0  # children that it has asked for: the number of the next one
        self.children: dict[int, R] = {}  # by number: those that are not answered
        self.places: dict[int, int] = {}  # by number: the worker that a child was sent to last
        self.part = 0  # number of the part that runs, or runs next
        self.begin_ns = -1  # its first begin; -1: it is not known to have begun
        self.part_ns = -1  # when the part began that runs; -1: that is not known
        self.prepares = False  # its host part is not known to be over
        self.ran_ns = 0  # in all parts that are over
        self.suspended_at_ns = -1  # -1: it is not suspended
        self.suspended_ns = 0  # in all suspensions that are over
        self.stuck_ticks = 0  # while it is suspended, with nothing to wait for and a slot free

    @property
    def choosy(self) -> bool:
        """It should run near something."""
        return bool(self.near) or self.near_child >= 0

    def again(self) -> None:
        """Its action has ended without an answer: it begins from the start, with children of its own."""
        self.action = None
        self.prepares = False
        self.asked = self.part = self.ran_ns = self.suspended_ns = self.stuck_ticks = 0
        self.begin_ns = self.part_ns = self.suspended_at_ns = -1
        self.children, self.places = {}, {}
