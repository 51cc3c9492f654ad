"""Addresses as people write them: host:port, [IPv6]:port, and what a daemon listens on."""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple

from slosched.errors import InvalidConfig

_HOST = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.\-]*[A-Za-z0-9_.])?")
_ZONE = re.compile(r"[A-Za-z0-9_.\-]+")
#: A machine has at most 65535 ports; a longer range is a typing error that would open many sockets.
MOST_PORTS = 1024


class Address(NamedTuple):
    """One host and one or several of its ports. `host` is without brackets, `first` <= `last`."""

    host: str
    first: int
    last: int

    def texts(self) -> tuple[str, ...]:
        """host:port, or [host]:port of an IPv6 address, for each port."""
        host = bracketed(self.host)
        return tuple(f"{host}:{port}" for port in range(self.first, self.last + 1))


def is_ipv6(host: str) -> bool:
    """Whether a host, without brackets, is an IPv6 address. A name is none, whatever it stands for."""
    return ":" in host


def bracketed(host: str) -> str:
    """`host` in the form that precedes a port: an IPv6 address in brackets."""
    return f"[{host}]" if is_ipv6(host) else host


def parse_address(text: str, *, ranges: bool = False) -> Address:
    """Parse "host:port", and with `ranges` "host:first-last". Raises InvalidConfig."""
    if not isinstance(text, str):
        raise InvalidConfig(f"{text!r} is not a host:port; write it as a text, as 127.0.0.1:12346")
    host, colon, ports = text.rpartition(":")
    if not colon or not host or not ports:
        raise InvalidConfig(f"{text!r} is not a host:port")
    if ":" in host and "/" not in host and not host.startswith("["):
        raise InvalidConfig(
            f"{text!r} is not a host:port; an IPv6 address stands in brackets, as [::1]:12346"
        )
    first, dash, last = ports.partition("-") if ranges else (ports, "", "")
    numbers = [first, last] if dash else [first]
    if not all(number.isascii() and number.isdecimal() for number in numbers):
        raise InvalidConfig(f"{text!r} is not a host:port")
    low, high = int(first[:9]), int((last or first)[:9])
    if not 1 <= low <= high <= 65535:
        raise InvalidConfig(f"{text!r}: ports are within 1..65535, in ascending order")
    if high - low >= MOST_PORTS:
        raise InvalidConfig(f"{text!r} names more than {MOST_PORTS} ports")
    try:
        return Address(_host(host, brackets=True), low, high)
    except ValueError:
        raise InvalidConfig(f"{text!r} is not a host:port: {host!r} is not a host") from None


def network_address(host: str, port: int) -> str:
    """host:port of an IP address, so that reaching it asks no name server. Raises InvalidConfig."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise InvalidConfig(f"{host!r} is not an IP address") from None
    mapped = getattr(address, "ipv4_mapped", None)
    return parse_address(f"{bracketed(str(mapped or address))}:{port}").texts()[0]


def is_loopback(host: str) -> bool:
    """Whether an IP address is of this host alone. False for a name."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def parse_bind(text: str) -> str:
    """The host of what a daemon is to listen on: an address, with or without brackets, or a name.

    Raises InvalidConfig.
    """
    if text == "*":
        return text
    try:
        return _host(text, brackets=False)
    except (TypeError, ValueError, AttributeError):
        raise InvalidConfig(
            f"cannot listen on {text!r}: it is not an address of this host; write 0.0.0.0, 127.0.0.1, "
            ":: or ::1, without a port"
        ) from None


def _host(text: str, *, brackets: bool) -> str:
    """A host without brackets, in one spelling. Raises ValueError."""
    inner = text[1:-1] if text.startswith("[") and text.endswith("]") else ""
    if inner or (":" in text and not brackets):
        address, percent, zone = (inner or text).partition("%")
        if percent and not _ZONE.fullmatch(zone):
            raise ValueError(text)
        return f"{ipaddress.IPv6Address(address)}{percent}{zone}"
    if not _HOST.fullmatch(text):
        raise ValueError(text)
    return text
