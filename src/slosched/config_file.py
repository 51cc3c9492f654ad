"""TOML to configuration, and profiles back to TOML.

The keys of a table are the options of a config class (options.py), and msgspec holds each value to the type and
the bounds of its field. An unknown key is an error that names the file, the key and the keys that exist. Sizes
may be written 21.5GiB, durations "5ms"; bare numbers are bytes, and nanoseconds where the key ends in _ns
(another key of a duration needs a unit).
"""

from __future__ import annotations

import re
import tomllib
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from slosched.config import (
    ControllerConfig,
    EmulationNoise,
    GpuProfile,
    ModelProfile,
    ModelSource,
    SchedulerConfig,
    WeightRule,
    WorkerConfig,
)
from slosched.errors import InvalidConfig, UnknownName
from slosched.options import Row, bounds_text, constraints, plain, rows
from slosched.output_files import write_file
from slosched.text_files import read_toml
from slosched.units import parse_bytes, parse_duration_ns, tensor_bytes

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")

T = TypeVar("T")

#: What a value of a type is in TOML, for an error about one that is not.
_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text in quotes",
    tuple[int, ...]: "a list of whole numbers",
    tuple[float, ...]: "a list of numbers",
    tuple[str, ...]: "a list of texts",
    dict[int, int]: 'a table of times by batch size, such as { 1 = "2.6ms", 2 = "3.8ms" }',
    dict[str, Any]: "a table",
    dict[str, str]: "a table of texts",
    list[dict[str, Any]]: "tables of their own, each headed [[weights]]",
}


class _Values(dict[str, Any]):
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


def _read(
    where: str, table: Mapping[str, Any], config: type, others: Mapping[str, Any] | None = None
) -> _Values:
    """The values of `table` for the fields of the class `config`, checked; a table inside is a dict.

    `others` are further keys with their types. `where` names the file and the table for errors.
    """
    known = {row.field: row for row in rows(config) if row.option.in_file}
    kinds = {field: _kind(row) for field, row in known.items()} | dict(others or {})
    spellings = _spellings(known) | {key: key for key in others or {}}
    values = _Values()
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
            values[field] = _value(value, kinds[field], unit)
        except (ValueError, InvalidConfig) as error:
            raise InvalidConfig(f"{where}: {key} {error}") from None
    return values


def _kind(row: Row) -> Any:
    """The type of an option's value in TOML: what is a config class of its own, or several, is a table."""
    kind = row.plain
    parts = (kind, *typing.get_args(kind))
    return dict[str, Any] if any(is_dataclass(part) for part in parts) else row.kind


def _value(value: Any, kind: Any, unit: str) -> Any:
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
        return f"must be {_WORDS[own]}"
    return f"must be {' and '.join(_bounds(kind))}"


def _bounds(kind: Any) -> list[str]:
    """The bounds on a number of this type, or on each number of a list."""
    own, limits = constraints(kind)
    found = [bounds_text(limit) for limit in limits if isinstance(limit, msgspec.Meta)]
    listed = typing.get_origin(own) is tuple
    inner = [each for part in typing.get_args(own) for each in _bounds(part)]
    return found + ([f"a list of numbers, each {each}" for each in inner] if listed else inner)


def _build(where: str, make: Callable[..., T], values: _Values) -> T:
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

    return _build(where, make, _read(where, table, type(base)))


def _missing(make: Callable[..., object], values: Mapping[str, Any]) -> str:
    if not is_dataclass(make):
        return ""
    lacking = [
        f.name
        for f in fields(make)
        if f.default is MISSING and f.default_factory is MISSING and f.name not in values
    ]
    return f"{', '.join(lacking)} must be given" if lacking else ""


# ------------------------------------------------------------------------------------ profiles


def builtin_profiles() -> list[str]:
    """Names of the profiles that come with the package, sorted."""
    folder = resources.files("slosched").joinpath("profiles")
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in folder.iterdir()
        if entry.name.endswith(".toml")
    )


def load_profile(name_or_path: str | Path) -> GpuProfile:
    """The built-in profile of that name, or the one in that file (a path, or a name ending in .toml).

    Raises UnknownName for a name that is neither, InvalidConfig for a file that is not a profile.
    """
    text = str(name_or_path)
    if text in builtin_profiles():
        source = resources.files("slosched").joinpath("profiles", f"{text}.toml")
        return _profile(f"profile {text}", tomllib.loads(source.read_text(encoding="utf-8")))
    path = Path(name_or_path)
    if not (path.is_file() or path.suffix == ".toml" or "/" in text):
        raise UnknownName("profile", text, builtin_profiles())
    return _profile(str(path), read_toml(path, "")[1])


