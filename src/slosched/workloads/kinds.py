"""What the registry says of a workload: its parameters and how it is made from texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from slosched.errors import InvalidConfig
from slosched.workloads.base import Workload

#: The version of what a workload of another package relies on: `Kind`, `Parameter`, `Workload`, `Stream` and
#: the rest of base.py. It rises when a workload that was written for the old version would no longer work.
WORKLOAD_INTERFACE = 1


@dataclass(frozen=True)
class Parameter:
    """One positional value: its name in `--help` ("SLO-START"), what it is, and its default.

    `default` None: it must be given. Those with a default come last. `is_path`: in a TOML file it is
    relative to that file. `may_be_path`: so is a value that has a "/" or ends in .toml, .txt or .csv.
    """

    name: str
    help: str
    default: str | None = None
    is_path: bool = False
    may_be_path: bool = False

    def names_file(self, text: str) -> bool:
        """True if the value `text` is a path."""
        looks_like_one = "/" in text or text.endswith((".toml", ".txt", ".csv"))
        return self.is_path or (self.may_be_path and looks_like_one)

    @property
    def key(self) -> str:
        """Its name in a TOML table ("slo-start")."""
        return self.name.lower()


@dataclass(frozen=True)
class Kind:
    """One workload: its name, a line and a text about it, its parameters, and what makes it.

    `make` gets one text for each parameter, in order. `examples` are argument lists as one would
    type them, without the name. `interface` is the WORKLOAD_INTERFACE that it is written for; a workload of
    another package must say it.
    """

    name: str
    summary: str
    parameters: tuple[Parameter, ...]
    make: Callable[[Sequence[str]], Workload]
    text: str = ""
    examples: tuple[str, ...] = ()
    interface: int | None = None

    def parse(self, args: Sequence[str]) -> Workload:
        """Return the workload of the positional texts `args`; those left out take their defaults.

        Raises InvalidConfig for a wrong number of values, and what `make` raises.
        """
        needed = [p for p in self.parameters if p.default is None]
        if not len(needed) <= len(args) <= len(self.parameters):
            names = " ".join(
                p.name if p.default is None else f"[{p.name}]" for p in self.parameters
            )
            takes = str(len(self.parameters))
            if len(needed) < len(self.parameters):
                takes = f"{len(needed)} to {takes}"
            example = f" (for example: {self.examples[0]})" if self.examples else ""
            raise InvalidConfig(
                f"{self.name} takes {takes} values, not {len(args)}: {names or 'none'}{example}"
            )
        given = list(args)
        given += [p.default for p in self.parameters[len(args) :] if p.default is not None]
        return self.make(given)
