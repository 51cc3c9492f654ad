"""What clients of a gateway unload stays unloaded, and what they load explicitly is all that is loaded."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from gateway_rig import (
    Controller,
    Ends,
    asked,
    loads,
    run,
    service,
    status_of,
    unloads,
    until,
)
from slosched.fronts.asked import Answered
from slosched.fronts.errors import FrontError, Status
from slosched.fronts.serving import Serving
from slosched.messages import LoadModelRequest


async def _load(serving: Serving, name: str) -> None:
    await serving.load(name, {}, serving.caller(""))


async def _unload(serving: Serving, name: str) -> None:
    await serving.unload(name, {}, serving.caller(""))


async def _version(ends: Ends, **fields: Any) -> str:
    """The version that answers; empty: 404."""
    end = await ends.of(asked(**fields))
    if isinstance(end, Answered):
        return end.version
    assert end.status is Status.NOT_FOUND
    return ""


def test_a_version_that_was_unloaded_by_its_number_is_loaded_by_no_request() -> None:
    async def work() -> None:
        with Controller(("toy:1", "toy:2")) as controller:
            async with service(controller.address) as serving:
                ends = Ends(serving)
                assert await _version(ends) == "2"
                await _unload(serving, "toy:2")
                for _ in range(2):
                    assert await _version(ends, version="2") == ""
                    assert await _version(ends, model="toy:2") == ""
                    assert await _version(ends) == "1"
                    assert not await serving.model_ready("toy", "2", serving.callers.everyone)
                    assert await serving.model_ready("toy", "", serving.callers.everyone)
                    await serving.models.look()
                assert loads(controller) == ["toy:2", "toy:1"]
                controller.offers = ("toy:1", "toy:2", "toy:3")
                await until(lambda: serving.models.versions.ready_versions("toy") == ["3"])
                await _load(serving, "toy:2")
                assert await _version(ends, version="2") == "2" and await _version(ends) == "3"
                await _unload(serving, "toy")
                for name in ("toy", "toy:1", "toy:2", "toy:3"):
                    assert await _version(ends, model=name) == ""
                await _load(serving, "toy")
                assert await _version(ends) == "3"

    run(work())


def test_the_newest_that_was_unloaded_is_loaded_by_its_name() -> None:
    async def work() -> None:
        with Controller(("toy:1", "toy:2")) as controller:
            async with service(controller.address) as serving:
                ends = Ends(serving)
                await _unload(serving, "toy:2")  # before it was ever loaded
                await _unload(serving, "toy:9")
                assert await _version(ends) == "1"
                await _load(serving, "toy")
                assert await _version(ends) == "2"

    run(work())


def test_with_explicit_control_a_request_loads_no_other_version_of_what_is_loaded() -> None:
    async def work() -> None:
        with Controller(("toy:1", "toy:2")) as controller:
            async with service(controller.address, model_control="explicit") as serving:
                ends = Ends(serving)
                assert await _version(ends) == ""
                await _load(serving, "toy:1")
                assert await _version(ends) == "1" and await _version(ends, version="2") == ""
                assert not await serving.model_ready("toy", "2", serving.callers.everyone)
                await serving.models.look()
                assert await _version(ends) == "1"
                assert loads(controller) == ["toy:1"]
                await _load(serving, "toy")
                assert await _version(ends) == "2" and await _version(ends, version="1") == "1"
                controller.offers = ("toy:1", "toy:2", "toy:3")
                await until(lambda: serving.models.versions.ready_versions("toy") == ["1", "3"])
                assert await _version(ends, version="2") == ""

    run(work())


def test_a_load_that_follows_an_unload_while_the_first_load_runs_is_served() -> None:
    async def work() -> None:
        with Controller() as controller:
            async with service(controller.address) as serving:
                ends = Ends(serving)
                await until(serving.ready)
                controller.answer_after_ns = 100_000_000
                first = asyncio.create_task(status_of(_load(serving, "toy")))
                await until(lambda: loads(controller) == ["toy"])
                await _unload(serving, "toy")
                again = asyncio.create_task(_load(serving, "toy"))
                await again
                first.cancel()
                assert await _version(ends) == "1"
                assert serving.models.versions.ready_versions("toy") == ["1"]
                assert unloads(controller) == []

    run(work())


def test_while_the_workers_are_away_a_name_means_the_newest_version_that_was_known() -> None:
    async def work() -> None:
        with Controller(("toy:1", "toy:10", "toy:9")) as controller:
            async with service(controller.address) as serving:
                ends = Ends(serving)
                assert await _version(ends, version="9") == "9"
                await until(lambda: serving.models.versions.ready_versions("toy") == ["9", "10"])
                await _unload(serving, "toy")
                controller.offers = ()
                controller.fails = {f"toy:{number}": "no worker is there" for number in (1, 9, 10)}
                await serving.models.look()
                status, text = await status_of(_load(serving, "toy"))
                assert (status, text) == (Status.INTERNAL, "no worker is there")
                assert loads(controller)[-1] == "toy:10"

    run(work())


def test_versions_that_come_and_go_leave_nothing_behind() -> None:
    async def work() -> None:
        with Controller(("toy:1", "other")) as controller:
            async with service(controller.address) as serving:
                ends = Ends(serving)
                for number in range(1, 12):
                    controller.offers = (f"toy:{number}", "other")
                    await serving.models.look()
                    while await _version(ends) != str(number):
                        await asyncio.sleep(0.005)
                    await _unload(serving, f"toy:{number - 1}")
                await until(lambda: len(unloads(controller)) == 10)
                await serving.models.look()
                assert [*serving.models.versions._all] == [("toy", "11")]
                assert len(serving.models.versions._unloaded) < 3

    run(work())


def test_a_version_is_not_given_up_before_the_session_that_loads_it_holds_it(
    tmp_path: Path,
) -> None:
    async def work() -> None:
        path = tmp_path / "tokens.toml"
        path.write_text('[tokens.a]\ntoken = "a-token-of-a"\noperator = true\n')
        with Controller(("toy:1",)) as controller:
            async with service(controller.address, tokens=str(path)) as serving:
                caller = serving.callers.caller("Bearer a-token-of-a")
                await serving.load("toy", {}, caller)
                session = caller.session
                await until(session.connected.is_set)
                controller.answer_after_ns = 300_000_000
                ends = Ends(serving, caller)
                ends.begin(asked())
                await until(lambda: len(controller.of(LoadModelRequest)) == 2)
                controller.answer_after_ns = 0  # the unload of the gateway's own session is quick
                await serving.unload("toy", {}, caller)
                await until(lambda: ends.results)
                assert isinstance(ends.results[0], Answered | FrontError)
                await until(lambda: len(unloads(controller)) == 2)  # the token's session, too
                assert session.handles == {}

    run(work())
