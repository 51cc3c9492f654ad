"""From the texts of the command line to values: durations, addresses, flags.

Each function raises InvalidConfig (or a class below it) that names the option and what it takes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

from slosched.config import CONTROLLER_PORT, WORKER_PORT, WeightRule
from slosched.errors import InvalidConfig, InvalidDuration
from slosched.units import parse_bytes, parse_duration_ns

#: A machine has at most 65535 ports; a longer range is a typing error that would open many sockets.
#: Nor does anybody measure more batch sizes than that.
_MAX_RANGE = 1024
_ADDRESS = re.compile(
    r"^(?P<host>[A-Za-z0-9_.\-]+|\[[0-9A-Fa-f:.]+\]):(?P<first>\d+)(?:-(?P<last>\d+))?$"
)

_NUMBERS = re.compile(r"^(\d{1,9})(?:-(\d{1,9}))?$")

#: Before the SLO of a class of requests that has a weight.
_SLO_CLASS = "slo<="

LOCAL_CONTROLLER = f"127.0.0.1:{CONTROLLER_PORT}"


def given(**values: object) -> dict[str, Any]:
    """Return the values that are not None: what the user wrote, to lay over what a file says."""
    return {name: value for name, value in values.items() if value is not None}


def duration_ns(option: str, text: str, *, bare_unit: str = "ns") -> int:
    """Return a duration above 0 in ns. `option` is named in the error."""
    try:
        value_ns = parse_duration_ns(text, bare_unit=bare_unit)
    except InvalidDuration as error:
        raise InvalidDuration(f"{option}: {error}") from None
    if value_ns < 1:
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


def library_names(text: str) -> tuple[str, ...]:
    """The names of "torchvision,timm"; WorkerConfig checks them."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


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
    return _ADDRESS.match(text) is not None


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
        match = _ADDRESS.match(part)
        if match is None:
            raise InvalidConfig(
                f"{part!r} is not a host:port; write workers as host:{WORKER_PORT}, "
                f"host:{WORKER_PORT}-{WORKER_PORT + 3} or a comma-separated list of these"
            )
        first = int(match["first"])
        last = int(match["last"] or first)
        if not 1 <= first <= last <= 65535:
            raise InvalidConfig(f"{part!r}: ports are within 1..65535, in ascending order")
        if last - first >= _MAX_RANGE:
            raise InvalidConfig(f"{part!r} names more than {_MAX_RANGE} ports")
        addresses += [f"{match['host']}:{port}" for port in range(first, last + 1)]
    for index, address in enumerate(addresses):
        if address in addresses[:index]:
            raise InvalidConfig(f"the worker {address} is named twice")
    return tuple(addresses)


def weight_rules(option: str, text: str) -> tuple[WeightRule, ...]:
    """The weights of "batch-*=0.2,slo<=10ms=2": a pattern of clients' names, or a class of SLOs, each."""
    rules: list[WeightRule] = []
    for part in text.split(","):
        whom, equals, number = part.strip().rpartition("=")
        try:
            if not (equals and whom):
                raise InvalidConfig("write it as NAME=WEIGHT or slo<=DURATION=WEIGHT")
            weight = float(number)
            if whom.startswith(_SLO_CLASS):
                slo_max_ns = duration_ns("the SLO", whom.removeprefix(_SLO_CLASS))
                rules.append(WeightRule(weight, slo_max_ns=slo_max_ns))
            else:
                rules.append(WeightRule(weight, client=whom))
        except InvalidConfig as error:
            raise InvalidConfig(f"{option} {part.strip()!r}: {error}") from None
        except ValueError:
            raise InvalidConfig(f"{option} {part.strip()!r}: {number!r} is not a number") from None
    return tuple(rules)


def weights_text(rules: Sequence[WeightRule]) -> str:
    """What `weight_rules` reads."""
    return ",".join(
        f"{rule.client or f'{_SLO_CLASS}{rule.slo_max_ns}ns'}={rule.weight!r}" for rule in rules
    )


def inputs_enabled(option: bool | None) -> bool:
    """Return whether clients send inputs: the option, else CLOCKWORK_DISABLE_INPUTS, else True.

    As in Clockwork, exactly "1" in the environment turns them off.
    """
    if option is not None:
        return option
    return os.environ.get("CLOCKWORK_DISABLE_INPUTS", "") != "1"
