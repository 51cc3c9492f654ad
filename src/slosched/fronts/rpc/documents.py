"""The methods whose answers are documents: health, metadata, statistics, the repository, shared memory.

The service gives the protocol's JSON, and protobuf's own mapping of JSON makes the message.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import DecodeError

from slosched.fronts.errors import FrontError, Status
from slosched.fronts.rpc.calls import Call, Method
from slosched.fronts.rpc.messages import message

#: Bytes of a request other than an inference.
_MOST_BYTES = 1024**2


async def _request(call: Call, name: str) -> Any:
    """The RPC's request, a message of that name."""
    data = await call.request()
    if len(data) > _MOST_BYTES:
        raise FrontError(
            Status.TOO_LARGE,
            f"the request has {len(data):,} bytes, and at most {_MOST_BYTES:,} are allowed",
        )
    try:
        return message(name).FromString(data)
    except DecodeError:
        raise FrontError(Status.INVALID_ARGUMENT, f"the message is not a {name}") from None


def _answer(name: str, document: Mapping[str, Any]) -> bytes:
    """The message of that name with the fields of a document that it has."""
    made: bytes = json_format.ParseDict(
        document, message(name)(), ignore_unknown_fields=True
    ).SerializeToString()
    return made


# ------------------------------------------------------------------------------------------ health


async def _server_live(call: Call) -> bytes:
    await _request(call, "ServerLiveRequest")
    return _answer("ServerLiveResponse", {"live": call.service.live()})


async def _server_ready(call: Call) -> bytes:
    await _request(call, "ServerReadyRequest")
    return _answer("ServerReadyResponse", {"ready": call.service.ready()})


async def _model_ready(call: Call) -> bytes:
    caller = call.caller()
    asked = await _request(call, "ModelReadyRequest")
    ready = await call.service.model_ready(asked.name, asked.version, caller)
    return _answer("ModelReadyResponse", {"ready": ready})


# ---------------------------------------------------------------------------------------- metadata


async def _server_metadata(call: Call) -> bytes:
    call.caller()
    await _request(call, "ServerMetadataRequest")
    return _answer("ServerMetadataResponse", call.service.server_metadata())


async def _model_metadata(call: Call) -> bytes:
    caller = call.caller()
    asked = await _request(call, "ModelMetadataRequest")
    found = await call.service.model_metadata(asked.name, asked.version, caller)
    return _answer("ModelMetadataResponse", found)


async def _model_config(call: Call) -> bytes:
    caller = call.caller()
    asked = await _request(call, "ModelConfigRequest")
    found = await call.service.model_config(asked.name, asked.version, caller)
    return _answer("ModelConfigResponse", {"config": found})


async def _model_statistics(call: Call) -> bytes:
    caller = call.caller()
    asked = await _request(call, "ModelStatisticsRequest")
    found = await call.service.statistics(asked.name, asked.version, caller)
    return _answer("ModelStatisticsResponse", found)


# -------------------------------------------------------------------------------------- repository


def _check_repository(name: str) -> None:
    if name:
        raise FrontError(Status.UNIMPLEMENTED, "'repository_name' specification is not supported")


def _parameters(found: Any) -> dict[str, Any]:
    """The values of a map of parameters; None for one without a value."""
    values: dict[str, Any] = {}
    for name, each in found.items():
        kind = each.WhichOneof("parameter_choice")
        values[name] = getattr(each, kind) if kind else None
    return values


async def _repository_index(call: Call) -> bytes:
    caller = call.caller()
    asked = await _request(call, "RepositoryIndexRequest")
    _check_repository(asked.repository_name)
    models = await call.service.index(caller, ready=asked.ready)
    return _answer("RepositoryIndexResponse", {"models": list(models)})


async def _load(call: Call) -> bytes:
    caller = call.caller()
    asked = await _request(call, "RepositoryModelLoadRequest")
    _check_repository(asked.repository_name)
    await call.service.load(asked.model_name, _parameters(asked.parameters), caller)
    return b""


async def _unload(call: Call) -> bytes:
    caller = call.caller()
    asked = await _request(call, "RepositoryModelUnloadRequest")
    _check_repository(asked.repository_name)
    await call.service.unload(asked.model_name, _parameters(asked.parameters), caller)
    return b""


# ----------------------------------------------------------------------------------- shared memory


async def _system_status(call: Call) -> bytes:
    caller = call.caller()
    asked = await _request(call, "SystemSharedMemoryStatusRequest")
    found = call.regions(caller).status(asked.name)
    return _answer(
        "SystemSharedMemoryStatusResponse", {"regions": {each["name"]: each for each in found}}
    )


async def _system_register(call: Call) -> bytes:
    caller = call.caller()
    asked = await _request(call, "SystemSharedMemoryRegisterRequest")
    call.regions(caller).register(asked.name, asked.key, asked.offset, asked.byte_size)
    return b""


async def _system_unregister(call: Call) -> bytes:
    caller = call.caller()
    asked = await _request(call, "SystemSharedMemoryUnregisterRequest")
    if call.is_local():  # another host's client has none, and perf_analyzer calls this always
        caller.regions.unregister(asked.name)
    return b""


async def _cuda_status(call: Call) -> bytes:
    call.caller()
    asked = await _request(call, "CudaSharedMemoryStatusRequest")
    if asked.name:
        raise FrontError(
            Status.NOT_FOUND, f"Unable to find cuda shared memory region: '{asked.name[:200]}'"
        )
    return b""


async def _cuda_register(call: Call) -> bytes:
    call.caller()
    asked = await _request(call, "CudaSharedMemoryRegisterRequest")
    raise FrontError(
        Status.UNIMPLEMENTED,
        f"failed to register CUDA shared memory region: '{asked.name}', GPUs not supported",
    )


async def _cuda_unregister(call: Call) -> bytes:
    """Nothing is registered, so it succeeds: perf_analyzer always calls it."""
    call.caller()
    await _request(call, "CudaSharedMemoryUnregisterRequest")
    return b""


# --------------------------- settings, as of a Triton that was built without tracing and logging


async def _trace_setting(call: Call) -> bytes:
    call.caller()
    raise FrontError(Status.UNAVAILABLE, "the server does not support tracing")


async def _log_settings(call: Call) -> bytes:
    call.caller()
    raise FrontError(Status.UNAVAILABLE, "the server does not support dynamic logging")


#: By the name of the RPC.
METHODS: Mapping[str, Method] = {
    "ServerLive": _server_live,
    "ServerReady": _server_ready,
    "ModelReady": _model_ready,
    "ServerMetadata": _server_metadata,
    "ModelMetadata": _model_metadata,
    "ModelConfig": _model_config,
    "ModelStatistics": _model_statistics,
    "RepositoryIndex": _repository_index,
    "RepositoryModelLoad": _load,
    "RepositoryModelUnload": _unload,
    "SystemSharedMemoryStatus": _system_status,
    "SystemSharedMemoryRegister": _system_register,
    "SystemSharedMemoryUnregister": _system_unregister,
    "CudaSharedMemoryStatus": _cuda_status,
    "CudaSharedMemoryRegister": _cuda_register,
    "CudaSharedMemoryUnregister": _cuda_unregister,
    "TraceSetting": _trace_setting,
    "LogSettings": _log_settings,
}
