"""cascade: prompts for a cascade at the rates of DiffServe's traces (MLSys'25), made here, or from a file.

The artifact's traces `LOtoHI` follow a curve of one hump, a second for each of its 347 points, between LO and
HI requests/s. The curve here is our own, of the same length, with its lowest and highest point at the same
seconds. Requests are a Poisson process, and each asks for one of 4,999 prompts: its user id.
"""

from __future__ import annotations

import math
import random
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from slosched.cascade_spec import CascadeSpec
from slosched.errors import InvalidConfig, UnknownName
from slosched.text_files import no_integer, no_number, open_lines
from slosched.units import NS_PER_MS, NS_PER_S, format_duration
from slosched.workloads.azure_trace import file_stamp
from slosched.workloads.base import ModelUse, Step, Workload, instance_seed
from slosched.workloads.cascades import load_cascade
from slosched.workloads.composed import Bounded
from slosched.workloads.kinds import Kind, Parameter
from slosched.workloads.processes import Piece, poisson_pieces
from slosched.workloads.streams import OpenLoop
from slosched.workloads.values import read_positive, read_rate

NAME = "cascade"
#: Prompt ids are 1..4999, as in the artifact's traces.
PROMPTS = 4999
#: Seconds of a trace, and those of its lowest and its highest rate.
DAY_S, LOWEST_S, HIGHEST_S = 347, 8, 202
#: The curve's height in its last second, where 1 is the peak; the artifact's mean rates come out with it.
_LAST_HEIGHT = 0.25
#: How long each of the two rates of `double` lasts.
_LEVEL_S = 120

#: The artifact's traces. It has a trace_3_5to40qps.txt too, whose requests come at 3.5 to 28/s.
TRACES = (
    "1to8",
    "2to10",
    "2to16",
    "2_5to20",
    "3to24",
    "3_5to28",
    "4to32",
    "4to34",
    "3to40",
)
_MISNAMED = {"3_5to40": "3_5to28"}

_RATE = r"\d+(?:[._]\d+)?"
_DAY = re.compile(rf"({_RATE})to({_RATE})")
_DOUBLE = re.compile(rf"double[_:]({_RATE})to({_RATE})")
_FIXED = re.compile(rf"fixed_({_RATE})")
_CURVE = re.compile(rf"curve:({_RATE})-({_RATE})(?:qps)?:(\d{{1,6}})s?")
_MAX_SPEED = 1e6
_MAX_MS = 1e12
_MAX_PROMPT = 2**31


# -------------------------------------------------------------------------------------- rates


class Rates(Protocol):
    """Requests/s by time, as plain data."""

    @property
    def seconds(self) -> int:
        """How long requests are sent."""

    def pieces(self) -> tuple[Piece, ...]:
        """The rate on each piece of that time."""

    def describe(self) -> str:
        """The rates in a few words."""


def day_height(second: int) -> float:
    """The curve of a trace, 0..1: a short fall, one broad hump, and a fall to a quarter of its height."""
    if second <= HIGHEST_S:
        return (1 - math.cos(math.pi * (second - LOWEST_S) / (HIGHEST_S - LOWEST_S))) / 2
    fallen = (1 - math.cos(math.pi * (second - HIGHEST_S) / (DAY_S - 1 - HIGHEST_S))) / 2
    return 1 - (1 - _LAST_HEIGHT) * fallen


