"""How an RPC fails: its status, its text, and what else is known as trailing metadata."""

from __future__ import annotations

import math

import grpc

from slosched.fronts.errors import FrontError, Status

#: A longer text is cut: it travels as a header, and clients take 8 kB of headers.
_LONGEST_TEXT = 1024
_CODES = {code.value[0]: code for code in grpc.StatusCode}


def code_of(status: Status) -> grpc.StatusCode:
    found: grpc.StatusCode = _CODES[status.rpc]
    return found


def shown(text: str) -> str:
    """A text that fits into the status of an RPC."""
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}..."


def trailing(error: FrontError) -> tuple[tuple[str, str], ...]:
    """A refusal's numbers, when to try again, how to ask: what HTTP has in headers of the same names."""
    found: list[tuple[str, str]] = []
    if error.refusal is not None:
        found += ((name, str(value)) for name, value in error.refusal.fields().items())
    if error.retry_after_s > 0:
        found.append(("retry-after", str(math.ceil(error.retry_after_s))))
    if error.status is Status.UNAUTHENTICATED:
        found.append(("www-authenticate", 'Bearer realm="slosched"'))
    return tuple(found)


async def fail(context: grpc.aio.ServicerContext, error: FrontError) -> None:
    """End an RPC with an error; raises grpc's AbortError."""
    await context.abort(code_of(error.status), shown(error.text), trailing(error))


def internal(error: Exception) -> FrontError:
    """The error that stands for a bug."""
    return FrontError(Status.INTERNAL, f"internal error: {type(error).__name__}: {error}")
