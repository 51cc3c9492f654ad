"""What `slosched exp sgd` takes. Nothing heavy is imported."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from slosched.errors import InvalidConfig
from slosched.field_types import AtLeast1, check_types
from slosched.options import Option

_SIZES = ("micro", "small", "full")
_MODES = ("shared", "copies", "sum-delta")
ENGINES = ("slosched", "local", "dask")
#: More instances than this do not start on one host.
MOST_WORKERS = 64


@dataclass(frozen=True, kw_only=True)
class Options:
    """Raises InvalidConfig when it is made with what cannot be."""

    workers: Annotated[
        tuple[AtLeast1, ...],
        Option(
            help="Numbers of workers, separated by commas: each trains on its part of the examples at the "
            "same time as the others. Default at scale quick 1,2,16; at published 1,2,4,8,16."
        ),
    ] = ()
    size: Annotated[
        tuple[str, ...],
        Option(
            help="Sizes of the data, separated by commas: micro (128 examples), small (23,149), full "
            "(781,265). Default at scale quick micro,small; at published micro,full."
        ),
    ] = ()
    modes: Annotated[
        tuple[str, ...],
        Option(
            help="shared (one copy of the state per host), copies (one per instance: the native "
            "baseline), sum-delta (copies whose pushes add). Default all."
        ),
    ] = ()
    interval: Annotated[
        int,
        Meta(ge=-1),
        Option(
            help="Updates of single weights between two pushes of a worker; -1 pushes at the end of an epoch."
        ),
    ] = 60_000
    epochs: Annotated[int, Meta(ge=1, le=10_000), Option(help="Passes over the examples.")] = 20
    repeats: Annotated[
        int,
        Meta(ge=1, le=1000),
        Option(
            help="Seeds of the order in which examples are visited: each is a run of every configuration."
        ),
    ] = 5
    seed: Annotated[
        int,
        Meta(ge=0, le=2**31),
        Option(help="First of these seeds, and the seed of synthetic data."),
    ] = 1
    data: Annotated[
        str,
        Option(
            help="A file of examples in svmlight's format in place of synthetic ones, which are the default.",
            metavar="PATH",
        ),
    ] = ""
    held_out: Annotated[
        float,
        Meta(ge=0, le=0.9),
        Option(help="Part of that file, at its end, that is not trained on and measures accuracy."),
    ] = 0.1
    engine: Annotated[str, Option(help="What runs the calls.", one_of=ENGINES)] = "slosched"
    store: Annotated[
        str,
        Option(help="Global tier of the state: embedded, or redis://HOST:PORT.", metavar="STORE"),
    ] = "embedded"
    count_lost: Annotated[
        bool,
        Option(
            help="Train each configuration once more with a count of its updates, to say how many are lost."
        ),
    ] = True

    def __post_init__(self) -> None:
        check_types(self)
        _check_known("size", self.size, _SIZES)
        _check_known("mode", self.modes, _MODES)
        if any(each > MOST_WORKERS for each in self.workers):
            raise InvalidConfig(f"one host has at most {MOST_WORKERS} workers of this experiment")
        if self.interval == 0:
            raise InvalidConfig("an interval is at least 1 update, or -1 for none")
        if self.data and self.size:
            raise InvalidConfig(
                "the size of the data is that of the file; give data or size, not both"
            )

    def at_scale(self, scale: str) -> Options:
        """With what the scale says in place of what was not given."""
        quick = scale == "quick"
        sizes = ("micro", "small") if quick else ("micro", "full")
        return dataclasses.replace(
            self,
            workers=tuple(sorted(set(self.workers))) or ((1, 2, 16) if quick else (1, 2, 4, 8, 16)),
            size=() if self.data else tuple(dict.fromkeys(self.size)) or sizes,
            modes=tuple(dict.fromkeys(self.modes)) or _MODES,
        )

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(range(self.seed, self.seed + self.repeats))


def _check_known(what: str, given: tuple[str, ...], known: tuple[str, ...]) -> None:
    for each in given:
        if each not in known:
            raise InvalidConfig(f"{each!r} is not a {what}; known: {', '.join(known)}")
