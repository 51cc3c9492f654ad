"""Carbon and cost of a run: operational by its energy, embodied and rent by its time on the GPU.

operational = kWh x g/kWh of the grid x PUE. embodied = the GPU's own (ACT; Gupta et al., ISCA 2022) x time /
lifetime. All constants are in carbon.toml beside this file; a file of the user's replaces any of them.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from slosched.errors import InvalidConfig, UnknownName
from slosched.text_files import read_text, read_toml

_OWN = Path(__file__).with_name("carbon.toml")
_YEAR_S = 365.25 * 86_400
_HOUR_S = 3600
_J_PER_KWH = 3.6e6
#: Rows of an hourly file: two centuries would be a mistake.
_MOST_HOURS = 2_000_000


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Grid(_Table, frozen=True):
    g_per_kwh: float
    pue: float
    hourly: str = ""


class Life(_Table, frozen=True):
    years: float


class Act(_Table, frozen=True):
    fab_g_per_kwh: float
    material_g_per_cm2: float
    share_good: float = msgspec.field(name="yield")
    memory_g_per_gb: float
    packages: float
    g_per_package: float


class Device(_Table, frozen=True):
    kwh_per_cm2: float
    gas_g_per_cm2: float
    die_cm2: float
    memory_gb: float
    usd_per_h: float


class Constants(_Table, frozen=True):
    """What carbon.toml says. `hours` is the grid's carbon by hour: of a day (0..23), or hours since 1970."""

    grid: Grid
    life: Life
    act: Act
    devices: dict[str, Device]
    hours: dict[int, float] = {}

    @property
    def life_s(self) -> float:
        return self.life.years * _YEAR_S


class Footprint(msgspec.Struct, frozen=True, kw_only=True):
    """Carbon in g and cost in USD of one run; None where energy or the device is unknown.

    `constants` says what was used.
    """

    device: str = ""
    kwh: float | None = None
    operational_g: float | None = None
    embodied_g: float | None = None
    total_g: float | None = None
    usd: float | None = None
    constants: dict[str, float | str] = {}
    problem: str = ""


def read_constants(path: Path | None = None) -> Constants:
    """The constants, with those of the TOML file `path` in place of our own.

    A device of its own needs all five of its figures. Raises InvalidConfig.
    """
    _, table = read_toml(_OWN, "the constants of carbon")
    if path is not None:
        _, own = read_toml(path, "the constants of carbon")
        table = _merged(table, own)
    try:
        constants = msgspec.convert(table, Constants)
    except msgspec.ValidationError as error:
        raise InvalidConfig(
            f"{path}: {error} (its tables are grid, life, act and devices, as in our own {_OWN.name})"
        ) from None
    _check(constants, path)
    if constants.grid.hourly:
        file = Path(constants.grid.hourly)
        if path is not None and not file.is_absolute():
            file = path.parent / file
        constants = msgspec.structs.replace(constants, hours=_read_hours(file))
    return constants


def embodied_g(device: str, constants: Constants) -> float:
    """The carbon of making one GPU, in g. `device` is a key of the table. Raises UnknownName."""
    found, act = constants.devices.get(device), constants.act
    if found is None:
        raise UnknownName("device", device, list(constants.devices))
    per_cm2 = act.fab_g_per_kwh * found.kwh_per_cm2 + found.gas_g_per_cm2 + act.material_g_per_cm2
    return (
        per_cm2 * found.die_cm2 / act.share_good
        + found.memory_gb * act.memory_g_per_gb
        + act.packages * act.g_per_package
    )


def device_of(names: tuple[str, ...], constants: Constants) -> str:
    """The device of the table that one of `names` contains ("NVIDIA H200", "4090-tm"); "" if none does."""
    for name in names:
        words = re.sub(r"[^a-z0-9]", "", name.lower())
        fitting = [
            key for key in constants.devices if re.sub(r"[^a-z0-9]", "", key.lower()) in words
        ]
        if fitting:
            return max(fitting, key=len)
    return ""


def footprint(
    joules: float | None,
    gpu_s: float,
    *,
    names: tuple[str, ...],
    constants: Constants,
    begin_epoch_s: float | None = None,
) -> Footprint:
    """Carbon and cost of `gpu_s` seconds of one GPU that took `joules`.

    `names` are tried in turn for the device: what the driver calls it, the results' label. With hourly figures
    `begin_epoch_s`, when the run began, chooses the hours.
    """
    device = device_of(names, constants)
    intensity, used = _intensity(constants, begin_epoch_s, gpu_s)
    kwh = joules / _J_PER_KWH if joules is not None else None
    operational = kwh * intensity * constants.grid.pue if kwh is not None else None
    embodied, usd = None, None
    shown: dict[str, float | str] = {
        "grid_g_per_kwh": intensity,
        "grid": used,
        "pue": constants.grid.pue,
        "life_years": constants.life.years,
    }
    if device:
        whole = embodied_g(device, constants)
        embodied = whole * gpu_s / constants.life_s
        usd = constants.devices[device].usd_per_h * gpu_s / _HOUR_S
        shown |= {"device_embodied_g": whole, "usd_per_h": constants.devices[device].usd_per_h}
    problems = []
    if joules is None:
        problems.append("energy is unknown")
    if not device:
        problems.append(
            f"no device of the table ({', '.join(sorted(constants.devices))}) is named "
            f"{' or '.join(repr(name) for name in dict.fromkeys(names) if name) or 'here'}"
        )
    return Footprint(
        device=device,
        kwh=kwh,
        operational_g=operational,
        embodied_g=embodied,
        total_g=operational + embodied
        if operational is not None and embodied is not None
        else None,
        usd=usd,
        constants=shown,
        problem="; ".join(problems),
    )


