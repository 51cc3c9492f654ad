"""The texts of parameters, read and checked. An error names the parameter and what it takes."""

from __future__ import annotations

import math

from slosched.errors import InvalidConfig, InvalidDuration
from slosched.units import NS_PER_S, format_duration, has_unit, parse_duration_ns

#: Limit of instances, streams or outstanding requests; a larger number is a slip.
MAX_COUNT = 100_000
_MAX_RATE = 1e9
#: Limit of an SLO, in batch-1 times; a longer one is a slip: an exec time of hours still fits 64 bits of ns.
MAX_SLO_FACTOR = 1e9
_MAX_PERIOD_NS = 10**6 * NS_PER_S


def read_integer(name: str, text: str) -> int:
    """Return a whole number."""
    try:
        return int(text)
    except ValueError:
        raise InvalidConfig(f"{name} must be a whole number, not {text!r}") from None


def read_number(name: str, text: str) -> float:
    """Return a number, of any size."""
    try:
        return float(text)
    except ValueError:
        raise InvalidConfig(f"{name} must be a number, not {text!r}") from None


def read_count(name: str, text: str, *, low: int = 1, high: int = MAX_COUNT) -> int:
    """Return a whole number within `low`..`high`."""
    count = read_integer(name, text)
    if not low <= count <= high:
        raise InvalidConfig(f"{name} must be within {low}..{high}, not {text}")
    return count


def read_positive(name: str, text: str, *, high: float = math.inf) -> float:
    """Return a finite number above 0 and at most `high`."""
    value = read_number(name, text)
    if not 0 < value <= high or not math.isfinite(value):
        limit = "a finite number > 0" if math.isinf(high) else f"above 0 and at most {high:g}"
        raise InvalidConfig(f"{name} must be {limit}, not {text}")
    return value


def read_rate(name: str, text: str, *, zero: bool = False) -> float:
    """Return requests/s, at most 1e9. 0 is one only where `zero` says so."""
    if zero and read_number(name, text) == 0:
        return 0.0
    return read_positive(name, text, high=_MAX_RATE)


def read_flag(name: str, text: str) -> bool:
    """Return yes or no: 1 or 0, true or false."""
    try:
        return {"1": True, "true": True, "0": False, "false": False}[text.lower()]
    except KeyError:
        raise InvalidConfig(f"{name} must be 1 or 0, not {text!r}") from None


def _duration_ns(name: str, text: str, bare_unit: str) -> int:
    try:
        return parse_duration_ns(text, bare_unit=bare_unit)
    except InvalidDuration as error:
        raise InvalidDuration(f"{name}: {error}") from None


def read_period(name: str, text: str, *, low_ns: int = 1) -> int:
    """Return ns of a duration from `low_ns` to 10^6 s; a bare number is in seconds."""
    period_ns = _duration_ns(name, text, "s")
    if 0 < period_ns < low_ns:
        raise InvalidConfig(f"{name} must be at least {format_duration(low_ns)}, not {text!r}")
    if not 0 < period_ns <= _MAX_PERIOD_NS:
        raise InvalidConfig(f"{name} must be above 0 and at most 10^6 s, not {text!r}")
    return period_ns


def read_wait(name: str, text: str) -> int:
    """Return ns of a duration of at most 10^6 s; a bare number is in seconds."""
    wait_ns = _duration_ns(name, text, "s")
    if wait_ns > _MAX_PERIOD_NS:
        raise InvalidConfig(f"{name} must be at most 10^6 s, not {text!r}")
    return wait_ns


def read_slo(name: str, text: str) -> tuple[float, int]:
    """Return (factor, ns): a multiple of the exec time ("2.9"), a duration ("10ms"), or "0".

    (0.0, 0) is the controller's default.
    """
    if has_unit(text):
        slo_ns = _duration_ns(name, text, "ns")
        if slo_ns < 1:
            raise InvalidConfig(f"{name} must be above 0, or 0 for the controller's default")
        return 0.0, slo_ns
    try:
        factor = float(text)
    except ValueError:
        factor = math.nan
    if factor > MAX_SLO_FACTOR:
        raise InvalidConfig(
            f"{name} must be at most {MAX_SLO_FACTOR:g} times the exec time, not {text}"
        )
    if not factor >= 0:
        raise InvalidConfig(
            f"{name} must be a multiple of the exec time (2.9), a duration (10ms) or 0, the "
            f"controller's default, not {text!r}"
        )
    return factor, 0


def read_model(name: str, text: str) -> str:
    """Return a model's name."""
    if not text.strip():
        raise InvalidConfig(f"{name}: the model's name is empty")
    return text
