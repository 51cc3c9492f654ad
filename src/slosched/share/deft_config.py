"""Deft's configuration files (gpu-tester, JSON) as experiments.

Its keys and what they meant there are in docs/share.md. The files that it ships have trailing commas and lack
`batch_size` in places; both are taken. An unknown key is a warning, as Deft passes over it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from slosched.errors import InvalidConfig, UnknownName
from slosched.share.spec_check import check_spec, shown, unused_name
from slosched.share_spec import (
    DEFT_SLO,
    Boundary,
    BoundaryKind,
    Clients,
    Job,
    Mode,
    Run,
    ShareSpec,
    Stop,
)
from slosched.text_files import LONGEST_WRITTEN, read_text
from slosched.units import NS_PER_S

#: Deft's runner lets each model end at least this number of jobs, however short the experiment is.
_LEAST_JOBS = 10
#: Groups of launches in flight behind its event library.
_EVENT_DEPTH = 2
_LARGEST = 4 * 1024 * 1024

_TOP = ("models", "exp_dur", "device_id")
_MODEL = (
    "model_name",
    "model_weight",
    "sleep_time",
    "input_file_path",
    "output_file_path",
    "output_file_name",
    "priority",
    "resize",
    "resize_size",
    "batch_size",
    "control",
    "sync_level",
    "python_path",
    "repo_path",
)
_CONTROL = ("control", "controlsync", "controlEvent", "queue_limit")
_QUEUE_LIMIT = ("sync", "event_group")
#: Models that Deft starts as programs of another repository.
_EXTERNAL = ("codegen", "bloom")


class DeftConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A configuration as an experiment. `logs` says for each job where Deft would write its CSV, in order."""

    spec: ShareSpec
    logs: tuple[Path, ...]
    warnings: tuple[str, ...] = ()


def read_deft(path: Path) -> DeftConfig:
    """Read the file at `path`. Raises InvalidConfig with the line and column, or the key, that is wrong."""
    return parse_deft(read_text(path, "the configuration", longest=LONGEST_WRITTEN), str(path))


def parse_deft(text: str, name: str = "the configuration") -> DeftConfig:
    """`text` as an experiment. `name` stands before errors and warnings. Raises InvalidConfig."""
    warnings: list[str] = []
    try:
        found = _experiment(_json(text, warnings), warnings)
    except UnknownName:
        raise
    except InvalidConfig as error:
        raise InvalidConfig(f"{name}: {error}") from None
    named = tuple(f"{name}: {warning}" for warning in dict.fromkeys(warnings))
    return msgspec.structs.replace(found, warnings=named)


# ------------------------------------------------------------------------------------------ JSON


def _json(text: str, warnings: list[str]) -> dict[str, Any]:
    """The object that `text` holds; commas before a closing bracket and comments are passed over."""
    if len(text) > _LARGEST:
        raise InvalidConfig(f"{len(text):,} characters are too long for a configuration")

    def once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key, value in pairs:
            if key in made:
                warnings.append(f"{key!r} stands twice in one object; the last one counts")
            made[key] = value
        return made

    try:
        document = json.loads(_plain_json(text), object_pairs_hook=once, parse_constant=_constant)
    except json.JSONDecodeError as error:
        raise InvalidConfig(
            f"line {error.lineno}, column {error.colno}: {error.msg[:1].lower()}{error.msg[1:]}"
        ) from None
    except RecursionError:
        raise InvalidConfig("brackets are nested too deeply") from None
    except ValueError:
        raise InvalidConfig("a number has thousands of digits") from None
    if not isinstance(document, dict):
        raise InvalidConfig('must be an object with "models", "exp_dur" and "device_id"')
    return document


def _constant(text: str) -> float:
    raise InvalidConfig(f"{text} is not a number of JSON")


_TOKEN = re.compile(
    r'"(?:[^"\\\n]|\\.)*"?|//[^\n]*|/\*.*?\*/|,(?=(?:\s|//[^\n]*|/\*.*?\*/)*[\]}])', re.DOTALL
)


