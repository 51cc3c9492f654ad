"""TOML to configuration, and profiles back to TOML.

Every key is checked: one that nobody knows is an error that names the file, the key and the keys that
exist. Sizes may be written 21.5GiB, durations "5ms"; bare numbers are bytes, and nanoseconds where the key
ends in _ns (another key of a duration needs a unit).
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

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
from slosched.output_files import write_file
from slosched.text_files import read_toml
from slosched.units import parse_bytes, parse_duration_ns, tensor_bytes

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")

T = TypeVar("T")
_Reader = Callable[[Any], Any]


# ------------------------------------------------------------------------------ values of keys


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("must be a whole number")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a number")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a text in quotes")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _size(value: Any) -> int:
    """Bytes: 1024 or "21.5GiB"."""
    if isinstance(value, str):
        return parse_bytes(value)
    size = _integer(value)
    if size < 0:
        raise ValueError("must be at least 0")
    return size


def _duration(value: Any) -> int:
    """Nanoseconds: 5000000 or "5ms"."""
    if isinstance(value, str):
        if value.strip().isdecimal() and int(value):
            raise ValueError('must have a unit where it is a text, as "5ms"')
        return parse_duration_ns(value, bare_unit="ns")
    duration = _integer(value)
    if duration < 0:
        raise ValueError("must be at least 0")
    return duration


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise ValueError("must be a list of whole numbers")
    shape = tuple(_integer(extent) for extent in value)
    if any(extent < 1 for extent in shape):
        raise ValueError("must hold numbers of at least 1")
    return shape


def _output(value: Any) -> str:
    """The name or the index of an output."""
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise ValueError('must be the name of an output, or its index: "logits" or 0')
    if isinstance(value, int) and value < 0:
        raise ValueError("must be at least 0 where it is an index")
    return str(value)


def _numbers(value: Any) -> tuple[float, ...]:
    if not isinstance(value, list):
        raise ValueError("must be a list of numbers")
    return tuple(_number(item) for item in value)


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError("must be a list of texts")
    return tuple(_text(item) for item in value)


def _exec_table(value: Any) -> dict[int, int]:
    if not isinstance(value, dict):
        raise ValueError('must be a table such as { 1 = "2.6ms", 2 = "3.8ms" }')
    table: dict[int, int] = {}
    for batch, duration in value.items():
        if not batch.isdigit():
            raise ValueError(f"has the batch size {batch!r}, which is not a whole number")
        table[int(batch)] = _duration(duration)
    return dict(sorted(table.items()))


def _table(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("must be a table")
    return value


def _tables(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError("must be tables of their own, each headed [[weights]]")
    return value


_MODEL: dict[str, _Reader] = {
    "exec_ns": _exec_table, "weights_ns": _duration, "weights_bytes": _size,
    "input_shape": _shape, "input_dtype": _text, "output_shape": _shape, "output_dtype": _text,
}  # fmt: skip
_PROFILE: dict[str, _Reader] = {
    "name": _text, "weights_cache_bytes": _size, "page_bytes": _size, "clock_mhz": _integer,
    "models": _table, "interpolate": _flag,
}  # fmt: skip
_NOISE: dict[str, _Reader] = {
    "seed": _integer, "exec_sigma": _number, "exec_quantiles": _numbers,
    "stall_probability": _number, "stall_ns": _duration,
    "pcie_bytes_per_s": _size, "pcie_shared": _flag,
}  # fmt: skip
_SOURCE: dict[str, _Reader] = {
    "factory": _text, "pt2": _text, "safetensors": _text, "config": _text, "cupy": _text,
    "input_shape": _shape, "input_dtype": _text, "dtype": _text, "channels_last": _flag,
    "output": _output,
}  # fmt: skip
_WORKER: dict[str, _Reader] = {
    "device": _text, "gpus": _integer, "port": _integer, "bind": _text, "profile": _text,
    "weights_cache_bytes": _size, "page_bytes": _size, "allow_zero_size_inputs": _flag,
    "dtype": _text, "channels_last": _flag, "libraries": _texts,
    "torch_threads": _integer, "host_cache_bytes": _size, "host_images": _integer,
    "cpu": _integer, "gc": _text, "busy_poll": _flag, "noise": _table, "models": _table,
}  # fmt: skip
_SCHEDULER: dict[str, _Reader] = {
    "policy": _text, "generate_inputs": _flag, "max_gpus": _integer, "schedule_ahead_ns": _duration,
    "default_slo_ns": _duration, "max_exec_ns": _duration, "max_batch": _integer, "fidelity": _text,
    "max_client_weight": _number, "client_weights": _text, "early_refusal": _number,
    "placement": _text, "max_slo_ns": _duration, "max_client_requests": _integer, "max_requests": _integer,
    "max_client_bytes": _size, "max_bytes": _size, "max_client_loads": _integer,
    "max_instances": _integer, "keep_unused_ns": _duration,
}  # fmt: skip
_WEIGHT: dict[str, _Reader] = {"client": _text, "slo_max_ns": _duration, "weight": _number}
_CONTROLLER: dict[str, _Reader] = {
    "workers": _texts, "port": _integer, "bind": _text, "http_port": _integer, "log_dir": _text,
    "busy_poll": _flag, "log_bytes": _size, "log_keep": _integer,
    "scheduler": _table, "weights": _tables,
}  # fmt: skip


def _spellings(known: Mapping[str, _Reader]) -> dict[str, str]:
    """Keys as people write them, to fields: a duration or a size with a unit needs no _ns or _bytes."""
    spellings = {name: name for name in known}
    for name in known:
        for suffix in ("_ns", "_bytes"):
            short = name.removesuffix(suffix)
            if short not in known and short != "weights":  # that one would be two things
                spellings[short] = name
    return spellings


#: Fields that people write as a text with a unit, under the name without _ns or _bytes.
_WITH_A_UNIT = (
    "schedule_ahead_ns", "default_slo_ns", "max_exec_ns", "max_slo_ns", "slo_max_ns", "stall_ns",
    "weights_cache_bytes", "host_cache_bytes",
)  # fmt: skip


class _Values(dict[str, Any]):
    """Fields and their values; `written` has the key of each as the file spells it."""

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[str, str] = {}


def _known_keys(known: Mapping[str, _Reader]) -> str:
    """The known keys for an error, each as the files that come with slosched spell it."""
    return ", ".join(
        sorted(name.rpartition("_")[0] if name in _WITH_A_UNIT else name for name in known)
    )


def _read(where: str, table: Mapping[str, Any], known: Mapping[str, _Reader]) -> _Values:
    """The values of `table`, checked. `where` names the file and the table for errors."""
    spellings = _spellings(known)
    values = _Values()
    for key, value in table.items():
        name = spellings.get(key)
        if name is None:
            raise InvalidConfig(f"{where}: unknown key {key!r}; known: {_known_keys(known)}")
        if name.endswith("_ns") and key != name and type(value) is int and value:
            raise InvalidConfig(
                f'{where}: {key} = {value} has no unit; write {key} = "{value}ms", or {name} for nanoseconds'
            )
        if name in values:
            raise InvalidConfig(f"{where}: {key!r} says {values.written[name]!r} a second time")
        values.written[name] = key
        try:
            values[name] = known[name](value)
        except (ValueError, InvalidConfig) as error:
            raise InvalidConfig(f"{where}: {key} {error} (it is {value!r})") from None
    return values


def _build(where: str, make: Callable[..., T], values: _Values) -> T:
    try:
        return make(**values)
    except TypeError as error:  # a field without a default was left out
        raise InvalidConfig(f"{where}: {_missing(make, values) or error}") from None
    except UnknownName:
        raise
    except InvalidConfig as error:
        text = str(error)
        for (
            name,
            key,
        ) in values.written.items():  # the class knows the field, the reader the file's key
            text = re.sub(rf"\b{name}\b", key, text)
        raise InvalidConfig(f"{where}: {text}") from None


def _missing(make: Callable[..., object], values: Mapping[str, Any]) -> str:
    if not is_dataclass(make):
        return ""
    lacking = [
        f.name
        for f in fields(make)
        if f.default is MISSING and f.default_factory is MISSING and f.name not in values
    ]
    return f"{', '.join(lacking)} must be given" if lacking else ""


def _parse(path: Path) -> dict[str, Any]:
    return read_toml(path, "")[1]


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

    Raises UnknownName for a name that is neither, InvalidConfig for a file that is no profile.
    """
    text = str(name_or_path)
    if text in builtin_profiles():
        source = resources.files("slosched").joinpath("profiles", f"{text}.toml")
        return _profile(f"profile {text}", tomllib.loads(source.read_text(encoding="utf-8")))
    path = Path(name_or_path)
    if not (path.is_file() or path.suffix == ".toml" or "/" in text):
        raise UnknownName("profile", text, builtin_profiles())
    return _profile(str(path), _parse(path))


