"""The bytes on the wire: golden, and read back by another MessagePack implementation.

`golden/wire.json` holds one example of every message, as hex. A change here is a change of protocol:
append fields with defaults only, or raise PROTOCOL_VERSION.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import msgpack
import msgspec
import pytest

from slosched import messages as m
from slosched.errors import MalformedMessage
from slosched.transport import bundles as b
from slosched.transport.codec import (
    decode_for_client,
    decode_for_worker,
    decode_from_client,
    decode_from_worker,
    encode,
)

GOLDEN = Path(__file__).parent / "golden" / "wire.json"

_INFO = m.ModelInfo(
    3,
    "resnet50",
    1,
    (1, 2),
    2_600_000,
    8_330_000,
    102_160_300,
    (3, 2, 2),
    "float32",
    (5,),
    "float32",
)
_SPAN = m.Span(10**18, 10**18 + 5, 5)
_GPU = m.GpuInfo(0, "v100", 1376, 16_777_216, (3, 4))

EXAMPLES: tuple[m.Message, ...] = (
    m.ClientHello(1, 2**60, "bench", 0.5, bundles=True),
    m.ClientHeartbeat(10**18),
    m.Goodbye(),
    m.LoadModelRequest(7, "resnet50_v2", 12),
    m.ListModelsRequest(8),
    m.InferRequest(9, 3, 2.25, 0, 4, (3, 2, 2), "float32", 10**18),
    m.CancelRequest(9),
    m.StatusRequest(10),
    m.Welcome(1, "0.1.0", 2**60, "INFER5", 100_000_000, bundles=True),
    m.Refused(-1, 6, "say hello first"),
    m.LoadModelReply(7, 0, "", (_INFO,)),
    m.ListModelsReply(8, (_INFO,), ("resnet50",)),
    m.InferReply(
        9,
        0,
        "",
        3,
        5_850_000,
        3_400_000,
        True,
        2,
        0,
        1,
        False,
        500_000,
        2_600_000,
        480_000,
        2_600_100,
        1,
    ),
    m.StatusReply(10, {"ready": True, "workers": []}),
    m.ControllerHello(1, 2**60, "c", bundles=True),
    m.HeartbeatAck(1, 2, 3),
    m.WorkerGoodbye(5),
    m.LoadModel(5, 1, "resnet50", 0, 12, 16, 25_000_000, 0, 10**18),
    m.UnloadModel(5, 2, 0),
    m.LoadWeights(5, 3, 0, 1, 0, 10**18, 8_330_000),
    m.EvictWeights(5, 4, 0, 1, 0, 10**18),
    m.Infer(5, 6, 0, 1, 0, 10**18, 5_600_000, 4, 3, (48, 0, 48)),
    m.ClearCache(5, 7),
    m.GetWorkerState(5, 8),
    m.WorkerWelcome(1, 5, "0.1.0", "host", 77, "emulated", (_GPU,), ("resnet50",), bundles=True),
    m.WorkerRefused(5, "it serves another controller"),
    m.Heartbeat(5, 10**18, -300, 40_000, "preparing resnet50", 2, 1, 0, 1),
    m.ErrorResult(5, 6, 2, 81, "too late", 1, 2),
    m.LoadModelResult(
        5, 1, _SPAN, 12, (1, 2), (2, 3), 8, 9, 7, (3, 2, 2), "float32", (5,), "float32", True, 1, 2
    ),
    m.UnloadModelResult(5, 2, 1, 2),
    m.LoadWeightsResult(5, 3, _SPAN, 1, 2),
    m.EvictWeightsResult(5, 4, _SPAN, 1, 2),
    m.InferResult(5, 6, m.NO_SPAN, _SPAN, m.NO_SPAN, 1, 1380, 1380, 1, 2, (20, 20)),
    m.ClearCacheResult(5, 7, 1, 2),
    m.WorkerStateResult(5, 8, (_GPU,), ((0, "resnet50"),), 1, 2),
    b.RequestBundle((m.InferRequest(9, 3), m.InferRequest(10, 3, 1.5)), 10**18),
    b.ReplyBundle(
        (m.InferReply(9, 8, "no plan", 3, 5, 1, False), m.InferReply(10, 0, "", 3, 5, 4, True))
    ),
    b.NotTaken((9, 10), 103, "too many"),
    b.ActionBundle(
        (m.Infer(5, 6, 0, 1, 0, 10**18, 5_600_000, 4, 3), m.EvictWeights(5, 4, 0, 1, 0, 9))
    ),
    b.ResultBundle(
        (m.InferResult(5, 6, _SPAN, _SPAN, _SPAN, 1, 0, 0, 1, 2), m.ErrorResult(5, 7, 2, 81, ""))
    ),
)
#: The same with what was appended later and is left out where it is empty.
_STATS = m.GpuStats(
    1, "NVIDIA H200", "GPU-1", "580.1", 98, 40, 2**36, 2**37, 689_000, 10**12, 61, 1980, 3201, 4
)
_BEAT_WITH_STATS = m.Heartbeat(5, 10**18, -300, 40_000, "", 0, 0, 0, 0, (_STATS,))

_WELCOME_WITHOUT_BAD = m.WorkerWelcome(
    1, 5, "0.1.0", "host", 77, "cuda:0", (_GPU,), ("resnet50",), True, (("bad", "it crashed"),)
)

DIRECTIONS: tuple[tuple[Any, Any], ...] = (
    (b.FromClients, decode_from_client),
    (b.ForClients, decode_for_client),
    (b.ForWorkers, decode_for_worker),
    (b.FromWorkers, decode_from_worker),
)


def plain(value: Any) -> Any:
    """What another language sees: arrays, with the struct's name in front of a message."""
    if isinstance(value, msgspec.Struct):
        fields = [plain(getattr(value, f)) for f in value.__struct_fields__]
        if isinstance(value, m.Heartbeat) and not value.gpus:
            fields.pop()  # as before there were statistics of GPUs
        if isinstance(value, m.WorkerWelcome) and not value.put_aside:
            fields.pop()  # as before models were put aside
        return [type(value).__name__, *fields] if isinstance(value, m.Message) else fields
    if isinstance(value, tuple):
        return [plain(v) for v in value]
    return value