def _plain_json(text: str) -> str:
    """`text` with blanks for comments and for commas before a closing bracket; every place stays the same."""

    def blank(match: re.Match[str]) -> str:
        found = match[0]
        return found if found.startswith('"') else re.sub(r"[^\n]", " ", found)

    return _TOKEN.sub(blank, text)


# ------------------------------------------------------------------------------------ experiment


def _experiment(document: Mapping[str, Any], warnings: list[str]) -> DeftConfig:
    _warn_of_unknown("", document, _TOP, warnings)
    models = document.get("models")
    if not isinstance(models, list) or not models:
        raise InvalidConfig('"models" must be a list with an object for each model')
    if not all(isinstance(model, dict) for model in models):
        raise InvalidConfig('"models" must hold objects alone')
    duration_s = _number("exp_dur", document.get("exp_dur"), least=0.001, most=10**6)
    device = _whole("device_id", document.get("device_id", 0), 0, 999)
    if "device_id" not in document:
        warnings.append("device_id is missing: the experiment takes GPU 0")
    jobs: list[Job] = []
    logs: list[Path] = []
    gated: list[bool] = []
    for place, model in enumerate(models):
        where = f"models[{place}]"
        try:
            job, log, gate = _job(where, model, {job.name for job in jobs}, warnings)
        except InvalidConfig as error:
            raise InvalidConfig(f"{where}: {error}") from None
        jobs.append(job)
        logs.append(log)
        gated.append(gate)
    if any(gated) and not all(gated):
        free = ", ".join(job.name for job, gate in zip(jobs, gated, strict=True) if not gate)
        warnings.append(
            f"control.control is true for some models only; here {free} passes the gate too, by its priority"
        )
    if any(gated) and not any(job.priority for job in jobs):
        warnings.append("no model has a priority above 0, so that the gate never closes")
    spec = ShareSpec(
        jobs=tuple(jobs),
        modes=(Mode.GATE if any(gated) else Mode.TM,),
        duration_ns=round(duration_s * NS_PER_S),
        device=f"cuda:{device}",
        stop=Stop.FINISH,
        least_jobs=_LEAST_JOBS,
    )
    return DeftConfig(spec=check_spec(spec), logs=tuple(logs))


def _job(
    where: str, model: Mapping[str, Any], taken: set[str], warnings: list[str]
) -> tuple[Job, Path, bool]:
    """The job, the CSV file that Deft would write, and whether the model passes the gate."""
    _warn_of_unknown(where, model, _MODEL, warnings)
    name = _text("model_name", model.get("model_name"))
    for key in ("model_weight", "input_file_path", "output_file_path", "output_file_name"):
        if key in model:
            _text(key, model[key], may_be_empty=True)
    if name.startswith(_EXTERNAL):
        warnings.append(
            f"{where}: {name} is built here with random weights; python_path and repo_path are not "
            "used"
        )
    boundary, gate = _control(where, model, warnings)
    stem = Path(model.get("output_file_name") or f"model_{len(taken)}").name
    job_name = unused_name(stem, taken)
    if job_name != stem:
        warnings.append(f"{where}: output_file_name {stem!r} becomes {job_name}")
    job = Job(
        name=job_name,
        model=name,
        batch=_whole("batch_size", model.get("batch_size", 1), 1, 65536),
        size=_size(where, model, warnings),
        run=Run.EAGER,
        priority=_priority(where, model.get("priority", 0), warnings),
        clients=Clients(think_ns=_sleep_ns(model.get("sleep_time"))),
        warmups=1,
        slo_times_solo=DEFT_SLO,
        boundary=boundary,
    )
    return job, Path(model.get("output_file_path") or "logs") / f"{job_name}.csv", gate


