"""`mix`: models with their own rates, SLOs and arrivals, as a deployment has them. Not Clockwork's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from slosched.config import WEIGHT_RANGE, is_weight
from slosched.errors import InvalidConfig
from slosched.model_source import split_version
from slosched.units import format_duration
from slosched.workloads.base import ClientUse, ModelUse, Step
from slosched.workloads.composed import DEFAULT_SLO, ONE_STEP, Composed, OpenPart
from slosched.workloads.kinds import Kind, Parameter
from slosched.workloads.lengths import Lengths, read_lengths
from slosched.workloads.processes import Gamma, Poisson, Process
from slosched.workloads.streams import Slo
from slosched.workloads.values import (
    MAX_COUNT,
    read_count,
    read_model,
    read_period,
    read_positive,
    read_rate,
    read_slo,
)

NAME = "mix"
_FORM = "NAME:COPIES:RATE[:SLO[:CV[:LENGTHS]]]"


@dataclass(frozen=True, slots=True)
class MixEntry:
    """`copies` instances of `model` that get `rate_per_s` requests/s in total, evenly.

    Each copy has arrivals of its own: Poisson, or with Gamma-distributed gaps of coefficient of
    variation `cv`. `slo` is (factor, ns). `client` sends them, with that weight; "" is the process that
    runs the mix. Raises InvalidConfig for a rate, cv or weight that cannot be.
    """

    model: str
    copies: int
    rate_per_s: float
    slo: Slo = DEFAULT_SLO
    cv: float | None = None
    client: str = ""
    weight: float = 1.0
    lengths: Lengths | None = None

    def __post_init__(self) -> None:
        if not is_weight(self.weight):
            least, most = WEIGHT_RANGE
            raise InvalidConfig(f"weight must be within {least:g}..{most:g}, not {self.weight:g}")
        if self.weight != 1.0 and not self.client:
            raise InvalidConfig("weight is a client's: say client, too")
        if not 1 <= self.copies <= MAX_COUNT:
            raise InvalidConfig(f"copies must be within 1..{MAX_COUNT}, not {self.copies}")
        if not 1e-9 <= self.rate_per_s / self.copies <= 1e9:
            raise InvalidConfig(
                f"rate must give each of the {self.copies} copies 1e-9..1e9 requests/s, and "
                f"{self.rate_per_s:g}/s does not"
            )
        self.process()

    def process(self) -> Process:
        """The arrivals of one copy."""
        rate = self.rate_per_s / self.copies
        return Poisson(rate) if self.cv is None else Gamma(rate, self.cv)

    @property
    def text(self) -> str:
        """As it is written on the command line."""
        factor, slo_ns = self.slo
        slo = f"{slo_ns}ns" if slo_ns else f"{factor!r}"
        cv = "" if self.cv is None else f":{self.cv!r}"
        if self.lengths is not None:
            cv = f"{cv or ':'}:{self.lengths.text}"
        plain, version = split_version(self.model)
        name = f"{plain}@{version}" if version else self.model
        return f"{name}:{self.copies}:{self.rate_per_s!r}:{slo}{cv}"

    @property
    def words(self) -> str:
        """The entry, human-readable: "8 x resnet50_v2 at 600/s within 25ms"."""
        factor, slo_ns = self.slo
        within = f" within {format_duration(slo_ns)}" if slo_ns else f" within {factor:g}x"
        cv = "" if self.cv is None else f" (cv {self.cv:g})"
        if self.lengths is not None:
            cv += f", lengths {self.lengths.text}"
        by = ""
        if self.client:
            by = f" by {self.client}" + (f" (weight {self.weight:g})" if self.weight != 1.0 else "")
        return (
            f"{self.copies} x {self.model} at {self.rate_per_s:g}/s{cv}"
            f"{within if slo_ns or factor else ''}{by}"
        )


def group_names(entries: Sequence[MixEntry]) -> tuple[str, ...]:
    """A name for each entry: its model's, with a number where the model is in several."""
    models = [entry.model for entry in entries]
    return tuple(
        model if models.count(model) == 1 else f"{model} #{models[: i + 1].count(model)}"
        for i, model in enumerate(models)
    )


