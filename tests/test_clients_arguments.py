"""Values of another type, and numbers at the edge, are refused by the client that gets them, at once."""

from __future__ import annotations

import asyncio
import math
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from fake_controller import FakeController
from slosched.clients.aio import AsyncClient, connect
from slosched.clients.blocking import Client
from slosched.errors import ConnectionLost, InvalidConfig, InvalidRequest, PeerUnreachable
from slosched.messages import (
    InferRequest,
    ListModelsRequest,
    LoadModelRequest,
    StatusRequest,
    UnloadModelRequest,
)

_NO_NUMBERS: list[Any] = ["bob", None, 1.5, True, [1], Decimal(1), math.nan]


def _never(*_: object) -> None:
    raise AssertionError("nothing was sent")


def test_wrong_types_are_refused_before_anything_is_sent() -> None:
    with FakeController() as controller, Client(controller.address) as client:
        [model] = client.load("toy")
        sent = len(controller.of(LoadModelRequest))
        for user_id in [*_NO_NUMBERS, 2**63, 2**70, -(2**63) - 1, 10**5000, np.timedelta64(1)]:
            with pytest.raises(InvalidRequest, match="user_id must be"):
                client.infer(model, user_id=user_id)
        for copies in [*_NO_NUMBERS, "2", 0, -1, 2**31, 2**70, -(10**5000)]:
            with pytest.raises(InvalidRequest, match="copies must be"):
                client.load("toy", copies)
        for name in (None, 5, b"toy", ["toy"], "", "\ud800", "x" * 5000):
            with pytest.raises(InvalidRequest, match="the model's name"):
                client.load(name)  # type: ignore[arg-type]
            with pytest.raises(InvalidRequest, match="the model's name"):
                client.unload(name)  # type: ignore[arg-type]
        for other in ("toy", None, 0, model.info, [model]):
            with pytest.raises(InvalidRequest, match="model must be a Model"):
                client.infer(other)  # type: ignore[arg-type]
        for brief in (None, 1, "no"):
            with pytest.raises(InvalidRequest, match="brief must be"):
                client.status(brief=brief)  # type: ignore[arg-type]
            with pytest.raises(InvalidRequest, match="force must be"):
                client.unload("toy", force=brief)  # type: ignore[arg-type]
        for timeout_s in ("5", None, math.nan, math.inf, -1, 10**400, True):
            with pytest.raises(InvalidRequest, match="timeout_s must be"):
                client.load("toy", timeout_s=timeout_s)  # type: ignore[arg-type]
            with pytest.raises(InvalidRequest, match="timeout_s must be"):
                client.models(timeout_s=timeout_s)  # type: ignore[arg-type]
            with pytest.raises(InvalidRequest, match="timeout_s must be"):
                client.unload("toy", timeout_s=timeout_s)  # type: ignore[arg-type]
            with pytest.raises(InvalidRequest, match="timeout_s must be"):
                client.status(timeout_s=timeout_s)  # type: ignore[arg-type]
            if timeout_s is not None:
                with pytest.raises(InvalidRequest, match="timeout_s must be"):
                    client.infer(model, timeout_s=timeout_s)  # type: ignore[arg-type]
        assert len(controller.of(LoadModelRequest)) == sent
        for kind in (InferRequest, StatusRequest, ListModelsRequest, UnloadModelRequest):
            assert not controller.of(kind)


@pytest.mark.parametrize(
    "given",
    [
        {"slo_factor": 1e308},
        {"slo_factor": 10**400},
        {"slo_factor": 1e13},
        {"slo": 1e300},
        {"slo": 10**400},
        {"slo": "1e999999999s"},
        {"slo": np.float32(1e38)},
        {"slo": 2.0**62},
        {"slo": np.timedelta64(1)},
        {"slo": [1]},
        {"slo_factor": np.ones(2)},
        {"slo": 1j},
        {"slo": -(10**400)},
        {"slo": 10**5000},
        {"slo_factor": -(10**5000)},
    ],
)
def test_slos_at_the_edge_are_refused(given: dict[str, Any]) -> None:
    with FakeController() as controller, Client(controller.address) as client:
        [model] = client.load("toy")
        with pytest.raises(InvalidRequest, match="slo"):
            client.infer(model, **given)
        assert not controller.of(InferRequest)


def test_numpys_numbers_are_numbers() -> None:
    with FakeController() as controller, Client(controller.address, weight=np.float32(2)) as client:  # type: ignore[arg-type]
        [model] = client.load("toy", np.int64(1))  # type: ignore[arg-type]
        answer = client.infer(model, slo=np.float64(0.5), user_id=np.int32(7))  # type: ignore[arg-type]
        assert answer.ok
        for user_id in (-(2**62), 2**62 - 1):
            assert client.infer(model, user_id=user_id, timeout_s=5).ok
        users = [request.user_id for request in controller.of(InferRequest)]  # type: ignore[attr-defined]
        assert users == [7, -(2**62), 2**62 - 1]


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ({"weight": "1"}, "weight must be"),
        ({"weight": None}, "weight must be"),
        ({"weight": math.nan}, "weight must be"),
        ({"weight": 10**400}, "weight must be"),
        ({"name": None}, "name must be a text"),
        ({"name": 5}, "name must be a text"),
        ({"name": "\udcff"}, "UTF-8"),
    ],
)
def test_a_client_of_wrong_types_is_not_made(given: dict[str, Any], wrong: str) -> None:
    with pytest.raises(InvalidConfig, match=wrong):
        Client("127.0.0.1:1", **given)
    with pytest.raises(InvalidRequest, match="timeout_s must be"):
        Client("127.0.0.1:1", timeout_s="5")  # type: ignore[arg-type]


@pytest.mark.parametrize("address", [None, 12346, b"127.0.0.1:1", ("127.0.0.1", 1), ""])
def test_an_address_of_another_type_is_refused(address: Any) -> None:
    with pytest.raises((InvalidConfig, PeerUnreachable), match="host:port"):
        Client(address, timeout_s=0.1)


def test_the_cheap_form_checks_as_well() -> None:
    async def work() -> None:
        with FakeController() as controller:
            client: AsyncClient
            async with connect(controller.address) as client:
                [model] = await client.load("toy")
                fields: dict[str, Any]
                for fields in (
                    {"user_id": "bob"},
                    {"user_id": 2**70},
                    {"slo_ns": 1.5},
                    {"slo_ns": -1},
                    {"slo_ns": 2**62},
                    {"slo_factor": "2"},
                    {"slo_factor": math.inf},
                    {"slo_factor": -1},
                    {"slo_factor": math.nan},
                ):
                    with pytest.raises(InvalidRequest, match=next(iter(fields))):
                        client.submit(model, **fields, on_reply=_never)
                with pytest.raises((InvalidRequest, ConnectionLost)):
                    client.submit(None, on_reply=_never)  # type: ignore[arg-type]
                assert client.unanswered == 0

    asyncio.run(asyncio.wait_for(work(), 30))