def _control(where: str, model: Mapping[str, Any], warnings: list[str]) -> tuple[Boundary, bool]:
    """Where the job can be interrupted, and whether it passes the gate.

    Deft preloads a library only where `control` is true, and the event library wins. A hook after each layer
    waits for the device whether there is a gate or not.
    """
    control = _table("control", model.get("control", {}))
    _warn_of_unknown(f"{where}.control", control, _CONTROL, warnings)
    limits = _table("control.queue_limit", control.get("queue_limit", {}))
    _warn_of_unknown(f"{where}.control.queue_limit", limits, _QUEUE_LIMIT, warnings)
    gate, sync, event = (_flag(f"control.{key}", control.get(key, False)) for key in _CONTROL[:3])
    level = _text("sync_level", model.get("sync_level", ""), may_be_empty=True)
    if level not in ("", "layer", "kernel"):
        raise InvalidConfig(f'sync_level must be "", "layer" or "kernel", not {shown(level)}')
    if gate and event:
        every = _whole("control.queue_limit.event_group", limits.get("event_group", 2), 1, 10**9)
        boundary = Boundary(kind=BoundaryKind.EVENT, every=every, depth=_EVENT_DEPTH)
    elif gate and sync:
        every = _whole("control.queue_limit.sync", limits.get("sync", 1), 1, 10**9)
        boundary = Boundary(kind=BoundaryKind.SYNC, every=every)
    elif level == "layer":
        boundary = Boundary(kind=BoundaryKind.LAYER)
    else:
        boundary = Boundary(kind=BoundaryKind.NONE)
    if level == "layer" and boundary.kind is not BoundaryKind.LAYER:
        warnings.append(f"{where}: sync_level is not used beside controlsync or controlEvent")
    return boundary, gate


def _size(where: str, model: Mapping[str, Any], warnings: list[str]) -> tuple[int, int]:
    resize = _flag("resize", model.get("resize", False))
    if not resize:
        return 0, 0
    size = model.get("resize_size")
    if not isinstance(size, list) or len(size) != 2:
        raise InvalidConfig(f"resize_size must be [height, width], not {shown(size)}")
    height, width = (_whole("resize_size", side, 1, 16384) for side in size)
    return height, width


def _priority(where: str, value: Any, warnings: list[str]) -> int:
    """The first digit, as Deft's library reads no more of it."""
    text = str(value) if not isinstance(value, bool) else ""
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise InvalidConfig(f"priority must be a whole number of at least 0, not {shown(value)}")
    if len(text) > 1:
        warnings.append(
            f"{where}: priority {text} counts as {text[0]}: Deft reads the first digit alone"
        )
    return int(text[0])


def _sleep_ns(value: Any) -> int:
    return round(_number("sleep_time", value, least=0, most=10**6) * NS_PER_S)


# ---------------------------------------------------------------------------------------- values


def _warn_of_unknown(
    where: str, table: Mapping[str, Any], known: tuple[str, ...], warnings: list[str]
) -> None:
    before = f"{where}: " if where else ""
    warnings.extend(
        f"{before}{UnknownName('key', key, list(known))}; it is passed over"
        for key in table
        if key not in known
    )


def _number(key: str, value: Any, *, least: float, most: float) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not least <= value <= most:
        missing = "and is missing" if value is None else f"not {shown(value)}"
        raise InvalidConfig(
            f"{key} must be a number of seconds within {least:.9g}..{most:.9g}, {missing}"
        )
    return float(value)


def _whole(key: str, value: Any, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise InvalidConfig(
            f"{key} must be a whole number within {least}..{most}, not {shown(value)}"
        )
    return value


def _flag(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidConfig(f"{key} must be true or false, not {shown(value)}")
    return value


def _text(key: str, value: Any, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str) or not (may_be_empty or value.strip()):
        raise InvalidConfig(f"{key} must be a text, not {shown(value)}")
    return value


def _table(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidConfig(f"{key} must be an object, not {shown(value)}")
    return value
