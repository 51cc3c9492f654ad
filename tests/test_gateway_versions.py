"""The models of a gateway: which are loaded when, versions that take over, a controller that is restarted."""

from __future__ import annotations

import asyncio
import random

import pytest

from gateway_rig import (
    Controller,
    Ends,
    asked,
    loads,
    nothing_is_held,
    run,
    service,
    status_of,
    unloads,
    until,
)
from slosched import clock
from slosched.errors import PeerUnreachable
from slosched.fronts import models as models_module
from slosched.fronts.asked import Answered
from slosched.fronts.errors import FrontError, Status
from slosched.messages import InferRequest, ListModelsReply

NOT_FOUND = Status.NOT_FOUND


def test_an_unknown_model_and_version_are_told_apart() -> None:
    async def work() -> None:
        with Controller(("toy:2", "toy:10", "other")) as controller:
            async with service(controller.address) as serving:
                ends = Ends(serving)
                for name in ("nope", "", "nope:3", "x" * 5000):
                    error = await ends.of(asked(model=name))
                    assert isinstance(error, FrontError) and error.status is NOT_FOUND
                    assert error.text.startswith("Request for unknown model: '")
                    assert error.text.endswith("is not found") and len(error.text) < 400
                error = await ends.of(asked(version="3"))
                assert isinstance(error, FrontError)
                assert error.text == "Request for unknown model: 'toy' version 3 is not found"
                for version in ("one", "-1", "0", "01", "1.0", "9" * 50):
                    error = await ends.of(asked(version=version))
                    assert isinstance(error, FrontError)
                    assert error.status is Status.INVALID_ARGUMENT, version
                error = await ends.of(asked(model="toy:2", version="10"))
                assert isinstance(error, FrontError) and error.status is Status.INVALID_ARGUMENT
                assert loads(controller) == []
                assert await serving.model_ready(
                    "toy", "", serving.callers.everyone
                ) and await serving.model_ready("toy", "2", serving.callers.everyone)
                assert not await serving.model_ready("toy", "3", serving.callers.everyone)
                assert not await serving.model_ready("nope", "", serving.callers.everyone)

    run(work())


def test_a_newer_version_takes_over_and_the_old_one_ends_when_nothing_runs_on_it() -> None:
    async def work() -> None:
        with Controller(("toy:1",)) as controller:
            async with service(controller.address) as serving:
                ends = Ends(serving)
                first = await ends.of(asked())
                assert isinstance(first, Answered) and first.version == "1"
                controller.hold = True
                running = ends.begin(asked())
                await until(lambda: len(controller.of(InferRequest)) == 2)
                controller.hold = False
                controller.offers = ("toy:1", "toy:2")
                await until(lambda: serving.models.versions.ready_versions("toy") == ["2"])
                second = await ends.of(asked())
                assert isinstance(second, Answered) and second.version == "2"
                assert unloads(controller) == []  # a request still runs on it
                running.cancel()
                await until(lambda: unloads(controller) == ["toy:1"])
                old = await ends.of(
                    asked(version="1")
                )  # asked for by its number, it is loaded beside
                assert isinstance(old, Answered) and old.version == "1"
                assert serving.models.versions.ready_versions("toy") == ["1", "2"]
                again = await ends.of(asked(model="toy:1"))
                assert isinstance(again, Answered) and again.version == "1"
                newest = await ends.of(asked())
                assert isinstance(newest, Answered) and newest.version == "2"
                assert (await serving.model_metadata("toy", "", serving.caller("")))[
                    "versions"
                ] == ["1", "2"]

    run(work())


def test_a_version_that_is_taken_back_gives_way_to_the_one_before() -> None:
    async def work() -> None:
        with Controller(("toy:1", "toy:2")) as controller:
            async with service(controller.address) as serving:
                ends = Ends(serving)
                answer = await ends.of(asked())
                assert isinstance(answer, Answered) and answer.version == "2"
                controller.offers = ("other",)  # its worker is away: what is loaded stays
                await until(lambda: "toy" not in [*serving.models.versions.offered])
                answer = await ends.of(asked())
                assert isinstance(answer, Answered) and answer.version == "2"
                controller.offers = ("toy:1",)
                await until(lambda: serving.models.versions.ready_versions("toy") == ["1"])
                answer = await ends.of(asked())
                assert isinstance(answer, Answered) and answer.version == "1"
                assert [
                    row["version"]
                    for row in await serving.index(serving.callers.everyone, ready=False)
                ] == ["1"]

    run(work())


