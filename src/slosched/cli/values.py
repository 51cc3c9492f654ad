"""From the texts of the command line to values: durations, addresses, flags.

Each function raises InvalidConfig (or a class below it) that names the option and what it takes.
"""

from __future__ import annotations

import os
import re
from typing import Any

from slosched.addresses import parse_address
from slosched.cascade_spec import CascadeSpec
from slosched.command_line import SLO_CLASS
from slosched.config import CONTROLLER_PORT, WORKER_PORT, WeightRule
from slosched.errors import InvalidConfig, InvalidDuration
from slosched.units import parse_bytes, parse_duration_ns

#: The largest range that an option may name.
_MAX_RANGE = 1024
_NUMBERS = re.compile(r"^(\d{1,9})(?:-(\d{1,9}))?$")

#: Their bare numbers were nanoseconds up to version 0.1: a script that has one must not get an hour.
_ONCE_IN_NS = (
    "--schedule-ahead",
    "--default-slo",
    "--max-exec",
    "--latency",
    "--jitter",
    "--clock-offset",
    "--stall",
    "--grid",
    "the SLO",
)

LOCAL_CONTROLLER = f"127.0.0.1:{CONTROLLER_PORT}"


def given(**values: object) -> dict[str, Any]:
    """Return the values that are not None: what the user wrote, to lay over what a file says."""
    return {name: value for name, value in values.items() if value is not None}


def duration_ns(option: str, text: str, *, bare_unit: str = "s", may_be_0: bool = False) -> int:
    """Return a duration above 0 in ns. `option` is named in the error.

    A bare number is in seconds; Clockwork's positional options ask for "ns". For the options in
    `_ONCE_IN_NS`, a bare number of 1,000 s or more is refused.
    """
    try:
        value_ns = parse_duration_ns(
            text,
            bare_unit=bare_unit,
            most_bare_s=999 if option in _ONCE_IN_NS else 10**6,
        )
    except InvalidDuration as error:
        raise InvalidDuration(f"{option}: {error}") from None
    if value_ns < 1 and not may_be_0:
        raise InvalidDuration(f"{option}: {text!r} is too short; it must be above 0")
    return value_ns


def size_bytes(option: str, text: str) -> int:
    """Return a size in bytes ("21.5GiB", "512MiB")."""
    try:
        return parse_bytes(text)
    except (ValueError, InvalidConfig) as error:
        raise InvalidConfig(f"{option}: {error}") from None