def mix(
    entries: Sequence[MixEntry],
    duration_ns: int | None,
    steps: tuple[Step, ...] = ONE_STEP,
) -> Composed:
    """The workload of `entries`, whose results are counted for each of them.

    `steps` divide it in time; the SLOs are the entries' own in all of them. Raises InvalidConfig
    without entries, and for a client of two weights.
    """
    if not entries:
        raise InvalidConfig("a mix needs at least one model")
    senders = tuple(ClientUse(entry.client, entry.weight) for entry in entries)
    for one, other in combinations(senders, 2):
        if one.name == other.name and one.weight != other.weight:
            raise InvalidConfig(
                f"the client {one.name!r} has the weights {one.weight:g} and {other.weight:g}: give it one"
            )
    parts: list[OpenPart] = []
    for group, entry in enumerate(entries):
        process = entry.process()
        for _ in range(entry.copies):
            place = len(parts)
            parts.append(OpenPart(process, place, place, group, entry.slo, entry.lengths))
    duration = () if duration_ns is None else (f"{duration_ns}ns",)
    return Composed(
        name=NAME,
        args=(",".join(entry.text for entry in entries), *duration),
        sent=", ".join(entry.words for entry in entries),
        uses=tuple(ModelUse(entry.model, entry.copies) for entry in entries),
        parts=tuple(parts),
        duration_ns=duration_ns,
        groups=group_names(entries),
        all_steps=steps,
        senders=senders if any(sender.name for sender in senders) else (),
    )


def _name(text: str) -> str:
    """NAME@VERSION as NAME:VERSION, whose colon would end the name here."""
    plain, _, version = text.rpartition("@")
    named = f"{plain}:{version}"
    return named if split_version(named)[1] else text


def _entry(text: str) -> MixEntry:
    values = text.split(":")
    if not 3 <= len(values) <= 6:
        raise InvalidConfig(f"models: {text!r} is not a model; write it as {_FORM}")
    try:
        return MixEntry(
            _name(read_model("models", values[0])),
            read_count("copies", values[1]),
            read_rate("rate", values[2]),
            read_slo("slo", values[3]) if len(values) > 3 else DEFAULT_SLO,
            read_positive("cv", values[4]) if len(values) > 4 and values[4] else None,
            lengths=read_lengths("lengths", values[5]) if len(values) > 5 else None,
        )
    except InvalidConfig as error:
        # A version with its usual colon takes the place of copies, and moves what follows.
        hint = "; write a version as NAME@VERSION" if split_version(":".join(values[:2]))[1] else ""
        raise InvalidConfig(f"models: {text!r}: {error}{hint}") from None


def _parse(args: Sequence[str]) -> Composed:
    entries = [_entry(part.strip()) for part in args[0].split(",")]
    return mix(entries, read_period("duration", args[1]))


KIND = Kind(
    name=NAME,
    summary="Several models, each with its own copies, rate, SLO and burstiness.",
    parameters=(
        Parameter(
            "MODELS",
            f"{_FORM},... with the rate over all copies; NAME@VERSION for a version of a repository's model; "
            "CV: of the gaps, else Poisson; LENGTHS of the inputs, log-normal within bounds: "
            "MEDIAN~SIGMA~LEAST~MOST",
        ),
        Parameter("DURATION", "how long; a bare number is in seconds", "60s"),
    ),
    make=_parse,
    text="Results are counted for each model. In a TOML file each model may be a [[models]] table instead, and "
    "may name the client that sends it, with its weight.",
    examples=(
        "resnet50_v2:8:600:25ms,resnet50_v2:4:100:5:4 20s",
        "resnet50_v2:1:50,resnet18_v2:2:80:10",
    ),
)
