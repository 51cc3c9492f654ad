"""Workloads from TOML files: `workload = "slo-exp-1"` and its parameters, one to a line."""

from __future__ import annotations

import re
from pathlib import Path

from slosched.errors import InvalidConfig, UnknownName
from slosched.text_files import read_toml
from slosched.workloads import mix
from slosched.workloads.base import Workload
from slosched.workloads.mix_file import load_mix
from slosched.workloads.registry import WORKLOAD_KINDS

_KEY = re.compile(r"""^\s*["']?([A-Za-z0-9_-]+)["']?\s*=""")


def load_workload(path: str | Path) -> Workload:
    """Return the workload that the TOML file at `path` describes.

    Raises InvalidConfig with the file and the line of what is wrong; an unknown name or key is listed
    with those that exist. Paths in it (a log to replay) are relative to the file.
    """
    from slosched.workloads import workload_from_table

    file = Path(path)
    text, table = read_toml(file, "the workload")
    if "workload" not in table:
        raise InvalidConfig(
            f"{file}: the key workload is missing; it names one of {', '.join(sorted(WORKLOAD_KINDS.names()))}"
        )
    if table["workload"] == mix.NAME and not isinstance(table.get("models"), str):
        return load_mix(file).workload()
    for key, value in table.items():
        if isinstance(value, dict | list):
            raise InvalidConfig(
                f"{_where(file, text, key)}: {key} must be one value, not a list or a table"
            )
    try:
        for parameter in WORKLOAD_KINDS.get(str(table["workload"])).parameters:
            value = str(table.get(parameter.key, ""))
            if value and parameter.names_file(value):
                table[parameter.key] = str(file.parent / value)
        return workload_from_table(table)
    except UnknownName as error:
        raise InvalidConfig(f"{_where(file, text, error.name)}: {error}") from None
    except InvalidConfig as error:
        where = _where(file, text, *_named_in(str(error), table))
        raise InvalidConfig(f"{where}: {_in_keys(str(error), table)}") from None


def _spelled(table: dict[str, object]) -> dict[str, str]:
    """The parameters that the table gives, as the command line spells them, and their keys."""
    return {key.replace("_", "-"): key for key in table if key != "workload"}


def _in_keys(message: str, table: dict[str, object]) -> str:
    """An error of the command line's parser, with the parameters named as in the file."""
    for name, key in _spelled(table).items():
        message = re.sub(rf"(?<![\w'-]){re.escape(name)}(?![\w'-])", key, message)
    return message


def _named_in(message: str, table: dict[str, object]) -> list[str]:
    """The keys that an error speaks of, the first of them first; then the values."""
    found = [
        (match.start(), key)
        for name, key in _spelled(table).items()
        if (match := re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", message, re.IGNORECASE))
    ]
    return [key for _, key in sorted(found)] + re.findall("'([^']*)'", message)


def _where(file: Path, text: str, *names: str) -> str:
    """The file, with the line of the first of `names` that is a key or a value in it."""
    lines = text.splitlines()
    for name in names:
        for number, line in enumerate(lines, start=1):
            key = _KEY.match(line)
            if key is not None and (key.group(1) == name or f'"{name}"' in line):
                return f"{file}, line {number}"
    return str(file)
