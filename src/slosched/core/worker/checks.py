"""What is wrong with an action, seen on arrival: a code and words, or nothing.

Times are not judged here but when the action would start (Clockwork §2.4), except for a window that
is none.
"""

from __future__ import annotations

from collections.abc import Sequence

from slosched.codes import Code
from slosched.core.worker.state import Instance
from slosched.errors import known_names, shown_name
from slosched.messages import Infer, LoadModel

#: More copies than any controller makes; a bound on what one message can ask for.
MAX_COPIES = 100_000

Fault = tuple[Code, str]


def window_fault(earliest_ns: int, latest_ns: int) -> Fault | None:
    if earliest_ns > latest_ns:
        return (
            Code.INVALID_ACTION,
            f"earliest {earliest_ns} lies {earliest_ns - latest_ns} ns after latest {latest_ns}",
        )
    return None


def load_model_fault(
    message: LoadModel,
    name: str,
    loadable: tuple[str, ...],
    instances: dict[int, Instance],
    put_aside: Sequence[tuple[str, str]] = (),
) -> Fault | None:
    """`name` is the canonical form of the message's; `put_aside` has (name, reason)."""
    for other, reason in put_aside:
        if other == name:
            return Code.PROCESS_ENDED, f"put aside: {reason}"
    if name not in loadable:
        known = known_names(name, loadable)
        return (
            Code.UNKNOWN_MODEL,
            f"this worker has no model {shown_name(message.name)}; it has: {known}",
        )
    if not 1 <= message.copies <= MAX_COPIES:
        return Code.INVALID_ACTION, f"copies must be within 1..{MAX_COPIES}, not {message.copies}"
    if message.max_batch < 1 or message.model_id < 0:
        return (
            Code.INVALID_ACTION,
            f"max_batch must be at least 1 and model_id at least 0, not {message.max_batch} and "
            f"{message.model_id}",
        )
    for model_id in range(message.model_id, message.model_id + message.copies):
        present = instances.get(model_id)
        if present is not None and present.name != name:
            return (
                Code.INVALID_MODEL_ID,
                f"model id {model_id} is {present.name!r} already, so it cannot be {name!r}",
            )
    return None


def infer_fault(
    message: Infer, instance: Instance, frames: tuple[int, ...], *, allow_zero_size_inputs: bool
) -> Fault | None:
    """`frames` are the bytes of the frames that really came behind the message."""
    if message.batch_size < 1 or not 1 <= message.request_count <= message.batch_size:
        return (
            Code.INVALID_BATCH_SIZE,
            f"a batch of {message.batch_size} cannot carry {message.request_count} request(s)",
        )
    if message.batch_size > instance.max_batch:
        return (
            Code.COPY_INPUT_INVALID_BATCH_SIZE,
            f"{instance.name!r} has no batch size {message.batch_size} or more; the largest is "
            f"{instance.max_batch}",
        )
    sizes = message.input_sizes
    if sizes and len(sizes) != message.request_count:
        return (
            Code.COPY_INPUT_BAD_SIZES,
            f"{len(sizes)} input sizes for {message.request_count} request(s)",
        )
    if not frames and allow_zero_size_inputs and not any(sizes):
        return None  # the common case: nothing travels
    expected = tuple(size for size in sizes if size != 0)
    if frames != expected:
        return (
            Code.COPY_INPUT_BAD_SIZES,
            f"input_sizes says {list(expected)} bytes, the frames have {list(frames)}",
        )
    for size in expected:
        if size != instance.input_bytes:
            return (
                Code.COPY_INPUT_INVALID_INPUT,
                f"an input of {instance.name!r} has {instance.input_bytes} bytes, not {size}",
            )
    if len(expected) < message.request_count and not allow_zero_size_inputs:
        return (
            Code.COPY_INPUT_INVALID_INPUT,
            "an input of zero bytes, and this worker does not generate inputs "
            "(allow_zero_size_inputs is off)",
        )
    return None
