"""Faults of cascades that were found by review: each would come back without its test."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from cascade_rig import CascadeRig, pair
from made_messages import an_error
from scheduler_rig import MS
from slosched.cascade.published_transforms import violation_series
from slosched.cascade_spec import StageSpec
from slosched.cli.plot import _served
from slosched.codes import ActionType, Code, Verdict
from slosched.config_file import load_profile
from slosched.core.scheduler.cascades import Cascade
from slosched.core.scheduler.interface import FromClient, FromWorker
from slosched.core.scheduler.limits import Limits
from slosched.core.scheduler.state import RequestState
from slosched.errors import InvalidConfig, UnknownName
from slosched.messages import (
    CancelRequest,
    InferReply,
    LengthClass,
    LoadModelReply,
    LoadModelRequest,
)
from slosched.workloads.cascades import load_cascade


def test_a_request_id_that_is_used_twice_does_not_mix_the_replies_of_two_loads() -> None:
    more = (pair(name="other", heavy=StageSpec("third", {1: MS})),)
    rig = CascadeRig(load=False, more=more)
    rig.join_pair(0, session=99, loadable=("small", "large", "third"))
    rig.load_named("third")
    for name in ("pair", "third", "pair", "nothing"):
        rig.handle(FromClient(b"c", LoadModelRequest(7, name)))
    for _ in range(4):
        rig.prepare_all()
    replies = [each for each in rig.to_client(LoadModelReply) if each.request_id == 7]
    named = sorted(model.name for reply in replies for model in reply.models)
    assert named == ["pair", "pair", "third"]
    assert sorted(reply.code for reply in replies) == [
        Code.OK,
        Code.OK,
        Code.OK,
        Code.UNKNOWN_MODEL,
    ]


@pytest.mark.parametrize("policy", ["INFER5", "CASCADE"])
@pytest.mark.parametrize(
    "code", [Code.MODEL_PROCESS_ENDED, Code.EXEC_WEIGHTS_MISSING, Code.RUNTIME_ERROR]
)
def test_a_deferred_request_gets_its_light_answer_when_the_heavy_program_fails(
    policy: str, code: Code
) -> None:
    rig = CascadeRig(policy)
    request_id = rig.ask()
    rig.run("small", 0.1)
    for _ in range(12):
        waiting = rig.waiting("large")
        if not waiting:
            break
        rig.now_ns += 2 * MS
        infer = waiting[-1]
        action_type = int(ActionType.INFER)
        error = an_error(infer.session, infer.action_id, code, "broken", action_type=action_type)
        rig.handle(FromWorker(0, error))
        rig.step()
    for _ in range(40):
        rig.now_ns += 10 * MS
        rig.step()
    (reply,) = [each for each in rig.to_client(InferReply) if each.request_id == request_id]
    assert reply.code == Code.OK and reply.reason.startswith("answered by stage 0")
    assert rig.verdicts(request_id)[-1] in (Verdict.INSTEAD, Verdict.OUTRANKED)


def test_a_cancelled_request_is_cancelled_though_it_has_a_light_answer() -> None:
    rig = CascadeRig()
    request_id = rig.ask()
    rig.run("small", 0.1)
    rig.handle(FromClient(b"c", CancelRequest(request_id)))
    rig.step()
    (reply,) = [each for each in rig.to_client(InferReply) if each.request_id == request_id]
    assert reply.code == Code.CANCELLED


def test_programs_whose_lengths_do_not_fit_are_no_cascade() -> None:
    rig = CascadeRig()
    cascade: Cascade = rig.cascade
    light, heavy = cascade.light, cascade.heavy
    assert light is not None and heavy is not None
    result = light.instance.result
    assert result is not None
    classes = tuple(
        LengthClass(length, result.batch_sizes, result.exec_ns) for length in (128, 512)
    )
    light.instance.result = msgspec.structs.replace(result, length_classes=classes)
    assert "lengths up to 0, and the light one up to 512" in cascade.bind(
        light.instance, heavy.instance
    )


def test_outputs_that_are_kept_count_against_the_limits() -> None:
    rig = CascadeRig()
    limits: Limits = rig.scheduler.limits
    client = rig.scheduler.clients[b"c"]
    rig.ask()
    (request,) = client.requests.values()
    rig.scheduler.answers.keeps(request, 3_000)
    assert client.input_bytes == 3_000
    assert limits.exceeded(client, MS, client_most(rig), waiting=0)
    rig.run("small", 0.9)
    assert client.input_bytes == 0


@pytest.mark.parametrize(
    ("policy", "verdict"), [("INFER5", Verdict.INSTEAD), ("CASCADE", Verdict.OUTRANKED)]
)
def test_only_a_policy_that_serves_by_score_says_outranked(policy: str, verdict: Verdict) -> None:
    rig = CascadeRig(policy)
    request_id = rig.ask()
    rig.run("small", 0.1)
    request = rig.scheduler.clients[b"c"].requests[request_id]
    request.move(RequestState.QUEUED)  # as if its heavy action had been taken back
    rig.scheduler.refuse(request, Code.SKIPPED, "others went first")
    rig.effects += rig.scheduler.schedule(now_ns=rig.now_ns)
    assert rig.verdicts(request_id)[-1] is verdict


def test_the_second_stage_has_tries_of_its_own() -> None:
    rig = CascadeRig()
    rig.ask()
    rig.run("small", 0.1)
    (request,) = rig.scheduler.clients[b"c"].requests.values()
    assert request.attempts - request.excused <= 1


def client_most(rig: CascadeRig) -> int:
    """More bytes than one client may have, less what is kept."""
    return rig.scheduler.cluster.config.max_client_bytes - 2_999


def test_a_cascade_whose_light_output_goes_on_runs_on_emulated_gpus() -> None:
    spec = load_cascade(Path(__file__).parents[1] / "workloads" / "cascades" / "my-cascade.toml")
    models = spec.profile().models
    light, heavy = models[spec.light.model], models[spec.heavy.model]
    assert spec.passes_output
    assert (heavy.input_shape, heavy.input_dtype) == (light.output_shape, light.output_dtype)


def test_a_profile_is_named_after_a_cascade() -> None:
    assert load_profile("cascade:sdxs").models.keys() == {"sdxs+judge", "sd-v1.5"}
    with pytest.raises(UnknownName, match="sdxz"):
        load_profile("cascade:sdxz")


def test_the_published_averages_of_a_short_run_are_means() -> None:
    assert violation_series([10] * 12, [10] * 12).tolist() == [1.0]


def test_plot_takes_the_cascade_from_the_run(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"cascade": "sdxs", "summary": {}}')
    assert _served([tmp_path], None) == "sdxs"
    with pytest.raises(InvalidConfig, match="the runs served sdxs, not sdturbo"):
        _served([tmp_path], "sdturbo")
