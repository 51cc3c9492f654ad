"""Long work in slices, so that no step of the controller holds its loop: requests must not wait for it.

A client that leaves may have 20,000 requests to be answered, a status report 10,000 instances. Such work is
a generator that says after each small part what it cost, in units of about a microsecond and a half. A step
does `A_STEP` of them, of all such work in turn, and asks to be woken at once for the rest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

#: Units in one step: about half a millisecond, with what the shell does for them.
A_STEP = 200
#: And as many with what policies spend (`Slices.spend`): they are left a part whatever else is under way.
A_STEP_IN_ALL = 250
#: Units of one answer: its reply, its record, and what the shell does with both.
ANSWER = 12
#: Units between two looks at what is left.
A_PART = 50

#: Each item is the cost of what was done since the last.
Work = Iterator[int]


class Slices:
    """The work that is under way. `renew` ends a step in which some was `done`.

    A policy whose loop may have thousands to do asks `spend` for each: a client that leaves then holds up
    no answer of the policy, and the policy no other work.
    """

    __slots__ = ("_again", "_left", "_spent", "done", "works")

    def __init__(self) -> None:
        self.works: deque[Work] = deque()  # what is not done yet
        self.done = False
        self._left, self._spent = A_STEP, 0
        self._again = False

    @property
    def under_way(self) -> bool:
        """Something is left for the next step, which should follow at once."""
        return bool(self.works) or self._again

    def begin(self, work: Work) -> None:
        """Do of `work` what this step has units for; if there is other work, in turn with that, later."""
        self.works.append(work)
        if len(self.works) == 1:
            self.go_on()

    def go_on(self) -> None:
        """Do what this step has units for."""
        works, self.done, self._again = self.works, True, False
        while works and self._left > 0:
            cost = next(works[0], None)
            if cost is None:
                works.popleft()
            else:
                self._left -= cost
                works.rotate(-1)

    def spend(self, cost: int) -> bool:
        """Take `cost` units for what the caller does next; False if none are left until the next step."""
        self.done = True
        if A_STEP - self._left + self._spent >= A_STEP_IN_ALL:
            self._again = True
            return False
        self._spent += cost
        return True

    def renew(self) -> None:
        """The step has ended: the next one has its own units."""
        self._left, self._spent = A_STEP, 0
        self.done = False
