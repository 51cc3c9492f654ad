"""Which SLO a request has. One rule for both protocols, so that a client may change its transport.

The request parameter `timeout` comes first, then the header or metadata `slosched-slo`, then the RPC's
deadline, and with none of them the controller's default holds.
"""

from __future__ import annotations

from slosched.errors import InvalidDuration
from slosched.fronts.errors import FrontError, Status
from slosched.units import NS_PER_US, parse_duration_ns

#: The header and the metadata that have an SLO, as "25ms"; a bare number is in seconds.
SLO_HEADER = "slosched-slo"
#: The longest SLO that travels: 146 years.
_MOST_NS = 2**62
_LONGEST_TEXT = 64


def slo_ns(timeout_us: object = None, header: str = "", deadline_ns: int = 0) -> int:
    """The SLO in ns; 0 is the controller's default.

    `timeout_us` is the request's parameter `timeout` in whole microseconds (None or 0: not given, as in
    Triton), `header` the text of `slosched-slo`, `deadline_ns` what is left of the RPC's deadline (0: it has
    none). A deadline that lies further than 146 years ahead counts as none. Raises FrontError, 400.
    """
    if timeout_us is not None:
        given_ns = _timeout_ns(timeout_us)
        if given_ns:
            return given_ns
    if header:
        return _header_ns(header)
    return deadline_ns if 0 < deadline_ns < _MOST_NS else 0


def _timeout_ns(timeout_us: object) -> int:
    if isinstance(timeout_us, str) and timeout_us.isascii() and timeout_us.isdecimal():
        timeout_us = int(timeout_us[:32])  # clients that have no other type for parameters
    if type(timeout_us) is not int or not 0 <= timeout_us < _MOST_NS // NS_PER_US:
        shown = repr(timeout_us)[:_LONGEST_TEXT]
        raise FrontError(
            Status.INVALID_ARGUMENT,
            f"parameter 'timeout' must be a whole number of microseconds, at least 0, not {shown}",
        )
    return timeout_us * NS_PER_US


def _header_ns(header: str) -> int:
    if len(header) > _LONGEST_TEXT:
        raise _bad_header(f"{header[:_LONGEST_TEXT]!r}... is not a duration")
    try:
        found_ns = parse_duration_ns(header.strip(), bare_unit="s")
    except InvalidDuration as error:
        raise _bad_header(str(error)) from None
    if not 0 < found_ns < _MOST_NS:
        raise _bad_header(f"{header!r} is not between 1us and 146 years")
    return found_ns


def _bad_header(text: str) -> FrontError:
    return FrontError(Status.INVALID_ARGUMENT, f"{SLO_HEADER}: {text}")
