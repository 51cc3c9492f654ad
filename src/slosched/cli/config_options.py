"""The rows of the option table (options.py) as options of a command.

A command takes those of a config class by being decorated:

    @takes_options(WorkerConfig)
    def worker(*, options: Options, config: ... = None) -> None:
        replace(base, **values_of(WorkerConfig, options))

Typer then sees each row as an option of the command, with None as its default: what is not given is left to a
file, or to the default of the class.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Container, Mapping
from typing import Annotated, Any, cast, get_type_hints

import typer

from slosched.cli.values import (
    cascades,
    duration_ns,
    names,
    numbers,
    size_bytes,
    weight_rules,
    whole_numbers,
)
from slosched.command_line import CASCADES, WEIGHTS, command_rows
from slosched.options import Row

#: What the command line says, by the names of rows; None where it says nothing.
Options = Mapping[str, Any]

_TEXT = str | None
_LISTS = {tuple[str, ...]: "NAME,NAME", tuple[int, ...]: "N,N", tuple[float, ...]: "X,X"}
#: Types that Typer reads by itself, as options that may be left out. The others are texts to it.
_READ_BY_TYPER: dict[Any, Any] = {int: int | None, float: float | None, bool: bool | None}


def takes_options(
    *configs: type, only: Container[str] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of the classes `configs`; its parameter `options` gets what was given.

    `only` are the fields that it takes, if these are not all.
    """
    shared = [row for config in configs for row in command_rows(config)]
    shared = [row for row in shared if only is None or row.field in only]
    hints = {row.name: declaration(row) for row in shared}
    return lambda command: with_parameters(command, hints, {}, into="options", make=dict)


def with_parameters(
    command: Callable[..., None],
    hints: Mapping[str, Any],
    defaults: Mapping[str, Any],
    *,
    into: str,
    make: Callable[[dict[str, Any]], Any],
) -> Callable[..., None]:
    """Give `command` further parameters, behind its own; `make` of their values is passed as the one `into`.

    `hints` are their annotations by name; without a default it is None. A parameter of the command's own that
    has such a name stands for it.
    """
    own = inspect.signature(command)
    own_hints = get_type_hints(command, include_extras=True)
    added = {name: hint for name, hint in hints.items() if name not in own.parameters}

    @functools.wraps(command)
    def run(**values: Any) -> None:
        taken = make({name: values.pop(name) for name in added})
        command(**values, **{into: taken})

    parameters = [
        each.replace(annotation=own_hints[each.name], kind=inspect.Parameter.KEYWORD_ONLY)
        for each in own.parameters.values()
        if each.name != into
    ]
    for name, hint in added.items():
        default = defaults.get(name)
        parameters.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint
            )
        )
    run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {
        **{name: hint for name, hint in own_hints.items() if name != into},
        **added,
    }
    return run


def declaration(row: Row) -> Any:
    """The row as the annotation of a command's parameter."""
    option = typer.Option(
        row.argument,
        help=row.help,
        metavar=_metavar(row),
        rich_help_panel=row.option.panel or None,
        show_default=False,
    )
    return cast(Any, Annotated)[kind_written(row), option]


def kind_written(row: Row) -> Any:
    """The type of what the command line says: a text where that has a unit, or is a list."""
    return _TEXT if row.unit else _READ_BY_TYPER.get(row.plain, _TEXT)


def _metavar(row: Row) -> str | None:
    """What the value is called in `--help`; None for a number or a text, which help.py names."""
    if row.option.metavar or row.plain is bool:
        return row.option.metavar or None
    if row.unit:
        one = {"ns": "DURATION", "bytes": "SIZE"}[row.unit]
        return f"{one},{one}" if row.plain == tuple[int, ...] else one
    if row.plain is int:
        return "N"
    if row.plain is str:
        return "|".join(row.option.one_of) or None
    return _LISTS.get(row.plain)


def values_of(config: type, options: Options) -> dict[str, Any]:
    """The fields of `config` that `options` say. Raises InvalidConfig with the option that is wrong."""
    return {
        row.field: _value(row, options[row.name])
        for row in command_rows(config)
        if options.get(row.name) is not None
    }


def _value(row: Row, given: Any) -> Any:
    """What the user wrote, as the field's value."""
    if row.unit == "ns" and row.plain == tuple[int, ...]:
        return tuple(duration_ns(row.argument, each) for each in names(given))
    if row.unit == "ns":
        return duration_ns(row.argument, given, may_be_0=row.option.may_be_0)
    if row.unit == "bytes":
        return size_bytes(row.argument, given)
    if row.plain == WEIGHTS:
        return weight_rules(row.argument, given)
    if row.plain == tuple[int, ...]:
        return whole_numbers(row.argument, given, least=0)
    if row.plain == tuple[float, ...]:
        return numbers(row.argument, given)
    if row.plain == CASCADES:
        return cascades(given)
    return names(given) if row.plain == tuple[str, ...] else given
