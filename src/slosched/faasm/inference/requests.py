"""One request and how it ended, as they are measured and written. Times are on slosched.clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self, get_args

from slosched.clock import now_ns
from slosched.errors import InvalidConfig
from slosched.faasm.inference.choices import WARM
from slosched.faasm.inference.instance import Answer
from slosched.faasm.inference.plan import Image
from slosched.output_files import new_file

#: ok: answered within the time-out. timeout: not, and given up. refused: not begun, with a reason. failed:
#: an error.
Status = Literal["ok", "timeout", "refused", "failed"]
STATUSES: tuple[Status, ...] = get_args(Status)


@dataclass(frozen=True, kw_only=True)
class Request:
    """`intended_ns` is when it was meant to be sent. `rung` is "L0" for a warm one. `pause_ns` is an emulated
    start's. `picture` is the number of its image."""

    number: int
    user: int
    intended_ns: int
    picture: int
    image: Image
    rung: str = WARM
    pause_ns: int = 0

    @property
    def is_cold(self) -> bool:
        return self.rung != WARM


@dataclass(frozen=True, kw_only=True)
class Reply:
    """How a system ended a request, at `done_ns`."""

    status: Status
    done_ns: int
    answer: Answer | None = None
    reason: str = ""


def ok(answer: Answer) -> Reply:
    return Reply(status="ok", done_ns=now_ns(), answer=answer)


def ended(status: Status, reason: str) -> Reply:
    return Reply(status=status, done_ns=now_ns(), reason=reason[:300])


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One row of the raw records. A latency counts from the intended time; that of a time-out is not known."""

    number: int
    user: int
    picture: int
    rung: str
    status: Status
    intended_ns: int
    sent_ns: int
    done_ns: int
    pid: int = -1
    cold_ns: int = 0
    infer_ns: int = 0
    top: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    reason: str = ""

    @property
    def latency_ns(self) -> int:
        return self.done_ns - self.intended_ns

    @property
    def is_cold(self) -> bool:
        return self.rung != WARM


#: Takes the reply of a request, in any thread.
Done = Callable[[Reply], None]


class System(Protocol):
    """Serves requests. Close it, or use `with`."""

    name: str
    #: What it is, and what of it is emulated.
    about: str

    def submit(self, request: Request, done: Done) -> Callable[[], None]:
        """Send the request; `done` is called once, in any thread. Returns what gives the request up."""

    def lacks(self, rung: str) -> str:
        """Why the system has no cold starts of that rung; empty if it has."""

    def close(self) -> None:
        """End what it started. Idempotent."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


_COLUMNS = (
    *("number", "user", "picture", "rung", "status", "intended_ns", "sent_ns", "done_ns"),
    *("pid", "cold_ns", "infer_ns", "top", "reason"),
)


def write_outcomes(path: Path, outcomes: Iterable[Outcome]) -> None:
    """Write the raw records as TSV: the times in ns on one clock, `top` the five classes."""
    with new_file(path) as file:
        file.write(("\t".join(_COLUMNS) + "\n").encode())
        for each in outcomes:
            fields: Sequence[Any] = (
                *(each.number, each.user, each.picture, each.rung, each.status),
                *(
                    each.intended_ns,
                    each.sent_ns,
                    each.done_ns,
                    each.pid,
                    each.cold_ns,
                    each.infer_ns,
                ),
                ",".join(map(str, each.top)),
                " ".join(each.reason.split()),
            )
            file.write(("\t".join(map(str, fields)) + "\n").encode())


def read_outcomes(path: Path) -> list[Outcome]:
    """The records that `write_outcomes` wrote, without scores. Raises InvalidConfig for another kind of
    file."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"cannot read {path}: {error}") from None
    if lines[0].split("\t") != list(_COLUMNS):
        raise InvalidConfig(f"{path} does not hold the requests of an experiment")
    return [_outcome(path, number, line) for number, line in enumerate(lines[1:], start=2) if line]


def _outcome(path: Path, number: int, line: str) -> Outcome:
    words = line.split("\t")
    try:
        fields: dict[str, Any] = dict(zip(_COLUMNS, words, strict=True))
        numbers: dict[str, Any] = {
            name: int(fields[name])
            for name in _COLUMNS
            if name not in ("rung", "status", "top", "reason")
        }
        if fields["status"] not in STATUSES:
            raise ValueError(fields["status"])
        top = tuple(int(each) for each in fields["top"].split(",") if each)
    except ValueError as error:
        raise InvalidConfig(f"{path}:{number}: not the record of a request: {error}") from None
    return Outcome(
        **numbers, rung=fields["rung"], status=fields["status"], top=top, reason=fields["reason"]
    )
