"""The versions that this gateway knows, and which one a name means. Nothing is loaded or asked for here.

    (offered) --first request, or load--> loading --> ready
    loading --it failed--> unavailable                 tried again by a request after a while
    ready --unload, or a newer version is ready--> unavailable
    unavailable --load--> loading

A name without a version means the newest version that is ready. Where `load` alone loads (--model-control
explicit), and after an `unload`, a request loads nothing. models.py has versions loaded and given up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

from slosched.fronts.errors import FrontError, Status
from slosched.fronts.forms import Form
from slosched.fronts.names import Offered, asked_version, name_and_version, shortened
from slosched.fronts.statistics import ModelStatistics
from slosched.gpu_profile import canonical_model

READY, LOADING, UNAVAILABLE = "READY", "LOADING", "UNAVAILABLE"
_NEVER_LOADED, UNLOADED = "not loaded", "unloaded"

#: Whether a caller may use the model of a name.
Allowed = Callable[[str], bool]


def everything(_: str) -> bool:
    """An Allowed without limits."""
    return True


class Version:
    """One version of a model. `full` is the controller's name; `running` inferences have it now."""

    __slots__ = (
        "asked_for",
        "base",
        "failed_ns",
        "failure",
        "form",
        "full",
        "loading",
        "reason",
        "running",
        "state",
        "statistics",
        "version",
    )

    def __init__(self, base: str, version: str, full: str) -> None:
        self.base, self.version, self.full = base, version, full
        self.state, self.reason = UNAVAILABLE, _NEVER_LOADED
        self.form: Form | None = None
        self.statistics = ModelStatistics()
        self.running = 0
        self.asked_for = False  # by its number: a newer one does not end it
        self.loading: asyncio.Task[None] | None = None
        self.failure: FrontError | None = None
        self.failed_ns = 0


