"""The table of options: a row is a field of a config in config/, and everything else follows from it.

    max_slo_ns: Annotated[AtLeast1, Option(help="Refuse requests with a longer SLO.", panel=ADMISSION)] = 48 * H

is an option of type int, at least 1, in nanoseconds (`_ns`; sizes end in `_bytes`). From this row follow
`--max-slo DURATION` with its default in `--help` (cli/config_options.py), the key `max_slo` of a TOML file and
its errors (config_file/tables.py), the command line of a controller that is started as a child, and what
status shows.
"""

from __future__ import annotations

import functools
import typing
from dataclasses import dataclass, fields
from typing import Annotated, Any

import msgspec

from slosched.units import exact_bytes, exact_duration

#: Headings under which `--help` lists options, in this order; those without one come before all.
CLUSTER = "The cluster"
ADDRESSES = "Addresses"
SCHEDULER = "The scheduler"
ADMISSION = "Admission"
NETWORK = "The network"
NOISE = "Disturbances"
MEMORY = "Memory"
MODELS = "Models"
FUNCTIONS = "Functions"
PROCESSOR = "The processor"
PANELS = (
    CLUSTER,
    ADDRESSES,
    SCHEDULER,
    ADMISSION,
    NETWORK,
    NOISE,
    MEMORY,
    MODELS,
    FUNCTIONS,
    PROCESSOR,
)

_UNITS = {"_ns": "ns", "_bytes": "bytes", "_bytes_per_s": "bytes"}


@dataclass(frozen=True, kw_only=True)
class Option:
    """What a field of a config is as an option, beside its name, type and default.

    With `help` it is one of the command line. Its default stands at the end, or in place of `{default}`; a
    help with the word "Default" says it itself. `name` is what people write where that is not the field's name
    without its unit; `flag` is how a bool is written where that is not --NAME/--no-NAME. `one_of` are the
    texts that are known. A duration of 0 is taken on the command line with `may_be_0` alone.
    """

    help: str = ""
    name: str = ""
    flag: str = ""
    metavar: str = ""  # what the value is called in --help, where its type does not say it
    panel: str = ""
    one_of: tuple[str, ...] = ()
    may_be_0: bool = False
    one_is: str = ""  # what one of these is called in errors, where that is not the field's name
    in_file: bool = True
    in_status: bool = True  # of the scheduler's options: among "options" in a controller's status
    simulated: bool = True  # of the scheduler's options: also one of the commands that simulate


@dataclass(frozen=True, kw_only=True)
class Row:
    """One option of a config class. `kind` is its type with msgspec's constraints."""

    field: str
    name: str
    kind: Any
    unit: str  # "ns", "bytes" or ""
    default: Any  # dataclasses.MISSING if the field has none
    option: Option

    @property
    def on_command_line(self) -> bool:
        return bool(self.option.help)

    @property
    def plain(self) -> Any:
        """The type without constraints and without None: int, str, tuple[str, ...]."""
        return plain(self.kind)

    @property
    def argument(self) -> str:
        """How the command line spells it: --max-slo, --busy-poll/--sleep."""
        if self.option.flag:
            return self.option.flag
        name = f"--{self.name.replace('_', '-')}"
        return f"{name}/--no-{name[2:]}" if self.plain is bool else name

    def text(self, value: Any) -> str:
        """`value` as people write it: 100ms, 8GiB, no."""
        if self.plain is bool:
            on, _, off = (self.option.flag or "yes/no").partition("/")
            return on if value else off
        if self.unit == "ns":
            return exact_duration(value)
        if self.unit == "bytes":
            return exact_bytes(value)
        if isinstance(value, tuple):
            return ",".join(self.text(each) for each in value)
        return f"{value:g}" if isinstance(value, float) else str(value)

    @property
    def help(self) -> str:
        """Its line in `--help`."""
        text = self.option.help
        if "{default}" in text:
            return text.replace("{default}", self.text(self.default))
        if "default" in text.lower() or self.default in (None, (), ""):
            return text
        return f"{text} Default {self.text(self.default)}."


@functools.cache
def rows(config: Any) -> tuple[Row, ...]:
    """The options of a config class, in the order of its fields."""
    hints = typing.get_type_hints(config, include_extras=True)
    return tuple(_row(field.name, hints[field.name], field.default) for field in fields(config))


def row(config: Any, field: str) -> Row:
    """The option that is the field `field` of `config`."""
    return next(each for each in rows(config) if each.field == field)


def status_options(config: Any) -> dict[str, Any]:
    """The fields of `config` that status shows as its options, and their values."""
    return {
        each.field: getattr(config, each.field)
        for each in rows(config.__class__)
        if each.on_command_line and each.option.in_status
    }


def plain(kind: Any) -> Any:
    """The type `kind` without its constraints, also those inside, and without None."""
    origin = typing.get_origin(kind)
    if origin is Annotated:
        return plain(typing.get_args(kind)[0])
    parts = typing.get_args(kind)
    if type(None) in parts:
        return plain(next(part for part in parts if part is not type(None)))
    if origin is not None and parts:
        return origin[tuple(part if part is ... else plain(part) for part in parts)]
    return kind


def constraints(kind: Any) -> tuple[Any, tuple[msgspec.Meta | Option, ...]]:
    """An annotated type's own type, and the constraints on its values."""
    if typing.get_origin(kind) is not Annotated:
        return kind, ()
    own, *more = typing.get_args(kind)
    return own, tuple(each for each in more if isinstance(each, msgspec.Meta | Option))


def bounds_text(meta: msgspec.Meta) -> str:
    """What a number must be: "within 0..65535", "at least 1", "at least 0 and below 0.5"."""
    if meta.description:
        return meta.description
    if meta.ge is not None and meta.le is not None:
        return f"within {_number(meta.ge)}..{_number(meta.le)}"
    limits = (("at least", meta.ge), ("above", meta.gt), ("at most", meta.le), ("below", meta.lt))
    return " and ".join(f"{word} {_number(bound)}" for word, bound in limits if bound is not None)


def is_within(value: float, meta: msgspec.Meta) -> bool:
    """Whether the number `value` keeps the bounds of `meta`."""
    return (
        (meta.ge is None or value >= meta.ge)
        and (meta.gt is None or value > meta.gt)
        and (meta.le is None or value <= meta.le)
        and (meta.lt is None or value < meta.lt)
    )


def _row(field: str, kind: Any, default: Any) -> Row:
    _, more = constraints(kind)
    option = next((each for each in more if isinstance(each, Option)), Option())
    suffix = next((each for each in _UNITS if field.endswith(each)), "")
    short = field.removesuffix(suffix) if option.help else field
    return Row(
        field=field,
        name=option.name or short,
        kind=kind,
        unit=_UNITS.get(suffix, ""),
        default=default,
        option=option,
    )


def _number(bound: float) -> str:
    return f"{bound:g}" if isinstance(bound, float) or abs(bound) < 1_000_000 else str(bound)
