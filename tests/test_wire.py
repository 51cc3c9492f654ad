"""The bytes on the wire: golden, and read back by another MessagePack implementation.

golden_wire.py holds one example of every message. A change of its bytes is a change of protocol: append
fields with defaults only, or raise PROTOCOL_VERSION.
"""

from __future__ import annotations

import json
from typing import Any, get_args

import msgpack
import msgspec
import pytest

from golden_wire import BEAT_WITH_STATS, EXAMPLES, GOLDEN, NAMED, REPLY_OF_A_CASCADE
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

DIRECTIONS: tuple[tuple[Any, Any], ...] = (
    (b.AtTheDoor, decode_from_client),
    (b.ForClients, decode_for_client),
    (b.ForWorkers, decode_for_worker),
    (b.FromWorkers, decode_from_worker),
)


def plain(value: Any) -> Any:
    """What another language sees: arrays, with the struct's name in front of a message."""
    if isinstance(value, msgspec.Struct):
        fields = [plain(getattr(value, f)) for f in value.__struct_fields__]
        return [type(value).__name__, *fields] if isinstance(value, m.Message) else fields
    if isinstance(value, tuple):
        return [plain(v) for v in value]
    return value


def test_there_is_an_example_of_every_message() -> None:
    known = {cls for union, _ in DIRECTIONS for cls in get_args(union)}
    assert {type(e) for e in EXAMPLES} == known


@pytest.mark.parametrize("name", NAMED)
def test_the_bytes_are_golden_and_msgpack_reads_them(name: str) -> None:
    golden: dict[str, str] = json.loads(GOLDEN.read_text())
    message = NAMED[name]
    data = encode(message)
    assert data.hex() == golden[name]
    assert msgpack.unpackb(data) == plain(message)


def test_the_golden_bytes_are_of_these_examples_and_no_others() -> None:
    assert json.loads(GOLDEN.read_text()).keys() == NAMED.keys()


def test_a_heartbeat_carries_what_a_card_answers_and_what_a_later_version_adds() -> None:
    more = plain(BEAT_WITH_STATS)
    more[1 + m.Heartbeat.__struct_fields__.index("gpus")] = [
        [0],
        [1, *plain(m.GpuStats())[1:], "something new"],
    ]
    newer = decode_from_worker(msgpack.packb(more))
    assert isinstance(newer, m.Heartbeat) and newer.gpus == (m.GpuStats(), m.GpuStats(gpu_id=1))


def test_a_stage_without_its_gpu_is_taken_and_so_is_one_with_what_a_later_version_adds() -> None:
    more = plain(REPLY_OF_A_CASCADE)
    light, heavy = REPLY_OF_A_CASCADE.stages
    assert (light.worker_id, light.gpu_id, heavy.worker_id, heavy.gpu_id) == (1, 0, -1, -1)
    more[-1] = [plain(light)[:9], [*plain(light), "something new"]]
    reply = decode_for_client(msgpack.packb(more))
    assert isinstance(reply, m.InferReply)
    assert reply.stages == (msgspec.structs.replace(light, worker_id=-1, gpu_id=-1), light)


@pytest.mark.parametrize("message", NAMED.values(), ids=NAMED)
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


def test_every_truncation_of_a_message_is_malformed_or_leaves_defaults() -> None:
    """A shorter *array* leaves fields to their defaults; cut bytes are malformed."""
    data = encode(NAMED["InferRequest"])
    for cut in range(len(data)):
        with pytest.raises(MalformedMessage):
            decode_from_client(data[:cut])
    short = msgpack.packb(["InferRequest", 9, 3])
    assert decode_from_client(short) == m.InferRequest(request_id=9, model_id=3)
    short = msgpack.packb(["ClientHello", m.PROTOCOL_VERSION, 5, "without a weight"])
    assert decode_from_client(short) == m.ClientHello(
        m.PROTOCOL_VERSION, 5, "without a weight", 1.0
    )


@pytest.mark.parametrize("name", NAMED)
def test_each_field_without_a_default_is_required(name: str) -> None:
    """A message without its last required field is malformed; without optional ones it is taken."""
    message = NAMED[name]
    _, decode = next(each for each in DIRECTIONS if type(message) in get_args(each[0]))
    optional = len(type(message).__struct_defaults__)
    parts = plain(message)
    required = parts[: len(parts) - optional]
    assert type(decode(msgpack.packb(required))) is type(message)
    if len(required) > 1:
        with pytest.raises(MalformedMessage):
            decode(msgpack.packb(required[:-1]))


def test_a_bundle_holds_what_has_no_frames_and_nothing_else() -> None:
    """One message that is wrong makes the whole bundle wrong: it is one message."""
    for bundle, inside in (
        ("RequestBundle", ["Goodbye"]),
        ("RequestBundle", ["RequestBundle", []]),
        ("ReplyBundle", plain(NAMED["Welcome"])),
        ("ActionBundle", plain(NAMED["ControllerHello"])),
        ("ResultBundle", plain(NAMED["Heartbeat"])),
    ):
        for _, decode in DIRECTIONS:
            with pytest.raises(MalformedMessage):
                decode(msgpack.packb([bundle, [inside]]))


def test_a_bundle_that_is_too_long_is_malformed() -> None:
    request = ["InferRequest", 9, 3]
    longest = decode_from_client(msgpack.packb(["RequestBundle", [request] * b.MAX_BUNDLED, 1]))
    assert isinstance(longest, b.RequestBundle) and len(longest.requests) == b.MAX_BUNDLED
    with pytest.raises(MalformedMessage):
        decode_from_client(msgpack.packb(["RequestBundle", [request] * (b.MAX_BUNDLED + 1), 1]))


def test_a_newer_peer_may_append_fields() -> None:
    newer = msgpack.packb(["CancelRequest", 9, "something new"])
    assert decode_from_client(newer) == m.CancelRequest(9)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("InferRequest", "request_id", 2**63),
        ("InferRequest", "slo_ns", 2**62 + 1),
        ("InferRequest", "shape", [1] * 17),
        ("LoadModelRequest", "name", "n" * 257),
        ("LoadModelRequest", "copies", 2**64 - 1),
        ("HeartbeatAck", "heartbeat_sent_ns", 2**64 - 1),
        ("HeartbeatAck", "received_ns", 2**64 - 1),
        ("LoadModel", "name", "n" * 257),
        ("Infer", "latest_ns", 2**63 - 1),
        ("ErrorResult", "reason", "x" * 8001),
        ("Heartbeat", "sent_ns", 2**63 - 1),
        ("WorkerRefused", "reason", "x" * 8001),
    ],
)
def test_a_number_or_text_out_of_bounds_is_refused_where_it_enters(
    name: str, field: str, value: Any
) -> None:
    message = NAMED[name]
    _, decode = next(each for each in DIRECTIONS if type(message) in get_args(each[0]))
    parts = plain(message)
    assert decode(msgspec.msgpack.encode(parts)) == message
    parts[1 + type(message).__struct_fields__.index(field)] = value
    with pytest.raises(MalformedMessage, match="Expected"):
        decode(msgspec.msgpack.encode(parts))


@pytest.mark.parametrize("decode", [decode_from_client, decode_for_worker, decode_from_worker])
def test_a_struct_has_a_bound_before_it_is_decoded(decode: Any) -> None:
    large = msgspec.msgpack.encode(["InferRequest", 1, 1, 0, 0.0, 0, 0, [1] * 600_000])
    with pytest.raises(MalformedMessage, match="before its tensors"):
        decode(large)