def _profile(where: str, table: Mapping[str, Any]) -> GpuProfile:
    values = _read(where, table, GpuProfile, {"interpolate": bool})
    models: dict[str, ModelProfile] = {}
    for name, model in values.get("models", {}).items():
        place = f"{where}, model {name!r}"
        if not isinstance(model, dict):
            raise InvalidConfig(f"{place}: must be a table [models.{name}]")
        given = _read(place, model, ModelProfile)
        given["name"] = name
        given["exec_ns"] = dict(sorted(given.get("exec_ns", {}).items()))
        models[name] = _build(place, ModelProfile, given)
    if not models:
        raise InvalidConfig(f"{where}: it has no [models.NAME] table")
    if values.pop("interpolate", False):
        models = {name: model.interpolated() for name, model in models.items()}
    values["models"] = models
    return _build(where, GpuProfile, values)


def dump_profile(profile: GpuProfile) -> str:
    """The profile as TOML; `load_profile` of it gives an equal one."""
    lines = [
        f"name = {_quoted(profile.name)}",
        f"weights_cache_bytes = {profile.weights_cache_bytes}",
        f"page_bytes = {profile.page_bytes}",
        f"clock_mhz = {profile.clock_mhz}",
    ]
    for name in sorted(profile.models):
        model = profile.models[name]
        batches = ", ".join(f"{b} = {ns:_}" for b, ns in sorted(model.exec_ns.items()))
        lines += [
            "",
            f"[models.{name if _BARE_KEY.fullmatch(name) else _quoted(name)}]",
            f"exec_ns = {{ {batches} }}",
            f"weights_ns = {model.weights_ns:_}",
            f"weights_bytes = {model.weights_bytes}",
            f"input_shape = {list(model.input_shape)}",
            f"input_dtype = {_quoted(model.input_dtype)}",
            f"output_shape = {list(model.output_shape)}",
            f"output_dtype = {_quoted(model.output_dtype)}",
        ]
    return "\n".join(lines) + "\n"


def write_profile(path: Path, profile: GpuProfile, *, replacing: bool) -> None:
    """Write `profile` to `path`, whole or not at all: a reader finds the old one meanwhile.

    Without `replacing` the file must not be there. Raises InvalidConfig if it is, or cannot be written.
    """
    write_file(path, dump_profile(profile).encode(), replacing=replacing, durable=True)


