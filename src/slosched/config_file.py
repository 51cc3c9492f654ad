"""TOML to configuration, and profiles back to TOML.

The keys of a table are the options of a config class (options.py), and msgspec holds each value to the type and
the bounds of its field. An unknown key is an error that names the file, the key and the keys that exist. Sizes
may be written 21.5GiB, durations "5ms"; bare numbers are bytes, and nanoseconds where the key ends in _ns
(another key of a duration needs a unit).
"""

from __future__ import annotations

import math
import re
import tomllib
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from functools import partial
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
from slosched.signature import (
    BYTES,
    MOST_TENSORS,
    ONLY_INPUT,
    Tensor,
    described,
    row_bytes,
    signature_error,
)
from slosched.text_files import read_toml
from slosched.units import parse_bytes, parse_duration_ns
from slosched.workloads.cascades import is_cascade_path, load_cascade

#: The keys of a tensor's table, for an error about one.
_TENSOR_KEYS = (
    'it has shape, as [-1] or [3, 224, 224] (one request), dtype, as "int64", and where they are needed pad '
    "(a number) and max_bytes"
)
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
    dict[int, Any]: 'a table of times by length, such as { 64 = { 1 = "1ms", 2 = "1.5ms" } }',
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


#: Before a cascade whose programs an emulated GPU runs.
_OF_CASCADE = "cascade:"


def load_profile(name_or_path: str | Path) -> GpuProfile:
    """The built-in profile of that name, or the one in that file (a path, or a name ending in .toml).

    "cascade:NAME" and "cascade:FILE" are GPUs of 80 GB with the two programs of a cascade. Raises UnknownName
    for a name that is none of these, InvalidConfig for a file that is not a profile.
    """
    text = str(name_or_path)
    if text in builtin_profiles():
        source = resources.files("slosched").joinpath("profiles", f"{text}.toml")
        return _profile(f"profile {text}", tomllib.loads(source.read_text(encoding="utf-8")))
    if text.startswith(_OF_CASCADE):
        return load_cascade(text.removeprefix(_OF_CASCADE)).profile()
    path = Path(name_or_path)
    if not (path.is_file() or path.suffix == ".toml" or "/" in text):
        raise UnknownName("profile", text, builtin_profiles())
    return _profile(str(path), read_toml(path, "")[1])


#: What a model's table in a profile has beside the fields of ModelProfile.
_PROFILE_TABLES: dict[str, Any] = {
    "inputs": dict[str, Any],
    "outputs": dict[str, Any],
    "exec_at": dict[int, Any],
}


def _profile(where: str, table: Mapping[str, Any]) -> GpuProfile:
    values = _read(where, table, GpuProfile, {"interpolate": bool})
    models: dict[str, ModelProfile] = {}
    for name, model in values.get("models", {}).items():
        place = f"{where}, model {name!r}"
        if not isinstance(model, dict):
            raise InvalidConfig(f"{place}: must be a table [models.{name}]")
        given = _read(place, model, ModelProfile, _PROFILE_TABLES)
        given["name"] = name
        given["exec_ns"] = dict(sorted(given.get("exec_ns", {}).items()))
        for kind in ("inputs", "outputs"):
            given[kind] = _tensors(f"{place}, {kind}", given.get(kind, {}))
        at = given.pop("exec_at", {})
        given["exec_ns_at"] = {
            length: dict(sorted(_exec_times(place, length, times).items()))
            for length, times in at.items()
        }
        if at and given["exec_ns"]:
            raise InvalidConfig(
                f"{place}: give exec or exec_at, the times of each length, not both"
            )
        models[name] = _build(place, ModelProfile, given)
    if not models:
        raise InvalidConfig(f"{where}: it has no [models.NAME] table")
    if values.pop("interpolate", False):
        models = {name: model.interpolated() for name, model in models.items()}
    values["models"] = models
    return _build(where, GpuProfile, values)


def _exec_times(place: str, length: int, times: Any) -> dict[int, int]:
    try:
        found: dict[int, int] = _value(times, dict[int, int], "ns")
    except (ValueError, InvalidConfig) as error:
        raise InvalidConfig(f"{place}: exec_at, length {length}: {error}") from None
    return found


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
        heading = f"models.{_key(name)}"
        lines += ["", f"[{heading}]"]
        if not model.lengths:
            lines.append(f"exec_ns = {_times(model.exec_ns)}")
        lines += [
            f"weights_ns = {model.weights_ns:_}",
            f"weights_bytes = {model.weights_bytes}",
        ]
        if model.score:
            lines.append(f"score = {_quoted(model.score)}")
        if model.steps:
            lines += [f"steps = {model.steps}", f"step_ns = {_times(model.step_ns)}"]
        for kind, tensors in (("input", model.inputs), ("output", model.outputs)):
            if not tensors:
                lines += [
                    f"{kind}_shape = {list(getattr(model, f'{kind}_shape'))}",
                    f"{kind}_dtype = {_quoted(getattr(model, f'{kind}_dtype'))}",
                ]
        if model.lengths:
            lines.append(f"[{heading}.exec_at]")
            lines += [f"{length} = {_times(model.exec_ns_at[length])}" for length in model.lengths]
        for kind, tensors in (("inputs", model.inputs), ("outputs", model.outputs)):
            for tensor in tensors:
                lines += [f"[{heading}.{kind}.{_key(tensor.name)}]", *_tensor_lines(tensor)]
    return "\n".join(lines) + "\n"


