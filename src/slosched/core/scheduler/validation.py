"""What a client's request must look like. Words for what is wrong, so that the client can mend it."""

from __future__ import annotations

import math

from slosched.core.scheduler.state import Client, Model, ModelState
from slosched.messages import InferRequest
from slosched.units import tensor_bytes


def what_is_wrong(
    client: Client, message: InferRequest, model: Model | None, bytes_behind: int
) -> str:
    """Words for an impossible request; empty when it is fine."""
    if model is None or model.state is not ModelState.LOADED or model.result is None:
        return f"no model has the id {message.model_id}; load one first and use the id it gets"
    if message.request_id in client.requests:
        return f"request id {message.request_id} is still unanswered; ids must be unique"
    factor = message.slo_factor
    if math.isnan(factor) or math.isinf(factor) or factor < 0:
        return f"the SLO factor must be a finite number >= 0, not {factor}"
    if not 0 <= message.slo_ns < 2**62 or factor * model.b1_ns >= 2**62:
        return f"the SLO must be within 0..146 years, not {message.slo_ns} ns"
    if bytes_behind == 0 and not message.shape:
        return ""
    loaded = model.result
    if message.shape != loaded.input_shape or message.dtype != loaded.input_dtype:
        return (
            f"model {model.name!r} takes {loaded.input_dtype} of shape {loaded.input_shape}, "
            f"not {message.dtype or 'an unnamed dtype'} of shape {message.shape}"
        )
    expected = tensor_bytes(loaded.input_shape, loaded.input_dtype)
    if bytes_behind != expected:
        return f"the input has {bytes_behind} bytes; {loaded.input_shape} has {expected}"
    return ""