def whole_number(option: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InvalidConfig(f"{option} must be a whole number, not {text!r}") from None


def whole_numbers(option: str, text: str, *, least: int = 1) -> tuple[int, ...]:
    """The numbers of "1,2,4" or "1-16,32", ascending, each once; from `least` up."""
    numbers: set[int] = set()
    for part in (part.strip() for part in text.split(",")):
        match = _NUMBERS.match(part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (-1, -1)
        if not least <= first <= last:
            raise InvalidConfig(
                f"{option} must be whole numbers from {least} up, or ranges, as 1,2,4 or 1-16, not {text!r}"
            )
        if last - first >= _MAX_RANGE:
            raise InvalidConfig(f"{option}: {part!r} names more than {_MAX_RANGE} numbers")
        numbers.update(range(first, last + 1))
    return tuple(sorted(numbers))


def numbers(option: str, text: str) -> tuple[float, ...]:
    """The numbers of "0.1,0.5,20%", in their order; 20% is 0.2."""
    try:
        return tuple(
            float(part.removesuffix("%")) / (100 if part.endswith("%") else 1)
            for part in names(text)
        )
    except ValueError:
        raise InvalidConfig(f"{option} must be numbers, as 0.1,0.5 or 20%, not {text!r}") from None


def names(text: str) -> tuple[str, ...]:
    """The names of "torchvision,timm"."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def scheduler_type(text: str, given_fidelity: str | None) -> tuple[str, dict[str, str]]:
    """The TYPE that `text` names, TYPE or TYPE:paper, and the option `fidelity` if either of the two says it.

    Raises UnknownName or ExtensionError for a TYPE that cannot be used, before anything else is looked at.
    """
    from slosched.core.scheduler.policies import POLICY_TYPES, type_and_fidelity

    type_, fidelity = type_and_fidelity(text)
    POLICY_TYPES.get(type_)
    if fidelity and given_fidelity and fidelity != given_fidelity:
        raise InvalidConfig(f"TYPE {text} and --fidelity {given_fidelity} contradict each other")
    either = fidelity or given_fidelity
    return type_, {"fidelity": either} if either else {}


def flag(option: str, text: str) -> bool:
    """Return a bool from the seed's form, 0 or 1, or from true/false, yes/no, on/off."""
    lowered = text.strip().lower()
    if lowered in ("1", "true", "yes", "on"):
        return True
    if lowered in ("0", "false", "no", "off"):
        return False
    raise InvalidConfig(f"{option} must be 0 or 1 (or true/false), not {text!r}")


def looks_like_address(text: str) -> bool:
    """True for "host:port" (and "host:first-last"), which no name of a command or workload is."""
    try:
        parse_address(text, ranges=True)
    except InvalidConfig as error:  # one with a wrong port is meant as one all the same
        return "ports" in str(error)
    return True


def one_address(text: str) -> str:
    """Return `text` if it is one host:port."""
    addresses = worker_addresses([text])
    if len(addresses) != 1:
        raise InvalidConfig(f"{text!r} names {len(addresses)} addresses; one host:port is wanted")
    return addresses[0]


def worker_addresses(texts: list[str]) -> tuple[str, ...]:
    """Expand "host:port,host:first-last" texts, in order. An address that is given twice is an error."""
    addresses: list[str] = []
    for part in (part.strip() for text in texts for part in text.split(",")):
        if not part:
            continue
        try:
            addresses += parse_address(part, ranges=True).texts()
        except InvalidConfig as error:
            if "ports" in str(error) or "brackets" in str(error):
                raise
            raise InvalidConfig(
                f"{error}; write workers as host:{WORKER_PORT}, host:{WORKER_PORT}-{WORKER_PORT + 3} or a "
                "comma-separated list of these"
            ) from None
    for index, address in enumerate(addresses):
        if address in addresses[:index]:
            raise InvalidConfig(f"the worker {address} is named twice")
    return tuple(addresses)


def cascades(text: str) -> tuple[CascadeSpec, ...]:
    """The cascades of a list with commas: built-in names and TOML files. Raises InvalidConfig, UnknownName."""
    from slosched.workloads.cascades import load_cascade

    return tuple(load_cascade(name) for name in names(text))


def weight_rules(option: str, text: str) -> tuple[WeightRule, ...]:
    """The weights of "batch-*=0.2,slo<=10ms=2": a pattern of clients' names, or a class of SLOs, each."""
    rules: list[WeightRule] = []
    for part in text.split(","):
        whom, equals, number = part.strip().rpartition("=")
        try:
            if not (equals and whom):
                raise InvalidConfig("write it as NAME=WEIGHT or slo<=DURATION=WEIGHT")
            weight = float(number)
            if whom.startswith(SLO_CLASS):
                slo_max_ns = duration_ns("the SLO", whom.removeprefix(SLO_CLASS))
                rules.append(WeightRule(weight, slo_max_ns=slo_max_ns))
            else:
                rules.append(WeightRule(weight, client=whom))
        except InvalidConfig as error:
            raise InvalidConfig(f"{option} {part.strip()!r}: {error}") from None
        except ValueError:
            raise InvalidConfig(f"{option} {part.strip()!r}: {number!r} is not a number") from None
    return tuple(rules)


def inputs_enabled(option: bool | None) -> bool:
    """Return whether clients send inputs: the option, else CLOCKWORK_DISABLE_INPUTS, else True.

    As in Clockwork, exactly "1" in the environment turns them off.
    """
    if option is not None:
        return option
    return os.environ.get("CLOCKWORK_DISABLE_INPUTS", "") != "1"