def _key(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else _quoted(name)


def _times(exec_ns: Mapping[int, int]) -> str:
    return "{ " + ", ".join(f"{batch} = {ns:_}" for batch, ns in sorted(exec_ns.items())) + " }"


def _tensor_lines(tensor: Tensor) -> list[str]:
    lines = [f"shape = {list(tensor.shape)}", f"dtype = {_quoted(tensor.dtype)}"]
    return [*lines, f"max_bytes = {tensor.max_bytes}"] if tensor.max_bytes else lines


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
INPUT_FORMS = (
    "input_shape is the short form, for one tensor of one fixed shape and dtype. A model with several inputs, "
    "or with a dimension that varies, has a table [models.NAME.inputs.INPUT] with shape and dtype for each; "
    "-1 there is a dimension that varies, and lengths = [64, 128] beside it are the lengths that are served"
)
#: The largest message there is (transport/codec.py, which files of configuration do not know).
_INPUT_AT_MOST_BYTES = 64 * 1024 * 1024
INPUT_DTYPES = ("float32", "float16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")
_SOURCES = ("factory", "pt2", "transformers", "safetensors", "cupy")


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
            model_source(file, name, table) for name, table in values["models"].items()
        )
    if values.get("profile", "").endswith(".toml"):
        values["profile"] = str(file.parent / values["profile"])
    if values.get("repository"):
        values["repository"] = str(file.parent / values["repository"])
    start = base or WorkerConfig()
    return _build(str(file), lambda **given: replace(start, **given), values)


def model_source(file: Path, name: str, table: Any) -> ModelSource:
    """What [models.`name`] of `file` says. Paths in it are relative to the file. Raises InvalidConfig."""
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
            f"{INPUT_FORMS}"
        )
    tables: dict[str, Any] = {"inputs": dict[str, Any], "outputs": dict[str, Any]}
    values = _read(where, table | _output(where, table), ModelSource, tables)
    values["pads"] = {}
    for kind in tables:
        values[kind] = _tensors(f"{where}, {kind}", values.get(kind, {}), values["pads"])
    for key in ("pt2", "transformers", "safetensors", "config"):
        if values.get(key):
            values[key] = str(file.parent / values[key])
    _settle_source(where, values)
    _check_signature(where, values)
    for key in ("factory", "cupy"):
        module, colon, function = values.get(key, ":").partition(":")
        if values.get(key) and not (colon and module and function):
            raise InvalidConfig(
                f"{where}: {key} must be package.module:function, not {values[key]!r}"
            )
    if values.get("factory") or values.get("cupy"):
        values["folder"] = str(file.parent.resolve())
    values["name"] = name
    return _build(where, ModelSource, values)


def _settle_source(where: str, values: _Values) -> None:
    """Check that one source is given, with what it needs; a folder of safetensors is one of transformers."""
    given = [key for key in _SOURCES if values.get(key)]
    if len(given) > 1:
        raise InvalidConfig(
            f"{where}: exactly one of {', '.join(_SOURCES[:-1])} and {_SOURCES[-1]} must be given, not "
            f"{' and '.join(given)}"
        )
    if values.get("safetensors") and not values.get("config"):
        if not Path(values["safetensors"]).is_dir():
            raise InvalidConfig(
                f"{where}: safetensors needs config, the transformers config.json of it; or name the folder "
                "of both"
            )
        values["transformers"] = values.pop("safetensors")
    if values.get("config") and not values.get("safetensors"):
        raise InvalidConfig(f"{where}: config goes with safetensors alone")


