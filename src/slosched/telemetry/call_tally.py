"""What the controller counts of calls of functions, by function. Nothing is called without functions.

A child may ask for a function of any name, so the names are bounded: what comes under a further one counts
under `OTHERS`.
"""

from __future__ import annotations

from typing import Any

from slosched.codes import code_name
from slosched.core.scheduler.interface import CallRecord

#: Names that are counted apart, and that of all others.
MOST_FUNCTIONS = 1_000
OTHERS = "(others)"


class FunctionTally:
    """Calls of one function that ended, by code. Times in ns.

    `began` counts those that ran at all: `ran_ns` is their time in a slot, `suspended_ns` that between two
    parts, `waited_ns` that from arrival to begin. `cold` ones waited for a load. `children` is the number that
    they asked for.
    """

    __slots__ = (
        "began",
        "by_code",
        "children",
        "cold",
        "in_bytes",
        "out_bytes",
        "ran_ns",
        "suspended_ns",
        "waited_ns",
    )

    def __init__(self) -> None:
        self.by_code: dict[int, int] = {}
        self.began = self.cold = self.children = 0
        self.ran_ns = self.suspended_ns = self.waited_ns = 0
        self.in_bytes = self.out_bytes = 0

    @property
    def calls(self) -> int:
        return sum(self.by_code.values())

    def add(self, record: CallRecord) -> None:
        code = int(record.code)
        self.by_code[code] = self.by_code.get(code, 0) + 1
        self.children += record.children
        self.in_bytes += record.in_bytes
        self.out_bytes += record.out_bytes
        if record.start_ns >= 0:
            self.began += 1
            self.cold += record.cold
            self.ran_ns += record.exec_ns
            self.suspended_ns += record.suspended_ns
            self.waited_ns += max(0, record.start_ns - record.arrival_ns)

    def as_dict(self) -> dict[str, Any]:
        """Plain values; `codes` by name."""
        return {
            "calls": self.calls,
            "codes": {code_name(code): n for code, n in sorted(self.by_code.items())},
            "began": self.began,
            "cold": self.cold,
            "children": self.children,
            "ran_ns": self.ran_ns,
            "suspended_ns": self.suspended_ns,
            "waited_ns": self.waited_ns,
            "in_bytes": self.in_bytes,
            "out_bytes": self.out_bytes,
        }


class CallTally:
    """Fed with every call that ended. `functions` is by name, in the order in which their first calls ended."""

    __slots__ = ("functions",)

    def __init__(self) -> None:
        self.functions: dict[str, FunctionTally] = {}

    def add(self, record: CallRecord) -> None:
        """Count one call that ended, well or not."""
        name = record.function
        tally = self.functions.get(name)
        if tally is None:
            if len(self.functions) >= MOST_FUNCTIONS:
                name = OTHERS
            tally = self.functions.setdefault(name, FunctionTally())
        tally.add(record)

    def report(self) -> dict[str, Any]:
        """Plain values by name of the function; {} without any."""
        return {name: tally.as_dict() for name, tally in sorted(self.functions.items())}
