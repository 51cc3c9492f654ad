"""Workloads: which requests are due when. Pure, and the same for live and simulated runs.

A workload is a file with a parser of its command-line texts and an entry in `WORKLOADS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from slosched.errors import InvalidConfig, UnknownName
from slosched.workloads import slo_exp_1
from slosched.workloads.slo_exp_1 import SloExp1, parse_slo_exp_1

#: Any workload that there is; a later one joins with "|".
Workload = SloExp1

#: By name, what turns a workload's positional texts into the workload.
WORKLOADS: dict[str, Callable[[Sequence[str]], Workload]] = {slo_exp_1.NAME: parse_slo_exp_1}

#: By name, the parameters that those texts are, in order.
PARAMETERS: dict[str, tuple[str, ...]] = {slo_exp_1.NAME: slo_exp_1.PARAMETERS}


def parse_workload(name: str, args: Sequence[str]) -> Workload:
    """Return the workload `name` with `args`. Raises UnknownName, and what its parser raises."""
    try:
        parse = WORKLOADS[name]
    except KeyError:
        raise UnknownName("workload", name, list(WORKLOADS)) from None
    return parse(args)


def workload_from_table(table: Mapping[str, object]) -> Workload:
    """Return the workload that a TOML table describes.

    `workload` is its name; the other keys are its parameters in lower case (`slo-start`), and their
    values what the command takes. Raises UnknownName for a name or key that nobody knows,
    InvalidConfig for a missing one, and what the workload's parser raises.
    """
    values = {key: str(value) for key, value in table.items()}
    name = values.pop("workload", "")
    if name not in WORKLOADS:
        raise UnknownName("workload", name, list(WORKLOADS))
    keys = [parameter.lower() for parameter in PARAMETERS[name]]
    for key in values:
        if key not in keys:
            raise UnknownName(f"key of {name}", key, keys)
    missing = [key for key in keys if key not in values]
    if missing:
        raise InvalidConfig(f"the workload {name} lacks {', '.join(missing)}")
    return parse_workload(name, [values[key] for key in keys])
