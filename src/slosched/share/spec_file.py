"""Experiments of shared GPUs as TOML files: read, and written from what any front door says.

    modes = ["tm", "mps"]
    duration = "20s"
    [[jobs]]
    model = "diffusion"
    [[jobs]]
    model = "bert"
    priority = 1
    clients = { arriving = "poisson", rate_per_s = 20.0 }

The keys are the fields of ShareSpec, Job, Clients and Boundary (share_spec.py), so a new field needs nothing
here. A duration is a text with a unit, and its key has no _ns.
"""

from __future__ import annotations

import enum
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from slosched.errors import InvalidConfig, UnknownName
from slosched.share.hotcarbon import MPS_UNCAPPED
from slosched.share.spec_check import check_spec, shown, unused_name
from slosched.share_spec import Arriving, Boundary, Clients, Job, Mode, ShareSpec
from slosched.text_files import no_number, open_lines, read_toml
from slosched.units import exact_duration, has_unit, parse_duration_ns

_JOBS = "jobs"
#: Arrivals in one trace file.
_LONGEST_TRACE = 1_000_000
_KEY = re.compile(r"""\s*["']?([^"'=\s\[{]+)["']?\s*=""")
_TABLES: dict[str, type[msgspec.Struct]] = {"clients": Clients, "boundary": Boundary}

_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text in quotes",
    tuple[int, int]: "[height, width], such as [720, 1280]",
    tuple[float, ...]: "a list of numbers",
    tuple[str, ...]: "a list of texts",
}


def read_spec(path: Path) -> ShareSpec:
    """The experiment in the TOML file at `path`. Raises InvalidConfig with the line and key that is wrong."""
    text, table = read_toml(path, "the experiment")
    return _SpecFile(path, text).spec(table)


def spec_text(spec: ShareSpec) -> str:
    """`spec` as a TOML file that `read_spec` reads as an equal one. What has its default is left out."""
    lines = _lines(spec, ShareSpec(jobs=()), skip=(_JOBS,))
    # A reader of the file wants to see these even where they have their defaults.
    shown = {"modes": _toml(list(spec.modes)), "duration": _toml(exact_duration(spec.duration_ns))}
    present = {line.partition(" = ")[0] for line in lines}
    lines = [f"{key} = {value}" for key, value in shown.items() if key not in present] + lines
    for job in spec.jobs:
        lines += ["", f"[[{_JOBS}]]", f"name = {_toml(job.name)}", f"model = {_toml(job.model)}"]
        inner: list[str] = []
        plain = Job(name=job.name, model=job.model)
        lines += _lines(job, plain, skip=tuple(_TABLES))
        for key, kind in _TABLES.items():
            inside = _lines(getattr(job, key), kind(), skip=())
            if inside:
                inner += [f"{key} = {{ {', '.join(inside)} }}"]
        lines += inner
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------- writing


def _lines(value: msgspec.Struct, default: msgspec.Struct, *, skip: tuple[str, ...]) -> list[str]:
    """`KEY = VALUE` for each field of `value` that differs from that of `default`."""
    found = []
    for field in msgspec.structs.fields(type(value)):
        own = getattr(value, field.name)
        if field.name in skip or own == getattr(default, field.name):
            continue
        if field.name.endswith("_ns") and isinstance(own, int):
            found.append(f"{field.name.removesuffix('_ns')} = {_toml(_exact(own))}")
        else:
            found.append(f"{field.name} = {_toml(own)}")
    return found


def _exact(duration_ns: int) -> str:
    return exact_duration(duration_ns) if duration_ns else "0"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _quoted(str(value))
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    if isinstance(value, dict):
        inside = ", ".join(f"{_quoted(str(key))} = {_toml(item)}" for key, item in value.items())
        return f"{{ {inside} }}"
    return repr(value)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in escaped) + '"'


# ---------------------------------------------------------------------------------------- reading