def test_a_newer_version_that_fails_leaves_the_old_one_serving() -> None:
    async def work() -> None:
        with Controller(("toy:1",)) as controller:
            async with service(controller.address) as serving:
                ends = Ends(serving)
                await ends.of(asked())
                controller.fails["toy:2"] = "its file is no model"
                controller.offers = ("toy:1", "toy:2")
                await until(lambda: "toy:2" in loads(controller))
                answer = await ends.of(asked())
                assert isinstance(answer, Answered) and answer.version == "1"
                rows = await serving.index(serving.callers.everyone, ready=False)
                [failed] = [row for row in rows if row.get("version") == "2"]
                assert failed["state"] == "UNAVAILABLE" and "no model" in failed["reason"]

    run(work())


def test_after_an_unload_requests_load_nothing_until_a_load() -> None:
    async def work() -> None:
        with Controller() as controller:
            async with service(controller.address) as serving:
                ends, who = Ends(serving), serving.caller("")
                await ends.of(asked())
                await serving.unload("toy", {}, who)
                error = await ends.of(asked())
                assert isinstance(error, FrontError) and error.status is NOT_FOUND
                assert error.text == "Request for unknown model: 'toy' has no available versions"
                assert not await serving.model_ready("toy", "", serving.callers.everyone)
                await until(lambda: unloads(controller) == ["toy"])
                assert {
                    "name": "toy",
                    "version": "1",
                    "state": "UNAVAILABLE",
                    "reason": "unloaded",
                } in (await serving.index(serving.callers.everyone, ready=False))
                await serving.load("toy", {}, who)
                assert isinstance(await ends.of(asked()), Answered)
                assert [
                    row["name"] for row in await serving.index(serving.callers.everyone, ready=True)
                ] == ["toy"]
                await serving.unload("nope", {}, who)  # as Triton: it is not there afterwards
                status, text = await status_of(serving.load("nope", {}, who))
                assert status is Status.INTERNAL
                assert text == "failed to load 'nope', failed to poll from model repository"
                status, _ = await status_of(serving.load("toy", {"config": "{}"}, who))
                assert status is Status.INVALID_ARGUMENT
                await serving.unload("other", {"unload_dependents": True}, who)

    run(work())


def test_in_explicit_mode_load_alone_loads() -> None:
    async def work() -> None:
        with Controller() as controller:
            async with service(
                controller.address, model_control="explicit", load=("other",)
            ) as serving:
                ends = Ends(serving)
                error = await ends.of(asked())
                assert isinstance(error, FrontError)
                assert error.text == "Request for unknown model: 'toy' is not found"
                assert not await serving.model_ready("toy", "", serving.callers.everyone)
                await until(lambda: serving.models.versions.ready_versions("other"))
                await serving.load("toy", {}, serving.caller(""))
                assert isinstance(await ends.of(asked()), Answered)
                assert {"name": "toy"} not in await serving.index(
                    serving.callers.everyone, ready=False
                )
                assert sorted(loads(controller)) == ["other", "toy"]

    run(work())


def test_statistics_load_nothing_and_name_what_is_not_there() -> None:
    async def work() -> None:
        with Controller() as controller:
            async with service(controller.address) as serving:
                status, text = await status_of(
                    serving.statistics("toy", "", serving.callers.everyone)
                )
                assert (status, text) == (
                    Status.INVALID_ARGUMENT,
                    "requested model 'toy' is not available",
                )
                await Ends(serving).of(asked())
                status, text = await status_of(
                    serving.statistics("toy", "7", serving.callers.everyone)
                )
                assert text == "requested model version is not available for model 'toy'"
                assert (
                    len((await serving.statistics("", "", serving.callers.everyone))["model_stats"])
                    == 1
                )
                assert loads(controller) == ["toy"]

    run(work())


def test_a_load_that_fails_is_told_and_not_repeated_for_each_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def work() -> None:
        with Controller() as controller:
            async with service(controller.address) as serving:
                ends = Ends(serving)
                controller.fails["toy"] = "it has no forward"
                for _ in range(20):
                    error = await ends.of(asked())
                    assert isinstance(error, FrontError) and error.status is Status.INTERNAL
                    assert "it has no forward" in error.text
                assert len(loads(controller)) == 1
                monkeypatch.setattr(models_module, "FAILED_FOR_NS", 0)
                del controller.fails["toy"]
                assert isinstance(await ends.of(asked()), Answered)

    run(work())


def test_many_first_requests_share_one_load_and_those_that_leave_do_not_end_it() -> None:
    async def work() -> None:
        with Controller() as controller:
            async with service(controller.address) as serving:
                ends = Ends(serving)
                await until(serving.ready)
                controller.answer_after_ns = 100_000_000
                running = [ends.begin(asked()) for _ in range(8)]
                await until(lambda: loads(controller) == ["toy"])
                for each in running[:7]:
                    each.cancel()
                await until(lambda: len(ends.results) == 1)
                assert loads(controller) == ["toy"]
                assert isinstance(ends.results[0], Answered) and nothing_is_held(serving)

    run(work())


