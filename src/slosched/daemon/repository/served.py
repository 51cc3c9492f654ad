"""The repository of one worker: what is in it goes to the backend and, by the brain, to the controller."""

from __future__ import annotations

from collections.abc import Callable, Collection

from slosched.core.worker.brain import WorkerBrain
from slosched.daemon.backends.base import Backend, RepositoryPort, repository_of
from slosched.daemon.repository.listing import Listing, offered
from slosched.daemon.repository.watch import RepositoryWatch
from slosched.errors import InvalidConfig
from slosched.units import NS_PER_S

#: A worker that starts waits for the first look this long: its ready line counts what is there.
_FIRST_WITHIN_NS = 10 * NS_PER_S
_NAMED = 5


class ServedRepository:
    """Takes the news of `watch`. `announce` gets a line for each change and each new fault."""

    def __init__(self, watch: RepositoryWatch, announce: Callable[[str], None]) -> None:
        self._watch, self._announce = watch, announce
        self._own: tuple[str, ...] = ()
        self._port: RepositoryPort | None = None
        self._now = Listing()

    @property
    def due_ns(self) -> int:
        """`turn` has nothing to do before."""
        return self._watch.due_ns

    @property
    def count(self) -> int:
        """Versions that are offered."""
        return len(self._now.versions)

    def open(self, backend: Backend, brain: WorkerBrain, *, now_ns: int) -> None:
        """Offer what is there now. Raises InvalidConfig for a device whose backend serves no repository."""
        self._port = repository_of(backend)
        if self._port is None:
            raise InvalidConfig(
                f"a worker of the device {backend.device_name} serves no repository: leave repository out"
            )
        self._own = tuple(backend.loadable)
        listing = self._watch.first(_FIRST_WITHIN_NS)
        if listing is None:
            self._announce("the repository is not read yet; its models are offered once it is")
        else:
            self._take(listing, brain, now_ns)

    def turn(self, brain: WorkerBrain, *, now_ns: int) -> bool:
        """Look for news. True if there was any."""
        listing = self._watch.take(now_ns=now_ns)
        if listing is not None:
            self._take(listing, brain, now_ns)
        return listing is not None

    def _take(self, listing: Listing, brain: WorkerBrain, now_ns: int) -> None:
        assert self._port is not None
        before, found = self._now, offered(listing, self._own, self._port.no_cupy)
        self._now = found
        self._port.offer(found.versions)
        names = tuple(version.name for version in found.versions)
        brain.offer((*self._own, *names), found.left_out, now_ns=now_ns)
        old = {version.name: version.fingerprint for version in before.versions}
        self._say("new", [name for name in names if name not in old])
        self._say("gone; what is loaded stays until it is unloaded", old.keys() - set(names))
        changed = [
            v.name for v in found.versions if old.get(v.name, v.fingerprint) != v.fingerprint
        ]
        self._say("changed; what is loaded stays as it was until it is unloaded", changed)
        known = dict(before.left_out)
        for name, reason in found.left_out:
            if known.get(name) != reason:
                self._announce(f"repository: {name} is left out: {reason}")

    def _say(self, what: str, names: Collection[str]) -> None:
        if names:
            shown = ", ".join(sorted(names)[:_NAMED])
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            self._announce(f"repository: {shown}{more}: {what}")

    def close(self) -> None:
        self._watch.close()
