"""Reads the rows that a member has written, also where it died in the middle of one."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import msgspec

from slosched.share_spec import Interruption, Request, Row

_decode = msgspec.json.Decoder(Row).decode


def read_rows(path: Path, job: int, at_ns: int) -> list[Request | Interruption]:
    """The rows of `job` in the window that began at `at_ns`, and its warm-ups.

    A row that is not whole is left out. A request belongs to the window in which it arrived. No file: no rows.
    """
    found: list[Request | Interruption] = []
    with suppress(OSError), path.open("rb") as file:
        for line in file:
            try:
                row = _decode(line)
            except msgspec.MsgspecError:
                continue
            request, pause = row.request, row.interruption
            if request is not None and request.job == job:
                if request.warmup or request.arrived_ns >= at_ns:
                    found.append(request)
            elif pause is not None and pause.job == job and pause.resumed_ns >= at_ns:
                found.append(pause)
    return found
