"""Fault plans from TOML files: [[fault]] tables, as FaultPlan.toml writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slosched.errors import InvalidConfig, SloschedError
from slosched.sim.faults import KINDS, Fault, FaultPlan
from slosched.text_files import read_toml
from slosched.units import parse_duration_ns

_TIMES = ("at", "for", "by")
_NUMBERS = ("probability", "factor")


def load_plan(path: str | Path) -> FaultPlan:
    """Return the plan in the file at `path`. Times are texts such as "2.5s"; `by` of a jump may be "-3ms".

    Raises InvalidConfig with the file and the line of the fault that is wrong.
    """
    file = Path(path)
    text, document = read_toml(file, "the fault plan")
    seed, tables = document.pop("seed", 0), document.pop("fault", [])
    if document:
        raise InvalidConfig(f"{file}: {', '.join(document)}: a plan has only seed and [[fault]]")
    if type(seed) is not int or seed < 0:
        raise InvalidConfig(f"{file}: seed must be a whole number of at least 0, not {seed!r}")
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise InvalidConfig(f"{file}: write each fault as a table [[fault]]")
    lines = [n for n, line in enumerate(text.splitlines(), 1) if line.strip() == "[[fault]]"]
    faults = []
    for index, table in enumerate(tables):
        try:
            faults.append(_fault(table))
        except SloschedError as error:
            where = f", line {lines[index]}" if index < len(lines) else f", fault {index + 1}"
            raise InvalidConfig(f"{file}{where}: {error}") from None
    return FaultPlan(tuple(faults), seed)


def _fault(table: dict[str, Any]) -> Fault:
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key in ("kind", "target"):
            if not isinstance(value, str):
                raise InvalidConfig(f"{key} must be a text, not {value!r}")
            values[key] = value
        elif key in _TIMES:
            values[f"{key}_ns"] = _time_ns(key, value)
        elif key in _NUMBERS:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise InvalidConfig(f"{key} must be a number, not {value!r}")
            values[key] = float(value)
        else:
            known = ", ".join(("kind", "target", *_TIMES, *_NUMBERS))
            raise InvalidConfig(f"a fault has no {key}; it may have {known}")
    for key in ("kind", "target"):
        if key not in values:
            raise InvalidConfig(f"{key} is missing; kinds are {', '.join(KINDS)}")
    if "at_ns" not in values:
        raise InvalidConfig('at is missing: when it begins, such as at = "2.5s"')
    return Fault(**values)


def _time_ns(key: str, value: object) -> int:
    if not isinstance(value, str):
        raise InvalidConfig(f'{key} must be a text such as "2.5s", not {value!r}')
    text = value.strip()
    sign = -1 if key == "by" and text.startswith("-") else 1
    # The fuzzer writes its cases in ns, and a clock may be off by less than 1 us.
    return sign * parse_duration_ns(
        text.removeprefix("-") if sign < 0 else text, bare_unit="s", shortest_ns=0
    )
