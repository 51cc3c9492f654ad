"""replay: the requests of an earlier run once more, from its log. Same gaps, same SLOs.

The log is a `clockwork_request_log.tsv` (ours, or Clockwork's own), whose rows are answers: a request
arrived `latency` before `t`. Or it is a `client_log.tsv`, whose rows say when a request was due.
The log's model ids, in ascending order, become instances 0, 1, 2, ... of one model. A CSV of arrivals
from elsewhere (`replay_csv.py`) is a log too; its models may be replayed under their own names.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

from slosched.errors import InvalidConfig
from slosched.text_files import no_integer, no_number, open_lines
from slosched.units import NS_PER_S, format_duration
from slosched.workloads.azure_trace import file_stamp
from slosched.workloads.base import ModelUse, Step
from slosched.workloads.composed import ONE_STEP, RESNET50
from slosched.workloads.kinds import Kind, Parameter
from slosched.workloads.replay_csv import csv_rows, is_csv_header
from slosched.workloads.streams import Slo
from slosched.workloads.values import read_model, read_positive

NAME = "replay"
#: The MODEL that stands for each model's own name, of a CSV that has a column `model`.
AS_RECORDED = "recorded"
_REQUEST_LOG, _CLIENT_LOG = "clockwork_request_log.tsv", "client_log.tsv"
#: Columns of either log: what time it was, the time to take off it, the SLO.
_REQUEST_COLUMNS = ("t", "latency", "user_id", "model_id", "slo_factor", "deadline")
_CLIENT_COLUMNS = ("scheduled_ns", "", "user_id", "model_id", "slo_factor", "slo_ns")
_MAX_SPEED = 1e6
#: Differences of two such integers fit into 64 bits.
_MAX_INTEGER = 2**62

_Integers: TypeAlias = "array[int]"


@dataclass(frozen=True)
class Recorded:
    """The requests of a log in order of arrival: ns after the first, user, instance and SLO."""

    offsets_ns: _Integers
    users: _Integers
    instances: _Integers
    slo_factors: array[float]
    slos_ns: _Integers
    models: int
    #: The models' names in the order of their instances; empty where the log has none.
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.offsets_ns)


def read_requests(path: Path) -> Recorded:
    """Read either log; the two used last are kept.

    A last line without its newline is what a killed process left, and is dropped. Raises InvalidConfig
    with the file and line of what is wrong.
    """
    return _read(path, file_stamp(path))


@lru_cache(maxsize=2)
def _read(path: Path, stamp: object) -> Recorded:
    names: list[str] = []
    with open_lines(path, "the log") as lines:
        header = next(lines, "")
        if is_csv_header(header):
            rows, names = _of_csv(path, header, lines)
        else:
            rows = list(_rows(path, lines, *_columns(path, header)))
    if not rows:
        raise InvalidConfig(f"{path}: the log holds no requests")
    rows.sort(key=lambda row: row[0])  # stable: equal times stay in the order of the log
    instances = {model: i for i, model in enumerate(sorted({row[2] for row in rows}))}
    first_ns = rows[0][0]
    return Recorded(
        offsets_ns=array("q", (row[0] - first_ns for row in rows)),
        users=array("q", (row[1] for row in rows)),
        instances=array("l", (instances[row[2]] for row in rows)),
        slo_factors=array("d", (row[3] for row in rows)),
        slos_ns=array("q", (row[4] for row in rows)),
        models=len(instances),
        names=tuple(names),
    )


def _of_csv(
    path: Path, header: str, lines: Iterator[str]
) -> tuple[list[tuple[int, int, int, float, int]], list[str]]:
    """The rows as `_rows` yields them, and the models' names; a user for each model."""
    arrivals = list(csv_rows(path, header, lines))
    names = sorted({row.model for row in arrivals})
    places = {name: place for place, name in enumerate(names)}
    rows = [(row.at_ns, places[row.model], places[row.model], 0.0, row.slo_ns) for row in arrivals]
    return rows, [] if names == [""] else names


