"""Durations as people write them, and as the program keeps them.

Inside the program every time is an integer number of nanoseconds in a name that ends in ``_ns``.
People write ``5ms``, ``2.9ms`` or ``30s``. A bare number is in seconds for every option and argument;
Clockwork's positional options of the controller and the TOML files have nanoseconds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from decimal import Decimal

from slosched.errors import InvalidConfig, InvalidDuration

NS_PER_US = 1_000
NS_PER_MS = 1_000_000
NS_PER_S = 1_000_000_000

_UNITS_NS = {
    "ns": 1,
    "us": NS_PER_US,
    "\u00b5s": NS_PER_US,  # the micro sign, and the Greek mu that other keyboards write
    "\u03bcs": NS_PER_US,
    "ms": NS_PER_MS,
    "s": NS_PER_S,
    "m": 60 * NS_PER_S,
    "min": 60 * NS_PER_S,
    "h": 3600 * NS_PER_S,
}
_EXACT_UNITS = ("ns", "us", "ms", "s", "h")
_DURATION = re.compile(
    r"^\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([a-z\u00b5\u03bc]*)\s*$"
)

_FULL_NAMES = {"ns": "nanoseconds", "s": "seconds"}
#: Nothing here is timed in less: a shorter duration is a number that was meant in another unit.
_SHORTEST_NS = NS_PER_US


def parse_duration_ns(
    text: str, *, bare_unit: str, shortest_ns: int = _SHORTEST_NS, most_bare_s: int = 10**6
) -> int:
    """Return the duration that `text` writes, in nanoseconds.

    `bare_unit` is the unit of a number that carries none: "ns" or "s".
    Raises InvalidDuration for anything else, for negative values and for values past 2**63 ns, and
    for what was hardly meant: a duration above 0 and below `shortest_ns`, or more than `most_bare_s`
    seconds without a unit.
    """
    match = _DURATION.match(text)
    if match is None:
        raise InvalidDuration(f"{text!r} is not a duration; write it as 5ms, 2.9ms, 250us or 30s")
    number, unit = match.groups()
    scale = _UNITS_NS.get(unit or bare_unit)
    if scale is None:
        known = ", ".join(_UNITS_NS)
        raise InvalidDuration(f"{text!r} has the unknown unit {unit!r}; units are {known}")
    try:
        given = Decimal(number)
        value = given * scale
    except ArithmeticError:  # an exponent that decimals do not have
        raise InvalidDuration(f"{text!r} is not a duration: its exponent is too large") from None
    if value < 0:
        raise InvalidDuration(f"{text!r} is negative; a duration is at least 0")
    if value >= 2**63:
        raise InvalidDuration(f"{text!r} is too long to count in 64-bit nanoseconds")
    full = _FULL_NAMES.get(bare_unit, bare_unit)
    assumed = "" if unit else f" (a number without a unit is in {full} here)"
    if given and value < shortest_ns:
        raise InvalidDuration(
            f"{text!r} is {value:.3g} nanoseconds{assumed}, less than {format_duration(shortest_ns)}; "
            f"write the unit that you mean: {number}ms or {number}s"
        )
    if not unit and value > most_bare_s * NS_PER_S:
        raise InvalidDuration(
            f"{text!r} would be {number} {full}{assumed}; write the unit: {number}ns, or {number}s if "
            "that is meant"
        )
    return int(value.to_integral_value())


def has_unit(text: str) -> bool:
    """True if `text` is a number with a unit behind it ("10ms"), so no bare number."""
    match = _DURATION.match(text)
    return match is not None and bool(match.group(2))


def format_duration(duration_ns: int | float) -> str:
    """Return a short human-readable form: 2.9ms, 250us, 30s. Three significant digits at most."""
    if math.isnan(duration_ns):
        return "-"
    magnitude = abs(duration_ns)
    for unit, scale in (("s", NS_PER_S), ("ms", NS_PER_MS), ("us", NS_PER_US)):
        if magnitude >= scale:
            value = duration_ns / scale
            text = f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
            return f"{text}{unit}"
    return f"{duration_ns:.0f}ns"


def exact_duration(duration_ns: int) -> str:
    """The duration in the largest unit that it is a whole number of, at least 1: 48h, 100ms, 250us."""
    for unit, scale in reversed(_UNITS_NS.items()):
        if unit in _EXACT_UNITS and duration_ns and duration_ns % scale == 0:
            return f"{duration_ns // scale}{unit}"
    return f"{duration_ns}ns"


def format_share(share: float, digits: int = 2) -> str:
    """Return a share in per cent, "98.80 %", rounded down: 100.00 % is all of them, and a target that was
    missed by little does not look as if it were reached. The one rule for what was in time; NaN is "-"."""
    if math.isnan(share):
        return "-"
    scale = 10**digits
    # The product of a share such as 0.57 may lie just below the number that is meant.
    return f"{math.floor(100 * scale * share + 1e-9) / scale:.{digits}f} %"


_ITEM_BYTES = {
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "int8": 1,
    "uint8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "bool": 1,
}


def tensor_bytes(shape: Sequence[int], dtype: str) -> int:
    """Bytes of one tensor of `shape` and `dtype` (numpy's names); 0 for an unknown dtype."""
    return math.prod(shape) * _ITEM_BYTES.get(dtype, 0)


def exact_bytes(size: int) -> str:
    """The size in the largest unit that it is a whole number of, at least 1: 8GiB, 16MiB; else in bytes."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if size and size % 1024**power == 0:
            return f"{size // 1024**power}{unit}"
    return str(size)


def parse_bytes(text: str) -> int:
    """Return a size in bytes from 1024, 512MiB, 21.5GiB, 16MB. Raises InvalidConfig."""
    match = re.match(r"^\s*(\d+\.?\d*)\s*([KMGT]i?)?B?\s*$", text)
    if match is None:
        raise InvalidConfig(f"{text!r} is not a size; write it as 512MiB or 21.5GiB")
    number, unit = match.groups()
    if len(number) > 40:
        raise InvalidConfig(f"{text[:40]!r}... is too large for a size")
    if not unit:
        return int(Decimal(number))
    power = "KMGT".index(unit[0]) + 1
    base = 1024 if unit.endswith("i") else 1000
    return int(Decimal(number) * base**power)