# ------------------------------------------------------------------------------------------ small parts


def _intensity(
    constants: Constants, begin_epoch_s: float | None, duration_s: float
) -> tuple[float, str]:
    """Grams a kWh over the time of the run, and what they are from."""
    hours = constants.hours
    if not hours:
        return constants.grid.g_per_kwh, "constant"
    if begin_epoch_s is None:
        return constants.grid.g_per_kwh, "constant: when the run began is unknown"
    of_a_day = max(hours) < 24
    end_s = begin_epoch_s + max(duration_s, 1e-9)
    total = 0.0
    for hour in range(int(begin_epoch_s // _HOUR_S), math.ceil(end_s / _HOUR_S)):
        value = hours.get(hour % 24 if of_a_day else hour)
        if value is None:
            return constants.grid.g_per_kwh, "constant: the hourly file lacks the run's hours"
        inside = min(end_s, (hour + 1) * _HOUR_S) - max(begin_epoch_s, hour * _HOUR_S)
        total += value * inside
    return total / (end_s - begin_epoch_s), f"hourly: {constants.grid.hourly}"


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        known = merged.get(key)
        both = isinstance(known, Mapping) and isinstance(value, Mapping)
        merged[key] = _merged(known, value) if both else value  # type: ignore[arg-type]
    return merged


def _check(constants: Constants, path: Path | None) -> None:
    grid, act = constants.grid, constants.act
    for name, value, low in (
        ("grid.g_per_kwh", grid.g_per_kwh, 0.0),
        ("grid.pue", grid.pue, 1.0),
        ("life.years", constants.life.years, 0.01),
        ("act.yield", act.share_good, 0.01),
    ):
        if not (low <= value < math.inf):
            raise InvalidConfig(f"{path}: {name} must be at least {low:g}, not {value}")
    if act.share_good > 1:
        raise InvalidConfig(f"{path}: act.yield must be at most 1, not {act.share_good}")
    plain = {"act": act, **constants.devices}
    for table, found in plain.items():
        for name, value in msgspec.structs.asdict(found).items():
            if not (0 <= value < math.inf):
                raise InvalidConfig(f"{path}: {name} of {table} must be at least 0, not {value}")


def _read_hours(path: Path) -> dict[int, float]:
    """Columns `hour` (0..23, UTC) or `timestamp` (ISO 8601, UTC unless it says) and `g_per_kwh`."""
    try:
        return _hours_of(path)
    except csv.Error as error:
        raise InvalidConfig(f"{path} is not a CSV file: {error}") from None


def _hours_of(path: Path) -> dict[int, float]:
    reader = csv.DictReader(read_text(path, "the hourly carbon of the grid").splitlines())
    fields = [each.strip() for each in reader.fieldnames or ()]
    reader.fieldnames = fields
    when = next((each for each in ("hour", "timestamp") if each in fields), "")
    if not when or "g_per_kwh" not in fields:
        raise InvalidConfig(
            f"{path}: the columns must be hour (0..23) or timestamp, and g_per_kwh; "
            f"they are {', '.join(fields) or 'missing'}"
        )
    hours: dict[int, float] = {}
    for row in reader:
        try:
            hour = _hour(when, row[when])
            value = float(row["g_per_kwh"])
        except (TypeError, ValueError) as error:
            raise InvalidConfig(f"{path}: line {reader.line_num}: {error}") from None
        if not (0 <= value < math.inf):
            raise InvalidConfig(f"{path}: line {reader.line_num}: g_per_kwh is {value}")
        hours[hour] = value
        if len(hours) > _MOST_HOURS:
            raise InvalidConfig(f"{path}: more than {_MOST_HOURS:,} hours")
    if not hours or (when == "hour" and len(hours) < 24):
        raise InvalidConfig(f"{path}: {len(hours)} hours; a day of hours has 24")
    return hours


def _hour(when: str, text: str) -> int:
    if when == "hour":
        hour = int(text)
        if not 0 <= hour < 24:
            raise ValueError(f"hour {hour} is not within 0..23")
        return hour
    stamp = datetime.fromisoformat(text.strip())
    if stamp.tzinfo is None:
        stamp = stamp.replace(tzinfo=UTC)
    return int(stamp.timestamp() // _HOUR_S)