def _columns(path: Path, header: str) -> tuple[tuple[str, ...], list[int]]:
    """The wanted columns and where they are; -1 for the time to take off where there is none."""
    names = header.rstrip("\r\n").split("\t")
    for wanted in (_REQUEST_COLUMNS, _CLIENT_COLUMNS):
        if all(name in names for name in wanted if name):
            return wanted, [names.index(name) if name else -1 for name in wanted]
    raise InvalidConfig(
        f"{path}, line 1: this is the header of no request log (columns "
        f"{', '.join(_REQUEST_COLUMNS)}) and of no client log (columns "
        f"{', '.join(name for name in _CLIENT_COLUMNS if name)}), nor that of a CSV with a column timestamp"
    )


def _rows(
    path: Path, lines: Iterator[str], names: Sequence[str], places: Sequence[int]
) -> Iterator[tuple[int, int, int, float, int]]:
    """Yield (arrival, user, model, factor, SLO in ns) of each line."""
    time, less, user, model, factor, slo = zip(names, places, strict=True)
    for number, line in enumerate(lines, start=2):
        if not line.endswith("\n"):
            return
        cells = line.split("\t")
        try:
            at_ns = _integer(cells, *time) - (_integer(cells, *less) if less[0] else 0)
            if abs(at_ns) >= _MAX_INTEGER:
                raise ValueError(f"columns {time[0]} and {less[0]}: it arrived at {at_ns} ns")
            slo_factor, slo_ns = _number(cells, *factor), _integer(cells, *slo)
            if not 0 <= slo_factor < float("inf"):
                raise ValueError(f"the SLO factor is {slo_factor}")
            # The factor is what was asked for; the SLO in ns follows from it.
            asked_ns = max(slo_ns, 0) if slo_factor == 0 else 0
            yield at_ns, _integer(cells, *user), _integer(cells, *model), slo_factor, asked_ns
        except IndexError:
            raise InvalidConfig(
                f"{path}, line {number}: {len(cells)} columns, fewer than the header has"
            ) from None
        except ValueError as error:
            raise InvalidConfig(f"{path}, line {number}: {error}") from None


def _integer(cells: Sequence[str], name: str, place: int) -> int:
    text = cells[place]
    try:
        value = int(text)
    except ValueError:
        raise ValueError(f"column {name}: {text.strip()[:40]!r} is {no_integer(text)}") from None
    if not -_MAX_INTEGER < value < _MAX_INTEGER:
        raise ValueError(f"column {name}: {value} is beyond 2^62")
    return value


def _number(cells: Sequence[str], name: str, place: int) -> float:
    text = cells[place]
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"column {name}: {text.strip()[:40]!r} is {no_number(text)}") from None


class _Recording:
    """The stream of a recording. It sets `user_id` for each request as the engine takes it."""

    def __init__(self, recorded: Recorded, speed: float) -> None:
        self.user_id = 0
        self.group = 0
        self.lengths: Iterator[int] | None = None
        self._recorded = recorded
        self._speed = speed
        self._next = 0  # the request that is due next

    def _due_ns(self) -> int | None:
        if self._next == len(self._recorded):
            return None
        return _scaled(self._recorded.offsets_ns[self._next], self._speed)

    def first(self) -> Sequence[int]:
        due_ns = self._due_ns()
        return () if due_ns is None else (due_ns,)

    def slo(self, step: Step) -> Slo:
        return self._recorded.slo_factors[self._next], self._recorded.slos_ns[self._next]

    def instance(self) -> int:
        self.user_id = self._recorded.users[self._next]
        return self._recorded.instances[self._next]

    def after_send(self, at_ns: int) -> int | None:
        self._next += 1
        return self._due_ns()

    def after_answer(self, at_ns: int, ok: bool, deadline_ns: int) -> int | None:
        return None


