"""The messages of oip.proto are the published protocol's, and oip.binpb is what protoc makes of them.

python tests/test_gateway_rpc_proto.py    # writes oip.binpb anew
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2

from slosched.fronts.rpc import messages

_PROTO = messages.DESCRIPTORS.with_suffix(".proto")
#: Fields of the published ModelConfig, and of what it consists of, that a gateway has nothing to say in.
_LEFT_OUT = {
    "ModelConfig": {
        "batch_input",
        "batch_output",
        "ensemble_scheduling",
        "model_metrics",
        "model_operations",
        "model_repository_agents",
        "model_warmup",
        "optimization",
        "response_cache",
        "sequence_batching",
    },
    "ModelDynamicBatching": {
        "default_priority_level",
        "default_queue_policy",
        "priority_levels",
        "priority_queue_policy",
    },
    "ModelInstanceGroup": {
        "host_policy",
        "passive",
        "profile",
        "rate_limiter",
        "secondary_devices",
    },
}
#: tritonclient's own messages; in a process of its own, where their registration disturbs no test.
_THEIRS = """
import sys
from google.protobuf import descriptor_pb2
from tritonclient.grpc import model_config_pb2, service_pb2
files = descriptor_pb2.FileDescriptorSet()
for each in (model_config_pb2, service_pb2):
    each.DESCRIPTOR.CopyToProto(files.file.add())
sys.stdout.buffer.write(files.SerializeToString())
"""


def made(folder: Path) -> bytes:
    """What protoc makes of oip.proto."""
    out = folder / "made.binpb"
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{_PROTO.parent}"]
    subprocess.run([*command, f"--descriptor_set_out={out}", str(_PROTO)], check=True, timeout=60)
    return out.read_bytes()


def shapes(files: Any) -> tuple[dict[str, dict[str, tuple[Any, ...]]], dict[str, Any]]:
    """Each message's fields and each enum's values; and each method with its types."""
    found: dict[str, dict[str, tuple[Any, ...]]] = {}

    def look(name: str, message: Any) -> None:
        oneofs = [each.name for each in message.oneof_decl]
        found[name] = {
            field.name: (
                field.number,
                field.type,
                field.label,
                field.type_name,
                oneofs[field.oneof_index] if field.HasField("oneof_index") else "",
            )
            for field in message.field
        }
        found[name] |= {"map": (1,)} if message.options.map_entry else {}
        for each in message.nested_type:
            look(f"{name}.{each.name}", each)
        for each in message.enum_type:
            found[f"{name}.{each.name}"] = {value.name: (value.number,) for value in each.value}

    methods: dict[str, Any] = {}
    for file in files.file:
        for message in file.message_type:
            look(message.name, message)
        for enum in file.enum_type:
            found[enum.name] = {value.name: (value.number,) for value in enum.value}
        for service in file.service:
            for each in service.method:
                streams = (each.client_streaming, each.server_streaming)
                methods[f"{service.name}/{each.name}"] = (
                    each.input_type,
                    each.output_type,
                    streams,
                )
    return found, methods


def ours() -> Any:
    return descriptor_pb2.FileDescriptorSet.FromString(messages.DESCRIPTORS.read_bytes())


@pytest.mark.processes
def test_the_descriptors_are_those_of_the_proto(tmp_path: Path) -> None:
    assert made(tmp_path) == messages.DESCRIPTORS.read_bytes()


@pytest.mark.processes
def test_every_message_field_number_and_type_is_tritons() -> None:
    run = subprocess.run(
        [sys.executable, "-c", _THEIRS], check=True, stdout=subprocess.PIPE, timeout=60
    )
    theirs, their_methods = shapes(descriptor_pb2.FileDescriptorSet.FromString(run.stdout))
    mine, my_methods = shapes(ours())
    assert my_methods == their_methods
    for name, fields in mine.items():
        wanted = theirs[name]
        left_out = set(wanted) - set(fields)
        assert left_out == _LEFT_OUT.get(name, set()), name
        assert fields == {key: wanted[key] for key in fields}, name
    served = {each[place].rpartition(".")[2] for each in my_methods.values() for place in (0, 1)}
    assert served <= set(mine) and len(mine) > 60


def test_they_are_in_a_pool_of_their_own() -> None:
    from google.protobuf import descriptor_pool

    assert messages.InferRequest.DESCRIPTOR.file.pool is not descriptor_pool.Default()
    assert len(messages.methods()) == 20 and "ModelStreamInfer" in messages.methods()
    with pytest.raises(KeyError):
        messages.message("Nothing")


def test_every_method_has_a_handler() -> None:
    from slosched.fronts.rpc.documents import METHODS

    assert {*METHODS, "ModelInfer", "ModelStreamInfer"} == set(messages.methods())


def test_the_notice_of_the_proto_is_kept() -> None:
    text = _PROTO.read_text()
    assert "NVIDIA CORPORATION & AFFILIATES. All rights reserved." in text
    assert "THIS SOFTWARE IS PROVIDED BY THE COPYRIGHT HOLDERS" in text


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        messages.DESCRIPTORS.write_bytes(made(Path(folder)))