@dataclass(frozen=True)
class Day:
    """The curve between two rates in `seconds`, constant within each of its 347 pieces."""

    low_per_s: float
    high_per_s: float
    seconds: int = DAY_S

    def pieces(self) -> tuple[Piece, ...]:
        span = self.high_per_s - self.low_per_s
        ends = [piece * self.seconds * NS_PER_S // DAY_S for piece in range(DAY_S + 1)]
        return tuple(
            (ends[piece], ends[piece + 1], self.low_per_s + span * day_height(piece))
            for piece in range(DAY_S)
        )

    def describe(self) -> str:
        rates = f"poisson between {self.low_per_s:g}/s and {self.high_per_s:g}/s on a day's curve"
        return rates if self.seconds == DAY_S else f"{rates} of {self.seconds}s"


@dataclass(frozen=True)
class Double:
    """One rate for 120 s, and from one moment to the next another one for 120 s."""

    first_per_s: float
    then_per_s: float

    @property
    def seconds(self) -> int:
        return 2 * _LEVEL_S

    def pieces(self) -> tuple[Piece, ...]:
        middle_ns, end_ns = _LEVEL_S * NS_PER_S, 2 * _LEVEL_S * NS_PER_S
        return ((0, middle_ns, self.first_per_s), (middle_ns, end_ns, self.then_per_s))

    def describe(self) -> str:
        return (
            f"poisson at {self.first_per_s:g}/s for {_LEVEL_S}s and then at {self.then_per_s:g}/s"
        )


@dataclass(frozen=True)
class Fixed:
    """One rate, as long as a trace of the curve."""

    rate_per_s: float

    @property
    def seconds(self) -> int:
        return DAY_S

    def pieces(self) -> tuple[Piece, ...]:
        return ((0, DAY_S * NS_PER_S, self.rate_per_s),)

    def describe(self) -> str:
        return f"poisson at {self.rate_per_s:g}/s"


def rates_named(text: str) -> Rates | None:
    """The rates of a trace's name, also as its file is called (trace_4to32qps.txt); None for no such name.

    "curve:2-30qps:90" is the day's curve between these rates within 90 s. Raises InvalidConfig for a rate that
    is not above 0, and for a LO above HI.
    """
    if match := _CURVE.fullmatch(text):
        low, high, seconds = _rate(match[1]), _rate(match[2]), int(match[3])
        if low > high or not seconds:
            raise InvalidConfig(
                f"TRACE {text!r}: write curve:LO-HIqps:SECONDS, the lower rate first, 1 s or more"
            )
        return Day(low, high, seconds)
    name = text.removesuffix(".txt").removesuffix("qps").removeprefix("trace_")
    name = _MISNAMED.get(name, name)
    if match := _DAY.fullmatch(name):
        low, high = _rate(match[1]), _rate(match[2])
        if low > high:
            raise InvalidConfig(f"TRACE {text!r}: the lower rate comes first")
        return Day(low, high)
    if match := _DOUBLE.fullmatch(name):
        return Double(_rate(match[1]), _rate(match[2]))
    if match := _FIXED.fullmatch(name):
        return Fixed(_rate(match[1]))
    return None


def _rate(text: str) -> float:
    return read_rate("a rate in TRACE", text.replace("_", "."))


# --------------------------------------------------------------------------------------- file


@dataclass(frozen=True)
class Prompts:
    """The requests of a trace file in order of arrival: ns after its start, and prompt ids."""

    at_ns: array[int]
    prompts: array[int]

    def __len__(self) -> int:
        return len(self.at_ns)


def read_prompts(path: Path) -> Prompts:
    """Read a trace in the artifact's format: a line `<ms>,<prompt id>` for each request, in any order.

    Prompt ids may be any whole number from 0 to 2^31 - 1. Raises InvalidConfig with the file and line of what
    is wrong.
    """
    return _read(path, file_stamp(path))


@lru_cache(maxsize=2)
def _read(path: Path, stamp: object) -> Prompts:
    with open_lines(path, "the trace") as lines:
        rows = [
            _row(f"{path}, line {number}", line)
            for number, line in enumerate(lines, start=1)
            if line.strip()
        ]
    if not rows:
        raise InvalidConfig(f"{path}: the trace holds no requests")
    rows.sort(key=lambda row: row[0])  # stable: equal times stay in the order of the file
    return Prompts(array("q", (row[0] for row in rows)), array("q", (row[1] for row in rows)))


def _row(place: str, line: str) -> tuple[int, int]:
    cells = [cell.strip() for cell in line.split(",")]
    if len(cells) != 2:
        raise InvalidConfig(
            f"{place}: {len(cells)} columns instead of 2, the milliseconds and the prompt id"
        )
    try:
        at_ms = float(cells[0])
    except ValueError:
        raise InvalidConfig(
            f"{place}: the milliseconds {cells[0][:40]!r} are {no_number(cells[0])}"
        ) from None
    if not 0 <= at_ms <= _MAX_MS:  # and NaN is not
        raise InvalidConfig(
            f"{place}: the milliseconds must be within 0..{_MAX_MS:g}, not {cells[0][:40]}"
        )
    try:
        prompt = int(cells[1])
    except ValueError:
        raise InvalidConfig(
            f"{place}: the prompt id {cells[1][:40]!r} is {no_integer(cells[1])}"
        ) from None
    if not 0 <= prompt < _MAX_PROMPT:
        raise InvalidConfig(f"{place}: the prompt id must be within 0..2^31 - 1, not {prompt}")
    return int(at_ms * NS_PER_MS + 0.5), prompt


# ----------------------------------------------------------------------------------- workload


class _PromptStream(OpenLoop):
    """An open loop on the cascade, whose user id is another prompt's with each request."""

    __slots__ = ("_prompts",)

    def __init__(self, arrivals: Iterable[int], prompts: Iterator[int]) -> None:
        super().__init__(arrivals, (0,), user_id=0)
        self._prompts = prompts

    def instance(self) -> int:
        self.user_id = next(self._prompts)
        return 0


def _drawn_prompts(seed: int) -> Iterator[int]:
    draws = random.Random(seed)
    while True:
        yield draws.randint(1, PROMPTS)


@dataclass(frozen=True)
class CascadeTrace:
    """Prompts for the cascade `spec`: made at `rates`, or those of the file `path`; `speed` times as fast."""

    spec: CascadeSpec = field(repr=False)
    cascade: str  # as it was named
    rates: Rates | None
    path: Path | None
    speed: float
    name: str = field(default=NAME, init=False)
    groups: tuple[str, ...] = field(default=("",), init=False)

    def _recorded(self) -> Prompts | None:
        return None if self.path is None else read_prompts(self.path)

    @property
    def duration_ns(self) -> int:
        """Until the whole second after the last request that is possible."""
        if self.rates is not None:
            return math.ceil(self.rates.seconds / self.speed) * NS_PER_S
        recorded = self._recorded()
        assert recorded is not None
        return (_scaled(recorded.at_ns[-1], self.speed) // NS_PER_S + 1) * NS_PER_S

    def models(self) -> tuple[ModelUse, ...]:
        return (ModelUse(self.spec.name),)

    def steps(self) -> tuple[Step, ...]:
        return (Step(0, 0, slo_ns=self.spec.slo_ns),)

    def streams(self, seed: int) -> tuple[_PromptStream, ...]:
        """One stream. The seed changes the arrivals and the prompts that are made, and nothing of a file."""
        recorded = self._recorded()
        if recorded is None:
            assert self.rates is not None
            # Seeds of their own, so that the prompts stay the same when the rates change.
            arrivals: Iterable[int] = poisson_pieces(self.rates.pieces(), instance_seed(seed, 0))
            prompts = _drawn_prompts(instance_seed(seed, 1))
        else:
            arrivals, prompts = recorded.at_ns, iter(recorded.prompts)
        return (_PromptStream((_scaled(at_ns, self.speed) for at_ns in arrivals), prompts),)

    def describe(self) -> str:
        """The workload in one line: what is sent, how fast and how long."""
        recorded = self._recorded()
        if recorded is None:
            assert self.rates is not None
            sent = f"prompts to {self.spec.name}, {self.rates.describe()}"
        else:
            sent = f"{len(recorded)} prompts of {self.path} to {self.spec.name}"
        return (
            f"{NAME}: {sent}, {self.speed:g} times as fast, SLO "
            f"{format_duration(self.spec.slo_ns)}, {format_duration(self.duration_ns)} in all"
        )


def _scaled(at_ns: int, speed: float) -> int:
    return at_ns if speed == 1.0 else int(at_ns / speed)


def cascade_of(workload: Workload) -> CascadeSpec | None:
    """The cascade that `workload` sends prompts to; None for every other workload."""
    if isinstance(workload, Bounded):
        return cascade_of(workload.workload)
    return workload.spec if isinstance(workload, CascadeTrace) else None


def parse_cascade(args: Sequence[str]) -> CascadeTrace:
    """Return the workload of (cascade, trace, speed); reads their files. Raises InvalidConfig."""
    spec = load_cascade(args[0])
    rates, path = _named_or_file(args[1])
    trace = CascadeTrace(
        spec, args[0], rates, path, read_positive("speed", args[2], high=_MAX_SPEED)
    )
    if trace.duration_ns > 2**62:
        raise InvalidConfig(f"speed {args[2]} makes more than 146 years of the trace")
    return trace


def _named_or_file(text: str) -> tuple[Rates | None, Path | None]:
    """What TRACE is: with a "/" a file; else a file that is there and ends in .txt or .csv; else a name."""
    path = Path(text)
    is_table = path.suffix in (".txt", ".csv")
    if "/" in text or (is_table and path.is_file()):
        return None, path
    rates = rates_named(text)
    if rates is None and is_table:
        return None, path  # the error about a file that is not there
    if rates is None:
        known = [*TRACES, "double_8to16", "fixed_20", "curve:2-30qps:90"]
        raise UnknownName("trace", text, known)
    return rates, None


KIND = Kind(
    name=NAME,
    summary="Prompts for a cascade of a light and a heavy model, at the rates of DiffServe's traces.",
    parameters=(
        Parameter(
            "CASCADE",
            "a built-in cascade (sdturbo, sdxs, sdxlltn), or a TOML file of one",
            may_be_path=True,
        ),
        Parameter(
            "TRACE",
            "LOtoHI as 4to32, curve:LO-HIqps:SECONDS, double_LOtoHI, fixed_RATE, or a file with a line "
            "MS,PROMPT for each request",
            may_be_path=True,
        ),
        Parameter("SPEED", "how many times as fast; the SLO stays as it is", "1"),
    ),
    make=parse_cascade,
    text="Each request is for the model that is named as the cascade, with the cascade's SLO; its user id is "
    "the prompt's, 1 to 4999. LOtoHI rises from LO to HI requests/s and falls again on a day's curve "
    "of 347 seconds, as DiffServe's artifact names its traces (1to8, 2_5to20, 4to32, ...), and is made here: "
    "the seed changes arrivals and prompts. double_8to16 is 8/s for 120 s and then 16/s for 120 s; fixed_20 is "
    "20/s for 347 s; curve:2-30qps:90 is the day's curve between 2/s and 30/s within 90 s. A path has a / "
    "or ends in .toml, .txt or .csv.",
    examples=("sdturbo 4to32", "sdxs double_8to16", "sdxlltn 1to8 2"),
)