def test_there_is_an_example_of_every_message() -> None:
    known = {cls for union, _ in DIRECTIONS for cls in get_args(union)}
    assert {type(e) for e in EXAMPLES} == known


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda e: type(e).__name__)
def test_the_bytes_are_golden_and_msgpack_reads_them(message: m.Message) -> None:
    golden: dict[str, str] = json.loads(GOLDEN.read_text())
    data = encode(message)
    assert data.hex() == golden[type(message).__name__]
    assert msgpack.unpackb(data) == plain(message)


def test_a_heartbeat_grows_by_its_statistics_alone() -> None:
    golden: dict[str, str] = json.loads(GOLDEN.read_text())
    data = encode(_BEAT_WITH_STATS)
    assert data.hex() == golden["Heartbeat with gpus"]
    assert msgpack.unpackb(data) == plain(_BEAT_WITH_STATS)
    assert decode_from_worker(data) == _BEAT_WITH_STATS
    older = msgpack.packb(["Heartbeat", 5, 1, 2, 3])
    assert decode_from_worker(older) == m.Heartbeat(5, 1, 2, 3)
    # A card that answers nothing, and a later version that says more of it.
    more = plain(_BEAT_WITH_STATS)
    more[-1] = [[0], [1, *plain(m.GpuStats())[1:], "something new"]]
    newer = decode_from_worker(msgpack.packb(more))
    assert isinstance(newer, m.Heartbeat) and newer.gpus == (m.GpuStats(), m.GpuStats(1))


def test_a_welcome_grows_by_what_was_put_aside_alone() -> None:
    golden: dict[str, str] = json.loads(GOLDEN.read_text())
    data = encode(_WELCOME_WITHOUT_BAD)
    assert data.hex() == golden["WorkerWelcome with put_aside"]
    assert msgpack.unpackb(data) == plain(_WELCOME_WITHOUT_BAD)
    assert decode_from_worker(data) == _WELCOME_WITHOUT_BAD


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda e: type(e).__name__)
def test_each_direction_takes_its_own_messages_and_no_others(message: m.Message) -> None:
    for union, decode in DIRECTIONS:
        if type(message) in get_args(union):
            assert decode(encode(message)) == message
        else:
            with pytest.raises(MalformedMessage):
                decode(encode(message))


@pytest.mark.parametrize(
    "data", [b"", b"\x00", b"\xc1", b"not a message", b"\x91\xa5Infer", b"\x94" * 50]
)
def test_garbage_is_malformed_and_nothing_else(data: bytes) -> None:
    for _, decode in DIRECTIONS:
        with pytest.raises(MalformedMessage):
            decode(data)