def _scaled(offset_ns: int, speed: float) -> int:
    return offset_ns if speed == 1.0 else int(offset_ns / speed + 0.5)


@dataclass(frozen=True)
class Replay:
    """The requests of the log at `path`, `speed` times as fast, on instances of `model`."""

    path: Path
    model: str
    speed: float
    name: str = field(default=NAME, init=False)
    groups: tuple[str, ...] = field(default=("",), init=False)

    def _recorded(self) -> Recorded:
        return read_requests(self.path)

    @property
    def duration_ns(self) -> int:
        """Until the whole second after the last request."""
        last_ns = _scaled(self._recorded().offsets_ns[-1], self.speed)
        return (last_ns // NS_PER_S + 1) * NS_PER_S

    def models(self) -> tuple[ModelUse, ...]:
        recorded = self._recorded()
        if self.model == AS_RECORDED:
            return tuple(ModelUse(name) for name in recorded.names)
        return (ModelUse(self.model, recorded.models),)

    def steps(self) -> tuple[Step, ...]:
        return ONE_STEP

    def streams(self, seed: int) -> tuple[_Recording, ...]:
        """One stream. Nothing in it depends on the seed."""
        return (_Recording(self._recorded(), self.speed),)

    def describe(self) -> str:
        """The workload in one line: what is sent, how fast and how long."""
        recorded = self._recorded()
        models = f"{recorded.models} x {self.model}"
        if self.model == AS_RECORDED:
            models = f"{recorded.models} recorded models"
        return (
            f"{NAME}: {len(recorded)} requests of {self.path} on {models}, "
            f"{self.speed:g} times as fast, {format_duration(self.duration_ns)} in all"
        )


def parse_replay(args: Sequence[str]) -> Replay:
    """Return the workload of (file or run directory, model, speed); reads it. Raises InvalidConfig."""
    path = Path(args[0])
    if path.is_dir():
        logs = [path / name for name in (_CLIENT_LOG, _REQUEST_LOG) if (path / name).is_file()]
        if not logs:
            raise InvalidConfig(f"{path} holds neither {_CLIENT_LOG} nor {_REQUEST_LOG}")
        path = logs[0]
    replay = Replay(
        path, read_model("MODEL", args[1]), read_positive("speed", args[2], high=_MAX_SPEED)
    )
    recorded = read_requests(path)
    if replay.model == AS_RECORDED and (not recorded.names or "" in recorded.names):
        raise InvalidConfig(
            f"{path} names no model for each request, so MODEL cannot be {AS_RECORDED}; give a model's name"
        )
    last_ns = recorded.offsets_ns[-1]
    if last_ns / replay.speed >= _MAX_INTEGER:
        raise InvalidConfig(
            f"speed {args[2]} makes of {format_duration(last_ns)} more than 146 years"
        )
    return replay


KIND = Kind(
    name=NAME,
    summary="Send the requests of an earlier run again, from its log.",
    parameters=(
        Parameter(
            "LOG",
            "a clockwork_request_log.tsv or client_log.tsv, a run's directory, or a CSV of your own",
            is_path=True,
        ),
        Parameter(
            "MODEL",
            "the model whose instances stand for the log's; recorded: a CSV's own names",
            RESNET50,
        ),
        Parameter("SPEED", "how many times as fast; SLOs stay as they are", "1"),
    ),
    make=parse_replay,
    text="Requests keep their gaps, user ids and SLOs (the factor where one was given, else the SLO in ns), "
    "and the log's model ids become instances of MODEL. From a request log they are as they arrived at "
    "the controller, from a client log as they were due; of a directory with both, the client's. A CSV has the "
    "columns timestamp[,model][,slo]: seconds or ISO 8601, any text, and a duration "
    "(docs/replay_my_arrivals.md).",
    examples=(
        "slosched-runs/run/client_log.tsv",
        "slosched-runs/run resnet50_v2 2",
        "arrivals.csv recorded",
    ),
)
