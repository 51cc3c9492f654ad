"""The types and bounds of a config's fields, checked when it is made: by a program as well as from a file.

A wrong value would be found much later, in a daemon's loop or in a child process.
"""

from __future__ import annotations

import functools
import math
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Annotated, Any

from msgspec import Meta

from slosched.errors import InvalidConfig, UnknownName
from slosched.options import Option, bounds_text, constraints, is_within

AtLeast0 = Annotated[int, Meta(ge=0)]
AtLeast1 = Annotated[int, Meta(ge=1)]
#: 0 takes a free one.
Port = Annotated[int, Meta(ge=0, le=65535)]
#: Shape of the tensor of one request, without the batch dimension.
Shape = tuple[AtLeast1, ...]

_WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}
#: Types of plain values.
_PLAIN = (str, bytes, int, float, tuple, list, dict, type(None))


def check_types(config: Any) -> None:
    """Raise InvalidConfig unless each field of the dataclass `config` has the type that it declares, and keeps
    the bounds (`msgspec.Meta`) and is one of the texts (`Option.one_of`) that its type is annotated with.

    A whole number passes for a float, a path for a text and a list for a tuple; the field then holds what is
    declared. NaN is refused. To be called first in `__post_init__`.
    """
    made_of: Any = type(config)
    for name, kind in _declared(made_of):
        value = getattr(config, name)
        if type(value) is kind and kind is not float:
            continue
        fitted = _fitted(name, value, kind)
        if fitted is not value:
            object.__setattr__(config, name, fitted)


@functools.cache
def _declared(kind: Any) -> tuple[tuple[str, Any], ...]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return tuple((field.name, hints[field.name]) for field in fields(kind))


def _fitted(name: str, value: Any, kind: Any) -> Any:
    """`value` as a `kind`. Raises InvalidConfig."""
    origin = typing.get_origin(kind)
    if origin is Annotated:
        own, limits = constraints(kind)
        fitted = _fitted(name, value, own)
        for limit in limits:
            _check_limit(name, fitted, limit)
        return fitted
    if origin in (types.UnionType, typing.Union):
        wanted = [each for each in typing.get_args(kind) if each is not type(None)]
        return value if value is None else _fitted(name, value, wanted[0])
    if origin is tuple:
        return _sequence(name, value, typing.get_args(kind))
    if origin is dict:
        return _mapping(name, value, typing.get_args(kind))
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if math.isnan(value):
            raise InvalidConfig(f"{name} must be a number, not NaN")
        return value
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    # Only the user of a protocol knows whether a value implements it; a plain value never does.
    if getattr(kind, "_is_protocol", False):
        if isinstance(value, _PLAIN):
            raise _wrong(name, value, f"a {kind.__name__}")
        return value
    if isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool):
        return value
    article = "an" if kind.__name__[0] in "AEIOU" else "a"
    raise _wrong(name, value, _WORDS.get(kind) or f"{article} {kind.__name__}")


def _check_limit(name: str, value: Any, limit: Meta | Option) -> None:
    """Raise InvalidConfig if `value`, whose type is right, is beyond `limit`."""
    if isinstance(limit, Meta):
        if not is_within(value, limit):
            shown = f"{value:g}" if isinstance(value, float) else value
            raise InvalidConfig(f"{name} must be {bounds_text(limit)}, not {shown}")
    elif limit.one_of:
        for text in (value,) if isinstance(value, str) else value:
            if text not in limit.one_of:
                raise UnknownName(limit.one_is or name, text, list(limit.one_of))


def _sequence(name: str, value: Any, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    if not isinstance(value, tuple | list):
        raise _wrong(name, value, "a tuple")
    each = kinds[:1] * len(value) if kinds[1:] == (...,) else kinds
    if len(each) != len(value):
        raise _wrong(name, value, f"a tuple of {len(each)}")
    fitted = tuple(
        _fitted(f"{name}[{place}]", item, kind)
        for place, (item, kind) in enumerate(zip(value, each, strict=True))
    )
    if isinstance(value, tuple) and all(a is b for a, b in zip(fitted, value, strict=True)):
        return value
    return fitted


def _mapping(name: str, value: Any, kinds: tuple[Any, ...]) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong(name, value, "a dict")
    for key, item in value.items():
        _fitted(f"a key of {name}", key, kinds[0])
        _fitted(f"{name}[{key!r}]", item, kinds[1])
    return value


def _wrong(name: str, value: Any, wanted: str) -> InvalidConfig:
    shown = f"a {type(value).__name__}" if is_dataclass(value) else repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:80]}..."
    return InvalidConfig(f"{name} must be {wanted}, not {shown}")
