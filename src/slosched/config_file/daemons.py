"""The files of a worker and of a controller: TOML to WorkerConfig and ControllerConfig."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from slosched.config import (
    ControllerConfig,
    EmulationNoise,
    SchedulerConfig,
    WeightRule,
    WorkerConfig,
)
from slosched.config_file.models import model_source
from slosched.config_file.tables import build, read_values, with_table
from slosched.text_files import read_toml
from slosched.workloads.cascades import is_cascade_path, load_cascade


def load_worker_config(path: str | Path, base: WorkerConfig | None = None) -> WorkerConfig:
    """`base` (the defaults) with what the file says. Paths in it are relative to the file.

    [noise] is EmulationNoise; each [models.NAME] is a ModelSource. Raises InvalidConfig.
    """
    file = Path(path)
    values = read_values(str(file), read_toml(file, "")[1], WorkerConfig)
    if "noise" in values:
        where = f"{file}, [noise]"
        values["noise"] = build(
            where, EmulationNoise, read_values(where, values["noise"], EmulationNoise)
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
    return build(str(file), lambda **given: replace(start, **given), values)


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
    values = read_values(str(file), read_toml(file, "")[1], ControllerConfig, tables)
    scheduler = base.scheduler if base is not None else SchedulerConfig()
    if "scheduler" in values:
        where = f"{file}, [scheduler]"
        given = read_values(where, values["scheduler"], SchedulerConfig)
        start = scheduler
        scheduler = build(where, lambda **more: replace(start, **more), given)
    if "weights" in values:
        rules = tuple(
            build(where, WeightRule, read_values(where, table, WeightRule))
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
    return build(str(file), make, values)
