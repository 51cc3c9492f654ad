"""Cascades from TOML files: the built-in ones beside this file, and a person's own.

    slo = "5s"
    [light]
    model = "sd-turbo+judge"
    exec = { 1 = "100ms", 2 = "150ms" }

Durations are texts with a unit, sizes too. An error names the file, the line and the key, written with
its table ("light.exec").
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from slosched.cascade_spec import CascadeSpec, QualityCurve, ScoreCurve, StageSpec
from slosched.errors import InvalidConfig, UnknownName
from slosched.text_files import read_toml
from slosched.units import has_unit, parse_bytes, parse_duration_ns
from slosched.workloads.cascades.scores import read_scores

T = TypeVar("T")

#: What turns a value of TOML into a value of a field; raises InvalidConfig with what it must be.
_Reader = Callable[[Any], Any]

_HEADING = re.compile(r"\s*\[\s*([^\[\]]+?)\s*\]\s*(?:#.*)?$")
_KEY = re.compile(r"""\s*["']?([^"'=\s]+)["']?\s*=""")


def builtin_cascades() -> list[str]:
    """Names of the cascades that come with the package, sorted."""
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in resources.files(__package__).iterdir()
        if entry.name.endswith(".toml")
    )


def is_cascade_path(name_or_path: str | Path) -> bool:
    """True for what names a file: it has a "/" or ends in .toml. Else it is a built-in cascade's name."""
    text = str(name_or_path)
    return isinstance(name_or_path, Path) or "/" in text or text.endswith(".toml")


def load_cascade(name_or_path: str | Path) -> CascadeSpec:
    """The built-in cascade of that name, or the one that the TOML file at that path describes.

    Its name is the file's, without .toml, unless the file has a `name`. Raises UnknownName for a name that is
    not built in, InvalidConfig with the file and the line of what is wrong.
    """
    if is_cascade_path(name_or_path):
        file = Path(name_or_path)
        text, table = read_toml(file, "the cascade")
        return _CascadeFile(str(file), text, file.parent).cascade(table, file.stem)
    name = str(name_or_path)
    known = builtin_cascades()
    if name not in known:
        raise UnknownName("cascade", name, known)
    with resources.as_file(resources.files(__package__).joinpath(f"{name}.toml")) as file:
        text, table = read_toml(file, "the cascade")
    return _CascadeFile(f"cascade {name}", text, Path()).cascade(table, name)


# -------------------------------------------------------------------------------------- values


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InvalidConfig(f"must be a text in quotes, not {value!r}")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidConfig(f"must be true or false, not {value!r}")
    return value


