"""The controller's run directory: both TSV logs, the reasons, the manifest and the console's counters."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slosched import clock
from slosched.config import ControllerConfig
from slosched.core.scheduler.interface import (
    ActionRecord,
    CallPart,
    CallRecord,
    PlanRecord,
    RequestRecord,
    StageRecord,
)
from slosched.core.scheduler.policies import POLICY_TYPES, resolved
from slosched.telemetry import (
    action_log,
    call_log,
    call_part_log,
    plan_log,
    reason_log,
    request_log,
    segment_log,
    stage_log,
)
from slosched.telemetry.console import ControllerConsole
from slosched.telemetry.manifest import ManifestNotWritten, finish_manifest, write_manifest
from slosched.telemetry.recent import LastMinutes
from slosched.telemetry.run_dir import claim_run_dir, default_log_dir
from slosched.telemetry.source import code_from_outside
from slosched.telemetry.tally import Recent, Tally
from slosched.telemetry.writer import LogWriter, Rotation

REQUEST_LOG = "clockwork_request_log.tsv"
ACTION_LOG = "clockwork_action_log.tsv"

#: What the manifest calls the rows of a log that not every run has.
_COUNTED_AS = {
    stage_log.FILE_NAME: "stage_rows",
    plan_log.FILE_NAME: "plan_rows",
    segment_log.FILE_NAME: "interrupted_actions",
    call_log.FILE_NAME: "call_rows",
    call_part_log.FILE_NAME: "call_part_rows",
}

Announce = Callable[[str], None]
Rows = Callable[[list[Any]], bytes]
_ONE_FILE = Rotation()


class RunLog:
    """Derives every telemetry row of a run, once, from the scheduler's records."""

    def __init__(
        self, directory: Path, *, announce: Announce, rotation: Rotation = _ONE_FILE
    ) -> None:
        self.directory = directory
        self._announce = announce
        self._requests = LogWriter(
            directory / REQUEST_LOG,
            request_log.HEADER,
            rows=request_log.request_rows,
            rotation=rotation,
            on_error=announce,
        )
        self._actions = LogWriter(
            directory / ACTION_LOG,
            action_log.HEADER,
            rows=action_log.action_rows,
            rotation=rotation,
            on_error=announce,
        )
        self._reasons = LogWriter(
            directory / reason_log.FILE_NAME,
            reason_log.HEADER,
            rows=reason_log.reason_rows,
            rotation=rotation,
            on_error=announce,
        )
        #: By file name, those that are made for their first record.
        self._late: dict[str, LogWriter] = {}
        self._rotation = rotation
        self.tally = Tally()
        self.recent = Recent(self.tally)
        self._console = ControllerConsole(self.tally, now_ns=clock.now_ns())
        self.last_minutes = LastMinutes()
        self._closed = False

    @classmethod
    def open(cls, config: ControllerConfig, *, announce: Announce) -> RunLog:
        """Claim a directory for this run. Raises InvalidConfig when it cannot be made or written."""
        wanted = Path(config.log_dir) if config.log_dir else default_log_dir("controller")
        options = {**asdict(config), "scheduler": asdict(resolved(config.scheduler))}
        directory = claim_run_dir(wanted)
        outside = code_from_outside([POLICY_TYPES.origin(config.scheduler.policy)])
        write_manifest(directory, "controller", options, extra=outside)
        rotation = Rotation(config.log_bytes, config.log_keep)
        return cls(directory, announce=announce, rotation=rotation)

    def request(self, record: RequestRecord) -> None:
        self._requests.append(record)
        if reason_log.has_row(record):
            self._reasons.append(record)
        self.tally.add_request(record)
        self.last_minutes.add_request(record)

    def stage(self, record: StageRecord) -> None:
        self._late_log(stage_log.FILE_NAME, stage_log.HEADER, stage_log.stage_rows).append(record)
        self.tally.cascades.add_stage(record)

    def plan(self, record: PlanRecord) -> None:
        self._late_log(plan_log.FILE_NAME, plan_log.HEADER, plan_log.plan_rows).append(record)
        self.tally.cascades.add_plan(record)

    def call(self, record: CallRecord) -> None:
        self._late_log(call_log.FILE_NAME, call_log.HEADER, call_log.call_rows).append(record)
        self.tally.calls.add(record)

    def call_part(self, record: CallPart) -> None:
        log, rows = call_part_log, call_part_log.call_part_rows
        self._late_log(log.FILE_NAME, log.HEADER, rows).append(record)

    def action(self, record: ActionRecord) -> None:
        if action_log.has_row(record):
            self._actions.append(record)
        if record.segments:
            self._interrupted(record)
        self.tally.add_action(record)
        self.last_minutes.add_action(record)

    def _interrupted(self, record: ActionRecord) -> None:
        log, rows = segment_log, segment_log.segment_rows
        self._late_log(log.FILE_NAME, log.HEADER, rows).append(record)

    def _late_log(self, name: str, header: str, rows: Rows) -> LogWriter:
        log = self._late.get(name)
        if log is None:
            log = self._late[name] = LogWriter(
                self.directory / name,
                header,
                rows=rows,
                rotation=self._rotation,
                on_error=self._announce,
            )
        return log

    def console_lines(self, now_ns: int) -> list[str]:
        """Human-readable lines about the time since the last call; often none. Called every 10 s."""
        self.recent.note(now_ns)
        return self._console.lines(now_ns)

    def rows_dropped(self) -> int:
        """Rows of all logs that the disk did not take."""
        logs = (self._requests, self._actions, self._reasons, *self._late.values())
        return sum(log.counts().dropped for log in logs)

    def close(
        self,
        *,
        arrived: int,
        answered: int,
        by_code: dict[int, int],
        refused_at_door: int,
        bad_messages: int,
    ) -> None:
        """Flush the logs and finish the manifest. Idempotent."""
        if self._closed:
            return
        self._closed = True
        requests, actions = self._requests.close(), self._actions.close()
        reasons = self._reasons.close()
        late = {
            key: self._late[name].close().written
            for name, key in _COUNTED_AS.items()
            if name in self._late
        }
        outcome = {
            "complete": arrived == answered
            and requests.dropped == actions.dropped == reasons.dropped == 0,
            "requests_arrived": arrived,
            "requests_answered": answered,
            "requests_refused_at_door": refused_at_door,
            "requests_by_code": {str(code): n for code, n in sorted(by_code.items())},
            "request_rows": requests.written,
            "request_rows_dropped": requests.dropped,
            "action_rows": actions.written,
            "action_rows_dropped": actions.dropped,
            "reason_rows": reasons.written,
            "reason_rows_dropped": reasons.dropped,
            **late,
            "bad_messages": bad_messages,
        }
        with suppress(ManifestNotWritten):
            finish_manifest(self.directory, outcome)
