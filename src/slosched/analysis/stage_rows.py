"""The stages of single requests of a finished run, from its `stages.tsv`.

A request is known by the client's number and by when it arrived: its first stage entered its queue then, and
each further one when the stage before it ended, to the nanosecond.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slosched.analysis.runs import find_log
from slosched.telemetry import stage_log
from slosched.verdicts import ending, stage_name, stage_words

#: The number of a request and its arrival, in wall-clock ns.
Known = tuple[int, int]


@dataclass(frozen=True)
class StageRow:
    """One stage. Times are wall-clock ns; `start_ns` is None of one that waited in vain."""

    stage: int
    model_id: int
    queued_ns: int
    start_ns: int | None
    exec_ns: int
    end_ns: int
    batch_size: int
    worker_id: int
    gpu_id: int
    answers: bool
    verdict: int
    score: float
    threshold: float
    cascade: str  # "" of no cascade

    @property
    def name(self) -> str:
        return stage_name(self.verdict, self.stage)

    @property
    def ending(self) -> str:
        """How it ended, with the judge's score; empty for a stage that is of no cascade."""
        return ending(self.verdict, self.score, self.threshold)

    def words(self) -> str:
        """The stage in a clause."""
        where = f" on worker {self.worker_id} GPU {self.gpu_id}" if self.worker_id >= 0 else ""
        of = f"{self.cascade}, " if self.cascade else ""
        return stage_words(
            self.verdict,
            name=f"{of}{self.name} model {self.model_id}{where}",
            queued_ns=self.queued_ns,
            start_ns=self.start_ns,
            exec_ns=self.exec_ns,
            end_ns=self.end_ns,
            batch_size=self.batch_size,
            score=self.score,
            threshold=self.threshold,
        )


def read_stages(run_dir: Path, requests: Iterable[Known]) -> dict[Known, list[StageRow]]:
    """Return the stages of those of `requests` that have any, in order; {} for a run without the file.

    Raises MalformedLog.
    """
    path = find_log(run_dir, stage_log.FILE_NAME)
    if path is None:
        return {}
    wanted = set(requests)
    log = stage_log.read_stage_log(path)
    ids = np.array([request_id for request_id, _ in wanted], np.int64)
    places = np.flatnonzero(np.isin(log["request_id"], ids))
    columns = {name: column[places].tolist() for name, column in log.columns.items()}
    by_entry: dict[Known, list[StageRow]] = {}
    for values in zip(*columns.values(), strict=True):
        row = dict(zip(columns, values, strict=True))
        stage = _stage(row)
        by_entry.setdefault((row["request_id"], stage.queued_ns), []).append(stage)
    chains = {request: _chain(by_entry, request) for request in wanted}
    return {request: stages for request, stages in chains.items() if stages}


def _chain(by_entry: dict[Known, list[StageRow]], request: Known) -> list[StageRow]:
    """The stages of one request: each begins to wait where the one before it ended."""
    request_id, at_ns = request
    chain: list[StageRow] = []
    while True:
        entered = by_entry.get((request_id, at_ns), ())
        following = [stage for stage in entered if stage.stage == len(chain)]
        if not following:
            return chain
        chain.append(following[0])
        at_ns = following[0].end_ns


def _stage(row: dict[str, Any]) -> StageRow:
    queued_ns = row["t"] - row["waited"]
    ran = row["exec"] > 0
    return StageRow(
        stage=row["stage"],
        model_id=row["model_id"],
        queued_ns=queued_ns,
        start_ns=queued_ns + row["start"] if ran else None,
        exec_ns=row["exec"],
        end_ns=row["t"],
        batch_size=row["batch_size"],
        worker_id=row["worker_id"],
        gpu_id=row["gpu_id"],
        answers=bool(row["answers"]),
        verdict=row["verdict"],
        score=row["score"],
        threshold=row["threshold"],
        cascade=row["cascade"],
    )
