"""A table of a TOML file as a config class.

The keys of a table are the options of the class (options.py), and msgspec holds each value to the type and
the bounds of its field. An unknown key is an error that names the file, the key and the keys that exist. Sizes
may be written 21.5GiB, durations "5ms"; bare numbers are bytes, and nanoseconds where the key ends in _ns
(another key of a duration needs a unit).
"""

from __future__ import annotations

import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from typing import Any, TypeVar

import msgspec

from slosched.errors import InvalidConfig, UnknownName
from slosched.options import Row, bounds_text, constraints, plain, rows
from slosched.units import parse_bytes, parse_duration_ns

T = TypeVar("T")

#: What a value of a type is in TOML, for an error about one that is not.
KINDS_IN_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text in quotes",
    tuple[int, ...]: "a list of whole numbers",
    tuple[float, ...]: "a list of numbers",
    tuple[str, ...]: "a list of texts",
    dict[int, int]: 'a table of times by batch size, such as { 1 = "2.6ms", 2 = "3.8ms" }',
    dict[int, Any]: 'a table of times by length, such as { 64 = { 1 = "1ms", 2 = "1.5ms" } }',
    dict[str, Any]: "a table",
    dict[str, str]: "a table of texts",
    list[dict[str, Any]]: "tables of their own, each headed [[weights]]",
}


class Values(dict[str, Any]):
    """Fields and their values; `written` has the key of each as the file spells it."""

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[str, str] = {}


def _spellings(known: Mapping[str, Row]) -> dict[str, str]:
    """Keys as people write them, to fields: a duration or a size with a unit needs no _ns or _bytes."""
    spellings = {row.name: field for field, row in known.items()}
    spellings |= {field: field for field in known}
    for field in known:
        for suffix in ("_ns", "_bytes"):
            short = field.removesuffix(suffix)
            if short not in known and short != "weights":  # that one would be two things
                spellings[short] = field
    return spellings


def read_values(
    where: str, table: Mapping[str, Any], config: type, others: Mapping[str, Any] | None = None
) -> Values:
    """The values of `table` for the fields of the class `config`, checked; a table inside is a dict.

    `others` are further keys with their types. `where` names the file and the table for errors. Raises
    InvalidConfig for an unknown key, and for a value that its field cannot have.
    """
    known = {row.field: row for row in rows(config) if row.option.in_file}
    kinds = {field: kind_of(row) for field, row in known.items()} | dict(others or {})
    spellings = _spellings(known) | {key: key for key in others or {}}
    values = Values()
    for key, value in table.items():
        field = spellings.get(key)
        if field is None:
            names = [*(row.name for row in known.values()), *(others or {})]
            raise InvalidConfig(f"{where}: {UnknownName('key', key, names)}")
        if field.endswith("_ns") and key != field and type(value) is int and value:
            raise InvalidConfig(
                f'{where}: {key} = {value} has no unit; write {key} = "{value}ms", or {field} for nanoseconds'
            )
        if field in values:
            raise InvalidConfig(f"{where}: {key!r} says {values.written[field]!r} a second time")
        values.written[field] = key
        unit = known[field].unit if field in known else ""
        try:
            values[field] = value_as(value, kinds[field], unit)
        except (ValueError, InvalidConfig) as error:
            raise InvalidConfig(f"{where}: {key} {error}") from None
    return values


def kind_of(row: Row) -> Any:
    """The type of an option's value in TOML: what is a config class of its own, or several, is a table."""
    kind = row.plain
    parts = (kind, *typing.get_args(kind))
    return dict[str, Any] if any(is_dataclass(part) for part in parts) else row.kind


def value_as(value: Any, kind: Any, unit: str) -> Any:
    """`value` as a `kind`. Raises ValueError and InvalidConfig with what it must be."""
    number = _in_unit(value, unit)
    try:
        return msgspec.convert(number, kind, str_keys=True)
    except msgspec.ValidationError:
        raise ValueError(f"{_wanted(number, kind)}, not {value!r}") from None


def _in_unit(value: Any, unit: str) -> Any:
    """The number of nanoseconds or bytes that a text says, or each text of a table; another value as it is."""
    if not unit:
        return value
    if isinstance(value, dict):
        return {key: _in_unit(each, unit) for key, each in value.items()}
    if not isinstance(value, str):
        return value
    if unit == "bytes":
        return parse_bytes(value)
    if value.strip().isdecimal() and int(value):
        raise ValueError(f'must have a unit where it is a text, as "5ms", not {value!r}')
    return parse_duration_ns(value, bare_unit="ns")


def _wanted(value: Any, kind: Any) -> str:
    """What `value` must be to be a `kind`, and is not: of another type, or within bounds."""
    own = plain(kind)
    try:
        msgspec.convert(value, own, str_keys=True)
    except msgspec.ValidationError:
        return f"must be {KINDS_IN_WORDS[own]}"
    return f"must be {' and '.join(_bounds(kind))}"


def _bounds(kind: Any) -> list[str]:
    """The bounds on a number of this type, or on each number of a list."""
    own, limits = constraints(kind)
    found = [bounds_text(limit) for limit in limits if isinstance(limit, msgspec.Meta)]
    listed = typing.get_origin(own) is tuple
    inner = [each for part in typing.get_args(own) for each in _bounds(part)]
    return found + ([f"a list of numbers, each {each}" for each in inner] if listed else inner)


def build(where: str, make: Callable[..., T], values: Values) -> T:
    """`make` of the values. Raises InvalidConfig with `where`, and with the keys of the file for fields."""
    try:
        return make(**values)
    except TypeError as error:  # a field without a default was left out
        raise InvalidConfig(f"{where}: {_missing(make, values) or error}") from None
    except UnknownName:
        raise
    except InvalidConfig as error:
        text = str(error)
        # The class knows the field, the reader the file's key.
        for field, key in values.written.items():
            text = re.sub(rf"\b{field}\b", key, text)
        raise InvalidConfig(f"{where}: {text}") from None


def with_table(where: str, base: T, table: Mapping[str, Any]) -> T:
    """The config `base` with what a table of a file says; `where` names both for errors.

    Raises InvalidConfig.
    """

    def make(**given: Any) -> T:
        return replace(base, **given)  # type: ignore[type-var]

    return build(where, make, read_values(where, table, type(base)))


def _missing(make: Callable[..., object], values: Mapping[str, Any]) -> str:
    if not is_dataclass(make):
        return ""
    lacking = [
        f.name
        for f in fields(make)
        if f.default is MISSING and f.default_factory is MISSING and f.name not in values
    ]
    return f"{', '.join(lacking)} must be given" if lacking else ""