def _profile(where: str, table: Mapping[str, Any]) -> GpuProfile:
    values = _read(where, table, _PROFILE)
    models: dict[str, ModelProfile] = {}
    for name, model in values.get("models", {}).items():
        here = f"{where}, model {name!r}"
        if not isinstance(model, dict):
            raise InvalidConfig(f"{here}: must be a table [models.{name}]")
        given = _read(here, model, _MODEL)
        given["name"] = name
        models[name] = _build(here, ModelProfile, given)
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
    """Write `profile` to `path`, whole or not at all: who reads it meanwhile finds the old one.

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
    values = _read(str(file), _parse(file), _WORKER)
    if "noise" in values:
        where = f"{file}, [noise]"
        values["noise"] = _build(where, EmulationNoise, _read(where, values["noise"], _NOISE))
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
    values = _read(where, table, _SOURCE)
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


def load_controller_config(
    path: str | Path, base: ControllerConfig | None = None
) -> ControllerConfig:
    """`base` (if given) with what the file says. Raises InvalidConfig.

    [scheduler] is SchedulerConfig, and each [[weights]] a WeightRule of it.
    """
    file = Path(path)
    values = _read(str(file), _parse(file), _CONTROLLER)
    scheduler = base.scheduler if base is not None else SchedulerConfig()
    if "scheduler" in values:
        where = f"{file}, [scheduler]"
        given = _read(where, values["scheduler"], _SCHEDULER)
        start = scheduler
        scheduler = _build(where, lambda **more: replace(start, **more), given)
    if "weights" in values:
        rules = tuple(
            _build(where, WeightRule, _read(where, table, _WEIGHT))
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
    "write_profile",
]
