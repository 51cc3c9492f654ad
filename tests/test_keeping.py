"""The client that sends a file's requests at their times and keeps every answer."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slosched
from slosched.cascade_spec import CascadeSpec
from slosched.clients.keeping import Requests, keep_answers, read_requests, write_answers
from slosched.codes import Code, Verdict
from slosched.config import SchedulerConfig
from slosched.config_file import write_profile
from slosched.errors import InvalidConfig
from slosched.units import NS_PER_MS
from slosched.workloads.cascades import load_cascade


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_requests_are_read_as_they_were_written(tmp_path: Path) -> None:
    at_ns, label = np.array([0, 5, 5]), np.array([[1], [2], [3]])
    found = read_requests(saved(tmp_path / "a.npz", at_ns=at_ns, label=label))
    assert len(found) == 3 and found.at_ns.tolist() == [0, 5, 5]
    assert found.inputs.keys() == {"label"} and found.inputs["label"].tolist() == label.tolist()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"label": np.zeros(2)}, "at_ns must be a list of whole numbers"),
        ({"at_ns": np.zeros(2)}, "at_ns must be a list of whole numbers"),
        ({"at_ns": np.zeros((2, 1), int)}, "at_ns must be a list of whole numbers"),
        ({"at_ns": np.zeros(0, int)}, "at_ns must be a list of whole numbers"),
        ({"at_ns": np.array([3, 2])}, "must be at least 0 and never fall"),
        ({"at_ns": np.array([-3, 2])}, "must be at least 0 and never fall"),
        ({"at_ns": np.arange(2), "x": np.zeros((3, 1))}, "x must have one row for each of the 2"),
        ({"at_ns": np.arange(2), "x": np.float32(1)}, "x must have one row for each of the 2"),
        ({"at_ns": np.arange(2), "x": np.array([None, 1], object)}, "not a readable .npz"),
    ],
)
def test_a_wrong_file_of_requests_is_named(
    arrays: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = saved(tmp_path / "requests.npz", **arrays)
    with pytest.raises(InvalidConfig, match=message):
        read_requests(path)


def test_files_that_are_missing_or_of_another_kind_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"not a readable \.npz file"):
        read_requests(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("at_ns 1 2 3")
    whole = saved(tmp_path / "whole.npz", at_ns=np.arange(400)).read_bytes()
    (tmp_path / "half.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidConfig, match=r"not a readable \.npz file"):
        read_requests(tmp_path / "half.npz")
    with pytest.raises(InvalidConfig, match=r"not a readable \.npz file"):
        read_requests(tmp_path / "text.npz")
    np.save(tmp_path / "one.npy", np.arange(3))
    with pytest.raises(InvalidConfig, match=r"not a readable \.npz file"):
        read_requests(tmp_path / "one.npy")


def faster(spec: CascadeSpec) -> CascadeSpec:
    """The same cascade, 20 times as fast, with an SLO of 250 ms."""
    light, heavy = (
        replace(each, exec_ns={batch: ns // 20 for batch, ns in each.exec_ns.items()})
        for each in (spec.light, spec.heavy)
    )
    return replace(
        spec, light=light, heavy=heavy, judge_ns=spec.judge_ns // 20, slo_ns=250 * NS_PER_MS
    )


async def kept(tmp_path: Path, policy: str, count: int) -> dict[str, Any]:
    """`count` requests, 2 ms apart, to a cascade on an emulated GPU; each input has its number in front."""
    spec = faster(load_cascade("sdturbo"))
    profile = tmp_path / "profile.toml"
    write_profile(profile, spec.profile(), replacing=True)
    emulated = slosched.WorkerConfig(
        device="emulated", profile=str(profile), bind="127.0.0.1", port=0
    )
    inputs = np.zeros((count, 77), np.int32)
    inputs[:, 0] = np.arange(count) + 1000
    requests = Requests(np.arange(count) * 2 * NS_PER_MS, {"input": inputs})
    with slosched.Worker(emulated, announce=lambda line: None) as worker:
        config = slosched.ControllerConfig(
            scheduler=SchedulerConfig(policy=policy, cascades=(spec,)),
            workers=(f"127.0.0.1:{worker.port}",),
            bind="127.0.0.1",
            port=0,
            http_port=-1,
            log_dir=str(tmp_path / policy),
        )
        controller = slosched.Controller(config, announce=lambda line: None)
        await controller.start()
        serving = asyncio.create_task(controller.run())
        try:
            return await keep_answers(f"127.0.0.1:{controller.port}", "sdturbo", requests)
        finally:
            controller.stop()
            await serving


def test_every_answer_is_kept_with_its_stage(tmp_path: Path) -> None:
    found = asyncio.run(kept(tmp_path, "CASCADE", 6))
    assert {len(column) for column in found.values()} == {6}
    assert found["code"].tolist() == [int(Code.OK)] * 6 and found["met"].all()
    assert set(found["stage"].tolist()) <= {0, 1} and (found["score"] >= 0).all()
    heavy = found["verdict"] == int(Verdict.HEAVY)
    assert (found["stage"] == 1).tolist() == heavy.tolist()
    assert (found["latency_ns"] > 0).all() and (found["late_ns"] >= 0).all()
    # An emulated GPU answers with the first bytes of the request's input.
    first = found["output.output"].reshape(6, -1)[:, 0].view(np.int32)
    assert first.tolist() == [1000, 1001, 1002, 1003, 1004, 1005]
    write_answers(tmp_path / "answers.npz", found)
    with np.load(tmp_path / "answers.npz", allow_pickle=False) as file:
        assert set(file.files) == set(found)
        assert file["score"].tolist() == found["score"].tolist()


def test_what_is_refused_is_kept_without_an_answer(tmp_path: Path) -> None:
    """The heavy program takes 90 ms alone: of 40 requests within 80 ms most cannot be in time."""
    found = asyncio.run(kept(tmp_path, "CLIPPER-HEAVY", 40))
    refused = found["code"] != int(Code.OK)
    assert refused.any() and not found["met"][refused].any()
    assert (found["stage"][refused] == -1).all() and (found["score"] == -1).all()
    assert not found["output.output"][refused].any()
    assert (found["stage"][~refused] == 1).all()
