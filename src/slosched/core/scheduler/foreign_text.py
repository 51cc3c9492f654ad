"""Text from other processes, made safe where it enters: terminals, logs, pages and labels show it later.

A control character could move a terminal's cursor, begin a new line of a log, or hide what stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from slosched.codes import Code
from slosched.messages import (
    ErrorResult,
    Heartbeat,
    LoadModelResult,
    Offer,
    WorkerRefused,
    WorkerToController,
    WorkerWelcome,
)

_MOST = 4000


def printable(text: str, most: int = _MOST) -> str:
    """At most `most` characters of `text`, on one line: what cannot be shown is a space or "?"."""
    if text.isprintable() and len(text) <= most:
        return text
    kept = (c if c.isprintable() else " " if c.isspace() else "?" for c in text[:most])
    return "".join(kept)


def made_safe(message: WorkerToController) -> WorkerToController:
    """Return `message` with texts that can be shown anywhere."""
    mend = _MEND.get(type(message))
    return message if mend is None else mend(message)


def _welcome(message: WorkerWelcome) -> WorkerWelcome:
    return replace(
        message,
        version=printable(message.version),
        host=printable(message.host),
        device=printable(message.device),
        # A name that was changed would name no model.
        loadable=tuple(name for name in message.loadable if name.isprintable()),
        functions=tuple(name for name in message.functions if name.isprintable()),
        gpus=tuple(replace(gpu, name=printable(gpu.name)) for gpu in message.gpus),
        inventory=tuple(replace(each, result=_loaded(each.result)) for each in message.inventory),
    )


def _offer(message: Offer) -> Offer:
    return replace(message, loadable=tuple(name for name in message.loadable if name.isprintable()))


def _heartbeat(message: Heartbeat) -> Heartbeat:
    if message.gpus:
        stats = tuple(
            replace(
                each,
                name=printable(each.name),
                uuid=printable(each.uuid),
                driver=printable(each.driver),
            )
            for each in message.gpus
        )
        message = replace(message, gpus=stats)
    if not message.activity.isprintable():
        message = replace(message, activity=printable(message.activity))
    return message


def _reason(message: Any) -> Any:
    if message.reason.isprintable():
        return message
    return replace(message, reason=printable(message.reason))


def _error(message: ErrorResult) -> ErrorResult:
    if message.code != Code.CALL_RAISED:
        safe: ErrorResult = _reason(message)
        return safe
    # A traceback keeps its lines: it is raised again where the call was made.
    lines = [printable(line) for line in message.reason[:_MOST].expandtabs(4).split("\n")]
    return replace(message, reason="\n".join(lines))


def _loaded(message: LoadModelResult) -> LoadModelResult:
    labels = tuple(printable(label) for label in message.labels)
    if labels == message.labels and message.digest.isprintable():
        return message
    return replace(message, labels=labels, digest=printable(message.digest))


_MEND: dict[type, Callable[[Any], Any]] = {
    WorkerWelcome: _welcome,
    Offer: _offer,
    WorkerRefused: _reason,
    ErrorResult: _error,
    Heartbeat: _heartbeat,
    LoadModelResult: _loaded,
}
