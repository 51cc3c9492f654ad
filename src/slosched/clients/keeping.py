"""Requests with inputs of their own, sent at given times, whose answers are kept: open loop, into one .npz
file.

What a request asked for and what was answered can then be compared, after a run under load.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from slosched.clients.aio import AsyncClient, connect
from slosched.clients.inference import Inference, Model
from slosched.clients.tensors import Array
from slosched.clock import now_ns
from slosched.codes import Code
from slosched.errors import InvalidConfig, RequestFailed
from slosched.output_files import write_file
from slosched.units import NS_PER_S
from slosched.verdicts import is_heavy

#: The array of send times in a file of requests, ns from the first one on; the others are inputs.
AT_NS = "at_ns"
#: The most requests that one file may have, as all their answers are kept in memory.
MOST_REQUESTS = 1_000_000
#: Verdict and score of a request without one.
_NO_VERDICT, _NO_SCORE = 0, -1.0


@dataclass(frozen=True)
class Requests:
    """Times to send at, ns from the start, ascending, and inputs by name, each (n, *shape)."""

    at_ns: Array
    inputs: Mapping[str, Array]

    def __len__(self) -> int:
        return len(self.at_ns)


def read_requests(path: Path) -> Requests:
    """The requests of an .npz file: at_ns (n,), int64, and an array for each input. Raises InvalidConfig."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, TypeError, AttributeError, BadZipFile) as error:
        raise InvalidConfig(
            f"{path} is not a readable .npz file of requests ({error}); numpy.savez writes one"
        ) from None
    at_ns = arrays.pop(AT_NS, None)
    if at_ns is None or at_ns.ndim != 1 or at_ns.dtype.kind not in "iu" or not len(at_ns):
        raise InvalidConfig(
            f"{path}: {AT_NS} must be a list of whole numbers, a time for each request"
        )
    if len(at_ns) > MOST_REQUESTS:
        raise InvalidConfig(
            f"{path} has {len(at_ns):,} requests; at most {MOST_REQUESTS:,} are taken"
        )
    if at_ns[0] < 0 or (np.diff(at_ns) < 0).any():
        raise InvalidConfig(f"{path}: {AT_NS} must be at least 0 and never fall")
    for name, array in arrays.items():
        if array.ndim == 0 or len(array) != len(at_ns):
            raise InvalidConfig(
                f"{path}: {name} must have one row for each of the {len(at_ns)} requests"
            )
    return Requests(at_ns, arrays)


async def keep_answers(address: str, model: str, requests: Requests) -> dict[str, Array]:
    """Send `requests` to the controller at `address` and return what became of them, an element for each.

    `code`, `met` (in time by the controller's clock), `latency_ns` there, `late_ns` of the send, `stage` of a
    cascade that answered (-1: none), `verdict` and `score` of its last and first stage, and each output as
    `output.NAME`, which is zero without an answer. The SLO is the controller's. Raises what `load` raises.
    """
    async with connect(address, name="keeping") as client:
        [handle] = await client.load(model)
        start_ns = now_ns() + NS_PER_S // 10
        rows = [_Row() for _ in range(len(requests))]
        async with asyncio.TaskGroup() as tasks:
            for place, row in enumerate(rows):
                at_ns = start_ns + int(requests.at_ns[place])
                while (ahead_ns := at_ns - now_ns()) > 0:
                    await asyncio.sleep(ahead_ns / NS_PER_S)
                row.late_ns = now_ns() - at_ns
                inputs = {name: array[place] for name, array in requests.inputs.items()}
                tasks.create_task(_ask(client, handle, inputs, row))
    return _columns(rows, handle)


@dataclass
class _Row:
    """What became of one request."""

    late_ns: int = 0
    code: int = int(Code.CANCELLED)
    answer: Inference | None = None


async def _ask(client: AsyncClient, model: Model, inputs: Mapping[str, Array], row: _Row) -> None:
    try:
        row.answer = await client.infer(model, dict(inputs) or None)
        row.code = row.answer.code
    except RequestFailed as failed:
        row.code = int(failed.code)
        if isinstance(failed.reply, Inference):
            row.answer = failed.reply


def _columns(rows: list[_Row], model: Model) -> dict[str, Array]:
    answers = [row.answer for row in rows]
    columns: dict[str, Array] = {
        "code": np.array([row.code for row in rows], np.int64),
        "late_ns": np.array([row.late_ns for row in rows], np.int64),
        "met": np.array([a is not None and a.ok and a.deadline_met for a in answers], bool),
        "latency_ns": np.array([a.latency_ns if a else -1 for a in answers], np.int64),
        "stage": np.array([_stage(a) for a in answers], np.int64),
        "verdict": np.array(
            [a.stages[-1].verdict if a and a.stages else _NO_VERDICT for a in answers], np.int64
        ),
        "score": np.array(
            [_NO_SCORE if a is None or a.score is None else a.score for a in answers], np.float64
        ),
    }
    for tensor in model.outputs:
        kept: Any = np.zeros((len(rows), *tensor.shape), tensor.dtype)
        for place, answer in enumerate(answers):
            if answer is not None and tensor.name in answer.outputs:
                kept[place] = answer.outputs[tensor.name]
        columns[f"output.{tensor.name}"] = kept
    return columns


def _stage(answer: Inference | None) -> int:
    """Which program of a cascade answered: 0 the light one, 1 the heavy one, -1 none."""
    if answer is None or answer.answered_by is None:
        return -1
    return int(is_heavy(answer.answered_by.verdict))


def write_answers(path: Path, columns: Mapping[str, Array]) -> None:
    """Write what `keep_answers` returned as an .npz file. Raises as `write_file` does."""
    data = io.BytesIO()
    arrays: Any = dict(columns)
    np.savez(data, **arrays)
    write_file(path, data.getvalue())
