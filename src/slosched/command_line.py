"""A config as the command line of a child process: the options with which its command gets exactly that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slosched.cascade_spec import CascadeSpec
from slosched.config import WeightRule
from slosched.options import Row, rows

#: Before the SLO of a class of requests that has a weight.
SLO_CLASS = "slo<="

WEIGHTS = tuple[WeightRule, ...]
CASCADES = tuple[CascadeSpec, ...]


def command_rows(config: type) -> list[Row]:
    """The options of `config` that the command line has."""
    return [row for row in rows(config) if row.on_command_line]


def command_line(config: Any) -> list[str]:
    """The options with which a command gets exactly the options of `config`. A value of None is left out."""
    arguments: list[str] = []
    for row in command_rows(type(config)):
        value = getattr(config, row.field)
        if value in (None, ()):
            continue
        if row.plain is bool:
            on, _, off = row.argument.partition("/")
            arguments.append(on if value else off)
        else:
            arguments += [row.argument, _text(row, value)]
    return arguments


def weights_text(rules: Sequence[WeightRule]) -> str:
    """The weights as an option's text, which `weight_rules` of the command line reads."""
    return ",".join(
        f"{rule.client or f'{SLO_CLASS}{rule.slo_max_ns}ns'}={rule.weight!r}" for rule in rules
    )


def _text(row: Row, value: Any) -> str:
    """The text from which the command line makes `value` again."""
    if row.unit == "ns":
        return f"{value}ns"
    if row.plain == WEIGHTS:
        return weights_text(value)
    return ",".join(value) if isinstance(value, tuple) else str(value)
