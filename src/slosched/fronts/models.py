"""The models that this gateway serves: loads them, gives them up, and looks at what the workers offer.

versions.py says which versions there are and which one a name means. When the workers offer a newer one, or no
longer the one that serves, the newest is loaded beside it, takes over when it is ready, and the other is given
up unless it was asked for by its number.
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
from slosched.fronts.names import Offered, asked_version, name_and_version, shortened
from slosched.fronts.sessions import Session
from slosched.fronts.versions import (
    LOADING,
    READY,
    UNAVAILABLE,
    UNLOADED,
    Allowed,
    Version,
    Versions,
    everything,
    no_versions,
    unknown_model,
)
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


class Models:
    """`house` is the gateway's own session, which holds every model that is ready; `sessions` are all that may
    hold one. `gpus_ready` says whether the controller could give work to a GPU when it was last asked.
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
        self.versions = Versions(explicit=config.model_control == "explicit")
        self._looked_ns = 0
        self._looking: asyncio.Task[None] | None = None
        self._first = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self.gpus_ready = False

    # --------------------------------------------------------------------------- who serves

    async def ensure(self, model: str, version: str, *, allowed: Allowed = everything) -> Version:
        """The version that serves, loaded if need be. Raises FrontError."""
        base, version = asked_version(model, version)
        base = await self._known(base, allowed)
        versions = self.versions
        found = versions.find(base, version)
        if found is not None:
            return found
        entry = versions.entry(base, version or versions.meant(base))
        if not versions.may_load(entry):
            raise no_versions(base) if versions.is_unloaded(entry) else unknown_model(base)
        if entry.failure is not None and now_ns() < entry.failed_ns + FAILED_FOR_NS:
            raise entry.failure.again()
        entry.asked_for |= bool(version)
        await self._load(entry)
        return entry

    async def _known(self, base: str, allowed: Allowed) -> str:
        """The name of a model as it is offered. Raises FrontError: 404, and 503 without a controller.

        One that is not `allowed` gets what an unknown one gets, and no sooner or later.
        """
        if not (allowed(base) or allowed(canonical_model(base))):
            raise unknown_model(base)
        if not self._first.is_set():
            await self._wait_for_first()
        known = self.versions.offered.known(base)
        if not known and now_ns() > self._looked_ns + _FRESH_NS:
            with suppress(SloschedError):  # what was known before still counts
                await self.look()
            known = self.versions.offered.known(base)
        if not known and self.versions.of(base):
            known = base  # its worker is away; the controller has it still, perhaps
        if not known and not self.versions.offered:
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

    # ------------------------------------------------------------------------------ loading

    async def _load(self, entry: Version) -> None:
        """Load a version, or wait for its load. Raises FrontError."""
        if entry.state is READY:
            return
        if entry.loading is not None:
            entry.state, entry.reason = LOADING, ""  # also if it was unloaded meanwhile
        else:
            held = sum(each.state is not UNAVAILABLE for each in self.versions)
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
            raise no_versions(entry.base)  # it was unloaded meanwhile

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
        before = self.versions.take_over(entry)
        if before is not None:
            self._retire(before, "another version took over")

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
            self.versions.serves_no_more(entry)

    # ------------------------------------------------------------------------ load and unload

    async def load(self, name: str, *, allowed: Allowed = everything) -> None:
        """Load the newest version of a model, or of NAME:VERSION that one. Raises FrontError."""
        base, version = name_and_version(name)
        try:
            base = await self._known(base, allowed)
            entry = self.versions.entry(base, version)
            entry.asked_for |= bool(version)
            entry.failure = None
            await self._load(entry)
        except FrontError as error:
            if error.status is not Status.NOT_FOUND:
                raise
            raise FrontError(
                Status.INTERNAL,
                f"failed to load '{shortened(name)}', failed to poll from model repository",
            ) from None
        self.versions.client_loaded(base, version, entry)

    async def unload(self, name: str, *, allowed: Allowed = everything) -> None:
        """Give up a model, or of NAME:VERSION that one. What runs is served. Raises FrontError."""
        base, version = name_and_version(name)
        try:
            base = await self._known(base, allowed)
        except FrontError as error:
            if error.status is not Status.NOT_FOUND:
                raise
            return  # as Triton: what is not there is unloaded
        for entry in self.versions.client_unloads(base, version):
            self._retire(entry, UNLOADED)

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
        ready = self.versions.ready
        listing = await self._house.client.listing()
        functions = {each.name for each in listing.models if each.function is not None}
        functions |= set(listing.functions)
        self.versions.offered = Offered(listing.loadable, functions, listing.left_out)
        self._looked_ns = now_ns()
        self._first.set()
        self._find_lost(ready, {each.model_id for each in listing.models})
        for entry in self.versions.newer():
            self._begin(self._load_newer(entry))
        self.versions.forget(self._is_held)

    def _is_held(self, entry: Version) -> bool:
        return any(entry.full in session.handles for session in self._sessions())

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
        if entry.reason == UNLOADED or self.versions.is_unloaded(entry):
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
        loading = [each.loading for each in self.versions if each.loading is not None]
        tasks = [*self._tasks, *loading, *([self._looking] if self._looking else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -------------------------------------------------------------------------------- lists

    async def index(self, allowed: Allowed, *, ready: bool) -> list[dict[str, Any]]:
        """The models of the repository, as the protocol lists them. Raises FrontError without a controller."""
        if not ready and not self._first.is_set():
            await self._wait_for_first()
        return self.versions.index(allowed, ready=ready)