def _quoted(text: str) -> str:
    """A TOML basic string."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in escaped) + '"'


# ------------------------------------------------------------------------------------- daemons

#: What a model of one's own can take.
ONE_INPUT = (
    "A model takes one tensor of one fixed shape and dtype for each request: give one that takes more a "
    "wrapper with one input, and lengths that vary a model each, padded to its length"
)
#: The largest message there is (transport/codec.py, which files of configuration do not know).
_INPUT_AT_MOST_BYTES = 64 * 1024 * 1024
INPUT_DTYPES = ("float32", "float16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")


def load_worker_config(path: str | Path, base: WorkerConfig | None = None) -> WorkerConfig:
    """`base` (the defaults) with what the file says. Paths in it are relative to the file.

    [noise] is EmulationNoise; each [models.NAME] is a ModelSource. Raises InvalidConfig.
    """
    file = Path(path)
    values = _read(str(file), read_toml(file, "")[1], WorkerConfig)
    if "noise" in values:
        where = f"{file}, [noise]"
        values["noise"] = _build(
            where, EmulationNoise, _read(where, values["noise"], EmulationNoise)
        )
    if "models" in values:
        values["models"] = tuple(
            _model_source(file, name, table) for name, table in values["models"].items()
        )
    if values.get("profile", "").endswith(".toml"):
        values["profile"] = str(file.parent / values["profile"])
    start = base or WorkerConfig()
    return _build(str(file), lambda **given: replace(start, **given), values)


def _model_source(file: Path, name: str, table: Any) -> ModelSource:
    where = f"{file}, model {name!r}"
    if not isinstance(table, dict):
        raise InvalidConfig(f"{where}: must be a table [models.{name}]")
    shape = table.get("input_shape", [1])
    whole = (
        isinstance(shape, list) and shape and all(type(size) is int and size > 0 for size in shape)
    )
    if not whole:
        raise InvalidConfig(
            f"{where}: input_shape must be a list of sizes of at least 1, as [3, 224, 224], not {shape!r}. "
            f"{ONE_INPUT}"
        )
    values = _read(where, table | _output(where, table), ModelSource)
    given = [key for key in ("factory", "pt2", "safetensors", "cupy") if values.get(key)]
    if len(given) > 1:
        raise InvalidConfig(
            f"{where}: exactly one of factory, pt2, safetensors and cupy must be given, not "
            f"{' and '.join(given)}"
        )
    if given == ["safetensors"] and not values.get("config"):
        raise InvalidConfig(
            f"{where}: safetensors needs config, the transformers config.json of it"
        )
    # Without a source it is one of the zoo's or a library's, which the worker looks up: they know their own.
    if given and not values.get("input_shape"):
        raise InvalidConfig(
            f"{where}: input_shape must be given, such as [3, 224, 224] (one request)"
        )
    if values.get("input_dtype", "float32") not in INPUT_DTYPES:
        raise InvalidConfig(
            f"{where}: input_dtype {values['input_dtype']!r} is none of {', '.join(INPUT_DTYPES)}"
        )
    size = tensor_bytes(values.get("input_shape", ()), values.get("input_dtype", "float32"))
    if size > _INPUT_AT_MOST_BYTES:
        raise InvalidConfig(
            f"{where}: an input of input_shape {shape} has {size:,} bytes, and at most "
            f"{_INPUT_AT_MOST_BYTES:,} travel; it is the shape of one request, without the batch"
        )
    if values.get("output") and values.get("cupy"):
        raise InvalidConfig(f"{where}: a cupy model returns one array; leave `output` out")
    for key in ("factory", "cupy"):
        module, colon, function = values.get(key, ":").partition(":")
        if values.get(key) and not (colon and module and function):
            raise InvalidConfig(
                f"{where}: {key} must be package.module:function, not {values[key]!r}"
            )
    for key in ("pt2", "safetensors", "config"):
        if values.get(key):
            values[key] = str(file.parent / values[key])
    if values.get("factory") or values.get("cupy"):
        values["folder"] = str(file.parent.resolve())
    values["name"] = name
    return _build(where, ModelSource, values)


def _output(where: str, table: Mapping[str, Any]) -> dict[str, str]:
    """The key `output` as a text: the name of one of several outputs, or its index."""
    value = table.get("output", "0")
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        wanted = 'must be the name of an output, or its index: "logits" or 0'
    elif isinstance(value, int) and value < 0:
        wanted = "must be at least 0 where it is an index"
    else:
        return {"output": str(value)} if "output" in table else {}
    raise InvalidConfig(f"{where}: output {wanted} (it is {value!r})")


def load_controller_config(
    path: str | Path, base: ControllerConfig | None = None
) -> ControllerConfig:
    """`base` (if given) with what the file says. Raises InvalidConfig.

    [scheduler] is SchedulerConfig, and each [[weights]] a WeightRule of it.
    """
    file = Path(path)
    tables = {"weights": list[dict[str, Any]]}
    values = _read(str(file), read_toml(file, "")[1], ControllerConfig, tables)
    scheduler = base.scheduler if base is not None else SchedulerConfig()
    if "scheduler" in values:
        where = f"{file}, [scheduler]"
        given = _read(where, values["scheduler"], SchedulerConfig)
        start = scheduler
        scheduler = _build(where, lambda **more: replace(start, **more), given)
    if "weights" in values:
        rules = tuple(
            _build(where, WeightRule, _read(where, table, WeightRule))
            for place, table in enumerate(values.pop("weights"), start=1)
            for where in (f"{file}, [[weights]] {place}",)
        )
        scheduler = replace(scheduler, weights=rules)
    values["scheduler"] = scheduler
    if base is not None:
        start_config = base
        return _build(str(file), lambda **more: replace(start_config, **more), values)
    return _build(str(file), ControllerConfig, values)


__all__ = [
    "builtin_profiles",
    "dump_profile",
    "load_controller_config",
    "load_profile",
    "load_worker_config",
    "with_table",
    "write_profile",
]
