"""A mix as a TOML file: what is common, and a [[models]] table for each model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slosched.errors import InvalidConfig
from slosched.text_files import read_toml
from slosched.workloads.composed import DEFAULT_SLO, Composed
from slosched.workloads.lengths import read_lengths
from slosched.workloads.mix import NAME, MixEntry, mix
from slosched.workloads.streams import Slo
from slosched.workloads.values import (
    read_count,
    read_model,
    read_period,
    read_positive,
    read_rate,
    read_slo,
)

_TOP = ("workload", "duration", "rate", "slo", "models")
_OF_A_MODEL = (
    "name",
    "copies",
    "share",
    "rate",
    "slo",
    "arrivals",
    "cv",
    "client",
    "weight",
    "lengths",
)
_ARRIVALS = ("poisson", "gamma")


@dataclass(frozen=True)
class MixFile:
    """What a file says. `duration_ns` is None where it says nothing."""

    entries: tuple[MixEntry, ...]
    duration_ns: int | None

    def workload(self) -> Composed:
        """The workload that the file describes."""
        return mix(self.entries, self.duration_ns)


def load_mix(
    path: str | Path, *, rate_per_s: float | None = None, slo: Slo | None = None
) -> MixFile:
    """Read the mix at `path`.

    Each model has a `rate`, or each a `share` of the file's `rate`. `rate_per_s` is the rate of all
    together instead of what the file says: each model keeps its proportion. `slo` is that of every
    model instead of its own. Raises InvalidConfig with the file and the line of what is wrong.
    """
    file = Path(path)
    text, table = read_toml(file, "the models")
    return _Reader(file, text, table).mix(rate_per_s, slo)


class _Reader:
    """One file while it is read; errors name the place in it."""

    def __init__(self, file: Path, text: str, table: Mapping[str, Any]) -> None:
        self._file = file
        self._lines = text.splitlines()
        self._table = table

    def mix(self, rate_per_s: float | None, slo: Slo | None) -> MixFile:
        table = self._table
        self._check_keys(table, _TOP, None)
        if table.get("workload", NAME) != NAME:
            raise self._wrong(
                None, "workload", f"the workload must be {NAME!r}, not {table['workload']!r}"
            )
        models = table.get("models")
        if (
            not isinstance(models, list)
            or not models
            or not all(isinstance(m, dict) for m in models)
        ):
            raise self._wrong(
                None, "models", "there must be a [[models]] table for each model, one or more"
            )
        duration_ns = self._value(table, None, "duration", read_period)
        common = self._value(table, None, "slo", read_slo) or DEFAULT_SLO
        rates = self._rates(models, rate_per_s)
        entries = []
        for place, (model, rate) in enumerate(zip(models, rates, strict=True)):
            entries.append(self._entry(place, model, rate, slo, common))
        return MixFile(tuple(entries), duration_ns)

    def _rates(self, models: Sequence[Mapping[str, Any]], total: float | None) -> list[float]:
        """The rate of each model: its own or its share of the whole, scaled to `total`."""
        stated = self._value(self._table, None, "rate", read_rate)
        kinds = ["share" if "share" in model else "rate" for model in models]
        for place, model in enumerate(models):
            self._check_keys(model, _OF_A_MODEL, place)
            if ("share" in model) == ("rate" in model):
                raise self._wrong(place, "share", "give share or rate, one of them")
            if kinds[place] != kinds[0]:
                raise self._wrong(
                    place, kinds[place], f"the models before have a {kinds[0]}: all need the same"
                )
        weights = [self._value(m, i, kinds[0], read_rate) or 0.0 for i, m in enumerate(models)]
        if total is None and kinds[0] == "rate":
            if stated is not None:
                raise self._wrong(
                    None, "rate", "the models have rates of their own; leave this out"
                )
            return weights
        total = stated if total is None else total
        if total is None:
            raise InvalidConfig(
                f"{self._file}: the models have shares, but of what rate? Give rate = requests/s "
                "above them"
            )
        whole = sum(weights)
        return [total * weight / whole for weight in weights]

    def _entry(
        self, place: int, model: Mapping[str, Any], rate: float, slo: Slo | None, common: Slo
    ) -> MixEntry:
        name = self._value(model, place, "name", read_model)
        if name is None:
            raise self._wrong(place, "name", "the model's name is missing")
        copies = self._value(model, place, "copies", read_count) or 1
        own = self._value(model, place, "slo", read_slo)
        arrivals = str(model.get("arrivals", "gamma" if "cv" in model else "poisson"))
        if arrivals not in _ARRIVALS:
            raise self._wrong(
                place, "arrivals", f"arrivals must be poisson or gamma, not {arrivals!r}"
            )
        if (arrivals == "gamma") != ("cv" in model):
            raise self._wrong(place, "arrivals", "gamma arrivals need a cv, and others have none")
        cv = self._value(model, place, "cv", read_positive)
        client = str(model.get("client", ""))
        weight = self._value(model, place, "weight", read_positive) or 1.0
        lengths = self._value(model, place, "lengths", read_lengths)
        try:
            return MixEntry(
                model=name,
                copies=copies,
                rate_per_s=rate,
                slo=slo or own or common,
                cv=cv,
                client=client,
                weight=weight,
                lengths=lengths,
            )
        except InvalidConfig as error:
            key = next((key for key in ("weight", "cv") if key in str(error)), "rate")
            raise self._wrong(place, key, str(error)) from None

    def _value(self, table: Mapping[str, Any], place: int | None, key: str, read: Any) -> Any:
        """What `read` makes of the key's value; None where there is none."""
        if key not in table:
            return None
        value = table[key]
        try:
            if isinstance(value, bool | dict | list):
                raise InvalidConfig(f"{key} must be a number or a text, not {value!r}")
            return read(key, str(value))
        except InvalidConfig as error:
            raise self._wrong(place, key, str(error)) from None

    def _check_keys(
        self, table: Mapping[str, Any], known: Sequence[str], place: int | None
    ) -> None:
        for key in table:
            if key not in known:
                raise self._wrong(place, key, f"unknown key {key!r}; known: {', '.join(known)}")

    def _wrong(self, place: int | None, key: str, message: str) -> InvalidConfig:
        """The error with the line of `key` in the table of model `place` (None: the common part)."""
        table, found = -1, 0
        for number, line in enumerate(self._lines, start=1):
            if re.match(r"\s*\[\[\s*models\s*\]\]", line):
                table += 1
                if table == place:
                    found = number
            elif table == (-1 if place is None else place) and re.match(
                rf"\s*[\"']?{re.escape(key)}[\"']?\s*=", line
            ):
                found = number
                break
        where = f", line {found}" if found else ""
        model = "" if place is None else f"model {place + 1}: "
        return InvalidConfig(f"{self._file}{where}: {model}{message}")