def _table(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidConfig(f"must be a table, not {value!r}")
    return value


def _whole(low: int) -> _Reader:
    """A whole number of at least `low`."""

    def read(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise InvalidConfig(f"must be a whole number of at least {low}, not {value!r}")
        return value

    return read


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise InvalidConfig(f"must be a number, not {value!r}")
    return float(value)


def _share(value: Any) -> float:
    share = _number(value)
    if not 0 <= share <= 1:
        raise InvalidConfig(f"must be within 0..1, not {value!r}")
    return share


def _numbers(value: Any) -> tuple[float, ...]:
    if not isinstance(value, list):
        raise InvalidConfig(f"must be a list of numbers, not {value!r}")
    found = []
    for place, item in enumerate(value, start=1):
        try:
            found.append(_number(item))
        except InvalidConfig as error:
            raise InvalidConfig(f"number {place} of {len(value)}: it {error}") from None
    return tuple(found)


def _duration(low_ns: int) -> _Reader:
    """A duration with its unit, in ns, of at least `low_ns`."""

    def read(value: Any) -> int:
        if value != "0" and not (isinstance(value, str) and has_unit(value)):
            raise InvalidConfig(f'must be a duration with a unit, such as "20ms", not {value!r}')
        duration_ns = parse_duration_ns(value, bare_unit="ns")
        if duration_ns < low_ns:
            raise InvalidConfig(f"must be above 0, not {value!r}")
        return duration_ns

    return read


def _size(value: Any) -> int:
    if not isinstance(value, str):
        raise InvalidConfig(f'must be a size with a unit, such as "2.1GB", not {value!r}')
    return parse_bytes(value)


def _exec_times(value: Any) -> dict[int, int]:
    found = {}
    for batch, time in _table(value).items():
        if not (batch.isascii() and batch.isdecimal() and int(batch) > 0):
            raise InvalidConfig(
                f"has the batch size {batch!r}, which is not a whole number above 0"
            )
        if int(batch) in found:
            raise InvalidConfig(f"has the batch size {int(batch)} twice")
        try:
            found[int(batch)] = _duration(1)(time)
        except InvalidConfig as error:
            raise InvalidConfig(f"of batch size {batch} {error}") from None
    if 1 not in found:
        raise InvalidConfig('must have the time of batch size 1, such as 1 = "100ms"')
    return dict(sorted(found.items()))


# ---------------------------------------------------------------------------------------- file

_TOP: dict[str, _Reader] = {
    "name": _text,
    "slo": _duration(1),
    "judge": _duration(0),
    "threshold": _share,
    "live_scores": _flag,
    "passes_output": _flag,
    "seed": _whole(0),
    "light": _table,
    "heavy": _table,
    "scores": _table,
    "quality": _table,
    "static": _table,
}
_STAGE: dict[str, _Reader] = {
    "model": _text,
    "exec": _exec_times,
    "load": _duration(0),
    "weights": _size,
    "steps": _whole(0),
    "step": _exec_times,
}
_SCORES: dict[str, _Reader] = {"thresholds": _numbers, "deferred": _numbers, "recorded": _text}
_QUALITY: dict[str, _Reader] = {"light_share": _numbers, "fid": _numbers}
_STATIC: dict[str, _Reader] = {
    "gpus": _whole(1),
    "threshold": _share,
    "light_gpus": _whole(0),
    "heavy_gpus": _whole(0),
    "light_batch": _whole(1),
    "heavy_batch": _whole(1),
}
#: Fields of the classes and their keys here, for errors that the classes raise.
_FIELDS = {"light_shares": "light_share", "fids": "fid", "step_ns": "step", "exec_ns": "exec"}


class _CascadeFile:
    """One file while it is read. `name` is what errors call it; paths in it are relative to `folder`."""

    def __init__(self, name: str, text: str, folder: Path) -> None:
        self._name = name
        self._lines = text.splitlines()
        self._folder = folder

    def cascade(self, table: Mapping[str, Any], name: str) -> CascadeSpec:
        """The cascade that `table`, the whole file, describes. Raises InvalidConfig."""
        top = self._values("", table, _TOP, ("slo", "light", "heavy", "scores"))
        scores = self._values("scores", top["scores"], _SCORES, ("thresholds", "deferred"))
        recorded = scores.pop("recorded", None)
        quality = None
        if "quality" in top:
            given = self._values("quality", top["quality"], _QUALITY, tuple(_QUALITY))
            quality = self._made(
                "quality", lambda: QualityCurve(given["light_share"], given["fid"])
            )
        static_gpus, static_plan = self._static(top.get("static"))
        light, heavy = self._stage("light", top["light"]), self._stage("heavy", top["heavy"])
        optional = ("threshold", "live_scores", "passes_output", "seed")
        return self._made(
            "",
            lambda: CascadeSpec(
                name=top.get("name", name),
                light=light,
                heavy=heavy,
                slo_ns=top["slo"],
                judge_ns=top.get("judge", 0),
                scores=self._made("scores", lambda: ScoreCurve(**scores)),
                quality=quality,
                recorded=() if recorded is None else read_scores(self._folder / recorded),
                static_gpus=static_gpus,
                static_plan=static_plan,
                **{key: top[key] for key in optional if key in top},
            ),
        )

    def _stage(self, section: str, table: Mapping[str, Any]) -> StageSpec:
        values = self._values(section, table, _STAGE, ("model", "exec"))
        return self._made(
            section,
            lambda: StageSpec(
                model=values["model"],
                exec_ns=values["exec"],
                weights_ns=values.get("load", 0),
                weights_bytes=values.get("weights", 0),
                steps=values.get("steps", 0),
                step_ns=values.get("step", {}),
            ),
        )

    def _static(self, table: Mapping[str, Any] | None) -> tuple[int, tuple[float, ...]]:
        """The number of GPUs that the fixed plan is for, and the plan; (0, ()) where there is none."""
        if table is None:
            return 0, ()
        plan = self._values("static", table, _STATIC, tuple(_STATIC))
        if plan["light_gpus"] + plan["heavy_gpus"] > plan["gpus"]:
            raise self._wrong(
                "static.gpus", f"is {plan['gpus']}, fewer than light_gpus and heavy_gpus together"
            )
        return plan["gpus"], tuple(plan[key] for key in _STATIC if key != "gpus")

    def _values(
        self,
        section: str,
        table: Mapping[str, Any],
        known: Mapping[str, _Reader],
        needed: tuple[str, ...],
    ) -> dict[str, Any]:
        """What the keys of one table say. Raises InvalidConfig for an unknown, wrong or missing one."""
        found = {}
        for key, value in table.items():
            path = f"{section}.{key}" if section else key
            if key not in known:
                kind = f"key of [{section}]" if section else "key"
                raise self._error(path, str(UnknownName(kind, key, list(known))))
            try:
                found[key] = known[key](value)
            except InvalidConfig as error:
                raise self._wrong(path, str(error)) from None
        for key in needed:
            if key not in found:
                raise self._wrong(f"{section}.{key}" if section else key, "must be given")
        return found

    def _made(self, section: str, make: Callable[[], T]) -> T:
        """What `make` returns. The file and the table's line stand before its own error."""
        try:
            return make()
        except _PlacedError:
            raise
        except InvalidConfig as error:
            text = str(error)
            for field, key in _FIELDS.items():
                text = re.sub(rf"\b{field}\b", key, text)
            raise self._error(section, text) from None

    def _wrong(self, path: str, message: str) -> InvalidConfig:
        """The error about the key `path` ("light.exec")."""
        return self._error(path, f"{path} {message}")

    def _error(self, path: str, message: str) -> InvalidConfig:
        line = self._line(path)
        where = f"{self._name}, line {line}" if line else self._name
        return _PlacedError(f"{where}: {message}")

    def _line(self, path: str) -> int:
        """The line of the key or the table `path`, else of the table around it; 0 if none is found."""
        section = ""
        lines: dict[str, int] = {}
        for number, line in enumerate(self._lines, start=1):
            heading = _HEADING.match(line)
            if heading is not None:
                section = re.sub(r"[\"'\s]", "", heading[1])
                lines.setdefault(section, number)
            elif (key := _KEY.match(line)) is not None:
                lines.setdefault(f"{section}.{key[1]}" if section else key[1], number)
        while path and path not in lines:
            path = path.rpartition(".")[0]
        return lines.get(path, 0)


class _PlacedError(InvalidConfig):
    """An error that has its file and line already."""
