"""What callers of the clients pass, checked before it is sent.

A value of another type would be refused by the controller as a whole message, without the request's id:
the caller would wait for its time limit and then blame the controller.
"""

from __future__ import annotations

import math
import reprlib
from typing import Any

import numpy as np

from slosched.clients.inference import Model
from slosched.codes import Code
from slosched.config import WEIGHT_RANGE, is_weight
from slosched.errors import InvalidConfig, InvalidDuration, InvalidRequest
from slosched.units import NS_PER_S, parse_duration_ns

#: What the controller takes.
MAX_SLO_NS = 2**62
_MAX_COPIES = 2**31 - 1
#: Numbers travel within these bounds (messages.Number).
_NUMBER = 2**62
#: 31 years: a time limit for which event loops and clocks still have numbers.
_MAX_TIMEOUT_S = 1e9
_MAX_NAME_CHARS = 1024


def _invalid(text: str) -> InvalidRequest:
    return InvalidRequest(text, code=Code.INVALID_REQUEST)


def slo_fields(slo: float | str | None, slo_factor: float | None) -> tuple[float, int]:
    """Return (slo_factor, slo_ns) as an InferRequest carries them; zeros ask for the default SLO.

    `slo` is in seconds, or a duration text ("25ms"; a bare number in seconds). Raises
    InvalidRequest for NaN, infinite, zero or negative values, and for both at once.
    """
    if slo is not None and slo_factor is not None:
        raise _invalid("give slo or slo_factor, not both")
    if slo_factor is not None:
        factor = _number("slo_factor", slo_factor)
        if not math.isfinite(factor) or factor <= 0:
            raise _invalid(f"slo_factor must be a finite number > 0, not {factor}")
        return factor, 0
    if slo is None:
        return 0.0, 0
    if isinstance(slo, str):
        try:
            slo_ns = parse_duration_ns(slo, bare_unit="s")
        except InvalidDuration as error:
            raise _invalid(f"slo: {error}") from None
    else:
        seconds = _number("slo", slo)
        if not math.isfinite(seconds) or seconds <= 0:
            raise _invalid(f"slo must be a finite number of seconds > 0, not {seconds}")
        slo_ns = round(min(seconds, float(MAX_SLO_NS)) * NS_PER_S)
    if not 0 < slo_ns < MAX_SLO_NS:
        raise _invalid(f"slo must be at least 1 ns and below 146 years, not {_shown(slo)}")
    return 0.0, slo_ns


def known_slo_ns(model: Model, slo_factor: float, slo_ns: int) -> int:
    """The SLO that `slo_fields` returned, in ns; 0 where only the controller knows it.

    Raises InvalidRequest where the factor makes it longer than the controller takes.
    """
    if slo_ns or not slo_factor:
        return slo_ns
    product = slo_factor * model.b1_ns
    if not product < MAX_SLO_NS:
        raise _invalid(
            f"slo_factor {slo_factor:g} times the exec time of model {model.name!r} is more than 146 years"
        )
    return round(product)


def _is_number(value: object, *kinds: type) -> bool:
    # numpy's timedelta64 is an integer by its class, and a bool is an int.
    return isinstance(value, kinds) and not isinstance(value, (bool, np.timedelta64))


def _number(name: str, value: Any) -> float:
    if not _is_number(value, int, float, np.integer, np.floating):
        raise _invalid(f"{name} must be a number, not {_shown(value)}")
    try:
        return float(value)
    except OverflowError:
        raise _invalid(f"{name} must be a finite number, not {_shown(value)}") from None


def _whole(name: str, value: Any, least: int, most: int) -> int:
    if not _is_number(value, int, np.integer):
        raise _invalid(f"{name} must be a whole number, not {_shown(value)}")
    number = int(value)
    if number < least:
        raise _invalid(f"{name} must be at least {least}, not {_shown(number)}")
    if number > most:
        raise _invalid(f"{name} must be at most {most}, not {_shown(number)}")
    return number


def _shown(value: object) -> str:
    """`value` for an error: short, whatever it is. Python refuses to write very long numbers."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    return reprlib.repr(value)


def user_number(user_id: object) -> int:
    """`user_id` as a number that travels. Raises InvalidRequest."""
    return _whole("user_id", user_id, -_NUMBER, _NUMBER - 1)


def copy_count(copies: object) -> int:
    """`copies` as an int of at least 1. Raises InvalidRequest."""
    return _whole("copies", copies, 1, _MAX_COPIES)


def model_name(name: object) -> str:
    """`name` if a model can be called so. Raises InvalidRequest."""
    return _text("the model's name", name, _invalid)


def check_model(model: object) -> None:
    """Raise InvalidRequest unless `model` is what `load` returned."""
    if not isinstance(model, Model):
        hint = "; `[model] = client.load(...)` unpacks one" if isinstance(model, list) else ""
        raise _invalid(f"model must be a Model that load returned, not {_shown(model)}{hint}")


def flag(name: str, value: object) -> bool:
    """`value` if it is True or False. Raises InvalidRequest."""
    if not isinstance(value, (bool, np.bool_)):
        raise _invalid(f"{name} must be True or False, not {_shown(value)}")
    return bool(value)


def time_limit_s(timeout_s: object) -> float:
    """`timeout_s` as a float in seconds, at most 1e9. Raises InvalidRequest."""
    seconds = _number("timeout_s", timeout_s)
    if not 0 <= seconds <= _MAX_TIMEOUT_S:
        raise _invalid(f"timeout_s must be within 0..1e9 seconds, not {seconds:g}")
    return seconds


def check_fields(slo_factor: Any, slo_ns: Any, user_id: Any) -> None:
    """Raise InvalidRequest unless these can travel as an InferRequest's fields; cheap where they can."""
    if (
        type(slo_ns) is type(user_id) is int
        and type(slo_factor) in (float, int)
        and 0 <= slo_ns < MAX_SLO_NS
        and 0 <= slo_factor < math.inf
        and -_NUMBER <= user_id < _NUMBER
    ):
        return
    _whole("slo_ns", slo_ns, 0, MAX_SLO_NS - 1)
    user_number(user_id)
    factor = _number("slo_factor", slo_factor)
    if not 0 <= factor < math.inf:
        raise _invalid(f"slo_factor must be a finite number >= 0, not {factor}")


def client_name(name: object) -> str:
    """`name` if a client can be called so. Raises InvalidConfig."""
    return _text("name", name, InvalidConfig, empty=True)


def client_weight(weight: object) -> float:
    """`weight` as a float within WEIGHT_RANGE. Raises InvalidConfig."""
    try:
        number = _number("weight", weight)
    except InvalidRequest as error:
        raise InvalidConfig(str(error)) from None
    if not is_weight(number):
        least, most = WEIGHT_RANGE
        raise InvalidConfig(f"weight must be within {least:g}..{most:g}, not {number:g}")
    return number


def _text(what: str, value: object, error: Any, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise error(f"{what} must be a text, not {_shown(value)}")
    if not (value or empty):
        raise error(f"{what} is empty")
    if len(value) > _MAX_NAME_CHARS:
        raise error(f"{what} has {len(value)} characters; at most {_MAX_NAME_CHARS} are taken")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise error(f"{what} {_shown(value)} cannot be written as UTF-8") from None
    return value
