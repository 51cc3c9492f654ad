"""What became of the inferences of one model, as the protocol's ModelStatistics shows it.

Times of a request are those of its slowest row. `queue` is from its arrival at the controller until its start
on the GPU, `compute_infer` its time there, `compute_output` from then until the controller answered, and
`compute_input` the rest: the way from this gateway to the controller and back. A refused or failed request
counts to `fail`. Executions are shared with requests of other clients; here they are counted by rows and size
of the batch.
"""

from __future__ import annotations

from typing import Any

from slosched.messages import InferReply
from slosched.units import NS_PER_MS

_PARTS = ("compute_input", "compute_infer", "compute_output")


class _Sum:
    """A count and a time in ns."""

    __slots__ = ("count", "ns")

    def __init__(self) -> None:
        self.count = self.ns = 0

    def add(self, ns: int) -> None:
        self.count += 1
        if ns > 0:
            self.ns += ns

    def document(self) -> dict[str, int]:
        return {"count": self.count, "ns": self.ns}


class _Batches:
    """Rows that ran in batches of one size, and their times, each counted once a row."""

    __slots__ = ("infer_ns", "input_ns", "output_ns", "rows")

    def __init__(self) -> None:
        self.rows = self.input_ns = self.infer_ns = self.output_ns = 0


class ModelStatistics:
    """The counts of one version of a model."""

    def __init__(self) -> None:
        self.rows = 0  # that were answered
        self.last_ms = 0  # since 1970; 0: none yet
        self.success, self.fail, self.queue = _Sum(), _Sum(), _Sum()
        self._input, self._infer, self._output = _Sum(), _Sum(), _Sum()
        self._by_size: dict[int, _Batches] = {}

    def served(self, slowest: InferReply, replies: list[InferReply], total_ns: int) -> None:
        """A request was answered after `total_ns` here; `slowest` is its last row's reply."""
        self.success.add(total_ns)
        start_ns = max(0, slowest.start_ns)
        self.queue.add(start_ns)
        self._input.add(total_ns - slowest.latency_ns)
        self._infer.add(slowest.exec_ns)
        self._output.add(slowest.latency_ns - start_ns - slowest.exec_ns)
        self.rows += len(replies)
        for reply in replies:
            size = reply.batch_size
            batches = self._by_size.get(size)
            if batches is None:  # a model has few sizes
                batches = self._by_size[size] = _Batches()
            batches.rows += 1
            batches.input_ns += max(0, total_ns - reply.latency_ns)
            batches.infer_ns += reply.exec_ns
            batches.output_ns += max(0, reply.latency_ns - max(0, reply.start_ns) - reply.exec_ns)

    def failed(self, total_ns: int) -> None:
        """A request was refused, or failed, after `total_ns`."""
        self.fail.add(total_ns)

    def document(self, name: str, version: str) -> dict[str, Any]:
        """The protocol's form."""
        batches = [
            self._batch(size, each) for size, each in sorted(self._by_size.items()) if size > 0
        ]
        nothing = {"count": 0, "ns": 0}
        return {
            "name": name,
            "version": version,
            "last_inference": self.last_ms,
            "inference_count": self.rows,
            "execution_count": sum(each["compute_infer"]["count"] for each in batches),
            "inference_stats": {
                "success": self.success.document(),
                "fail": self.fail.document(),
                "queue": self.queue.document(),
                "compute_input": self._input.document(),
                "compute_infer": self._infer.document(),
                "compute_output": self._output.document(),
                "cache_hit": nothing,
                "cache_miss": nothing,
            },
            "batch_stats": batches,
        }

    @staticmethod
    def _batch(size: int, each: _Batches) -> dict[str, Any]:
        """Batches of one size: as many as the rows fill, each with the mean of its rows' times."""
        count = -(-each.rows // size)
        times = (each.input_ns, each.infer_ns, each.output_ns)
        parts = {
            part: {"count": count, "ns": ns * count // each.rows}
            for part, ns in zip(_PARTS, times, strict=True)
        }
        return {"batch_size": size, **parts}


def in_ms(unix_ns: int) -> int:
    """A time since 1970 in ms, as `last_inference` has it."""
    return unix_ns // NS_PER_MS
