"""The gateway's service before a controller that answers by the book: inferences, models, versions, callers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from gateway_rig import (
    Controller,
    Ends,
    asked,
    hellos,
    loads,
    nothing_is_held,
    run,
    service,
    status_of,
    until,
)
from slosched.codes import Code
from slosched.fronts.asked import Answered, NamedTensor, RegionPart, Wanted
from slosched.fronts.errors import FrontError, Status
from slosched.fronts.serving import Serving
from slosched.messages import CancelRequest, Goodbye, InferRequest

NOT_FOUND = Status.NOT_FOUND


# -------------------------------------------------------------------------------- inferences


def test_a_batch_is_as_many_requests_and_one_answer() -> None:
    async def work() -> None:
        with Controller() as controller:
            async with service(controller.address) as serving:
                ends = Ends(serving)
                for rows in (1, 3):
                    answer = await ends.of(asked(rows, id="seven"))
                    assert isinstance(answer, Answered)
                    assert (answer.model, answer.version, answer.id) == ("toy", "1", "seven")
                    [output] = answer.outputs
                    assert (output.datatype, output.shape) == ("FP32", (rows, 2))
                    assert len(output.data) == 8 * rows and answer.in_time
                assert len(controller.of(InferRequest)) == 4
                assert nothing_is_held(serving)
                stats = (await serving.statistics("toy", "", serving.callers.everyone))[
                    "model_stats"
                ][0]
                assert stats["inference_count"] == 4
                assert stats["inference_stats"]["success"]["count"] == 2

    run(work())


CODES = {
    Code.TIMED_OUT: Status.UNAVAILABLE,
    Code.COPY_INPUT_TOO_LATE: Status.UNAVAILABLE,
    Code.EXEC_TOO_LATE: Status.UNAVAILABLE,
    Code.SKIPPED: Status.UNAVAILABLE,
    Code.COULD_NOT_START_IN_TIME: Status.UNAVAILABLE,
    Code.CONTROLLER_OVERLOADED: Status.UNAVAILABLE,
    Code.SHUTTING_DOWN: Status.UNAVAILABLE,
    Code.CANCELLED: Status.UNAVAILABLE,
    Code.INVALID_REQUEST: Status.INVALID_ARGUMENT,
    Code.INVALID_INPUT: Status.INVALID_ARGUMENT,
    Code.UNKNOWN_MODEL: Status.NOT_FOUND,
    Code.LIMIT_REACHED: Status.RESOURCE_EXHAUSTED,
    Code.RUNTIME_ERROR: Status.INTERNAL,
    Code.PROCESS_ENDED: Status.INTERNAL,
    Code.MODEL_PROCESS_ENDED: Status.INTERNAL,
}


def test_each_code_of_the_controller_has_its_status_and_a_refusal_its_prediction() -> None:
    async def work() -> None:
        with Controller() as controller:
            async with service(controller.address) as serving:
                ends = Ends(serving)
                assert isinstance(await ends.of(asked()), Answered)
                for code, status in CODES.items():
                    controller.code, controller.reason = int(code), "because"
                    error = await ends.of(asked(2))
                    assert isinstance(error, FrontError)
                    assert error.status is status and "because" in error.text
                    assert (error.refusal is not None) == (status is Status.UNAVAILABLE)
                    if error.refusal is not None:
                        assert error.refusal.code == code
                        assert error.refusal.predicted_start_ns == 300_000
                        assert error.refusal.predicted_exec_ns == 2_600_000
                        assert error.refusal.time_left_ns == 10**9 - 3_000_000
                    expired = error.text.startswith("Request timeout expired")
                    assert expired == (code == Code.TIMED_OUT or code.name.endswith("_TOO_LATE"))
                assert nothing_is_held(serving)
                stats = (await serving.statistics("toy", "", serving.callers.everyone))[
                    "model_stats"
                ][0]
                assert stats["inference_stats"]["fail"]["count"] == len(CODES)
                wrong = await ends.of(asked(wanted=(Wanted("nope"),)))  # which did not run
                assert isinstance(wrong, FrontError) and wrong.status is Status.INVALID_ARGUMENT
                later = await serving.statistics("toy", "", serving.callers.everyone)
                assert later["model_stats"][0]["inference_stats"] == stats["inference_stats"]

    run(work())


def test_a_client_that_leaves_cancels_every_row_at_the_controller() -> None:
    async def work() -> None:
        with Controller() as controller:
            async with service(controller.address) as serving:
                ends = Ends(serving)
                await ends.of(asked())
                controller.hold = True
                running = ends.begin(asked(3))
                await until(lambda: len(controller.of(InferRequest)) == 4)
                running.cancel()
                running.cancel()
                await until(lambda: len(controller.of(CancelRequest)) == 3)
                assert len(ends.results) == 1 and nothing_is_held(serving)
                waiting = asyncio.create_task(serving.infer(asked(), serving.caller("")))
                await until(lambda: len(controller.of(InferRequest)) == 5)
                waiting.cancel()
                await until(lambda: len(controller.of(CancelRequest)) == 4)
                assert nothing_is_held(serving)
                text = serving.metrics(serving.callers.everyone).decode()
                assert 'status="cancelled",token=""} 2.0' in text

    run(work())


def test_one_that_leaves_at_once_is_never_sent_or_cancelled_and_costs_nothing() -> None:
    async def work() -> None:
        with Controller() as controller:
            async with service(controller.address) as serving:
                ends = Ends(serving)
                ends.begin(asked()).cancel()  # its model was not loaded yet
                await ends.of(asked())
                ends.begin(asked(4)).cancel()
                controller.hold = True
                last = ends.begin(asked(2))
                await until(lambda: len(controller.of(InferRequest)) >= 3)
                assert len(controller.of(InferRequest)) == 3
                last.cancel()
                assert len(ends.results) == 1 and nothing_is_held(serving)

    run(work())


def test_a_controller_that_goes_silent_ends_what_runs_and_refuses_what_comes() -> None:
    async def work() -> None:
        with Controller() as controller:
            async with service(controller.address) as serving:
                ends = Ends(serving)
                await ends.of(asked())
                assert serving.ready()
                controller.hold = True
                ends.begin(asked(2))
                await until(lambda: len(controller.of(InferRequest)) == 3)
                controller.deaf = True
                # Silence is counted in ticks of a second; what the client says then is what matters here.
                serving._house.client._brain.lost = "the controller has been silent for 5s"
                await until(lambda: len(ends.results) == 2)
                error = ends.results[1]
                assert isinstance(error, FrontError) and error.status is Status.UNAVAILABLE
                assert "silent" in error.text and nothing_is_held(serving)
                late = await ends.of(asked())
                assert isinstance(late, FrontError) and late.status is Status.UNAVAILABLE
                assert not serving.ready()

    run(work())


def test_a_request_without_an_answer_ends_after_its_slo_and_a_grace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def work() -> None:
        monkeypatch.setattr("slosched.fronts.sessions.GRACE_NS", 0)
        with Controller() as controller:
            async with service(controller.address) as serving:
                ends = Ends(serving)
                await ends.of(asked())
                controller.hold = True
                error = await ends.of(asked(slo_ns=1_000_000))
                assert isinstance(error, FrontError) and error.status is Status.UNAVAILABLE
                await until(lambda: controller.of(CancelRequest))

    run(work())


def test_an_answer_that_is_late_is_an_answer() -> None:
    async def work() -> None:
        with Controller() as controller:
            async with service(controller.address) as serving:
                ends = Ends(serving)
                await ends.of(asked())
                controller.answer_after_ns = 20_000_000
                answer = await ends.of(asked(slo_ns=1_000_000))
                assert isinstance(answer, Answered) and not answer.in_time
                assert answer.latency_ns > answer.slo_ns == 1_000_000
                assert 'status="late"' in serving.metrics(serving.callers.everyone).decode()

    run(work())


def test_a_shell_that_fails_at_an_answer_costs_no_other_its_own() -> None:
    async def work() -> None:
        faults: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, fault: faults.append(fault))
        with Controller() as controller:
            async with service(controller.address) as serving:
                ends = Ends(serving)
                await ends.of(asked())

                def broken(result: Any) -> None:
                    raise ValueError("the shell's own fault")

                serving.begin(asked(), serving.caller(""), broken)
                ends.begin(asked())
                await until(lambda: len(ends.results) == 2)
                assert isinstance(ends.results[1], Answered)
                assert len(faults) == 1 and nothing_is_held(serving)

    run(work())


def test_more_than_is_allowed_in_flight_gets_429_and_the_rest_goes_on() -> None:
    async def work() -> None:
        with Controller() as controller:
            async with service(
                controller.address, max_in_flight=3, max_in_flight_bytes=150
            ) as serving:
                ends = Ends(serving)
                await ends.of(asked())
                controller.hold = True
                runs = ends.begin(asked(2))
                for rows in (2, 4):  # too many rows, too many bytes
                    error = await ends.of(asked(rows))
                    assert isinstance(error, FrontError)
                    assert error.status is Status.RESOURCE_EXHAUSTED
                    assert (error.retry_after_s > 0) is (rows == 2)  # four never fit
                controller.hold = False
                assert isinstance(await ends.of(asked(1)), Answered)
                runs.cancel()
                assert nothing_is_held(serving)

    run(work())


class _Memory:
    """Regions in which anything may be written, but not in "full"."""

    def __init__(self) -> None:
        self.written: list[tuple[RegionPart, bytes]] = []

    def write(self, part: RegionPart, data: Any) -> None:
        if part.region == "full":
            raise FrontError(Status.INVALID_ARGUMENT, "no room")
        self.written.append((part, bytes(data)))

    def close(self) -> None: ...


def test_outputs_go_into_the_regions_where_they_are_wanted() -> None:
    async def work() -> None:
        with Controller() as controller:
            async with service(controller.address) as serving:
                ends, memory = Ends(serving), _Memory()
                serving.callers.everyone.regions = memory  # type: ignore[assignment]
                part = RegionPart("mine", 16, 100)
                answer = await ends.of(asked(2, wanted=(Wanted("output", part),)))
                assert isinstance(answer, Answered)
                assert answer.outputs == (NamedTensor("output", "FP32", (2, 2), b""),)
                assert answer.in_regions == {"output": RegionPart("mine", 16, 16)}
                assert memory.written == [(part, bytes(16))]
                for part in (RegionPart("mine", 0, 15), RegionPart("full", 0, 16)):
                    error = await ends.of(asked(2, wanted=(Wanted("output", part),)))
                    assert isinstance(error, FrontError)
                    assert error.status is Status.INVALID_ARGUMENT

    run(work())


# ----------------------------------------------------------------------------------- callers


def tokens(folder: Path) -> str:
    path = folder / "tokens.toml"
    path.write_text(
        '[tokens.fast]\ntoken = "fast-token"\nweight = 2.5\noperator = true\n'
        '[tokens.slow]\ntoken = "slow-token"\nin_flight = 2\nmodels = ["toy"]\n'
    )
    path.chmod(0o600)
    return str(path)


def test_each_token_has_a_session_with_its_name_and_weight_and_its_quota(tmp_path: Path) -> None:
    async def work() -> None:
        with Controller() as controller:
            async with service(controller.address, tokens=tokens(tmp_path)) as serving:
                status, _ = await status_of(_caller(serving, ""))
                assert status is Status.UNAUTHENTICATED
                fast = serving.callers.caller("Bearer fast-token")
                slow = serving.callers.caller("Bearer slow-token")
                assert hellos(controller) in (
                    [],
                    [("gateway", 1.0)],
                )  # each begins with its first request
                quick, limited = Ends(serving, fast), Ends(serving, slow)
                assert isinstance(await quick.of(asked()), Answered)
                assert isinstance(await limited.of(asked()), Answered)
                assert hellos(controller) == [("fast", 2.5), ("gateway", 1.0), ("slow", 1.0)]
                controller.hold = True
                running = [limited.begin(asked()), limited.begin(asked())]
                error = await limited.of(asked())
                assert isinstance(error, FrontError) and error.status is Status.RESOURCE_EXHAUSTED
                assert "token 'slow' is over its quota" in error.text
                controller.hold = False
                assert isinstance(await quick.of(asked(4)), Answered)  # others go on
                for each in running:
                    each.cancel()
                error = await limited.of(asked(model="other"))
                assert isinstance(error, FrontError) and error.status is Status.NOT_FOUND
                status, _ = await status_of(serving.unload("toy", {}, slow))
                assert status is Status.PERMISSION_DENIED
                for tells in (serving.model_metadata, serving.model_config):  # which load, too
                    status, _ = await status_of(tells("other", "", slow))
                    assert status is Status.NOT_FOUND
                    assert (await tells("toy", "", slow))["name"] == "toy"
                assert "other" not in loads(controller) and nothing_is_held(serving)
                text = serving.metrics(serving.callers.everyone).decode()
                assert 'model="toy",status="ok",token="fast"} 2.0' in text

    run(work())


def test_a_token_that_is_gone_after_a_reload_is_no_more_and_its_session_ends(
    tmp_path: Path,
) -> None:
    async def work() -> None:
        with Controller() as controller:
            path = Path(tokens(tmp_path))
            async with service(controller.address, tokens=str(path)) as serving:
                fast = serving.callers.caller("Bearer fast-token")
                ends = Ends(serving, fast)
                assert isinstance(await ends.of(asked()), Answered)
                path.write_text('[tokens.other]\ntoken = "other-token"\n')
                serving.read_tokens_again()
                status, _ = await status_of(_caller(serving, "Bearer fast-token"))
                assert status is Status.UNAUTHENTICATED
                error = await ends.of(asked())  # a shell that remembered the caller
                assert isinstance(error, FrontError) and error.status is Status.UNAUTHENTICATED

    run(work())


@pytest.mark.parametrize("left", ["[tokens.fast]\nweight = 1.0", "[tokens.other]"])
def test_what_is_in_flight_goes_on_when_its_token_is_gone_or_has_another_weight(
    tmp_path: Path, left: str
) -> None:
    async def work() -> None:
        with Controller() as controller:
            path = Path(tokens(tmp_path))
            async with service(controller.address, tokens=str(path)) as serving:
                fast = serving.callers.caller("Bearer fast-token")
                ends = Ends(serving, fast)
                assert isinstance(await ends.of(asked()), Answered)
                controller.answer_after_ns = 300_000_000
                ends.begin(asked())
                await until(lambda: len(controller.of(InferRequest)) == 2)
                controller.answer_after_ns = 0
                path.write_text(f'{left}\ntoken = "fast-token"\n')
                serving.read_tokens_again()
                now = serving.callers.caller("Bearer fast-token")
                assert isinstance(await Ends(serving, now).of(asked()), Answered)
                await until(lambda: len(ends.results) == 2)
                assert isinstance(ends.results[1], Answered) and nothing_is_held(serving)
                assert fast.quota.rows_now == 0 and now.name in left
                assert {name for name, _ in hellos(controller)} == {"gateway", "fast", now.name}
                await until(lambda: len(controller.of(Goodbye)) == 1)

    run(work())


async def _caller(serving: Serving, authorization: str) -> None:
    serving.caller(authorization)


def test_a_service_that_is_stopped_takes_nothing_more_and_ends_what_runs() -> None:
    async def work() -> None:
        with Controller() as controller:
            async with service(controller.address) as serving:
                ends = Ends(serving)
                await ends.of(asked())
                controller.hold = True
                ends.begin(asked(2))
                serving.draining = True
                error = await ends.of(asked())
                assert isinstance(error, FrontError) and error.status is Status.UNAVAILABLE
                assert not serving.ready() and serving.running == 1
            assert len(ends.results) == 3 and nothing_is_held(serving)

    run(work())