class _SpecFile:
    """One file while it is read. A trace in it is relative to its folder."""

    def __init__(self, path: Path, text: str) -> None:
        self._path = path
        self._text = text.splitlines()
        self._headings = [
            number
            for number, line in enumerate(self._text, start=1)
            if re.match(rf"\s*\[\[\s*{_JOBS}\s*\]\]", line)
        ]

    def spec(self, table: Mapping[str, Any]) -> ShareSpec:
        values = self._values("", 0, table, ShareSpec, skip=(_JOBS,))
        tables = table.get(_JOBS, [])
        if not isinstance(tables, list) or not all(isinstance(each, dict) for each in tables):
            raise self._error("", 0, _JOBS, f"write each job as a table [[{_JOBS}]]")
        jobs: list[Job] = []
        for place, each in enumerate(tables):
            jobs.append(self._job(place, each, {job.name for job in jobs}))
        try:
            return check_spec(ShareSpec(**values, jobs=tuple(jobs)))
        except InvalidConfig as error:
            raise InvalidConfig(f"{self._path}: {error}") from None

    def _job(self, place: int, table: Mapping[str, Any], taken: set[str]) -> Job:
        where, number = f"job {place + 1}", place + 1
        values = self._values(where, number, table, Job, skip=tuple(_TABLES))
        for key, kind in _TABLES.items():
            if key not in table:
                continue
            if not isinstance(table[key], dict):
                raise self._error(
                    where, number, key, f"{key} must be a table, such as {key} = {{ ... }}"
                )
            given = dict(table[key])
            if isinstance(given.get("trace"), str):
                given["trace"] = self._trace(given["trace"])
            values[key] = kind(**self._values(f"{where}, {key}", number, given, kind))
        clients = values.get("clients")
        if clients is not None and clients.trace and "arriving" not in table["clients"]:
            values["clients"] = msgspec.structs.replace(clients, arriving=Arriving.TRACE)
        if not values.get("model"):
            if not values.get("command"):
                raise self._error(
                    where, number, "", f'{where}: model must be given, such as model = "bert"'
                )
            values["model"] = Path(values["command"][0]).name
        values.setdefault("name", unused_name(str(values["model"]), taken))
        try:
            return Job(**values)
        except InvalidConfig as error:
            raise self._error(where, number, "name", f"{where}: {error}") from None

    def _values(
        self,
        where: str,
        number: int,
        table: Mapping[str, Any],
        kind: type[msgspec.Struct],
        *,
        skip: tuple[str, ...] = (),
    ) -> dict[str, Any]:
        """The fields of `kind` that `table` says; `skip` are keys that are read elsewhere."""
        fields = {field.name: field for field in msgspec.structs.fields(kind)}
        keys = {name.removesuffix("_ns"): name for name in fields}
        before = f"{where}: " if where else ""
        values = {}
        for key, value in table.items():
            if key in skip:
                continue
            name = keys.get(key)
            if name is None:
                known = [*keys, _JOBS] if kind is ShareSpec else list(keys)
                unknown = UnknownName("key", key, sorted(set(known)))
                raise self._error(where, number, key, f"{before}{unknown}")
            try:
                hint = typing.get_type_hints(kind)[name]
                values[name] = _duration(value) if name.endswith("_ns") else _value(value, hint)
            except InvalidConfig as error:
                raise self._error(where, number, key, f"{before}{key} {error}") from None
        return values

    def _trace(self, name: str) -> list[float]:
        """The arrival times in the first column of a text or CSV file, in s; a header may stand above."""
        path = self._path.parent / name
        times: list[float] = []
        with open_lines(path, "the trace") as lines:
            for number, line in enumerate(lines, start=1):
                cell = line.split(",")[0].strip()
                if not cell or cell.startswith("#"):
                    continue
                try:
                    times.append(float(cell))
                except ValueError:
                    if number > 1:
                        raise InvalidConfig(
                            f"{path}, line {number}: {cell[:40]!r} is {no_number(cell)}"
                        ) from None
                if len(times) > _LONGEST_TRACE:
                    raise InvalidConfig(f"{path}: a trace has at most {_LONGEST_TRACE:,} arrivals")
        return times

    def _error(self, where: str, number: int, key: str, text: str) -> InvalidConfig:
        line = self._line(number, where.rpartition(", ")[2] if ", " in where else "", key)
        place = f", line {line}" if line else ""
        return InvalidConfig(f"{self._path}{place}: {text}")

    def _line(self, job: int, table: str, key: str) -> int:
        """The line that says `key`, or its table, of the job with this number (0: none); 0 if not found."""
        first, end = 1, len(self._text)
        if self._headings:
            if job > len(self._headings):
                return 0
            first = self._headings[job - 1] if job else 1
            end = self._headings[job] - 1 if job < len(self._headings) else end
        for number in range(first, end + 1):
            match = _KEY.match(self._text[number - 1])
            if match and match[1] in (key, table or key):
                return number
        return first if job and self._headings else 0


def _duration(value: Any) -> int:
    if value != "0" and not (isinstance(value, str) and has_unit(value)):
        raise InvalidConfig(f'must be a duration with a unit, such as "20ms", not {shown(value)}')
    return parse_duration_ns(value, bare_unit="ns", shortest_ns=0)


def _value(value: Any, hint: Any) -> Any:
    """`value` as the type `hint` of a field. Raises InvalidConfig with what it must be."""
    if isinstance(hint, type) and issubclass(hint, enum.StrEnum):
        return _one_of(value, hint)
    if hint == tuple[Mode, ...]:
        if not isinstance(value, list):
            raise InvalidConfig(f'must be a list, such as ["tm", "mps"], not {shown(value)}')
        return tuple(_one_of(_plain_mode(item), Mode) for item in value)
    if isinstance(value, bool) and hint is not bool:
        raise InvalidConfig(f"must be {words_of(hint)}, not {shown(value)}")
    try:
        return msgspec.convert(value, hint)
    except msgspec.ValidationError:
        raise InvalidConfig(f"must be {words_of(hint)}, not {shown(value)}") from None


def _plain_mode(value: Any) -> Any:
    return Mode.MPS.value if value == MPS_UNCAPPED else value


def _one_of(value: Any, kind: type[enum.StrEnum]) -> enum.StrEnum:
    if value not in list(kind):
        known = ", ".join(kind)
        raise InvalidConfig(f"must be one of {known}, not {shown(value)}")
    return kind(value)


def words_of(hint: Any) -> str:
    """What a value of the type `hint` is, for an error about another."""
    if isinstance(hint, type) and issubclass(hint, enum.StrEnum):
        return f"one of {', '.join(hint)}"
    if isinstance(hint, types.UnionType):
        return " or ".join(words_of(part) for part in typing.get_args(hint))
    return _WORDS.get(
        hint, "a table of texts" if typing.get_origin(hint) is dict else "another value"
    )