class Versions:
    """The table. With `explicit`, requests load only what clients had loaded by name."""

    def __init__(self, *, explicit: bool) -> None:
        self._explicit = explicit
        self._all: dict[tuple[str, str], Version] = {}
        self._current: dict[str, Version] = {}  # by name: the version that serves it
        #: What clients unloaded and loaded, as (name, version); "" means the model as a whole.
        self._unloaded: set[tuple[str, str]] = set()
        self._wanted: set[tuple[str, str]] = set()
        self.offered = Offered()

    def __iter__(self) -> Iterator[Version]:
        return iter([*self._all.values()])

    # ------------------------------------------------------------------------- what a name means

    def find(self, model: str, version: str) -> Version | None:
        """The version that serves now; None if something must be loaded first, or is unknown."""
        if not version:
            found = self._current.get(model)
            if found is not None:
                return found
            base, version = name_and_version(model)
            model = canonical_model(base)
            if not version:
                return self._current.get(model)
        found = self._all.get((model, version))
        return found if found is not None and found.state is READY else None

    def is_ready(self, model: str, version: str, *, allowed: Allowed = everything) -> bool:
        """Whether a request would be served, which may load the model first."""
        base, version = asked_version(model, version)
        base = self.offered.known(base) or base
        if not allowed(base):
            return False
        if self.find(base, version) is not None:
            return True
        wanted = version or self.meant(base)
        full = self.offered.full(base, wanted)
        if not full:
            return False
        entry = self._all.get((base, wanted)) or Version(base, wanted, full)
        return self.may_load(entry) and entry.failure is None

    def meant(self, base: str) -> str:
        """The version that a name without one would load: the newest that clients did not exclude."""
        versions = self.offered.versions(base)
        left = [each for each in versions if (base, each) not in self._unloaded]
        if self._explicit and (base, "") not in self._wanted:
            left = [each for each in left if (base, each) in self._wanted] or left
        return left[-1] if left else self._newest(base)

    def _newest(self, base: str) -> str:
        """The newest version that is offered, or while its workers are away that was; empty: there is none."""
        known = [each.version for each in self.of(base)]
        return self.offered.newest(base) or max(known, key=int, default="")

    def entry(self, base: str, version: str) -> Version:
        """The version (empty: the newest) as an entry of the table. Raises FrontError if there is none."""
        wanted = version or self._newest(base)
        full = self.offered.full(base, wanted)
        entry = self._all.get((base, wanted))
        if entry is None:
            if not full:
                raise FrontError(
                    Status.NOT_FOUND,
                    f"Request for unknown model: '{base}' version {wanted[:32]} is not found",
                )
            entry = self._all[base, wanted] = Version(base, wanted, full)
        return entry

    def is_unloaded(self, entry: Version) -> bool:
        """Whether a client unloaded it, or its model, and none has loaded it since."""
        return not self._unloaded.isdisjoint(((entry.base, ""), (entry.base, entry.version)))

    def may_load(self, entry: Version) -> bool:
        """Whether a request may load it."""
        if entry.state is LOADING or not self._explicit:
            return not self.is_unloaded(entry)
        newest = entry.version == self.meant(entry.base)
        return (entry.base, entry.version) in self._wanted or (
            newest and (entry.base, "") in self._wanted
        )

    def of(self, base: str) -> list[Version]:
        """All versions of one model that the table has."""
        return [entry for (of, _), entry in self._all.items() if of == base]

    # ------------------------------------------------------------------------------ changes

    def take_over(self, entry: Version) -> Version | None:
        """A version is ready: it serves its name if it is the newest that is. Returns the one to give up."""
        current = self._current.get(entry.base)
        if current is entry or (
            current is not None and not self._goes_before(entry.version, current)
        ):
            return None
        self._current[entry.base] = entry
        return None if current is None or current.asked_for else current

    def newer(self) -> list[Version]:
        """The versions that should be loaded to take over from those that serve."""
        found = []
        for base, current in self._current.items():
            newest = self.meant(base)
            if newest and self._goes_before(newest, current):
                found.append(self.entry(base, newest))
        return found

    def _goes_before(self, version: str, current: Version) -> bool:
        """Whether `version` should serve in place of `current`: it is newer, or the other was taken back."""
        newer = int(version) - int(current.version)
        return newer > 0 or (newer < 0 and not self.offered.full(current.base, current.version))

    def client_loaded(self, base: str, version: str, entry: Version) -> None:
        """A client had `entry` loaded, by this version or by none."""
        self._wanted.add((base, version))
        self._unloaded -= {(base, ""), (base, entry.version)}

    def client_unloads(self, base: str, version: str) -> list[Version]:
        """A client unloads a version, or all ("") of a model. Returns those that are ready, to be given up."""
        named = [each for each in self.of(base) if version in ("", each.version)]
        self._wanted.discard((base, version))
        if not version:
            self._wanted -= {each for each in self._wanted if each[0] == base}
        if not version or named or self.offered.full(base, version):
            self._unloaded.add((base, version))
        for entry in named:
            entry.failure = None
            if entry.state is LOADING:
                entry.state, entry.reason = UNAVAILABLE, UNLOADED
            self.serves_no_more(entry)
        others = [each for each in self.of(base) if each.state is READY and each not in named]
        if others and base not in self._current:
            self._current[base] = max(others, key=lambda each: int(each.version))
        return [each for each in named if each.state is READY]

    def serves_no_more(self, entry: Version) -> None:
        """A name without a version does not mean this one any more."""
        if self._current.get(entry.base) is entry:
            del self._current[entry.base]

    def forget(self, is_held: Callable[[Version], bool]) -> None:
        """Drop versions that are gone while others of their model are offered: their number has no bound."""
        for (base, version), entry in [*self._all.items()]:
            gone = self.offered.known(base) == base and not self.offered.full(base, version)
            if not gone or entry.state is not UNAVAILABLE or entry.running or entry.loading:
                continue
            if not is_held(entry):
                del self._all[base, version]
                self._unloaded.discard((base, version))
                self._wanted.discard((base, version))

    # -------------------------------------------------------------------------------- lists

    @property
    def ready(self) -> list[Version]:
        """All versions that are ready, by name and version."""
        found = [each for each in self._all.values() if each.state is READY]
        return sorted(found, key=lambda each: (each.base, int(each.version)))

    def ready_versions(self, base: str) -> list[str]:
        """The versions of one model that are ready, ascending."""
        return [each.version for each in self.ready if each.base == base]

    def counted(self, name: str, version: str, allowed: Allowed) -> list[Version]:
        """The versions of a model whose statistics are shown: those that are ready. Raises FrontError, 400.

        With an empty name those of all models.
        """
        seen = [each for each in self.ready if allowed(each.base)]
        if not name:
            return seen
        base, version = asked_version(name, version)
        base = self.offered.known(base) or base
        found = [each for each in seen if each.base == base]
        if not found:
            text = f"requested model '{shortened(name_and_version(name)[0])}' is not available"
            raise FrontError(Status.INVALID_ARGUMENT, text)
        if version:
            found = [each for each in found if each.version == version]
            if not found:
                text = f"requested model version is not available for model '{base}'"
                raise FrontError(Status.INVALID_ARGUMENT, text)
        return found

    def index(self, allowed: Allowed, *, ready: bool) -> list[dict[str, Any]]:
        """The models of the repository, as the protocol lists them."""
        if ready:
            return [_indexed(each) for each in self.ready if allowed(each.base)]
        seen = {
            key: each
            for key, each in self._all.items()
            if allowed(each.base)
            and (
                each.state is not UNAVAILABLE
                or (each.reason != _NEVER_LOADED and self.offered.full(*key))
            )
        }
        for (base, version), reason in self.offered.left_out.items():
            if allowed(base) and (base, version) not in seen:
                seen[base, version] = faulty = Version(base, version, "")
                faulty.reason = reason
        touched = {base for base, _ in seen}
        rows: list[tuple[str, int, dict[str, Any]]] = []
        for base in filter(allowed, self.offered):
            if base not in touched:
                rows.append((base, 0, {"name": base}))
                continue
            for version in self.offered.versions(base):
                seen.setdefault((base, version), Version(base, version, ""))
        rows += [(base, int(version), _indexed(each)) for (base, version), each in seen.items()]
        return [row for _, _, row in sorted(rows, key=lambda each: each[:2])]


def _indexed(entry: Version) -> dict[str, Any]:
    row = {"name": entry.base, "version": entry.version, "state": entry.state}
    return row | ({"reason": entry.reason} if entry.reason else {})


def unknown_model(base: str) -> FrontError:
    """The error of a name that there is no model of, or none for the caller."""
    return FrontError(
        Status.NOT_FOUND, f"Request for unknown model: '{shortened(base)}' is not found"
    )


def no_versions(base: str) -> FrontError:
    """The error of a model that clients unloaded."""
    return FrontError(
        Status.NOT_FOUND, f"Request for unknown model: '{base}' has no available versions"
    )