def test_no_more_models_than_are_allowed() -> None:
    async def work() -> None:
        with Controller(tuple(f"m{i}" for i in range(4))) as controller:
            async with service(controller.address, max_models=2) as serving:
                ends = Ends(serving)
                for name in ("m0", "m1"):
                    assert isinstance(await ends.of(asked(model=name)), Answered)
                error = await ends.of(asked(model="m2"))
                assert isinstance(error, FrontError)
                assert error.status is Status.RESOURCE_EXHAUSTED and "--max-models" in error.text
                await serving.unload("m0", {}, serving.caller(""))
                assert isinstance(await ends.of(asked(model="m2")), Answered)

    run(work())


def test_a_model_that_an_operator_unloads_is_loaded_again_by_the_next_request() -> None:
    async def work() -> None:
        with Controller() as controller:
            async with service(controller.address) as serving:
                ends = Ends(serving)
                await ends.of(asked())
                controller.code, controller.reason = 6, "no model has the id 101; load one first"
                error = await ends.of(asked())
                assert isinstance(error, FrontError) and error.status is Status.UNAVAILABLE
                controller.code = 0
                assert isinstance(await ends.of(asked()), Answered)
                assert loads(controller) == ["toy", "toy"]
                controller.loaded.clear()  # and one without requests: the next look finds it out
                await until(lambda: not serving.models.versions.ready)

    run(work())


def test_a_restarted_controller_gets_the_models_again() -> None:
    async def work() -> None:
        with Controller() as controller:
            async with service(controller.address) as serving:
                ends = Ends(serving)
                await ends.of(asked())
                controller.hold = True
                ends.begin(asked())
                await until(lambda: len(controller.of(InferRequest)) == 2)
                controller.hold = False
                controller.batch_sizes = (1, 2, 4, 8)
                controller.restart()
                await until(lambda: len(ends.results) == 2)
                error = ends.results[1]
                assert isinstance(error, FrontError) and error.status is Status.UNAVAILABLE
                await until(lambda: loads(controller) == ["toy", "toy"])
                await until(serving.ready)
                assert isinstance(await ends.of(asked()), Answered)
                assert (
                    "slosched_gateway_controller_restarts 1.0"
                    in serving.metrics(serving.callers.everyone).decode()
                )

                def eight() -> bool:  # what the new controller says of the model holds
                    form = serving.models.versions.ready[0].form
                    return form is not None and form.max_batch == 8

                await until(eight)
                assert isinstance(await ends.of(asked(8)), Answered)

    run(work())


def test_a_controller_that_was_away_is_ready_soon_after_it_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def work() -> None:
        with Controller() as controller:
            async with service(controller.address) as serving:
                await until(serving.ready)
                monkeypatch.setattr(models_module, "_LOOK_EVERY_S", 0.01)
                client, away, skipped = serving._house.client, [True], [0]
                listing = client.listing
                monkeypatch.setattr(models_module, "now_ns", lambda: clock.now_ns() + skipped[0])

                async def asked_for() -> ListModelsReply:
                    if away[0]:
                        skipped[0] += 5 * 10**9  # as long as a question waits for its answer
                        raise PeerUnreachable("no answer came")
                    return await listing()

                monkeypatch.setattr(client, "listing", asked_for)
                await until(lambda: not serving.ready())
                away[0] = False
                await until(serving.ready)

    run(work())


def test_an_answer_that_waited_for_a_restarted_controller_is_asked_for_again_soon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def work() -> None:
        with Controller(("toy:1",)) as controller:
            async with service(controller.address) as serving:
                assert isinstance(await Ends(serving).of(asked()), Answered)
                monkeypatch.setattr(models_module, "_LOOK_EVERY_S", 0.01)
                client, skipped = serving._house.client, [0]
                listing = client.listing
                monkeypatch.setattr(models_module, "now_ns", lambda: clock.now_ns() + skipped[0])

                async def asked_for() -> ListModelsReply:
                    if not skipped[0]:
                        skipped[0] = 5 * 10**9  # until the new one answers
                        controller.restart()
                        await until(lambda: client.restarts == 1)
                    reply = await listing()
                    controller.offers = ("toy:2",)  # from the second answer on
                    return reply

                monkeypatch.setattr(client, "listing", asked_for)
                await until(lambda: skipped[0])
                async with asyncio.timeout(5):
                    await until(lambda: serving.models.versions.ready_versions("toy") == ["2"])

    run(work())


def test_before_the_controller_is_there_everything_says_so_and_then_serves() -> None:
    async def work() -> None:
        with Controller() as controller:
            controller.deaf = True
            async with service(controller.address) as serving:
                assert serving.live() and not serving.ready()
                assert "no controller has answered" in serving.unreachable
                waiting = asyncio.create_task(serving.infer(asked(), serving.caller("")))
                await asyncio.sleep(0.05)
                controller.deaf = False
                assert (await waiting).version == "1"  # it waits for the first answer for a while
                await until(serving.ready)

    run(work())


