"""What peers may send. Each check returns a sentence that says what to mend, or an empty string."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

from slosched.config import MOST_PUT_ASIDE, PUT_ASIDE_CHARS
from slosched.core.scheduler.foreign_text import printable
from slosched.core.scheduler.length_classes import input_error, lengths_of, with_signature
from slosched.core.scheduler.state import Instance, ModelState
from slosched.messages import FunctionInfo, InferRequest, LoadModelResult, Span, WorkerWelcome
from slosched.signature import BYTES, Tensor, described, row_bytes, signature_error, single
from slosched.units import NS_PER_S

#: Size classes of a function, at most.
MOST_SIZE_CLASSES = 16
#: A multiple of any b1 that is taken (`_LONGEST_NS`) is then 114 years at most.
_USUAL_FACTOR = 1e6


def request_error(message: InferRequest, model: Instance | None, bytes_behind: int) -> str:
    """Return what makes the request impossible; empty if nothing does."""
    if model is None or model.state is not ModelState.LOADED or model.result is None or model.taken:
        return f"no model has the id {message.model_id}; load one first and use the id it gets"
    factor, slo_ns = message.slo_factor, message.slo_ns
    without_input = not bytes_behind and not message.shape
    usual = 0.0 <= factor <= _USUAL_FACTOR and 0 <= slo_ns < 2**62
    if without_input and usual and not message.length:
        return ""  # the common case: all is said by the SLO
    if not 0.0 <= factor < math.inf:  # nor a NaN
        return f"the SLO factor must be a finite number >= 0, not {factor}"
    if not 0 <= slo_ns < 2**62 or factor * model.b1_ns >= 2**62:
        return f"the SLO must be within 0..146 years, not {message.slo_ns} ns"
    if model.function is not None:
        return call_error(model.name, model.function, message.length, bytes_behind)
    inputs, length = model.result.inputs, message.length
    tensor = single(inputs)
    if tensor is None or length:
        wrong = input_error(model.result, model.name, length, message.signature, bytes_behind)
        if wrong or without_input:
            return wrong
        return _frame_error(inputs, length, bytes_behind)
    if without_input:
        return ""
    if message.shape != tensor.shape or message.dtype != tensor.dtype:
        return (
            f"model {model.name!r} takes {tensor.dtype} of shape {tensor.shape}, "
            f"not {printable(message.dtype) or 'an unnamed dtype'} of shape {message.shape}"
        )
    expected = tensor.bytes_at(0)
    if bytes_behind != expected:
        return f"the input has {bytes_behind} bytes; {tensor.shape} has {expected}"
    return ""


def call_error(name: str, function: FunctionInfo, size_class: int, payload_bytes: int) -> str:
    """What is wrong with the arguments of a call, in a sentence; empty if nothing is."""
    if not 0 <= size_class < function.size_classes:
        last = function.size_classes - 1
        return (
            f"the size classes of function {name!r} end at {last}; there is no class {size_class}"
        )
    if 0 < function.max_payload_bytes < payload_bytes:
        return (
            f"the arguments take {payload_bytes:,} bytes; function {name!r} takes at most "
            f"{function.max_payload_bytes:,}"
        )
    return ""


def _frame_error(inputs: Sequence[Tensor], length: int, bytes_behind: int) -> str:
    expected = row_bytes(inputs, length)
    of_any_size = any(tensor.dtype == BYTES for tensor in inputs)
    if bytes_behind == expected or (of_any_size and bytes_behind < expected):
        return ""
    most = "at most " if of_any_size else ""
    at = f" at length {length}" if length else ""
    return f"the inputs have {bytes_behind} bytes; {described(inputs)}{at} has {most}{expected}"


_MAX_GPUS_PER_WORKER = 1024
_MOST_SLOTS = 1024
_MAX_BATCH_CLASSES = 1024
_LONGEST_NS = 3600 * NS_PER_S


def worker_error(message: WorkerWelcome) -> str:
    """Return what makes the welcome impossible; empty if nothing does."""
    ids = [gpu.gpu_id for gpu in message.gpus]
    if not 1 <= len(ids) <= _MAX_GPUS_PER_WORKER or len(set(ids)) != len(ids) or min(ids) < 0:
        return (
            f"its GPU ids must be 1 to {_MAX_GPUS_PER_WORKER} different numbers >= 0, not {ids[:8]}"
        )
    for gpu in message.gpus:
        if not (0 < gpu.pages < 2**40 and 0 < gpu.page_bytes < 2**40):
            return f"GPU {gpu.gpu_id} has {gpu.pages} pages of {gpu.page_bytes} bytes"
        if not 1 <= gpu.slots <= (_MOST_SLOTS if gpu.host else 1):
            return (
                f"device {gpu.gpu_id} has {gpu.slots} slots; a GPU has 1, a host 1 to {_MOST_SLOTS}"
            )
    if not set(message.functions) <= set(message.loadable):
        return "it offers functions that are not among what can be loaded from it"
    return _inventory_error(message)


#: An id of an instance is below this: the numbers of its queues stand above (state.py).
_IDS_BELOW = 2**39
_MOST_INSTANCES = 200_000


def _inventory_error(message: WorkerWelcome) -> str:
    names = [each.name for each in message.inventory]
    if len(set(names)) != len(names) or not all(name and name.isprintable() for name in names):
        return "its inventory does not have each name once"
    if not all(each.runs for each in message.inventory):
        return "its inventory has a name without instances"
    runs = sorted((*run, each.result.pages) for each in message.inventory for run in each.runs)
    if any(
        not (0 <= first < _IDS_BELOW and 0 < count <= _MOST_INSTANCES) for first, count, _ in runs
    ):
        return "its inventory has ids or counts that cannot be"
    if sum(count for _, count, _ in runs) > _MOST_INSTANCES:
        return f"its inventory has more than {_MOST_INSTANCES} instances"
    if any(a[0] + a[1] > b[0] for a, b in pairwise(runs)):
        return "its inventory has an id twice"
    for each in message.inventory:
        wrong = model_error(with_signature(each.result))
        if wrong:
            return f"it holds {each.name!r}, but {wrong}"
    for gpu in message.gpus:
        pages = 0
        for model_id in set(gpu.resident):
            place = bisect_right(runs, (model_id, _IDS_BELOW, 0)) - 1
            if place < 0 or model_id >= runs[place][0] + runs[place][1]:
                return f"GPU {gpu.gpu_id} has weights of model {model_id}, which it does not hold"
            pages += runs[place][2]
        if len(set(gpu.resident)) != len(gpu.resident) or pages > gpu.pages:
            return f"the weights on GPU {gpu.gpu_id} take {pages} of {gpu.pages} pages, or are there twice"
    return ""


def reasons_of(entries: Sequence[tuple[str, str]]) -> dict[str, str]:
    """What a worker put aside, or left out, name to reason: bounded, and fit for a terminal."""
    return {
        printable(name, PUT_ASIDE_CHARS): printable(reason, PUT_ASIDE_CHARS)
        for name, reason in entries[:MOST_PUT_ASIDE]
    }


def model_error(result: LoadModelResult) -> str:
    """Return what makes the prepared model impossible; empty if nothing does."""
    batches, exec_ns = result.batch_sizes, result.exec_ns
    wrong = _times_error(batches, exec_ns)
    if wrong:
        return wrong
    if not 0 <= result.weights_ns < _LONGEST_NS:
        return "its times must be above 0 and below an hour"
    least = 1 if result.function is None else 0
    if not (least <= result.pages < 2**40 and 0 <= result.weights_bytes < 2**60):
        return f"its weights take {result.pages} pages, {result.weights_bytes} bytes"
    if result.function is not None:
        return _function_error(result, result.function)
    wrong = signature_error(result.inputs, result.outputs, lengths_of(result))
    if wrong:
        return wrong
    for each in result.length_classes:
        wrong = _times_error(each.batch_sizes, each.exec_ns)
        if wrong:
            return f"at length {each.length} {wrong}"
    longest = result.length_classes[-1:]
    if longest and (longest[0].batch_sizes, longest[0].exec_ns) != (batches, exec_ns):
        return "its longest length class has other times than the model"
    return ""


def _function_error(result: LoadModelResult, function: FunctionInfo) -> str:
    if result.batch_sizes != (1,) or result.length_classes:
        return "its batch sizes or length classes are not those of a function"
    if not 1 <= function.size_classes <= MOST_SIZE_CLASSES:
        return f"a function has 1 to {MOST_SIZE_CLASSES} size classes, not {function.size_classes}"
    if min(function.slo_ns, function.limit_ns, function.max_payload_bytes) < 0:
        return "its SLO, its limit and the size of its payloads must be at least 0"
    if not 0 <= function.prepare_ns < _LONGEST_NS or (function.prepare_ns and not function.gpu):
        return "its host parts take 0 to an hour, and only functions for GPUs have some"
    return ""


def _times_error(batches: Sequence[int], exec_ns: Sequence[int]) -> str:
    if not 0 < len(batches) == len(exec_ns) <= _MAX_BATCH_CLASSES:
        return f"it lists {len(batches)} batch sizes and {len(exec_ns)} exec times"
    if batches[0] != 1 or any(a >= b for a, b in pairwise(batches)):
        return f"its batch sizes must rise from 1, not be {tuple(batches[:8])}"
    if not all(0 < ns < _LONGEST_NS for ns in exec_ns):
        return "its times must be above 0 and below an hour"
    return ""


def plausible(span: Span, *, sent_ns: int, now_ns: int) -> Span:
    """`span` itself if it can be; else the nearest that can: after the action was sent, before now.

    A worker whose clock is wrong must not teach the scheduler that its GPU is busy for years.
    """
    longest_ns = max(1, now_ns - sent_ns)
    if (
        span.end_ns <= now_ns
        and 0 < span.duration_ns <= longest_ns
        and span.begin_ns <= span.end_ns
    ):
        return span
    end_ns = min(span.end_ns, now_ns)
    return Span(min(span.begin_ns, end_ns), end_ns, min(max(1, span.duration_ns), longest_ns))
