"""Workloads: which requests are due when. Pure, and the same for live and simulated runs.

A workload is a file with a parser of its command-line texts and an entry in `WORKLOADS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from slosched.errors import UnknownName
from slosched.workloads.slo_exp_1 import NAME as _SLO_EXP_1
from slosched.workloads.slo_exp_1 import SloExp1, parse_slo_exp_1

#: Any workload that there is; a later one joins with "|".
Workload = SloExp1

#: By name, what turns a workload's positional texts into the workload.
WORKLOADS: dict[str, Callable[[Sequence[str]], Workload]] = {_SLO_EXP_1: parse_slo_exp_1}


def parse_workload(name: str, args: Sequence[str]) -> Workload:
    """Return the workload `name` with `args`. Raises UnknownName, and what its parser raises."""
    try:
        parse = WORKLOADS[name]
    except KeyError:
        raise UnknownName("workload", name, list(WORKLOADS)) from None
    return parse(args)
