"""The models that this gateway serves: which versions there are, which are loaded, and which one a name means.

    (offered) --first request, or load--> loading --> ready
    loading --it failed--> unavailable                 tried again by a request after FAILED_FOR_NS
    ready --unload, or a newer version is ready--> unavailable
    unavailable --load--> loading

A name without a version means the newest version that is ready. When the workers offer a newer one, or no
longer the one that serves, the newest is loaded beside it, takes over when it is ready, and the other is given
up unless it was asked for by its number. Where `load` alone loads (--model-control explicit), and after an
`unload`, a request loads nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

from slosched.clock import now_ns
from slosched.errors import SloschedError
from slosched.fronts.errors import FrontError, Status
from slosched.fronts.forms import Form
from slosched.fronts.names import Offered, is_version, name_and_version
from slosched.fronts.sessions import Session
from slosched.fronts.statistics import ModelStatistics
from slosched.gateway_config import GatewayConfig
from slosched.gpu_profile import canonical_model
from slosched.units import NS_PER_S

#: A load that failed is not tried again by requests for this long.
FAILED_FOR_NS = 2 * NS_PER_S
#: A newer version that failed to load is tried again after this time.
_NEWER_AGAIN_NS = 30 * NS_PER_S
#: The pause between two questions for the controller's state; that for what workers offer is as many times as
#: long as its answer took.
_LOOK_EVERY_S, _LOOK_SHARE, _LOOK_TAKES_NS = 1.0, 50, NS_PER_S // 5
#: What was asked for so recently is not asked for once more because a name is unknown.
_FRESH_NS = NS_PER_S // 2
_FIRST_WITHIN_S = 5.0
#: What still runs on a version that is given up has this long.
_GIVE_UP_WITHIN_S = 60.0
_GIVE_UP_LOOK_S = 0.02
READY, LOADING, UNAVAILABLE = "READY", "LOADING", "UNAVAILABLE"
_NEVER_LOADED, _UNLOADED = "not loaded", "unloaded"


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


class Models:
    """The table. `house` is the gateway's own session, which holds every model that is ready.

    `sessions` are all that may hold one. `looked` hears each look at the controller: whether it can give work
    to a GPU.
    """

    def __init__(
        self,
        house: Session,
        config: GatewayConfig,
        *,
        sessions: Callable[[], Iterable[Session]],
        announce: Callable[[str], None],
    ) -> None:
        self._house, self._config = house, config
        self._sessions, self._announce = sessions, announce
        self._versions: dict[tuple[str, str], Version] = {}
        self._current: dict[str, Version] = {}
        #: What clients unloaded and loaded, as (name, version); "" means the model as a whole.
        self._unloaded: set[tuple[str, str]] = set()
        self._wanted: set[tuple[str, str]] = set()
        self._offered = Offered()
        self._looked_ns = 0
        self._looking: asyncio.Task[None] | None = None
        self._first = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self.gpus_ready = False  # by the last look

    # --------------------------------------------------------------------------- who serves

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
        found = self._versions.get((model, version))
        return found if found is not None and found.state is READY else None

    async def ensure(self, model: str, version: str, *, allowed: Allowed = everything) -> Version:
        """The version that serves, loaded if need be. Raises FrontError."""
        base, version = _joined(model, version)
        base = await self._known(base, allowed)
        found = self.find(base, version)
        if found is not None:
            return found
        entry = self._entry(base, version or self._meant(base))
        if not self._may_load(entry):
            raise _no_versions(base) if self._is_unloaded(entry) else unknown_model(base)
        if entry.failure is not None and now_ns() < entry.failed_ns + FAILED_FOR_NS:
            raise entry.failure.again()
        entry.asked_for |= bool(version)
        await self._load(entry)
        return entry

    def _meant(self, base: str) -> str:
        """The version that a name without one would load: the newest that clients did not exclude."""
        versions = self._offered.versions(base)
        left = [each for each in versions if (base, each) not in self._unloaded]
        if self._config.model_control == "explicit" and (base, "") not in self._wanted:
            left = [each for each in left if (base, each) in self._wanted] or left
        return left[-1] if left else self._newest(base)

    def _newest(self, base: str) -> str:
        """The newest version that is offered, or while its workers are away that was; empty: there is none."""
        known = [each.version for each in self._of(base)]
        return self._offered.newest(base) or max(known, key=int, default="")

    def _entry(self, base: str, version: str) -> Version:
        """The version (empty: the newest) as an entry of the table. Raises FrontError if there is none."""
        wanted = version or self._newest(base)
        full = self._offered.full(base, wanted)
        entry = self._versions.get((base, wanted))
        if entry is None:
            if not full:
                raise FrontError(
                    Status.NOT_FOUND,
                    f"Request for unknown model: '{base}' version {wanted[:32]} is not found",
                )
            entry = self._versions[base, wanted] = Version(base, wanted, full)
        return entry

    def _is_unloaded(self, entry: Version) -> bool:
        """Whether a client unloaded it, or its model, and none has loaded it since."""
        return not self._unloaded.isdisjoint(((entry.base, ""), (entry.base, entry.version)))

    def _may_load(self, entry: Version) -> bool:
        """Whether a request may load it."""
        if entry.state is LOADING or self._config.model_control == "on-demand":
            return not self._is_unloaded(entry)
        newest = entry.version == self._meant(entry.base)
        return (entry.base, entry.version) in self._wanted or (
            newest and (entry.base, "") in self._wanted
        )

    async def _known(self, base: str, allowed: Allowed) -> str:
        """The name of a model as it is offered. Raises FrontError: 404, and 503 without a controller.

        One that is not `allowed` gets what an unknown one gets, and no sooner or later.
        """
        if not (allowed(base) or allowed(canonical_model(base))):
            raise unknown_model(base)
        if not self._first.is_set():
            await self._wait_for_first()
        known = self._offered.known(base)
        if not known and now_ns() > self._looked_ns + _FRESH_NS:
            with suppress(SloschedError):  # what was known before still counts
                await self.look()
            known = self._offered.known(base)
        if not known and any(base == each for each, _ in self._versions):
            known = base  # its worker is away; the controller has it still, perhaps
        if not known and not self._offered:
            text = f"no worker of the controller at {self._house.address} offers models yet"
            raise FrontError(Status.UNAVAILABLE, text)
        if not known or not allowed(known):
            raise unknown_model(base)
        return known

    async def _wait_for_first(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_FIRST_WITHIN_S):
                await self._first.wait()
        if not self._first.is_set():
            why = self._house.unreachable or f"the controller at {self._house.address} says nothing"
            raise FrontError(Status.UNAVAILABLE, why)

    def is_ready(self, model: str, version: str, *, allowed: Allowed = everything) -> bool:
        """Whether a request would be served, which may load the model first."""
        base, version = _joined(model, version)
        base = self._offered.known(base) or base
        if not allowed(base):
            return False
        if self.find(base, version) is not None:
            return True
        wanted = version or self._meant(base)
        full = self._offered.full(base, wanted)
        if not full:
            return False
        entry = self._versions.get((base, wanted)) or Version(base, wanted, full)
        return self._may_load(entry) and entry.failure is None

    # ------------------------------------------------------------------------------ loading

    async def _load(self, entry: Version) -> None:
        """Load a version, or wait for its load. Raises FrontError."""
        if entry.state is READY:
            return
        if entry.loading is not None:
            entry.state, entry.reason = LOADING, ""  # also if it was unloaded meanwhile
        else:
            held = sum(each.state is not UNAVAILABLE for each in self._versions.values())
            if held >= self._config.max_models:
                raise FrontError(
                    Status.RESOURCE_EXHAUSTED,
                    f"{held} models are loaded, as many as --max-models allows; unload one",
                )
            entry.state, entry.reason = LOADING, ""
            entry.loading = asyncio.get_running_loop().create_task(self._loaded(entry))
        # A client that leaves does not end the load: others may wait for it, and the next will.
        await asyncio.shield(entry.loading)
        if entry.failure is not None:
            raise entry.failure.again()
        if entry.state is not READY:
            raise _no_versions(entry.base)  # it was unloaded meanwhile

    async def _loaded(self, entry: Version) -> None:
        try:
            handle = await self._house.load(entry.full)
            if handle.info.function is not None:
                await self._house.unload(entry.full)
                raise FrontError(
                    Status.NOT_FOUND,
                    f"Request for unknown model: '{entry.base}' is not found (it is a function)",
                )
        except FrontError as error:
            entry.failure, entry.failed_ns = error, now_ns()
            entry.state, entry.reason = UNAVAILABLE, error.text
            return
        finally:
            entry.loading = None
        entry.failure = None
        if entry.state is not LOADING:  # it was unloaded meanwhile
            await self._give_up(entry)
            return
        entry.form = Form(entry.base, handle.info)
        entry.state, entry.reason = READY, ""
        self._take_over(entry)

    def _take_over(self, entry: Version) -> None:
        """A version is ready: it serves its name if it is the newest that is."""
        current = self._current.get(entry.base)
        if current is entry:
            return
        if current is not None and not self._goes_before(entry.version, current):
            return
        self._current[entry.base] = entry
        if current is not None and not current.asked_for:
            self._retire(current, "another version took over")

    def _retire(self, entry: Version, reason: str) -> None:
        """No request gets this version any more; it is given up once what runs on it has ended."""
        entry.state, entry.reason, entry.asked_for = UNAVAILABLE, reason, False
        self._begin(self._give_up(entry))

    async def _give_up(self, entry: Version) -> None:
        ends_ns = now_ns() + int(_GIVE_UP_WITHIN_S * NS_PER_S)
        while entry.running and now_ns() < ends_ns:
            await asyncio.sleep(_GIVE_UP_LOOK_S)
        for session in [*self._sessions()]:
            if entry.state is not UNAVAILABLE:
                return  # it is wanted again
            try:
                await session.unload(entry.full)
            except FrontError as error:
                self._announce(f"model {entry.full} is not unloaded: {error.text}")

    def lost(self, entry: Version) -> None:
        """The controller does not know it any more: an operator unloaded it. The next request loads it."""
        if entry.state is READY:
            entry.state, entry.reason = UNAVAILABLE, "the controller unloaded it"
            for session in self._sessions():
                session.handles.pop(entry.full, None)
            if self._current.get(entry.base) is entry:
                del self._current[entry.base]

    # ------------------------------------------------------------------------ load and unload

    async def load(self, name: str, *, allowed: Allowed = everything) -> None:
        """Load the newest version of a model, or of NAME:VERSION that one. Raises FrontError."""
        base, version = name_and_version(name)
        try:
            base = await self._known(base, allowed)
            entry = self._entry(base, version)
            entry.asked_for |= bool(version)
            entry.failure = None
            await self._load(entry)
        except FrontError as error:
            if error.status is not Status.NOT_FOUND:
                raise
            raise FrontError(
                Status.INTERNAL,
                f"failed to load '{_short(name)}', failed to poll from model repository",
            ) from None
        self._wanted.add((base, version))
        self._unloaded -= {(base, ""), (base, entry.version)}

    async def unload(self, name: str, *, allowed: Allowed = everything) -> None:
        """Give up a model, or of NAME:VERSION that one. What runs is served. Raises FrontError."""
        base, version = name_and_version(name)
        try:
            base = await self._known(base, allowed)
        except FrontError as error:
            if error.status is not Status.NOT_FOUND:
                raise
            return  # as Triton: what is not there is unloaded
        loaded = [e for e in self._of(base) if version in ("", e.version)]
        self._wanted.discard((base, version))
        if not version:
            self._wanted -= {each for each in self._wanted if each[0] == base}
        if not version or loaded or self._offered.full(base, version):
            self._unloaded.add((base, version))
        for entry in loaded:
            entry.failure = None
            if entry.state is READY:
                self._retire(entry, _UNLOADED)
            elif entry.state is LOADING:
                entry.state, entry.reason = UNAVAILABLE, _UNLOADED
            if self._current.get(base) is entry:
                del self._current[base]
        others = [e for e in self._of(base) if e.state is READY]
        if others and base not in self._current:
            self._current[base] = max(others, key=lambda each: int(each.version))

    def _of(self, base: str) -> list[Version]:
        return [entry for (of, _), entry in self._versions.items() if of == base]

    async def keep_loaded(self, names: Sequence[str]) -> None:
        """Load these at the start, however long it takes until the workers offer them."""
        announced: dict[str, str] = {}
        left = [*names]
        while left:
            for name in [*left]:
                try:
                    await self.load(name)
                    left.remove(name)
                except FrontError as error:
                    known = announced.get(name) == error.text
                    if not known and error.status is not Status.UNAVAILABLE:
                        self._announce(f"model {name} is not loaded yet: {error.text}")
                        announced[name] = error.text
            await asyncio.sleep(_LOOK_EVERY_S if left else 0)

    # ------------------------------------------------------------------------------ changes

    async def watch(self) -> None:
        """Look at what the controller offers, until cancelled."""
        again_ns = 0
        while True:
            await self._house.connected.wait()
            try:
                restarts = self._house.client.restarts
                report = await self._house.client.status(brief=True)
                ready = bool(report.get("ready")) and not report.get("draining")
                begun_ns = now_ns()
                # What a GPU that is new offers is known before this says that it is ready.
                if begun_ns >= again_ns or (ready and not self.gpus_ready):
                    await self.look()
                    took_ns = min(now_ns() - begun_ns, _LOOK_TAKES_NS)
                    again_ns = begun_ns + _LOOK_SHARE * took_ns
                if restarts != self._house.client.restarts:
                    again_ns = (
                        0  # it waited for the new controller, whose workers are still to come
                    )
                self.gpus_ready = ready
            except SloschedError:
                # The question waited; its answer costs the controller no more than before.
                self.gpus_ready, again_ns = False, 0
            await asyncio.sleep(_LOOK_EVERY_S)

    async def look(self) -> None:
        """Ask what workers offer; several who ask at a time share one answer. Raises SloschedError."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.get_running_loop().create_task(self._look())
        await asyncio.shield(self._looking)

    async def _look(self) -> None:
        ready = self.ready
        listing = await self._house.client.listing()
        functions = {each.name for each in listing.models if each.function is not None}
        self._offered = Offered(listing.loadable, functions | set(listing.functions))
        self._looked_ns = now_ns()
        self._first.set()
        self._find_lost(ready, {each.model_id for each in listing.models})
        for base, current in [*self._current.items()]:
            newest = self._meant(base)
            if newest and self._goes_before(newest, current):
                self._begin(self._load_newer(self._entry(base, newest)))
        self._forget()

    def _forget(self) -> None:
        """Drop versions that are gone while others of their model are offered: their number has no bound."""
        for (base, version), entry in [*self._versions.items()]:
            gone = self._offered.known(base) == base and not self._offered.full(base, version)
            if not gone or entry.state is not UNAVAILABLE or entry.running or entry.loading:
                continue
            if not any(entry.full in session.handles for session in self._sessions()):
                del self._versions[base, version]
                self._unloaded.discard((base, version))
                self._wanted.discard((base, version))

    def _goes_before(self, version: str, current: Version) -> bool:
        """Whether `version` should serve in place of `current`: it is newer, or the other was taken back."""
        newer = int(version) - int(current.version)
        return newer > 0 or (newer < 0 and not self._offered.full(current.base, current.version))

    def _find_lost(self, ready: Sequence[Version], known: set[int]) -> None:
        """Which of these, ready when it was asked, the controller does not know by now."""
        there = self._house.client.controller.incarnation
        for entry in ready:
            handle = self._house.handles.get(entry.full)
            # After a restart of the controller the client loads its models again by itself.
            if handle is None or (handle.incarnation == there and handle.model_id not in known):
                self.lost(entry)
            elif entry.form is None or entry.form.info is not handle.info:
                entry.form = Form(entry.base, handle.info)  # another controller's may be another

    async def _load_newer(self, entry: Version) -> None:
        if entry.loading is not None or now_ns() < entry.failed_ns + _NEWER_AGAIN_NS:
            return
        if entry.reason == _UNLOADED or self._is_unloaded(entry):
            return  # a client does not want it
        try:
            await self._load(entry)
        except FrontError as error:
            entry.failed_ns = entry.failed_ns or now_ns()
            self._announce(f"model {entry.full}, the newest, is not loaded: {error.text}")
        else:
            self._announce(f"model {entry.full} took over")

    def _begin(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        loading = [e.loading for e in self._versions.values() if e.loading is not None]
        tasks = [*self._tasks, *loading, *([self._looking] if self._looking else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -------------------------------------------------------------------------------- lists

    @property
    def ready(self) -> list[Version]:
        """All versions that are ready, by name and version."""
        found = [each for each in self._versions.values() if each.state is READY]
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
        base, version = _joined(name, version)
        base = self._offered.known(base) or base
        found = [each for each in seen if each.base == base]
        if not found:
            text = f"requested model '{_short(name_and_version(name)[0])}' is not available"
            raise FrontError(Status.INVALID_ARGUMENT, text)
        if version:
            found = [each for each in found if each.version == version]
            if not found:
                text = f"requested model version is not available for model '{base}'"
                raise FrontError(Status.INVALID_ARGUMENT, text)
        return found

    async def index(self, allowed: Allowed, *, ready: bool) -> list[dict[str, Any]]:
        """The models of the repository, as the protocol lists them. Raises FrontError without a controller."""
        if ready:
            return [_indexed(each) for each in self.ready if allowed(each.base)]
        if not self._first.is_set():
            await self._wait_for_first()
        seen = {
            key: each
            for key, each in self._versions.items()
            if allowed(each.base)
            and (
                each.state is not UNAVAILABLE
                or (each.reason != _NEVER_LOADED and self._offered.full(*key))
            )
        }
        touched = {base for base, _ in seen}
        rows: list[tuple[str, int, dict[str, Any]]] = []
        for base in filter(allowed, self._offered):
            if base not in touched:
                rows.append((base, 0, {"name": base}))
                continue
            for version in self._offered.versions(base):
                seen.setdefault((base, version), Version(base, version, ""))
        rows += [(base, int(version), _indexed(each)) for (base, version), each in seen.items()]
        return [row for _, _, row in sorted(rows, key=lambda each: each[:2])]


def _indexed(entry: Version) -> dict[str, Any]:
    row = {"name": entry.base, "version": entry.version, "state": entry.state}
    return row | ({"reason": entry.reason} if entry.reason else {})


def _joined(model: str, version: str) -> tuple[str, str]:
    """Name and version of a request, which may say the version in either place. Raises FrontError."""
    base, own = name_and_version(model)
    if own and version and own != version:
        raise FrontError(
            Status.INVALID_ARGUMENT,
            f"the model's name '{_short(model)}' says version {own}, and the request version "
            f"{_short(version)}",
        )
    version = version or own
    if version and not is_version(version):
        raise FrontError(
            Status.INVALID_ARGUMENT,
            f"failed to get model version from specified version string '{_short(version)}' (details: "
            "stol), version should be an integral value > 0",
        )
    return base, version


def unknown_model(base: str) -> FrontError:
    """The error of a name that there is no model of, or none for the caller."""
    return FrontError(Status.NOT_FOUND, f"Request for unknown model: '{_short(base)}' is not found")


def _no_versions(base: str) -> FrontError:
    return FrontError(
        Status.NOT_FOUND, f"Request for unknown model: '{base}' has no available versions"
    )


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."
