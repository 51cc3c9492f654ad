"""How commands look in `--help`: what a value is called, and which options stand together."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand

from slosched.options import PANELS

_Function = TypeVar("_Function", bound=Callable[..., Any])

_DURATION, _SIZE, _ADDRESSES = "DURATION", "SIZE", "HOST:PORT"

#: What the value of an option is called, by the option's name, unless the option itself says so. Durations are
#: written 250us, 2.9ms, 30s, sizes 512MiB, 21.5GiB.
METAVARS = {
    "bandwidth": "BITS",
    "batches": "N,N-M",
    "clock_offset": _DURATION,
    "cores": "N,N-M",
    "device": "DEVICE",
    "duration": _DURATION,
    "faults": "FILE|random",
    "fidelity": "best|paper",
    "from_": _DURATION,
    "interval": _DURATION,
    "jitter": _DURATION,
    "latency": _DURATION,
    "margin": _DURATION,
    "name": "NAME",
    "pcie": "SIZE/s",
    "profile": "NAME|FILE",
    "schedule_ahead": _DURATION,
    "skip": _DURATION,
    "slo": "DURATION|FACTOR",
    "span": _DURATION,
    "stall": "SHARE:DURATION",
    "to": _DURATION,
    "type_": "TYPE",
    "warmup": _DURATION,
    "weights_cache": _SIZE,
    "window": _DURATION,
    "window_length": _DURATION,
    "workers": f"{_ADDRESSES},...",
}
#: What a value is called, by the name of its type: Click's names, then Typer's own.
_BY_TYPE = {
    "integer": "N",
    "integer range": "N",
    "float": "X",
    "float range": "X",
    "text": "TEXT",
    "filename": "FILE",
    "int": "N",
    "int range": "N",
    "str": "TEXT",
    "path": "PATH",
    "file": "FILE",
    "directory": "DIR",
}

#: A command with fewer options lists them as one.
_GROUPED_FROM = 12
_GENERAL = "Options"


def _type_name(option: Any) -> str:
    """What this version of Typer calls the type of an option's value; empty where it does not say.

    Since 0.29 the name stands in <>.
    """
    if hasattr(option, "type"):
        return str(option.type.name)
    display = getattr(option, "display_type", None)
    return str(display(None)).strip("<>") if display is not None else ""


#: Typer's word on a default; the bounds behind it, as in [default: 1; x>=1], are kept.
_DEFAULT = re.compile(r"\[default: [^];]*(?:\]|; (?=[^]]))")


def _argument_name(param: Any) -> str:
    """An argument as the usage line has it: MODEL, [HOST:PORT], RUN_DIR..."""
    name = str(param.metavar or param.name.upper())
    if param.nargs != 1 and "..." not in name:
        name += "..."
    return name if param.required or name.startswith("[") else f"[{name}]"


def _without_second_default(text: str) -> str:
    """The help of an option, without Typer's default where the text already tells it."""
    if "Default" not in text.partition("[default: ")[0]:
        return text
    return _DEFAULT.sub(lambda found: "" if found[0].endswith("]") else "[", text).rstrip()


class SloschedCommand(TyperCommand):
    """A command whose values have names (DURATION, SIZE, HOST:PORT) and whose many options have groups."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for param in self.params:
            shown: Any = param
            if param.param_type_name == "option" and shown.metavar is None and not shown.is_flag:
                shown.metavar = METAVARS.get(str(shown.name)) or _BY_TYPE.get(_type_name(shown))

    def get_short_help_str(self, limit: int = 45) -> str:
        """What a list of commands says of it: its first sentence, which Typer would cut at `limit`."""
        if self.short_help or not self.help:
            return str(super().get_short_help_str(limit))
        return " ".join(inspect.cleandoc(self.help).partition("\n\n")[0].split())

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The usage line with arguments as they are written, without Typer's braces."""
        arguments = [p for p in self.get_params(ctx) if p.param_type_name == "argument"]
        return ["[OPTIONS]", *map(_argument_name, arguments)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments, the general options, then each group of options under its own heading."""
        arguments: list[tuple[str, str]] = []
        groups: dict[str, list[tuple[str, str]]] = {each: [] for each in (_GENERAL, *PANELS)}
        options = [p for p in self.get_params(ctx) if p.param_type_name == "option"]
        grouped = len(options) >= _GROUPED_FROM
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None:
                continue
            if param.param_type_name == "argument":
                arguments.append((_argument_name(param), record[1]))
                continue
            record = record[0], _without_second_default(record[1])
            panel = getattr(param, "rich_help_panel", None)
            groups.setdefault(panel if grouped and panel else _GENERAL, []).append(record)
        for heading, records in [("Arguments", arguments), *groups.items()]:
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


class SloschedTyper(typer.Typer):
    """Makes each of its commands a SloschedCommand, unless it is given another class."""

    def command(self, name: str | None = None, **kwargs: Any) -> Callable[[_Function], _Function]:
        kwargs.setdefault("cls", SloschedCommand)
        return super().command(name, **kwargs)
