"""A value that changes by a factor or a summand each period, until it would pass its end.

Clockwork's AdjustSLO, AdjustRate and AdjustScaleFactor: the end itself is included.
"""

from __future__ import annotations

import math
from decimal import Context, Decimal

from slosched.errors import InvalidConfig, UnknownName

OPERATORS = ("mul", "add")
_MAX_STEPS = 10_000
#: Own precision, so that a caller's decimal context cannot move a step.
_DECIMAL = Context(prec=50)
#: An end that is written as a rounded number ("86.497558") still counts as reached.
_END_SLACK = Decimal("1.000000001")


def check_progression(
    start: float,
    end: float,
    change: float,
    operator: str,
    *,
    names: tuple[str, str, str, str],
) -> None:
    """Raise InvalidConfig (UnknownName for the operator) for values that mean nothing or never end.

    `names` are those of the four values, for the message: ("slo-start", "slo-end", ...).
    """
    start_name, end_name, change_name, operator_name = names
    if operator not in OPERATORS:
        raise UnknownName(operator_name, operator, list(OPERATORS))
    for name, value in zip(names[:3], (start, end, change), strict=True):
        if not math.isfinite(value) or value <= 0:
            raise InvalidConfig(f"{name} must be a finite number > 0, not {value:g}")
    if end < start:
        raise InvalidConfig(f"{end_name} is below {start_name}: the sweep would have no step")
    if operator == "mul" and change <= 1:
        raise InvalidConfig(
            f"{change_name} must be above 1 with {operator_name} mul, not {change:g}: "
            f"the sweep would never pass {end_name}"
        )
    progression(start, end, change, operator, change_name=change_name)


def progression(
    start: float, end: float, change: float, operator: str, *, change_name: str = "the change"
) -> tuple[Decimal, ...]:
    """Every value from `start` to `end`. In Decimal 0.1 + 0.1 + 0.1 reaches 0.3: the end holds.

    Raises InvalidConfig for more than 10,000 values.
    """
    value, last, step = (Decimal(str(v)) for v in (start, end, change))
    limit = _DECIMAL.multiply(last, _END_SLACK)
    apply = _DECIMAL.multiply if operator == "mul" else _DECIMAL.add
    values: list[Decimal] = []
    while value <= limit:
        if len(values) == _MAX_STEPS:
            raise InvalidConfig(
                f"the sweep has more than {_MAX_STEPS} steps; take a larger {change_name}"
            )
        values.append(value)
        value = apply(value, step)
    return tuple(values)
