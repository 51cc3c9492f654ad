"""From one look at a repository to the next: when a version counts, and when there is news.

A version counts once its files have not changed for `SETTLED_NS`. At the first look those count whose newest
file is older than that, so a worker that starts offers at once what has long been there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from slosched.config import ModelSource
from slosched.daemon.repository.describing import name_of
from slosched.daemon.repository.listing import Listing, Version, newest_first, packed
from slosched.daemon.repository.scanning import Found, Look, in_words
from slosched.errors import InvalidConfig
from slosched.units import NS_PER_S

SETTLED_NS = 2 * NS_PER_S
#: What could not be read may be readable later, although its files are the same.
_TRY_AGAIN_NS = 10 * NS_PER_S


@dataclass(slots=True)
class _Seen:
    """One folder as it was last: since when, and what it is, once that is known."""

    fingerprint: str
    since_ns: int
    version: Version | None = None
    fault: str = ""
    tried_ns: int = 0


class Looks:
    """Takes looks one after another. `describe` says what a version is, or raises InvalidConfig or OSError."""

    def __init__(self, describe: Callable[[Found], ModelSource]) -> None:
        self._describe = describe
        self._seen: dict[str, _Seen] = {}
        self._faults: dict[str, tuple[str, int]] = {}  # reason and since when
        self._listing = Listing()
        self._first = True

    def take(self, look: Look, *, now_ns: int) -> Listing | None:
        """What the repository offers now; None: as before. The first look is always news."""
        first, self._first = self._first, False
        seen: dict[str, _Seen] = {}
        versions: list[Version] = []
        left_out: list[tuple[str, str]] = []
        for found in look.found:
            known = self._known(found, first, now_ns)
            seen[found.folder] = known
            if known.fault:
                left_out.append((name_of(found.folder), known.fault))
            elif known.version is not None:
                versions.append(known.version)
        self._seen = seen
        left_out += self._settled_faults(look, first, now_ns)
        listing = Listing(tuple(newest_first(versions)), tuple(sorted(left_out)))
        if listing == self._listing and not first:
            return None
        self._listing = listing
        return listing

    def unreadable(self, reason: str) -> Listing | None:
        """The repository itself cannot be read now: what it offered is still offered. None: as before."""
        left_out = [each for each in self._listing.left_out if each[0] != "."]
        listing = Listing(self._listing.versions, ((".", reason), *left_out))
        if listing == self._listing:
            return None
        self._listing, self._first = listing, False
        return listing

    def _known(self, found: Found, first: bool, now_ns: int) -> _Seen:
        known = self._seen.get(found.folder)
        if known is None or known.fingerprint != found.fingerprint:
            # A changed version is still offered as it was until its files are settled again.
            before = known.version if known is not None else None
            since_ns = min(now_ns, found.changed_ns) if first else now_ns
            known = _Seen(found.fingerprint, since_ns, before)
        settled = now_ns - known.since_ns >= SETTLED_NS
        current = known.version is not None and known.version.fingerprint == found.fingerprint
        again = not known.fault or now_ns - known.tried_ns >= _TRY_AGAIN_NS
        if settled and not current and again:
            known.tried_ns, known.fault = now_ns, ""
            try:
                source = self._describe(found)
                known.version = Version(
                    name_of(found.folder),
                    found.folder,
                    packed(source),
                    found.fingerprint,
                    bool(source.cupy),
                )
            except (InvalidConfig, OSError) as error:
                known.version, known.fault = None, in_words(error)
        return known

    def _settled_faults(self, look: Look, first: bool, now_ns: int) -> list[tuple[str, str]]:
        """Faults that have been there for as long: a folder that is being made is none."""
        begin_ns = now_ns - SETTLED_NS if first else now_ns
        self._faults = {
            path: (reason, self._faults.get(path, ("", begin_ns))[1])
            for path, reason in look.faults.items()
        }
        return [
            (path, reason)
            for path, (reason, since_ns) in self._faults.items()
            if now_ns - since_ns >= SETTLED_NS
        ]