def test_while_no_worker_has_joined_no_model_is_called_unknown() -> None:
    async def work() -> None:
        with Controller(()) as controller:
            async with service(controller.address, load=("toy",)) as serving:
                error = await Ends(serving).of(asked())
                assert isinstance(error, FrontError) and error.status is Status.UNAVAILABLE
                assert await serving.index(serving.callers.everyone, ready=False) == []
                controller.offers = ("toy",)
                await until(lambda: serving.models.versions.ready_versions("toy"))

    run(work())


def test_a_gateway_that_is_ready_knows_what_the_workers_offer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def work() -> None:
        with Controller(()) as controller:
            controller.ready = False
            async with service(controller.address) as serving:
                await until(serving.models._first.is_set)
                monkeypatch.setattr(models_module, "_LOOK_EVERY_S", 0.01)
                client = serving._house.client
                listing = client.listing

                async def asked_for() -> ListModelsReply:
                    reply = await listing()  # and then a worker joins
                    controller.offers, controller.ready = ("toy",), True
                    return reply

                monkeypatch.setattr(client, "listing", asked_for)
                await until(serving.ready)
                assert isinstance(await Ends(serving).of(asked()), Answered)

    run(work())


def test_without_a_gpu_the_gateway_is_not_ready() -> None:
    async def work() -> None:
        with Controller() as controller:
            async with service(controller.address) as serving:
                await until(serving.ready)
                controller.ready = False
                await until(lambda: not serving.ready())
                assert not await serving.model_ready("toy", "", serving.callers.everyone)

    run(work())


@pytest.mark.parametrize("seed", range(3))
def test_loads_unloads_versions_and_leavers_in_any_order_leave_nothing_behind(seed: int) -> None:
    async def work() -> None:
        draw = random.Random(seed)
        with Controller(("toy:1", "other")) as controller:
            async with service(controller.address, max_models=3) as serving:
                ends, who = Ends(serving), serving.caller("")
                await until(serving.ready)
                begun, left = 0, 0
                tasks: list[asyncio.Task[None]] = []
                for _ in range(60):
                    kind = draw.choice(
                        ("infer", "infer", "leave", "load", "unload", "offer", "gone")
                    )
                    name = draw.choice(("toy", "toy:1", "toy:2", "other", "nope"))
                    if kind in ("infer", "leave"):
                        running = ends.begin(asked(draw.randint(1, 4), model=name))
                        begun += 1
                        if kind == "leave":
                            left += not running.done
                            running.cancel()
                    elif kind == "load":
                        tasks.append(asyncio.create_task(serving.load(name, {}, who)))
                    elif kind == "unload":
                        tasks.append(asyncio.create_task(serving.unload(name, {}, who)))
                    elif kind == "offer":
                        versions = draw.sample(("toy:1", "toy:2", "toy:3"), draw.randint(1, 3))
                        controller.offers = (*versions, "other")
                        await serving.models.look()
                    else:
                        controller.loaded = {}
                    if draw.random() < 0.5:
                        await asyncio.sleep(draw.choice((0, 0.002, 0.01)))
                for ended in await asyncio.gather(*tasks, return_exceptions=True):
                    assert ended is None or isinstance(ended, FrontError)
                await until(lambda: len(ends.results) == begun - left)
                assert nothing_is_held(serving)
                controller.offers = ("toy:1", "other")
                await serving.models.look()
                await serving.unload("other", {}, who)
                await serving.load("toy:1", {}, who)
                assert isinstance(await ends.of(asked(version="1")), Answered)

    run(work())


def test_the_index_says_why_a_version_is_left_out() -> None:
    async def work() -> None:
        with Controller(("toy:2", "other")) as controller:
            reason = "model.pt2 is not a whole ZIP file"
            controller.left_out = (("toy:3", reason), ("new:1", "why"), (".", "x"), ("a b", "x"))
            async with service(controller.address) as serving:
                rows = await serving.index(serving.callers.everyone, ready=False)
                assert rows == [
                    {"name": "new", "version": "1", "state": "UNAVAILABLE", "reason": "why"},
                    {"name": "other"},
                    {"name": "toy", "version": "2", "state": "UNAVAILABLE", "reason": "not loaded"},
                    {"name": "toy", "version": "3", "state": "UNAVAILABLE", "reason": reason},
                ]
                assert await serving.index(serving.callers.everyone, ready=True) == []
                error = await Ends(serving).of(asked(version="3"))
                assert isinstance(error, FrontError) and error.status is NOT_FOUND

    run(work())