def _check_signature(where: str, values: _Values) -> None:
    inputs, lengths = values["inputs"], values.get("lengths", ())
    factory, cupy = values.get("factory"), values.get("cupy")
    if cupy and (inputs or values["outputs"] or values.get("output") or lengths):
        raise InvalidConfig(
            f"{where}: a cupy model takes one array of input_shape and returns one array; leave inputs, "
            "outputs, output and lengths out"
        )
    if inputs and values.get("input_shape"):
        raise InvalidConfig(f"{where}: give input_shape or the tables of inputs, not both")
    if values.get("output") and values["outputs"]:
        raise InvalidConfig(f"{where}: give output or the tables of outputs, not both")
    # The others know their own inputs, or are known by their names.
    needed = factory or cupy or values.get("safetensors")
    needed = needed or (values.get("transformers") and not lengths)
    if needed and not (inputs or values.get("input_shape")):
        raise InvalidConfig(
            f"{where}: input_shape must be given, such as [3, 224, 224] (one request). {INPUT_FORMS}"
        )
    if values.get("input_dtype", "float32") not in INPUT_DTYPES:
        raise InvalidConfig(
            f"{where}: input_dtype {values['input_dtype']!r} is none of {', '.join(INPUT_DTYPES)}"
        )
    one = Tensor(
        ONLY_INPUT, values.get("input_dtype", "float32"), tuple(values.get("input_shape", ()))
    )
    takes = inputs or ((one,) if one.shape else ())
    for tensor in inputs:
        if tensor.dtype not in (*INPUT_DTYPES, BYTES):
            known = ", ".join((*INPUT_DTYPES, BYTES))
            raise InvalidConfig(f"{where}: dtype of input {tensor} is none of {known}")
    wrong = signature_error(takes, values["outputs"], lengths) if takes else ""
    if wrong:
        raise InvalidConfig(f"{where}: {wrong}")
    size = row_bytes(takes, max(lengths, default=0))
    if size > _INPUT_AT_MOST_BYTES:
        at = f" at length {max(lengths)}" if lengths else ""
        raise InvalidConfig(
            f"{where}: an input of {described(takes)}{at} has {size:,} bytes, and at most "
            f"{_INPUT_AT_MOST_BYTES:,} travel; it is the shape of one request, without the batch"
        )


class _TensorTable(msgspec.Struct, forbid_unknown_fields=True):
    """What [models.NAME.inputs.INPUT] says, and [models.NAME.outputs.OUTPUT] without `pad`."""

    shape: list[int]
    dtype: str = "float32"
    pad: float = 0
    max_bytes: int | str = 0


def _tensors(
    where: str, tables: Mapping[str, Any], pads: dict[str, float] | None = None
) -> tuple[Tensor, ...]:
    """The tensors that the tables describe, in the order of the file. The pads of inputs go into `pads`."""
    found = []
    if len(tables) > MOST_TENSORS:
        raise InvalidConfig(
            f"{where}: {len(tables)} tables, and at most {MOST_TENSORS} are possible"
        )
    for name, table in tables.items():
        place = f"{where}, {name!r}"
        if not name.isprintable():
            raise InvalidConfig(f"{place}: a name must be printable")
        try:
            read = msgspec.convert(table, _TensorTable)
            max_bytes = read.max_bytes
            size = parse_bytes(max_bytes) if isinstance(max_bytes, str) else max_bytes
            tensor = msgspec.convert([name, read.dtype, read.shape, size], Tensor)
        except (msgspec.ValidationError, InvalidConfig) as error:
            raise InvalidConfig(f"{place}: {error}; {_TENSOR_KEYS}") from None
        least = 4 * math.prod(read.shape)
        if read.dtype == BYTES and size < least and min(read.shape, default=1) > 0:
            raise InvalidConfig(
                f"{place}: BYTES need max_bytes, for all elements together, with 4 bytes for the size of "
                f"each: at least {least}, not {size}"
            )
        if read.pad and pads is not None:
            pads[name] = read.pad
        found.append(tensor)
    return tuple(found)


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

    [scheduler] is SchedulerConfig, each [[weights]] a WeightRule of it, and [cascade] its CascadeOptions.
    `cascades` are built-in names, and files relative to this one.
    """
    file = Path(path)
    tables = {
        "weights": list[dict[str, Any]],
        "cascades": tuple[str, ...],
        "cascade": dict[str, Any],
    }
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
    if "cascades" in values:
        names = values.pop("cascades")
        beside = [file.parent / each if is_cascade_path(each) else each for each in names]
        scheduler = replace(scheduler, cascades=tuple(map(load_cascade, beside)))
    if "cascade" in values:
        where = f"{file}, [cascade]"
        scheduler = replace(
            scheduler, cascade=with_table(where, scheduler.cascade, values.pop("cascade"))
        )
    values["scheduler"] = scheduler
    make: Callable[..., ControllerConfig] = partial(replace, base) if base else ControllerConfig
    return _build(str(file), make, values)


__all__ = [
    "builtin_profiles",
    "dump_profile",
    "load_controller_config",
    "load_profile",
    "load_worker_config",
    "with_table",
    "write_profile",
]
