"""slosched: a deadline scheduler for GPU inference.

    import slosched

    async with slosched.connect("127.0.0.1:12346") as client:      # or: with slosched.Client() ...
        [model] = await client.load("resnet50_v2")
        answer = await client.infer(model, array, slo="25ms")

`@slosched.function` makes a Python function one that workers run and clients call (docs/functions.md).
`Controller` and `Worker` run the daemons within a program of your own. Names are imported when they
are first used, so that `import slosched` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from slosched.version import __version__

if TYPE_CHECKING:
    from slosched import errors as errors
    from slosched.clients.aio import AsyncClient, connect
    from slosched.clients.blocking import Client
    from slosched.clients.inference import Inference, Model, Unloaded
    from slosched.config import ControllerConfig, SchedulerConfig, WorkerConfig
    from slosched.daemon.controller import ControllerServer as Controller
    from slosched.daemon.worker import WorkerServer as Worker
    from slosched.errors import (
        ConnectionLost,
        DeadlineExceeded,
        InvalidRequest,
        PeerUnreachable,
        RequestFailed,
        SloschedError,
    )
    from slosched.functions.context import ChildRef, Context, gather
    from slosched.functions.errors import CallFailed
    from slosched.functions.function import Function, function

#: Public name -> (module, name there; "" is the module itself)
_PUBLIC = {
    "AsyncClient": ("slosched.clients.aio", "AsyncClient"),
    "CallFailed": ("slosched.functions.errors", "CallFailed"),
    "ChildRef": ("slosched.functions.context", "ChildRef"),
    "Client": ("slosched.clients.blocking", "Client"),
    "ConnectionLost": ("slosched.errors", "ConnectionLost"),
    "Context": ("slosched.functions.context", "Context"),
    "Controller": ("slosched.daemon.controller", "ControllerServer"),
    "ControllerConfig": ("slosched.config", "ControllerConfig"),
    "DeadlineExceeded": ("slosched.errors", "DeadlineExceeded"),
    "Function": ("slosched.functions.function", "Function"),
    "Inference": ("slosched.clients.inference", "Inference"),
    "InvalidRequest": ("slosched.errors", "InvalidRequest"),
    "Model": ("slosched.clients.inference", "Model"),
    "PeerUnreachable": ("slosched.errors", "PeerUnreachable"),
    "RequestFailed": ("slosched.errors", "RequestFailed"),
    "SchedulerConfig": ("slosched.config", "SchedulerConfig"),
    "SloschedError": ("slosched.errors", "SloschedError"),
    "Unloaded": ("slosched.clients.inference", "Unloaded"),
    "Worker": ("slosched.daemon.worker", "WorkerServer"),
    "WorkerConfig": ("slosched.config", "WorkerConfig"),
    "connect": ("slosched.clients.aio", "connect"),
    "errors": ("slosched.errors", ""),
    "function": ("slosched.functions.function", "function"),
    "gather": ("slosched.functions.context", "gather"),
}

__all__ = [
    "AsyncClient",
    "CallFailed",
    "ChildRef",
    "Client",
    "ConnectionLost",
    "Context",
    "Controller",
    "ControllerConfig",
    "DeadlineExceeded",
    "Function",
    "Inference",
    "InvalidRequest",
    "Model",
    "PeerUnreachable",
    "RequestFailed",
    "SchedulerConfig",
    "SloschedError",
    "Unloaded",
    "Worker",
    "WorkerConfig",
    "__version__",
    "connect",
    "errors",
    "function",
    "gather",
]


def __getattr__(name: str) -> Any:
    try:
        module_name, attribute = _PUBLIC[name]
    except KeyError:
        raise AttributeError(f"module 'slosched' has no attribute {name!r}") from None
    module = import_module(module_name)
    value = getattr(module, attribute) if attribute else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
