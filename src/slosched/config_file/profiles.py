"""Profiles of emulated GPUs: TOML to GpuProfile, and back."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from slosched.config import GpuProfile, ModelProfile
from slosched.config_file.tables import build, read_values, value_as
from slosched.config_file.tensors import tensors_of
from slosched.errors import InvalidConfig, UnknownName
from slosched.output_files import write_file
from slosched.signature import Tensor
from slosched.text_files import read_toml
from slosched.workloads.cascades import load_cascade

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


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
    values = read_values(where, table, GpuProfile, {"interpolate": bool})
    models: dict[str, ModelProfile] = {}
    for name, model in values.get("models", {}).items():
        place = f"{where}, model {name!r}"
        if not isinstance(model, dict):
            raise InvalidConfig(f"{place}: must be a table [models.{name}]")
        given = read_values(place, model, ModelProfile, _PROFILE_TABLES)
        given["name"] = name
        given["exec_ns"] = dict(sorted(given.get("exec_ns", {}).items()))
        for kind in ("inputs", "outputs"):
            given[kind] = tensors_of(f"{place}, {kind}", given.get(kind, {}))
        at = given.pop("exec_at", {})
        given["exec_ns_at"] = {
            length: dict(sorted(_exec_times(place, length, times).items()))
            for length, times in at.items()
        }
        if at and given["exec_ns"]:
            raise InvalidConfig(
                f"{place}: give exec or exec_at, the times of each length, not both"
            )
        models[name] = build(place, ModelProfile, given)
    if not models:
        raise InvalidConfig(f"{where}: it has no [models.NAME] table")
    if values.pop("interpolate", False):
        models = {name: model.interpolated() for name, model in models.items()}
    values["models"] = models
    return build(where, GpuProfile, values)


def _exec_times(place: str, length: int, times: Any) -> dict[int, int]:
    try:
        found: dict[int, int] = value_as(times, dict[int, int], "ns")
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
