"""The protocol's messages, made of oip.binpb, which tests/test_gateway_rpc_proto.py makes of oip.proto.

They live in a descriptor pool of their own: in the default one a second copy of the protocol (tritonclient's,
KServe's) would be a conflict.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE = "inference"
SERVICE: Final = f"{PACKAGE}.GRPCInferenceService"
DESCRIPTORS = Path(__file__).with_name("oip.binpb")


def _pool() -> Any:
    files = descriptor_pb2.FileDescriptorSet.FromString(DESCRIPTORS.read_bytes())
    pool = descriptor_pool.DescriptorPool()
    for each in files.file:
        pool.AddSerializedFile(each.SerializeToString())
    return pool


_POOL = _pool()


def message(name: str) -> Any:
    """The class of the protocol's message of that name. Raises KeyError."""
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"{PACKAGE}.{name}"))


def methods() -> tuple[str, ...]:
    """The names of the service's methods."""
    return tuple(each.name for each in _POOL.FindServiceByName(SERVICE).methods)


InferRequest = message("ModelInferRequest")
InferResponse = message("ModelInferResponse")
StreamResponse = message("ModelStreamInferResponse")
