"""The exec tables of one GPU, by program, of every model and function that its worker prepared."""

from __future__ import annotations

from collections.abc import Mapping

from slosched.core.scheduler.estimators import ExecTable, WindowEstimator
from slosched.core.scheduler.length_classes import (
    host_part_ns,
    program_boundaries,
    program_times,
)
from slosched.messages import LoadModelResult


class ExecTables(dict[str, ExecTable]):
    """Each is made when it is first asked for, from what the worker `prepared`, by name."""

    def __init__(self, prepared: Mapping[str, LoadModelResult]) -> None:
        super().__init__()
        self._prepared = prepared

    def __missing__(self, program: str) -> ExecTable:
        prepared = self._prepared
        table = self[program] = ExecTable(
            program_times(prepared, program), program_boundaries(prepared, program)
        )
        host_ns = host_part_ns(prepared, program)
        if host_ns:
            table.host_part = WindowEstimator(host_ns)
        return table
