"""What a sweep varies: keys of an experiment, the values that each takes, and the experiments that come out.

A key is a path into the experiment, as in its TOML file: `jobs.0.boundary.every`, `jobs.model_A.batch`,
`jobs.*.priority` (all jobs), `modes`, `duration`. A name without `_ns` takes a duration with its unit.
"""

from __future__ import annotations

import itertools
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from slosched.errors import InvalidConfig, UnknownName
from slosched.share.hotcarbon import MPS_UNCAPPED, model_jobs
from slosched.share.spec_check import check_spec, shown
from slosched.share.spec_file import words_of
from slosched.share_spec import Job, Mode, ShareSpec
from slosched.units import has_unit, parse_duration_ns

#: Points of one sweep; more are a slip of a key.
MOST_POINTS = 10_000
#: Between the parts of one value of `modes` ("tm+mps") or `jobs` ("bert-1+gpt-1").
TOGETHER = "+"
_MODES, _JOBS, _EVERY_JOB = "modes", "jobs", "*"
_NS = "_ns"


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One experiment of a sweep. `settings` are its values by key, as given; `folder` names it.

    With `together` its runs lie beside those of the other points and not in a folder of their own: for mixes,
    whose paths differ, so that each model runs alone only once.
    """

    folder: str
    spec: ShareSpec
    settings: dict[str, str | int | float | bool]
    together: bool = False

    @property
    def name(self) -> str:
        """Its settings in short, for tables and figures: every=4."""
        keys = short_keys(list(self.settings))
        return ", ".join(f"{keys[key]}={value}" for key, value in self.settings.items()) or "all"


def parse_axis(text: str) -> tuple[str, tuple[str, ...]]:
    """The key and the values of "jobs.0.boundary.every=1,4,10". Raises InvalidConfig."""
    key, equals, values = text.partition("=")
    found = tuple(value.strip() for value in values.split(",") if value.strip())
    if not equals or not key.strip() or not found:
        raise InvalidConfig(
            f"{text[:100]!r} is not KEY=VALUE,VALUE; write it as jobs.0.boundary.every=1,4,10"
        )
    twice = sorted({value for value in found if found.count(value) > 1})
    if twice:
        raise InvalidConfig(f"{key.strip()}: the value {twice[0]} stands twice")
    return key.strip(), found


def points_of(spec: ShareSpec, axes: Mapping[str, Sequence[Any]]) -> tuple[Point, ...]:
    """Every combination of the values of `axes`, the last key varying fastest. Raises InvalidConfig."""
    for key, values in axes.items():
        if not values:
            raise InvalidConfig(f"{key}: no values; write it as {key}=1,4,10")
    count = 1
    for values in axes.values():
        count *= len(values)
    if count > MOST_POINTS:
        raise InvalidConfig(f"{count:,} points; a sweep has at most {MOST_POINTS:,}")
    made: list[Point] = []
    folders: set[str] = set()
    for combination in itertools.product(*axes.values()):
        settings = dict(zip(axes, combination, strict=True))
        changed = spec
        for key, value in settings.items():
            changed = with_value(changed, key, value)
        folder = _folder(settings, folders)
        folders.add(folder.lower())
        try:
            made.append(Point(folder=folder, spec=check_spec(changed), settings=settings))
        except InvalidConfig as error:
            given = ", ".join(f"{key}={value}" for key, value in settings.items())
            raise InvalidConfig(f"{given}: {error}") from None
    return tuple(made)


def with_value(spec: ShareSpec, key: str, value: Any) -> ShareSpec:
    """`spec` with `value` at `key`. Raises InvalidConfig if the key or the value is wrong."""
    parts = key.split(".")
    try:
        if parts == [_MODES]:
            return msgspec.structs.replace(spec, modes=_modes(value))
        if parts[0] == _JOBS:
            return _with_jobs(spec, parts[1:], value)
        return _replaced(spec, parts, value)
    except InvalidConfig as error:
        raise InvalidConfig(f"{key}={value}: {error}") from None


def _with_jobs(spec: ShareSpec, parts: Sequence[str], value: Any) -> ShareSpec:
    if not parts:
        named = str(value).split(TOGETHER) if isinstance(value, str) else list(value)
        return msgspec.structs.replace(spec, jobs=model_jobs(named))
    if len(parts) < 2:
        raise InvalidConfig("name a field of the job, such as jobs.0.batch")
    places = _places(spec, parts[0])
    jobs = list(spec.jobs)
    for place in places:
        jobs[place] = _replaced(jobs[place], parts[1:], value)
    return msgspec.structs.replace(spec, jobs=tuple(jobs))


def _places(spec: ShareSpec, which: str) -> list[int]:
    names = [job.name for job in spec.jobs]
    if which == _EVERY_JOB:
        return list(range(len(names)))
    if which in names:
        return [names.index(which)]
    if re.fullmatch(r"[0-9]{1,4}", which) and int(which) < len(names):
        return [int(which)]
    raise UnknownName("job", which, [*names, *map(str, range(len(names))), _EVERY_JOB])


S = typing.TypeVar("S", bound=msgspec.Struct)


def _replaced(table: S, parts: Sequence[str], value: Any) -> S:
    """`table` with `value` at the path `parts`."""
    hints = typing.get_type_hints(type(table))
    known = [field.name for field in msgspec.structs.fields(table)]
    name = parts[0]
    duration = name not in known and f"{name}{_NS}" in known
    if duration:
        name += _NS
    if name not in known:
        raise UnknownName("key", parts[0], [field.removesuffix(_NS) for field in known])
    held = getattr(table, name)
    if len(parts) > 1:
        if not isinstance(held, msgspec.Struct):
            raise InvalidConfig(f"{parts[0]} has no fields of its own")
        return msgspec.structs.replace(table, **{name: _replaced(held, parts[1:], value)})
    if isinstance(held, msgspec.Struct) or (
        isinstance(held, tuple) and held[:1] and isinstance(held[0], Job)
    ):
        raise InvalidConfig(f"name a field of {parts[0]}, such as {parts[0]}.{_first_field(held)}")
    return msgspec.structs.replace(table, **{name: _converted(value, hints[name], duration)})


def _first_field(held: Any) -> str:
    fields = msgspec.structs.fields(held if isinstance(held, msgspec.Struct) else held[0])
    return fields[0].name


def _converted(value: Any, hint: Any, duration: bool) -> Any:
    if duration and isinstance(value, str):
        if value != "0" and not has_unit(value):
            raise InvalidConfig(f'a duration has a unit, such as "20ms", not {value!r}')
        return parse_duration_ns(value, bare_unit="ns", shortest_ns=0)
    if typing.get_origin(hint) is tuple and isinstance(value, str):
        value = value.split("x" if hint == tuple[int, int] else TOGETHER)  # a size as 720x1280
    if hint is int and isinstance(value, str) and re.fullmatch(r"[0-9]+e[0-9]{1,2}", value):
        value = str(int(float(value)))
    try:
        return msgspec.convert(value, hint, strict=False)
    except msgspec.ValidationError:
        raise InvalidConfig(f"it must be {words_of(hint)}, not {shown(value)}") from None


def _modes(value: Any) -> tuple[Mode, ...]:
    named = str(value).split(TOGETHER) if isinstance(value, str) else list(value)
    made = []
    for name in named:
        plain = Mode.MPS.value if name == MPS_UNCAPPED else str(name)
        if plain not in list(Mode):
            raise UnknownName("mode", plain, [*Mode, MPS_UNCAPPED])
        made.append(Mode(plain))
    return tuple(made)


# ------------------------------------------------------------------------------------------- names


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each key, or as much of its end as tells it from the others."""
    made = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        made[key] = next(
            (end for end in ends if sum(o == end or o.endswith(f".{end}") for o in keys) == 1), key
        )
    return made


def _folder(settings: Mapping[str, Any], taken: set[str]) -> str:
    """every_4, or every_4-mode_tm: a name for files, different from all that are `taken`."""
    keys = short_keys(list(settings))
    text = "-".join(f"{keys[key]}_{_spelled(value)}" for key, value in settings.items()) or "all"
    wanted = folder_name(text)
    folder, number = wanted, 2
    while folder.lower() in taken:
        folder, number = f"{wanted}_{number}", number + 1
    return folder


def folder_name(text: str) -> str:
    """`text` as a name of a folder or file; a model of a library has a slash in its name."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", text)[:100].strip(".") or "point"


def _spelled(value: Any) -> str:
    return TOGETHER.join(map(str, value)) if isinstance(value, list | tuple) else str(value)