def test_every_truncation_of_a_message_is_malformed_or_an_older_form() -> None:
    """A shorter *array* is an older peer's message (defaults fill in); a cut one is malformed."""
    data = encode(EXAMPLES[5])
    for cut in range(len(data)):
        with pytest.raises(MalformedMessage):
            decode_from_client(data[:cut])
    older = msgpack.packb(["InferRequest", 9, 3])
    assert decode_from_client(older) == m.InferRequest(9, 3)
    older = msgpack.packb(["ClientHello", 1, 5, "before weights"])
    assert decode_from_client(older) == m.ClientHello(1, 5, "before weights", 1.0)
    older = msgpack.packb(["ClientHello", 1, 5, "before bundles", 0.5])
    assert decode_from_client(older) == m.ClientHello(1, 5, "before bundles", 0.5, bundles=False)
    older = msgpack.packb(["Welcome", 1, "0.1.0", 5, "INFER5", 7])
    assert decode_for_client(older) == m.Welcome(1, "0.1.0", 5, "INFER5", 7, bundles=False)
    older = msgpack.packb(["ControllerHello", 1, 5, "c"])
    assert decode_for_worker(older) == m.ControllerHello(1, 5, "c", bundles=False)
    older = msgpack.packb(["WorkerWelcome", 1, 5, "0.1.0", "host", 7, "v100", [], ["resnet50"]])
    assert decode_from_worker(older) == m.WorkerWelcome(
        1, 5, "0.1.0", "host", 7, "v100", (), ("resnet50",), bundles=False
    )


def test_a_bundle_holds_what_has_no_frames_and_nothing_else() -> None:
    """One message that is wrong makes the whole bundle wrong: it is one message."""
    for bundle, inside in (
        ("RequestBundle", ["Goodbye"]),
        ("RequestBundle", ["RequestBundle", []]),
        ("ReplyBundle", ["Welcome", 1, "0.1.0", 5, "INFER5"]),
        ("ActionBundle", ["ControllerHello", 1, 5]),
        ("ResultBundle", ["Heartbeat", 5, 1, 2, 3]),
    ):
        for _, decode in DIRECTIONS:
            with pytest.raises(MalformedMessage):
                decode(msgpack.packb([bundle, [inside]]))


def test_a_bundle_that_is_too_long_is_malformed() -> None:
    request = ["InferRequest", 9, 3]
    older = decode_from_client(msgpack.packb(["RequestBundle", [request]]))
    assert older == b.RequestBundle((m.InferRequest(9, 3),))
    most = decode_from_client(msgpack.packb(["RequestBundle", [request] * b.MAX_BUNDLED]))
    assert isinstance(most, b.RequestBundle) and len(most.requests) == b.MAX_BUNDLED
    with pytest.raises(MalformedMessage):
        decode_from_client(msgpack.packb(["RequestBundle", [request] * (b.MAX_BUNDLED + 1)]))


def test_a_newer_peer_may_append_fields() -> None:
    newer = msgpack.packb(["CancelRequest", 9, "something new"])
    assert decode_from_client(newer) == m.CancelRequest(9)


@pytest.mark.parametrize(
    ("decode", "parts"),
    [
        (decode_from_client, ["InferRequest", 2**63, 1]),
        (decode_from_client, ["InferRequest", 1, 1, 0.0, 2**62 + 1]),
        (decode_from_client, ["InferRequest", 1, 1, 0.0, 0, 0, [1] * 17, "float32"]),
        (decode_from_client, ["LoadModelRequest", 1, "n" * 257, 1]),
        (decode_from_client, ["LoadModelRequest", 1, "n", 2**64 - 1]),
        (decode_for_worker, ["HeartbeatAck", 2**64 - 1, 2**64 - 1, 2**64 - 1]),
        (decode_for_worker, ["LoadModel", 1, 1, "n" * 257, 0, 1, 1, 1, 0, 0]),
        (decode_for_worker, ["Infer", 1, 1, 0, 0, 0, 2**63 - 1, 0, 1, 1, []]),
        (decode_from_worker, ["ErrorResult", 1, 1, 2, 2, "x" * 8001]),
        (decode_from_worker, ["Heartbeat", 1, 2**63 - 1, 0, 0]),
        (decode_from_worker, ["WorkerRefused", 1, "x" * 8001]),
    ],
)
def test_numbers_and_lengths_that_nobody_means_are_refused_where_they_enter(
    decode: Any, parts: list[Any]
) -> None:
    with pytest.raises(MalformedMessage, match="Expected"):
        decode(msgspec.msgpack.encode(parts))


@pytest.mark.parametrize("decode", [decode_from_client, decode_for_worker, decode_from_worker])
def test_a_struct_has_a_bound_before_it_is_decoded(decode: Any) -> None:
    large = msgspec.msgpack.encode(["InferRequest", 1, 1, 0.0, 0, 0, [1] * 600_000])
    with pytest.raises(MalformedMessage, match="before its tensors"):
        decode(large)
